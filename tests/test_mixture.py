"""The critical ratio: laws against published and synthetic numbers, interval coverage, each refusal; the mixture by hand counts."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_world import publish

from pipelines.errors import EmptyInput, GristmillError
from pipelines.manifests import Manifest, Member, Outcome
from pipelines.mixing_laws.own_share import OwnShare, box_cox
from pipelines.mixing_laws.power import Power
from pipelines.mixture import (
    MIXTURE_AUDITS,
    RATIO_AUDITS,
    MixtureSettings,
    RatioSettings,
    _bootstrap,
    _Losses,
    _root,
    estimate_critical_ratio,
    mix_domains,
)
from pipelines.plugins import Settings
from pipelines.store import Build, Store

TOLERANCE = 0.05
RATIOS = (0.25, 0.5, 0.7, 0.85)
TOKENS = 1000


def delta(ratio: float, root: float, *, k: float = -0.3, slope: float = 0.08) -> float:
    """Return the general change of loss at `ratio` under an own-share law that reaches the tolerance at `root`."""
    return TOLERANCE - slope * float(box_cox(np.asarray(1 - ratio + 0.01), k) - box_cox(np.asarray(1 - root + 0.01), k))


def window_losses(
    deltas: Mapping[float, float], *, windows: int = 400, noise: float = 0.02, common: float = 0.0, seed: int = 0
) -> dict[float, tuple[np.ndarray, np.ndarray]]:
    """Return, by ratio, the losses of windows before and after; `common` noise moves a window alike at every ratio."""
    random = np.random.default_rng(seed)
    base, shift = random.normal(4.0, 0.8, windows), random.normal(0.0, common, windows)
    return {ratio: (base, base + change + shift * (1 + ratio) + random.normal(0, noise, windows)) for ratio, change in deltas.items()}


def probes(
    store: Store,
    deltas: Mapping[float, float],
    *,
    target: float | Mapping[float, float] = -0.5,
    seeds: tuple[int, ...] = (0,),
    shift_of_seed: float = 0.0,
    **noise: float,
) -> tuple[Manifest, ...]:
    """Publish one synthetic probe per ratio and seed, in the form that training writes."""
    found = []
    for seed in seeds:
        shifted = {ratio: change + seed * shift_of_seed for ratio, change in deltas.items()}
        general = window_losses(shifted, **{**noise, "seed": seed + 10})
        gained = {ratio: target[ratio] if isinstance(target, Mapping) else target for ratio in deltas}
        learnt = window_losses(gained, windows=100, noise=0.01, seed=seed + 50)
        for ratio in deltas:
            rows = []
            for corpus, losses in (("general", general[ratio]), ("target", learnt[ratio])):
                for tokens, values in ((0, losses[0]), (TOKENS // 2, (losses[0] + losses[1]) / 2), (TOKENS, losses[1])):
                    point = {"probe": f"r{ratio:.2f}-s{seed}", "ratio": float(ratio), "seed": seed, "tokens": tokens, "corpus": corpus}
                    rows += [{**point, "window": n, "loss": float(value)} for n, value in enumerate(values)]
            found.append(publish(store, "mixture_probe", {"losses.parquet": rows}, partition=f"recipe|r{ratio:.2f}-s{seed}"))
    return tuple(found)


def request(made: tuple[Manifest, ...], **changes: object) -> Build:
    ratio_settings = RatioSettings(**{"draws": 16, **changes})
    return Build(
        asset="critical_ratio", step=estimate_critical_ratio, settings=ratio_settings, inputs={"probes": made}, audits=RATIO_AUDITS
    )


def estimated(store: Store, made: tuple[Manifest, ...], **changes: object) -> tuple[dict, Manifest]:
    """Return critical_ratio.json and the manifest."""
    manifest = store.build(request(made, **changes)).manifest
    return json.loads(manifest.file("critical_ratio.json").read_text()), manifest


def codes(result: dict, kind: str = "refusals") -> set[str]:
    return {row["code"] for row in result[kind]}


# The laws

TRIAL = {0.0: -0.056, 0.25: -0.026, 0.5: 0.028, 0.75: 0.122, 0.9: 0.239, 1.0: 0.791}
"""Change of general loss by target share after 500k tokens: a trial with a base of 0.5 M parameters, six ratios, one seed."""


def trial_root(law: OwnShare | Power, *chosen: float) -> float:
    return _root(law, np.asarray(chosen), np.asarray([TRIAL[ratio] for ratio in chosen]), TOLERANCE)


def test_the_trials_ratio_is_found_and_held_up_by_the_run_at_it() -> None:
    """All ratios below 1 give 0.573-0.576; a probe trained there measured +0.0472 nats where the tolerance is 0.05."""
    root = trial_root(OwnShare(), 0.0, 0.25, 0.5, 0.75, 0.9)
    assert root == pytest.approx(0.5745, abs=0.003)
    fitted = OwnShare().fit(1 - np.asarray(list(TRIAL)[:5]), np.asarray(list(TRIAL.values())[:5]))
    assert float(fitted.predict(np.asarray(1 - 0.575))) == pytest.approx(0.0472, abs=0.004)


@pytest.mark.parametrize("three", [(0.25, 0.5, 0.75), (0.5, 0.75, 0.9), (0.25, 0.5, 0.9), (0.0, 0.5, 0.9)])
def test_three_ratios_are_enough(three: tuple[float, ...]) -> None:
    assert trial_root(OwnShare(), *three) == pytest.approx(0.5745, abs=0.011)


def test_the_second_domain_of_the_trial() -> None:
    assert _root(OwnShare(), np.asarray([0.25, 0.5, 0.75]), np.asarray([-0.004, 0.049, 0.138]), TOLERANCE) == pytest.approx(
        0.504, abs=0.002
    )


def test_the_power_law_is_further_off_and_breaks_at_no_replay() -> None:
    """The CMR paper's form gives 0.589 on four ratios; own-share stays where it was with and without the lowest."""
    assert trial_root(Power(), 0.25, 0.5, 0.75, 0.9) == pytest.approx(0.589, abs=0.002)
    with_no_replay = Power().fit(1 - np.asarray(list(TRIAL)[1:]), np.asarray(list(TRIAL.values())[1:]))
    grid = np.linspace(0.01, 0.99, 981)
    crossed = grid[np.argmax(with_no_replay.predict(1 - grid) > TOLERANCE)]
    assert crossed > 0.70


