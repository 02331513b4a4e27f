"""The critical ratio from the courses of a few probes, with its interval: at one length of training, by length, and beyond the longest.

    level   the largest R at which the fitted general loss has risen by no more than the tolerance (2407.17467, definition 1)
    turn    the largest R whose general loss has passed its peak (definition 2, for a Lagrange multiplier without bound)
    both    the smaller of the two (definition 3)

Shapes: D rows (the evidence, then its resamples), K lengths of training that bear an estimate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from pydantic import Field, field_validator

from pipelines import plugins
from pipelines.errors import GristmillError, UnknownName
from pipelines.manifests import Json
from pipelines.mixing_laws import FittedLaw, MixingLaw
from pipelines.plugins import Settings
from pipelines.probe_courses import MIN_RATIOS, Courses, Criterion, holds, resample, turning_margins, turns
from pipelines.probe_losses import SAME_TOKENS, ProbeLosses, ProbeRun, Tolerance
from pipelines.ratio_laws import TOKEN_LAW, Anchor, compare_laws, curve_over_tokens, fits, line_over_tokens, number, root

MIN_JACKKNIFE = 4
"""Distinct ratios from which on one can be left out."""
MIN_LENGTHS = 3
"""Lengths of training that a line over tokens needs."""
LATE = 4.0
"""The line is fitted from this part of the longest length on: before it, the general loss is still in its first rise."""


class RatioSettings(Settings):
    """How the critical ratio is estimated."""

    tolerance: Tolerance = Tolerance(nats=0.05)
    """How much the general loss may rise: `nats`, `percent` of the base's loss, or `bits_per_byte`."""
    criterion: Criterion = "level"
    """`level`: the loss has risen by no more than the tolerance; `turn`: it has passed its peak; `both`: the smaller ratio."""
    law: str = "own_share_tokens"
    """A plugin of `mixing_laws/`, or ``auto``: that of `candidates` with the least leave-one-ratio-out error. The default is fitted along
    the courses of all probes and read at `tokens`; ``own_share`` is fitted at one length of training alone."""
    course_from: float = Field(default=1 / 16, ge=0, lt=1)
    """Points before this share of `tokens` bear no law along training: the general loss is then in its first rise. Tokens beyond four times
    the longest measured count as that many, so that points remain."""
    candidates: tuple[str, ...] = Field(default=("own_share", "power", "dcpt"), min_length=1)
    """Laws fitted to the same points and reported beside the first, with a monotone interpolation."""
    draws: int = Field(default=500, ge=1)
    """Bootstrap draws over held-out windows and runs."""
    seed: int = 0
    """Of the bootstrap."""
    max_interval: float = Field(default=0.4, gt=0)
    """A 95 % interval wider than this is refused."""
    tokens: int | None = Field(default=None, ge=1)
    """Tokens of continued pretraining that the ratio is wanted for; absent: the longest that all probes reached."""
    max_extrapolation: float = Field(default=4.0, ge=1)
    """`tokens` beyond this many times the longest measured are refused."""
    allow_extrapolation: bool = False
    """Extrapolate further all the same."""
    max_epochs: float = Field(default=4.0, gt=0)
    """A mixture that reads a role's text more often is refused: later repeats teach less (2305.16264)."""
    run_noise_nats: float = Field(default=0.014, ge=0)
    """Standard deviation over data-order seeds of a run's mean change of loss, taken where a ratio has a single seed. Measured with a base
    of 0.7 M parameters and 400,000 tokens: two seeds lay .0195 nats apart (root mean square of three ratios and two target
    domains), alike at all ratios; a trial at a sixth of the learning rate had .0003 to .0043. Give `seeds` to measure yours."""
    on_refusal: Literal["error", "lower_bound", "manual"] = "lower_bound"
    """`error` stops; `lower_bound` takes the highest measured ratio that held; `manual` takes `ratio`."""
    ratio: float | None = Field(default=None, ge=0, le=1)
    """The ratio taken when `on_refusal` is `manual`."""

    @field_validator("law", "candidates")
    @classmethod
    def _known_laws(cls, given: str | tuple[str, ...]) -> str | tuple[str, ...]:
        names = plugins.names("mixing_laws")
        known, laws = ((*names, "auto"), (given,)) if isinstance(given, str) else (names, given)
        for law in laws:
            if law not in known:
                raise UnknownName("mixing law", law, known)
            if law != "auto" and not plugins.load("mixing_laws", law).reads & {"own_share", "shares"}:  # type: ignore[attr-defined]
                raise ValueError(f"{law} does not depend on the mixture; a ratio is the root of a law that does, such as own_share")
        return given

    @property
    def laws(self) -> tuple[str, ...]:
        """The plugins of `mixing_laws/` that an estimate reads."""
        chosen = () if self.law == "auto" else (self.law,)
        return tuple(sorted({*chosen, *self.candidates, TOKEN_LAW}))


