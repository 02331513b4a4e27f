"""Submodlib: our orders are its orders, pick by pick, and its functions as a plugin are greedy on the formulas they stand for.

It gives ties to the highest index, so it is fed with reversed rows. Similarities are integers, which it sums exactly.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec

import numpy as np
import pytest

from pipelines import plugins
from pipelines.embedders._grid import UNIT, to_integer_rows
from pipelines.errors import GristmillError
from pipelines.set_functions import Points
from pipelines.set_functions._greedy import THOUSANDTHS, Picks, coverage_order, cut_order
from pipelines.set_functions._neighbors import NeighborGraph, nearest_candidates, neighbor_graph
from pipelines.set_functions.submodlib import (
    MAX_NAIVE_PARTITION_SIZE,
    MAX_QUERIES,
    NOT_SUBMODULAR,
    TOWARDS_QUERIES,
    Submodlib,
    _kernel,
    _order_partition,
    _spread,
)

needs_submodlib = pytest.mark.skipif(find_spec("submodlib") is None, reason="submodlib-py has no wheel for this Python")
NO_QUERIES = np.zeros((0, 0), dtype=np.int16)
SIZES = ((25, 4, 0), (60, 16, 1), (60, 4, 2), (150, 8, 3), (150, 32, 4))
"""Points, dimensions and seed."""


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Submodlib names a class that SciPy has moved."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def rows_of(count: int, dimensions: int, seed: int, *, repeated: float = 0.2) -> np.ndarray:
    """Return integer rows around six centres, the same for every seed; a share of them is `repeated`."""
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(9).normal(size=(6, dimensions))
    rows = to_integer_rows(centres[random.integers(6, size=count)] + 0.4 * random.normal(size=(count, dimensions)))
    copies = int(repeated * count)
    rows[count // 2 : count // 2 + copies] = rows[:copies]
    return rows


def cosines(rows: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return all similarities in units of cosine (float64)."""
    return rows.astype(np.float64) @ others.T.astype(np.float64) / UNIT


# Our orders are submodlib's


def reversed_kernel(rows: np.ndarray, others: np.ndarray) -> np.ndarray:
    kernel = rows[::-1].astype(np.float32) @ others.astype(np.float32).T
    return np.ascontiguousarray(np.maximum(kernel, 0))


def nearest_query(rows: np.ndarray, queries: np.ndarray) -> np.ndarray:
    return np.maximum(rows.astype(np.int64) @ queries.T.astype(np.int64), 0).max(axis=1)


def facility_location(rows: np.ndarray, queries: np.ndarray) -> tuple[object, Picks]:
    import submodlib

    kernel = reversed_kernel(rows, rows[::-1])
    theirs = submodlib.FacilityLocationFunction(n=len(rows), mode="dense", separate_rep=False, sijs=kernel)
    return theirs, coverage_order(neighbor_graph(rows, len(rows)))


def graph_cut(rows: np.ndarray, queries: np.ndarray, *, trade_off: float) -> tuple[object, Picks]:
    import submodlib

    kernel = reversed_kernel(rows, rows[::-1])
    theirs = submodlib.GraphCutFunction(n=len(rows), mode="dense", lambdaVal=trade_off, separate_rep=False, ggsijs=kernel)
    picks, gains = cut_order(neighbor_graph(rows, len(rows)), trade_off)
    return theirs, (picks, gains / THOUSANDTHS)


def variant_mutual_information(rows: np.ndarray, queries: np.ndarray, *, eta: int) -> tuple[object, Picks]:
    """FLQMI: the queries are represented, and a point is worth its nearest query besides."""
    import submodlib

    kernel = reversed_kernel(rows, queries)
    theirs = submodlib.FacilityLocationVariantMutualInformationFunction(
        n=len(rows), num_queries=len(queries), query_sijs=kernel, queryDiversityEta=eta
    )
    return theirs, coverage_order(nearest_candidates(queries, rows, len(rows)), bonus=eta * nearest_query(rows, queries))


def mutual_information(rows: np.ndarray, queries: np.ndarray, *, eta: int) -> tuple[object, Picks]:
    """FLVMI: no point counts more than its nearest query says."""
    import submodlib

    theirs = submodlib.FacilityLocationMutualInformationFunction(
        n=len(rows),
        num_queries=len(queries),
        data_sijs=reversed_kernel(rows, rows[::-1]),
        query_sijs=reversed_kernel(rows, queries),
        magnificationEta=eta,
    )
    graph = neighbor_graph(rows, len(rows))
    clipped = np.minimum(graph.similarities, eta * nearest_query(rows, queries)[:, None]).astype(np.int32)
    return theirs, coverage_order(NeighborGraph(len(rows), np.where(clipped > 0, graph.columns, -1), clipped))


