"""The shipped law, along training: what it is fitted to and read from, against worlds whose ratio is known at every length."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ratio_world import (
    DRIFT,
    GROWTH,
    LEVEL,
    PLENTY,
    SHIPPED,
    SLOPE,
    TOLERANCE,
    K,
    along,
    build,
    codes,
    delta,
    drifting,
    held_out,
    rising,
    true_ratio,
    world,
    write,
)

from pipelines.critical_ratio import as_json, judge
from pipelines.mixing_laws import two_corpora, two_shares
from pipelines.mixing_laws._scan import box_cox
from pipelines.mixing_laws.own_share import OwnShare
from pipelines.mixing_laws.own_share_tokens import OwnShareTokens
from pipelines.probe_courses import resample
from pipelines.ratio_estimate import Estimator, RatioSettings, interval_95
from pipelines.store import Store

FOUR_TIMES = (1000, 2000, 4000, 16_000)

# The law

RAGGED = [(r, t) for r, end in ((0.2, 4000), (0.5, 12_000), (0.7, 4000), (0.9, 1000)) for t in (500, 1000, 4000, 12_000) if t <= end]
"""Ratios and tokens of runs of unequal length."""


def ragged() -> tuple[np.ndarray, np.ndarray]:
    ratios, tokens = np.asarray(RAGGED).T
    return ratios, tokens


def test_its_parameters_are_found_again_in_runs_of_unequal_length() -> None:
    ratios, tokens = ragged()
    fitted = OwnShareTokens().fit(two_corpora(ratios, tokens, drifting(ratios, tokens)))
    ahead = math.log(3)
    wanted = {"E": LEVEL + DRIFT * ahead, "E_log_tokens": DRIFT, "C": SLOPE + GROWTH * ahead, "C_log_tokens": GROWTH, "k": K}
    assert fitted.parameters == pytest.approx({**wanted, "e0": 0.01, "T0": 12_000.0}, abs=1e-9)
    elsewhere = np.asarray([0.0, 0.35, 0.95, 1.0]), np.asarray([300.0, 3000.0, 12_000.0, 40_000.0])
    assert fitted.predict(two_shares(elsewhere[0]), elsewhere[1]) == pytest.approx(drifting(*elsewhere), abs=1e-9)


@pytest.mark.parametrize("slope", [0.1, -0.1])
def test_at_one_length_it_is_the_own_share_law(slope: float) -> None:
    """Where the loss falls with the ratio, too: both are then flat."""
    ratios = np.asarray([0.1, 0.3, 0.5, 0.7, 0.9])
    losses = slope * ratios**2 + np.random.default_rng(0).normal(0, 0.003, 5)
    observed, shares = two_corpora(ratios, 4000.0, losses), two_shares(np.linspace(0, 1, 50))
    one, other = OwnShareTokens().fit(observed), OwnShare(num_k=141).fit(observed)
    for tokens in (4000.0, 12_000.0):
        assert one.predict(shares, np.full(50, tokens)) == pytest.approx(other.predict(shares, np.full(50, tokens)), abs=1e-9)


@pytest.mark.parametrize("start", [0.0, 0.2, 1.0, 1.6])
def test_it_is_the_least_squares_fit_with_no_slope_below_0(start: float) -> None:
    """C grows from `start` of its end to it, or falls, under noise; scipy's bounded fit at every k is the reference."""
    from scipy.optimize import lsq_linear

    law, random = OwnShareTokens(num_k=36), np.random.default_rng(0)
    ratios, tokens = ragged()
    time = np.log(tokens / 12_000)
    part = time / time.min()
    slope = 0.05 * (1 - part + start * part)
    truth = 0.01 * time - slope * box_cox(1.01 - ratios, K)
    bounds = (np.asarray([-np.inf, -np.inf, 0, 0]), np.full(4, np.inf))
    draws = truth + random.normal(0, 0.01, (12, len(truth)))
    for losses, fitted in zip(draws, law.fit_many(two_corpora(ratios, tokens, truth), draws), strict=True):
        assert all(fitted.parameters["C"] + fitted.parameters["C_log_tokens"] * t >= -1e-12 for t in time)
        error = ((fitted.predict(two_shares(ratios), tokens) - losses) ** 2).sum()
        best = math.inf
        for k in np.linspace(-4, 3, 36):
            basis = box_cox(1.01 - ratios, k)
            design = np.stack([np.ones_like(time), time, -basis * (1 - part), -basis * part], axis=1)
            best = min(best, 2 * lsq_linear(design, losses, bounds, tol=1e-12).cost)
        assert error == pytest.approx(best, rel=1e-5)