@dataclass(frozen=True)
class Estimator:
    """How a ratio is read from courses."""

    law: MixingLaw
    tolerance: float
    """Nats per token."""
    criterion: Criterion
    anchor: Anchor | None = None
    """The run at the ratio, for a law along training."""

    def levels(self, courses: Courses, places: Sequence[int]) -> np.ndarray:
        """Return the root of the law at every row and point, shape (D, K); NaN where no ratio holds, or the points are too few."""
        found = np.full((len(courses.means_DNA), len(places)), np.nan)
        along = self.fitted(courses, -1) if self.reads_tokens else []  # one law for all points
        for k, place in enumerate(places):
            fitted = along or self.fitted(courses, place)
            found[: len(fitted), k] = [root(law, courses.tokens_A[place], self.tolerance) for law in fitted]
        return found

    @property
    def reads_tokens(self) -> bool:
        """Whether the law is fitted along training."""
        return "tokens" in self.law.reads

    def fitted(self, courses: Courses, place: int) -> list[FittedLaw]:
        """Return the law of every row at point `place`; none where there are too few points."""
        return fits(self.law, courses, place, self.anchor)

    def along(self, courses: Courses, places: Sequence[int]) -> np.ndarray:
        """Return the ratio by the criterion at every row and point, shape (D, K); NaN where no ratio holds."""
        if self.criterion == "level" or not places:
            return self.levels(courses, places)
        turned = np.stack([turns(courses, place) for place in places], axis=1)
        return turned if self.criterion == "turn" else np.minimum(turned, self.levels(courses, places))

    def brackets(self, courses: Courses, place: int) -> bool:
        """Return whether some measured ratio at `place` holds and some does not."""
        held = self.held(courses, place).values()
        return any(held) and not all(held)

    def reaches(self, courses: Courses, value: float) -> bool:
        """Return whether a ratio that a law along training gives beyond the probes lies among those that were probed."""
        probed = courses.ratios_N[courses.along.any(axis=1)]
        return self.reads_tokens and self.criterion == "level" and len(probed) > 0 and bool(probed.min() <= value <= probed.max())

    def held(self, courses: Courses, place: int) -> dict[float, bool]:
        """Return whether each measured ratio holds at `place`; a law along training takes those that ended before as they did."""
        return holds(courses, place, self.tolerance, self.criterion, ended=self.reads_tokens)

    def late(self, courses: Courses) -> list[int]:
        """Return the points that a line over tokens is fitted to: the later ones that bracket the ratio."""
        longest = max((courses.tokens_A[place] for place in courses.lengths), default=0.0)
        return [p for p in courses.lengths if LATE * courses.tokens_A[p] >= longest and self.brackets(courses, p)]

    def beyond(self, courses: Courses, tokens: float) -> np.ndarray:
        """Return the ratio at `tokens`, beyond the longest length, shape (D,): by the law, where it is one along training, and by a line in
        log tokens otherwise; NaN of too few points.
        """
        if self.reads_tokens and self.criterion == "level":
            laws = self.fitted(courses, -1)
            return np.asarray([root(law, tokens, self.tolerance) for law in laws] or [np.nan] * len(courses.means_DNA))
        places = self.late(courses)
        values_DK = self.along(courses, places)
        usable = np.isfinite(values_DK[0]) & (values_DK[0] < 1.0)
        if usable.sum() < MIN_LENGTHS:
            return np.full(len(values_DK), np.nan)
        drawn = np.nan_to_num(values_DK[:, usable], nan=0.0)  # in a draw where none holds the ratio lies below all
        return line_over_tokens(courses.tokens_A[places][usable], drawn, tokens)


