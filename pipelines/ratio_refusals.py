"""Why an estimate of the critical ratio is not to be trusted: a code, what was seen, and what would cure it.

A refusal keeps the estimate from being used; a warning stands beside it. Both are rows of `code`, `seen` and `remedy`, and
bounds are in units of the tolerance, since the same error matters more where less is allowed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from pipelines.manifests import Json
from pipelines.probe_courses import MIN_RATIOS
from pipelines.probe_losses import ProbeLosses, ProbePoints, stratified_errors
from pipelines.ratio_estimate import MIN_LENGTHS, RatioEstimate, RatioSettings
from pipelines.ratio_laws import REFERENCE

MAX_LEFT_OUT = 0.5
"""Leave-one-ratio-out error of the law, in tolerances."""
MAX_ERROR = 0.2
"""Standard error of the general loss next to the estimate, in tolerances."""
MARGIN = 1.1
"""A tenth more windows than the error asks for: it is itself an estimate."""
WITNESS = 0.5
"""A law further than this from the points, in tolerances, is no witness against another."""
DISAGREE = 0.15
DISAGREE_WARNING = 0.05
"""How far the roots of laws that fit may lie apart."""
MAX_CONTAMINATED = 0.05
"""Share of the general windows that may hold training text."""

Row = dict[str, str]


@dataclass(frozen=True)
class Evidence:
    """All that a refusal is about."""

    settings: RatioSettings
    losses: ProbeLosses
    points: ProbePoints
    """At the length of training that the estimate is read from."""
    found: RatioEstimate
    available: Mapping[str, int]
    """Selected tokens by role."""

    @property
    def ratio(self) -> float | None:
        """The estimate, where there is one that the points bracket."""
        return self.found.value if math.isfinite(self.found.value) and self.found.bracketed else None


def refusals(evidence: Evidence) -> list[Row]:
    """Return every reason to refuse."""
    return [row for rule in REFUSALS for row in rule(evidence)]


def warnings(evidence: Evidence) -> list[Row]:
    """Return what a reader of the estimate is to know."""
    return [row for rule in WARNINGS for row in rule(evidence)]


def _row(code: str, seen: str, remedy: str) -> Row:
    return {"code": code, "seen": seen, "remedy": remedy}


def _too_few_ratios(e: Evidence) -> Iterator[Row]:
    have = e.points.replayed
    if e.found.fitted and (len(have) >= MIN_RATIOS or e.found.along):
        return
    early = _stopped(e)
    seen = f"; R = {', '.join(f'{r:.2f}' for r in early)} stopped before" if early else ""
    wanted = max(1, MIN_RATIOS - len(have))
    cures = [", or let those that stopped run on"] if early else []
    cures += [", or measure at more points (`measure_at`)"] if e.found.along and len(have) >= MIN_RATIOS else []
    yield _row(
        "too_few_ratios",
        f"{len(have)} distinct ratios below 1 at {e.points.tokens:,} tokens{seen}",
        f"add {wanted} to `mixture.ratios`{''.join(cures)}; three is the least, and the law {e.found.law} may need more",
    )


def _not_bracketed(e: Evidence) -> Iterator[Row]:
    """The ratio to add lies halfway to one that stopped, at the law's root where that is near, or halfway to the end."""
    if e.found.bracketed or not len(e.points.replayed):
        return
    low, high, here = float(e.points.replayed[0]), float(e.points.replayed[-1]), e.found.here
    above, below = [r for r in _stopped(e) if r > high], [r for r in _stopped(e) if r < low]
    if e.found.holding is not None:
        near = here + 0.05 if high < here < 0.9 else (1.0 + high) / 2
        higher = (high + min(above)) / 2 if above else near
        yield _row(
            "not_bracketed",
            f"every ratio up to {high:.2f} holds the {_bound(e)}{_and_stopped(above)}",
            f"add a higher ratio, such as {higher:.2f}, or lower the tolerance",
        )
        return
    near = here - 0.05 if 0.1 < here < low else low / 2
    lower = (low + max(below)) / 2 if below else near
    yield _row(
        "not_bracketed",
        f"no ratio down to {low:.2f} holds the {_bound(e)}{_and_stopped(below)}",
        f"add a lower ratio, such as {lower:.2f}, or train the base longer",
    )


