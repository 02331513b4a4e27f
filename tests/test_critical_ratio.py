"""The critical ratio: against a trial's numbers and made-up worlds, by level and by turn, by length of training and beyond."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError
from ratio_world import RATIOS, TOLERANCE, build, delta, healthy, held_out, judged, of_ratio, warned, world, write

from pipelines.critical_ratio import as_json
from pipelines.errors import GristmillError
from pipelines.mixing_laws import two_corpora, two_shares
from pipelines.mixing_laws.own_share import OwnShare
from pipelines.probe_courses import Courses, resample, turns
from pipelines.probe_losses import ProbeLosses
from pipelines.ratio_estimate import Estimator, RatioSettings, interval_95, stability_table
from pipelines.ratio_laws import MonotonePchip, compare_laws, line_over_tokens
from pipelines.store import Store


@pytest.mark.parametrize("unit", ["percent", "bits_per_byte"])
def test_the_unit_of_the_tolerance_moves_the_ratio_alone_by_its_size(unit: str) -> None:
    losses = world()
    base = losses.windows.mean_loss("general")
    same = {"percent": 5 / base, "bits_per_byte": 0.05 / (math.log(2) * 4.0)}[unit]
    assert judged(losses, tolerance={unit: same}).ratio == pytest.approx(judged(losses).ratio, abs=1e-9)
    assert judged(losses, tolerance={unit: 1.5 * same}).ratio > judged(losses).ratio + 0.05


def test_unknown_laws_are_named() -> None:
    with pytest.raises(ValidationError, match="did you mean 'own_share'"):
        RatioSettings(law="own_shares")
    with pytest.raises(ValidationError, match="unknown mixing law 'powr'"):
        RatioSettings(candidates=("own_share", "powr"))
    with pytest.raises(ValidationError, match="cmr_tokens does not depend on the mixture"):
        RatioSettings(law="cmr_tokens")
    assert RatioSettings(law="auto").laws == ("cmr_tokens", "dcpt", "own_share", "power")


# The trial

TRIAL_TOKENS = (31_000, 125_000, 250_000, 375_000, 500_000)
TRIAL = {
    0.0: (-0.007, -0.018, -0.036, -0.050, -0.056),
    0.25: (0.017, 0.007, -0.003, -0.013, -0.026),
    0.5: (0.060, 0.045, 0.036, 0.032, 0.028),
    0.75: (0.110, 0.093, 0.109, 0.112, 0.122),
    0.9: (0.150, 0.147, 0.189, 0.208, 0.239),
}
"""Change of general loss by target share: a trial with a base of 0.5 M parameters, one seed. No replay (R = 1) ended at 0.791."""


def trial(*ratios: float) -> ProbeLosses:
    """The trial as losses: every window at the mean, since its windows were not kept."""
    levels = {ratio: dict(zip(TRIAL_TOKENS, TRIAL[ratio], strict=True)) for ratio in ratios or TRIAL}
    found = world(list(levels), general=lambda r, t: levels[r].get(t, 0.0), lengths=TRIAL_TOKENS, noise=0.01)
    later = found.tokens_A >= TRIAL_TOKENS[0]
    general = found.windows.of("general")
    centred = found.deltas_NAW[:, later]
    centred[:, :, general] += np.asarray([TRIAL[r] for r in levels])[:, :, None] - centred[:, :, general].mean(axis=2, keepdims=True)
    return replace(found, tokens_A=found.tokens_A[later], deltas_NAW=centred)


def test_the_trials_ratio_is_found_at_every_length() -> None:
    """All ratios give 0.573-0.576 at full length; a run at 0.575 measured +0.0472 nats."""
    found = judged(trial()).found
    assert found.value == pytest.approx(0.5745, abs=0.003)
    rows = {row["tokens"]: row["estimate"] for row in found.by_tokens}
    assert [rows[t] for t in (125_000, 250_000, 500_000)] == pytest.approx([0.53, 0.565, 0.574], abs=0.015)
    predicted = found.fitted[0].predict(np.asarray([[0.425, 0.575]]), np.asarray([500_000.0]))[0]
    assert predicted == pytest.approx(0.0472, abs=0.004)


def test_the_trials_general_loss_turns_between_two_ratios() -> None:
    """At 0.5 it has come down from 0.060 to 0.028; at 0.75 it stands at its highest."""
    found = judged(trial(), criterion="turn")
    assert found.found.turn_between == (0.5, 0.75) and 0.5 < found.found.turn < 0.75
    assert found.found.value == found.found.turn and "turn_interpolated" in warned(found)
    both = judged(trial(), criterion="both")
    assert both.found.value == both.found.level == pytest.approx(min(found.found.turn, judged(trial()).found.value))
    assert "turn_interpolated" not in warned(both)


# Resamples and criteria


def test_the_first_row_is_the_evidence_and_others_draw_windows_within_domains() -> None:
    """A change that is the same in every window of a domain moves in no draw."""
    losses = world(noise=0.0)
    book = losses.windows.stratum == 0
    losses.deltas_NAW[:, :, book] += 1.0
    courses = resample(losses, draws=30, seed=3, run_noise_nats=0.0)
    later = courses.means_DNA[:, :, 2:]
    np.testing.assert_allclose(later, np.broadcast_to(later[:1], later.shape), atol=1e-12)
    np.testing.assert_allclose(later[0], losses.deltas_NAW[:, 2:, :400].mean(axis=2), atol=1e-12)


def test_a_single_seed_is_moved_by_its_noise_and_several_are_drawn() -> None:
    alone = resample(world(noise=0.0), draws=4000, seed=0, run_noise_nats=0.004)
    assert alone.means_DNA[1:, :, -1].std(axis=0) == pytest.approx([0.004] * 4, rel=0.05)
    several = resample(world(seeds=(0, 1), shift_of_seed=0.01, noise=0.0), draws=4000, seed=0, run_noise_nats=0.004)
    values = np.unique(np.round(several.means_DNA[1:, 0, -1] - several.means_DNA[0, 0, -1], 9))
    assert values.tolist() == [0.0, 0.01]
    pair = several.means_DNA[1:, :2, -1].mean(axis=1)
    assert pair.std() == pytest.approx(0.005 / math.sqrt(2), rel=0.05)


def courses(levels: Mapping[float, Sequence[float]]) -> Courses:
    ratios, values = np.asarray(list(levels)), np.asarray(list(levels.values()), dtype=float)
    return Courses(ratios, np.arange(1.0, values.shape[1] + 1), values[None], np.isfinite(values), np.zeros(len(ratios), dtype=int))


def test_the_turn_by_hand() -> None:
    """Three points each, smoothed over neighbours. At 0.2: (5, 4, 3), 2 below its peak; at 0.6: (1.5, 2, 2.5), 0.5 above the others."""
    falling, rising = (6.0, 4.0, 2.0), (1.0, 2.0, 3.0)
    assert turns(courses({0.2: falling, 0.6: rising}), 2).tolist() == pytest.approx([0.2 + 0.4 * 2.0 / 2.5])
    assert turns(courses({0.2: falling, 0.6: falling}), 2).tolist() == [1.0]
    assert math.isnan(turns(courses({0.2: rising, 0.6: rising}), 2)[0])
    assert turns(courses({0.2: (-1.0, -2.0, -3.0), 0.6: rising}), 2)[0] > 0.2  # it fell from the start on
    early = turns(courses({0.2: falling, 0.6: rising}), 0)[0]
    assert math.isnan(early)  # at the first point all stand above the base


def test_the_turn_bounds_the_level() -> None:
    """Levels cross near 0.65; at 0.2 the loss comes down from its first rise, and above it still rises."""
    level = {0.2: 0.005, 0.4: 0.02, 0.6: 0.04, 0.85: 0.12}
    losses = world(list(level), general=lambda r, t: level[r] * (t / 4000 if r > 0.3 else 3 - t / 2000), noise=0.005)
    low, both = judged(losses), judged(losses, criterion="both")
    assert low.ratio > 0.6 and 0.2 < both.ratio < 0.4 and both.ratio == both.found.turn
    assert both.found.turn_between == (0.2, 0.4) and warned(both) >= {"turn_interpolated"}
    assert as_json(RatioSettings(criterion="both"), both)["turn"]["between"] == [0.2, 0.4]


# The estimate


def test_the_estimate_is_the_root_and_its_interval_holds_it() -> None:
    found = judged(world(), draws=200)
    assert (found.decision, found.refusals, found.warnings) == ("estimate", [], [])
    assert found.ratio == found.found.value == pytest.approx(0.6, abs=0.02)
    low, high = found.found.interval or (0.0, 0.0)
    assert low < 0.6 < high and high - low < 0.1
    assert [row["without"] for row in found.found.jackknife] == list(RATIOS)
    assert all(row["estimate"] == pytest.approx(0.6, abs=0.05) for row in found.found.jackknife)
    assert found.points.general == pytest.approx([delta(ratio, 0.6) for ratio in RATIOS], abs=0.005)
    assert [row["tokens"] for row in found.found.by_tokens] == [1000, 2000, 4000]  # early points bear no estimate
    for row, root in zip(found.found.by_tokens, (0.5, 0.55, 0.6), strict=True):
        assert row["bracketed"] and row["low"] < row["estimate"] < row["high"] and row["estimate"] == pytest.approx(root, abs=0.02)


def test_three_ratios_have_no_jackknife_and_an_estimate() -> None:
    found = judged(world((0.3, 0.55, 0.8)))
    assert found.decision == "estimate" and found.found.jackknife == [] and found.ratio == pytest.approx(0.6, abs=0.03)


def test_intervals_cover_the_truth() -> None:
    """Sixty worlds, window noise shared over ratios, data-order noise of the assumed size: a 95 % interval misses few of them."""
    covered = 0
    estimator = Estimator(OwnShare(num_k=71), TOLERANCE, "level")
    held = held_out(80, 2)
    for trial_seed in range(60):
        moved = np.random.default_rng(trial_seed).normal(0, 0.002, 3)
        level = {r: delta(r, 0.6) + m for r, m in zip((0.3, 0.55, 0.8), moved, strict=True)}
        losses = world(list(level), general=of_ratio(level), windows=held, noise=0.05, common=0.05, lengths=(4000,), seed=trial_seed)
        drawn = resample(losses, draws=100, seed=trial_seed, run_noise_nats=0.002)
        low, high = interval_95(estimator.along(drawn, [2])[:, 0]) or (1.0, 0.0)
        covered += low <= 0.6 <= high
    assert 52 <= covered <= 60


def test_no_replay_is_kept_out_of_the_fit() -> None:
    rows = [world(), world((*RATIOS, 1.0), general=lambda r, t: 3.0 if r == 1 else healthy(r, t))]
    without, with_it = (judged(losses) for losses in rows)
    # windows are drawn run by run, so the first four probes are the same in both
    assert with_it.ratio == without.ratio and with_it.found.interval == without.found.interval
    assert with_it.found.laws == without.found.laws and len(with_it.points.runs) == 5
    with pytest.raises(GristmillError, match="no probe has a target share below 1"):
        judged(world((1.0,), general=of_ratio({1.0: 0.8})))


def test_files_with_every_key_and_no_nan(store: Store, tmp_path: Path) -> None:
    files = write(tmp_path, world((*RATIOS, 1.0), general=lambda r, t: 0.8 if r == 1 else healthy(r, t), ends={1.0: 1000}))
    result, manifest = build(store, files)
    assert {"ratio", "decision", "estimate", "interval_95", "safe", "jackknife", "cross_check", "tolerance_nats", "tokens", "law"} <= set(
        result
    )
    assert {"refusals", "warnings", "points", "tolerance", "criterion", "measured_tokens", "laws", "by_tokens", "extrapolated"} <= set(
        result
    )
    assert {"stability", "general_loss_of_base", "bytes_per_token", "cost", "measured_on"} <= set(result)
    assert set(result["points"][0]) == {"ratio", "seed", "tokens", "general_delta", "general_standard_error", "target_delta"}
    assert (result["tolerance"], result["tokens"], result["measured_tokens"]) == ({"nats": 0.05}, 4000, 4000)
    assert result["cost"] == {"tokens": 17_000} and result["measured_on"] == {"base": "b" * 32} and result["bytes_per_token"] == 4.0
    assert [row["law"] for row in result["laws"]] == ["own_share", "power", "dcpt", "pchip"] and result["cross_check"]["law"] == "power"
    assert result["safe"] == result["interval_95"][0] and result["extrapolation"] is None
    assert "NaN" not in json.dumps(result) and "Infinity" not in json.dumps(result)
    assert manifest.counts == {"probes": 5, "general_windows": 400, "target_windows": 60, "tokens": 17_000}
    assert manifest.outcome.metrics["cpu_seconds"] == 7.5 and manifest.outcome.metrics["ratio"] == result["ratio"]
    assert all(check.passed for check in manifest.checks)
    assert manifest.outcome.plots == ("critical_ratio.png", "trajectories.png", "critical_ratio_by_tokens.png")
    for name in manifest.outcome.plots:
        content = manifest.file(name).read_bytes()
        assert content[:4] == b"\x89PNG" and 5_000 < len(content) < 60_000


def test_the_same_bytes_in_any_order(tmp_path: Path) -> None:
    files = write(tmp_path, world(seeds=(0, 1)))
    backwards = replace(files, probes=files.probes[::-1])
    built = [build(Store(tmp_path / name), which)[1] for name, which in (("a", files), ("b", files), ("c", backwards))]
    assert len({manifest.content_sha256 for manifest in built}) == 1 and len({manifest.fingerprint for manifest in built}) == 2


def test_stability_by_hand() -> None:
    """Depth and tokens of the first rise, and the points at which it was back."""
    course = {
        0.25: {250: 0.10, 500: 0.04, 1000: 0.02, 2000: -0.01, 4000: -0.02},
        0.5: {250: 0.10, 500: 0.12, 1000: 0.08, 2000: 0.06, 4000: 0.03},
        0.7: {250: 0.01, 500: 0.02, 1000: 0.03, 2000: 0.04, 4000: 0.045},
        0.85: {250: -0.01, 500: -0.02, 1000: -0.03, 2000: -0.04, 4000: -0.05},
    }
    losses = world(general=lambda r, t: course[r][int(t)], noise=0.0)
    rows = stability_table(losses, TOLERANCE)
    assert [row["dip_depth"] for row in rows] == pytest.approx([0.10, 0.12, 0.045, 0.0])
    assert [row["tokens_at_peak"] for row in rows] == [250, 500, 4000, 0]
    assert [row["tokens_back_at_base"] for row in rows] == [2000, None, None, 0]
    assert [row["tokens_back_within_tolerance"] for row in rows] == [500, 4000, 0, 0]
    assert {row["base_loss"] for row in rows} == {losses.windows.mean_loss("general")}


# Laws


def test_laws_are_compared_by_the_ratio_left_out() -> None:
    """The own-share law is this world's; without the highest ratio the paper's ratio law misses it by half the tolerance."""
    losses = world((0.1, 0.3, 0.5, 0.7, 0.9), noise=0.002)
    rows = {row["law"]: row for row in judged(losses).found.laws}
    assert rows["own_share"]["left_out_in_tolerances"] < 0.2 < 0.5 < rows["power"]["left_out_in_tolerances"]
    assert rows["own_share"]["left_out_in_tolerances"] == pytest.approx(rows["own_share"]["left_out_nats"] / TOLERANCE)
    assert rows["pchip"]["left_out_nats"] is None and rows["pchip"]["left_out_inside_nats"] < 0.02
    assert [name for name, row in rows.items() if row["chosen"]] == ["own_share"]
    assert all(row["estimate"] == pytest.approx(0.6, abs=0.05) for row in rows.values())


def test_auto_takes_the_law_with_the_least_error() -> None:
    """A world of the paper's ratio law, ``0.4 * R**4 - 0.002``: its own law predicts the ratios left out."""
    losses = world((0.1, 0.3, 0.5, 0.7, 0.9), general=lambda r, t: 0.4 * r**4 - 0.002, noise=0.002)
    found = judged(losses, law="auto")
    errors = {row["law"]: row["left_out_nats"] for row in found.found.laws if row["law"] != "pchip"}
    assert found.found.law == min(errors, key=lambda law: errors[law]) == "power"
    assert judged(losses, law="auto", candidates=("own_share",)).found.law == "own_share"
    assert judged(world((0.3, 0.55, 0.8)), law="auto").found.law == "own_share"  # nothing can be left out of three