def test_beyond_its_tokens_no_slope_is_below_0_either() -> None:
    """C falls to 0 at twice the longest tokens: at eight times them no share changes the loss."""
    ratios, tokens = ragged()
    losses = -0.02 * np.log(24_000 / tokens) * box_cox(1.01 - ratios, K)
    fitted = OwnShareTokens().fit(two_corpora(ratios, tokens, losses))
    assert fitted.predict(two_shares(np.asarray([0.1, 0.9])), np.full(2, 96_000.0)) == pytest.approx([0.0, 0.0], abs=1e-9)


def test_a_bootstrap_is_its_single_fits_whatever_its_size() -> None:
    ratios, tokens = ragged()
    losses = drifting(ratios, tokens)
    draws = losses + np.random.default_rng(0).normal(0, 0.02, (700, len(losses)))
    observed = two_corpora(ratios, tokens, losses)
    together = OwnShareTokens().fit_many(observed, draws)
    for row in (0, 1, 300, 400, 699):
        alone = OwnShareTokens().fit(observed.with_losses(draws[row]))
        assert json.dumps(alone.parameters) == json.dumps(together[row].parameters)
        assert alone.predict(observed.shares, tokens).tobytes() == together[row].predict(observed.shares, tokens).tobytes()


def test_a_constant_world_is_predicted_constant() -> None:
    ratios, tokens = ragged()
    fitted = OwnShareTokens().fit(two_corpora(ratios, tokens, np.full(len(ratios), 0.03)))
    assert fitted.predict(two_shares(np.linspace(0, 1, 9)), np.geomspace(100, 1e6, 9)) == pytest.approx(np.full(9, 0.03), abs=1e-9)


def test_five_points_bear_it_and_four_do_not() -> None:
    """Two levels, two slopes and k: three ratios at one length and two at another."""
    lengths = {"lengths": (2000, 4000), "general": drifting, "noise": 0.002}
    few = along(world((0.3, 0.6, 0.8), ends={0.3: 2000, 0.8: 2000}, **lengths), course_from=0.4)
    assert codes(few) == {"too_few_ratios"} and few.found.fitted == []
    enough = along(world((0.3, 0.6, 0.8), ends={0.8: 2000}, **lengths), course_from=0.4)
    assert enough.decision == "estimate" and enough.ratio == pytest.approx(0.6, abs=0.02)
    once = along(world((0.3, 0.6, 0.8), lengths=(4000,), general=drifting), course_from=0.4).refusals
    assert [row["code"] for row in once] == ["too_few_ratios"] and "more points (`measure_at`)" in once[0]["remedy"]


# The estimate


def test_the_ratio_is_found_where_it_was_measured_and_at_three_times_the_tokens() -> None:
    losses = world(general=drifting, noise=0.002)
    here, further = along(losses), along(losses, tokens=12_000)
    assert here.found.law == RatioSettings().law == "own_share_tokens"
    for found, tokens, factor in ((here, 4000, None), (further, 12_000, 3.0)):
        low, high = found.found.interval
        assert (found.decision, found.refusals, found.warnings) == ("estimate", [], [])
        assert found.ratio == pytest.approx(true_ratio(tokens), abs=0.004) and low < true_ratio(tokens) < high
        assert (found.found.extrapolation.factor if factor else found.found.extrapolation) == factor
        assert all(row["estimate"] == pytest.approx(true_ratio(tokens), abs=0.01) for row in found.found.jackknife)
    for row in here.found.by_tokens:  # the early points, too, which were measured on some windows
        assert row["estimate"] == pytest.approx(true_ratio(row["tokens"]), abs=0.01) and row["low"] < row["estimate"] < row["high"]
    assert [row["tokens"] for row in here.found.by_tokens] == [250, 500, 1000, 2000, 4000]


