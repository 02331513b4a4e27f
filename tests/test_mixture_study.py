"""The search for a mixture in worlds with known laws: the optimum, what bounds it, its interval, each refusal and warning."""

from __future__ import annotations

import numpy as np
import pytest
from mixture_worlds import (
    AVAILABLE,
    DOMAINS,
    TARGETS,
    TOKENS,
    TOLERANCE,
    WORLD,
    codes,
    drawn,
    exponential,
    own_share_world,
    studied,
    swarm_of,
    true_problem,
    with_deltas,
)

from pipelines import plugins
from pipelines.errors import GristmillError
from pipelines.mixture_study import SearchSettings, Study
from pipelines.search_evidence import refusals_of, warnings_of
from pipelines.share_solver import BINDS, best_mixture, nearest_mixture
from pipelines.swarm import Swarm, bootstrap_fits, draw_mixtures, fit_domain

# What a swarm leads to


@pytest.mark.parametrize("seed", range(4))
def test_the_search_finds_the_best_mixture_of_a_known_world(seed: int) -> None:
    study = studied(swarm_of(WORLD, drawn(seed=seed), seed=seed))
    truth = best_mixture(true_problem(study), np.full((1, 4), 0.25))
    assert study.question.target_share(study.optimum.shares_K) == pytest.approx(study.question.target_share(truth.shares_K), abs=0.03)
    there = true_problem(study).values(study.optimum.shares_K[None])
    assert true_problem(study).objective(there)[0] == pytest.approx(truth.objective, abs=0.03)
    assert true_problem(study).excess(there)[0] < 0.4, "a guard rises by at most 0.02 nats more than it may"
    assert study.optimum.kkt_residual < 1e-3
    assert study.optimum.agreeing == study.optimum.starts, "the problem is convex"


@pytest.mark.parametrize("seed", range(3))
def test_a_world_of_another_form_is_answered_within_half_the_tolerance(seed: int) -> None:
    world = own_share_world()
    study = studied(swarm_of(world, drawn(seed=seed), seed=seed))
    problem = true_problem(study, world)
    dense = np.random.default_rng(0).dirichlet(np.ones(4), 50_000)
    values = problem.values(dense)
    truth = dense[np.argmin(np.where(problem.excess(values) <= 0, problem.objective(values), np.inf))]
    assert study.question.target_share(study.optimum.shares_K) == pytest.approx(study.question.target_share(truth), abs=0.05)
    assert problem.excess(problem.values(study.optimum.shares_K[None]))[0] < 0.5
    assert not refusals_of(study)


def test_guards_bind_where_more_would_be_gained() -> None:
    swarm = swarm_of(WORLD, drawn())
    tight, loose = studied(swarm), studied(swarm, guards={"book": 0.05, "wiki": 5.0})
    by_domain = [dict(zip(study.fits, study.optimum.values_D, strict=True)) for study in (tight, loose)]
    assert by_domain[0]["book"] == pytest.approx(TOLERANCE, abs=1e-6) and by_domain[0]["wiki"] == pytest.approx(TOLERANCE, abs=1e-6)
    assert by_domain[1]["book"] == pytest.approx(TOLERANCE, abs=1e-6) and by_domain[1]["wiki"] < 5.0
    wiki = list(tight.fits).index("wiki")
    assert tight.optimum.guard_multipliers_D[wiki] > 0 == loose.optimum.guard_multipliers_D[wiki]
    assert loose.optimum.objective < tight.optimum.objective


def test_only_named_guards_are_held_and_weights_move_the_mixture() -> None:
    swarm = swarm_of(WORLD, drawn())
    free = studied(swarm, guards={"book": 0.05})
    assert dict(zip(free.fits, free.optimum.values_D, strict=True))["wiki"] > TOLERANCE
    code, law = (studied(swarm, objective={name: 1.0}).optimum.shares_K for name in TARGETS)
    assert code[DOMAINS.index("code")] > 0.6 > 0.2 > law[DOMAINS.index("code")]
    assert law[DOMAINS.index("law")] > 0.4