@settings(max_examples=30, deadline=None)
@given(root=st.floats(0.15, 0.85), k=st.floats(-2, 2), slope=st.floats(0.02, 0.5))
def test_own_share_recovers_its_own_numbers(root: float, k: float, slope: float) -> None:
    for ratios in (np.asarray([0.1, 0.3, 0.5, 0.7, 0.9]), np.asarray([0.2, 0.5, 0.8])):
        deltas = np.asarray([delta(ratio, root, k=k, slope=slope) for ratio in ratios])
        assert _root(OwnShare(), ratios, deltas, TOLERANCE) == pytest.approx(root, abs=0.01)


def test_own_share_recovers_its_parameters() -> None:
    shares = np.asarray([0.05, 0.2, 0.5, 0.8])
    for k in (-1.5, 0.0, 0.75):
        found = OwnShare().fit(shares, 0.3 - 0.1 * box_cox(shares + 0.01, k)).parameters
        assert found == pytest.approx({"E": 0.3, "C": 0.1, "k": k, "e0": 0.01}, abs=1e-6)


def test_power_recovers_its_parameters() -> None:
    ratios = np.asarray([0.2, 0.5, 0.75, 0.9])
    fitted = Power().fit(1 - ratios, 0.4 * ratios**2.4 - 0.03)
    assert fitted.parameters == pytest.approx({"a": 0.4, "s": 2.4, "b": -0.03}, abs=1e-6)
    assert float(fitted.predict(np.asarray(0.5))) == pytest.approx(0.4 * 0.5**2.4 - 0.03)