@dataclass(frozen=True)
class Extrapolation:
    """A ratio beyond the longest length of training."""

    factor: float
    """Tokens asked for over the longest measured."""
    lengths: int
    """Measured lengths that the law, or the line, was fitted to."""
    token_law: float
    """What the paper's law of tokens says there; NaN where no line was fitted."""
    by_law: bool
    """By the law itself: there was no line."""


@dataclass(frozen=True)
class RatioEstimate:
    """What the probes say of the critical ratio."""

    tokens: float
    """Tokens that it is wanted for."""
    measured_tokens: float
    """The length of training that points, fits and laws are of."""
    tolerance: float
    """Nats per token."""
    law: str
    along: bool
    """Whether the law is one along training, which probes bear that ended earlier, too."""
    fitted: list[FittedLaw]
    """Of every row; none where there are too few points."""
    value: float
    """NaN where the evidence has none."""
    interval: tuple[float, float] | None
    """95 %, of the resamples."""
    here: float
    """The ratio at `measured_tokens`."""
    bracketed: bool
    """Some measured ratio holds, and some does not."""
    holding: float | None
    """The highest measured ratio that holds."""
    level: float
    turn: float
    turn_between: tuple[float, float] | None
    """The measured ratios between which the turn was interpolated."""
    jackknife: list[dict[str, Json]]
    laws: list[dict[str, Json]]
    by_tokens: list[dict[str, Json]]
    extrapolation: Extrapolation | None


def estimate_ratio(
    settings: RatioSettings, losses: ProbeLosses, *, measured: float, tokens: float, anchor: ProbeRun | None = None
) -> RatioEstimate:
    """Estimate the ratio for `tokens` from courses that reach `measured`, one of the points of `losses`; `anchor` is the run at it."""
    place = losses.place(measured)
    held = losses.windows
    tolerance = settings.tolerance.in_nats(held.mean_loss("general"), held.bytes_per_token("general"))
    along = settings.law != "auto" and reads_tokens(settings.law)
    noise, first = settings.run_noise_nats, course_start(settings, measured, tokens)
    courses = resample(losses, draws=settings.draws, seed=settings.seed, run_noise_nats=noise, first=first, parts=along)
    through = None if anchor is None else _where_it_ended(losses, anchor, place)
    laws = compare_laws(_compared(settings), courses, place, tolerance, through)
    name = chosen_law(settings, laws)
    estimator = Estimator(plugins.build("mixing_laws", name), tolerance, settings.criterion, through)  # type: ignore[arg-type]
    by_tokens = estimator.along(courses, courses.lengths)
    at_DK = by_tokens[:, [courses.lengths.index(place)]] if place in courses.lengths else estimator.along(courses, [place])
    further = tokens > SAME_TOKENS * measured
    values = estimator.beyond(courses, tokens) if further else at_DK[:, 0]
    turned = turns(courses.measured(), place)[0]
    return RatioEstimate(
        tokens=tokens,
        measured_tokens=measured,
        tolerance=tolerance,
        law=name,
        along=estimator.reads_tokens,
        fitted=estimator.fitted(courses, place),
        value=float(values[0]),
        interval=interval_95(values),
        here=float(at_DK[0, 0]),
        bracketed=estimator.brackets(courses, place) or (further and estimator.reaches(courses, float(values[0]))),
        holding=max((ratio for ratio, held in estimator.held(courses, place).items() if held), default=None),
        level=float(estimator.levels(courses.measured(), [place])[0, 0]),
        turn=float(turned),
        turn_between=_turned_between(courses, place),
        jackknife=_jackknife(estimator, courses, place, tokens if further else None),
        laws=[{**row, "chosen": row["law"] == name} for row in laws],
        by_tokens=[_by_tokens_row(estimator, courses, p, by_tokens[:, k]) for k, p in enumerate(courses.lengths)],
        extrapolation=_extrapolation(estimator, courses, tokens, measured, values) if further else None,
    )


