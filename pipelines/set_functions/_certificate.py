"""The certificate of a selection: its coverage, that of random passages, and what no equally large set exceeds.

Coverage is the facility location objective over n, with every pair counted: the mean over all points of the cosine to the nearest
selected one, negative cosines as 0. It is measured whatever set function chose. Where all pairs are too many, it is the mean over
the edges of the graph of neighbours, which is cheap, and what the rest of the pairs add to it on a random sample of points.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from pipelines.embedders._grid import UNIT
from pipelines.set_functions import Order
from pipelines.set_functions._bound import STEPS, Duals, best_duals, duals_of_everything, mean_and_error
from pipelines.set_functions._greedy import coverage_order
from pipelines.set_functions._neighbors import NeighborGraph, nearest_pick
from pipelines.set_functions._sample import CURVE_POINTS, Sample, look, num_sampled, ranking
from pipelines.set_functions.facility_location import FacilityLocation

MAX_OPERATIONS = 4e12
"""Floating-point operations up to which representatives are sought over all pairs: 40 CPU-seconds at 1e11 a second, what choosing
among as many points takes; 170,000 points of 256 numbers of which a quarter is selected."""
RANDOM_DRAWS = 2
BOUND_SHARES = (0.02, 0.06, 0.15, 0.35, 0.65)
"""Shares of all tokens for which duals are sought, besides the selected share; each bounds the whole curve."""
CURVE_STEPS = 25
ERRORS = 3
"""Standard errors of what is estimated that are added to a bound."""

Curve = tuple[np.ndarray, np.ndarray]
"""Shares of all tokens, rising, and the coverage at each (float64)."""


@dataclass(frozen=True)
class Represented:
    """The nearest selected point of every point."""

    place: np.ndarray
    """int64, shape ``(n,)``: its place among the selected, the earliest of equals; -1 where none has a similarity above 0."""
    similarity: np.ndarray
    """int64, shape ``(n,)``: the integer similarity to it; 0 where there is none."""
    is_exact: bool
    """Whether all pairs were looked at, or the edges of the graph only."""
    graph: NeighborGraph | None = None
    """The graph, where one was built for it."""


@dataclass(frozen=True)
class Certificate:
    """How good a selected prefix is. Every coverage is over all points, with dense cosine."""

    coverage: float
    """Of the selection."""
    coverage_error: float
    """Standard error of `coverage`; 0 where it is exact."""
    coverage_random: float
    """Mean of `RANDOM_DRAWS` random selections of at most as many tokens."""
    coverage_greedy: float
    """Of the exact greedy order of facility location on the graph, by gain per token, at most as many tokens."""
    upper_bound: float
    """No set of at most as many passages and at most as many tokens covers more."""
    upper_bound_of_tokens: float
    """No set of at most as many tokens covers more, however many and however short its passages are."""
    bound_is_certain: bool
    """Whether the bounds are proven; else they hold up to what was estimated on the sample, with `ERRORS` standard errors added."""
    neighbor_recall: float
    """Share of the true nearest neighbours of up to 1,000 sampled points that are edges of the graph."""
    sampled_points: int
    """Points that were compared with all points."""
    selected_share: float
    """Share of all tokens that is selected."""
    random_share_for_same_coverage: float
    """Share of all tokens that a random selection needs for the selection's coverage; read off the curves."""
    curve: Curve
    """Of the order, on the sampled points, as `random_curve`."""
    random_curve: Curve
    bound_curve: Curve
    """The bound of sets of as many tokens."""

    @property
    def gap_share(self) -> float:
        """Share of the way from random to exact greedy, at the same tokens: (f - random) / (greedy - random)."""
        return self._share_of_gap(self.coverage_greedy)

    @property
    def gap_share_at_least(self) -> float:
        """A lower bound of the share of the way from random to the optimum: (f - random) / (bound - random)."""
        return self._share_of_gap(self.upper_bound)

    @property
    def certified_ratio(self) -> float:
        """Coverage over `upper_bound`."""
        return self.coverage / self.upper_bound if self.upper_bound > 0 else 1.0

    def metrics(self) -> dict[str, float]:
        """Return the numbers by name."""
        numbers = {field.name: getattr(self, field.name) for field in fields(self) if not field.name.endswith("curve")}
        shares = {name: getattr(self, name) for name in ("gap_share", "gap_share_at_least", "certified_ratio")}
        return {name: float(value) for name, value in (numbers | shares).items()}

    def _share_of_gap(self, best: float) -> float:
        gap = best - self.coverage_random
        return (self.coverage - self.coverage_random) / gap if gap > 0 else 1.0


