"""A run at the ratio moves the law along training: the settings are those shipped, and the ratio of every world is known.

The world of `off_by` goes on otherwise than it began, so that the ratio for more tokens is off by a known amount.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from ratio_world import (
    PLENTY,
    RATIOS,
    SHIPPED,
    TOLERANCE,
    Change,
    Files,
    build,
    codes,
    drifting,
    probe_file,
    rising,
    true_ratio,
    world,
    write,
)
from test_ratio_verification import verified

from pipelines.critical_ratio import Judged, judge
from pipelines.manifests import Manifest
from pipelines.mixing_laws._scan import box_cox
from pipelines.probe_losses import ProbeLosses, ProbeRun
from pipelines.ratio_estimate import RatioSettings
from pipelines.store import Store

LONG = (1000, 2000, 4000, 12_000)
FOUR_TIMES = (1000, 2000, 4000, 16_000)


def off_by(nats: float) -> Change:
    """A world that the law holds for up to 4000 tokens; at 12,000 every ratio lost `nats` more."""
    return lambda ratio, tokens: drifting(ratio, tokens) + (nats if tokens > 4000 else 0.0)


def run_at(folder: Path, ratio: float, general: Change, *, end: int = 12_000, seed: int = 0) -> Manifest:
    """Write a probe at `ratio` of `end` tokens."""
    lengths = [tokens for tokens in LONG if tokens <= end]
    losses = world((ratio,), general=general, lengths=lengths, noise=0.005, seeds=(seed,), seed=99)
    return probe_file(folder, losses, 0, asset="verifying_probe")


def said_by_law(result: Mapping[str, object], ratio: float, tokens: float) -> float:
    """Return what the law of `result` says."""
    law = result["law"]
    time = math.log(tokens / law["T0"])
    slope = law["C"] + law["C_log_tokens"] * time
    return float(law["E"] + law["moved_by"] + law["E_log_tokens"] * time - slope * box_cox(np.asarray(1.01 - ratio), law["k"]))


FURTHER = {**SHIPPED, "tokens": 12_000}


@pytest.fixture
def files(tmp_path: Path) -> Files:
    """Probes of 4000 tokens of a world that does not go on as it began."""
    return write(tmp_path / "files", world(general=drifting, noise=0.002))


@pytest.mark.parametrize(("nats", "held"), [(0.0, True), (0.02, True), (0.03, False), (-0.03, False)])
def test_a_run_to_the_full_length_is_one_secant_step(store: Store, tmp_path: Path, files: Files, nats: float, held: bool) -> None:
    """The law is moved to pass through the run; half the tolerance about the tolerance is what holds."""
    before = build(store, files, **FURTHER)[0]
    ratio, truth = round(before["ratio"], 2), true_ratio(12_000, tolerance=TOLERANCE - nats)
    result, manifest = verified(store, files, run_at(tmp_path, ratio, off_by(nats)), before=FURTHER)
    found = result["verification"]
    assert (found["held"], found["tokens"], found["wanted"]) == (held, 12_000, "0.0500 within 0.0250")
    assert found["measured_general_delta"] == pytest.approx(drifting(ratio, 12_000) + nats, abs=0.001)
    assert found["predicted_general_delta"] == pytest.approx(drifting(ratio, 12_000), abs=0.002)
    assert (result["decision"], result["refusals"]) == ("estimate", [])
    assert ("not_verified" in {row["code"] for row in result["warnings"]}) == (not held)
    assert said_by_law(result, ratio, 12_000) == pytest.approx(found["measured_general_delta"], abs=1e-9)
    assert before["ratio"] == pytest.approx(true_ratio(12_000), abs=0.005) and result["ratio"] == pytest.approx(truth, abs=0.02)
    assert abs(result["ratio"] - truth) <= max(0.01, abs(before["ratio"] - truth) / 4)
    low, high = result["interval_95"]
    assert low < truth < high and (result["tokens"], result["measured_tokens"], result["extrapolated"]) == (12_000, 12_000, False)
    assert [(row["ratio"], row["tokens"]) for row in result["points"]] == sorted([*((r, 4000) for r in RATIOS), (ratio, 12_000)])
    assert {check.name: check.passed for check in manifest.checks}["verification_held"] == held


def test_a_shorter_run_anchors_the_law_where_it_ended(store: Store, tmp_path: Path) -> None:
    """It ran for 2000 of 16,000 tokens: the ratio is still read where the probes ended, and the first rise is no prediction's."""
    files = write(tmp_path / "files", world(general=rising(0.5), noise=0.002, lengths=FOUR_TIMES))
    ratio = round(build(store, files, **SHIPPED)[0]["ratio"], 2)
    result, _ = verified(store, files, run_at(tmp_path, ratio, lambda r, t: rising(0.5)(r, t) + 0.01, end=2000), before=SHIPPED)
    found = result["verification"]
    assert found["held"] and found["tokens"] == 2000 and found["predicted_general_delta"] == pytest.approx(drifting(ratio, 2000), abs=0.002)
    assert said_by_law(result, ratio, 2000) == pytest.approx(found["measured_general_delta"], abs=1e-9)
    assert (result["measured_tokens"], result["extrapolated"]) == (16_000, False)
    assert result["ratio"] == pytest.approx(true_ratio(16_000, tolerance=TOLERANCE - 0.01), abs=0.02)
    assert [row["tokens"] for row in result["points"]] == [16_000, 16_000, 2000, 16_000, 16_000]


