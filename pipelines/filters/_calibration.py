"""From scores of two classes to probabilities, and how good these are. Both classes weigh alike, however many examples each has."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from pipelines.manifests import Json
from pipelines.plots import new_figure, save_figure

Method = Literal["platt", "isotonic"]
NEWTON_STEPS = 50
RIDGE = 1e-6
"""Keeps Newton's step finite where a score separates the classes without an error."""
BINS = 10
DIGITS = 9
"""What is written of a fitted number: its last bits may depend on the processor's exponential."""


def calibrate(scores: np.ndarray, classes: np.ndarray, method: Method) -> tuple[list[float], list[float]]:
    """Return what `probabilities` reads: Platt's slope and intercept, or the scores and probabilities of isotonic regression.

    Platt 1999, "Probabilistic Outputs for Support Vector Machines", with the targets of its section 2.2, by Newton's method
    in a fixed number of steps; isotonic regression is Zadrozny and Elkan 2002, between the points linear.
    """
    weights = balanced(classes)
    if method == "isotonic":
        from sklearn.isotonic import isotonic_regression

        points, place = np.unique(scores, return_inverse=True)
        weight = np.bincount(place, weights=weights)
        fitted = isotonic_regression(np.bincount(place, weights=weights * classes) / weight, sample_weight=weight)
        ends = np.flatnonzero(np.diff(fitted, prepend=-1.0, append=2.0))  # first of each level, and the place after the last
        kept = np.unique(np.concatenate([ends[:-1], ends[1:] - 1]))
        return points[kept].round(DIGITS).tolist(), fitted[kept].round(DIGITS).tolist()
    positives, negatives = classes.sum(), (1 - classes).sum()
    targets = np.where(classes > 0.5, (positives + 1) / (positives + 2), 1 / (negatives + 2))
    slope, intercept = 1.0, 0.0
    for _ in range(NEWTON_STEPS):
        found = _sigmoid(slope * scores + intercept)
        error, curve = weights * (found - targets), weights * found * (1 - found)
        gradient = np.array([(error * scores).sum() + RIDGE * slope, error.sum()])
        cross = (curve * scores).sum()
        hessian = np.array([[(curve * scores * scores).sum() + RIDGE, cross], [cross, curve.sum() + RIDGE]])
        determinant = hessian[0, 0] * hessian[1, 1] - cross * cross
        slope -= (hessian[1, 1] * gradient[0] - cross * gradient[1]) / determinant
        intercept -= (hessian[0, 0] * gradient[1] - cross * gradient[0]) / determinant
    return [round(float(slope), DIGITS)], [round(float(intercept), DIGITS)]


def probabilities(scores: np.ndarray, calibration: tuple[Sequence[float], Sequence[float]], method: Method) -> np.ndarray:
    """Return the calibrated probability of each score; NaN stays NaN."""
    first, second = (np.asarray(values, dtype=np.float64) for values in calibration)
    if method == "platt":
        return _sigmoid(first[0] * scores + second[0])
    return np.where(np.isnan(scores), np.nan, np.interp(scores, first, second))


def balanced(classes: np.ndarray) -> np.ndarray:
    """Return a weight for each example: those of either class sum to one half."""
    share = classes.mean()
    return np.where(classes > 0.5, 0.5 / share, 0.5 / (1 - share)) / len(classes)


def quality(found: np.ndarray, classes: np.ndarray) -> dict[str, float]:
    """Return the area under the ROC curve, the Brier score and the expected calibration error in `BINS` bins."""
    weights = balanced(classes)
    rows = reliability(found, classes)
    return {
        "auc": auc(found, classes),
        "brier": round(float((weights * (found - classes) ** 2).sum()), 6),
        "expected_calibration_error": round(sum(float(r["weight"]) * abs(float(r["predicted"]) - float(r["observed"])) for r in rows), 6),
    }


def auc(found: np.ndarray, classes: np.ndarray) -> float:
    """Return the share of pairs of one good and one bad example in which the good one scores higher; ties count half."""
    from scipy.stats import rankdata

    positives = int(classes.sum())
    ranks = rankdata(found)[classes > 0.5].sum()
    return round(float((ranks - positives * (positives + 1) / 2) / (positives * (len(classes) - positives))), 6)


def reliability(found: np.ndarray, classes: np.ndarray) -> list[dict[str, Json]]:
    """Return a row for each tenth of predicted probability: examples, weight, mean prediction, observed share."""
    weights, bins = balanced(classes), np.minimum((found * BINS).astype(int), BINS - 1)
    rows: list[dict[str, Json]] = []
    for number in np.unique(bins):
        here = bins == number
        weight = weights[here].sum()
        rows.append(
            {
                "bin": f"{number / BINS:.1f}-{(number + 1) / BINS:.1f}",
                "examples": int(here.sum()),
                "weight": round(float(weight), 6),
                "predicted": round(float((weights * found)[here].sum() / weight), 6),
                "observed": round(float((weights * classes)[here].sum() / weight), 6),
            }
        )
    return rows


def plot_reliability(rows: Sequence[dict[str, Json]], path: Path) -> None:
    """Draw observed over predicted; a marker's area is the weight of its bin."""
    figure, axes = new_figure(3.6, 3.4)
    axes.plot([0, 1], [0, 1], color="#999999", linewidth=1)
    xs, ys = [float(row["predicted"]) for row in rows], [float(row["observed"]) for row in rows]
    axes.plot(xs, ys, color="#4477aa", linewidth=1)
    axes.scatter(xs, ys, s=[10 + 300 * float(row["weight"]) for row in rows], color="#4477aa")
    axes.set(xlabel="predicted probability of good", ylabel="observed share of good", xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
    save_figure(figure, path)


def _sigmoid(values: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-np.clip(values, -700, 700)))
