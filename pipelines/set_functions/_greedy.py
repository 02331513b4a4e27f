"""Greedy orders on a graph of nearest neighbours, exact and in one thread: about 2 microseconds a point.

Everything is an integer but the ratio of gain and cost, so the same graph gives the same order everywhere. `_rounds` finds the same
order of coverage in parallel.
"""

from __future__ import annotations

import numpy as np

from pipelines.set_functions._neighbors import NeighborGraph

THOUSANDTHS = 1000
"""The penalty of a cut is given to three digits, so that gains stay integers."""

Picks = tuple[np.ndarray, np.ndarray]
"""Points in the order picked, and the gain of each when it was picked: both int64, until no gain is left."""


def coverage_order(
    graph: NeighborGraph,
    *,
    weights: np.ndarray | None = None,
    covered: np.ndarray | None = None,
    bonus: np.ndarray | None = None,
    costs: np.ndarray | None = None,
) -> Picks:
    """Order by f(S) = sum_i w_i max(c_i, max_{j in S} s_ij) + sum_{j in S} b_j, by gain over cost; ties go to the lowest index.

    Args:
        weights: int64 ``(rows,)``: w, at least 0; 1 where absent.
        covered: int64 ``(rows,)``: c, what earlier picks cover; 0 where absent.
        bonus: int64 ``(n,)``: b, at least 0; 0 where absent.
        costs: int64 ``(n,)``: at least 1; 1 where absent.
    """
    from pipelines.set_functions._greedy_kernels import COVERAGE

    state = np.zeros(graph.num_rows, dtype=np.int64) if covered is None else covered.astype(np.int64)
    return _greedy(graph, COVERAGE, state, weights=weights, bonus=bonus, costs=costs)


def saturation_order(
    graph: NeighborGraph, limits: np.ndarray, *, weights: np.ndarray | None = None, costs: np.ndarray | None = None
) -> Picks:
    """Order by f(S) = sum_i w_i min(l_i, sum_{j in S} s_ij) (saturated coverage), `limits` l being int64 ``(rows,)``."""
    from pipelines.set_functions._greedy_kernels import SATURATION

    return _greedy(graph, SATURATION, limits.astype(np.int64), weights=weights, costs=costs)


def cut_order(graph: NeighborGraph, trade_off: float, *, costs: np.ndarray | None = None) -> Picks:
    """Order by f(S) = sum_i sum_{j in S} s_ij - trade_off * sum_{i, j in S} s_ij (graph cut); gains are in thousandths.

    A pair counts with the similarity of each of its two directions that is an edge.
    """
    from pipelines.set_functions._greedy_kernels import CUT

    penalty = round(trade_off * THOUSANDTHS)
    own = np.zeros(graph.num_points, dtype=np.int64)
    rows, columns, similarities = graph.edges()
    itself = rows == columns
    own[rows[itself]] = -penalty * similarities[itself].astype(np.int64)
    weights = np.full(graph.num_rows, THOUSANDTHS, dtype=np.int64)
    return _greedy(graph, CUT, np.zeros(graph.num_rows, dtype=np.int64), weights=weights, bonus=own, costs=costs, penalty=penalty)


def _greedy(
    graph: NeighborGraph,
    kind: int,
    state: np.ndarray,
    *,
    weights: np.ndarray | None = None,
    bonus: np.ndarray | None = None,
    costs: np.ndarray | None = None,
    penalty: int = 0,
) -> Picks:
    from pipelines.set_functions import _greedy_kernels as kernels

    columns, similarities = np.ascontiguousarray(graph.columns), np.ascontiguousarray(graph.similarities)
    weights = np.ones(graph.num_rows, dtype=np.int64) if weights is None else weights.astype(np.int64)
    gains = np.zeros(graph.num_points, dtype=np.int64) if bonus is None else bonus.astype(np.int64)
    prices = np.ones(graph.num_points) if costs is None else costs.astype(np.float64)
    starts = np.zeros(graph.num_points + 1, dtype=np.int64)
    places = np.empty(int((columns >= 0).sum()), dtype=np.int32 if columns.size < 2**31 else np.int64)
    kernels.transpose(columns, starts, places)
    kernels.first_gains(columns, similarities, weights, state, kind, gains)
    return kernels.greedy(columns, similarities, starts, places, weights, state, kind, penalty, gains, prices)
