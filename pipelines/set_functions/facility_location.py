"""Facility location: a subset such that every point has a near one in it.

f(S) = sum over points i of max(0, max over j in S of cos(i, j)). The greedy order is within 1 - 1/e of the optimum at every
prefix (Nemhauser, Wolsey, Fisher 1978). It is computed exactly on the graph of nearest neighbours, where a pair that
is no edge counts 0; Wei, Iyer, Bilmes 2014 ("Fast multi-stage submodular maximization") give the argument for such a graph.
"""

from __future__ import annotations

import numpy as np
from pydantic import Field

from pipelines.embedders._grid import UNIT
from pipelines.set_functions import Order, SetFunction
from pipelines.set_functions._neighbors import NeighborGraph, neighbor_graph


class FacilityLocation(SetFunction):
    """Exact greedy over the graph of nearest neighbours."""

    neighbors: int = Field(default=32, ge=1)
    """Edges per point. At 25% of 10,000 TF-IDF/SVD vectors dense greedy covers 0.8036, 32 edges 0.8032, 8 edges 0.8018."""

    def order(self, embeddings: np.ndarray) -> Order:
        """Order by marginal coverage; a point that improves no point's coverage is left out."""
        graph = neighbor_graph(embeddings, self.neighbors)
        picks, gains = greedy_order(graph)
        return Order(picks=picks, gains=gains / UNIT, graph=graph)


def greedy_order(graph: NeighborGraph) -> tuple[np.ndarray, np.ndarray]:
    """Return the sequential greedy order on `graph` and the integer gains, both int64, until no gain is left.

    Computed in rounds. Two candidates conflict where they share a point whose coverage both would raise. A candidate that beats
    (by gain, then by lower index) every candidate it conflicts with has the gain that sequential greedy would find when it gets
    there, so all such candidates are taken in one round; sorted by gain, then index, the picks are the sequential order.
    """
    rows, columns, similarities = graph.rows, graph.columns, graph.similarities.astype(np.int64)
    covered = np.zeros(graph.num_points, dtype=np.int64)
    gains = _sums(columns, similarities, graph.num_points)
    picks, taken_gains = [], []
    while len(rows):
        winners = _winners(rows, columns, gains, graph.num_points)
        picks.append(winners)
        taken_gains.append(gains[winners])
        taken = np.zeros(graph.num_points, dtype=bool)
        taken[winners] = True
        chosen = taken[columns]
        raised = covered.copy()
        raised[rows[chosen]] = similarities[chosen]
        before, after = covered[rows], raised[rows]
        touched = after > before
        lost = np.minimum(similarities, after)[touched] - before[touched]
        gains -= _sums(columns[touched], lost, graph.num_points)
        alive = similarities > after
        rows, columns, similarities, covered = rows[alive], columns[alive], similarities[alive], raised
    if not picks:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    all_picks, all_gains = np.concatenate(picks), np.concatenate(taken_gains)
    order = np.lexsort((all_picks, -all_gains))
    return all_picks[order], all_gains[order]


def _winners(rows: np.ndarray, columns: np.ndarray, gains: np.ndarray, num_points: int) -> np.ndarray:
    """Return the candidates that are the best one at each point they would raise; `rows` is sorted."""
    starts = np.flatnonzero(np.diff(rows, prepend=-1))
    lengths = np.diff(starts, append=len(rows))
    gain = gains[columns]
    is_best = gain == np.repeat(np.maximum.reduceat(gain, starts), lengths)
    lowest = np.minimum.reduceat(np.where(is_best, columns, num_points), starts)
    won = np.bincount(lowest, minlength=num_points)
    return np.flatnonzero((won > 0) & (won == np.bincount(columns, minlength=num_points)))


def _sums(columns: np.ndarray, values: np.ndarray, num_points: int) -> np.ndarray:
    """Return int64 sums of `values` by column; float64 holds them exactly (below 2**53 up to 5e8 points)."""
    return np.bincount(columns, weights=values, minlength=num_points).astype(np.int64)