def conditional_gain(rows: np.ndarray, queries: np.ndarray) -> tuple[object, Picks]:
    """FLCG: what the queries cover is covered already."""
    import submodlib

    theirs = submodlib.FacilityLocationConditionalGainFunction(
        n=len(rows),
        num_privates=len(queries),
        data_sijs=reversed_kernel(rows, rows[::-1]),
        private_sijs=reversed_kernel(rows, queries),
        privacyHardness=1,
    )
    return theirs, coverage_order(neighbor_graph(rows, len(rows)), covered=nearest_query(rows, queries))


PAIRS: dict[str, Callable[[np.ndarray, np.ndarray], tuple[object, Picks]]] = {
    "facility_location": facility_location,
    "graph_cut, 0.25": lambda rows, queries: graph_cut(rows, queries, trade_off=0.25),  # in float32 without rounding
    "graph_cut, 0.5": lambda rows, queries: graph_cut(rows, queries, trade_off=0.5),
    "flqmi, 1": lambda rows, queries: variant_mutual_information(rows, queries, eta=1),
    "flqmi, 2": lambda rows, queries: variant_mutual_information(rows, queries, eta=2),
    "flvmi, 1": lambda rows, queries: mutual_information(rows, queries, eta=1),
    "flvmi, 2": lambda rows, queries: mutual_information(rows, queries, eta=2),
    "conditional_gain": conditional_gain,
}


def maximized(function: object, count: int, size: int, optimizer: str) -> tuple[list[int], list[float]]:
    """Return submodlib's picks by our indices, and its gains."""
    greedy = function.maximize(budget=size, optimizer=optimizer, stopIfZeroGain=False, stopIfNegativeGain=False, show_progress=False)
    return [count - 1 - pick for pick, _ in greedy], [gain for _, gain in greedy]


