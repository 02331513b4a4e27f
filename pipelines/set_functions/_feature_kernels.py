"""The compiled lazy greedy of `feature_based`, in one thread and one order of summation: the same bits everywhere."""

from __future__ import annotations

import math

import numpy as np

from pipelines.native import ARRAYS, INNER
from pipelines.set_functions._greedy_kernels import _sink, heapify

SQRT, LOG = 0, 1


@INNER
def _concave(value: float, kind: int) -> float:
    return math.sqrt(value) if kind == SQRT else math.log1p(value)


@INNER
def _gain(row: np.ndarray, scale: float, power: float, kind: int, sums: np.ndarray, values: np.ndarray) -> float:
    """Return what `row` adds to the features' sums; `values` holds g of the sums. Features come in pairs: positive part, negative part."""
    gain = 0.0
    for dimension in range(len(row)):
        component = row[dimension] * scale
        if component == 0.0:
            continue
        feature = 2 * dimension + (component < 0.0)
        gain += _concave(sums[feature] + abs(component) ** power, kind) - values[feature]
    return gain


@ARRAYS
def feature_order(embeddings: np.ndarray, scale: float, power: float, kind: int, costs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return picks (int64) and gains (float64) until no point adds anything; ties go to the lowest index.

    Args:
        embeddings: int16 ``(n, d)``; a component times `scale` is at most 1.
        costs: float64 ``(n,)``.
    """
    count, dimensions = embeddings.shape
    sums, values = np.zeros(2 * dimensions), np.zeros(2 * dimensions)
    points, keys = np.arange(count), np.empty(count)
    for point in range(count):
        keys[point] = _gain(embeddings[point], scale, power, kind, sums, values) / costs[point]
    heapify(keys, points)
    picks, gains = np.empty(count, dtype=np.int64), np.empty(count)
    checked = np.zeros(count, dtype=np.int64)  # how many picks there were when a point's key was computed
    size, num_picks = count, 0
    while size:
        point = points[0]
        if checked[point] < num_picks:
            keys[0] = min(keys[0], _gain(embeddings[point], scale, power, kind, sums, values) / costs[point])
            checked[point] = num_picks
            _sink(keys, points, size, 0)
            continue
        if keys[0] <= 0.0:
            break
        picks[num_picks], gains[num_picks] = point, keys[0] * costs[point]
        num_picks += 1
        for dimension in range(dimensions):
            component = embeddings[point, dimension] * scale
            feature = 2 * dimension + (component < 0.0)
            sums[feature] += abs(component) ** power
            values[feature] = _concave(sums[feature], kind)
        size -= 1
        keys[0], points[0] = keys[size], points[size]
        _sink(keys, points, size, 0)
    return picks[:num_picks].copy(), gains[:num_picks].copy()