def test_intervals_cover_the_truth_at_both_lengths() -> None:
    """Forty worlds whose runs, all of one seed, are moved by one normal draw; windows are shared over ratios."""
    covered = {4000: 0, 12_000: 0}
    estimator, held = Estimator(OwnShareTokens(num_k=71), TOLERANCE, "level"), held_out(80, 2)
    for number in range(40):
        moved = np.random.default_rng(number).normal(0, 0.01)
        losses = world(
            (0.3, 0.55, 0.8), general=lambda r, t, by=moved: drifting(r, t) + by, windows=held, noise=0.03, common=0.03, seed=number
        )
        drawn = resample(losses, draws=100, seed=number, run_noise_nats=0.01, first=250, parts=True)
        for tokens, values in ((4000, estimator.along(drawn, [4])[:, 0]), (12_000, estimator.beyond(drawn, 12_000))):
            low, high = interval_95(values) or (1.0, 0.0)
            covered[tokens] += low <= true_ratio(tokens) <= high
    assert all(34 <= count <= 40 for count in covered.values()), covered


def test_the_same_bytes_in_any_order(tmp_path: Path) -> None:
    files = write(tmp_path, world(general=drifting, seeds=(0, 1), shift_of_seed=0.003, ends={0.85: 1000}))
    backwards = replace(files, probes=files.probes[::-1])
    built = [build(Store(tmp_path / name), which, **SHIPPED)[1] for name, which in (("a", files), ("b", files), ("c", backwards))]
    assert len({manifest.content_sha256 for manifest in built}) == 1


def test_a_probe_that_stopped_bears_on_the_estimate() -> None:
    """Three ratios, the highest of which ended after a quarter: without it there are two, which is too few at any length."""
    stopped = along(world((0.3, 0.5, 0.85), general=drifting, noise=0.002, ends={0.85: 1000}))
    assert (stopped.decision, codes(stopped)) == ("estimate", set()) and stopped.ratio == pytest.approx(0.6, abs=0.01)
    assert [run.ratio for run in stopped.points.runs] == [0.3, 0.5]
    result = as_json(RatioSettings(), stopped)
    assert [(row["ratio"], row["tokens"]) for row in result["points"]] == [(0.3, 4000), (0.5, 4000), (0.85, 1000)]
    assert result["points"][2]["general_delta"] == pytest.approx(drifting(0.85, 1000), abs=0.001)
    two = along(world((0.3, 0.85), general=drifting, noise=0.002))
    assert codes(two) == {"too_few_ratios"} and two.found.fitted == [] and (two.decision, two.ratio) == ("lower_bound", 0.3)
    further = along(world((0.3, 0.5, 0.85), general=drifting, noise=0.002, ends={0.85: 1000}), tokens=12_000)
    assert further.decision == "estimate" and further.ratio == pytest.approx(true_ratio(12_000), abs=0.01)


def test_runs_of_unequal_length_that_were_meant_to_be() -> None:
    """Three ratios ran for 4000 tokens and two for 1000: what is asked for at 4000 was measured there."""
    losses = world((0.1, 0.25, 0.5, 0.75, 0.9), general=drifting, noise=0.002, ends={0.1: 1000, 0.9: 1000}, stopped=False)
    short, full = along(losses), along(losses, tokens=4000)
    assert (short.found.tokens, full.found.measured_tokens, full.found.extrapolation) == (1000, 4000, None)
    assert short.ratio == pytest.approx(true_ratio(1000), abs=0.01) and full.ratio == pytest.approx(0.6, abs=0.01)


def test_the_first_rise_bears_nothing() -> None:
    """Before a sixteenth of 16,000 tokens the loss may rise as it will; with all points it moves the ratio."""
    worlds = {height: world(general=rising(height), lengths=FOUR_TIMES, noise=0.005) for height in (0.1, 0.3, 3.0)}
    low, high = along(worlds[0.1]), along(worlds[3.0])
    assert low.ratio == high.ratio == pytest.approx(true_ratio(16_000), abs=0.01)
    assert low.found.interval == high.found.interval and low.found.fitted[0].parameters == high.found.fitted[0].parameters
    assert low.refusals == high.refusals == []
    apart = [along(worlds[height], course_from=0, on_refusal="manual", ratio=0.5).found.value for height in (0.1, 0.3)]
    assert abs(apart[0] - low.ratio) > 0.02 and apart[0] != apart[1]


# Resamples


