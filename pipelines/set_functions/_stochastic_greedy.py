"""Compiled stochastic greedy over a dense matrix of similarities: each step looks at a few of the points that are left."""

from __future__ import annotations

import numpy as np

from pipelines.native import INNER, KERNEL


@INNER
def _gain(similarities: np.ndarray, covered: np.ndarray, point: int) -> int:
    total = np.int64(0)
    for row in range(len(covered)):
        total += max(similarities[point, row] - covered[row], 0)
    return total


@KERNEL
def stochastic_order(
    similarities: np.ndarray, draws: np.ndarray, left: np.ndarray, covered: np.ndarray, picks: np.ndarray, gains: np.ndarray
) -> None:
    """Fill `picks` and `gains` with an order of all points by coverage: each step takes the best of the candidates drawn for it.

    Args:
        similarities: int32 ``(n, n)``, symmetric; negative ones count 0.
        draws: int64 ``(n, k)``: in step t, candidate c is entry ``c + draws[t, c]`` of the points left, and changes places with entry c.
        left: int64 ``(n,)``: all points; written over.
        covered: int32 ``(n,)``: zeros; written over.
        picks: int64 ``(n,)``: the points in the order taken; written.
        gains: int64 ``(n,)``: what each of `picks` added to the coverage; written. Equal gains go to the lowest index.
    """
    count = len(left)
    for step in range(count):
        size = count - step
        best, best_place, best_gain = -1, -1, np.int64(-1)
        for place in range(min(draws.shape[1], size)):
            drawn = place + draws[step, place]
            left[place], left[drawn] = left[drawn], left[place]
            point = left[place]
            gain = _gain(similarities, covered, point)
            if gain > best_gain or (gain == best_gain and point < best):
                best, best_place, best_gain = point, place, gain
        picks[step], gains[step] = best, best_gain
        left[best_place] = left[size - 1]
        for row in range(count):
            covered[row] = max(covered[row], similarities[best, row])
