"""Checkpoints: what comes back is what was saved, whatever is killed, damaged, full, or spread over processes."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import mounted_disk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines import checkpoints
from pipelines.checkpoints import CheckpointWriter, RetentionSettings, TrainingState
from pipelines.errors import GristmillError, OutOfSpace
from pipelines.files import is_out_of_space

ROOT = Path(__file__).parents[1]
LAST_TWO = RetentionSettings()
FILES = ["checksums.json", "model.safetensors", "optimizer.safetensors", "state.json"]


class Tied(torch.nn.Module):
    """An embedding whose weight is the head's, as in the models that are trained here."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = torch.nn.Embedding(7, 4)
        self.middle = torch.nn.Linear(4, 4)
        self.head = torch.nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.ones(1))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.middle(self.embedding(ids))) * self.scale


def trained(steps: int, *, seed: int = 0) -> tuple[Tied, torch.optim.Optimizer]:
    model = Tied(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    train(model, optimizer, 0, steps)
    return model, optimizer


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, first: int, steps: int) -> None:
    for step in range(first, first + steps):
        ids = torch.arange(step, step + 5) % 7
        torch.nn.functional.cross_entropy(model(ids), (ids + 1) % 7).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def state_of(step: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer, **loop: object) -> TrainingState:
    return TrainingState(step, checkpoints.full_model_state(model), checkpoints.full_optimizer_state(model, optimizer), loop)


def save(directory: Path, *steps: int, retention: RetentionSettings = LAST_TWO) -> None:
    with CheckpointWriter(directory, retention) as writer:
        for step in steps:
            writer.save(state_of(step, *trained(3), losses=[1.5, float("inf")]))


def filled(step: int, *, size: int = 1000) -> TrainingState:
    """Return a state whose tensors tell which step they are of."""
    return TrainingState(step, {"w": torch.full((size,), float(step))}, {"w/m": torch.full((size,), -float(step))}, {})


def steps_in(directory: Path) -> list[int]:
    return sorted(int(path.name.partition("-")[2]) for path in directory.glob("step-*"))


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


# What is saved comes back


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    whole, optimizer = trained(12)
    with CheckpointWriter(tmp_path, LAST_TWO) as writer:
        writer.save(state_of(5, *trained(5), phase="second", losses=[0.1, 1e-300]))
    state = checkpoints.latest_state(tmp_path)
    assert (state.step, state.loop) == (5, {"phase": "second", "losses": [0.1, 1e-300]})
    other = Tied(seed=99)
    resumed = torch.optim.AdamW(other.parameters(), lr=0.01, fused=True)
    checkpoints.load_model_state(other, state.model)
    checkpoints.load_optimizer_state(other, resumed, state.optimizer)
    assert other.head.weight is other.embedding.weight
    train(other, resumed, state.step, 7)
    assert same(checkpoints.full_model_state(other), checkpoints.full_model_state(whole))
    assert same(checkpoints.full_optimizer_state(other, resumed), checkpoints.full_optimizer_state(whole, optimizer))


@pytest.mark.parametrize("background", [True, False])
def test_what_is_written_is_the_state_when_it_was_saved(tmp_path: Path, background: bool) -> None:
    """Every tensor is changed in place, again and again, while the write goes on."""
    state = filled(1, size=4_000_000)
    with CheckpointWriter(tmp_path, RetentionSettings(last=20), background=background) as writer:
        for step in range(1, 6):
            writer.save(TrainingState(step, state.model, state.optimizer, {"step": step}))
            for _ in range(3):
                for tensor in (*state.model.values(), *state.optimizer.values()):
                    tensor += 0.25
            state.model["w"].fill_(step + 1)
            state.optimizer["w/m"].fill_(-step - 1)
    for step in range(1, 6):
        found = checkpoints.latest_state(tmp_path, step=step)
        assert found.loop == {"step": step}
        assert (found.model["w"] == step).all() and (found.optimizer["w/m"] == -step).all()
    assert checkpoints.latest_state(tmp_path, step=7) is None