def test_runs_of_one_seed_are_moved_alike_along_their_course() -> None:
    losses = world(noise=0.0, general=drifting)
    other = replace(losses, runs=(*losses.runs[:3], replace(losses.runs[3], seed=1)))
    moved, apart = (
        made.means_DNA[1:] - made.means_DNA[0]
        for made in (resample(one, draws=2000, seed=0, run_noise_nats=0.014) for one in (losses, other))
    )
    np.testing.assert_allclose(moved, np.broadcast_to(moved[:, :1, :1], moved.shape), atol=1e-12)
    assert moved[:, 0, 0].std() == pytest.approx(0.014, rel=0.05)
    np.testing.assert_allclose(apart[:, 1:3], np.broadcast_to(apart[:, :1], (2000, 2, 5)), atol=1e-12)
    assert abs(np.corrcoef(apart[:, 0, 0], apart[:, 3, 0])[0, 1]) < 0.1 and apart[:, 3, 0].std() == pytest.approx(0.014, rel=0.05)


def test_a_seed_that_is_left_alone_at_its_ratio_is_moved_there() -> None:
    """Two seeds of each ratio up to 1000 tokens, one beyond: where it stands alone nothing can be drawn in its place."""
    losses = world(noise=0.0, general=drifting, seeds=(0, 1))
    losses.deltas_NAW[1::2, 3:] = np.nan
    made = resample(losses, draws=2000, seed=0, run_noise_nats=0.014)
    spread = (made.means_DNA[1:, 0] - made.means_DNA[0, 0]).std(axis=0)
    assert spread[2] == pytest.approx(0.0, abs=1e-12) and spread[3:] == pytest.approx([0.014, 0.014], rel=0.05)


def test_a_point_of_which_a_draw_may_hold_no_window_bears_nothing() -> None:
    """At 250 tokens one of eight windows was measured, at 500 all of one domain."""
    losses = world(noise=0.005, general=drifting, windows=held_out(8, 2))
    losses.deltas_NAW[:, 0, :] = np.nan
    losses.deltas_NAW[:, 0, 1] = 0.0
    drawn = resample(losses, draws=200, seed=0, run_noise_nats=0.0, parts=True)
    assert drawn.full_NA.tolist() == [[False, True, True, True, True]] * 4
    values = Estimator(OwnShareTokens(), TOLERANCE, "level").along(drawn, [4])
    assert np.isfinite(values).all()


# Refusals


def test_healthy_probes_are_never_refused() -> None:
    """Twenty copies, their windows drawn anew: of six ratios, of three and two seeds each, and of four of which one stopped."""
    noise = {"general": drifting, "noise": 0.05, "common": 0.05}
    worlds = (
        world((0.1, 0.25, 0.4, 0.55, 0.7, 0.9), **noise),
        world((0.3, 0.55, 0.8), seeds=(0, 1), shift_of_seed=0.004, **noise),
        world((0.25, 0.5, 0.65, 0.9), ends={0.9: 1000}, **noise),
    )
    for copy in range(20):
        losses, random = worlds[copy % 3], np.random.default_rng(copy)
        held = losses.windows
        drawn = np.concatenate([np.sort(random.choice(held.of(c), len(held.of(c)))) for c in ("general", "target")])
        fields = {name: getattr(held, name)[drawn] for name in ("corpus", "stratum", "base", "tokens", "bytes")}
        again = replace(held, keys=tuple(held.keys[n] for n in drawn), **fields)
        tokens = 12_000 if copy % 2 else None
        found = along(replace(losses, windows=again, deltas_NAW=losses.deltas_NAW[:, :, drawn]), tokens=tokens)
        assert (found.decision, found.refusals) == ("estimate", []), (copy, found.refusals)
        assert found.ratio == pytest.approx(true_ratio(tokens or 4000), abs=0.1)