def test_the_interpolation_passes_through_what_rises_and_pools_what_falls() -> None:
    made = courses({0.2: [0.0], 0.4: [0.09], 0.6: [0.03], 0.8: [0.15]})
    row = compare_laws([], made, 0, TOLERANCE)[0]
    assert row["law"] == "pchip" and row["rmse_nats"] == pytest.approx(0.03 / math.sqrt(2))
    assert 0.2 < row["estimate"] < 0.4
    shares = np.asarray([0.3, 0.5, 0.8])
    fitted = MonotonePchip().fit(two_corpora(1 - shares, 1.0, np.asarray([0.12, 0.05, 0.0])))
    within = fitted.predict(two_shares(np.linspace(0, 1, 50)), np.ones(50))
    assert fitted.predict(two_shares(1 - shares), np.ones(3)) == pytest.approx([0.12, 0.05, 0.0])
    assert (np.diff(within) >= 0).all() and within[[0, -1]] == pytest.approx([0.0, 0.12])


@pytest.mark.parametrize("law", ["power", "dcpt", "own_share_tokens"])
def test_any_law_of_two_corpora_can_be_chosen(law: str) -> None:
    found = judged(world((0.1, 0.3, 0.5, 0.7, 0.9), noise=0.005), law=law, draws=20)
    assert found.found.law == law and found.ratio == pytest.approx(0.6, abs=0.03)


