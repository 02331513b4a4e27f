"""A run at the ratio: whether it holds, and what follows where it does not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from ratio_world import ONE_LENGTH, Change, Files, build, delta, healthy, probe_file, world, write

from pipelines.critical_ratio import VERIFICATION_AUDITS, VerificationSettings, verify_ratio
from pipelines.errors import GristmillError
from pipelines.manifests import Manifest
from pipelines.store import Build, Store


def verified(
    store: Store, files: Files, run: Manifest, *, before: Mapping[str, object] | None = None, **changes: object
) -> tuple[dict, Manifest]:
    """Return verified_ratio.json and the manifest; the estimate is made with the settings `before`."""
    estimate = build(store, files, **(before or {}))[1]
    made = VerificationSettings(**{"draws": 40, **ONE_LENGTH, **(before or {}), **changes})
    inputs = {**files.inputs(), "critical_ratio": estimate, "verification": run}
    request = Build(asset="verified_ratio", step=verify_ratio, settings=made, inputs=inputs, audits=VERIFICATION_AUDITS)
    manifest = store.build(request).manifest
    return json.loads(manifest.file("verified_ratio.json").read_text()), manifest


def run_at(folder: Path, ratio: float, general: float | Change, *, seed: int = 0, end: int = 4000) -> Manifest:
    """Write a probe trained at `ratio`."""
    change: Change = general if callable(general) else lambda _ratio, _tokens: general
    return probe_file(
        folder, world((ratio,), general=change, ends={ratio: end}, stopped=False, noise=0.005, seed=99 + seed), 0, asset="verifying_probe"
    )


@pytest.fixture
def files(tmp_path: Path) -> Files:
    """Healthy probes: the ratio is 0.6."""
    return write(tmp_path / "files", world(noise=0.01))


def test_a_run_at_the_ratio_that_comes_out_as_wanted_holds(store: Store, tmp_path: Path, files: Files) -> None:
    ratio = build(store, files)[0]["ratio"]
    result, manifest = verified(store, files, run_at(tmp_path, round(ratio, 2), 0.047))
    found = result["verification"]
    assert found["held"] and found["bound"] == pytest.approx(0.025) and found["tokens"] == 4000 and found["before"] == ratio
    assert found["measured_general_delta"] == pytest.approx(0.047, abs=0.002) and found["target_delta"] == pytest.approx(-0.5, abs=0.01)
    assert found["predicted_general_delta"] == pytest.approx(delta(found["ratio"], 0.6), abs=0.004) and 0 < found["standard_error"] < 0.001
    assert len(result["points"]) == 5 and result["decision"] == "estimate" and result["cost"] == {"tokens": 20_000}
    assert set(build(store, files)[0]) == set(result) - {"verification"}
    checks = {check.name: check for check in manifest.checks}
    assert all(check.passed for check in checks.values()) and not checks["verification_held"].blocking
    assert "0.0500 within 0.0250" in checks["verification_held"].description
    assert manifest.outcome.metrics["verified_general_delta"] == found["measured_general_delta"]
    other = build(store, files)[1]
    assert manifest.file("critical_ratio.png").read_bytes() != other.file("critical_ratio.png").read_bytes()


def test_one_that_does_not_is_one_more_point(store: Store, tmp_path: Path, files: Files) -> None:
    """The run lost 0.078 nats where 0.05 were wanted: the refit lies lower, and says so. One of 0.10 contradicts the ratio above it."""
    before = build(store, files)[0]
    result, manifest = verified(store, files, run_at(tmp_path, round(before["ratio"], 2), 0.078))
    assert not result["verification"]["held"] and result["ratio"] < before["ratio"] - 0.02
    assert result["decision"] == "estimate" and "not_verified" in {row["code"] for row in result["warnings"]}
    check = next(check for check in manifest.checks if check.name == "verification_held")
    assert not check.passed and "+0.078" in check.description and "verify again" in check.description
    worse, _ = verified(store, files, run_at(tmp_path / "worse", round(before["ratio"], 2), 0.10))
    assert worse["decision"] == "lower_bound" and {row["code"] for row in worse["refusals"]} >= {"non_monotone"}


def test_what_a_failure_means_is_a_setting(store: Store, tmp_path: Path, files: Files) -> None:
    before = build(store, files)[0]
    run = run_at(tmp_path, round(before["ratio"], 2), 0.10)
    result, manifest = verified(store, files, run, on_unverified="lower")
    assert (result["decision"], result["ratio"]) == ("lower_bound", 0.5) and result["refusals"][-1]["code"] == "not_verified"
    assert {check.name: check.passed for check in manifest.checks}["estimate_consistent"]
    with pytest.raises(
        GristmillError, match=r"not verified: a run at R = 0.\d+ changed the general loss by \+0.10\d+ nats after 4,000 tokens"
    ):
        verified(store, files, run, on_unverified="error")
    again, _ = verified(store, files, run_at(tmp_path / "good", round(before["ratio"], 2), 0.05), on_unverified="error")
    assert again["verification"]["held"]


@pytest.mark.parametrize(("measured", "held"), [(0.02, True), (0.074, True), (0.08, False)])
def test_a_lower_bound_holds_within_one_and_a_half_tolerances(store: Store, tmp_path: Path, measured: float, held: bool) -> None:
    files = write(tmp_path / "files", world((0.2, 0.4, 0.5), noise=0.01))
    result, _ = verified(store, files, run_at(tmp_path, 0.5, measured, seed=1))
    assert result["verification"]["held"] == held and result["verification"]["wanted"] == "at most 0.0750"


def test_a_ratio_that_was_measured_is_verified_by_that_run(store: Store, tmp_path: Path) -> None:
    files = write(tmp_path / "files", world((0.2, 0.4, 0.5), noise=0.01))
    result, _ = verified(store, files, files.probes[-1])
    assert result["verification"]["held"] and len(result["points"]) == 3
    assert result["points"] == build(store, files)[0]["points"]


def test_it_is_judged_at_the_length_of_the_estimate(store: Store, tmp_path: Path) -> None:
    """Two ratios reached 4000 tokens and four 1000: the run at the lower bound changes neither length nor bound."""
    files = write(tmp_path / "files", world(noise=0.01, ends={0.25: 1000, 0.85: 1000}))
    before = build(store, files)[0]
    assert (before["decision"], before["ratio"], before["measured_tokens"]) == ("lower_bound", 0.5, 4000)
    result, _ = verified(store, files, files.probes[1])
    assert (result["decision"], result["ratio"], result["measured_tokens"]) == ("lower_bound", 0.5, 4000)
    assert result["verification"]["held"] and result["verification"]["predicted_general_delta"] is None


def test_an_estimate_beyond_the_probes_is_compared_with_its_prediction(store: Store, tmp_path: Path, files: Files) -> None:
    """At 0.65, wanted for 8000 tokens, the law says 0.066 after 4000: what the tolerance allows is not asked there."""
    before = {"tokens": 8000}
    ratio = build(store, files, **before)[0]["ratio"]
    result, _ = verified(store, files, run_at(tmp_path, round(ratio, 2), healthy), before=before)
    found = result["verification"]
    assert found["held"] and found["tokens"] == 4000 and found["measured_general_delta"] > 0.06
    assert found["measured_general_delta"] == pytest.approx(found["predicted_general_delta"], abs=0.005)
    assert result["extrapolated"] and result["tokens"] == 8000 and len(result["points"]) == 5
    off, _ = verified(store, files, run_at(tmp_path / "off", round(ratio, 2), lambda r, t: healthy(r, t) + 0.03), before=before)
    assert not off["verification"]["held"]


def test_a_shorter_verification_is_compared_at_its_own_length(store: Store, tmp_path: Path, files: Files) -> None:
    ratio = round(build(store, files)[0]["ratio"], 2)
    result, _ = verified(store, files, run_at(tmp_path, ratio, healthy, end=2000))
    found = result["verification"]
    assert found["held"] and found["tokens"] == 2000 and found["predicted_general_delta"] == pytest.approx(healthy(ratio, 2000), abs=0.005)
    assert [row["tokens"] for row in result["points"]] == [4000, 4000, 2000, 4000, 4000]
    assert [row["ratios"] for row in result["by_tokens"]] == [5, 5, 4]


def test_a_verification_of_another_ratio_is_an_error(store: Store, tmp_path: Path, files: Files) -> None:
    with pytest.raises(GristmillError, match=r"ran at R = 0.400 and the ratio is 0\.\d+; materialize it again"):
        verified(store, files, run_at(tmp_path, 0.4, 0.02))


def test_a_verification_without_a_full_measurement_is_an_error(store: Store, tmp_path: Path, files: Files) -> None:
    ratio = round(build(store, files)[0]["ratio"], 2)
    with pytest.raises(GristmillError, match="not measured on all windows at any point up to 4,000 tokens"):
        verified(store, files, run_at(tmp_path, ratio, healthy, end=500))