def test_caps_of_epochs_bind() -> None:
    swarm = swarm_of(WORLD, drawn())
    scarce = {**AVAILABLE, "code": 50_000}
    study = studied(swarm, available=scarce, objective={"code": 3.0, "law": 1.0})
    assert study.optimum.shares_K[DOMAINS.index("code")] == pytest.approx(4 * 50_000 / TOKENS, abs=BINDS)
    assert study.optimum.cap_multipliers_K[DOMAINS.index("code")] > 0
    longer = studied(swarm, available=scarce, tokens=2 * TOKENS, objective={"code": 3.0, "law": 1.0})
    assert longer.optimum.shares_K[DOMAINS.index("code")] == pytest.approx(4 * 50_000 / (2 * TOKENS), abs=BINDS)
    assert longer.optimum.objective > study.optimum.objective > studied(swarm).optimum.objective


def test_guarded_corpora_keep_some_replay() -> None:
    """Where book is bought by wiki alone, it still gets the least share, as no replay is another regime."""
    world = {**WORLD, "book": exponential(-0.10, 0.07, -2.0, 1.6, 1.2, -2.0), "wiki": exponential(-0.11, 0.08, -0.2, 1.4, 1.8, -3.0)}
    study = studied(swarm_of(world, drawn()), min_share=0.03)
    assert study.optimum.shares_K[DOMAINS.index("book")] == pytest.approx(0.03, abs=1e-9)


def test_probes_without_a_guarded_corpus_are_left_out_of_its_law() -> None:
    without = [{"book": 0.0, "code": 0.5, "law": 0.2, "wiki": 0.3}, {"book": 0.0, "code": 0.3, "law": 0.2, "wiki": 0.5}]
    swarm = swarm_of(WORLD, [*drawn(), *without])
    swarm.deltas["book"][-2:] += 1.0
    study = studied(swarm)
    assert study.fits["book"].fitted_N.tolist() == [True] * 15 + [False] * 2
    assert study.fits["code"].fitted_N.all()
    assert np.isnan(study.fits["book"].left_out_N[-2:]).all()
    assert study.fits["book"].loo_error < 0.01
    assert not refusals_of(study)


def test_seeds_of_a_mixture_are_left_out_together() -> None:
    swarm = swarm_of(WORLD, drawn(8), seeds=(0, 1))
    assert (swarm.num_mixtures, len(swarm.probes)) == (8, 16)
    law = plugins.build("mixing_laws", "exponential")
    fit = fit_domain(law, swarm, "book", with_own=True)
    kept = swarm.mixture_N != 3
    by_hand = law.fit(swarm.observations("book", kept)).predict(swarm.shares_NK[6:8], np.full(2, float(TOKENS)))
    assert fit.left_out_N[6:8] == pytest.approx(by_hand, abs=1e-12)


def test_intervals_cover_the_truth() -> None:
    """Of 12 swarms of a known world the 95 % intervals of target share and guards miss it at most once or twice."""
    ratio_hits, guard_hits, widths = 0, 0, []
    for seed in range(12):
        study = studied(swarm_of(WORLD, drawn(seed=seed), seed=seed + 100), draws=40)
        truth = best_mixture(true_problem(study), np.full((1, 4), 0.25))
        low, high = study.ratio_interval()
        ratio_hits += low <= study.question.target_share(truth.shares_K) <= high
        _, low_rise, high_rise = study.predicted("wiki", study.optimum.shares_K)
        guard_hits += low_rise <= float(WORLD["wiki"].predict(study.optimum.shares_K[None], np.ones(1))[0]) <= high_rise
        widths.append(high - low)
    assert ratio_hits >= 10 and guard_hits >= 10
    assert max(widths) < 0.15


def test_the_safe_mixture_holds_the_guards_in_the_world() -> None:
    held = 0
    for seed in range(6):
        study = studied(swarm_of(WORLD, drawn(seed=seed), seed=seed + 100), draws=40)
        held += true_problem(study).excess(true_problem(study).values(study.safe.shares_K[None]))[0] <= 0
        assert study.safe.objective > study.optimum.objective
    assert held >= 5


