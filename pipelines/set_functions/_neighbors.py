"""Integer cosine similarities: the graph of nearest neighbours, and the nearest of a set of picks.

Dot products of integer unit vectors are exact in float32 (see `pipelines.embedders._grid`), so a matrix product gives the same
bits whatever the BLAS, its blocking and its number of threads. (Not so with TF32 on a GPU.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from pipelines.embedders._grid import UNIT
from pipelines.engine import Engine

BLOCK_ELEMENTS = 1 << 24
"""Similarities held at once by what looks at whole rows (64 MiB of float32)."""
TILE_ROWS, TILE_COLUMNS = 512, 4096
LONGEST_LIST = 256
"""Neighbours up to which lists are kept while similarities come; more are found by sorting."""


@dataclass(frozen=True)
class NeighborGraph:
    """For each represented point (a row), its nearest candidates by integer cosine; only positive similarities are edges.

    A row's edges are sorted by falling similarity, then by rising column. Where points represent each other, rows and candidates are
    the same and a point is its own neighbour.
    """

    num_points: int
    """Candidates."""
    columns: np.ndarray
    """int32, shape ``(rows, k)``: the candidates; -1 behind a row's last edge."""
    similarities: np.ndarray
    """int32, shape ``(rows, k)``: `UNIT` times the cosine; 0 behind a row's last edge."""
    is_exact: bool = True
    """Whether no candidate that is missing from a row is nearer than those that are there."""

    @property
    def num_rows(self) -> int:
        """Points that are represented."""
        return len(self.columns)

    @property
    def floors(self) -> np.ndarray:
        """int64, shape ``(rows,)``: in an exact graph, no similarity that is missing from a row exceeds the row's floor."""
        if not self.columns.shape[1]:
            return np.zeros(self.num_rows, dtype=np.int64)
        return self.similarities[:, -1].astype(np.int64)

    def edges(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return rows, columns and similarities of all edges, row by row (int64, int32, int32)."""
        there = self.similarities > 0
        return np.nonzero(there)[0], self.columns[there], self.similarities[there]


def empty_lists(rows: int, neighbors: int) -> tuple[np.ndarray, np.ndarray]:
    """Return columns and similarities of a graph without an edge."""
    return np.full((rows, neighbors), -1, dtype=np.int32), np.zeros((rows, neighbors), dtype=np.int32)


def neighbor_graph(embeddings: np.ndarray, neighbors: int) -> NeighborGraph:
    """Return the exact graph of the `neighbors` nearest of every row of `embeddings` (int16, shape ``(n, d)``) among all rows.

    Ties go to the lowest index. Costs ``n^2 d`` floating-point operations: each tile of the symmetric matrix serves its rows and its
    columns. Needs memory for the rows in float32 and for one tile.
    """
    from pipelines.set_functions._neighbor_kernels import offer_columns, offer_rows

    if neighbors > LONGEST_LIST:
        return _sorted_graph(embeddings, neighbors)
    points, ids = embeddings.astype(np.float32), np.arange(len(embeddings))
    columns, similarities = empty_lists(len(points), neighbors)
    least = np.empty(TILE_COLUMNS, dtype=np.float32)
    with _Parts() as parts:
        for first in range(0, len(points), TILE_ROWS):
            rows = points[first : first + TILE_ROWS]
            for start in range(first, len(points), TILE_COLUMNS):
                block = rows @ points[start : start + TILE_COLUMNS].T
                names = (ids[first : first + TILE_ROWS], ids[start : start + TILE_COLUMNS], columns, similarities)
                parts.each(len(block), lambda low, high: offer_columns(block, *names, low, high))  # noqa: B023  done before the next
                below = min(max(0, first + len(block) - start), block.shape[1])  # what lies within the rows themselves is offered once
                parts.each(block.shape[1] - below, lambda low, high: offer_rows(block, *names, least, below + low, below + high))  # noqa: B023
    return NeighborGraph(len(points), columns, similarities)


def _sorted_graph(embeddings: np.ndarray, neighbors: int) -> NeighborGraph:
    """Return the graph by sorting whole rows: lists take time that grows with the square of their length."""
    columns, similarities = empty_lists(len(embeddings), neighbors)
    for start, block in similarity_blocks(embeddings, embeddings):
        order = np.argsort(-block, axis=1, kind="stable")[:, :neighbors]
        nearest = np.take_along_axis(block, order, axis=1)
        part = slice(start, start + len(block)), slice(0, order.shape[1])
        columns[part], similarities[part] = np.where(nearest > 0, order, -1), np.maximum(nearest, 0)
    return NeighborGraph(len(embeddings), columns, similarities)


def nearest_candidates(points: np.ndarray, candidates: np.ndarray, neighbors: int) -> NeighborGraph:
    """Return the exact graph of the `neighbors` nearest rows of `candidates` for every row of `points` (int16, ``(m, d)``, ``(n, d)``)."""
    from pipelines.set_functions._neighbor_kernels import offer_columns

    ids = np.arange(max(len(points), len(candidates)))
    columns, similarities = empty_lists(len(points), neighbors)
    with _Parts() as parts:
        for start in range(0, len(candidates), TILE_COLUMNS):
            others = candidates[start : start + TILE_COLUMNS].astype(np.float32).T
            for first in range(0, len(points), TILE_ROWS):
                block = points[first : first + TILE_ROWS].astype(np.float32) @ others
                names = (ids[first : first + len(block)], ids[start : start + block.shape[1]], columns, similarities)
                parts.each(len(block), lambda low, high: offer_columns(block, *names, low, high))  # noqa: B023  done before the next
    return NeighborGraph(len(candidates), columns, similarities)


class _Parts:
    """Threads that share the rows of a block; compiled loops give up the interpreter's lock."""

    def __init__(self) -> None:
        self._threads = Engine().num_workers
        self._pool = ThreadPoolExecutor(self._threads)

    def __enter__(self) -> _Parts:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def each(self, count: int, work: Callable[[int, int], None]) -> None:
        """Call `work` with bounds that together cover ``0..count``."""
        bounds = [count * number // self._threads for number in range(self._threads + 1)]
        list(self._pool.map(work, bounds[:-1], bounds[1:]))


def similarity_blocks(points: np.ndarray, others: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield ``(start, similarities)``: exact float32 integers of shape ``(rows, len(others))`` for consecutive rows of `points`."""
    transposed = np.ascontiguousarray(others.astype(np.float32).T)
    size = max(16, BLOCK_ELEMENTS // max(1, len(others)))
    for start in range(0, len(points), size):
        yield start, points[start : start + size].astype(np.float32) @ transposed


def nearest_pick(embeddings: np.ndarray, picks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return for every row of `embeddings` the nearest of the rows `picks` (int16, shape ``(m, d)``), over all pairs.

    Returns:
        Its place in `picks` (int64, shape ``(n,)``, the earliest of equals) and the integer similarity (int64, at least 0).
    """
    graph = nearest_candidates(embeddings, picks, 1)
    return np.maximum(graph.columns[:, 0], 0).astype(np.int64), graph.similarities[:, 0].astype(np.int64)


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