@settings(max_examples=30, deadline=None)
@given(deltas=st.lists(st.floats(-2, 2), min_size=3, max_size=6))
def test_a_fitted_own_share_law_never_falls_with_the_other_share(deltas: list[float]) -> None:
    ratios = np.linspace(0.1, 0.9, len(deltas))
    predicted = OwnShare().fit(1 - ratios, np.asarray(deltas)).predict(1 - np.linspace(0, 1, 50))
    assert np.isfinite(predicted).all() and (np.diff(predicted) >= -1e-9).all()


def test_box_cox_is_continuous_at_the_logarithm() -> None:
    x = np.asarray([0.01, 0.5, 1.0])
    assert box_cox(x, 1e-7) == pytest.approx(np.log(x), abs=1e-5) and box_cox(x, 0.0).tolist() == np.log(x).tolist()


# The estimate


def test_the_estimate_is_the_root_and_its_interval_holds_it(store: Store) -> None:
    result, manifest = estimated(store, probes(store, {ratio: delta(ratio, 0.6) for ratio in RATIOS}), draws=60)
    assert (result["decision"], result["refusals"], result["warnings"]) == ("estimate", [], [])
    assert result["ratio"] == result["estimate"] == pytest.approx(0.6, abs=0.02)
    low, high = result["interval_95"]
    assert low < 0.6 < high and result["safe"] == low
    assert [row["without"] for row in result["jackknife"]] == list(RATIOS)
    assert all(row["estimate"] == pytest.approx(0.6, abs=0.05) for row in result["jackknife"])
    assert [point["general_delta"] for point in result["points"]] == pytest.approx([delta(ratio, 0.6) for ratio in RATIOS], abs=0.005)
    assert all(check.passed for check in manifest.checks)
    assert manifest.counts == {"probes": 4, "general_windows": 400, "target_windows": 100}
    assert manifest.outcome.metrics["ratio"] == result["ratio"]
    assert manifest.outcome.tables["refusals"] == manifest.outcome.tables["warnings"] == []


def test_three_ratios_have_no_jackknife_and_an_estimate(store: Store) -> None:
    result, _ = estimated(store, probes(store, {ratio: delta(ratio, 0.6) for ratio in (0.3, 0.55, 0.8)}))
    assert result["decision"] == "estimate" and result["jackknife"] == []
    assert result["ratio"] == pytest.approx(0.6, abs=0.03)


def test_standard_errors_are_those_of_paired_differences(store: Store) -> None:
    """Windows differ by 0.8 nats among themselves and by 0.02 in their change: the error is 0.02 / sqrt(400)."""
    result, _ = estimated(store, probes(store, {ratio: delta(ratio, 0.6) for ratio in RATIOS}))
    assert [point["general_standard_error"] for point in result["points"]] == pytest.approx([0.02 / 20] * 4, rel=0.15)


def test_intervals_cover_the_truth() -> None:
    """Forty synthetic probe sets with window noise shared over ratios: a 95 % interval misses few of them."""
    covered = 0
    for trial in range(40):
        made = window_losses({ratio: delta(ratio, 0.6) for ratio in (0.3, 0.55, 0.8)}, windows=80, noise=0.05, common=0.05, seed=trial)
        general = np.stack([after - before for before, after in made.values()])
        losses = _Losses(np.asarray(list(made)), np.zeros(3, dtype=int), TOKENS, general, general, [])
        draws = _bootstrap(RatioSettings(draws=50, seed=trial), OwnShare(num_k=29), losses)
        low, high = np.nanquantile(draws, [0.025, 0.975])
        covered += low <= 0.6 <= high
    assert 34 <= covered <= 40


