"""The domain mixture: the share of tokens of each domain at the critical ratio, how often the budget reads it, and what if it runs out.

    domain_mixture: mixture.json  ratio, shares, role_shares, tokens, limits, domains, repeated, exhausted, limited_at_tokens,
                                  target_share, ends_at_tokens
                    mixture.png   shares, with the epochs of each domain

Training reads `shares`, `role_shares`, `ratio` and `limits` (`DomainMixture`); the rest is for whoever looks at it. Tokens are those
of the selection; training counts whole windows, ends of text included, so its positions differ from these by a window or so an epoch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from pipelines.data_order import DomainMixture, Exhaustion
from pipelines.errors import EmptyInput
from pipelines.manifests import Check, Json, Manifest, Member, Outcome
from pipelines.plan import PhaseMixture
from pipelines.plots import new_figure, save_figure
from pipelines.plugins import Settings
from pipelines.rounding import rounded
from pipelines.shares import role_tokens
from pipelines.store import advisory

ROLES: tuple[Literal["general", "target"], ...] = ("general", "target")
ROUNDING = 1e-9


class MixtureSettings(Settings):
    """How the mixture is put together."""

    use: Literal["estimate", "safe"] = "estimate"
    """`safe` takes the lower end of the interval."""
    ratio: float | None = Field(default=None, ge=0, le=1)
    """A fixed target share instead of the measured one."""
    tokens: int = Field(ge=1)
    """Tokens of continued pretraining that the mixture is made for."""
    max_epochs: float = Field(default=4.0, gt=0)
    """Times that a domain is read before it counts as exhausted. Four are almost worth fresh text (Muennighoff et al. 2023,
    2305.16264); it is also the N of UniMax (2304.09151)."""
    on_exhausted: Exhaustion = "repeat"
    """What happens when a domain was read `max_epochs` times. `repeat` reads on, which is reported; `stop` ends the run before the step
    that would; `renormalise` gives its share to the others from then on, in proportion to theirs: to those of its role first, since the
    target share is what was measured, and to the other role where the whole role is exhausted; `cap` foresees that: from the start no
    share asks for more than `max_epochs` (UniMax), and what a cap takes away goes the same way. Under both, a run ends when all that its
    phase may read is exhausted; a domain without a share in a phase is not read in it."""
    phases: tuple[PhaseMixture, ...] = ()
    """What of the tokens is read at shares of its own, in order; all of it at the ratio where empty. Epochs are counted along them; `cap`
    takes all tokens to be read at the ratio, and other phases meet the limit as under `renormalise`."""

    @model_validator(mode="after")
    def _phases_fill_the_budget(self) -> MixtureSettings:
        if self.phases and (found := sum(phase.tokens for phase in self.phases)) != self.tokens:
            raise ValueError(f"phases of {found} tokens for a mixture of {self.tokens}; the phases are all that the mixture is made for")
        return self


@dataclass(frozen=True)
class _Reading:
    """What a budget reads."""

    tokens: dict[str, float]
    """Of each domain."""
    exhausted: dict[str, float]
    """Where `max_epochs` of a domain are over, in tokens of the run; domains that last are left out."""
    ends: float | None
    """Where the run ends before its budget."""


def mix_domains(settings: MixtureSettings, out: Path, *, critical_ratio: Manifest, selection: tuple[Member, ...]) -> Outcome:
    """Write ``mixture.json``: the share of tokens of each domain, how many epochs of it the budget reads, and where it runs out.

    Args:
        critical_ratio: holds ``verified_ratio.json``, or ``critical_ratio.json``, with `ratio` and `safe`. Where the shares of domains
            were searched it has `shares` too, and `safe_shares` to `safe`: these are taken in place of shares by selected tokens.

    Raises:
        EmptyInput: a role or a domain that is to be read has no selected passage.
    """
    selected = role_tokens(selection)
    available = {role: selected.get(role, {}) for role in ROLES}
    wanted = _wanted(settings, _measured(critical_ratio), available)
    mixture = _capped(settings, wanted, available) if settings.on_exhausted == "cap" else wanted
    reading = _read(settings, mixture, {domain: tokens for found in available.values() for domain, tokens in found.items()})
    capped = {domain for domain, share in wanted.shares.items() if _cap(settings, domain, available) < share * (1 - ROUNDING)}
    limited = {*reading.exhausted, *(capped if settings.on_exhausted == "cap" else ())}
    rows = _rows(mixture, reading, available, limited)
    total = sum(reading.tokens.values())
    planned = {role: sum(reading.tokens.get(domain, 0.0) for domain in available[role]) / total for role in ROLES}
    found = {
        "ratio": wanted.ratio,
        "shares": mixture.shares,
        "role_shares": mixture.role_shares,
        "tokens": settings.tokens,
        "limits": {"max_epochs": settings.max_epochs, "on_exhausted": settings.on_exhausted},
        "domains": rows,
        "repeated": [row["domain"] for row in rows if row["epochs"] > settings.max_epochs * (1 + ROUNDING)],
        "exhausted": {domain: round(at) for domain, at in sorted(reading.exhausted.items())},
        "limited_at_tokens": {role: _limited_at(settings, wanted, available[role]) for role in ROLES},
        "target_share": planned["target"],
        "ends_at_tokens": None if reading.ends is None else round(reading.ends),
    }
    (out / "mixture.json").write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    _plot_shares(out / "mixture.png", rows)
    return Outcome(
        counts={"domains": len(rows), "tokens": settings.tokens},
        metrics={"target_share": planned["target"], "max_epochs": max(row["epochs"] for row in rows)},
        tables={"domains": rounded(rows)},
        plots=("mixture.png",),
        details={name: found[name] for name in ("repeated", "exhausted", "limited_at_tokens", "ends_at_tokens")},
    )


def _measured(critical_ratio: Manifest) -> dict[str, Json]:
    names = {entry.path for entry in critical_ratio.files}
    name = "verified_ratio.json" if "verified_ratio.json" in names else "critical_ratio.json"
    return json.loads(critical_ratio.file(name).read_text(encoding="utf-8"))


def _wanted(settings: MixtureSettings, measured: Mapping[str, Json], available: Mapping[str, Mapping[str, int]]) -> DomainMixture:
    """Return the mixture before any limit: shares of domains as they were searched, or within their roles by selected tokens."""
    searched = {} if settings.ratio is not None else _searched(settings, measured)
    if missing := [domain for domain, share in sorted(searched.items()) if share > 0 and all(domain not in a for a in available.values())]:
        raise EmptyInput(
            f"no selected passage of {', '.join(missing)}, which the search gave a share; loosen its filters or raise its budget"
        )
    weights = {role: {domain: searched.get(domain, 0.0) for domain in available[role]} for role in ROLES}
    totals = {role: sum(weights[role].values()) for role in ROLES}
    if settings.ratio is not None:
        ratio = settings.ratio
    elif searched and settings.use == "estimate":
        ratio = totals["target"] / sum(totals.values())
    else:
        ratio = float(measured["safe" if settings.use == "safe" else "ratio"])  # type: ignore[arg-type]
    within = {role: _to_one(weights[role] if totals[role] else available[role]) for role in ROLES if available[role]}
    shares_of_roles = {"general": 1.0 - ratio, "target": ratio}
    if empty := [role for role, share in shares_of_roles.items() if share > 0 and role not in within]:
        raise EmptyInput(
            f"no selected {empty[0]} passage for a mixture with target share {ratio:.3f}; loosen its filters or raise its budget"
        )
    return _mixture(settings, within, shares_of_roles, ratio)


def _searched(settings: MixtureSettings, measured: Mapping[str, Json]) -> Mapping[str, float]:
    """Return the shares of a search over many domains; none where the ratio alone was measured."""
    names = ("safe_shares", "shares") if settings.use == "safe" else ("shares",)
    return next((found for name in names if isinstance(found := measured.get(name), Mapping)), {})


def _mixture(
    settings: MixtureSettings, within: Mapping[str, Mapping[str, float]], shares_of_roles: Mapping[str, float], ratio: float | None
) -> DomainMixture:
    shares = {domain: shares_of_roles[role] * share for role, found in within.items() for domain, share in found.items()}
    return DomainMixture(
        shares={domain: share for domain, share in sorted(shares.items()) if share > 0},
        role_shares={role: dict(found) for role, found in within.items()},
        ratio=ratio,
        max_epochs=settings.max_epochs,
        on_exhausted=settings.on_exhausted,
    )


def _to_one(weights: Mapping[str, float]) -> dict[str, float]:
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


def _cap(settings: MixtureSettings, domain: str, available: Mapping[str, Mapping[str, int]]) -> float:
    """Return the share at which all tokens would read `max_epochs` of `domain`."""
    return settings.max_epochs * sum(found.get(domain, 0) for found in available.values()) / settings.tokens


def _capped(settings: MixtureSettings, wanted: DomainMixture, available: Mapping[str, Mapping[str, int]]) -> DomainMixture:
    """Return `wanted` with no share above its cap; what is cut off goes to the others of the role, and then to the other role."""
    caps = {role: {d: _cap(settings, d, available) for d, s in found.items() if s > 0} for role, found in wanted.role_shares.items()}
    shares_of_roles = {role: sum(wanted.shares.get(domain, 0.0) for domain in caps[role]) for role in caps}
    room = {role: sum(found.values()) if shares_of_roles[role] > 0 else 0.0 for role, found in caps.items()}
    got = _filled(shares_of_roles, room)
    within = {}
    for role, found in wanted.role_shares.items():
        filled = _filled({domain: found[domain] * got[role] for domain in caps[role]}, caps[role]) if got[role] else found
        within[role] = _to_one({domain: filled.get(domain, 0.0) for domain in found})
    return _mixture(settings, within, _to_one(got), wanted.ratio)


def _filled(wanted: Mapping[str, float], caps: Mapping[str, float]) -> dict[str, float]:
    """Return `wanted` with none above its cap and the rest raised in proportion, as far as the caps let the sum stay (water-filling)."""
    total, full = sum(wanted.values()), set()
    while True:
        free = {name: weight for name, weight in wanted.items() if name not in full and weight > 0}
        left = total - sum(caps[name] for name in full)
        level = left / sum(free.values()) if free else 0.0
        over = {name for name, weight in free.items() if weight * level > caps[name]}
        if not over:
            return {name: caps[name] if name in full else weight * level for name, weight in wanted.items()}
        full |= over


def _read(settings: MixtureSettings, mixture: DomainMixture, available: Mapping[str, int]) -> _Reading:
    """Return what the budget reads of each domain, phase after phase, and which of them run out."""
    from pipelines.stream_kernels import flow

    domains = list(available)
    left = settings.max_epochs * np.asarray([available[domain] for domain in domains], dtype=np.float64)
    read, exhausted, begin = np.zeros(len(domains)), {}, 0.0
    for phase in settings.phases or (PhaseMixture(tokens=settings.tokens),):
        course = mixture.course(phase, phase.tokens)
        if missing := [domain for domain in course.domains if domain not in available]:
            raise EmptyInput(f"no selected passage of {', '.join(missing)}; loosen its filters or raise its budget")
        mine = [domains.index(domain) for domain in course.domains]
        bounded = settings.on_exhausted in ("renormalise", "cap")
        moves = flow(course, left[mine] - read[mine] if bounded else np.full(len(mine), np.inf))
        ends = {place: moves.reaches(n, left[place] - read[place]) for n, place in enumerate(mine)}
        over = {domains[place]: begin + time for place, time in ends.items() if time < phase.tokens * (1 - ROUNDING)}
        last = min([moves.end, phase.tokens, *(at - begin for at in over.values() if settings.on_exhausted == "stop")])
        read[mine] += moves.at(last)
        exhausted = {domain: at for domain, at in over.items() if at <= begin + last} | exhausted
        begin += last
        if last < phase.tokens * (1 - ROUNDING):
            return _Reading(dict(zip(domains, read.tolist(), strict=True)), exhausted, begin)
    return _Reading(dict(zip(domains, read.tolist(), strict=True)), exhausted, None)


def _rows(
    mixture: DomainMixture, reading: _Reading, available: Mapping[str, Mapping[str, int]], limited: set[str]
) -> list[dict[str, Json]]:
    total, rows = sum(sum(found.values()) for found in available.values()), []
    for role in ROLES:
        for domain, tokens in available[role].items():
            share = mixture.shares.get(domain, 0.0)
            rows.append(
                {
                    "domain": domain,
                    "role": role,
                    "share": share,
                    "available_tokens": tokens,
                    "planned_tokens": round(reading.tokens[domain]),
                    "epochs": reading.tokens[domain] / tokens,
                    "upsampling": share * total / tokens,
                    "limited": domain in limited,
                }
            )
    return rows


def _limited_at(settings: MixtureSettings, wanted: DomainMixture, available: Mapping[str, int]) -> int | None:
    """Return the tokens beyond which a run at the wanted shares reads a domain of `available` more than `max_epochs` times."""
    budgets = [settings.max_epochs * tokens / wanted.shares[domain] for domain, tokens in available.items() if domain in wanted.shares]
    return round(min(budgets)) if budgets else None


def _plot_shares(path: Path, rows: list[dict[str, Json]]) -> None:
    figure, axes = new_figure(height=0.8 + 0.3 * len(rows))
    colours = {"general": "tab:blue", "target": "tab:orange"}
    bars = axes.barh([str(r["domain"]) for r in rows], [r["share"] for r in rows], color=[colours[str(r["role"])] for r in rows])
    labels = [f"{row['epochs']:.2g} epochs{', limited' if row['limited'] else ''}" for row in rows]
    axes.bar_label(bars, labels, padding=3, fontsize=8)
    axes.margins(x=0.3)
    axes.set(xlabel="share of tokens (general blue, target orange)")
    save_figure(figure, path)


def shares_sum_to_one(draft: Manifest) -> Check:
    """The shares are positive and sum to 1 within 1e-9."""
    shares = json.loads((draft.directory / "mixture.json").read_text())["shares"].values()
    return Check(
        name="shares_sum_to_one",
        passed=abs(sum(shares) - 1.0) < 1e-9 and min(shares) > 0,
        description=f"{len(shares)} shares sum to {sum(shares):.9f}",
    )


@advisory
def within_max_epochs(draft: Manifest) -> Check:
    """No domain is read more often than `max_epochs`, and the selection lasts for all tokens."""
    found = json.loads((draft.directory / "mixture.json").read_text())
    limited, ends = [row["domain"] for row in found["domains"] if row["limited"]], found["ends_at_tokens"]
    said = [f"read too often: {', '.join(found['repeated']) or 'none'}"]
    said += [f"limited to {found['limits']['max_epochs']:g} epochs: {', '.join(limited)}"] if limited and not found["repeated"] else []
    said += [f"the run ends at {ends:,} of {found['tokens']:,} tokens"] if ends is not None else []
    return Check(name="within_max_epochs", passed=not found["repeated"] and ends is None, description="; ".join(said))


MIXTURE_AUDITS = (shares_sum_to_one, within_max_epochs)