def test_names_are_those_of_the_model_whatever_wraps_it(tmp_path: Path) -> None:
    model, optimizer = trained(2)
    names = ["embedding.weight", "middle.weight", "middle.bias", "scale"]
    assert sorted(checkpoints.full_model_state(model)) == sorted(names)
    fields = checkpoints.full_optimizer_state(model, optimizer)
    assert {key.rpartition("/")[0] for key in fields} == set(names) - {"scale"}
    compiled = torch.compile(model)
    assert same(checkpoints.full_model_state(compiled), checkpoints.full_model_state(model))
    model.middle = torch.compile(model.middle)
    assert sorted(checkpoints.full_model_state(model)) == sorted(names)
    assert sorted(checkpoints.full_optimizer_state(compiled, optimizer)) == sorted(fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("middle.bias"), r"1 tensors are missing \['middle.bias'\]"),
        (lambda state: state.update(extra=torch.zeros(1)), r"1 are unknown \['extra'\]"),
        (lambda state: state.update({"middle.bias": torch.zeros(5)}), r"middle.bias has shape \(5,\), the model's is \(4,\)"),
    ],
)
def test_a_state_of_another_model_is_refused(change: object, message: str) -> None:
    model, optimizer = trained(1)
    state = checkpoints.full_model_state(model)
    change(state)
    with pytest.raises(GristmillError, match=message):
        checkpoints.load_model_state(Tied(), state)
    with pytest.raises(GristmillError, match="'gone/exp_avg': no such parameter"):
        checkpoints.load_optimizer_state(model, optimizer, {"gone/exp_avg": torch.zeros(1)})
    optimizer.state[model.middle.bias]["count"] = 3
    with pytest.raises(GristmillError, match=r"holds 'count' \(int\) of middle.bias"):
        checkpoints.full_optimizer_state(model, optimizer)


def test_the_counter_of_an_optimizer_stays_where_it_keeps_it() -> None:
    """torch keeps it on the CPU for one kernel and on the device for another; and it has no shape."""
    for fused in (True, False):
        model = Tied()
        optimizer = torch.optim.AdamW(model.parameters(), fused=fused, foreach=False)
        train(model, optimizer, 0, 2)
        other = Tied()
        loaded = torch.optim.AdamW(other.parameters(), fused=fused, foreach=False)
        checkpoints.load_optimizer_state(other, loaded, checkpoints.full_optimizer_state(model, optimizer))
        assert {float(entry["step"]) for entry in loaded.state.values()} == {2.0}
        train(other, loaded, 2, 1)


# Which are kept


def test_the_last_ones_are_kept(tmp_path: Path) -> None:
    save(tmp_path / "two", 10, 20, 30, 1000)
    assert steps_in(tmp_path / "two") == [30, 1000]
    assert checkpoints.latest_state(tmp_path / "two").step == 1000
    save(tmp_path / "four", 99_999_998, 99_999_999, 100_000_000, 100_000_001, 100_000_002, retention=RetentionSettings(last=4))
    assert steps_in(tmp_path / "four") == [99_999_999, 100_000_000, 100_000_001, 100_000_002]
    assert checkpoints.latest_state(tmp_path / "four").step == 100_000_002
    save(tmp_path / "one", 1, 2, 2, retention=RetentionSettings(last=1))
    assert steps_in(tmp_path / "one") == [2]


def test_nothing_there_is_no_point(tmp_path: Path) -> None:
    assert checkpoints.latest_state(tmp_path / "absent") is None


def test_how_many_are_kept_to_resume_is_not_part_of_what_a_run_is() -> None:
    assert RetentionSettings(last=5).model_dump() == {"every_steps": None, "best": False}


# Damage


