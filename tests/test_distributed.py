"""Two processes train what one trains: same losses at the same global batch, with whole copies of the model and with parts of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small_world import BATCH, SEQUENCE_LENGTH, World

from pipelines.distributed import World as Processes
from pipelines.errors import GristmillError
from pipelines.manifests import Manifest
from pipelines.store import Store

STEP = BATCH * SEQUENCE_LENGTH


def curve(manifest: Manifest) -> list[float]:
    return [json.loads(line)["loss"] for line in manifest.file("metrics.jsonl").read_text().splitlines()]


def weights(manifest: Manifest) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(manifest.file("model.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_two_processes_have_the_losses_of_one(world: World, base: Manifest, tmp_path: Path, sharding: str) -> None:
    """The same fingerprint, so the same order of the data; sums are ordered otherwise, so the last bits differ."""
    request = world.general()
    settings = request.settings.model_copy(update={"processes": 2, "sharding": sharding})
    two = Store(tmp_path / "two").build(replace(request, settings=settings)).manifest
    assert two.fingerprint == base.fingerprint and two.outcome.details["processes"] == 2
    assert curve(two) == pytest.approx(curve(base), abs=2e-4)
    ours, theirs = weights(two), weights(base)
    assert set(ours) == set(theirs)
    assert all(np.allclose(ours[name], theirs[name], atol=5e-3) for name in ours)
    from safetensors import safe_open

    names = [set(safe_open(m.file("trainer/optimizer.safetensors"), "np").keys()) for m in (two, base)]
    assert names[0] == names[1]


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(world: World, base: Manifest, tmp_path: Path) -> None:
    """Stopped by its budget in one process, finished by two: the records before are kept, those after agree."""
    request = world.general()
    store = Store(tmp_path / "store")
    short = request.settings.model_copy(update={"max_seconds": 1e-3})
    with pytest.raises(GristmillError, match=r"max_seconds 0.001 are over at step \d+ of 60"):
        store.build(replace(request, settings=short))
    resume = store.root / "staging" / f"general_checkpoint-{request.fingerprint()}" / "resume"
    assert [path.name for path in resume.glob("step-*")] == ["step-00000001"]
    two = store.build(replace(request, settings=request.settings.model_copy(update={"processes": 2}))).manifest
    assert curve(two) == pytest.approx(curve(base), abs=2e-4)


def test_what_fails_in_one_process_is_said(world: World, tmp_path: Path) -> None:
    request = world.general()
    phases = ({"tokens": 4 * STEP, "learning_rate": 1e30},)
    settings = type(request.settings)(**{**dict(request.settings), "phases": phases, "processes": 2})
    with pytest.raises(GristmillError, match=r"training in 2 processes failed: step \d: .*nan.* lower learning_rate"):
        Store(tmp_path / "store").build(replace(request, settings=settings))


def test_the_shares_of_all_processes_are_the_batch() -> None:
    for size in (1, 2, 3, 4, 8):
        parts = [Processes(rank, size).share(range(48, 96)) for rank in range(size)]
        assert [n for part in parts for n in part] == list(range(48, 96))