def test_a_further_run_of_a_measured_ratio_stands_in_place_of_its_probe(store: Store, tmp_path: Path) -> None:
    files = write(tmp_path / "files", world((0.2, 0.4, 0.5), general=drifting, noise=0.002))
    before = build(store, files, **FURTHER)[0]
    assert (before["decision"], before["ratio"]) == ("lower_bound", 0.5)
    assert [row["code"] for row in before["refusals"]] == ["not_bracketed"]
    result, manifest = verified(store, files, run_at(tmp_path, 0.5, drifting), before=FURTHER)
    assert [(row["ratio"], row["tokens"]) for row in result["points"]] == [(0.2, 4000), (0.4, 4000), (0.5, 12_000)]
    assert result["cost"] == {"tokens": 20_000} and manifest.counts["probes"] == 3 and result["verification"]["held"]
    other, _ = verified(store, files, run_at(tmp_path / "other", 0.5, drifting, seed=1), before=FURTHER)
    assert [(row["ratio"], row["seed"]) for row in other["points"]] == [(0.2, 0), (0.4, 0), (0.5, 0), (0.5, 1)]


def test_a_run_that_was_a_probe_says_nothing_new(store: Store, tmp_path: Path) -> None:
    files = write(tmp_path / "files", world((0.2, 0.4, 0.5), general=drifting, noise=0.01))
    before = build(store, files, **SHIPPED)[0]
    for run in (files.probes[-1], run_at(tmp_path, 0.5, drifting, end=4000)):
        result, _ = verified(store, files, run, before=SHIPPED)
        assert {key: result[key] for key in before} == before and "moved_by" not in result["law"]


def anchored(losses: ProbeLosses, run: ProbeRun, tokens: float) -> Judged:
    return judge(RatioSettings(draws=20), losses, PLENTY, lengths=(tokens, tokens), anchor=run)


def test_the_law_stays_anchored_where_another_ratio_is_left_out() -> None:
    """The run at 0.62 lost 0.01 more than the others say: leaving one of them out moves the ratio little, leaving it out moves it back."""
    losses = world((0.25, 0.5, 0.62, 0.7, 0.85), general=lambda r, t: drifting(r, t) + (0.01 if r == 0.62 else 0.0), noise=0.002)
    found = anchored(losses, losses.runs[2], 4000).found
    moved = true_ratio(4000, tolerance=TOLERANCE - 0.01)
    assert found.value == found.level == pytest.approx(moved, abs=0.005)
    without = {row["without"]: row["estimate"] for row in found.jackknife}
    assert without.pop(0.62) == pytest.approx(0.6, abs=0.005) and len(without) == 4
    assert list(without.values()) == pytest.approx([moved] * 4, abs=0.01)


def test_an_anchored_law_does_not_disagree_with_itself() -> None:
    """At 12,000 tokens there is the run alone, and every law along training passes through it."""
    losses = world((0.25, 0.5, 0.63, 0.7, 0.85), general=off_by(0.045), noise=0.002, lengths=LONG, ends=dict.fromkeys(RATIOS, 4000))
    run = next(run for run in losses.runs if run.ratio == 0.63)
    found = anchored(losses, run, 12_000)
    assert codes(found) == set() and found.ratio == pytest.approx(true_ratio(12_000, tolerance=TOLERANCE - 0.045), abs=0.04)
    rows = {row["law"]: row["estimate"] for row in found.found.laws}
    assert rows["own_share_tokens"] == pytest.approx(found.found.value) and rows["dcpt"] == pytest.approx(found.found.value, abs=0.05)
    assert rows["own_share"] is None