# Lengths of training


def test_a_line_in_log_tokens_is_found_again() -> None:
    tokens = np.asarray([1000.0, 2000.0, 4000.0])
    values = np.stack([0.5 + 0.05 * np.log2(tokens / 1000), 0.9 + 0.1 * np.log2(tokens / 1000)])
    assert line_over_tokens(tokens, values, 16_000).tolist() == pytest.approx([0.7, 1.0])


def test_a_ratio_beyond_the_probes_is_on_the_line() -> None:
    """The world gains 0.05 with every doubling: 0.70 at four times the tokens."""
    found = judged(world(noise=0.01), tokens=16_000, draws=200)
    assert found.decision == "estimate" and found.ratio == pytest.approx(0.7, abs=0.03)
    assert found.found.extrapolation.factor == 4.0 and found.found.extrapolation.lengths == 3
    assert found.found.extrapolation.token_law == pytest.approx(0.7, abs=0.04)
    low, high = found.found.interval
    assert low < 0.7 < high
    assert all(row["estimate"] == pytest.approx(0.7, abs=0.1) for row in found.found.jackknife)
    result = as_json(RatioSettings(), found)
    assert result["extrapolated"] and (result["tokens"], result["measured_tokens"]) == (16_000, 4000)


def test_extrapolation_has_a_limit() -> None:
    refused = judged(world(noise=0.01), tokens=20_000)
    row = next(row for row in refused.refusals if row["code"] == "far_extrapolation")
    assert "5.0 times" in row["seen"] and "probe for at least 5,000 tokens" in row["remedy"] and refused.decision == "lower_bound"
    assert judged(world(noise=0.01), tokens=20_000, allow_extrapolation=True).decision == "estimate"
    assert judged(world(noise=0.01), tokens=20_000, max_extrapolation=5.0).decision == "estimate"