def test_no_replay_is_kept_out_of_the_fit(store: Store) -> None:
    deltas = {ratio: delta(ratio, 0.6) for ratio in RATIOS}
    without, _ = estimated(store, probes(store, deltas))
    with_it, _ = estimated(store, probes(store, {**deltas, 1.0: 3.0}))
    # windows of one seed are drawn ratio by ratio, so the first four probes are the same in both
    assert with_it["ratio"] == without["ratio"] and with_it["interval_95"] == without["interval_95"]
    assert with_it["law"] == without["law"] and len(with_it["points"]) == 5


def test_no_replay_alone_is_an_error(store: Store) -> None:
    with pytest.raises(GristmillError, match="no probe has a target share below 1"):
        estimated(store, probes(store, {1.0: 0.8}))


def test_the_order_of_the_probes_does_not_matter(store: Store) -> None:
    made = probes(store, {ratio: delta(ratio, 0.6) for ratio in RATIOS})
    assert estimated(store, made[::-1])[1].content_sha256 == estimated(store, made)[1].content_sha256


# Refusals


def noisy(root: float = 0.6) -> dict[float, float]:
    return {ratio: delta(ratio, root) for ratio in RATIOS}


REFUSED = {
    "too_few_ratios": ({0.3: 0.0, 0.8: 0.12}, {}, "three is the least"),
    "not_bracketed": ({0.2: 0.0, 0.4: 0.01, 0.6: 0.02}, {}, "add a higher ratio"),
    "noisy_evaluation": (noisy(), {"noise": 0.4, "windows": 300}, "x as many held-out windows"),
    "non_monotone": ({0.2: 0.0, 0.4: 0.09, 0.6: 0.03, 0.8: 0.15}, {}, "more windows, or more seeds"),
    "target_not_learned": (noisy(), {"target": {0.25: -0.3, 0.5: -0.4, 0.7: 0.02, 0.85: -0.4}}, "train the probes longer"),
    "wide_interval": (noisy(), {"noise": 0.2, "windows": 30}, "add ratios near the estimate"),
}


@pytest.mark.parametrize("code", REFUSED)
def test_each_refusal_says_what_was_seen_and_what_cures_it(store: Store, code: str) -> None:
    deltas, noise, remedy = REFUSED[code]
    result, manifest = estimated(store, probes(store, deltas, **noise), on_refusal="manual", ratio=0.33)
    refusal = next(row for row in result["refusals"] if row["code"] == code)
    assert remedy in refusal["remedy"] and refusal["seen"]
    assert (result["decision"], result["ratio"]) == ("manual", 0.33)
    assert manifest.outcome.tables["refusals"] == result["refusals"]
    checks = {check.name: check for check in manifest.checks}
    assert checks["ratio_inside_interval"].passed and not checks["estimate_not_refused"].passed
    assert code in checks["estimate_not_refused"].description and remedy in checks["estimate_not_refused"].description


def test_a_refusal_is_only_for_its_own_reason(store: Store) -> None:
    """The probe sets above with clean numbers carry that code alone."""
    for code in ("too_few_ratios", "not_bracketed", "non_monotone", "target_not_learned"):
        deltas, noise, _ = REFUSED[code]
        assert codes(estimated(store, probes(store, deltas, **noise))[0]) <= {code, "wide_interval"}


def test_the_number_of_windows_that_is_asked_for_would_do(store: Store) -> None:
    """Standard error 0.4 / sqrt(300) = 0.0231 against 0.01: 5.3 times as many windows, so 6x."""
    result, _ = estimated(store, probes(store, noisy(), noise=0.4, windows=300))
    remedy = next(row["remedy"] for row in result["refusals"] if row["code"] == "noisy_evaluation")
    assert remedy in ("measure 5x as many held-out windows", "measure 6x as many held-out windows", "measure 7x as many held-out windows")


def test_one_window_is_not_exact(store: Store) -> None:
    result, _ = estimated(store, probes(store, noisy(), windows=1, noise=0.0))
    assert "noisy_evaluation" in codes(result) and result["decision"] == "lower_bound"


