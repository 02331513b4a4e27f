"""A killed run resumes to the same bytes, and a checkpoint stands alone: processes of their own, as a user has them."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from small_world import BATCH, SEQUENCE_LENGTH, World, mixture_of

from pipelines.critical_ratio import RatioSettings, estimate_critical_ratio
from pipelines.encoders import load_tokenizer
from pipelines.manifests import Manifest
from pipelines.store import Build, Store

ROOT = Path(__file__).parents[1]
STEP = BATCH * SEQUENCE_LENGTH


CHILD = "import pickle, sys; request, store = pickle.load(open(sys.argv[1], 'rb')); print(store.build(request).manifest.content_sha256)"


def start(request: Build, store: Store, place: Path) -> subprocess.Popen[str]:
    """Build `request` in a process of its own."""
    place.write_bytes(pickle.dumps((request, store)))
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(place)],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def kill_after(child: subprocess.Popen[str], resume: Path, step: int) -> None:
    """Kill `child` with SIGKILL once a resume point at or beyond `step` is there."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if any(int(path.name.partition("-")[2]) >= step for path in resume.glob("step-*")):
            os.kill(child.pid, signal.SIGKILL)
            child.communicate()
            assert child.returncode == -signal.SIGKILL
            return
        if child.poll() is not None:
            raise AssertionError(f"ended before it could be killed: {child.communicate()[1]}")
        time.sleep(0.002)
    raise AssertionError("no resume point within 120 s")


@pytest.mark.slow
def test_killed_runs_resume_to_the_same_bytes(world: World, base: Manifest, tmp_path: Path) -> None:
    """Two kills, the newest resume point damaged after the second, and yet the artifact of an uninterrupted run."""
    mixture = mixture_of(world, {"wiki": 0.4, "book": 0.2, "legal": 0.4})
    changes = {"phases": ({"tokens": 80 * STEP, "learning_rate": 2e-3, "schedule": "cosine"},), "checkpoint_seconds": 0.0}
    request = world.mixture(base, mixture, **changes)
    whole = Store(tmp_path / "whole").build(world.mixture(base, mixture, **{**changes, "checkpoint_seconds": 1e9})).manifest
    assert request.fingerprint() == whole.fingerprint
    store = Store(tmp_path / "killed")
    resume = store.root / "staging" / f"pretrained_checkpoint-{request.fingerprint()}" / "resume"
    kill_after(start(request, store, tmp_path / "request"), resume, 23)
    kill_after(start(request, store, tmp_path / "request"), resume, 55)
    newest = max(path for path in resume.glob("step-*"))
    weights = newest / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    child = start(request, store, tmp_path / "request")
    output, errors = child.communicate(timeout=120)
    assert child.returncode == 0, errors
    assert f"{newest.name} passed over: model.safetensors differs" in errors
    resumed = store.current("pretrained_checkpoint")
    assert resumed.file("metrics.jsonl").read_text() == whole.file("metrics.jsonl").read_text()
    assert [json.loads(line)["step"] for line in resumed.file("metrics.jsonl").read_text().splitlines()] == list(range(10, 81, 10))
    assert output.strip() == resumed.content_sha256 == whole.content_sha256
    assert all(fault.endswith("is gone") for fault in store.verify(resumed)), "its inputs lie in another store, its files are whole"
    assert not (resumed.directory / "resume").exists()


SWEEP = "import pickle, sys; requests, store = pickle.load(open(sys.argv[1], 'rb')); [store.build(request) for request in requests]"


@pytest.mark.slow
def test_a_killed_sweep_goes_on_to_the_same_estimate(world: World, base: Manifest, tmp_path: Path) -> None:
    """Killed while its second probe trains: the first is not trained again, and the estimate is that of an undisturbed sweep."""
    requests = [world.probe(base, ratio) for ratio in (0.2, 0.5, 0.8)]

    def estimate(store: Store) -> Manifest:
        probes = tuple(store.find(request.asset, request.fingerprint()) for request in requests)
        inputs = {"probes": probes, "windows": requests[0].inputs["windows"], "selection": world.selection}
        settings = RatioSettings(draws=20, on_refusal="manual", ratio=0.5)
        return store.build(Build("critical_ratio", estimate_critical_ratio, settings, inputs=inputs)).manifest

    whole, killed = Store(tmp_path / "whole"), Store(tmp_path / "killed")
    for request in requests:
        whole.build(request)
    place = tmp_path / "requests"
    place.write_bytes(pickle.dumps((requests, killed)))
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    child = subprocess.Popen([sys.executable, "-c", SWEEP, str(place)], env={**os.environ, "PYTHONPATH": path}, stderr=subprocess.PIPE)
    second = killed.root / "staging" / f"mixture_probe-{requests[1].fingerprint()}"
    deadline = time.monotonic() + 120
    while not any(second.glob("*")) and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()
    assert child.returncode == -signal.SIGKILL
    kept = killed.find("mixture_probe", requests[0].fingerprint())
    assert kept is not None and killed.find("mixture_probe", requests[1].fingerprint()) is None
    built = [killed.build(request) for request in requests]
    assert [found.hit for found in built] == [True, False, False]
    assert [found.manifest.content_sha256 for found in built] == [
        whole.find("mixture_probe", request.fingerprint()).content_sha256 for request in requests
    ]
    assert estimate(killed).content_sha256 == estimate(whole).content_sha256


ALONE = """
import json, sys

class Refused:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("pipelines", "assets_defs"):
            raise ImportError(f"{name} belongs to the project")

sys.meta_path.insert(0, Refused())
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = tokenizer(sys.argv[2], return_tensors="pt")["input_ids"][:, :32]
with torch.no_grad():
    loss = model(input_ids=ids, labels=ids).loss.item()
made = model.generate(ids[:, :8], max_new_tokens=12, do_sample=False)
print(json.dumps({"loss": loss, "text": tokenizer.decode(made[0]), "tokens": made.shape[1], "ids": ids[0].tolist()}))
"""


def test_the_checkpoint_needs_nothing_of_this_project(base: Manifest, world: World, tmp_path: Path) -> None:
    """In a process that cannot import this project: it opens, generates, and gives the loss that is computed here."""
    from transformers import AutoModelForCausalLM

    text = "The history of the city begins with a small settlement on the river, as the oldest records of the county say."
    done = subprocess.run(
        [sys.executable, "-I", "-c", ALONE, str(base.directory), text], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    model = AutoModelForCausalLM.from_pretrained(base.directory).eval()
    assert found["ids"] == load_tokenizer(world.tokenizer.directory).encode(text).ids[:32]
    ids = torch.tensor([found["ids"]])
    with torch.no_grad():
        logits = model(ids).logits[0, :-1]
    assert found["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, ids[0, 1:]).item(), abs=1e-5)
    assert found["tokens"] > 8 and found["text"].startswith(text[:5])