def test_run_noise_widens_the_interval() -> None:
    """Noise of the runs is the same for every window of a probe: windows alone do not show it."""
    law = plugins.build("mixing_laws", "exponential")
    widths = []
    for run_noise in (0.0, 0.01):
        swarm = swarm_of(WORLD, drawn(), run_noise=run_noise, noise=0.001, common=0.001)
        fit = fit_domain(law, swarm, "book", with_own=True)
        laws = bootstrap_fits(law, swarm, "book", fit, draws=60, generator=np.random.Generator(np.random.Philox(key=1)))
        widths.append(np.std([float(law.predict(np.full((1, 4), 0.25), np.ones(1))[0]) for law in laws]))
    assert widths[1] > 2 * widths[0]


def test_laws_are_compared_where_the_swarm_is_large_enough() -> None:
    world = {"book": exponential(-0.1, 0.1, -1.0, 1.0), "code": exponential(-2.4, 2.2, 0.1, -4.0)}
    available = {name: AVAILABLE[name] for name in world}
    mixtures = draw_mixtures(available, count=36, targets=("code",))
    study = studied(swarm_of(world, mixtures, windows=20, noise=0.005, common=0.005, run_noise=0.0005), available=available, law="auto")
    assert study.law == "exponential"
    assert set(study.fold_errors) == {"exponential", "trees"}
    assert study.fold_errors["trees"]["book"] > 2 * study.fold_errors["exponential"]["book"]
    assert not studied(swarm_of(WORLD, drawn())).fold_errors, "trees need more than 15 mixtures"


# Refusals and warnings


def test_healthy_data_is_not_refused_over_its_bootstrap() -> None:
    healthy = swarm_of(WORLD, drawn())
    random = np.random.default_rng(0)
    for _ in range(20):
        chosen = random.integers(0, 160, 160)
        copy = Swarm(**{**vars(healthy), "deltas": {domain: deltas[:, chosen] for domain, deltas in healthy.deltas.items()}})
        assert not refusals_of(studied(copy))


def test_too_few_mixtures_are_refused() -> None:
    assert codes(refusals_of(studied(swarm_of(WORLD, drawn(5))))) == {"too_few_mixtures"}
    assert not codes(refusals_of(studied(swarm_of(WORLD, drawn(6))))) & {"too_few_mixtures"}
    two_seeds = swarm_of(WORLD, drawn(5), seeds=(0, 1))
    assert codes(refusals_of(studied(two_seeds))) == {"too_few_mixtures"}, "seeds are no mixtures"


def test_a_guard_that_nothing_holds_is_named() -> None:
    world = {**WORLD, "wiki": exponential(0.0, 0.12, -0.2, 1.4, 1.8, -0.4)}
    study = studied(swarm_of(world, drawn()))
    (row,) = [row for row in refusals_of(study) if row["code"] == "infeasible"]
    truth = nearest_mixture(true_problem(study, world), np.full((1, 4), 0.25))
    least = float(truth.values_D[list(study.fits).index("wiki")])
    assert "wiki rises by" in row["seen"] and "book" not in row["seen"]
    assert float(row["seen"].split("by ")[1].split(" ")[0]) == pytest.approx(least, abs=0.005)
    allowed = float(row["remedy"].split("wiki ")[1].split(",")[0])
    assert not refusals_of(studied(swarm_of(world, drawn()), guards={"book": 0.05, "wiki": allowed + 0.01}))


def test_a_budget_beyond_all_epochs_is_refused() -> None:
    study = studied(swarm_of(WORLD, drawn()), tokens=50_000_000)
    (row,) = [row for row in refusals_of(study) if row["code"] == "infeasible"]
    assert "80%" in row["seen"] and "40,000,000 tokens" in row["remedy"]


def test_a_law_that_does_not_predict_its_guard_is_refused() -> None:
    swarm = swarm_of(WORLD, drawn())
    waves = 0.1 * np.sin(40 * swarm.shares_NK[:, :1])
    study = studied(with_deltas(swarm, "wiki", lambda deltas: deltas + waves))
    (row,) = [row for row in refusals_of(study) if row["code"] == "loo_error"]
    assert "wiki" in row["seen"] and "book" not in row["seen"]