def _stopped(e: Evidence) -> list[float]:
    """Return the ratios that stopped before the length that is judged, sorted."""
    return sorted({run.ratio for run in e.losses.runs if run.stopped and run.ratio < 1.0} - set(e.points.replayed.tolist()))


def _and_stopped(ratios: list[float]) -> str:
    listed = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    return f", and R = {listed} stopped before {'they' if len(ratios) > 1 else 'it'} came so far" if ratios else ""


def _loo_error(e: Evidence) -> Iterator[Row]:
    """Over the ratios between two others: one at an end is extrapolated to, and data order alone then moves it by more than the bound."""
    chosen = next(row for row in e.found.laws if row["chosen"])
    error, worst = chosen["left_out_inside_nats"], chosen["worst_inside"]
    if len(e.points.replayed) <= MIN_RATIOS or error is None or error <= MAX_LEFT_OUT * e.found.tolerance:  # type: ignore[operator]
        return
    yield _row(
        "loo_error",
        f"the law misses a ratio that it was not fitted to by {error:.3f} nats, {float(error) / e.found.tolerance:.1f} tolerances; "  # type: ignore[arg-type]
        f"R = {worst:.2f} most",
        f"add the ratio {_beside(e, float(worst)):.2f}, or take another law (`law: auto`)",  # type: ignore[arg-type]
    )


def _noisy_evaluation(e: Evidence) -> Iterator[Row]:
    inside = np.nonzero(e.points.ratios < 1.0)[0]
    if not len(inside):
        return
    ratios, allowed = e.points.ratios[inside], MAX_ERROR * e.found.tolerance
    crossing = e.found.here if math.isfinite(e.found.here) else float(ratios.mean())
    nearest = inside[int(np.argmin(np.abs(ratios - crossing)))]
    error = float(e.points.errors[nearest])
    if error <= allowed:
        return
    now = e.points.general_NW.shape[1]
    times = math.ceil(MARGIN * (error / allowed) ** 2) if math.isfinite(error) else None
    wanted = f"{times}x as many held-out windows, {times * now:,} general ones" if times else "two or more held-out windows"
    yield _row(
        "noisy_evaluation",
        f"standard error {error:.4f} nats at R = {e.points.ratios[nearest]:.2f} over {now} windows; a fifth of the tolerance is "
        f"{allowed:.4f}",
        f"measure {wanted} (`mixture.windows`)",
    )


def _non_monotone(e: Evidence) -> Iterator[Row]:
    for low, high in pairwise(e.points.replayed):
        below, above = e.points.ratios == low, e.points.ratios == high
        step_W = e.points.general_NW[above].mean(axis=0) - e.points.general_NW[below].mean(axis=0)
        noise = e.settings.run_noise_nats * math.sqrt(1 / below.sum() + 1 / above.sum())
        error = math.hypot(float(stratified_errors(step_W[None], e.points.stratum_W)[0]), noise)
        if step_W.mean() < -2 * error:
            yield _row(
                "non_monotone",
                f"the general loss falls by {-step_W.mean():.4f} nats from R = {low:.2f} to {high:.2f}, beyond two standard errors "
                f"({error:.4f})",
                f"measure more windows, or more seeds of R = {low:.2f} and {high:.2f} (`mixture.seeds`)",
            )


def _target_not_learned(e: Evidence) -> Iterator[Row]:
    """Goal 2 of the paper's definition 1."""
    failed = np.unique(e.points.ratios[(e.points.ratios > 0) & (e.points.target >= 0)])
    if len(failed):
        yield _row(
            "target_not_learned",
            f"the target loss did not fall at R = {', '.join(f'{r:.2f}' for r in failed)}",
            f"train the probes longer than {e.points.tokens:,} tokens, or raise their learning rate",
        )


