"""The baselines: random, full, INGENIOUS against a reference in Python, and points by score."""

from __future__ import annotations

from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from threadpoolctl import threadpool_limits

from pipelines import plugins
from pipelines.embedders._grid import UNIT, to_integer_rows
from pipelines.errors import GristmillError
from pipelines.set_functions import Order, Points
from pipelines.set_functions.by_score import ByScore
from pipelines.set_functions.full import Full
from pipelines.set_functions.ingenious import Ingenious, importance, similarity_matrix
from pipelines.set_functions.random_order import RandomOrder


def points(count: int, *, dimensions: int = 8, seed: int = 0) -> Points:
    """Return `count` integer rows around six centres; a tenth are repeated."""
    random = np.random.default_rng(seed)
    centres = random.normal(size=(6, dimensions))
    rows = to_integer_rows(centres[random.integers(6, size=count)] + 0.4 * random.normal(size=(count, dimensions)))
    rows[count // 2 : count // 2 + count // 10] = rows[: count // 10]
    return Points(rows)


def same(one: Order, other: Order) -> bool:
    return one.picks.tobytes() == other.picks.tobytes() and one.gains.tobytes() == other.gains.tobytes()


# Random and full


def test_random_order_is_a_seeded_permutation() -> None:
    given_points = points(200)
    orders = [RandomOrder(seed=seed).order(given_points) for seed in (0, 0, 1)]
    assert same(orders[0], orders[1]) and not same(orders[0], orders[2])
    assert sorted(orders[0].picks.tolist()) == list(range(200)) != orders[0].picks.tolist()
    assert orders[0].picks.dtype == np.int64 and (orders[0].gains == 1).all()


def test_full_is_the_corpus_in_its_own_order() -> None:
    order = Full().order(points(30))
    assert order.picks.tolist() == list(range(30)) and order.gains.tolist() == [1.0] * 30


@pytest.mark.parametrize("name", ["random_order", "full", "ingenious"])
def test_an_empty_corpus_has_an_empty_order(name: str) -> None:
    order = plugins.build("set_functions", name).order(Points(np.zeros((0, 4), dtype=np.int16)))
    assert len(order.picks) == len(order.gains) == 0


# INGENIOUS


def reference_order(kernel: np.ndarray, draws: np.ndarray) -> list[tuple[int, int]]:
    """Return (pick, gain): of the candidates drawn at each step the one that adds most coverage, by brute force."""
    left, covered, order = list(range(len(kernel))), np.zeros(len(kernel), dtype=np.int64), []
    for drawn in draws.tolist():
        for place in range(min(len(drawn), len(left))):
            other = place + drawn[place]
            left[place], left[other] = left[other], left[place]
        candidates = left[: len(drawn)]
        gains = {point: int(np.maximum(kernel[point] - covered, 0).sum()) for point in candidates}
        pick = min(candidates, key=lambda point: (-gains[point], point))
        order.append((pick, gains[pick]))
        covered = np.maximum(covered, kernel[pick])
        place = left.index(pick)
        left[place] = left[-1]
        left.pop()
    return order


@settings(max_examples=40, deadline=None)
@given(count=st.integers(1, 40), candidates=st.integers(1, 5), seed=st.integers(0, 1_000), partition=st.integers(0, 3))
def test_stochastic_greedy_is_the_reference_with_the_same_draws(count: int, candidates: int, seed: int, partition: int) -> None:
    rows = points(count, dimensions=3, seed=seed).embeddings
    plugin = Ingenious(num_candidates=candidates, seed=seed)
    kernel = rows.astype(np.int64) @ rows.T.astype(np.int64)
    assert np.array_equal(similarity_matrix(rows), kernel)
    picks, gains = plugin.greedy_order(rows, partition)
    assert list(zip(picks.tolist(), gains.tolist(), strict=True)) == reference_order(kernel, plugin.draws(count, partition))


def test_with_every_point_a_candidate_the_order_is_greedy() -> None:
    rows = points(60, seed=3).embeddings
    kernel = np.maximum(rows.astype(np.int64) @ rows.T.astype(np.int64), 0)
    picks, gains = Ingenious(num_candidates=60).greedy_order(rows)
    covered = np.zeros(60, dtype=np.int64)
    for pick, gain in zip(picks, gains, strict=True):
        best = np.maximum(kernel - covered, 0).sum(axis=1)
        best[picks[: np.flatnonzero(picks == pick)[0]]] = -1
        assert (pick, gain) == (best.argmax(), best.max())
        covered = np.maximum(covered, kernel[pick])


def test_draws_are_uniform_among_the_points_left() -> None:
    """Every pair of four points is as often drawn in the first step, and nothing lies outside of what is left."""
    drawn = Counter()
    for seed in range(3_000):
        draws = Ingenious(seed=seed).draws(4, 0)
        assert (draws >= 0).all() and (draws <= np.array([[3, 2], [2, 1], [1, 0], [0, 0]])).all()
        left = list(range(4))
        for place in range(2):
            other = place + int(draws[0, place])
            left[place], left[other] = left[other], left[place]
        drawn[tuple(sorted(left[:2]))] += 1
    assert len(drawn) == 6
    assert sum((count - 500) ** 2 / 500 for count in drawn.values()) < 20.5  # chi-square of 5 degrees, 99.9%


def test_importance_is_the_taylor_softmax() -> None:
    assert importance(np.array([0.0, 1.0, 4.0])).tolist() == [1.0, 2.5, 13.0]


def test_orders_are_successive_samples_by_importance() -> None:
    """Over many draws every order of four points is as frequent as one draw after the other makes it."""
    given_points = Points(to_integer_rows(np.array([[1.0, 0.0, 0.0], [1.0, 0.4, 0.0], [0.0, 1.0, 0.1], [0.0, 0.0, 1.0]])))
    picks, gains = Ingenious(seed=4).greedy_order(given_points.embeddings)
    weights = np.zeros(4)
    weights[picks] = importance(gains / UNIT)
    assert weights.max() > 2 * weights.min()
    draws = 6_000
    counts = Counter(tuple(Ingenious(seed=4, draw=draw).order(given_points).picks.tolist()) for draw in range(draws))
    chi_square = 0.0
    for order in permutations(range(4)):
        left, likelihood = weights.sum(), 1.0
        for point in order:
            likelihood *= weights[point] / left
            left -= weights[point]
        chi_square += (counts[order] - draws * likelihood) ** 2 / (draws * likelihood)
    assert chi_square < 49.8  # 23 degrees, 99.9%


def test_every_prefix_takes_the_same_share_of_every_partition() -> None:
    given_points, plugin = points(1_000), Ingenious(partition_size=130, seed=2)
    parts = plugin._partitions(1_000)
    assert max(map(len, parts)) <= 130 and sorted(np.concatenate(parts).tolist()) == list(range(1_000))
    order = plugin.order(given_points)
    assert sorted(order.picks.tolist()) == list(range(1_000))
    partition = np.zeros(1_000, dtype=np.int64)
    for number, part in enumerate(parts):
        partition[part] = number
    for size in (1, 50, 250, 501, 999):
        taken = np.bincount(partition[order.picks[:size]], minlength=len(parts))
        assert (np.abs(taken - size / 1_000 * np.array([len(part) for part in parts])) <= 1).all()


def test_gains_are_those_of_the_greedy_order() -> None:
    given_points, plugin = points(90), Ingenious(partition_size=40, seed=1)
    order, gains = plugin.order(given_points), {}
    for number, part in enumerate(plugin._partitions(90)):
        picks, gained = plugin.greedy_order(given_points.embeddings[part], number)
        gains |= dict(zip(part[picks].tolist(), (gained / UNIT).tolist(), strict=True))
    assert order.gains.tolist() == [gains[pick] for pick in order.picks.tolist()]
    assert (order.gains == 0).any()  # a repeated row gains nothing and stays


def test_another_draw_samples_anew_from_the_same_gains() -> None:
    given_points = points(300)
    first, again, second, other = (
        Ingenious(partition_size=100, **values).order(given_points) for values in ({}, {}, {"draw": 1}, {"seed": 1})
    )
    assert same(first, again) and not same(first, second) and not same(first, other)
    assert dict(zip(first.picks.tolist(), first.gains.tolist(), strict=True)) == dict(
        zip(second.picks.tolist(), second.gains.tolist(), strict=True)
    )
    assert sorted(first.gains.tolist()) != sorted(other.gains.tolist())


def test_the_order_does_not_depend_on_threads() -> None:
    given_points, orders = points(1_200, dimensions=96), []
    for threads in (1, 2, 4):
        with threadpool_limits(limits=threads):
            orders.append(Ingenious(partition_size=600).order(given_points))
    assert same(orders[0], orders[1]) and same(orders[0], orders[2])


# By score


def scored(scores: list[float], groups: list[int] | None = None) -> Points:
    rows = np.ones((len(scores), 2), dtype=np.int16)
    return Points(rows, scores=np.array(scores), groups=None if groups is None else np.array(groups))


def test_low_scores_come_first_and_missing_ones_last() -> None:
    given_points = scored([3.0, np.nan, 1.0, 2.0, 1.0])
    order = ByScore().order(given_points)
    assert order.picks.tolist() == [2, 4, 3, 0, 1]
    assert order.gains == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    assert ByScore(prefer="high").order(given_points).picks.tolist() == [0, 3, 2, 4, 1]


def test_every_group_goes_at_its_own_pace() -> None:
    """Four points of one group and two of another, all of whose scores are worse, are merged by quantile."""
    given_points = scored([9.0, 8.0, 4.0, 3.0, 2.0, 1.0], groups=[7, 7, 2, 2, 2, 2])
    assert ByScore().order(given_points).picks.tolist() == [1, 5, 4, 0, 3, 2]
    assert ByScore().order(given_points).gains.tolist() == [1.0, 1.0, 0.75, 0.5, 0.5, 0.25]
    assert ByScore(within_groups=False).order(given_points).picks.tolist() == [5, 4, 3, 2, 1, 0]


@settings(max_examples=60, deadline=None)
@given(data=st.lists(st.tuples(st.sampled_from([0.0, 1.5, 2.0, np.nan, np.inf]), st.integers(0, 3)), max_size=40), high=st.booleans())
def test_order_by_score_is_the_reference(data: list[tuple[float, int]], high: bool) -> None:
    order = ByScore(prefer="high" if high else "low").order(scored([score for score, _ in data], [group for _, group in data]))
    wanted = []
    for group in {group for _, group in data}:
        mine = [point for point, (_, theirs) in enumerate(data) if theirs == group]
        mine.sort(key=lambda point: (np.isnan(data[point][0]), -data[point][0] if high else data[point][0]))
        known = [point for point in mine if not np.isnan(data[point][0])] + sorted(point for point in mine if np.isnan(data[point][0]))
        wanted += [(place / len(mine), point) for place, point in enumerate(known)]
    wanted.sort()
    assert order.picks.tolist() == [point for _, point in wanted]
    assert order.gains.tolist() == [1.0 - quantile for quantile, _ in wanted]
    assert (order.gains > 0).all()


def test_without_scores_the_error_names_the_setting() -> None:
    with pytest.raises(GristmillError, match=r"name a rule in selection\.score, e\.g\. perplexity\.log_perplexity"):
        ByScore().order(points(5))
