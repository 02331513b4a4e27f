"""The courses of general loss along training, and resamples of them: what an estimate is fitted to, and its spread.

Row 0 of a `Courses` is what was measured, every other row a draw of windows and runs: what is computed along all rows comes with
its bootstrap distribution.

Shapes: N runs, A points of training, W general windows, D rows, R distinct ratios.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np

from pipelines.probe_losses import ProbeLosses

MIN_RATIOS = 3
"""Distinct ratios below 1 that an estimate needs."""

Criterion = Literal["level", "turn", "both"]


@dataclass(frozen=True)
class Courses:
    """Mean changes of general loss of the runs with replay (R < 1) along training, in D resamples of the evidence."""

    ratios_N: np.ndarray
    tokens_A: np.ndarray
    means_DNA: np.ndarray
    """float64; row 0 is the evidence itself; NaN where a run was not measured."""
    full_NA: np.ndarray
    """bool: measured on all windows; for a law along training, which many points bear together, on some."""
    seeds_N: np.ndarray
    """Data-order seeds."""
    first: float = 0.0
    """Tokens from which on points bear a law along training: before, the general loss is in its first rise."""

    def where(self, runs_N: np.ndarray) -> Courses:
        """Return the courses of `runs_N`, a mask or numbers."""
        arrays = {"ratios_N": self.ratios_N[runs_N], "seeds_N": self.seeds_N[runs_N], "full_NA": self.full_NA[runs_N]}
        return replace(self, means_DNA=self.means_DNA[:, runs_N], **arrays)

    def measured(self) -> Courses:
        """Return row 0 alone."""
        return replace(self, means_DNA=self.means_DNA[:1])

    def ratios_at(self, place: int) -> np.ndarray:
        """Return the distinct ratios that were measured on all windows at point `place`, sorted."""
        return np.unique(self.ratios_N[self.full_NA[:, place]])

    def levels(self, place: int) -> np.ndarray:
        """Return the measured change of general loss at each of `ratios_at(place)`, over its seeds."""
        here = self.full_NA[:, place]
        return np.asarray([self.means_DNA[0, here & (self.ratios_N == ratio), place].mean() for ratio in self.ratios_at(place)])

    def last_levels(self, place: int) -> dict[float, float]:
        """Return the measured change of general loss of each ratio, over its seeds, where it was last measured up to `place`."""
        found: dict[float, float] = {}
        for ratio in np.unique(self.ratios_N):
            (points,) = np.nonzero(self.full_NA[self.ratios_N == ratio, : place + 1].any(axis=0))
            if len(points):
                here = (self.ratios_N == ratio) & self.full_NA[:, points[-1]]
                found[float(ratio)] = float(self.means_DNA[0, here, points[-1]].mean())
        return found

    @property
    def along(self) -> np.ndarray:
        """Return the points that bear a law along training, bool (N, A)."""
        return self.full_NA & (self.tokens_A >= self.first)

    @cached_property
    def lengths(self) -> list[int]:
        """Points of training at which enough ratios were measured on all windows."""
        return [place for place in range(len(self.tokens_A)) if len(self.ratios_at(place)) >= MIN_RATIOS]


def resample(losses: ProbeLosses, *, draws: int, seed: int, run_noise_nats: float, first: float = 0.0, parts: bool = False) -> Courses:
    """Return the courses of general loss of the runs with replay, as measured and in `draws` resamples.

    Windows are drawn with replacement within their domain, the same for all runs and points: losses are paired. Where a ratio has
    several seeds they are drawn with replacement. Runs that stand alone at their ratio are moved by a normal draw of `run_noise_nats`,
    along their whole course and the same for all of one seed: they read the same text in the same order, and what that text is moves
    them alike. With `parts`, points on a part of the windows count as measured, where every draw has some of them.
    """
    runs = np.nonzero(losses.ratios < 1.0)[0]
    mine = losses.windows.of("general")
    deltas_NAW = losses.deltas_NAW[np.ix_(runs, range(len(losses.tokens_A)), mine)]
    generator = np.random.Generator(np.random.Philox(key=seed))
    weights_DW = np.ones((1 + draws, len(mine)))
    stratum_W = losses.windows.stratum[mine]
    for stratum in np.unique(stratum_W):
        inside = np.nonzero(stratum_W == stratum)[0]
        weights_DW[1:, inside] = generator.multinomial(len(inside), np.full(len(inside), 1.0 / len(inside)), size=draws)
    known_NAW = np.isfinite(deltas_NAW)
    # einsum sums in one order whatever the number of threads, which a matrix product does not promise
    sums_DNA = np.einsum("dw,naw->dna", weights_DW, np.where(known_NAW, deltas_NAW, 0.0))
    counts_DNA = np.einsum("dw,naw->dna", weights_DW, known_NAW.astype(np.float64))
    means_DNA = np.divide(sums_DNA, counts_DNA, out=np.full_like(sums_DNA, np.nan), where=counts_DNA > 0)
    known = np.isfinite(means_DNA).all(axis=0) if parts else losses.full[runs]
    seeds_N = np.asarray([losses.runs[run].seed for run in runs], dtype=np.int64)
    made = Courses(losses.ratios[runs], losses.tokens_A, means_DNA, known, seeds_N, first)
    _draw_runs(made, generator, run_noise_nats)
    return made


def _draw_runs(courses: Courses, generator: np.random.Generator, noise: float) -> None:
    """Move every drawn row by the chance of its runs, in place."""
    means_DNA = courses.means_DNA[1:]
    uniform_DN = generator.random(means_DNA.shape[:2])
    names = np.unique(courses.seeds_N)
    normal_DS = generator.standard_normal((len(means_DNA), len(names)))
    for ratio in np.unique(courses.ratios_N):
        (mine,) = np.nonzero(courses.ratios_N == ratio)
        if len(mine) == 1:
            means_DNA[:, mine, :] += noise * normal_DS[:, np.searchsorted(names, courses.seeds_N[mine]), None]
            continue
        for place in range(len(courses.tokens_A)):
            seeds = mine[courses.full_NA[mine, place]]
            if len(seeds) == 1:  # the others of its ratio ended before
                means_DNA[:, seeds, place] += noise * normal_DS[:, np.searchsorted(names, courses.seeds_N[seeds])]
            elif len(seeds):
                drawn_DS = seeds[(uniform_DN[:, seeds] * len(seeds)).astype(np.int64)]
                means_DNA[:, seeds, place] = np.take_along_axis(means_DNA[:, :, place], drawn_DS, axis=1)


def turning_margins(courses: Courses, place: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the ratios measured at `place`, shape (R,), and how far each course stands above its peak before, shape (D, R).

    Courses are means over seeds, smoothed over three points; all start at 0. A negative margin: the peak has passed.
    """
    ratios_R = courses.ratios_at(place)
    margins = []
    for ratio in ratios_R:
        mine = (courses.ratios_N == ratio) & courses.full_NA[:, place]
        course_DA = courses.means_DNA[:, mine, : place + 1]
        course_DA = course_DA[:, :, np.isfinite(course_DA).all(axis=(0, 1))].mean(axis=1)
        smooth_DA = _smoothed(course_DA)
        before_D = np.maximum(smooth_DA[:, :-1].max(axis=1, initial=0.0), 0.0)
        margins.append(smooth_DA[:, -1] - before_D)
    return ratios_R, np.stack(margins, axis=1) if margins else np.zeros((len(courses.means_DNA), 0))