def _wide_interval(e: Evidence) -> Iterator[Row]:
    if e.found.interval is None:
        if e.found.fitted and e.found.extrapolation is None:
            yield _row("wide_interval", "the 95 % interval is not bounded", _narrower(e, None))
        return
    width, allowed = e.found.interval[1] - e.found.interval[0], e.settings.max_interval
    if width > allowed:
        yield _row("wide_interval", f"the 95 % interval is {width:.2f} wide; {allowed:g} is allowed", _narrower(e, width / allowed))


def _narrower(e: Evidence, times: float | None) -> str:
    windows = f"{math.ceil(MARGIN * times**2)}x as many" if times else "more"
    near = f", such as {e.ratio:.2f}" if e.ratio is not None else ""
    return f"measure {windows} held-out windows (`mixture.windows`), or add ratios near the estimate{near}"


def _far_extrapolation(e: Evidence) -> Iterator[Row]:
    further = e.found.extrapolation
    if further is None:
        return
    if further.lengths < MIN_LENGTHS:
        have = "bear the law" if further.by_law else "have an estimate"
        yield _row(
            "far_extrapolation",
            f"from a quarter of {e.points.tokens:,} tokens on {further.lengths} lengths of training {have}; {MIN_LENGTHS} are needed",
            f"measure all windows at more points (`measure_at`), or probe for {e.found.tokens:,.0f} tokens",
        )
    elif further.factor > e.settings.max_extrapolation and not e.settings.allow_extrapolation:
        least = math.ceil(e.found.tokens / e.settings.max_extrapolation)
        yield _row(
            "far_extrapolation",
            f"{e.found.tokens:,.0f} tokens are {further.factor:.1f} times the longest measured, {e.points.tokens:,}; "
            f"{e.settings.max_extrapolation:g} are allowed",
            f"probe for at least {least:,} tokens, or set `allow_extrapolation`",
        )
    elif e.found.fitted and not e.found.value < 1.0:
        which = "every" if e.found.value == 1.0 else "no"
        yield _row(
            "far_extrapolation",
            f"the law says that {which} ratio holds the tolerance after {e.found.tokens:,.0f} tokens, {further.factor:.1f} times the "
            "longest measured",
            f"probe for {e.found.tokens:,.0f} tokens",
        )


def _domain_limited(e: Evidence) -> Iterator[Row]:
    have, tokens = e.available.get("target", 0), e.found.tokens
    if e.ratio is None or e.ratio * tokens <= e.settings.max_epochs * have:
        return
    epochs = f"{e.ratio * tokens / have:.1f} epochs" if have else "without end"
    yield _row(
        "domain_limited",
        f"R = {e.ratio:.2f} of {tokens:,.0f} tokens reads the target's {have:,} tokens {epochs}; {e.settings.max_epochs:g} are allowed",
        f"select {math.ceil(e.ratio * tokens / e.settings.max_epochs):,} target tokens, train for at most "
        f"{int(e.settings.max_epochs * have / e.ratio):,}, or take a ratio of {lasting_ratio(e):.2f}",
    )


def _general_limited(e: Evidence) -> Iterator[Row]:
    have, tokens = e.available.get("general", 0), e.found.tokens
    if e.ratio is None or (1 - e.ratio) * tokens <= e.settings.max_epochs * have:
        return
    epochs = f"{(1 - e.ratio) * tokens / have:.1f} epochs" if have else "without end"
    yield _row(
        "general_limited",
        f"{1 - e.ratio:.2f} of {tokens:,.0f} tokens reads the general {have:,} tokens {epochs}; {e.settings.max_epochs:g} are allowed",
        f"select {math.ceil((1 - e.ratio) * tokens / e.settings.max_epochs):,} general tokens, or train for at most "
        f"{int(e.settings.max_epochs * have / (1 - e.ratio)):,}",
    )


def lasting_ratio(e: Evidence) -> float:
    """Return the largest ratio at which the target's text lasts for the tokens asked for."""
    return min(1.0, e.settings.max_epochs * e.available.get("target", 0) / e.found.tokens)


def _laws_disagree(e: Evidence) -> Iterator[Row]:
    yield from _disagreement(e, DISAGREE, math.inf)


