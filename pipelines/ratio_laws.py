"""Mixing laws over the courses of probes: fits, their roots, how well they predict a ratio that they have not seen.

Shapes: N runs, A points of training, D rows, R distinct ratios, K lengths of training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from pipelines import plugins
from pipelines.manifests import Json
from pipelines.mixing_laws import FittedLaw, MixingLaw, Observations, two_corpora, two_shares
from pipelines.probe_courses import MIN_RATIOS, Courses

SHARE_GRID = 401
FINE_GRID = 101
TOKEN_LAW = "cmr_tokens"
REFERENCE = "pchip"


class MonotonePchip(MixingLaw):
    """A reference without a form: monotone cubic interpolation through the ratios, level beyond the first and the last.

    Means that fall with the target share are pooled first (isotonic regression).
    """

    reads: ClassVar[frozenset[str]] = frozenset({"own_share"})
    min_points: ClassVar[int] = MIN_RATIOS

    def fit(self, observed: Observations) -> FittedLaw:
        """Interpolate the means over the runs of each share."""
        from scipy.interpolate import PchipInterpolator
        from scipy.optimize import isotonic_regression

        others = np.unique(1.0 - observed.own_share)
        runs = [observed.losses[1.0 - observed.own_share == other] for other in others]
        pooled = isotonic_regression([mine.mean() for mine in runs], weights=[len(mine) for mine in runs]).x
        curve = PchipInterpolator(others, pooled)
        return FittedLaw(lambda shares, _tokens: curve(np.clip(1.0 - shares[:, observed.own], others[0], others[-1])), {})


@dataclass(frozen=True)
class Anchor:
    """A run and the point where it ended, which a law along training is moved to pass through."""

    ratio: float
    seed: int
    place: int


def fits(law: MixingLaw, courses: Courses, place: int, anchor: Anchor | None = None) -> list[FittedLaw]:
    """Fit `law` to every row at point `place`; one that reads tokens, along the courses and moved to pass through `anchor`. None where
    there are too few points.

    A run without replay follows another regime and is in no `Courses`.
    """
    run_P, place_P = np.nonzero(courses.along) if "tokens" in law.reads else (np.nonzero(courses.full_NA[:, place])[0], place)
    ratios_P = courses.ratios_N[run_P]
    if len(np.unique(ratios_P)) < MIN_RATIOS or len(ratios_P) < law.min_points:
        return []
    losses_DP = courses.means_DNA[:, run_P, place_P]
    fitted = law.fit_many(two_corpora(ratios_P, courses.tokens_A[place_P], losses_DP[0]), losses_DP)
    return _anchored(fitted, courses, anchor) if anchor and "tokens" in law.reads else fitted


def _anchored(laws: list[FittedLaw], courses: Courses, anchor: Anchor) -> list[FittedLaw]:
    """Return the laws moved up or down so that each passes through what its row holds of the anchor; unmoved where its run is left out."""
    (runs,) = np.nonzero((courses.ratios_N == anchor.ratio) & (courses.seeds_N == anchor.seed))
    if not len(runs):
        return laws
    shares, tokens = two_shares(courses.ratios_N[runs[:1]]), courses.tokens_A[[anchor.place]]
    levels_D = courses.means_DNA[:, runs[0], anchor.place]
    return [_moved(law, float(level - law.predict(shares, tokens)[0])) for law, level in zip(laws, levels_D, strict=True)]


def _moved(law: FittedLaw, by: float) -> FittedLaw:
    return FittedLaw(lambda shares, tokens: law.predict(shares, tokens) + by, {**law.parameters, "moved_by": by})


def root(fitted: FittedLaw, tokens: float, tolerance: float) -> float:
    """Return the R up to which the fitted general loss rises by at most `tolerance`: NaN where it never does, 1 where it always does.

    Where a law crosses the tolerance twice, as one may outside its data, the lower crossing counts.
    """
    low, high = 0.0, 1.0
    for size in (SHARE_GRID, FINE_GRID):
        grid = np.linspace(low, high, size)
        over = fitted.predict(two_shares(grid), np.full(size, tokens)) - tolerance
        first = int(np.argmax(over <= 0))
        if not over[first] <= 0:
            return float("nan")
        beyond = np.nonzero(~(over[first:] <= 0))[0]
        if not len(beyond):
            return float(high)
        last = first + int(beyond[0]) - 1
        low, high = float(grid[last]), float(grid[last + 1])
    part = -over[last] / (over[last + 1] - over[last])
    return low + (high - low) * float(part if np.isfinite(part) else 0.0)


def left_out_errors(law: MixingLaw, courses: Courses, place: int) -> np.ndarray:
    """Return measured minus predicted loss of each ratio at `place` by the fit without it, shape (R,); NaN where none can be made."""
    ratios_R, levels_R, measured = courses.ratios_at(place), courses.levels(place), courses.measured()
    errors = np.full(len(ratios_R), np.nan)
    for number, ratio in enumerate(ratios_R):
        fitted = fits(law, measured.where(courses.ratios_N != ratio), place)
        if fitted:
            errors[number] = levels_R[number] - fitted[0].predict(two_shares(np.asarray([ratio])), courses.tokens_A[place : place + 1])[0]
    return errors


def compare_laws(
    names: Sequence[str], courses: Courses, place: int, tolerance: float, anchor: Anchor | None = None
) -> list[dict[str, Json]]:
    """Return, for each law and the interpolation, its error at the points, its leave-one-ratio-out errors, and its root.

    ``left_out_nats`` is the root mean square over all ratios and compares laws; ``left_out_inside_nats`` that over the ratios between two
    others, where the others predict without extrapolating, as the estimate does. Level beyond its ends, the interpolation has the
    second alone.
    """
    rows: list[dict[str, Json]] = []
    for name in (*names, REFERENCE):
        law: MixingLaw = MonotonePchip() if name == REFERENCE else plugins.build("mixing_laws", name)  # type: ignore[assignment]
        fitted = fits(law, courses.measured(), place, anchor)
        errors_R = left_out_errors(law, courses, place)
        inside_R = errors_R[1:-1]
        all_of_it = float("nan") if name == REFERENCE else _root_mean_square(errors_R)
        worst = 1 + int(np.argmax(np.abs(inside_R))) if len(inside_R) and np.isfinite(inside_R).all() else None
        rows.append(
            {
                "law": name,
                "rmse_nats": number(_misfit(fitted[0], courses, place)) if fitted else None,
                "left_out_nats": number(all_of_it),
                "left_out_in_tolerances": number(all_of_it / tolerance),
                "left_out_inside_nats": number(_root_mean_square(inside_R)),
                "worst_inside": None if worst is None else float(courses.ratios_at(place)[worst]),
                "estimate": number(root(fitted[0], courses.tokens_A[place], tolerance)) if fitted else None,
            }
        )
    return rows


def _misfit(fitted: FittedLaw, courses: Courses, place: int) -> float:
    here = courses.full_NA[:, place]
    predicted = fitted.predict(two_shares(courses.ratios_N[here]), np.full(int(here.sum()), courses.tokens_A[place]))
    return _root_mean_square(predicted - courses.means_DNA[0, here, place])


def _root_mean_square(errors: np.ndarray) -> float:
    return float(np.sqrt((errors**2).mean())) if len(errors) else float("nan")


def line_over_tokens(tokens_K: np.ndarray, values_DK: np.ndarray, tokens: float) -> np.ndarray:
    """Return ``a + b * log(tokens)`` fitted to every row by least squares, clipped to [0, 1], shape (D,)."""
    x_K = np.log(tokens_K)
    slope_D = np.einsum("dk,k->d", values_DK, x_K - x_K.mean()) / ((x_K - x_K.mean()) ** 2).sum()
    return np.clip(values_DK.mean(axis=1) + slope_D * (np.log(tokens) - x_K.mean()), 0.0, 1.0)


def curve_over_tokens(tokens_K: np.ndarray, values_K: np.ndarray, tokens: float) -> float:
    """Return what the paper's law of tokens (2407.17467, equation 8), fitted to `values_K`, says at `tokens`, clipped to [0, 1]."""
    law: MixingLaw = plugins.build("mixing_laws", TOKEN_LAW)  # type: ignore[assignment]
    fitted = law.fit(two_corpora(values_K, tokens_K, values_K))
    return float(np.clip(fitted.predict(two_shares(values_K[-1:]), np.asarray([float(tokens)]))[0], 0.0, 1.0))


def number(value: float) -> float | None:
    """Return `value` as JSON holds it: None where it is not finite."""
    return float(value) if np.isfinite(value) else None
