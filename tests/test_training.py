"""Training: the fused loss against autograd, exact shares, resume to the same bytes, a checkpoint that stands alone."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_world import BATCH, MODEL, SEQUENCE_LENGTH, World, mixture_of, publish, run

from pipelines import training
from pipelines.data_order import assign_sequences
from pipelines.errors import EmptyInput, GristmillError
from pipelines.manifests import Manifest, Member
from pipelines.shares import mixed_shares, role_shares
from pipelines.store import Store

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STEP = BATCH * SEQUENCE_LENGTH


def records(manifest: Manifest) -> list[dict[str, float]]:
    return [json.loads(line) for line in manifest.file("metrics.jsonl").read_text().splitlines()]


def opened(manifest: Manifest) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(manifest.directory, local_files_only=True).eval()


# Shares


def shares_of(weights: list[float]) -> dict[str, float]:
    return {f"d{number:02d}": weight / sum(weights) for number, weight in enumerate(weights)}


@settings(max_examples=150, deadline=None)
@given(weights=st.lists(st.floats(1e-4, 1.0) | st.sampled_from([0.5, 1.0]), min_size=1, max_size=20), count=st.integers(0, 400))
def test_every_prefix_is_within_one_sequence_of_its_shares(weights: list[float], count: int) -> None:
    shares = shares_of(weights)
    chosen = assign_sequences(shares, count)
    given = np.cumsum(np.eye(len(shares), dtype=np.int64)[chosen], axis=0)
    exact = np.arange(1, count + 1)[:, None] * np.asarray(list(shares.values()))
    assert count == 0 or np.abs(given - exact).max() < 1.0
    assert assign_sequences(shares, count // 2).tolist() == chosen[: count // 2].tolist()


def test_the_greedy_rule_breaks_where_this_one_holds() -> None:
    """Shares at which always taking the domain furthest behind strays by 1.10 sequences."""
    shares = shares_of([1e-4, 1e-4, 0.009, 0.0078, 0.0523, 0.0003, 0.0019, 0.002, 0.2626, 0.2626, 0.0001, 0.2047, 0.1968])
    given = np.cumsum(np.eye(13)[assign_sequences(shares, 3000)], axis=0)
    assert np.abs(given - np.arange(1, 3001)[:, None] * np.asarray(list(shares.values()))).max() <= 1 - 1 / 24 + 1e-6


def test_assignment_by_hand() -> None:
    assert assign_sequences({"a": 0.5, "b": 0.5}, 4).tolist() in ([0, 1, 0, 1], [0, 1, 1, 0])
    assert np.bincount(assign_sequences({"a": 0.25, "b": 0.75}, 1000)).tolist() == [250, 750]
    assert assign_sequences({"a": 0.0, "b": 1.0}, 5).tolist() == [1] * 5
    assert assign_sequences({"only": 1.0}, 3).tolist() == [0, 0, 0]


@given(
    ratio=st.floats(0, 1),
    general=st.lists(st.floats(0.01, 1), min_size=1, max_size=4),
    target=st.lists(st.floats(0.01, 1), min_size=1, max_size=3),
)
def test_mixed_shares_sum_to_one_and_keep_proportions(ratio: float, general: list[float], target: list[float]) -> None:
    roles = {
        "general": {f"g{n}": w / sum(general) for n, w in enumerate(general)},
        "target": {f"t{n}": w / sum(target) for n, w in enumerate(target)},
    }
    shares = mixed_shares(roles, ratio)
    assert sum(shares.values()) == pytest.approx(1.0)
    assert sum(share for domain, share in shares.items() if domain[0] == "t") == pytest.approx(ratio, abs=1e-12)
    for name, inside in roles["general"].items():
        assert shares.get(name, 0.0) == pytest.approx((1 - ratio) * inside)
    assert list(shares) == sorted(shares)


def test_mixed_shares_need_the_roles_they_read() -> None:
    assert mixed_shares({"general": {"wiki": 1.0}}, 0.0) == {"wiki": 1.0}
    with pytest.raises(EmptyInput, match="no target passage"):
        mixed_shares({"general": {"wiki": 1.0}}, 0.3)


def test_role_shares_count_selected_tokens(world: World) -> None:
    rows = pq.read_table(world.selection[0].path).to_pylist()
    tokens = {domain: sum(row["tokens"] for row in rows if row["domain"] == domain) for domain in ("wiki", "book")}
    found = role_shares(world.selection)
    assert found["general"]["wiki"] == pytest.approx(tokens["wiki"] / sum(tokens.values())) and found["target"] == {"legal": 1.0}


# The loop


def test_a_tiny_model_learns(base: Manifest) -> None:
    losses = [record["loss"] for record in records(base)]
    assert losses[-1] < losses[0] - 0.5
    assert all(check.passed for check in base.checks)
    assert base.counts["steps"] == 60 and base.counts["tokens"] == 60 * STEP


def test_a_handful_of_sequences_is_learnt_by_heart(world: World) -> None:
    """Overfit: a few passages, many epochs, a loss far below what any other text would give."""
    rows = [row for row in pq.read_table(world.selection[0].path).to_pylist() if row["domain"] == "wiki"]
    subset = publish(world.store, "selected_subset", {"general.parquet": rows[:1]})
    request = world.general(training.GeneralSettings(model=MODEL, **run(tokens=150 * STEP, learning_rate=1e-2)))
    few = replace(request, inputs={**request.inputs, "selection": (Member(manifest=subset, name="general.parquet"),)})
    manifest = world.store.build(few).manifest
    assert records(manifest)[-1]["loss"] < 0.5
    assert manifest.outcome.tables["domains"][0]["epochs"] > 20


def test_rates_follow_the_schedule_over_phases(world: World) -> None:
    phases = (
        {"tokens": 20 * STEP, "learning_rate": 2e-3, "schedule": "constant", "schedule_settings": {"warmup_fraction": 0.5}},
        {"tokens": 20 * STEP, "learning_rate": 1e-3, "schedule": "linear", "schedule_settings": {"floor": 0.0}},
    )
    manifest = world.store.build(world.general(training.GeneralSettings(model=MODEL, **{**run(), "phases": phases}))).manifest
    rates = {record["step"]: record["learning_rate"] for record in records(manifest)}
    assert rates == pytest.approx({10: 2e-3 * 10 / 11, 20: 2e-3, 30: 1e-3 * (1 - 9 / 20), 40: 1e-3 * (1 - 19 / 20)})


def test_a_loss_that_is_not_finite_stops_the_run(world: World) -> None:
    request = world.general(training.GeneralSettings(model=MODEL, **run(learning_rate=1e30)))
    with pytest.raises(GristmillError, match=r"step \d+: .*nan; its \d+ documents begin with .*lower learning_rate \(1e\+30\)"):
        world.store.build(request)
    assert not world.store.find("general_checkpoint", request.fingerprint())


def test_no_model_and_no_base_is_an_error(world: World) -> None:
    with pytest.raises(GristmillError, match="`model` settings"):
        world.store.build(world.general(training.GeneralSettings(model=None, **run())))


def test_too_little_text_names_the_domain(world: World) -> None:
    settings = training.GeneralSettings(
        model=MODEL, **{**run(tokens=10 * 200_000, learning_rate=1e-3), "sequence_length": 200_000, "batch_sequences": 1}
    )
    with pytest.raises(EmptyInput, match="book: .* do not fill one window of 200000"):
        world.store.build(world.general(settings))


def test_a_selection_without_the_wanted_domain_is_an_error(world: World, base: Manifest) -> None:
    mixture = mixture_of(world, {"legal": 0.5, "patents": 0.5})
    with pytest.raises(EmptyInput, match="no selected passage of patents"):
        world.store.build(world.mixture(base, mixture))


def test_seed_changes_the_weights_and_the_time_between_resume_points_does_not(world: World, tmp_path: Path) -> None:
    short = run(tokens=12 * STEP)
    hashes = []
    for number, changes in enumerate(({}, {"checkpoint_seconds": 0.0}, {"seed": 1})):
        request = world.general(training.GeneralSettings(model=MODEL, **{**short, **changes}))
        hashes.append(Store(tmp_path / str(number)).build(request).manifest.content_sha256)
    assert hashes[0] == hashes[1] != hashes[2]


def test_training_leaves_the_arithmetic_of_the_process_alone(base: Manifest) -> None:
    """Denormals are flushed while a model runs, not after: the smallest of them is still a number."""
    assert base.counts["steps"] and np.float64(2.0**-1070) * 0.5 > 0


# Probes


def test_the_base_optimizer_state_is_carried_over(world: World, base: Manifest) -> None:
    """After 60 + 20 steps the counts of Adam stand at 80, not at 20."""
    from safetensors.torch import load_file

    manifest = world.store.build(world.mixture(base, mixture_of(world, {"wiki": 0.5, "legal": 0.5}))).manifest
    state = load_file(manifest.file("trainer/optimizer.safetensors"))
    assert {float(value) for key, value in state.items() if key.endswith("/step")} == {80.0}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_compiled_run_learns_the_same_and_its_checkpoint_is_plain(world: World, base: Manifest) -> None:
    from safetensors import safe_open

    request = world.general()
    compiled = world.store.build(replace(request, settings=request.settings.model_copy(update={"compile": True}))).manifest
    curves = [[json.loads(line)["loss"] for line in m.file("metrics.jsonl").read_text().splitlines()] for m in (compiled, base)]
    assert curves[0] == pytest.approx(curves[1], abs=1e-3)
    with safe_open(compiled.file("model.safetensors"), "pt") as one, safe_open(base.file("model.safetensors"), "pt") as other:
        assert set(one.keys()) == set(other.keys())