def damage(point: Path, kind: str) -> None:
    weights, sums = point / "model.safetensors", point / "checksums.json"
    content = bytearray(weights.read_bytes())
    if kind == "flipped bit":
        content[len(content) // 2] ^= 1
        weights.write_bytes(content)
    if kind == "truncated":
        weights.write_bytes(content[:-10])
    if kind == "missing file":
        (point / "optimizer.safetensors").unlink()
    if kind == "another file":
        (point / "extra.safetensors").write_bytes(content)
    if kind == "no checksums":
        sums.unlink()
    if kind == "torn checksums":
        sums.write_text(sums.read_text()[:30])
    if kind == "another format":
        sums.write_text(json.dumps({**json.loads(sums.read_text()), "format": 2}))
    if kind == "no object":
        sums.write_text("[]")
    if kind == "torn state":
        (point / "state.json").write_text('{"step"')
    if kind == "a file left out":
        found = json.loads(sums.read_text())
        del found["files"]["state.json"]
        (point / "state.json").unlink()
        sums.write_text(json.dumps(found))
    if kind == "another step":
        other = point.with_name("step-00000015")
        shutil.copytree(other if other.exists() else point, point.with_name("copy"))
        shutil.rmtree(point)
        point.with_name("copy").rename(point.with_name(f"step-{int(point.name[5:]) + 1:08d}"))
    if kind == "empty":
        for path in point.iterdir():
            path.unlink()


FAULTS = {
    "flipped bit": "model.safetensors differs from its checksum",
    "truncated": "model.safetensors differs from its checksum",
    "missing file": "optimizer.safetensors is missing",
    "another file": "extra.safetensors is not among its checksums",
    "no checksums": "no readable checksums.json",
    "torn checksums": "no readable checksums.json",
    "another format": "checksums.json has format 2; known: 1",
    "no object": "checksums.json has format []; known: 1",
    "torn state": "state.json differs from its checksum",
    "a file left out": "state.json is missing",
    "another step": "it holds step",
    "empty": "no readable checksums.json",
}


@pytest.mark.parametrize("kind", list(FAULTS))
def test_a_damaged_point_is_passed_over_and_named(tmp_path: Path, capfd: pytest.CaptureFixture[str], kind: str) -> None:
    save(tmp_path, 10, 20)
    damage(tmp_path / "step-00000020", kind)
    assert checkpoints.latest_state(tmp_path).step == 10
    assert f"{'step-00000021' if kind == 'another step' else 'step-00000020'} passed over: {FAULTS[kind]}" in capfd.readouterr().err
    damage(tmp_path / "step-00000010", kind)
    assert checkpoints.latest_state(tmp_path) is None


def test_damaged_points_do_not_push_out_good_ones(tmp_path: Path) -> None:
    """A run that fell back behind two damaged points keeps what it writes from there."""
    save(tmp_path, 100, 110)
    for step in (100, 110):
        damage(tmp_path / f"step-{step:08d}", "flipped bit")
    save(tmp_path, 40)
    assert checkpoints.latest_state(tmp_path).step == 40
    save(tmp_path, 50)
    assert steps_in(tmp_path) == [40, 50]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), name=st.sampled_from(FILES))
def test_any_flipped_bit_is_seen(tmp_path: Path, place: float, bit: int, name: str) -> None:
    save(tmp_path, 1, 2)
    path = tmp_path / "step-00000002" / name
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1 << bit
    path.write_bytes(content)
    assert checkpoints.latest_state(tmp_path).step == 1