def represent(embeddings: np.ndarray, order: Order, num_selected: int, *, max_operations: float = MAX_OPERATIONS) -> Represented:
    """Find the nearest of the first `num_selected` picks of `order` for every row of `embeddings` (int16, shape ``(n, d)``).

    All pairs are looked at where that takes at most `max_operations` floating-point operations, else the edges of the order's graph.
    """
    chosen = order.picks[:num_selected]
    if 2 * embeddings.size * num_selected <= max_operations:
        place, similarity = nearest_pick(embeddings, embeddings[chosen])
        return Represented(np.where(similarity > 0, place, -1), similarity, is_exact=True)
    graph = order.graph or FacilityLocation().graph(embeddings)
    place, similarity = _on_graph(graph, chosen)
    own = _own_similarity(embeddings, chosen)
    itself = own > similarity[chosen]  # a point with many duplicates may be no neighbour of its own
    place[chosen[itself]], similarity[chosen[itself]] = np.flatnonzero(itself), own[itself]
    return Represented(place, similarity, is_exact=False, graph=graph)


def certify(
    embeddings: np.ndarray,
    tokens: np.ndarray,
    order: Order,
    num_selected: int,
    *,
    represented: Represented,
    seed: int,
    max_points: int | None = None,
) -> Certificate:
    """Certify the first `num_selected` picks of `order`, at least 1.

    Args:
        embeddings: int16, shape ``(n, d)``.
        tokens: int64, shape ``(n,)``: at least 1 each.
        represented: what `represent` returns for the same picks.
        seed: of the random selections and of the sample.
        max_points: sample at most so many points; without it, as many as `_sample.OPERATIONS` allow.
    """
    graph = order.graph or represented.graph or FacilityLocation().graph(embeddings)
    spent = int(tokens[order.picks[:num_selected]].sum())
    greedy = coverage_order(graph, costs=tokens)[0]
    draws = [np.random.default_rng([seed, draw]).permutation(len(embeddings)) for draw in range(RANDOM_DRAWS)]
    rankings = [ranking(points, tokens, spent) for points in (order.picks, greedy, *draws)]
    rows = np.random.default_rng([seed, RANDOM_DRAWS]).permutation(len(embeddings))[: max_points or num_sampled(embeddings)]
    sample = look(embeddings, rows, graph, rankings)
    (mine, error), (best, _), *random = [_coverage(graph, sample, number) for number in range(len(rankings))]
    coverage = mine
    if represented.is_exact:
        coverage, error = float(represented.similarity.mean()) / UNIT, 0.0
    curve, random_curve = sample.curve(0), _mean_curve([sample.curve(number) for number in range(2, len(rankings))])
    by_number, bound_curve = _bounds(graph, tokens, greedy, sample, num_selected=num_selected, spent=spent)
    share = spent / int(tokens.sum())
    by_tokens = float(np.interp(share, *bound_curve))
    return Certificate(
        coverage=coverage,
        coverage_error=error,
        coverage_random=coverage + sum(value for value, _ in random) / RANDOM_DRAWS - mine,  # differences on the same points
        coverage_greedy=coverage + best - mine,
        upper_bound=min(by_number, by_tokens),
        upper_bound_of_tokens=by_tokens,
        bound_is_certain=graph.is_exact or len(sample.rows) == len(embeddings),
        neighbor_recall=sample.recall,
        sampled_points=len(sample.rows),
        selected_share=share,
        random_share_for_same_coverage=float(np.interp(sample.at_budget(0).mean() / UNIT, random_curve[1], random_curve[0])),
        curve=curve,
        random_curve=random_curve,
        bound_curve=bound_curve,
    )