@needs_submodlib
@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize(("count", "dimensions", "seed"), SIZES)
def test_orders_are_naive_greedys_pick_by_pick(name: str, count: int, dimensions: int, seed: int) -> None:
    rows = rows_of(count, dimensions, seed)
    theirs, (picks, gains) = PAIRS[name](rows, rows_of(count // 5, dimensions, seed + 50))
    size = min(len(picks), count - 1)
    assert size > 2
    assert maximized(theirs, count, size, "NaiveGreedy") == (picks[:size].tolist(), gains[:size].tolist())


@needs_submodlib
@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize(("count", "dimensions", "seed"), SIZES)
def test_orders_are_lazy_greedys_pick_by_pick(name: str, count: int, dimensions: int, seed: int) -> None:
    """Lazy greedy takes either of two equal gains, so of repeated rows it may pick another copy; without them nothing differs.

    But for FLVMI, where different points often gain the same, since each reaches the limits of the same rows.
    """
    for repeated in (0.0, 0.2):
        rows = rows_of(count, dimensions, seed, repeated=repeated)
        theirs, (picks, gains) = PAIRS[name](rows, rows_of(count // 5, dimensions, seed + 50))
        size = min(len(picks), count - 1)
        their_picks, their_gains = maximized(theirs, count, size, "LazyGreedy")
        assert their_gains == gains[:size].tolist()
        if not name.startswith("flvmi"):
            assert np.array_equal(rows[their_picks], rows[picks[:size]])
            assert repeated or their_picks == picks[:size].tolist()


# Submodlib's functions as a plugin


def points_of(count: int, dimensions: int, seed: int, *, towards: bool) -> Points:
    return Points(rows_of(count, dimensions, seed), queries=rows_of(count // 5, dimensions, seed + 50) if towards else None)


@needs_submodlib
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("function", "native", "settings"),
    [
        ("facility_location", "facility_location", {}),
        ("graph_cut", "graph_cut", {}),
        ("facility_location_variant_mutual_information", "facility_location", {"towards": "flqmi"}),
        ("facility_location_mutual_information", "facility_location", {"towards": "flvmi"}),
    ],
)
def test_one_partition_is_our_own_function(function: str, native: str, settings: dict[str, str], seed: int) -> None:
    points = points_of(100, 16, seed, towards=function in TOWARDS_QUERIES)
    ours = plugins.build("set_functions", native, {"neighbors": 100, **settings}).order(points)
    picks, gains = _order_partition(Submodlib(function=function, trade_off=0.4), points.embeddings, _spread(points.queries))
    size = min(len(ours.picks), 99)
    if function != "facility_location_mutual_information":  # ties, see above
        assert picks[:size].tolist() == ours.picks[:size].tolist()
    assert gains[:size] == pytest.approx(ours.gains[:size], rel=1e-6)  # the trade-off is a float32 there
    assert (gains[size:] < 1e-9).all()


def log_determinant(matrix: np.ndarray) -> float:
    return float(np.linalg.slogdet(matrix)[1]) if len(matrix) else 0.0


def disparities(rows: np.ndarray) -> np.ndarray:
    """Return 1 less the cosine, at most 1, by the vectors' own norms."""
    unit = rows / np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    return 1 - np.clip(unit @ unit.T, 0, 1)


def log_determinant_value(chosen: list[int], rows: np.ndarray, queries: np.ndarray) -> float:
    return log_determinant(cosines(rows[chosen], rows[chosen]) + 0.4 * np.eye(len(chosen)))


def disparity_sum_value(chosen: list[int], rows: np.ndarray, queries: np.ndarray) -> float:
    return float(disparities(rows[chosen]).sum() / 2)


def graph_cut_information(chosen: list[int], rows: np.ndarray, queries: np.ndarray) -> float:
    return float(np.maximum(cosines(rows[chosen], queries), 0).sum())


def concave_value(chosen: list[int], rows: np.ndarray, queries: np.ndarray) -> float:
    similarities = np.maximum(cosines(rows[chosen], queries), 0)
    return float(0.5 * np.log1p(similarities.sum(axis=1)).sum() + np.log1p(similarities.sum(axis=0)).sum())


def log_determinant_information(chosen: list[int], rows: np.ndarray, queries: np.ndarray) -> float:
    within = cosines(rows[chosen], rows[chosen]) + 0.4 * np.eye(len(chosen))
    among, across = cosines(queries, queries) + 0.4 * np.eye(len(queries)), 0.5 * cosines(rows[chosen], queries)
    return log_determinant(within) - log_determinant(within - across @ np.linalg.solve(among, across.T))


FORMULAS: dict[str, Callable[[list[int], np.ndarray, np.ndarray], float]] = {
    "log_determinant": log_determinant_value,
    "disparity_sum": disparity_sum_value,
    "graph_cut_mutual_information": graph_cut_information,
    "concave_over_modular": concave_value,
    "log_determinant_mutual_information": log_determinant_information,
}


@needs_submodlib
@pytest.mark.parametrize("function", FORMULAS)
def test_every_pick_is_the_best_by_the_formula(function: str) -> None:
    points = points_of(32, 6, 5, towards=function in TOWARDS_QUERIES)
    rows, queries = points.embeddings, _spread(points.queries)
    picks, gains = _order_partition(Submodlib(function=function, eta=0.5), rows, queries)
    assert len(picks) == 31
    value = FORMULAS[function]
    for place, (pick, gain) in enumerate(zip(picks.tolist(), gains.tolist(), strict=True)):
        chosen = picks[:place].tolist()
        before = value(chosen, rows, queries)
        possible = {point: value([*chosen, point], rows, queries) - before for point in set(range(32)) - set(chosen)}
        assert gain == pytest.approx(possible[pick], abs=1e-4)
        assert gain >= max(possible.values()) - 1e-4


@needs_submodlib
def test_disparity_min_is_the_farthest_point_first() -> None:
    rows = rows_of(60, 8, 6)
    distances = disparities(rows)
    picks, gains = _order_partition(Submodlib(function="disparity_min"), rows, NO_QUERIES)
    assert picks[0] == 0 and gains[0] == 1
    for place in range(1, len(picks)):
        left = np.setdiff1d(np.arange(60), picks[:place])
        nearest = distances[np.ix_(left, picks[:place])].min(axis=1)
        assert gains[place] == pytest.approx(nearest.max(), abs=1e-6)
        assert nearest[left == picks[place]] == pytest.approx(nearest.max(), abs=1e-6)
    assert (gains[48:] == 0).all() and (gains[:48] > 0).all()  # 12 of the 60 rows are repeated


@needs_submodlib
def test_partitions_are_merged_by_gain() -> None:
    """Of a modular function the merged order is that of the whole; each partition of 20 lacks its last point."""
    points = points_of(61, 16, 7, towards=True)
    points.embeddings[7] = 0
    plugin = plugins.build("set_functions", "submodlib", {"function": "graph_cut_mutual_information", "partition_size": 20, "seed": 1})
    order = plugin.order(points)
    worth = np.maximum(cosines(points.embeddings, points.queries), 0).sum(axis=1)
    assert len(np.unique(order.picks)) == 60 - 3 and 7 not in order.picks
    assert order.picks.tolist() == [point for point in np.lexsort((np.arange(61), -worth)) if point in set(order.picks.tolist())]
    assert order.gains == pytest.approx(worth[order.picks])


@needs_submodlib
def test_partitions_whose_gains_rise_are_merged_by_place() -> None:
    rows = rows_of(90, 16, 6)
    order = plugins.build("set_functions", "submodlib", {"function": "disparity_sum", "partition_size": 30}).order(Points(rows))
    assert len(np.unique(order.picks)) == 90 - 3
    assert (order.gains[:3] == 0).all() and (order.gains[3:6] > 0).all()
    assert (order.picks[0:3] == np.sort(order.picks[0:3])).all()
    assert order.gains[-3:].min() > order.gains[3:6].max()


def test_at_most_500_queries_at_equal_distances() -> None:
    queries = np.arange(1, 2 * 3_000 + 1, dtype=np.int16).reshape(3_000, 2)
    spread = _spread(queries)
    assert len(spread) == MAX_QUERIES
    assert spread[0].tolist() == queries[0].tolist() and spread[-1].tolist() == queries[-1].tolist()
    queries[10:] = 0
    assert _spread(queries).tolist() == queries[:10].tolist()


@needs_submodlib
def test_missing_and_useless_target_sets_are_errors() -> None:
    rows = rows_of(20, 4, 0)
    for function in TOWARDS_QUERIES:
        for queries in (None, np.zeros((0, 4), dtype=np.int16), np.zeros((2, 4), dtype=np.int16)):
            with pytest.raises(GristmillError, match=rf"{function} needs a target set.*selection\.towards"):
                Submodlib(function=function).order(Points(rows, queries=queries))
    with pytest.raises(GristmillError, match="graph_cut looks at no target set; remove selection.towards, or choose one of"):
        Submodlib(function="graph_cut").order(Points(rows, queries=rows[:3]))
    with pytest.raises(GristmillError, match="cannot extend earlier picks; choose facility_location"):
        Submodlib().order(Points(rows, earlier=rows[:3]))


def test_settings_that_would_not_end_or_not_be_defined_are_errors() -> None:
    for function in NOT_SUBMODULAR:
        with pytest.raises(
            GristmillError, match=f"partition_size 1001 is too large for {function}.*set {MAX_NAIVE_PARTITION_SIZE} at most"
        ):
            plugins.build("set_functions", "submodlib", {"function": function, "partition_size": 1_001})
    for function in ("log_determinant", "log_determinant_mutual_information"):
        with pytest.raises(GristmillError, match="trade_off 0.001 is too small"):
            plugins.build("set_functions", "submodlib", {"function": function, "trade_off": 0.001})
    with pytest.raises(GristmillError, match="eta 1.5 would make the similarities .* indefinite; set 1 at most"):
        plugins.build("set_functions", "submodlib", {"function": "log_determinant_mutual_information", "eta": 1.5})
    assert plugins.build("set_functions", "submodlib", {"eta": 1.5}).eta == 1.5


def test_similarities_are_contiguous_and_finite_or_an_error() -> None:
    rows = rows_of(30, 8, 0).astype(np.float32)
    for function in ("facility_location", "log_determinant", "disparity_min", "concave_over_modular"):
        kernel = _kernel(function, rows, rows)
        assert kernel.dtype == np.float32 and kernel.flags.c_contiguous and np.isfinite(kernel).all()
        assert (kernel.min() < 0) == (function == "log_determinant")
    assert (_kernel("disparity_min", rows, rows)[np.arange(6), np.arange(15, 21)] == 1).all()  # rows 15 to 20 repeat the first
    rows[3, 1] = np.nan
    with pytest.raises(GristmillError, match="not a number.*embed the corpus again"):
        _kernel("facility_location", rows, rows)


def test_missing_submodlib_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "submodlib", None)  # how Python marks a package that cannot be imported
    with pytest.raises(GristmillError, match="choose facility_location"):
        Submodlib().order(Points(rows_of(10, 4, 0)))


@needs_submodlib
def test_an_empty_corpus_has_an_empty_order() -> None:
    for rows in (np.zeros((0, 4), dtype=np.int16), np.zeros((5, 4), dtype=np.int16)):
        order = Submodlib().order(Points(rows))
        assert len(order.picks) == len(order.gains) == 0
