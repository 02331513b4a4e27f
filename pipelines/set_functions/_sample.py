"""A random sample of points compared with all points: one matrix product that serves all of a certificate's estimates."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np

from pipelines.embedders._grid import UNIT
from pipelines.engine import Engine
from pipelines.set_functions._neighbors import TILE_COLUMNS, TILE_ROWS, NeighborGraph, empty_lists

OPERATIONS, LEAST_POINTS = 4e11, 2_000
"""As many points are sampled as these floating-point operations allow (4 CPU-seconds: all of 28,000 points of 256 numbers), but at
least so many."""
RECALL_POINTS = 1_000
CURVE_POINTS = 40


@dataclass(frozen=True)
class Ranking:
    """An order of points, and the prefixes of it that are measured."""

    points: np.ndarray
    """int64: picked points."""
    sizes: np.ndarray
    """int64: of the prefixes, rising from 0."""
    shares: np.ndarray
    """float64: share of all tokens in each prefix."""
    budget_at: int
    """Which of the prefixes is the longest within the budget."""

    @property
    def in_budget(self) -> np.ndarray:
        """The points of that prefix."""
        return self.points[: self.sizes[self.budget_at]]


def ranking(points: np.ndarray, tokens: np.ndarray, budget: int) -> Ranking:
    """Return `points` with prefixes at equal steps of all `tokens` (int64, ``(n,)``), and the one of at most `budget` tokens."""
    total = int(tokens.sum())
    spent = np.append(0, np.cumsum(tokens[points]))
    limits = np.append(np.linspace(0, total, CURVE_POINTS + 1), budget)
    places = np.searchsorted(spent, limits, side="right") - 1
    sizes = np.unique(places)
    return Ranking(points, sizes, spent[sizes] / total, int(np.searchsorted(sizes, places[-1])))


@dataclass(frozen=True)
class Sample:
    """What the sampled points are near to."""

    rows: np.ndarray
    """int64, shape ``(s,)``: the sampled points, distinct."""
    rankings: list[Ranking]
    covered: np.ndarray
    """int32, shape ``(s, rankings, prefixes)``: similarity to the nearest point of each prefix but the empty one."""
    largest_missing: np.ndarray
    """int64: largest similarity that is no edge, of the sampled points, or of the first `RECALL_POINTS` where the graph is exact."""
    recall: float
    """Share of the nearest neighbours, as many as there are edges, that are no nearer than an edge."""

    def at_budget(self, number: int) -> np.ndarray:
        """Return the similarity to the nearest point of a ranking's prefix within the budget (int64, shape ``(s,)``)."""
        place = self.rankings[number].budget_at
        return self.covered[:, number, place - 1].astype(np.int64) if place else np.zeros(len(self.rows), dtype=np.int64)

    def curve(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the shares of all tokens of a ranking's prefixes and the mean coverage of the sampled points."""
        means = self.covered[:, number, : len(self.rankings[number].sizes) - 1].mean(axis=0, dtype=np.float64)
        return self.rankings[number].shares, np.append(0.0, means / UNIT)


def num_sampled(embeddings: np.ndarray) -> int:
    """Return how many rows of `embeddings` (shape ``(n, d)``) are compared with all of them."""
    return min(len(embeddings), max(LEAST_POINTS, int(OPERATIONS / (2 * max(1, embeddings.size)))))


def look(embeddings: np.ndarray, rows: np.ndarray, graph: NeighborGraph, rankings: list[Ranking]) -> Sample:
    """Compare the rows `rows` (int64, distinct) of `embeddings` (int16, shape ``(n, d)``) with all of them.

    Memory: a tile of similarities for each thread, the sampled rows in float32, and 4 bytes a sampled row for each prefix of each ranking.
    """
    from threadpoolctl import threadpool_limits

    from pipelines.set_functions._certificate_kernels import raise_prefixes
    from pipelines.set_functions._neighbor_kernels import offer_columns

    count, size = len(embeddings), len(rows)
    points, ids = embeddings[rows].astype(np.float32), np.arange(count)
    prefixes = np.stack([_shortest_prefix(ranked, count) for ranked in rankings], axis=1)
    covered = np.zeros((size, len(rankings), max(len(ranked.sizes) - 1 for ranked in rankings)), dtype=np.int32)
    looked = min(size, RECALL_POINTS) if graph.is_exact else size
    columns, similarities = empty_lists(looked, graph.columns.shape[1] + 1)

    def compare(first: int, start: int, others: np.ndarray) -> None:
        block = points[first : first + TILE_ROWS] @ others
        raise_prefixes(block, prefixes[start : start + TILE_COLUMNS], covered[first : first + len(block)])
        listed = min(len(block), looked - first)
        if listed > 0:
            offer_columns(block, ids[first:], ids[start:], columns, similarities, 0, listed)

    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(Engine().num_workers) as pool:
        for start in range(0, count, TILE_COLUMNS):
            others = embeddings[start : start + TILE_COLUMNS].astype(np.float32).T
            list(pool.map(partial(compare, start=start, others=others), range(0, size, TILE_ROWS)))
    edges = graph.columns[rows[:looked]], graph.similarities[rows[:looked]]
    return Sample(rows, rankings, covered, _largest_missing(columns, similarities, edges[0]), _recall(similarities[:, :-1], edges[1]))


def _shortest_prefix(ranked: Ranking, count: int) -> np.ndarray:
    """Return which prefix, without the empty one, is the first to hold each point (uint8, shape ``(count,)``); 255 where none does."""
    shortest = np.full(count, 255, dtype=np.uint8)
    measured = ranked.points[: ranked.sizes[-1]]
    shortest[measured] = np.searchsorted(ranked.sizes[1:], np.arange(len(measured)), side="right")
    return shortest


def _largest_missing(columns: np.ndarray, similarities: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Return the first similarity of each row's list whose column is not among its `edges`, which are one fewer (int64; 0 if none is)."""
    largest = np.zeros(len(columns), dtype=np.int64)
    for number in range(columns.shape[1] - 1, -1, -1):
        is_edge = (edges == columns[:, number, None]).any(axis=1)
        largest = np.where(is_edge, largest, similarities[:, number])
    return largest


def _recall(nearest: np.ndarray, edges: np.ndarray) -> float:
    """Return the share of the `nearest` similarities that the similarities of the `edges` reach; ties do not matter."""
    there = nearest > 0
    last = np.where(there, nearest, np.iinfo(np.int32).max).min(axis=1, initial=np.iinfo(np.int32).max)
    found = np.minimum((edges >= last[:, None]).sum(axis=1), there.sum(axis=1))
    return float(found.sum() / there.sum()) if there.any() else 1.0