def num_within(tokens: np.ndarray, budget: int) -> int:
    """Return how many leading passages hold at most `budget` tokens together."""
    return int(np.searchsorted(np.cumsum(tokens), budget, side="right"))


def _on_graph(graph: NeighborGraph, picks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return place and similarity of each row's nearest pick over the edges (int64), -1 and 0 where no edge leads to one."""
    from pipelines.set_functions._certificate_kernels import nearest_on_graph

    places = np.full(graph.num_points, -1, dtype=np.int64)
    places[picks] = np.arange(len(picks))
    nearest, similarity = np.empty(graph.num_rows, dtype=np.int64), np.empty(graph.num_rows, dtype=np.int64)
    nearest_on_graph(graph.columns, graph.similarities, places, nearest, similarity)
    return nearest, similarity


def _own_similarity(embeddings: np.ndarray, points: np.ndarray, *, at_once: int = 1 << 16) -> np.ndarray:
    """Return the integer similarity of each of `points` to itself (int64)."""
    own = np.empty(len(points), dtype=np.int64)
    for start in range(0, len(points), at_once):
        rows = embeddings[points[start : start + at_once]].astype(np.int64)
        own[start : start + at_once] = (rows * rows).sum(axis=1)
    return own


def _coverage(graph: NeighborGraph, sample: Sample, number: int) -> tuple[float, float]:
    """Return coverage and standard error of a ranking's prefix within the budget; exact, and 0, where every row is sampled.

    Two estimates, of which the one with the smaller error is taken: the mean over the sample; or the mean over the edges of all rows
    and, over the sample, what the other pairs add (a difference estimator: Cochran 1977, "Sampling techniques", section 7.9).
    """
    over_edges, sampled = _on_graph(graph, sample.rankings[number].in_budget)[1], sample.at_budget(number)
    total = len(over_edges)
    mean, error = mean_and_error(sampled, total)
    rest, rest_error = mean_and_error(sampled - over_edges[sample.rows], total)
    if rest_error < error:
        mean, error = float(over_edges.mean()) + rest, rest_error
    return mean / UNIT, error / UNIT


def _mean_curve(curves: list[Curve]) -> Curve:
    shares = curves[0][0]
    return shares, np.mean([np.interp(shares, *curve) for curve in curves], axis=0)


def _bounds(
    graph: NeighborGraph, tokens: np.ndarray, greedy: np.ndarray, sample: Sample, *, num_selected: int, spent: int
) -> tuple[float, Curve]:
    """Return what no set of at most `num_selected` points exceeds, and along tokens, `spent` among them, what no set of as many does.

    The duals start from a greedy set: `greedy` is by gain per token.
    """
    total = int(tokens.sum())
    ones = np.ones(len(tokens), dtype=np.int64)

    def duals(costs: np.ndarray, budget: int, *, steps: int = STEPS) -> Duals:
        order = coverage_order(graph)[0] if costs is ones else greedy
        covered = _on_graph(graph, order[: num_within(costs[order], budget)])[1]
        return best_duals(graph, costs, budget, covered=covered, steps=steps)

    def bounds(found: Duals, costs: np.ndarray, budgets: np.ndarray) -> np.ndarray:
        values = found.bounds(costs, budgets)
        if not graph.is_exact:
            rest, error = found.missing(sample.rows, sample.largest_missing)
            values = values + rest + ERRORS * error
        return values / (graph.num_rows * UNIT)

    budgets = np.unique(np.append(np.linspace(0, total, CURVE_POINTS + 1), spent))
    along = [duals(tokens, int(share * total), steps=CURVE_STEPS) for share in BOUND_SHARES]
    curve = np.min([bounds(found, tokens, budgets) for found in (*along, duals(tokens, spent), duals_of_everything(graph))], axis=0)
    by_number = bounds(duals(ones, num_selected), ones, np.array([num_selected]))[0]
    return float(by_number), (budgets / total, curve)