def _where_it_ended(losses: ProbeLosses, run: ProbeRun, place: int) -> Anchor:
    """Return `run` at the last point up to `place` at which it was measured on all windows."""
    (ended,) = np.nonzero(losses.full[losses.runs.index(run), : place + 1])
    return Anchor(run.ratio, run.seed, int(ended[-1]))


def measured_length(settings: RatioSettings, losses: ProbeLosses) -> tuple[ProbeLosses, float, float]:
    """Return the losses with a point at the length of training that is to be judged, that length, and the tokens that are asked for.

    Raises:
        GristmillError: no probe replays general text, or `settings.tokens` lies before the first point on all windows.
    """
    default = default_tokens(losses)
    if settings.tokens is None:
        return losses, default, default
    longest = _enough_ratios(losses, default)
    if settings.law != "auto" and reads_tokens(settings.law):
        longest = max(longest, default)
    if settings.tokens > SAME_TOKENS * longest:
        return losses, longest, float(settings.tokens)
    first = losses.tokens_A[losses.full[losses.ratios < 1.0].any(axis=0)].min()
    if settings.tokens * SAME_TOKENS < first:
        raise GristmillError(
            f"the ratio is wanted for {settings.tokens:,} tokens, and the first point on all windows is at {first:,.0f}; "
            "ask for more `tokens`, or measure all windows earlier (`measure_at`, `stride`)"
        )
    found = losses.including(settings.tokens)
    return found, float(found.tokens_A[found.place(settings.tokens)]), float(settings.tokens)


def course_start(settings: RatioSettings, measured: float, tokens: float) -> float:
    """Return the tokens from which on points bear a law along training that is read at `tokens`, where the longest is `measured`."""
    return settings.course_from * min(tokens, LATE * measured)


def reads_tokens(law: str) -> bool:
    """Return whether the plugin `law` is one along training."""
    return "tokens" in plugins.load("mixing_laws", law).reads  # type: ignore[attr-defined]


def _enough_ratios(losses: ProbeLosses, default: float) -> float:
    """Return the longest training at which enough ratios were measured on all windows, `default` where there is none."""
    replayed = losses.ratios < 1.0
    enough = [len(np.unique(losses.ratios[replayed & full])) >= MIN_RATIOS for full in losses.full.T]
    return float(losses.tokens_A[enough].max()) if any(enough) else default


def default_tokens(losses: ProbeLosses) -> float:
    """Return the longest training after which every probe with replay that did not stop early was measured on all windows.

    Raises:
        GristmillError: no probe replays general text, or there is no such point.
    """
    replayed = [n for n, run in enumerate(losses.runs) if run.ratio < 1.0]
    if not replayed:
        raise GristmillError(
            "no probe has a target share below 1; the law is fitted over replay, so add three ratios below 1 to `mixture.ratios`"
        )
    going = [n for n in replayed if not losses.runs[n].stopped] or replayed
    common = losses.full[going].all(axis=0)
    if not common.any():
        raise GristmillError("the probes have no point in common at which all windows were measured; give them one `measure_at`")
    return float(losses.tokens_A[common].max())


def chosen_law(settings: RatioSettings, rows: Sequence[dict[str, Json]]) -> str:
    """Return the law that the estimate is the root of."""
    if settings.law != "auto":
        return settings.law
    scored = [(row["left_out_nats"], n) for n, row in enumerate(rows) if row["left_out_nats"] is not None]
    return str(rows[min(scored)[1]]["law"]) if scored else settings.candidates[0]  # type: ignore[type-var]


