"""The shares of domains: within their roles, by selected tokens, and in a mixture of both roles."""

from __future__ import annotations

from collections.abc import Mapping

from pipelines.errors import EmptyInput
from pipelines.manifests import Member


def role_shares(selection: tuple[Member, ...]) -> dict[str, dict[str, float]]:
    """Return, by role, each domain's share of the selected tokens of that role."""
    rows = _selected_tokens(selection)
    totals: dict[str, int] = {}
    for role, _, tokens in rows:
        totals[role] = totals.get(role, 0) + tokens
    return {role: {d: t / totals[role] for r, d, t in rows if r == role} for role in totals}


def mixed_shares(by_role: Mapping[str, Mapping[str, float]], ratio: float) -> dict[str, float]:
    """Return the shares of a mixture with target share `ratio`; within a role by selected tokens.

    Raises:
        EmptyInput: a role that is to be read has no selected passage.
    """
    wanted = {"general": 1.0 - ratio, "target": ratio}
    for role, share in wanted.items():
        if share > 0 and role not in by_role:
            raise EmptyInput(f"no {role} passage was selected; a mixture with target share {ratio} needs both roles")
    shares = {d: wanted[role] * s for role in ("general", "target") for d, s in by_role.get(role, {}).items() if wanted[role] > 0}
    return dict(sorted(shares.items()))


def domain_tokens(selection: tuple[Member, ...]) -> dict[str, int]:
    """Return the selected tokens of each domain."""
    return {domain: tokens for _, domain, tokens in _selected_tokens(selection)}


def _selected_tokens(selection: tuple[Member, ...]) -> list[tuple[str, str, int]]:
    """Return role, domain and selected tokens."""
    import duckdb

    query = "select role, domain, sum(tokens)::bigint from read_parquet($paths) where selected group by all order by all"
    return duckdb.sql(query, params={"paths": [str(member.path) for member in selection]}).fetchall()
