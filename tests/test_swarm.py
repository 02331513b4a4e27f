"""The mixtures of a swarm, and the solver against a grid, random mixtures and finite differences."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mixture_worlds import (
    DOMAINS,
    TARGETS,
    TOKENS,
    drawn,
    exponential,
)

from pipelines.errors import GristmillError
from pipelines.mixing_laws import FittedLaw
from pipelines.share_solver import Problem, best_mixture, nearest_mixture, within
from pipelines.swarm import default_count, draw_mixtures, rounded_shares

# The design


@settings(max_examples=40, deadline=None)
@given(
    natural=st.lists(st.floats(0.01, 100.0), min_size=2, max_size=7),
    num_targets=st.integers(0, 3),
    count=st.integers(1, 20),
    seed=st.integers(0, 2**32),
)
def test_drawn_mixtures_sum_to_one_and_keep_their_floor(natural: list[float], num_targets: int, count: int, seed: int) -> None:
    names = [f"d{place}" for place in range(len(natural))]
    targets = names[: min(num_targets, len(names) - 1)]
    mixtures = draw_mixtures(dict(zip(names, natural, strict=True)), count=count, seed=seed, targets=targets, target_range=(0.1, 0.8))
    assert len(mixtures) == count
    for mixture in mixtures:
        units = [share * 10_000 for share in mixture.values()]
        assert sum(round(unit) for unit in units) == 10_000
        assert all(abs(unit - round(unit)) < 1e-8 for unit in units)
        assert min(mixture.values()) >= 0.02
        assert sorted(mixture) == names


def test_the_target_share_is_spread_over_its_range() -> None:
    shares = [sum(mixture[domain] for domain in TARGETS) for mixture in drawn(15, target_range=(0.2, 0.9))]
    assert shares == pytest.approx(np.linspace(0.2, 0.9, 15), abs=1e-4)


def test_draws_follow_the_natural_shares_and_the_seed() -> None:
    assert drawn(seed=3) == drawn(seed=3) != drawn(seed=4)
    assert len(drawn()) == default_count(4) == 15
    many = draw_mixtures({"large": 81.0, "small": 1.0}, count=4000, min_share=0.0)
    # the natural shares to the power of one half: 9 to 1
    assert np.mean([mixture["large"] for mixture in many]) == pytest.approx(0.9, abs=0.02)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": ("codes",)}, "did you mean 'code'"),
        ({"target_range": (0.01, 0.8)}, "no room"),
        ({"target_range": (0.1, 0.99)}, "no room"),
        ({"min_share": 0.3, "targets": ()}, "no room"),
    ],
)
def test_a_design_without_room_is_an_error(changes: dict[str, object], message: str) -> None:
    with pytest.raises(GristmillError, match=message):
        drawn(**changes)


def test_rounded_shares_sum_to_one_and_drop_nothing_else() -> None:
    assert rounded_shares(("a", "b", "c"), np.asarray([1 / 3, 2 / 3, 1e-9])) == {"a": 0.333333, "b": 0.666667}
    assert sum(rounded_shares(DOMAINS, np.asarray([0.1, 0.2, 0.3, 0.4])).values()) == pytest.approx(1.0, abs=1e-12)


# The solver


def problem_of(
    laws: Sequence[FittedLaw],
    weights: Sequence[float],
    tolerances: Sequence[float],
    *,
    low: float = 0.0,
    high: float | Sequence[float] = 1.0,
) -> Problem:
    num_shares = len([name for name in laws[0].parameters if name.startswith("t_")])
    return Problem(
        tuple(laws),
        np.asarray(weights, dtype=np.float64),
        np.asarray(tolerances, dtype=np.float64),
        np.zeros(len(laws)),
        np.full(num_shares, low),
        np.broadcast_to(np.asarray(high, dtype=np.float64), num_shares).copy(),
        float(TOKENS),
    )


def grid_best(problem: Problem, steps: int = 400) -> float:
    """Return the least objective over a grid of the three-domain simplex."""
    first, second = np.meshgrid(np.arange(steps + 1), np.arange(steps + 1), indexing="ij")
    inside = first + second <= steps
    shares = np.stack([first[inside], second[inside], steps - first[inside] - second[inside]], axis=1) / steps
    held = (shares >= problem.low_K - 1e-12).all(axis=1) & (shares <= problem.high_K + 1e-12).all(axis=1)
    values = problem.values(shares[held])
    return float(np.where(problem.excess(values) <= 0, problem.objective(values), np.inf).min())


THREE = (
    exponential(-0.10, 0.07, -1.8, 1.5, 0.9),
    exponential(-2.2, 2.0, 0.0, -3.0, -0.4),
    exponential(-1.5, 1.4, 0.0, -0.7, -2.5),
)


@pytest.mark.parametrize(
    ("high", "tolerance"), [((1.0, 1.0, 1.0), 0.05), ((1.0, 0.3, 1.0), 0.05), ((0.4, 1.0, 0.25), 0.12), ((1.0, 1.0, 1.0), 0.5)]
)
def test_the_optimum_is_that_of_a_grid(high: tuple[float, ...], tolerance: float) -> None:
    problem = problem_of(THREE, (0, 0.6, 0.4), (tolerance, np.inf, np.inf), high=high)
    found = best_mixture(problem, np.full((1, 3), 1 / 3))
    assert found is not None
    best = grid_best(problem)
    assert best - 0.01 < found.objective <= best + 1e-9
    assert found.excess <= 1e-6
    assert found.kkt_residual < 1e-5
    assert found.shares_K.sum() == pytest.approx(1.0, abs=1e-12)


def random_problem(random: np.random.Generator, corpora: int) -> Problem:
    """Return a problem of exponential laws with k > 0 that the even mixture solves, if not best."""
    slopes = random.normal(0, 2, (corpora, corpora)) - 2 * np.eye(corpora)
    scales = random.uniform(0.05, 2.0, corpora)
    laws = [exponential(-float(scale), float(scale), *slope) for scale, slope in zip(scales, slopes, strict=True)]
    even = np.full((1, corpora), 1 / corpora)
    guards = random.permutation(corpora) < corpora // 2
    values = np.asarray([float(law.predict(even, np.ones(1))[0]) for law in laws])
    tolerances = np.where(guards, np.maximum(values, 0.01) * random.uniform(1.05, 2.0), np.inf)
    weights = np.where(guards, 0.0, random.uniform(0.1, 1.0, corpora))
    high = np.maximum(random.uniform(0.3, 1.5, corpora), 1.2 / corpora)
    return problem_of(laws, weights, tolerances, high=np.minimum(high, 1.0))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), corpora=st.integers(2, 6))
def test_no_feasible_mixture_is_better(seed: int, corpora: int) -> None:
    random = np.random.default_rng(seed)
    problem = random_problem(random, corpora)
    assert problem.is_convex
    found = best_mixture(problem, random.dirichlet(np.ones(corpora), 3))
    assert found is not None, "the even mixture is feasible"
    others = np.concatenate([random.dirichlet(np.full(corpora, size), 2000) for size in (0.3, 1.0, 3.0)])
    near = found.shares_K + 0.02 * random.normal(size=(40, corpora))
    others = np.concatenate([others, [within(share, problem.low_K, problem.high_K) for share in near]])
    others = others[(others <= problem.high_K).all(axis=1)]
    values = problem.values(others)
    feasible = problem.excess(values) <= 0
    assert found.objective <= problem.objective(values[feasible]).min(initial=np.inf) + 1e-7
    assert found.excess <= 1e-6
    assert (found.shares_K <= problem.high_K + 1e-12).all()
    assert found.kkt_residual < 1e-3


def test_multipliers_are_what_a_looser_bound_buys() -> None:
    tight = problem_of(THREE, (0, 0.6, 0.4), (0.05, np.inf, np.inf), high=(1.0, 0.45, 1.0))
    found = best_mixture(tight, np.full((1, 3), 1 / 3))
    looser = best_mixture(problem_of(THREE, (0, 0.6, 0.4), (0.0501, np.inf, np.inf), high=(1.0, 0.45, 1.0)), found.shares_K[None])
    wider = best_mixture(problem_of(THREE, (0, 0.6, 0.4), (0.05, np.inf, np.inf), high=(1.0, 0.4501, 1.0)), found.shares_K[None])
    assert found.guard_multipliers_D[0] == pytest.approx((found.objective - looser.objective) / 1e-4, rel=0.02)
    assert found.cap_multipliers_K[1] == pytest.approx((found.objective - wider.objective) / 1e-4, rel=0.02)
    assert found.guard_multipliers_D[0] > 0.1 and found.cap_multipliers_K[1] > 0.1
    assert found.guard_multipliers_D[1:].tolist() == [0, 0] and found.cap_multipliers_K[[0, 2]].tolist() == [0, 0]


def test_the_nearest_mixture_shares_out_the_excess() -> None:
    """Two corpora that forget alike, of which each needs more than half: the even mixture is the nearest."""
    laws = (exponential(-0.1, 0.2, -1.0, 1.0), exponential(-0.1, 0.2, 1.0, -1.0))
    problem = problem_of(laws, (0.5, 0.5), (0.05, 0.05))
    assert best_mixture(problem, np.asarray([[0.9, 0.1]])) is None
    nearest = nearest_mixture(problem, np.asarray([[0.9, 0.1]]))
    assert nearest.shares_K == pytest.approx([0.5, 0.5], abs=1e-4)
    assert nearest.excess == pytest.approx(0.1 / 0.05 - 1, abs=1e-6)


def test_caps_that_leave_no_room_have_no_mixture() -> None:
    assert best_mixture(problem_of(THREE, (0, 1, 0), (np.inf, np.inf, np.inf), high=0.3), np.full((1, 3), 1 / 3)) is None


def test_laws_without_a_gradient_are_searched_by_simulation() -> None:
    plain = problem_of(THREE, (0, 0.6, 0.4), (0.05, np.inf, np.inf))
    opaque = [FittedLaw(law.predict, {}) for law in THREE]
    problem = Problem(tuple(opaque), plain.weights_D, plain.tolerances_D, plain.margins_D, plain.low_K, plain.high_K, plain.tokens)
    found, exact = best_mixture(problem, np.full((1, 3), 1 / 3)), best_mixture(plain, np.full((1, 3), 1 / 3))
    assert (found.method, exact.method) == ("simulation", "slsqp")
    assert found.excess <= 0 and found.kkt_residual is None
    assert exact.objective <= found.objective < exact.objective + 0.03
    assert nearest_mixture(problem, np.full((1, 3), 1 / 3)).excess == pytest.approx(
        nearest_mixture(plain, np.full((1, 3), 1 / 3)).excess, abs=0.05
    )
