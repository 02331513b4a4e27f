"""Means over seeds and items: intervals of what several seeds measured on the same items. Macro-F1 is brought into that form.

Shapes: S seeds, I items, K classes.
"""

from __future__ import annotations

import numpy as np


def mean_interval(values_SI: np.ndarray) -> tuple[float, float, float]:
    """Return the mean of `values_SI` and the ends of its 95 % interval, for other seeds and other items at once.

    Both are random effects that cross: the variance of the mean is that over seeds (of the means over items), plus that over items
    (of the means over seeds), less that of the rest, which both of them hold (Cornfield and Tukey, Ann. Math. Stat. 27, 1956, 907).
    It is not taken below either of the two. Student's t has the degrees of freedom of Satterthwaite (Biometrics 2, 1946, 110).
    Where nothing varies, the interval is the mean alone; one seed tells nothing of others, and one item nothing of others.
    """
    from scipy.stats import t

    seeds, items = values_SI.shape
    mean = float(values_SI.mean())
    of_seed, of_item = values_SI.mean(axis=1), values_SI.mean(axis=0)
    parts = [(each.var(ddof=1) / len(each), len(each) - 1) for each in (of_seed, of_item) if len(each) > 1]
    largest = max((part for part, _ in parts), default=0.0)
    if largest <= 1e-24:  # what rounding leaves of equal values
        return mean, mean, mean
    if len(parts) == 2:
        rest = values_SI - of_seed[:, None] - of_item[None, :] + mean
        freedom = (seeds - 1) * (items - 1)
        parts.append((-float((rest**2).sum()) / freedom / (seeds * items), freedom))
    variance = max(largest, sum(part for part, _ in parts))
    freedom = variance**2 / sum(part**2 / degrees for part, degrees in parts)
    half = float(t.ppf(0.975, freedom) * np.sqrt(variance))
    return mean, mean - half, mean + half


def macro_f1_parts(labels_I: np.ndarray, predicted_SI: np.ndarray, num_classes: int) -> np.ndarray:
    """Return what each item adds to macro-F1, float64 of shape (S, I): the mean over a seed's items is that seed's macro-F1.

    The parts are F1's first-order change with an item's weight (the infinitesimal jackknife; Efron 1982, chapter 6), so that their
    variance over items is that of macro-F1. A class that is neither among the labels nor predicted has an F1 of 0.
    """
    items = len(labels_I)
    found = np.empty(predicted_SI.shape)
    for number, predicted_I in enumerate(predicted_SI):
        hits = np.bincount(labels_I[predicted_I == labels_I], minlength=num_classes)
        counts = np.bincount(labels_I, minlength=num_classes) + np.bincount(predicted_I, minlength=num_classes)
        scale = 1.0 / np.maximum(counts, 1)
        f1 = 2 * hits * scale
        change = 2.0 * (predicted_I == labels_I) * scale[labels_I]
        change -= f1[labels_I] * scale[labels_I] + f1[predicted_I] * scale[predicted_I]
        found[number] = f1.mean() + items / num_classes * change
    return found