def test_two_lengths_are_no_line() -> None:
    found = judged(world(lengths=(2000, 4000)), tokens=8000)
    row = next(row for row in found.refusals if row["code"] == "far_extrapolation")
    assert "2 lengths" in row["seen"] and "more points" in row["remedy"] and found.found.interval is None
    assert as_json(RatioSettings(), found)["estimate"] is None


def test_a_length_between_two_points_is_read_between_them() -> None:
    found = judged(world(noise=0.005), tokens=2828)
    assert found.ratio == pytest.approx(0.575, abs=0.01) and found.found.extrapolation is None
    assert found.points.tokens == 2828 and found.decision == "estimate"
    with pytest.raises(GristmillError, match="the first point on all windows is at 1,000"):
        judged(world(), tokens=500)


def test_a_probe_that_stopped_takes_part_where_it_was() -> None:
    """The highest of five ratios stopped at 1000 of 4000 tokens."""
    found = judged(world((0.25, 0.5, 0.7, 0.8, 0.9), ends={0.9: 1000}))
    assert found.decision == "estimate" and found.found.tokens == 4000
    assert [run.ratio for run in found.points.runs] == [0.25, 0.5, 0.7, 0.8]
    assert [row["ratios"] for row in found.found.by_tokens] == [5, 4, 4]
    assert {row["ratio"]: row["stopped"] for row in stability_table(found.losses, 0.05)}[0.9] == "its verdict was certain"


