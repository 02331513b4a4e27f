"""The certificate of a selection: against brute force where every set can be tried, and its estimates against the exact figures."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pipelines.embedders._grid import UNIT, to_integer_rows
from pipelines.set_functions import Order
from pipelines.set_functions._bound import best_duals, mean_and_error
from pipelines.set_functions._certificate import Certificate, certify, num_within, represent
from pipelines.set_functions._greedy import coverage_order
from pipelines.set_functions._neighbors import NeighborGraph, empty_lists, neighbor_graph


def points(count: int, *, dimensions: int = 8, seed: int = 0, clusters: int = 6) -> np.ndarray:
    """Return `count` integer rows around a few centres; some rows are repeated."""
    random = np.random.default_rng(seed)
    centres = random.normal(size=(clusters, dimensions))
    rows = to_integer_rows(centres[random.integers(clusters, size=count)] + 0.4 * random.normal(size=(count, dimensions)))
    rows[count // 2 : count // 2 + count // 10] = rows[: count // 10]
    return rows


def token_counts(count: int, *, seed: int = 0, most: int = 120) -> np.ndarray:
    return np.random.default_rng(seed + 1).integers(1, most, size=count)


def dense(rows: np.ndarray) -> np.ndarray:
    """Return all integer similarities, negative ones as 0 (int64)."""
    return np.maximum(rows.astype(np.int64) @ rows.T.astype(np.int64), 0)


def covered_by(kernel: np.ndarray, chosen: np.ndarray | tuple[int, ...]) -> float:
    """Return the coverage of a set: the mean cosine to its nearest point."""
    return float(kernel[:, list(chosen)].max(axis=1).mean()) / UNIT


def thinned(graph: NeighborGraph, *, keep: float, seed: int) -> NeighborGraph:
    """Return `graph` without a part of its edges, as an approximate search would miss them."""
    random = np.random.default_rng(seed)
    columns, similarities = empty_lists(*graph.columns.shape)
    for row in range(graph.num_rows):
        kept = np.flatnonzero((graph.similarities[row] > 0) & (random.random(graph.columns.shape[1]) < keep))
        columns[row, : len(kept)], similarities[row, : len(kept)] = graph.columns[row, kept], graph.similarities[row, kept]
    return NeighborGraph(graph.num_points, columns, similarities, is_exact=False)


def greedy(graph: NeighborGraph, tokens: np.ndarray | None = None) -> Order:
    """Return the exact greedy order of facility location on `graph`, by gain or by gain per token."""
    picks, gains = coverage_order(graph, costs=tokens)
    return Order(picks=picks, gains=gains / UNIT, graph=graph)


def certificate(rows: np.ndarray, tokens: np.ndarray, order: Order, num_selected: int, *, seed: int = 0, **settings: int) -> Certificate:
    represented = represent(rows, order, num_selected)
    return certify(rows, tokens, order, num_selected, represented=represented, seed=seed, **settings)


# Every set tried


TINY = {"count": st.integers(2, 10), "size": st.integers(1, 4), "neighbors": st.integers(1, 12), "seed": st.integers(0, 10_000)}


@settings(max_examples=60, deadline=None)
@given(**TINY)
def test_greedy_is_near_the_optimum_and_the_bound_is_above_it(count: int, size: int, neighbors: int, seed: int) -> None:
    rows = points(count, dimensions=4, seed=seed)
    kernel, order = dense(rows), greedy(neighbor_graph(rows, neighbors))
    assume(len(order.picks) >= size)
    best = max(covered_by(kernel, chosen) for chosen in itertools.combinations(range(count), size))
    found = certificate(rows, np.ones(count, dtype=np.int64), order, size, seed=seed)
    assert found.coverage == pytest.approx(covered_by(kernel, order.picks[:size]))
    assert found.upper_bound >= best - 1e-12
    assert found.upper_bound_of_tokens >= best - 1e-12
    assert found.bound_is_certain and found.coverage_error == 0
    if neighbors >= count:
        assert found.coverage >= (1 - 1 / math.e) * best


@settings(max_examples=60, deadline=None)
@given(**TINY, keep=st.floats(0.0, 1.0))
def test_no_set_exceeds_the_bounds_whatever_edges_are_missing(count: int, size: int, neighbors: int, seed: int, keep: float) -> None:
    rows, tokens = points(count, dimensions=4, seed=seed), token_counts(count, seed=seed, most=6)
    kernel = dense(rows)
    graph = thinned(neighbor_graph(rows, neighbors), keep=keep, seed=seed)
    picks = np.random.default_rng(seed).permutation(count)
    size = min(size, count)
    spent = tokens[picks[:size]].sum()
    found = certificate(rows, tokens, Order(picks=picks, gains=np.ones(count), graph=graph), size, seed=seed)
    sets = [chosen for number in range(1, count + 1) for chosen in itertools.combinations(range(count), number)]
    affordable = [chosen for chosen in sets if tokens[list(chosen)].sum() <= spent]
    assert found.upper_bound_of_tokens >= max(covered_by(kernel, chosen) for chosen in affordable) - 1e-12
    assert found.upper_bound >= max(covered_by(kernel, chosen) for chosen in affordable if len(chosen) <= size) - 1e-12
    assert found.bound_is_certain, "every row is sampled: nothing is estimated"
    shares, bounds = found.bound_curve
    for share, bound in zip(shares[1::8], bounds[1::8], strict=True):
        within = [chosen for chosen in sets if tokens[list(chosen)].sum() <= share * tokens.sum() + 1e-9]
        assert bound >= max((covered_by(kernel, chosen) for chosen in within), default=0.0) - 1e-12


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(2, 9), neighbors=st.integers(1, 9), budget=st.integers(1, 20), seed=st.integers(0, 10_000), steps=st.integers(1, 12)
)
def test_any_step_of_the_duals_gives_a_bound(count: int, neighbors: int, budget: int, seed: int, steps: int) -> None:
    rows, costs = points(count, dimensions=3, seed=seed), token_counts(count, seed=seed, most=6)
    graph, kernel = neighbor_graph(rows, neighbors), dense(rows)
    duals = best_duals(graph, costs, budget, covered=np.zeros(count, dtype=np.int64), steps=steps)
    assert (duals.values >= graph.floors).all()
    bound = duals.bounds(costs, np.array([budget]))[0]
    sets = (chosen for number in range(1, count + 1) for chosen in itertools.combinations(range(count), number))
    reached = max((covered_by(kernel, chosen) for chosen in sets if costs[list(chosen)].sum() <= budget), default=0.0)
    assert bound / (count * UNIT) >= reached - 1e-12


def test_the_bound_is_tight_on_an_exact_graph() -> None:
    rows = points(1_500, dimensions=24, clusters=40)
    order = greedy(neighbor_graph(rows, 32))
    for size in (150, 400):
        found = certificate(rows, np.ones(len(rows), dtype=np.int64), order, size)
        assert found.coverage <= found.upper_bound <= 1.02 * found.coverage
        assert found.gap_share_at_least > 0.9
    everything = certificate(rows, np.ones(len(rows), dtype=np.int64), order, len(order.picks))
    assert everything.coverage == pytest.approx(everything.upper_bound, rel=1e-9)


# Representatives


@settings(max_examples=40, deadline=None)
@given(count=st.integers(1, 60), size=st.integers(1, 20), seed=st.integers(0, 10_000), dimensions=st.integers(1, 6))
def test_represented_is_brute_force(count: int, size: int, seed: int, dimensions: int) -> None:
    rows = points(count, dimensions=dimensions, seed=seed)
    rows[count // 3] = 0
    kernel, size = dense(rows), min(size, count)
    picks = np.random.default_rng(seed).permutation(count)
    exact = represent(rows, Order(picks=picks, gains=np.ones(count)), size)
    nearest = kernel[:, picks[:size]]
    assert exact.is_exact
    assert exact.similarity.tolist() == nearest.max(axis=1).tolist()
    assert exact.place.tolist() == np.where(nearest.max(axis=1) > 0, nearest.argmax(axis=1), -1).tolist()
    over_edges = represent(rows, Order(picks=picks, gains=np.ones(count), graph=neighbor_graph(rows, count)), size, max_operations=0)
    assert not over_edges.is_exact
    assert over_edges.place.tolist() == exact.place.tolist()
    assert over_edges.similarity.tolist() == exact.similarity.tolist()


@settings(max_examples=30, deadline=None)
@given(count=st.integers(2, 60), neighbors=st.integers(1, 8), seed=st.integers(0, 10_000))
def test_represented_over_edges_is_the_nearest_pick_among_them(count: int, neighbors: int, seed: int) -> None:
    rows = points(count, seed=seed)
    graph, picks = neighbor_graph(rows, neighbors), np.random.default_rng(seed).permutation(count)[: count // 2]
    found = represent(rows, Order(picks=picks, gains=np.ones(len(picks)), graph=graph), len(picks), max_operations=0)
    place_of = {point: place for place, point in enumerate(picks.tolist())}
    for row in range(count):
        edges = [(-int(s), place_of[c]) for c, s in zip(graph.columns[row].tolist(), graph.similarities[row], strict=True) if c in place_of]
        if row in place_of:
            edges.append((-int(dense(rows)[row, row]), place_of[row]))
        similarity, place = min(edges, default=(0, -1))
        assert found.similarity[row] == -similarity
        assert found.place[row] == place or (row in place_of and dense(rows)[row, picks[found.place[row]]] == -similarity)


def test_a_pick_with_many_duplicates_represents_itself() -> None:
    rows = np.repeat(points(4), 6, axis=0)
    picks = np.array([5, 11, 17])  # the last of its duplicates, of which a list of two neighbours holds the first two
    found = represent(rows, Order(picks=picks, gains=np.ones(3), graph=neighbor_graph(rows, 2)), 3, max_operations=0)
    assert found.place[picks].tolist() == [0, 1, 2]
    assert (found.similarity[picks] == dense(rows)[picks, picks]).all()


# What is estimated


@pytest.mark.parametrize(("approximate", "divisor"), [(False, 40), (True, 40), (True, 10)])
def test_estimates_are_within_a_few_standard_errors(approximate: bool, divisor: int) -> None:
    rows, tokens = points(2_000, dimensions=24, clusters=60, seed=4), token_counts(2_000)
    graph = thinned(neighbor_graph(rows, 8), keep=0.7, seed=1) if approximate else neighbor_graph(rows, 8)
    order = greedy(graph)
    size = num_within(tokens[order.picks], int(tokens.sum()) // divisor)
    exact = certificate(rows, tokens, order, size)
    assert exact.coverage == pytest.approx(covered_by(dense(rows), order.picks[:size]))
    represented = represent(rows, order, size, max_operations=0)
    errors, misses = [], []
    for seed in range(8):
        found = certify(rows, tokens, order, size, represented=represented, seed=seed, max_points=250)
        assert found.sampled_points == 250 and found.bound_is_certain == (not approximate)
        errors.append(found.coverage_error)
        misses.append(found.coverage - exact.coverage)
        assert abs(misses[-1]) <= 4 * found.coverage_error + 1e-12
        assert found.upper_bound >= exact.coverage
        if approximate:
            assert found.upper_bound == pytest.approx(exact.upper_bound, rel=0.1)
            assert found.neighbor_recall == pytest.approx(exact.neighbor_recall, abs=0.05)
    assert 0 < np.mean(errors) < 0.015
    assert np.std(misses) < 2.5 * np.mean(errors), "the standard error is that of the estimates"


def test_an_exact_coverage_moves_the_others_with_it() -> None:
    """Random and greedy are differences from the selection on the same points, so a greedy selection has all of the gap."""
    rows, tokens = points(1_200, dimensions=24, clusters=60, seed=4), token_counts(1_200)
    order = greedy(neighbor_graph(rows, 16), tokens)
    size = num_within(tokens[order.picks], int(tokens.sum()) // 4)
    found, exact = certificate(rows, tokens, order, size, max_points=150), certificate(rows, tokens, order, size)
    assert found.coverage == exact.coverage == found.coverage_greedy
    assert found.coverage_error == 0 and found.gap_share == exact.gap_share == 1
    assert found.coverage_random == pytest.approx(exact.coverage_random, abs=0.01)


def test_the_error_of_a_mean() -> None:
    values = np.random.default_rng(0).normal(size=400)
    mean, error = mean_and_error(values, 10**9)
    assert mean == pytest.approx(values.mean()) and error == pytest.approx(values.std(ddof=1) / 20)
    assert mean_and_error(values, 500)[1] == pytest.approx(error * math.sqrt(0.2), rel=1e-6)
    assert mean_and_error(values, 400) == (pytest.approx(values.mean()), 0.0)


@pytest.mark.parametrize("keep", [1.0, 0.6, 0.0])
def test_recall_counts_the_nearest_that_are_edges(keep: float) -> None:
    rows, neighbors = points(150, dimensions=6), 7
    graph, kernel = thinned(neighbor_graph(rows, neighbors), keep=keep, seed=3), dense(points(150, dimensions=6))
    found = true = 0
    for row in range(len(rows)):
        nearest = np.sort(kernel[row][kernel[row] > 0])[::-1][:neighbors]
        found += min(len(nearest), int((graph.similarities[row] >= nearest[-1]).sum()))
        true += len(nearest)
    order = Order(picks=np.arange(150), gains=np.ones(150), graph=graph)
    assert certificate(rows, np.ones(150, dtype=np.int64), order, 30).neighbor_recall == pytest.approx(found / true)


# What is compared


def test_random_orders_have_nothing_of_the_gap_and_greedy_has_all() -> None:
    rows, tokens = points(1_000, dimensions=24, clusters=80, seed=2), token_counts(1_000, seed=2)
    graph = neighbor_graph(rows, 32)
    order = greedy(graph, tokens)
    size = num_within(tokens[order.picks], int(tokens.sum()) // 4)
    found = certificate(rows, tokens, order, size)
    assert found.gap_share == 1.0
    assert found.coverage_random < found.coverage <= found.upper_bound <= found.upper_bound_of_tokens
    assert found.random_share_for_same_coverage > 1.2 * found.selected_share
    shuffled = np.random.default_rng(9).permutation(1_000)
    size = num_within(tokens[shuffled], int(tokens.sum()) // 4)
    for with_graph in (graph, None):
        baseline = certificate(rows, tokens, Order(picks=shuffled, gains=np.ones(1_000), graph=with_graph), size)
        assert abs(baseline.gap_share) < 0.3
        assert baseline.coverage_greedy == pytest.approx(found.coverage, abs=0.01)
        assert baseline.random_share_for_same_coverage == pytest.approx(baseline.selected_share, abs=0.06)


def test_random_selections_hold_at_most_as_many_tokens() -> None:
    rows, tokens = points(300, seed=5), token_counts(300, seed=5)
    order, kernel = greedy(neighbor_graph(rows, 16)), dense(rows)
    spent = int(tokens[order.picks[:40]].sum())
    reached = []
    for draw in range(2):
        shuffled = np.random.default_rng([7, draw]).permutation(300)
        chosen = shuffled[: num_within(tokens[shuffled], spent)]
        assert tokens[chosen].sum() <= spent
        reached.append(covered_by(kernel, chosen))
    assert certificate(rows, tokens, order, 40, seed=7).coverage_random == pytest.approx(np.mean(reached))


def test_curves_are_the_coverage_of_prefixes() -> None:
    rows, tokens = points(200, seed=6), token_counts(200, seed=6)
    order, kernel = greedy(neighbor_graph(rows, 8)), dense(rows)
    found = certificate(rows, tokens, order, 50)
    shares, coverage = found.curve
    assert shares[0] == coverage[0] == 0
    assert found.selected_share in shares
    for share, value in zip(shares[1:], coverage[1:], strict=True):
        size = num_within(tokens[order.picks], round(share * int(tokens.sum())))
        assert value == pytest.approx(covered_by(kernel, order.picks[:size]))
    assert found.random_curve[0][-1] == 1
    assert found.random_curve[1][-1] == pytest.approx(covered_by(kernel, np.arange(200)))
    assert (np.interp(shares, *found.bound_curve) >= coverage - 1e-12).all()
    assert found.bound_curve[1][-1] == pytest.approx(covered_by(kernel, np.arange(200)), rel=1e-6)


def test_the_numbers_are_floats_by_name() -> None:
    rows = points(120)
    found = certificate(rows, token_counts(120), greedy(neighbor_graph(rows, 8)), 20)
    metrics = found.metrics()
    assert all(type(value) is float and math.isfinite(value) for value in metrics.values())
    assert {"coverage", "coverage_error", "gap_share", "gap_share_at_least", "certified_ratio", "upper_bound", "neighbor_recall"} <= set(
        metrics
    )
    assert metrics["bound_is_certain"] == 1.0 and metrics["sampled_points"] == 120.0
    assert metrics["certified_ratio"] == found.coverage / found.upper_bound
    assert not [name for name in metrics if "curve" in name]


def test_vectors_of_zeros_cover_nothing() -> None:
    rows, tokens = np.zeros((5, 8), dtype=np.int16), np.ones(5, dtype=np.int64)
    found = certificate(rows, tokens, Order(picks=np.arange(5), gains=np.ones(5), graph=neighbor_graph(rows, 3)), 2)
    assert found.coverage == found.coverage_random == found.upper_bound == 0
    assert found.neighbor_recall == found.gap_share == found.certified_ratio == 1


@pytest.mark.parametrize("max_points", [None, 300])
def test_the_numbers_do_not_depend_on_the_threads(max_points: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, tokens = points(1_300, dimensions=16, clusters=40), token_counts(1_300)
    graph = thinned(neighbor_graph(rows, 12), keep=0.8, seed=2)
    found = []
    for threads in ("1", "3"):
        monkeypatch.setenv("GRISTMILL_WORKERS", threads)
        found.append(certificate(rows, tokens, greedy(graph), 200, max_points=max_points))
    assert found[0].metrics() == found[1].metrics()
    assert all((first == second).all() for first, second in zip(found[0].bound_curve, found[1].bound_curve, strict=True))


def test_leading_passages_within_a_budget() -> None:
    tokens = np.array([3, 4, 5])
    assert [num_within(tokens, budget) for budget in (0, 2, 3, 6, 7, 12, 99)] == [0, 0, 1, 1, 2, 3, 3]
