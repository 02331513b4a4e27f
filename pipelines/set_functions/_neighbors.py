"""Integer cosine similarities: the exact nearest-neighbour graph, and the nearest of a set of picks.

Dot products of integer unit vectors are exact in float32 (see `pipelines.embedders._grid`), so a matrix product gives the same
bits whatever the BLAS, its blocking and its number of threads. (Not so with TF32 on a GPU.)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pipelines.embedders._grid import UNIT

BLOCK_ELEMENTS = 1 << 24
"""Similarities held at once (64 MiB of float32)."""

GROUPS = 16


@dataclass(frozen=True)
class NeighborGraph:
    """For each of `num_points` points, its nearest points by integer cosine; only positive similarities are edges.

    Edges are sorted by `rows`, then by falling similarity, then by rising column.
    """

    num_points: int
    rows: np.ndarray
    """int32, shape ``(edges,)``: the point that is represented."""
    columns: np.ndarray
    """int32, shape ``(edges,)``: the point that may represent it; a point is its own neighbour too."""
    similarities: np.ndarray
    """int32, shape ``(edges,)``: `UNIT` times the cosine."""
    floors: np.ndarray
    """int64, shape ``(num_points,)``: no similarity that is missing from a row's edges exceeds the row's floor."""


def similarity_blocks(points: np.ndarray, others: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield ``(start, similarities)``: exact float32 integers of shape ``(rows, len(others))`` for consecutive rows of `points`."""
    transposed = np.ascontiguousarray(others.astype(np.float32).T)
    size = max(16, BLOCK_ELEMENTS // max(1, len(others)))
    for start in range(0, len(points), size):
        yield start, points[start : start + size].astype(np.float32) @ transposed


def neighbor_graph(embeddings: np.ndarray, neighbors: int) -> NeighborGraph:
    """Return the exact graph of the `neighbors` nearest points of every row of `embeddings` (int16, shape ``(n, d)``).

    Ties go to the lowest index. Costs ``2 n^2 d`` floating-point operations and memory for one block.
    """
    padded = np.concatenate([embeddings, np.zeros((-len(embeddings) % GROUPS, embeddings.shape[1]), dtype=embeddings.dtype)])
    parts = [_nearest(block, neighbors, start) for start, block in similarity_blocks(embeddings, padded)]
    none = np.zeros(0, dtype=np.int32)
    rows, columns, similarities = (np.concatenate([none, *(part[field] for part in parts)]) for field in range(3))
    degrees = np.bincount(rows, minlength=len(embeddings))
    ends = np.cumsum(degrees)
    full = degrees >= neighbors
    floors = np.zeros(len(embeddings), dtype=np.int64)
    floors[full] = similarities[ends[full] - 1]
    return NeighborGraph(len(embeddings), rows, columns, similarities, floors)


def _nearest(block: np.ndarray, neighbors: int, start: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the edges of a block of rows (float32, shape ``(rows, n)``, n a multiple of `GROUPS`).

    The `neighbors`-th largest of the maxima over groups of columns is at most the `neighbors`-th largest similarity, so
    comparing with it keeps every neighbour and little else; only what it keeps is sorted.
    """
    maxima = block.reshape(len(block), GROUPS, -1).max(axis=1)
    num_groups = maxima.shape[1]
    bounds = np.ones(len(block), dtype=np.float32)
    if num_groups >= neighbors:
        bounds = np.maximum(bounds, np.partition(maxima, num_groups - neighbors, axis=1)[:, num_groups - neighbors])
    flat = np.flatnonzero(block >= bounds[:, None])
    rows, columns = np.divmod(flat, block.shape[1])
    similarities = block.reshape(-1)[flat].astype(np.int32)
    order = np.lexsort((columns, -similarities, rows))
    rows, columns, similarities = rows[order], columns[order], similarities[order]
    counts = np.bincount(rows, minlength=len(block))
    place = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    kept = place < neighbors
    return (rows[kept] + start).astype(np.int32), columns[kept].astype(np.int32), similarities[kept]


def nearest_pick(embeddings: np.ndarray, picks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return for every row of `embeddings` the nearest row among `picks`, over all pairs.

    Returns:
        Its place in `picks` (int64, shape ``(n,)``, the earliest of equals) and the integer similarity (int64, at least 0).
    """
    place = np.zeros(len(embeddings), dtype=np.int64)
    similarity = np.zeros(len(embeddings), dtype=np.int64)
    if not len(picks):
        return place, similarity
    for start, block in similarity_blocks(embeddings, embeddings[picks]):
        stop = start + len(block)
        place[start:stop] = block.argmax(axis=1)
        similarity[start:stop] = block[np.arange(len(block)), place[start:stop]]
    return place, np.maximum(similarity, 0)


def coverage_along(embeddings: np.ndarray, picks: np.ndarray, sizes: np.ndarray, *, max_points: int = 2_000) -> np.ndarray:
    """Return the mean cosine to the nearest of the first ``sizes[k]`` picks, for every k (float64, sizes rising, at least 1).

    Estimated over at most `max_points` rows at equal distances; negative cosines count as 0.
    """
    points = embeddings[np.linspace(0, len(embeddings) - 1, min(max_points, len(embeddings))).astype(np.int64)]
    totals = np.zeros(len(sizes))
    starts = np.concatenate([[0], sizes[:-1]])
    for _, block in similarity_blocks(points, embeddings[picks[: sizes[-1]]]):
        steps = np.maximum.reduceat(np.maximum(block, 0), starts, axis=1)
        totals += np.maximum.accumulate(steps, axis=1).sum(axis=0, dtype=np.float64)
    return totals / (len(points) * UNIT)