def test_a_point_of_other_arithmetic_is_used_and_said(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Another torch or another instruction set may round otherwise."""
    save(tmp_path, 3)
    point = tmp_path / "step-00000003"
    content = (point / "state.json").read_text().replace(torch.__version__, "1.0")
    (point / "state.json").write_text(content)
    sums = json.loads((point / "checksums.json").read_text())
    sums["files"]["state.json"] = checkpoints.sha256_file(point / "state.json")
    (point / "checksums.json").write_text(json.dumps(sums))
    assert checkpoints.latest_state(tmp_path).step == 3
    assert "the last bits of what follows may differ" in capfd.readouterr().err


# Kills


WRITER = """
import sys
from pathlib import Path
import torch
from pipelines.checkpoints import CheckpointWriter, RetentionSettings, TrainingState
directory = Path(sys.argv[1])
weight = torch.zeros(3_000_000)
with CheckpointWriter(directory / "resume", RetentionSettings(), carried=(directory / "records", directory / "kept")) as writer:
    (directory / "kept" / "one").mkdir(parents=True)
    step = 0
    while True:
        step += 1
        weight.fill_(step)
        with (directory / "records").open("a") as file:
            file.write(f"{step}\\n")
        (directory / "kept" / "one" / str(step)).write_text(str(step))
        writer.save(TrainingState(step, {"w": weight}, {"w/m": weight}, {"step": step}))
        print(step, flush=True)
"""


@pytest.mark.parametrize("moment", ["while staged", 0.0, 0.03, 0.08])
def test_a_writer_killed_at_any_moment_leaves_a_whole_point(tmp_path: Path, moment: str | float) -> None:
    """What is found is at most one behind the last that was handed over, and holds what belonged to its step."""
    child = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    reported = [child.stdout.readline(), child.stdout.readline(), child.stdout.readline()]
    deadline = time.monotonic() + 20
    while moment == "while staged" and time.monotonic() < deadline and not list((tmp_path / "resume").glob(".step-*/model.*")):
        pass
    if moment != "while staged":
        time.sleep(moment)
    os.kill(child.pid, signal.SIGKILL)
    reported += child.communicate()[0].splitlines()
    partial = list((tmp_path / "resume").glob(".step-*"))
    assert partial or moment != "while staged"
    state = checkpoints.latest_state(tmp_path / "resume")
    assert state.step >= max(int(line) for line in reported if line.strip()) - 1
    assert (state.model["w"] == state.step).all() and (state.optimizer["w/m"] == state.step).all()
    checkpoints.restore_carried(tmp_path / "resume", state.step, (tmp_path / "records", tmp_path / "kept"))
    assert (tmp_path / "records").read_text().split() == [str(step) for step in range(1, state.step + 1)]
    assert {path.name for path in (tmp_path / "kept" / "one").iterdir()} == {str(step) for step in range(1, state.step + 1)}
    CheckpointWriter(tmp_path / "resume", LAST_TWO).close()
    assert not list((tmp_path / "resume").glob(".*"))


# What goes wrong in the background


def test_what_the_thread_fails_with_is_raised_by_the_next_call(tmp_path: Path) -> None:
    """A tensor of a kind that safetensors does not know cannot be written."""
    odd = TrainingState(2, {"w": torch.zeros(3).to_sparse()}, {}, {})
    for call in ("save", "flush", "close"):
        writer = CheckpointWriter(tmp_path, LAST_TWO)
        writer.save(filled(1), wait=True)
        unwritable = TrainingState(2, {"w": torch.zeros(3, dtype=torch.complex128)}, {}, {})
        writer.save(unwritable)
        with pytest.raises(Exception, match=r"(?i)complex"):
            writer.save(filled(3)) if call == "save" else getattr(writer, call)()
        writer.close()
        assert steps_in(tmp_path) == [1] and not list(tmp_path.glob(".*"))
    with CheckpointWriter(tmp_path, LAST_TWO) as writer, pytest.raises((RuntimeError, NotImplementedError)):
        writer.save(odd, wait=True)


def test_what_ends_the_run_is_not_hidden_by_the_writer(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="of the loop") as caught, CheckpointWriter(tmp_path, LAST_TWO) as writer:
        writer.save(TrainingState(2, {"w": torch.zeros(3, dtype=torch.complex128)}, {}, {}))
        raise KeyError("of the loop")
    assert "the checkpoint writer failed, too" in caught.value.__notes__[0]


def test_a_closed_writer_leaves_no_thread_and_a_forgotten_one_does_not_keep_the_process(tmp_path: Path) -> None:
    before = threading.active_count()
    save(tmp_path, 1)
    assert threading.active_count() == before
    code = (
        "import sys, torch\nfrom pathlib import Path\nfrom pipelines.checkpoints import *\n"
        "writer = CheckpointWriter(Path(sys.argv[1]), RetentionSettings())\n"
        "writer.save(TrainingState(9, {'w': torch.zeros(1000)}, {}, {}))\nraise SystemExit(3)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, timeout=60, check=False)
    assert done.returncode == 3


# A full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    with mounted_disk(tmp_path / "disk", megabytes=2) as path:
        yield path


def test_a_full_disk_loses_no_point_and_stops_nothing(small_disk: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """0.8 MB a point: the third would fit only in the place of another. With less ballast, writing goes on."""
    ballast = small_disk / "ballast"
    with CheckpointWriter(small_disk / "resume", RetentionSettings(last=3)) as writer:
        for step in (1, 2, 3, 4):
            writer.save(filled(step, size=100_000))
        writer.flush()
        assert steps_in(small_disk / "resume") == [1, 2]
        assert not list((small_disk / "resume").glob(".*"))
        said = capfd.readouterr().err
        assert said.count("\n") == 1
        assert "step-00000003 was not written: it needs 0.8 MB, and 0.5 MB are free" in said
        assert "step-00000002 stays the newest. Free space there, or point GRISTMILL_HOME" in said and "training goes on" in said
        with pytest.raises(OutOfSpace, match="step-00000005 was not written"):
            writer.save(filled(5, size=100_000), wait=True)
        shutil.rmtree(small_disk / "resume" / "step-00000001")
        writer.save(filled(6, size=100_000), wait=True)
        assert checkpoints.latest_state(small_disk / "resume").step == 6
        ballast.write_bytes(bytes(400_000))
        writer.save(filled(7, size=100_000))
    assert steps_in(small_disk / "resume") == [2, 6]
    assert "step-00000007 was not written" in capfd.readouterr().err  # said again, as there was room meanwhile


@pytest.mark.parametrize("limit", [600_000, 1_000])
def test_a_limit_that_shows_only_in_writing_is_a_full_disk_too(tmp_path: Path, limit: int) -> None:
    """A quota is not seen beforehand: safetensors or Python fails in the middle of a file."""
    code = f"""
import resource, sys, torch
from pathlib import Path
from pipelines.checkpoints import *
state = lambda step: TrainingState(step, {{"w": torch.full((200_000,), float(step))}}, {{}}, {{"x": "y" * 2000}})
with CheckpointWriter(Path(sys.argv[1]), RetentionSettings()) as writer:
    writer.save(state(1), wait=True)
    resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
    writer.save(state(2))
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "step-00000002 was not written" in done.stderr and "step-00000001 stays the newest" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001"]
    assert checkpoints.latest_state(tmp_path).step == 1


# What a point carries


def test_a_run_goes_back_to_what_it_had_written(tmp_path: Path) -> None:
    """Records that were appended and directories that were replaced, added or left half written since are as they were."""
    records, kept = tmp_path / "metrics.jsonl", tmp_path / "checkpoints"
    carried = (records, kept, tmp_path / "absent.jsonl")
    with CheckpointWriter(tmp_path / "resume", LAST_TWO, carried=carried) as writer:
        records.write_text("1\n")
        (kept / "best").mkdir(parents=True)
        (kept / "best" / "weights").write_text("of step 1")
        writer.save(filled(1))
        with records.open("a") as file:
            file.write("2\n")
        other = kept / ".best"
        other.mkdir()
        (other / "weights").write_text("of step 2")
        shutil.rmtree(kept / "best")
        other.rename(kept / "best")
        (kept / "step-00000002").mkdir()
        (kept / ".step-00000003").mkdir()
        writer.save(filled(2))
    (tmp_path / "absent.jsonl").write_text("of later")
    for step, lines, names in ((2, "1\n2\n", ["best", "step-00000002"]), (1, "1\n", ["best"])):
        state = checkpoints.latest_state(tmp_path / "resume")
        assert state.step == step
        checkpoints.restore_carried(tmp_path / "resume", step, carried)
        assert records.read_text() == lines
        assert sorted(path.name for path in kept.iterdir()) == names
        assert (kept / "best" / "weights").read_text() == f"of step {step}"
        assert not (tmp_path / "absent.jsonl").exists()
        records.write_text("more")  # the point's own copy is another file
        damage(tmp_path / "resume" / f"step-{step:08d}", "flipped bit")
    checkpoints.restore_carried(tmp_path / "resume", None, carried)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["resume"]


def test_a_damaged_file_that_is_carried_damages_the_point(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    kept = tmp_path / "checkpoints"
    with CheckpointWriter(tmp_path / "resume", LAST_TWO, carried=(kept,)) as writer:
        writer.save(filled(1))
        (kept / "best").mkdir(parents=True)
        (kept / "best" / "weights").write_text("of step 2")
        writer.save(filled(2))
        writer.save(filled(3))
    (kept / "best" / "weights").write_text("of step X")
    assert checkpoints.latest_state(tmp_path / "resume") is None
    assert "carried/checkpoints/best/weights differs from its checksum" in capfd.readouterr().err


# Checkpoints in the artifact


def tiny(kind: str) -> object:
    from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 11}
    if kind == "bert":
        return BertForMaskedLM(BertConfig(**sizes)).eval()
    return LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=kind == "llama, tied")).eval()