def test_lower_bound_takes_the_highest_ratio_that_held(store: Store) -> None:
    result, _ = estimated(store, probes(store, REFUSED["not_bracketed"][0]))
    assert (result["decision"], result["ratio"], result["estimate"]) == ("lower_bound", 0.6, 1.0)
    result, _ = estimated(store, probes(store, {0.2: 0.0, 0.4: 0.09, 0.6: 0.03, 0.8: 0.15}))
    assert (result["decision"], result["ratio"]) == ("lower_bound", 0.6)


def test_no_replay_is_never_the_lower_bound(store: Store) -> None:
    result, _ = estimated(store, probes(store, {0.2: 0.0, 0.4: 0.01, 0.6: 0.02, 1.0: 0.03}))
    assert (result["decision"], result["ratio"]) == ("lower_bound", 0.6)


def test_error_stops_with_every_reason(store: Store) -> None:
    made = probes(store, REFUSED["too_few_ratios"][0], target=0.1)
    with pytest.raises(GristmillError, match=r"too_few_ratios.*add ratios.*target_not_learned.*on_refusal: manual"):
        estimated(store, made, on_refusal="error")
    assert not store.is_current("critical_ratio")


def test_nothing_that_held_is_an_error_even_for_a_lower_bound(store: Store) -> None:
    made = probes(store, {0.2: 0.1, 0.4: 0.2, 0.6: 0.4})
    with pytest.raises(
        GristmillError, match=r"not_bracketed: no ratio down to 0.20 holds the tolerance \(add a lower ratio, or train the base longer\)"
    ):
        estimated(store, made)
    assert estimated(store, made, on_refusal="manual", ratio=0.05)[0]["ratio"] == 0.05


def test_manual_without_a_ratio_is_an_error(store: Store) -> None:
    with pytest.raises(GristmillError, match="with a `ratio`"):
        estimated(store, probes(store, REFUSED["too_few_ratios"][0]), on_refusal="manual")


def test_manual_does_not_override_an_estimate(store: Store) -> None:
    assert estimated(store, probes(store, noisy()), on_refusal="manual", ratio=0.1)[0]["decision"] == "estimate"


def test_seeds_that_differ_by_data_order_are_not_a_falling_loss(store: Store) -> None:
    """Two seeds of one ratio, 0.01 nats apart at a standard error of 0.001, say nothing about the ratio."""
    deltas = {ratio: delta(ratio, 0.6) for ratio in (0.3, 0.55, 0.8)}
    result, manifest = estimated(store, probes(store, deltas, seeds=(0, 1), shift_of_seed=-0.01))
    assert codes(result) == set() and manifest.counts["probes"] == 6
    assert result["ratio"] == pytest.approx(0.6, abs=0.05)


def test_probes_of_different_windows_are_an_error(store: Store) -> None:
    deltas = {ratio: delta(ratio, 0.6) for ratio in RATIOS}
    made = (*probes(store, deltas)[:2], *probes(store, deltas, windows=300)[2:])
    with pytest.raises(GristmillError, match="not measured on the same windows"):
        estimated(store, made)


@pytest.mark.parametrize("seed", range(5))
def test_whatever_the_losses_the_ratio_is_a_number_or_a_refusal(store: Store, seed: int) -> None:
    random = np.random.default_rng(seed)
    deltas = {
        float(ratio): float(random.normal(0.05, 0.03))
        for ratio in np.round(np.sort(random.choice(np.arange(1, 20), 4, replace=False)) / 20, 2)
    }
    result, _ = estimated(store, probes(store, deltas), on_refusal="manual", ratio=0.5, draws=20)
    assert math.isfinite(result["ratio"]) and 0 <= result["ratio"] <= 1
    assert result["refusals"] or result["interval_95"][0] <= result["ratio"] <= result["interval_95"][1]
    assert "NaN" not in json.dumps(result)


# Warnings


