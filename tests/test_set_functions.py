"""Set functions: the graph of nearest neighbours and the greedy orders against brute force, in one thread and many, on CPU and in torch."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import plugins
from pipelines.embedders._grid import NORM, UNIT, to_integer_rows
from pipelines.errors import GristmillError
from pipelines.set_functions import Points
from pipelines.set_functions._greedy import coverage_order, cut_order, saturation_order
from pipelines.set_functions._neighbors import NeighborGraph, coverage_along, nearest_candidates, nearest_pick, neighbor_graph
from pipelines.set_functions._rounds import coverage_order_in_rounds, neighbor_graph_on
from pipelines.set_functions._tables import clustered_graph, nearest_centres
from pipelines.set_functions.facility_location import FacilityLocation

ROOT = Path(__file__).parents[1]
SIZES = {"count": st.integers(1, 70), "neighbors": st.integers(1, 80), "seed": st.integers(0, 10_000), "dimensions": st.integers(1, 6)}


def points(count: int, *, dimensions: int = 8, seed: int = 0, clusters: int = 6) -> np.ndarray:
    """Return `count` integer rows around a few centres; some rows are repeated."""
    random = np.random.default_rng(seed)
    centres = random.normal(size=(clusters, dimensions))
    rows = to_integer_rows(centres[random.integers(clusters, size=count)] + 0.4 * random.normal(size=(count, dimensions)))
    rows[count // 2 : count // 2 + count // 10] = rows[: count // 10]
    return rows


def kernel_of(graph: NeighborGraph) -> np.ndarray:
    """Return the graph as a dense int64 matrix; a pair that is no edge is 0."""
    kernel = np.zeros((graph.num_rows, graph.num_points), dtype=np.int64)
    rows, columns, similarities = graph.edges()
    kernel[rows, columns] = similarities
    return kernel


def brute_force(value: Callable[[list[int]], int], count: int, costs: np.ndarray | None = None) -> list[tuple[int, int]]:
    """Return (pick, gain) by trying every point at every step, best gain over cost first, ties to the lowest index, while f grows."""
    costs = np.ones(count, dtype=np.int64) if costs is None else costs
    chosen: list[int] = []
    picks, reached = [], value([])
    while True:
        gains = {point: value([*chosen, point]) - reached for point in range(count) if point not in chosen}
        gains = {point: gain for point, gain in gains.items() if gain > 0}
        if not gains:
            return picks
        best = min(gains, key=lambda point: (-(gains[point] / costs[point]), point))
        picks.append((best, gains[best]))
        chosen.append(best)
        reached += gains[best]


def pairs(order: tuple[np.ndarray, np.ndarray]) -> list[tuple[int, int]]:
    return list(zip(order[0].tolist(), order[1].tolist(), strict=True))


# The graph


@settings(max_examples=40, deadline=None)
@given(count=st.integers(1, 120), neighbors=st.integers(1, 40), seed=st.integers(0, 10_000))
def test_neighbors_are_the_nearest_with_lowest_index_first(count: int, neighbors: int, seed: int) -> None:
    rows = points(count, seed=seed, dimensions=3)
    rows[count // 3] = 0
    graph = neighbor_graph(rows, neighbors)
    dense = rows.astype(np.int64) @ rows.T.astype(np.int64)
    for point in range(count):
        nearest = [j for j in np.lexsort((np.arange(count), -dense[point])) if dense[point, j] > 0][:neighbors]
        found = graph.columns[point]
        assert found[found >= 0].tolist() == nearest
        assert graph.similarities[point][found >= 0].tolist() == dense[point, nearest].tolist()
        missing = np.setdiff1d(np.arange(count), nearest)
        assert max([0, *dense[point, missing]]) <= graph.floors[point]


@pytest.mark.parametrize(("count", "neighbors"), [(5, 8), (700, 4), (400, 300), (5_000, 12)])
def test_three_ways_to_the_same_graph(count: int, neighbors: int) -> None:
    rows = points(count, seed=count)
    graph = neighbor_graph(rows, neighbors)
    for other in (nearest_candidates(rows, rows, neighbors), neighbor_graph_on("cpu", rows, rows, neighbors)):
        assert np.array_equal(graph.columns, other.columns)
        assert np.array_equal(graph.similarities, other.similarities)


def test_clustered_graph_has_most_neighbors_and_true_similarities() -> None:
    rows = points(6_000, dimensions=32, seed=2, clusters=40)
    exact, clustered = neighbor_graph(rows, 8), clustered_graph(rows, 8)
    assert not clustered.is_exact
    row, column, similarity = clustered.edges()
    assert np.array_equal((rows[row].astype(np.int64) * rows[column]).sum(axis=1), similarity)
    assert all(len(np.unique(found[found >= 0])) == (found >= 0).sum() for found in clustered.columns)
    assert (clustered.similarities <= exact.similarities).all()
    assert (clustered.similarities == exact.similarities).mean() > 0.9


def test_clustered_graph_is_exact_where_every_cell_is_probed() -> None:
    rows = np.abs(points(1_000, seed=9))
    exact, clustered = neighbor_graph(rows, 6), clustered_graph(rows, 6, tables=2, probes=2)
    assert np.array_equal(exact.columns, clustered.columns)


def test_centres_are_found_through_centres_of_centres() -> None:
    rows = points(4_000, dimensions=16, seed=3, clusters=50)
    centres = points(5_000, dimensions=16, seed=4, clusters=50)
    found = nearest_centres(rows, centres, 2, np.random.default_rng(0))
    dense = rows.astype(np.int64) @ centres.T.astype(np.int64)
    best = dense.max(axis=1)
    reached = dense[np.arange(len(rows)), np.maximum(found[:, 0], 0)]
    assert (reached == best).mean() > 0.8
    assert (reached >= 0.9 * best).mean() > 0.99


def test_nearest_pick_and_curve_match_brute_force() -> None:
    rows, picks = points(150, seed=8), np.array([5, 3, 77, 140])
    dense = np.maximum(rows.astype(np.int64) @ rows.T.astype(np.int64), 0)
    place, similarity = nearest_pick(rows, rows[picks])
    assert np.array_equal(similarity, dense[:, picks].max(axis=1))
    found = similarity > 0
    assert np.array_equal(dense[np.arange(150), picks[place]][found], similarity[found])
    curve = coverage_along(rows, picks, np.array([1, 3, 4]))
    assert np.allclose(curve * UNIT, [dense[:, picks[:size]].max(axis=1).mean() for size in (1, 3, 4)])


# The orders


@settings(max_examples=60, deadline=None)
@given(**SIZES)
def test_coverage_is_brute_force_greedy(count: int, neighbors: int, seed: int, dimensions: int) -> None:
    graph = neighbor_graph(points(count, dimensions=dimensions, seed=seed), neighbors)
    random = np.random.default_rng(seed)
    given_ = {
        "weights": random.integers(0, 4, size=count),
        "covered": random.integers(0, UNIT, size=count),
        "bonus": random.integers(0, UNIT, size=count),
        "costs": random.integers(1, 9, size=count),
    }
    options = {name: values for name, values in given_.items() if random.random() < 0.4}
    kernel = kernel_of(graph)
    weights, covered = options.get("weights", np.ones(count, np.int64)), options.get("covered", np.zeros(count, np.int64))

    def value(chosen: list[int]) -> int:
        best = np.maximum(covered, kernel[:, chosen].max(axis=1, initial=0))
        return int((weights * best).sum()) + int(options.get("bonus", np.zeros(count, np.int64))[chosen].sum())

    wanted = brute_force(value, count, options.get("costs"))
    assert pairs(coverage_order(graph, **options)) == wanted
    assert pairs(coverage_order_in_rounds(graph, **options)) == wanted


@settings(max_examples=30, deadline=None)
@given(**SIZES, alpha=st.floats(0.05, 1.0))
def test_saturation_is_brute_force_greedy(count: int, neighbors: int, seed: int, dimensions: int, alpha: float) -> None:
    graph = neighbor_graph(points(count, dimensions=dimensions, seed=seed), neighbors)
    kernel = kernel_of(graph)
    limits = np.floor(alpha * kernel.sum(axis=1)).astype(np.int64)
    wanted = brute_force(lambda chosen: int(np.minimum(kernel[:, chosen].sum(axis=1), limits).sum()), count)
    assert pairs(saturation_order(graph, limits)) == wanted


@settings(max_examples=30, deadline=None)
@given(**SIZES, trade_off=st.sampled_from([0.0, 0.25, 0.4, 0.5, 1.0]))
def test_cut_is_brute_force_greedy(count: int, neighbors: int, seed: int, dimensions: int, trade_off: float) -> None:
    graph = neighbor_graph(points(count, dimensions=dimensions, seed=seed), neighbors)
    kernel, penalty = kernel_of(graph), round(1000 * trade_off)
    wanted = brute_force(lambda chosen: int(1000 * kernel[:, chosen].sum() - penalty * kernel[np.ix_(chosen, chosen)].sum()), count)
    assert pairs(cut_order(graph, trade_off)) == wanted


@pytest.mark.parametrize(("concave", "function"), [("sqrt", math.sqrt), ("log", math.log1p)])
def test_features_are_brute_force_greedy(concave: str, function: Callable[[float], float]) -> None:
    rows = points(40, seed=4)
    features = np.concatenate([np.maximum(rows, 0), np.maximum(-rows, 0)], axis=1).astype(np.float64) / NORM
    order = plugins.build("set_functions", "feature_based", {"concave": concave, "power": 1.0}).order(Points(rows))
    chosen: list[int] = []
    for pick, gain in zip(order.picks, order.gains, strict=True):
        values = [sum(map(function, features[[*chosen, point]].sum(axis=0))) for point in range(40)]
        reached = sum(map(function, features[chosen].sum(axis=0)))
        left = [values[point] if point not in chosen else -1.0 for point in range(40)]
        assert left[pick] == pytest.approx(max(left))
        assert gain == pytest.approx(values[pick] - reached)
        chosen.append(int(pick))
    assert sorted(chosen) == list(range(40))


@settings(max_examples=25, deadline=None)
@given(count=st.integers(2, 9), size=st.integers(1, 4), seed=st.integers(0, 10_000), function=st.sampled_from(["coverage", "saturation"]))
def test_greedy_reaches_its_share_of_the_optimum(count: int, size: int, seed: int, function: str) -> None:
    graph = neighbor_graph(points(count, dimensions=3, seed=seed), count)
    kernel, size = kernel_of(graph), min(size, count)
    limits = kernel.sum(axis=1) // 4
    order = coverage_order(graph) if function == "coverage" else saturation_order(graph, limits)

    def value(chosen: tuple[int, ...]) -> int:
        if function == "coverage":
            return int(kernel[:, chosen].max(axis=1, initial=0).sum())
        return int(np.minimum(kernel[:, chosen].sum(axis=1), limits).sum())

    best = max(value(chosen) for chosen in itertools.combinations(range(count), size))
    assert value(tuple(order[0][:size])) >= (1 - 1 / math.e) * best


# Facility location and its options


def test_duplicates_have_no_gain() -> None:
    rows = points(40, seed=1)
    assert FacilityLocation().order(Points(np.concatenate([rows, rows]))).picks.max() < 40


def test_zero_vectors_are_never_picked_and_empty_input_gives_an_empty_order() -> None:
    rows = points(20)
    rows[4] = 0
    assert 4 not in FacilityLocation().order(Points(rows)).picks
    for name in ("facility_location", "saturated_coverage", "graph_cut", "feature_based"):
        for empty in (np.zeros((5, 8), dtype=np.int16), np.zeros((0, 8), dtype=np.int16)):
            assert len(plugins.build("set_functions", name, {}).order(Points(empty)).picks) == 0


def test_an_extension_never_picks_what_earlier_picks_cover() -> None:
    rows = points(60, seed=3)
    earlier = rows[:10]
    order = FacilityLocation().order(Points(rows, earlier=earlier))
    covered = nearest_pick(rows, earlier)[1]
    dense = np.maximum(rows.astype(np.int64) @ rows.T.astype(np.int64), 0)
    assert not set(order.picks.tolist()) & set(range(10))
    first = order.picks[0]
    assert order.gains[0] * UNIT == np.maximum(dense[:, first] - covered, 0).sum()
    assert order.gains[0] * UNIT == np.maximum(dense - covered[:, None], 0).sum(axis=0).max()


def test_selection_towards_queries_is_nearer_to_them() -> None:
    rows = points(200, dimensions=16, seed=5, clusters=10)
    queries = rows[[0, 1, 2]]
    plain, near = FacilityLocation().order(Points(rows)), FacilityLocation(eta=0.0).order(Points(rows, queries=queries))
    assert nearest_pick(queries, rows[near.picks[:3]])[1].sum() > nearest_pick(queries, rows[plain.picks[:3]])[1].sum()
    assert nearest_pick(queries, rows[near.picks])[1].tolist() == nearest_pick(queries, rows)[1].tolist()  # nothing is left to gain


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_queries_limit_what_counts(eta: float) -> None:
    rows = points(30, seed=6)
    queries = points(5, seed=7)
    order = FacilityLocation(neighbors=30, towards="flvmi", eta=eta).order(Points(rows, queries=queries))
    dense = np.maximum(rows.astype(np.int64) @ rows.T.astype(np.int64), 0)
    limits = np.floor(eta * np.maximum(rows.astype(np.int64) @ queries.T.astype(np.int64), 0).max(axis=1)).astype(np.int64)
    wanted = brute_force(lambda chosen: int(np.minimum(dense[:, chosen].max(axis=1, initial=0), limits).sum()), 30)
    assert order.picks.tolist() == [pick for pick, _ in wanted]


def test_low_scores_weigh_more() -> None:
    rows = points(100, seed=2)
    scores = np.linspace(0, 1, 100)
    scores[7] = np.nan
    weights = FacilityLocation(weights="low_score")._weights(Points(rows, scores=scores))
    assert weights[0] == 10 and weights[99] == 1 and weights[7] == 1
    assert FacilityLocation(weights="high_score")._weights(Points(rows, scores=scores))[99] == 10
    with pytest.raises(GristmillError, match=r"selection\.score"):
        FacilityLocation(weights="low_score").order(Points(rows))


def test_text_that_resembles_nothing_is_worth_nothing_to_others() -> None:
    rows = np.concatenate([points(60, dimensions=7, seed=1), np.zeros((1, 7), np.int16)])
    rows = np.concatenate([rows, np.zeros((61, 1), np.int16)], axis=1)
    rows[60, 7] = NORM
    assert 60 in FacilityLocation().order(Points(rows)).picks
    order = FacilityLocation(cover_itself=False, neighbors=61).order(Points(rows))
    dense = np.maximum(rows.astype(np.int64) @ rows.T.astype(np.int64), 0)
    np.fill_diagonal(dense, 0)
    wanted = brute_force(lambda chosen: int(dense[:, chosen].max(axis=1, initial=0).sum()), 61)
    assert order.picks.tolist() == [pick for pick, _ in wanted]
    assert 60 not in order.picks


def test_gain_by_token_takes_short_passages_first() -> None:
    rows = points(50, seed=12)
    costs = np.where(np.arange(50) % 2 == 0, 1, 100)
    order = FacilityLocation(per_token=True).order(Points(rows, costs=costs))
    assert (order.picks[:5] % 2 == 0).all()


def test_a_gpu_that_is_not_there_is_an_error() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(GristmillError, match="set device to auto or cpu"):
        FacilityLocation(device="cuda").order(Points(points(5)))


@pytest.mark.parametrize("exact_up_to", [100_000, 0])
def test_same_order_with_one_two_and_four_threads(exact_up_to: int) -> None:
    script = (
        "import numpy as np, hashlib; from pipelines.embedders._grid import to_integer_rows; from pipelines.set_functions import Points; "
        "from pipelines.set_functions.facility_location import FacilityLocation; "
        "r = to_integer_rows(np.random.default_rng(0).normal(size=(5000, 96))); "
        f"o = FacilityLocation(exact_up_to={exact_up_to}).order(Points(r)); "
        "print(hashlib.sha256(o.picks.tobytes() + o.gains.tobytes() + o.graph.columns.tobytes()).hexdigest())"
    )
    outputs = set()
    for threads in ("1", "2", "4"):
        environment = {**os.environ, "GRISTMILL_WORKERS": threads, "OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads}
        outputs.add(subprocess.check_output([sys.executable, "-c", script], cwd=ROOT, env=environment, text=True))
    assert len(outputs) == 1