def test_noisy_windows_are_refused_with_how_many_are_needed() -> None:
    swarm = swarm_of(WORLD, drawn(), windows=40)
    levels = np.random.default_rng(1).normal(0, 0.15, 40)
    study = studied(with_deltas(swarm, "book", lambda deltas: deltas + levels - levels.mean()))
    (row,) = refusals_of(study)
    assert row["code"] == "noisy_evaluation" and "book" in row["seen"] and "wiki" not in row["seen"]
    wanted = int(row["remedy"].split("measure ")[1].split("x")[0])
    assert 3 <= wanted <= 10  # 0.15 / sqrt(40) is 0.024, where 0.01 is wanted
    single = swarm_of(WORLD, drawn(), windows=1, noise=0.0)
    assert "two or more" in next(row["remedy"] for row in refusals_of(studied(single)) if row["code"] == "noisy_evaluation")


def test_a_target_that_is_not_learned_is_refused() -> None:
    world = {**WORLD, **{name: exponential(0.0, 0.1, 0.1, -0.3, -0.2, 0.1) for name in TARGETS}}
    assert codes(refusals_of(studied(swarm_of(world, drawn())))) == {"target_not_learned"}


def test_warnings_say_what_the_estimate_rests_on() -> None:
    swarm = swarm_of(WORLD, drawn())
    study = studied(swarm, draws=20)
    assert codes(warnings_of(study, ())) <= {"base_unconverged"}
    assert codes(warnings_of(study, ("chat",))) >= {"unmeasured"}
    improving = with_deltas(swarm, "book", lambda deltas: deltas - 0.1)
    assert "base_unconverged" in codes(warnings_of(studied(improving), ()))
    assert "longer_than_measured" in codes(warnings_of(studied(swarm, tokens=2 * TOKENS), ()))
    assert "no_guard_binds" in codes(warnings_of(studied(swarm, tolerance_nats=3.0), ()))
    near = drawn(target_range=(0.1, 0.4))
    assert "outside_measured" in codes(warnings_of(studied(swarm_of(WORLD, near)), ()))
    narrow = studied(swarm, draws=20, max_interval=1e-4)
    assert "wide_interval" in codes(warnings_of(narrow, ()))
    forgotten = {**WORLD, "law": exponential(0.0, 0.1, 0.1, 0.5, -0.2, 0.1)}
    assert "target_domain_rises" in codes(warnings_of(studied(swarm_of(forgotten, drawn())), ()))


def test_a_law_that_bends_downwards_is_told() -> None:
    study = studied(swarm_of(WORLD, drawn()))
    fit = study.fits["book"]
    bent = Study(
        **{
            **vars(study),
            "fits": {**study.fits, "book": type(fit)(exponential(0.5, -0.5, -1.0, 0.5, 0.5, 0.0), *list(vars(fit).values())[1:])},
        }
    )
    assert not bent.problem().is_convex
    assert "concave_law" in codes(warnings_of(bent, ()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"guards": {"boook": 0.05}}, "did you mean 'book'"),
        ({"objective": {"cod": 1.0}}, "did you mean 'code'"),
        ({"objective": {"code": 0.0}}, "no domain is to be learned"),
        ({"law": "own_share"}, "needs one that reads shares: exponential, trees"),
        ({"min_share": 0.6}, "more than all"),
    ],
)
def test_a_question_that_has_no_answer_is_an_error(changes: dict[str, object], message: str) -> None:
    with pytest.raises(GristmillError, match=message):
        studied(swarm_of(WORLD, drawn()), **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"on_refusal": "manual"}, "needs `shares`"),
        ({"shares": {"book": 0.5, "code": 0.4}}, "must sum to 1"),
        ({"guards": {"book": 0.0}}, "book"),
    ],
)
def test_settings_are_validated(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SearchSettings(**changes)