def _compared(settings: RatioSettings) -> list[str]:
    first = [] if settings.law == "auto" else [settings.law]
    return list(dict.fromkeys([*first, *settings.candidates]))


def interval_95(values_D: np.ndarray) -> tuple[float, float] | None:
    """Return the middle 95 % of the resamples; a draw in which no ratio holds lies below all. None where the evidence has no value."""
    if not np.isfinite(values_D[0]) or len(values_D) < 2:
        return None
    low, high = np.quantile(np.nan_to_num(values_D[1:], nan=0.0), [0.025, 0.975])
    return float(low), float(high)


def stability_table(losses: ProbeLosses, tolerance: float) -> list[dict[str, Json]]:
    """Return, for every run, how far the general loss rose at most, when, and when it was back (the paper's stability gap).

    Tokens are those of measured points; 0 where the loss never left, None where it did not come back.
    """
    rows: list[dict[str, Json]] = []
    for index, run in enumerate(losses.runs):
        tokens, course = losses.course(index, "general")
        tokens, course = np.concatenate([[0.0], tokens]), np.concatenate([[0.0], course])
        peak = int(np.argmax(course))
        rows.append(
            {
                "probe": run.name,
                "ratio": run.ratio,
                "seed": run.seed,
                "tokens": run.tokens,
                "stopped": run.stopped,
                "base_loss": losses.windows.mean_loss("general"),
                "dip_depth": float(course[peak]),
                "tokens_at_peak": int(tokens[peak]),
                "tokens_back_at_base": _back(tokens, course, peak, 0.0),
                "tokens_back_within_tolerance": _back(tokens, course, peak, tolerance),
            }
        )
    return rows


def _back(tokens: np.ndarray, course: np.ndarray, peak: int, bound: float) -> int | None:
    if course[peak] <= bound:
        return 0
    back = np.nonzero(course[peak:] <= bound)[0]
    return int(tokens[peak + back[0]]) if len(back) else None


def _turned_between(courses: Courses, place: int) -> tuple[float, float] | None:
    ratios_R, margins_DR = turning_margins(courses.measured(), place)
    for (low, before), (high, after) in pairwise(zip(ratios_R, margins_DR[0], strict=True)):
        if before < 0 <= after:
            return float(low), float(high)
    return None


def _jackknife(estimator: Estimator, courses: Courses, place: int, tokens: float | None) -> list[dict[str, Json]]:
    """Return the estimate with each ratio left out, where enough others remain; at `tokens` where that lies beyond."""
    ratios_R, measured = courses.ratios_at(place), courses.measured()
    if len(ratios_R) < MIN_JACKKNIFE:
        return []
    rows: list[dict[str, Json]] = []
    for ratio in ratios_R:
        others = measured.where(courses.ratios_N != ratio)
        value = estimator.along(others, [place])[0, 0] if tokens is None else estimator.beyond(others, tokens)[0]
        rows.append({"without": float(ratio), "estimate": number(value)})
    return rows


def _by_tokens_row(estimator: Estimator, courses: Courses, place: int, values_D: np.ndarray) -> dict[str, Json]:
    low, high = interval_95(values_D) or (None, None)
    return {
        "tokens": int(courses.tokens_A[place]),
        "ratios": len(courses.ratios_at(place)),
        "bracketed": estimator.brackets(courses, place),
        "estimate": number(values_D[0]),
        "low": low,
        "high": high,
    }


def _extrapolation(estimator: Estimator, courses: Courses, tokens: float, measured: float, values_D: np.ndarray) -> Extrapolation:
    if estimator.reads_tokens and estimator.criterion == "level":
        return Extrapolation(tokens / measured, int(courses.along.any(axis=0).sum()), float("nan"), by_law=True)
    places = estimator.late(courses)
    here = estimator.along(courses.measured(), places)[0]
    usable = np.isfinite(here) & (here < 1.0)
    beside = curve_over_tokens(courses.tokens_A[places][usable], here[usable], tokens) if np.isfinite(values_D[0]) else float("nan")
    return Extrapolation(tokens / measured, int(usable.sum()), beside, by_law=False)
