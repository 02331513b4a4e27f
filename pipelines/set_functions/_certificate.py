"""The certificate of a selection: its coverage, that of random passages, and what no equally large set exceeds.

Coverage is the facility location objective over n, with every pair counted: the mean over all points of the cosine to the nearest
selected one, negative cosines as 0. It is measured whatever set function chose.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

from pipelines.embedders._grid import UNIT
from pipelines.set_functions import Order
from pipelines.set_functions._neighbors import NeighborGraph, coverage_along, nearest_pick, neighbor_graph
from pipelines.set_functions.facility_location import greedy_order

RANDOM_DRAWS = 2
NEIGHBORS = 32
"""Edges per point of the graph for the bound, where the set function builds none."""
CURVE_POINTS = 40

Curve = tuple[np.ndarray, np.ndarray]
"""Shares of all tokens, rising, and the coverage at each (estimated over 2,000 points)."""


@dataclass(frozen=True)
class Certificate:
    """How good a selected prefix is."""

    coverage: float
    """Of the selection; exact."""
    coverage_random: float
    """Mean of `RANDOM_DRAWS` random selections of at most as many tokens; exact."""
    upper_bound: float
    """No set of as many passages covers more."""
    selected_share: float
    """Share of all tokens that is selected."""
    random_share_for_same_coverage: float
    """Share of all tokens that a random selection needs for the selection's coverage; read off the curves."""
    curve: Curve
    random_curve: Curve

    @property
    def gap_share_at_least(self) -> float:
        """A lower bound of the share of the way from random to the optimum: (f - random) / (bound - random)."""
        gap = self.upper_bound - self.coverage_random
        return (self.coverage - self.coverage_random) / gap if gap > 0 else 1.0

    def metrics(self) -> dict[str, float]:
        """Return the numbers by name."""
        numbers = {name: value for name, value in asdict(self).items() if not name.endswith("curve")}
        ratio = self.coverage / self.upper_bound if self.upper_bound > 0 else 1.0
        return numbers | {"gap_share_at_least": self.gap_share_at_least, "certified_ratio": ratio}


def certify(
    embeddings: np.ndarray, tokens: np.ndarray, order: Order, num_selected: int, *, similarity: np.ndarray, seed: int
) -> Certificate:
    """Certify the first `num_selected` picks of `order`.

    Args:
        embeddings: int16, shape ``(n, d)``; `tokens`: int64, shape ``(n,)``.
        similarity: int64, shape ``(n,)``: each point's integer similarity to its nearest selected point.
        seed: of the random selections.
    """
    total = int(tokens.sum())
    spent = int(tokens[order.picks[:num_selected]].sum())
    draws = [np.random.default_rng([seed, draw]).permutation(len(embeddings)) for draw in range(RANDOM_DRAWS)]
    sizes = [num_within(tokens[draw], spent) for draw in draws]
    random = [float(nearest_pick(embeddings, draw[:size])[1].sum()) for draw, size in zip(draws, sizes, strict=True)]
    curve, random_curve = _curve(embeddings, tokens, order.picks, num_selected), _curve(embeddings, tokens, draws[0], sizes[0])
    graph, near = order.graph, similarity
    if graph is None:  # the bound starts from a greedy set, which comes closer to the optimum than what was chosen
        graph = neighbor_graph(embeddings, NEIGHBORS)
        near = nearest_pick(embeddings, greedy_order(graph)[0][:num_selected])[1]
    return Certificate(
        coverage=float(similarity.sum()) / (len(embeddings) * UNIT),
        coverage_random=sum(random) / (RANDOM_DRAWS * len(embeddings) * UNIT),
        upper_bound=upper_bound(graph, num_selected, covered=near),
        selected_share=spent / total,
        random_share_for_same_coverage=float(np.interp(np.interp(spent / total, *curve), random_curve[1], random_curve[0])),
        curve=curve,
        random_curve=random_curve,
    )


def num_within(tokens: np.ndarray, budget: int) -> int:
    """Return how many leading passages hold at most `budget` tokens together."""
    return int(np.searchsorted(np.cumsum(tokens), budget, side="right"))


def _curve(embeddings: np.ndarray, tokens: np.ndarray, picks: np.ndarray, extra: int) -> Curve:
    """Return the curve of prefixes at equal steps of tokens; the prefix of `extra` picks is among them."""
    cumulative, total = np.cumsum(tokens[picks]), int(tokens.sum())
    sizes = np.searchsorted(cumulative, np.linspace(0, total, CURVE_POINTS + 1)[1:], side="right")
    sizes = np.unique(np.clip(np.append(sizes, extra), 1, len(picks)))
    return cumulative[sizes - 1] / total, coverage_along(embeddings, picks, sizes)


def upper_bound(graph: NeighborGraph, num_picks: int, *, covered: np.ndarray, steps: int = 60) -> float:
    """Return a value that f(S) / n exceeds for no set S of `num_picks` points, over all pairs and not only the graph's edges.

    For any u_i >= floor_i: f(S) <= sum_i u_i + the `num_picks` largest of g_v = sum_i max(0, s_iv - u_i), the Lagrangian dual of the
    facility location program (Cornuejols, Fisher, Nemhauser 1977); pairs that are no edge add nothing to g_v because
    s_iv <= floor_i <= u_i. u is improved by `steps` subgradient steps of Polyak's length.

    Args:
        covered: int64, shape ``(n,)``: each point's similarity to its nearest pick in a set of `num_picks` points.
    """
    floors = graph.floors.astype(np.float64)
    similarities = graph.similarities.astype(np.float64)
    reached = float(covered.sum())
    duals = np.maximum(floors, covered)
    best = np.inf
    for _ in range(steps):
        excess = np.maximum(similarities - duals[graph.rows], 0.0)
        values = np.bincount(graph.columns, weights=excess, minlength=graph.num_points)
        top = np.argsort(-values, kind="stable")[:num_picks]
        bound = float(duals.sum() + values[top].sum())
        best = min(best, bound)
        in_top = np.zeros(graph.num_points, dtype=bool)
        in_top[top] = True
        used = in_top[graph.columns] & (excess > 0)
        slope = 1.0 - np.bincount(graph.rows[used], minlength=graph.num_points)
        slope[(duals <= floors) & (slope > 0)] = 0.0
        square = float((slope * slope).sum())
        if bound <= reached or square == 0.0:
            break
        duals = np.maximum(floors, duals - (bound - reached) / square * slope)
    return best / (UNIT * graph.num_points)