@pytest.mark.parametrize("kind", ["llama, tied", "llama", "bert"])
def test_a_kept_checkpoint_opens_with_transformers_alone(tmp_path: Path, kind: str) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    model = tiny(kind)
    (tmp_path / "tokenizer.json").write_text("{}")
    ids = torch.arange(6)[None]
    for folder in ("one", "two"):
        place = tmp_path / folder / "checkpoints" / "step-00000007"
        checkpoints.save_kept(place, model, checkpoints.full_model_state(model), [tmp_path / "tokenizer.json"], step=7)
        assert [path.name for path in place.parent.iterdir()] == ["step-00000007"]
        opened = (AutoModelForMaskedLM if kind == "bert" else AutoModelForCausalLM).from_pretrained(place, local_files_only=True).eval()
        assert torch.equal(opened(input_ids=ids).logits, model(input_ids=ids).logits)
        sums = json.loads((place / "checksums.json").read_text())
        assert sums["step"] == 7 and {"config.json", "model.safetensors", "tokenizer.json"} <= set(sums["files"])
        assert all(checkpoints.sha256_file(place / name) == value for name, value in sums["files"].items())
    one, two = (sorted((tmp_path / folder).rglob("*.*")) for folder in ("one", "two"))
    assert [path.read_bytes() for path in one if path.is_file()] == [path.read_bytes() for path in two if path.is_file()]