def test_probes_that_stopped_leave_too_few() -> None:
    found = judged(world((0.25, 0.5, 0.7, 0.85), ends={0.85: 1000, 0.25: 2000}))
    row = next(row for row in found.refusals if row["code"] == "too_few_ratios")
    assert "2 distinct ratios below 1 at 4,000 tokens; R = 0.25, 0.85 stopped before" in row["seen"]
    assert found.decision == "lower_bound" and found.ratio == 0.5
    assert judged(world(ends={0.85: 1000, 0.25: 2000}), tokens=1000).decision == "estimate"


def test_ratios_of_unequal_length() -> None:
    """Three ratios ran for 4000 tokens, two for 1000: the default is what all reached, and more can be asked for."""
    losses = world((0.1, 0.25, 0.5, 0.75, 0.9), ends={0.1: 1000, 0.9: 1000}, stopped=False)
    short, full = judged(losses), judged(losses, tokens=4000)
    assert (short.found.tokens, len(short.points.runs), full.found.tokens, len(full.points.runs)) == (1000, 5, 4000, 3)
    assert short.ratio == pytest.approx(0.5, abs=0.02) and full.ratio == pytest.approx(0.6, abs=0.02)


def test_probes_without_a_point_in_common_are_an_error() -> None:
    one, other = world((0.25, 0.5), lengths=(1000,)), world((0.7, 0.85), lengths=(3000,))
    deltas = np.full((4, 4, len(one.windows.keys)), np.nan)
    deltas[:2, 2], deltas[2:, 3] = one.deltas_NAW[:, 2], other.deltas_NAW[:, 2]
    apart = ProbeLosses(one.windows, one.runs + other.runs, np.asarray([250.0, 500.0, 1000.0, 3000.0]), deltas)
    with pytest.raises(GristmillError, match="one `measure_at`"):
        judged(apart)
