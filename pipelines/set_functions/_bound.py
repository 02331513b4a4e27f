"""What no set within a budget covers more than: the Lagrangian dual of facility location on a graph of nearest neighbours.

For any u_i >= 0, with c_i(S) = max(0, max over j in S of s_ij) and E_i the candidates that row i has an edge to:

    c_i(S) <= u_i + max(0, max over j in S of (s_ij - u_i)) <= u_i + sum over j in S and E_i of max(0, s_ij - u_i) + max(0, m_i - u_i)

where m_i is the largest similarity of row i that is no edge. Summed over the rows, with g_j = sum_i max(0, s_ij - u_i) over edges:

    f(S) <= sum_i u_i + (the most that sum over j in S of g_j can be within the budget) + sum_i max(0, m_i - u_i).

The middle term is a knapsack; its fractional solution, by falling g_j over cost, bounds it. In an exact graph m_i is at most the row's
floor, so that u_i >= floor_i leaves nothing of the last term. (Cornuejols, Fisher, Nemhauser 1977, "Location of bank accounts to optimize
float", for the dual; Held, Wolfe, Crowder 1974, "Validation of subgradient optimization", for how u is found.)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipelines.set_functions._neighbors import NeighborGraph

STEPS = 60
PATIENCE = 2
"""Steps without a better bound after which steps are halved, and go on from the best duals."""


@dataclass(frozen=True)
class Duals:
    """Duals that bound the coverage of all sets, whatever their cost."""

    values: np.ndarray
    """int64, shape ``(rows,)``: u, at least the graph's floors. Integers, so that sums over rows are exact."""
    excess: np.ndarray
    """int64, shape ``(n,)``: g."""

    def bounds(self, costs: np.ndarray, budgets: np.ndarray) -> np.ndarray:
        """Return the first two terms for sets whose `costs` (int64, ``(n,)``, at least 1) sum to each of `budgets` at most (float64)."""
        falling = np.argsort(-(self.excess / costs))
        spent, gained = np.cumsum(costs[falling]), np.cumsum(self.excess[falling])
        return float(self.values.sum()) + np.interp(budgets, np.append(0, spent), np.append(0, gained))

    def missing(self, rows: np.ndarray, largest: np.ndarray) -> tuple[float, float]:
        """Return the last term, estimated from a random sample of rows, and its standard error: 0 where every row is given.

        Args:
            rows: int64, shape ``(s,)``: distinct rows.
            largest: int64, shape ``(s,)``: m of these rows.
        """
        total = len(self.values)
        mean, error = mean_and_error(np.maximum(largest - self.values[rows], 0), total)
        return mean * total, error * total


def mean_and_error(values: np.ndarray, total: int) -> tuple[float, float]:
    """Return the mean of `total` values, estimated from a random sample of them, and its standard error: 0 where all are given."""
    mean, count = float(values.mean()), len(values)
    if count == total or count < 2:
        return mean, 0.0
    return mean, float(values.std(ddof=1)) * float(np.sqrt((1 - count / total) / count))


def best_duals(graph: NeighborGraph, costs: np.ndarray, budget: int, *, covered: np.ndarray, steps: int = STEPS) -> Duals:
    """Return the duals with the least bound found for the sets whose `costs` sum to `budget` at most.

    Args:
        costs: int64, shape ``(n,)``: at least 1.
        covered: int64, shape ``(rows,)``: over edges, how similar the nearest pick of a good set within the budget is; where u
            starts, and whose sum the steps aim at.
        steps: subgradient steps of Polyak's length.
    """
    floors, reached = graph.floors, float(covered.sum())
    best = duals = _duals(graph, np.maximum(floors, covered))
    least, best_slope = np.inf, np.zeros(graph.num_rows)
    scale, since = 1.0, 0
    for _ in range(steps):
        bound, slope = _bound_and_slope(graph, costs, budget, duals)
        since += 1
        if bound < least:
            best, least, best_slope, since = duals, bound, slope, 0
        elif since == PATIENCE:
            duals, bound, slope = best, least, best_slope
            scale, since = scale / 2, 0
        slope = np.where((duals.values <= floors) & (slope > 0), 0.0, slope)
        square = float((slope * slope).sum())
        if bound <= reached or square == 0.0:
            break
        moved = np.rint(duals.values - scale * (bound - reached) / square * slope).astype(np.int64)
        duals = _duals(graph, np.maximum(floors, moved))
    return best


def duals_of_everything(graph: NeighborGraph) -> Duals:
    """Return the duals whose bound is what all candidates together cover."""
    return _duals(graph, graph.similarities[:, :1].max(axis=1, initial=0).astype(np.int64))


def _duals(graph: NeighborGraph, values: np.ndarray) -> Duals:
    from pipelines.set_functions._certificate_kernels import sum_excess

    excess = np.zeros(graph.num_points, dtype=np.int64)
    sum_excess(graph.columns, graph.similarities, values, excess)
    return Duals(values, excess)


def _bound_and_slope(graph: NeighborGraph, costs: np.ndarray, budget: int, duals: Duals) -> tuple[float, np.ndarray]:
    """Return the bound and a subgradient of it (float64, shape ``(rows,)``)."""
    from pipelines.set_functions._certificate_kernels import sum_shares

    shares = _knapsack(duals.excess, costs, budget)
    sums = np.empty(graph.num_rows)
    sum_shares(graph.columns, graph.similarities, duals.values, shares, sums)
    return float(duals.values.sum()) + float((duals.excess * shares).sum()), 1.0 - sums


def _knapsack(values: np.ndarray, costs: np.ndarray, budget: int) -> np.ndarray:
    """Return the share of each candidate in the most valuable fractional knapsack (float64); equals have equal shares."""
    rates = values / costs
    falling = np.argsort(-rates)
    last = int(np.searchsorted(np.cumsum(costs[falling]), budget))
    if last == len(values):
        return np.ones(len(values))
    rate = rates[falling[last]]  # the same in whatever order the sort left equals
    shares = (rates > rate).astype(np.float64)
    equals = rates == rate
    shares[equals] = (budget - costs[rates > rate].sum()) / costs[equals].sum()
    return shares