def test_a_base_that_still_improves_is_a_warning(store: Store) -> None:
    """The lowest ratio lost 0.07 nats of general loss where the tolerance is 0.05; the estimate stands."""
    deltas = {0.05: -0.07, 0.3: -0.02, 0.5: 0.02, 0.75: 0.12}
    result, manifest = estimated(store, probes(store, deltas))
    assert "base_unconverged" in codes(result, "warnings") and result["decision"] == "estimate"
    warning = next(row for row in result["warnings"] if row["code"] == "base_unconverged")
    assert "still improves on general text" in warning["seen"] and "R = 0.05" in warning["seen"]
    assert "spare learning" in warning["remedy"] and "train the base longer" in warning["remedy"]
    assert manifest.outcome.tables["warnings"] == result["warnings"]
    within, _ = estimated(store, probes(store, {**deltas, 0.05: -0.045}))
    assert "base_unconverged" not in codes(within, "warnings")


def test_laws_that_disagree_are_a_warning(store: Store) -> None:
    """With points at 0.1, 0.5 and 0.95 the power law reads 0.63 where the own-share law, and the truth, say 0.70."""
    deltas = {ratio: delta(ratio, 0.7, slope=0.05) for ratio in (0.1, 0.5, 0.95)}
    result, _ = estimated(store, probes(store, deltas, noise=0.002))
    assert codes(result, "warnings") == {"cross_check_disagrees"} and result["decision"] == "estimate"
    assert abs(result["estimate"] - result["cross_check"]["estimate"]) > 0.05
    near, _ = estimated(store, probes(store, {ratio: delta(ratio, 0.7, slope=0.05) for ratio in (0.25, 0.5, 0.75)}, noise=0.002))
    assert near["warnings"] == []


# The mixture