def test_a_kept_checkpoint_is_replaced_whole_and_resume_points_keep_the_one_before(tmp_path: Path) -> None:
    model, kept = tiny("llama"), tmp_path / "checkpoints"
    with CheckpointWriter(tmp_path / "resume", LAST_TWO, carried=(kept,)) as writer:
        checkpoints.save_kept(kept / "best", model, checkpoints.full_model_state(model), [], step=1)
        before = (kept / "best" / "model.safetensors").read_bytes()
        writer.save(filled(1), wait=True)
        with torch.no_grad():
            model.lm_head.weight.add_(1)
        checkpoints.save_kept(kept / "best", model, checkpoints.full_model_state(model), [], step=2)
    assert json.loads((kept / "best" / "checksums.json").read_text())["step"] == 2
    assert (kept / "best" / "model.safetensors").read_bytes() != before
    checkpoints.restore_carried(tmp_path / "resume", 1, (kept,))
    assert (kept / "best" / "model.safetensors").read_bytes() == before
    assert json.loads((kept / "best" / "checksums.json").read_text())["step"] == 1


# Several processes


PROCESSES = """
import sys
from pathlib import Path
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
sys.path[:0] = [sys.argv[1], str(Path(sys.argv[1]) / "tests")]
from test_checkpoints import Tied, checkpoints, state_of, train
from pipelines.checkpoints import CheckpointWriter, RetentionSettings

torch.set_num_threads(1)
dist.init_process_group("gloo")
whole, out = checkpoints.latest_state(Path(sys.argv[2])), Path(sys.argv[3])
for kind in ("fsdp", "ddp"):
    model = Tied(seed=5)
    if kind == "fsdp":
        mesh = init_device_mesh("cpu", (2,))
        fully_shard(model.middle, mesh=mesh)
        wrapped = fully_shard(model, mesh=mesh)
    else:
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=0.01, fused=True)
    checkpoints.load_model_state(wrapped, whole.model)
    checkpoints.load_optimizer_state(wrapped, optimizer, whole.optimizer)
    assert isinstance(model.middle.weight, DTensor) == (kind == "fsdp")
    train(wrapped, optimizer, whole.step, 4)
    with torch.no_grad():
        wrapped(torch.arange(3))  # FSDP2 leaves the outermost parameters gathered
    state = state_of(whole.step + 4, wrapped, optimizer)
    assert bool(state.model) == bool(state.optimizer) == (dist.get_rank() == 0)
    if dist.get_rank() == 0:
        with CheckpointWriter(out / kind, RetentionSettings()) as writer:
            writer.save(state)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_a_state_does_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    """Saved by one process, trained on by two that have a part of every tensor or all of it, then read by one again."""
    with CheckpointWriter(tmp_path / "one", LAST_TWO) as writer:
        writer.save(state_of(3, *trained(3)))
    (tmp_path / "processes.py").write_text(PROCESSES)
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1", str(tmp_path / "processes.py")]
    done = subprocess.run(
        [*command, str(ROOT), str(tmp_path / "one"), str(tmp_path)],
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    expected = state_of(7, *trained(7))
    for kind in ("fsdp", "ddp"):
        state = checkpoints.latest_state(tmp_path / kind)
        assert state.step == 7
        for ours, theirs in ((state.model, expected.model), (state.optimizer, expected.optimizer)):
            assert set(ours) == set(theirs)
            assert all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in ours)
        other = Tied(seed=8)
        checkpoints.load_model_state(other, state.model)
        found = checkpoints.full_model_state(other)
        assert same(found, {name: state.model[name] for name in found})


def test_what_says_that_a_disk_is_full() -> None:
    assert is_out_of_space(OSError(errno.EDQUOT, "")) and is_out_of_space(RuntimeError("I/O error: No space left on device (os error 28)"))
    assert not is_out_of_space(OutOfSpace("resume point step-00000003 was not written")) and not is_out_of_space(None)