def turns(courses: Courses, place: int) -> np.ndarray:
    """Return the R up to which the general loss has passed its peak by point `place`, shape (D,): NaN where it has at no ratio, 1 at all.

    Between the last ratio that has turned and the next, the margin to the peak is interpolated.
    """
    ratios_R, margins_DR = turning_margins(courses, place)
    return np.asarray([_crossing(ratios_R, margins) for margins in margins_DR])


def _crossing(ratios_R: np.ndarray, margins_R: np.ndarray) -> float:
    first = int(np.argmax(margins_R < 0)) if len(margins_R) else 0
    if not len(margins_R) or not margins_R[first] < 0:
        return float("nan")
    rising = np.nonzero(margins_R[first:] >= 0)[0]
    if not len(rising):
        return 1.0
    at = first + int(rising[0])
    part = margins_R[at - 1] / (margins_R[at - 1] - margins_R[at])
    return float(ratios_R[at - 1] + part * (ratios_R[at] - ratios_R[at - 1]))


def _smoothed(course_DA: np.ndarray) -> np.ndarray:
    """Return the running mean over three neighbouring points, two at the ends."""
    count = course_DA.shape[1]
    return np.stack([course_DA[:, max(0, a - 1) : a + 2].mean(axis=1) for a in range(count)], axis=1)


def holds(courses: Courses, place: int, tolerance: float, criterion: Criterion, *, ended: bool = False) -> dict[float, bool]:
    """Return whether each ratio meets the criterion as measured at `place`; those that ended before count, where `ended`, as they did."""
    here = set(courses.ratios_at(place).tolist())
    level = {ratio: loss <= tolerance for ratio, loss in courses.last_levels(place).items() if ended or ratio in here}
    if criterion == "level":
        return level
    ratios_R, margins_DR = turning_margins(courses.measured(), place)
    turned = dict(zip(ratios_R.tolist(), (margins_DR[0] < 0).tolist(), strict=True))
    return turned if criterion == "turn" else {ratio: held and level[ratio] for ratio, held in turned.items()}
