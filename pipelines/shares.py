"""The shares of domains: within their roles, by selected tokens, and in a mixture of both roles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipelines.errors import EmptyInput
from pipelines.manifests import Member


def role_tokens(selection: Sequence[Member]) -> dict[str, dict[str, int]]:
    """Return, by role, the selected tokens of each domain, sorted."""
    import duckdb

    query = "select role, domain, sum(tokens)::bigint from read_parquet($paths) where selected group by all order by all"
    found: dict[str, dict[str, int]] = {}
    for role, domain, tokens in duckdb.sql(query, params={"paths": [str(member.path) for member in selection]}).fetchall():
        found.setdefault(role, {})[domain] = tokens
    return found


def role_shares(selection: Sequence[Member]) -> dict[str, dict[str, float]]:
    """Return, by role, each domain's share of the selected tokens of that role."""
    found = role_tokens(selection)
    return {role: {domain: count / sum(tokens.values()) for domain, count in tokens.items()} for role, tokens in found.items()}


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


def domain_tokens(selection: Sequence[Member]) -> dict[str, int]:
    """Return the selected tokens of each domain."""
    return {domain: count for tokens in role_tokens(selection).values() for domain, count in tokens.items()}
