"""The loop: accumulation, phases, guard rails, documents set aside, kept checkpoints, budgets, and resuming across all of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small_world import BATCH, MODEL, SEQUENCE_LENGTH, World, in_pieces

from pipelines.errors import EmptyInput, GristmillError
from pipelines.guards import Guard
from pipelines.manifests import Manifest
from pipelines.plan import GuardSettings, Plan, TrainingSettings
from pipelines.run_records import read_records
from pipelines.shares import role_shares
from pipelines.store import Build, Store
from pipelines.trainer import Run
from pipelines.training import GeneralSettings, dry_run_checkpoint

STEP = BATCH * SEQUENCE_LENGTH
BIPHASIC = (
    {"tokens": 15 * STEP, "learning_rate": 3e-3},
    {"tokens": 15 * STEP, "learning_rate": 2e-3, "objective": "masked", "attention": "document"},
)


def asked(world: World, **changes: object) -> Build:
    """Return the request for a general checkpoint with other settings."""
    request = world.general()
    settings = {name: getattr(request.settings, name) for name in GeneralSettings.model_fields}
    return replace(request, settings=GeneralSettings.model_validate({**settings, **changes}))


def built(world: World, **changes: object) -> Manifest:
    return world.store.build(asked(world, **changes)).manifest


def records(manifest: Manifest, name: str = "metrics.jsonl") -> list[dict]:
    return read_records(manifest.directory / name)


def opened(world: World, **changes: object) -> Run:
    request = asked(world, **changes)
    return Run(request.settings, role_shares(world.selection)["general"], world.selection[:1], world.shards, world.tokenizer, None)


# The step


def test_accumulated_gradients_are_those_of_the_whole_batch(world: World, base: Manifest) -> None:
    whole = [record["loss"] for record in records(base)]
    assert [r["loss"] for r in records(built(world, micro_batch_sequences=1))] == pytest.approx(whole, abs=2e-4)
    assert [r["loss"] for r in records(built(world, micro_batch_sequences=3))] == pytest.approx(whole, abs=2e-4)


def test_activation_checkpointing_changes_no_loss(world: World, base: Manifest) -> None:
    found = built(world, activation_checkpointing=True)
    assert [r["loss"] for r in records(found)] == pytest.approx([r["loss"] for r in records(base)], abs=1e-5)


def test_losses_by_domain_are_those_of_the_steps_since_the_last_record(base: Manifest) -> None:
    for record in records(base):
        assert set(record["domains"]) == {"wiki", "book"} and all(0 < loss < 10 for loss in record["domains"].values())


@pytest.mark.parametrize("architecture", ["gpt2", "bert", "modernbert"])
def test_other_architectures_train_and_open_in_transformers(world: World, architecture: str) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    masked = architecture != "gpt2"
    phases = ({"tokens": 30 * STEP, "learning_rate": 3e-3, "objective": "masked" if masked else "causal"},)
    manifest = built(world, model=MODEL.model_copy(update={"architecture": architecture, "dropout": 0.1}), phases=phases)
    losses = [record["loss"] for record in records(manifest)]
    assert losses[-1] < losses[0] - 0.1
    model = (AutoModelForMaskedLM if masked else AutoModelForCausalLM).from_pretrained(manifest.directory, local_files_only=True)
    assert model.config.model_type == architecture


# Phases


def test_a_plan_by_hand() -> None:
    phases = ({"tokens": 10 * 8, "learning_rate": 1.0}, {"tokens": 5 * 8 + 7, "learning_rate": 2.0, "schedule": "linear"})
    plan = Plan(TrainingSettings(phases=phases, sequence_length=4, batch_sequences=2))
    assert plan.phase_steps == [10, 5] and plan.num_steps == 15
    assert [plan.phase_at(step) for step in (0, 9, 10, 14)] == [(0, 0), (0, 0), (1, 10), (1, 10)]
    assert [plan.rate(step) for step in (9, 10, 14)] == pytest.approx([1.0, 2.0, 2.0 * (1 - 0.9 * 4 / 5)])
    assert Plan(plan.settings.model_copy(update={"max_tokens": 12 * 8})).num_steps == 12
    with pytest.raises(GristmillError, match="step 15 lies beyond the plan of 15 steps"):
        plan.phase_at(15)


def test_phases_may_have_mixtures_of_their_own(world: World) -> None:
    phases = (
        {"tokens": 20 * STEP, "learning_rate": 1e-3, "mixture": {"wiki": 3, "book": 1}},
        {"tokens": 20 * STEP, "learning_rate": 1e-3, "mixture": {"book": 1}},
    )
    run = opened(world, phases=phases)
    read = np.asarray(run.order.domains)[run.order.assignment]
    assert [(read[:80] == "wiki").sum(), (read[80:] == "wiki").sum()] == [60, 0]
    books = run.order.positions[read == "book"]
    assert books.tolist() == list(range(100))  # the second phase goes on where the first one stopped


@pytest.mark.slow
def test_a_biphasic_run_resumes_across_the_switch_to_the_same_bytes(world: World, tmp_path: Path) -> None:
    """Causal, then masked within documents, with dropout: nothing drawn depends on where the run was interrupted."""
    from transformers import AutoModelForCausalLM

    request = asked(world, phases=BIPHASIC, model=MODEL.model_copy(update={"dropout": 0.1}))
    whole = world.store.build(request).manifest
    pieces, times = in_pieces(request, Store(tmp_path / "pieces"), seconds=0.05)
    assert times > 3 and pieces.content_sha256 == whole.content_sha256
    assert not AutoModelForCausalLM.from_pretrained(whole.directory).config.is_causal
    assert not (whole.directory / "samples.jsonl").exists()  # a model that sees both sides continues nothing


# Guard rails


def test_a_guard_by_hand() -> None:
    guard = Guard(GuardSettings(spike_steps=8, spike_sigmas=3.0, on_spike="skip", on_nan="rewind"))
    for loss in (1.0, 1.2, 0.8):
        assert guard.judge(loss, 1.0)[0] == "go on"
    assert guard.judge(99.0, 1.0)[0] == "go on"  # too early to say
    guard.losses.clear()
    for loss in (1.0, 1.2, 0.8, 1.0):  # mean 1.0, standard deviation 0.163
        guard.judge(loss, 1.0)
    action, reason = guard.judge(1.6, 1.0)
    assert action == "skip" and "loss 1.6 after a mean of 1 " in reason and list(guard.losses) == [1.0, 1.2, 0.8, 1.0]
    assert guard.judge(1.45, 1.0)[0] == "go on"
    assert guard.judge(1.0, float("nan"))[0] == "rewind" and guard.judge(float("inf"), 1.0)[0] == "rewind"
    state = json.loads(json.dumps(guard.state()))
    twin = Guard(guard.settings)
    twin.restore(state)
    assert twin.judge(1.6, 1.0) == guard.judge(1.6, 1.0) and twin.losses == guard.losses


def test_documents_of_a_bad_batch_are_named(world: World) -> None:
    """A run of ordinary text with a hair-trigger: each event names the documents that its batch really shows."""
    guards = {"on_spike": "report", "spike_sigmas": 1.0, "spike_steps": 8}
    manifest = built(world, guards=guards)
    events = records(manifest, "events.jsonl")
    assert events and manifest.counts["events"] == len(events) and {event["action"] for event in events} == {"report"}
    run = opened(world, guards=guards)
    for event in events[:3]:
        shown = {f"{name} ({domain})" for domain, name in run.order.documents(run.order.sequences(event["step"]))}
        assert set(event["documents"]) == shown and event["num_documents"] == len(shown)


@pytest.mark.slow
@pytest.mark.parametrize("action", ["skip", "rewind"])
def test_interventions_resume_to_the_same_bytes(world: World, base: Manifest, tmp_path: Path, action: str) -> None:
    guards = {"on_spike": action, "spike_sigmas": 2.5, "spike_steps": 16, "max_events": 40, "rewind_every": 4, "replaced_batches": 3}
    request = asked(world, guards=guards)
    whole = world.store.build(request).manifest
    assert {event["action"] for event in records(whole, "events.jsonl")} == {action}
    assert [r["step"] for r in records(whole)] == list(range(10, 61, 10))
    assert records(whole)[-1]["loss"] != records(base)[-1]["loss"]
    pieces, times = in_pieces(request, Store(tmp_path / "pieces"), seconds=0.05)
    assert times > 2 and pieces.content_sha256 == whole.content_sha256


def test_too_many_interventions_stop_the_run(world: World) -> None:
    guards = {"on_spike": "skip", "spike_sigmas": 0.1, "spike_steps": 8, "max_events": 2}
    with pytest.raises(GristmillError, match=r"Training stopped: lower learning_rate"):
        built(world, guards=guards)


# What is looked at along the run


def test_validation_documents_are_never_trained_on(world: World) -> None:
    run = opened(world, validation={"fraction": 0.3, "every_steps": 20, "windows_per_domain": 4})
    read = {name for _, name in run.order.documents(range(len(run.order.assignment)))}
    aside = {name for pool in run._pools[1].values() for name, _ in pool.names(np.arange(len(pool)))}
    assert read and aside and not read & aside
    with pytest.raises(EmptyInput, match=r"validation fraction of 1e-09 leaves no validation document"):
        built(world, validation={"fraction": 1e-9})


def test_checkpoints_are_kept_by_policy_and_the_run_stops_early(world: World, tmp_path: Path) -> None:
    """A rate that ruins the model: the best checkpoint is an early one, and patience ends the run."""
    from transformers import AutoModelForCausalLM

    phases = ({"tokens": 20 * STEP, "learning_rate": 3e-3}, {"tokens": 60 * STEP, "learning_rate": 1.0})
    changes = {
        "phases": phases,
        "validation": {"fraction": 0.3, "every_steps": 5, "windows_per_domain": 4, "patience": 2},
        "retention": {"last": 2, "every_steps": 10, "best": True},
    }
    manifest = built(world, **changes)
    measured = {record["step"]: record["loss"] for record in records(manifest, "validation.jsonl")}
    best = min(measured, key=measured.get)
    assert manifest.outcome.details["stopped_early"] and manifest.counts["steps"] == best + 10 == max(measured)
    kept = sorted(path.name for path in (manifest.directory / "checkpoints").iterdir())
    assert kept == ["best", *(f"step-{step:08d}" for step in range(10, best + 11, 10))]
    model = AutoModelForCausalLM.from_pretrained(manifest.directory / "checkpoints" / "best", local_files_only=True)
    run = opened(world, **changes)
    run.model.load_state_dict(model.state_dict())
    assert np.mean([run.window_losses(w).mean() for w in run.validation_windows.values()]) == pytest.approx(measured[best], abs=1e-4)
    pieces, times = in_pieces(asked(world, **changes), Store(tmp_path / "pieces"), seconds=0.05)
    assert times > 1 and pieces.content_sha256 == manifest.content_sha256


def test_samples_continue_the_prompts(world: World) -> None:
    manifest = built(world, samples={"prompts": ["The history of", "A"], "every_steps": 30, "max_new_tokens": 5})
    rows = records(manifest, "samples.jsonl")
    assert [(row["step"], row["prompt"]) for row in rows] == [(step, prompt) for step in (30, 60) for prompt in ("The history of", "A")]
    assert all(row["continuation"] for row in rows)
    assert not (built(world, samples={"max_new_tokens": 0}).directory / "samples.jsonl").exists()


def test_a_dry_run_tells_what_the_run_then_has(world: World, base: Manifest) -> None:
    shares = role_shares(world.selection)["general"]
    found = dry_run_checkpoint(
        world.general().settings, shares, selection=world.selection[:1], shards=world.shards, tokenizer=world.tokenizer
    )
    assert found["parameters"] == base.counts["parameters"] and found["tokens"] == base.counts["tokens"]
    assert found["domains"] == base.outcome.tables["domains"] and found["steps"] == 60
    assert found["estimated_seconds"] > 0 and found["memory_bytes"] > 1e8 and found["flops"] > 6 * 20_000 * found["tokens"]


def test_settings_that_cannot_work_are_refused(world: World) -> None:
    for changes, words in (
        ({"processes": 3}, "batch_sequences 4 is no multiple of processes 3"),
        ({"retention": {"best": True}}, "retention.best needs validation.fraction above 0"),
        ({"phases": ({"tokens": 1, "learning_rate": 1, "mixture": {"wiki": -1}},)}, "needs shares of at least 0"),
    ):
        with pytest.raises(ValueError, match=words):
            asked(world, **changes)
    with pytest.raises(GristmillError, match="device cuda: process 0 of this machine has no GPU"):
        opened(world, device="cuda")
