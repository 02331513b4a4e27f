"""Resume points: what comes back is what was written, a damaged one is passed over and named, a killed writer harms nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines import checkpoints

ROOT = Path(__file__).parents[1]


class Tied(torch.nn.Module):
    """An embedding whose weight is the head's, as in the models that are trained here."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = torch.nn.Embedding(7, 4)
        self.middle = torch.nn.Linear(4, 4)
        self.head = torch.nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.middle(self.embedding(ids)))


def trained(steps: int, *, model: Tied | None = None) -> tuple[Tied, torch.optim.Optimizer]:
    model = model or Tied()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    train(model, optimizer, 0, steps)
    return model, optimizer


def train(model: Tied, optimizer: torch.optim.Optimizer, first: int, steps: int) -> None:
    for step in range(first, first + steps):
        ids = torch.arange(step, step + 5) % 7
        torch.nn.functional.cross_entropy(model(ids), (ids + 1) % 7).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def save(directory: Path, step: int) -> None:
    checkpoints.save_resume_point(directory, step, *trained(3))


def steps_in(directory: Path) -> list[int]:
    return sorted(int(path.name.partition("-")[2]) for path in directory.glob("step-*"))


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    whole, optimizer = trained(12)
    model, stopped = trained(5)
    checkpoints.save_resume_point(tmp_path, 5, model, stopped)
    point = checkpoints.latest_resume_point(tmp_path)
    other = Tied(seed=99)
    resumed = torch.optim.AdamW(other.parameters(), lr=0.01, fused=True)
    other.load_state_dict(point.model, strict=False)
    other.head.weight = other.embedding.weight
    checkpoints.load_optimizer_state(other, resumed, point.optimizer)
    train(other, resumed, point.step, 7)
    for (name, ours), theirs in zip(other.state_dict().items(), whole.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    mine, reference = checkpoints.flat_optimizer_state(other, resumed), checkpoints.flat_optimizer_state(whole, optimizer)
    assert mine.keys() == reference.keys() and all(torch.equal(mine[key], reference[key]) for key in mine)


def test_tied_weights_are_written_once(tmp_path: Path) -> None:
    save(tmp_path, 1)
    point = checkpoints.latest_resume_point(tmp_path)
    assert set(point.model) == {"embedding.weight", "middle.weight", "middle.bias"}
    assert {key.rpartition("/")[0] for key in point.optimizer} == set(point.model)


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    for step in (10, 20, 30, 1000):
        save(tmp_path, step)
    assert steps_in(tmp_path) == [30, 1000]
    assert checkpoints.latest_resume_point(tmp_path).step == 1000


def test_nothing_there_is_no_point(tmp_path: Path) -> None:
    assert checkpoints.latest_resume_point(tmp_path / "absent") is None


def damage(point: Path, kind: str) -> None:
    weights = point / "model.safetensors"
    content = bytearray(weights.read_bytes())
    if kind == "flipped bit":
        content[len(content) // 2] ^= 1
        weights.write_bytes(content)
    if kind == "truncated":
        weights.write_bytes(content[:-10])
    if kind == "missing file":
        (point / "optimizer.safetensors").unlink()
    if kind == "no checksums":
        (point / "checksums.json").unlink()
    if kind == "torn checksums":
        (point / "checksums.json").write_text('{"model.safe')
    if kind == "empty":
        for path in point.iterdir():
            path.unlink()


@pytest.mark.parametrize("kind", ["flipped bit", "truncated", "missing file", "no checksums", "torn checksums", "empty"])
def test_a_damaged_point_is_passed_over_and_named(tmp_path: Path, capfd: pytest.CaptureFixture[str], kind: str) -> None:
    save(tmp_path, 10)
    save(tmp_path, 20)
    damage(tmp_path / "step-00000020", kind)
    assert checkpoints.latest_resume_point(tmp_path).step == 10
    assert "step-00000020 passed over" in capfd.readouterr().err
    damage(tmp_path / "step-00000010", kind)
    assert checkpoints.latest_resume_point(tmp_path) is None


def test_damaged_points_do_not_push_out_good_ones(tmp_path: Path) -> None:
    """A run that fell back behind two damaged points keeps what it writes from there."""
    for step in (100, 110):
        save(tmp_path, step)
        damage(tmp_path / f"step-{step:08d}", "flipped bit")
    save(tmp_path, 40)
    assert checkpoints.latest_resume_point(tmp_path).step == 40
    save(tmp_path, 50)
    assert steps_in(tmp_path) == [40, 50]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    place=st.floats(0, 1, exclude_max=True),
    bit=st.integers(0, 7),
    name=st.sampled_from(["model.safetensors", "optimizer.safetensors", "state.json"]),
)
def test_any_flipped_bit_is_seen(tmp_path: Path, place: float, bit: int, name: str) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    path = tmp_path / "step-00000002" / name
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1 << bit
    path.write_bytes(content)
    assert checkpoints.latest_resume_point(tmp_path).step == 1


WRITER = """
import sys
from pathlib import Path
import torch
from pipelines import checkpoints
directory = Path(sys.argv[1])
model = torch.nn.Linear(1500, 1500)
optimizer = torch.optim.AdamW(model.parameters())
model(torch.ones(1, 1500)).sum().backward()
optimizer.step()
step = 0
while True:
    step += 1
    torch.nn.init.constant_(model.bias, float(step))
    checkpoints.save_resume_point(directory, step, model, optimizer)
    print(step, flush=True)
"""


def test_a_writer_killed_at_any_moment_leaves_a_whole_point(tmp_path: Path) -> None:
    """SIGKILL at four moments: what is found is never older than the last point that was reported as written."""
    for number, delay in enumerate((0.0, 0.02, 0.05, 0.11)):
        directory = tmp_path / str(number)
        child = subprocess.Popen([sys.executable, "-c", WRITER, str(directory)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        reported = [child.stdout.readline()]
        time.sleep(delay)
        os.kill(child.pid, signal.SIGKILL)
        reported += child.communicate()[0].splitlines()
        point = checkpoints.latest_resume_point(directory)
        assert point.step >= max(int(line) for line in reported if line.strip())
        assert torch.equal(point.model["bias"], torch.full((1500,), float(point.step)))
        assert json.loads((directory / f"step-{point.step:08d}" / "state.json").read_text()) == {"step": point.step}