def test_probes_that_stopped_count_for_the_bracket_as_they_ended() -> None:
    """0.85 had lost more than the tolerance when it stopped: it bounds the ratio. Where it had not, nothing does."""
    assert along(world((0.2, 0.4, 0.85), general=drifting, noise=0.002, ends={0.85: 1000})).decision == "estimate"
    low = along(world((0.2, 0.3, 0.4), general=drifting, noise=0.002, ends={0.4: 1000}))
    assert codes(low) == {"not_bracketed"} and (low.decision, low.ratio) == ("lower_bound", 0.4)
    assert "every ratio up to 0.30 holds the tolerance, and R = 0.40 stopped" in low.refusals[0]["seen"]
    high = along(world((0.7, 0.8, 0.9), general=drifting, noise=0.002, ends={0.9: 1000}), on_refusal="manual", ratio=0.1)
    assert codes(high) == {"not_bracketed"} and "no ratio down to 0.70 holds" in high.refusals[0]["seen"]


@pytest.mark.parametrize("times", [4.2, 10, 25, 1000])
def test_far_extrapolation_is_refused_and_allowed_on_demand(times: float) -> None:
    """However far: the points that bear the law stay those of four times the longest."""
    losses, tokens = world(general=drifting, noise=0.002), int(4000 * times)
    refused = along(losses, tokens=tokens)
    assert codes(refused) == {"far_extrapolation"} and (refused.decision, refused.ratio) == ("lower_bound", 0.5)
    assert f"{times:.1f} times the longest measured, 4,000; 4 are allowed" in refused.refusals[0]["seen"]
    allowed = along(losses, tokens=tokens, allow_extrapolation=True)
    assert allowed.decision == "estimate" and allowed.ratio == pytest.approx(true_ratio(tokens), abs=0.01)
    assert along(losses, tokens=16_000).decision == "estimate"


def test_a_law_of_two_lengths_is_not_extrapolated() -> None:
    found = along(world(general=drifting, noise=0.002, lengths=(2000, 4000)), tokens=12_000)
    assert codes(found) == {"far_extrapolation"} and "on 2 lengths of training bear the law; 3 are needed" in found.refusals[0]["seen"]


@pytest.mark.parametrize(("speed", "said"), [(0.07, "no ratio holds"), (-0.3, "every ratio holds")])
def test_a_law_without_a_ratio_is_refused(speed: float, said: str) -> None:
    """The loss of all ratios rises, or falls, so fast that at four times the tokens none, or each, holds the tolerance."""
    found = along(world(general=lambda r, t: delta(r, 0.6, slope=0.04) + speed * math.log(t / 4000), noise=0.002), tokens=16_000)
    assert codes(found) == {"far_extrapolation"} and found.decision == "lower_bound" and found.ratio == 0.5
    assert f"{said} the tolerance after 16,000 tokens, 4.0 times" in found.refusals[0]["seen"]


LOSSES = st.lists(st.one_of(st.floats(-3, 3), st.sampled_from([0.0, TOLERANCE])), min_size=1, max_size=5)


@settings(max_examples=40, deadline=None)
@given(
    LOSSES,
    st.sampled_from(["level", "turn", "both"]),
    st.sampled_from([None, 2828, 8000, 12_000, 100_000]),
    st.floats(0, 0.5),
    st.integers(0, 5),
    st.booleans(),
)
def test_whatever_the_losses_the_ratio_is_a_number_or_a_refusal(
    levels: list[float], criterion: str, tokens: int | None, noise: float, num_stopped: int, moved: bool
) -> None:
    ratios = np.round(np.linspace(0.05, 0.95, len(levels)), 2).tolist()
    height = dict(zip(ratios, levels, strict=True))
    ends = dict.fromkeys(ratios[-num_stopped:] if num_stopped else [], 1000)
    losses = world(ratios, general=lambda r, t: height[r] * (t / 4000) ** r, noise=noise, windows=held_out(20, 4), ends=ends)
    made = RatioSettings(
        draws=10, criterion=criterion, tokens=tokens, on_refusal="manual", ratio=0.5, candidates=("own_share",), allow_extrapolation=True
    )
    if ends and len(ends) == len(ratios) and tokens == 2828:
        made = made.model_copy(update={"tokens": 1000})
    lengths = (4000.0, float(tokens or 4000)) if moved and len(ends) < len(ratios) and tokens != 2828 else None
    found = judge(made, losses, PLENTY, lengths=lengths, anchor=losses.runs[0] if lengths else None)
    json.dumps(as_json(made, found), allow_nan=False)
    assert math.isfinite(found.ratio) and 0 <= found.ratio <= 1
    assert found.refusals or found.ratio == found.found.value
    assert (found.decision == "manual") == bool(found.refusals)
