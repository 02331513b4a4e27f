"""Compiled greedy over a graph of nearest neighbours: gains are kept exact, and only what a pick changes is touched.

A heap holds every candidate under a key that is at least its key now, since gains only fall. The top one is picked if its key still
holds, else it goes back under the key it has now: the sequence is that of sequential greedy, ties to the lowest index.
"""

from __future__ import annotations

import numpy as np

from pipelines.native import ARRAYS, INNER, KERNEL

COVERAGE, SATURATION, CUT = 0, 1, 2
"""What the rows' state means: how similar the nearest pick is; how much a row can still take; nothing."""


@INNER
def _is_before(key: float, point: int, other_key: float, other: int) -> bool:
    return key > other_key or (key == other_key and point < other)


@INNER
def _sink(keys: np.ndarray, points: np.ndarray, size: int, place: int) -> None:
    """Move the entry at `place` down to where the heap is in order."""
    key, point = keys[place], points[place]
    while True:
        child = 2 * place + 1
        if child >= size:
            break
        if child + 1 < size and _is_before(keys[child + 1], points[child + 1], keys[child], points[child]):
            child += 1
        if not _is_before(keys[child], points[child], key, point):
            break
        keys[place], points[place] = keys[child], points[child]
        place = child
    keys[place], points[place] = key, point


@KERNEL
def heapify(keys: np.ndarray, points: np.ndarray) -> None:
    """Put the entries into heap order, the best one first."""
    for place in range(len(keys) // 2 - 1, -1, -1):
        _sink(keys, points, len(keys), place)


@KERNEL
def transpose(columns: np.ndarray, starts: np.ndarray, places: np.ndarray) -> None:
    """Fill `starts` (int64, shape ``(n + 1,)``, zeros) and `places` (int32 or int64): where each column's edges stand in the flat graph."""
    rows, width = columns.shape
    for row in range(rows):
        for number in range(width):
            if columns[row, number] < 0:
                break
            starts[columns[row, number] + 1] += 1
    for column in range(1, len(starts)):
        starts[column] += starts[column - 1]
    for row in range(rows):
        for number in range(width):
            column = columns[row, number]
            if column < 0:
                break
            places[starts[column]] = row * width + number
            starts[column] += 1
    for column in range(len(starts) - 1, 0, -1):
        starts[column] = starts[column - 1]
    starts[0] = 0


@KERNEL
def first_gains(
    columns: np.ndarray, similarities: np.ndarray, weights: np.ndarray, state: np.ndarray, kind: int, gains: np.ndarray
) -> None:
    """Add to `gains` what each candidate adds to the empty set, or to what `state` says is there already."""
    rows, width = columns.shape
    for row in range(rows):
        for number in range(width):
            similarity = similarities[row, number]
            if similarity <= 0 or (kind == COVERAGE and similarity <= state[row]):
                break
            worth = np.int64(similarity)
            if kind == COVERAGE:
                worth -= state[row]
            elif kind == SATURATION:
                worth = min(worth, state[row])
            gains[columns[row, number]] += weights[row] * worth


@INNER
def _cover(columns: np.ndarray, similarities: np.ndarray, weight: int, row: int, before: int, after: int, gains: np.ndarray) -> None:
    for number in range(columns.shape[1]):
        similarity = np.int64(similarities[row, number])
        if similarity <= before:
            break
        gains[columns[row, number]] -= weight * (min(similarity, after) - before)


@INNER
def _saturate(columns: np.ndarray, similarities: np.ndarray, weight: int, row: int, before: int, after: int, gains: np.ndarray) -> None:
    for number in range(columns.shape[1]):
        similarity = np.int64(similarities[row, number])
        if similarity <= after:
            break
        gains[columns[row, number]] -= weight * (min(similarity, before) - after)


@ARRAYS
def greedy(
    columns: np.ndarray,
    similarities: np.ndarray,
    starts: np.ndarray,
    places: np.ndarray,
    weights: np.ndarray,
    state: np.ndarray,
    kind: int,
    penalty: int,
    gains: np.ndarray,
    costs: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Return picks and their gains (int64) until no candidate adds anything; `state` and `gains` are written over.

    Args:
        columns, similarities: the graph, int32 ``(rows, k)``.
        starts, places: where each candidate's edges stand in the flat graph, as `transpose` fills them.
        weights: int64 ``(rows,)``: what a row counts.
        state: int64 ``(rows,)``: of the rows, by `kind`.
        penalty: `CUT`: what an edge between two picks costs, in thousandths of its similarity; gains are in thousandths, too.
        gains: int64 ``(n,)``: of every candidate, as `first_gains` fills them.
        costs: float64 ``(n,)``: candidates are picked by gain over cost.
    """
    count, width = len(gains), columns.shape[1]
    points = np.arange(count)
    keys = np.empty(count, dtype=np.float64)
    for point in range(count):
        keys[point] = gains[point] / costs[point]
    heapify(keys, points)
    picks, picked_gains = np.empty(count, dtype=np.int64), np.empty(count, dtype=np.int64)
    size, num_picks = count, 0
    while size:
        point = points[0]
        key = gains[point] / costs[point]
        if key < keys[0]:
            keys[0] = key
            _sink(keys, points, size, 0)
            continue
        if gains[point] <= 0:
            break
        picks[num_picks], picked_gains[num_picks] = point, gains[point]
        num_picks += 1
        size -= 1
        keys[0], points[0] = keys[size], points[size]
        _sink(keys, points, size, 0)
        for edge in range(starts[point], starts[point + 1]):
            row, number = places[edge] // width, places[edge] % width
            similarity = np.int64(similarities[row, number])
            before = state[row]
            if kind == COVERAGE:
                if similarity > before:
                    _cover(columns, similarities, weights[row], row, before, similarity, gains)
                    state[row] = similarity
            elif kind == SATURATION:
                if before > 0:
                    after = max(0, before - similarity)
                    _saturate(columns, similarities, weights[row], row, before, after, gains)
                    state[row] = after
            else:
                gains[row] -= penalty * similarity
        if kind == CUT:
            for number in range(width):
                if columns[point, number] < 0:
                    break
                gains[columns[point, number]] -= penalty * np.int64(similarities[point, number])
    return picks[:num_picks].copy(), picked_gains[:num_picks].copy()