def _laws_differ(e: Evidence) -> Iterator[Row]:
    yield from _disagreement(e, DISAGREE_WARNING, DISAGREE)


def _disagreement(e: Evidence, above: float, up_to: float) -> Iterator[Row]:
    """Yield one row where the furthest witness lies more than `above` and at most `up_to` away."""
    if e.ratio is None or e.settings.criterion == "turn":
        return
    pairs = [(row["law"], row["estimate"], e.found.level) for row in e.found.laws if _is_witness(e, row)]
    if e.found.extrapolation is not None and not e.found.extrapolation.by_law:
        pairs.append(("the law of tokens", e.found.extrapolation.token_law, e.found.value))
    # a law that fits and holds at no ratio has its root below them all
    apart = [(abs(float(theirs or 0.0) - mine), str(name), float(theirs or 0.0), mine) for name, theirs, mine in pairs]
    distance, name, theirs, mine = max(apart, default=(0.0, "", 0.0, 0.0))
    if above < distance <= up_to:
        yield _row(
            "laws_disagree",
            f"{e.found.law} says {mine:.3f}, {'the interpolation' if name == REFERENCE else name} says {theirs:.3f}",
            f"add the ratio {(theirs + mine) / 2:.2f}, where they differ",
        )


def _is_witness(e: Evidence, row: Mapping[str, Json]) -> bool:
    return row["rmse_nats"] is not None and float(row["rmse_nats"]) <= WITNESS * e.found.tolerance  # type: ignore[arg-type]


def _eval_contaminated(e: Evidence) -> Iterator[Row]:
    looked = e.losses.windows.contaminated
    if looked is None:
        return
    general = looked[e.losses.windows.of("general")]
    if general.mean() > MAX_CONTAMINATED:
        yield _row(
            "eval_contaminated",
            f"{int(general.sum())} of {len(general)} general windows share a span with training text; {MAX_CONTAMINATED:.0%} is allowed",
            "hold out documents whose near-duplicates are held out with them, or decontaminate the training text against them",
        )


def _base_unconverged(e: Evidence) -> Iterator[Row]:
    if not len(e.points.replayed):
        return
    lowest, level = float(e.points.replayed[0]), float(e.points.levels()[0])
    if level < -e.found.tolerance:
        yield _row(
            "base_unconverged",
            f"general loss {level:+.3f} nats at R = {lowest:.2f}: the base still improves on general text",
            "the ratio depends on its spare learning; train the base longer",
        )


def _turn_interpolated(e: Evidence) -> Iterator[Row]:
    binding = e.settings.criterion == "turn" or (e.settings.criterion == "both" and e.found.here == e.found.turn)
    if binding and e.found.turn_between:
        low, high = e.found.turn_between
        yield _row(
            "turn_interpolated",
            f"the general loss has turned at R = {low:.2f} and not at {high:.2f}; {e.found.turn:.3f} is interpolated between them",
            f"add the ratio {e.found.turn:.2f}, or probe longer",
        )


def _bound(e: Evidence) -> str:
    return {"level": "tolerance", "turn": "turn", "both": "tolerance and the turn"}[e.settings.criterion]


def _beside(e: Evidence, worst: float) -> float:
    """Return the middle between `worst` and its neighbour towards the estimate."""
    ratios = e.points.replayed
    at = int(np.argmin(np.abs(ratios - worst)))
    towards = e.found.here if math.isfinite(e.found.here) else float(ratios.mean())
    step = 1 if (towards > worst and at + 1 < len(ratios)) or at == 0 else -1
    return float((worst + ratios[at + step]) / 2)


REFUSALS: tuple[Callable[[Evidence], Iterator[Row]], ...] = (
    _too_few_ratios,
    _not_bracketed,
    _loo_error,
    _noisy_evaluation,
    _non_monotone,
    _target_not_learned,
    _wide_interval,
    _far_extrapolation,
    _domain_limited,
    _general_limited,
    _laws_disagree,
    _eval_contaminated,
)
WARNINGS: tuple[Callable[[Evidence], Iterator[Row]], ...] = (_base_unconverged, _laws_differ, _turn_interpolated)