def selection(store: Store, tokens: Mapping[str, tuple[str, int]]) -> tuple[Member, ...]:
    """Publish a selection of `tokens` by domain, ten passages each, and an unselected one that is not to count."""
    files = {"general.parquet": [], "target.parquet": []}
    for domain, (role, total) in tokens.items():
        rows = [{"role": role, "domain": domain, "tokens": total // 10, "selected": True}] * 10
        files[f"{role}.parquet"] += [*rows, {**rows[0], "tokens": 10**9, "selected": False}]
    files = {name: rows for name, rows in files.items() if rows}
    subset = publish(store, "selected_subset", files)
    return tuple(Member(manifest=subset, name=name) for name in files)


def measured(store: Store, ratio: float = 0.6, safe: float = 0.55) -> Manifest:
    """Publish a critical ratio."""
    made = MeasuredSettings(ratio=ratio, safe=safe)
    return store.build(Build(asset="critical_ratio", step=write_ratio, settings=made)).manifest


class MeasuredSettings(Settings):
    """What a test lets the probes say."""

    ratio: float
    safe: float


def write_ratio(made: MeasuredSettings, out: Path) -> Outcome:
    (out / "critical_ratio.json").write_text(made.model_dump_json())
    return Outcome()


def mixed(store: Store, chosen: tuple[Member, ...], **changes: object) -> tuple[dict, Manifest]:
    """Return mixture.json and the manifest."""
    made = MixtureSettings(**{"tokens": 1_000_000, **changes})
    inputs = {"critical_ratio": measured(store), "selection": chosen}
    manifest = store.build(Build(asset="domain_mixture", step=mix_domains, settings=made, inputs=inputs, audits=MIXTURE_AUDITS)).manifest
    return json.loads(manifest.file("mixture.json").read_text()), manifest


DOMAINS = {"wiki": ("general", 300_000), "book": ("general", 100_000), "legal": ("target", 200_000)}


def test_shares_by_hand(store: Store) -> None:
    mixture, manifest = mixed(store, selection(store, DOMAINS), ratio=0.4)
    assert mixture["shares"] == pytest.approx({"book": 0.15, "wiki": 0.45, "legal": 0.4})
    rows = {row["domain"]: row for row in mixture["domains"]}
    assert {domain: row["planned_tokens"] for domain, row in rows.items()} == {"book": 150_000, "wiki": 450_000, "legal": 400_000}
    assert {domain: row["epochs"] for domain, row in rows.items()} == pytest.approx({"book": 1.5, "wiki": 1.5, "legal": 2.0})
    assert {domain: row["available_tokens"] for domain, row in rows.items()} == {"book": 100_000, "wiki": 300_000, "legal": 200_000}
    assert mixture["repeated"] == [] and manifest.outcome.metrics["max_epochs"] == pytest.approx(2.0)


def test_the_measured_ratio_or_its_lower_end_is_used(store: Store) -> None:
    chosen = selection(store, DOMAINS)
    assert mixed(store, chosen)[0]["shares"]["legal"] == pytest.approx(0.6)
    assert mixed(store, chosen, use="safe")[0]["shares"]["legal"] == pytest.approx(0.55)
    assert mixed(store, chosen, use="safe", ratio=0.2)[0]["shares"]["legal"] == pytest.approx(0.2)


@pytest.mark.parametrize(("ratio", "domains"), [(0.0, {"book", "wiki"}), (1.0, {"legal"})])
def test_a_ratio_at_the_end_leaves_the_other_role_out(store: Store, ratio: float, domains: set[str]) -> None:
    mixture, manifest = mixed(store, selection(store, DOMAINS), ratio=ratio, tokens=600_000)
    assert set(mixture["shares"]) == domains and sum(mixture["shares"].values()) == pytest.approx(1.0)
    assert all(check.passed for check in manifest.checks)


def test_many_epochs_warn_and_publish(store: Store) -> None:
    mixture, manifest = mixed(store, selection(store, {**DOMAINS, "legal": ("target", 50_000)}), ratio=0.4)
    assert mixture["repeated"] == ["legal"]
    checks = {check.name: check for check in manifest.checks}
    assert (
        not checks["within_max_epochs"].passed
        and not checks["within_max_epochs"].blocking
        and "legal" in checks["within_max_epochs"].description
    )
    assert mixed(store, selection(store, {**DOMAINS, "legal": ("target", 50_000)}), ratio=0.4, max_epochs=9.0)[0]["repeated"] == []


def test_a_role_without_text_is_an_error(store: Store) -> None:
    general = selection(store, {"wiki": ("general", 1000)})
    with pytest.raises(EmptyInput, match=r"no selected target passage for a mixture with target share 0.400"):
        mixed(store, general, ratio=0.4)
    assert mixed(store, general, ratio=0.0)[0]["shares"] == {"wiki": 1.0}


@settings(max_examples=12, deadline=None)
@given(
    general=st.lists(st.integers(1, 10**9), min_size=1, max_size=5),
    target=st.lists(st.integers(1, 10**9), min_size=1, max_size=3),
    ratio=st.floats(0.001, 0.999),
    tokens=st.integers(1000, 10**12),
)
def test_shares_sum_to_one_and_epochs_are_planned_over_available(
    tmp_path_factory: pytest.TempPathFactory, general: list[int], target: list[int], ratio: float, tokens: int
) -> None:
    store = Store(tmp_path_factory.mktemp("mixture"))
    domains = {f"g{n}": ("general", 10 * size) for n, size in enumerate(general)} | {
        f"t{n}": ("target", 10 * size) for n, size in enumerate(target)
    }
    out = tmp_path_factory.mktemp("out")
    mix_domains(MixtureSettings(tokens=tokens), out, critical_ratio=measured(store, ratio), selection=selection(store, domains))
    mixture = json.loads((out / "mixture.json").read_text())
    assert sum(mixture["shares"].values()) == pytest.approx(1.0, abs=1e-9)
    assert sum(share for domain, share in mixture["shares"].items() if domain[0] == "t") == pytest.approx(ratio)
    for row in mixture["domains"]:
        assert row["epochs"] == pytest.approx(row["share"] * tokens / row["available_tokens"])
        assert row["available_tokens"] == domains[row["domain"]][1]
