"""Resume points of a training run: written beside, checksummed, published by rename, verified on load.

    <directory>/step-00000200/   model.safetensors optimizer.safetensors state.json checksums.json

The newest resume point that verifies is used; a corrupt one is named and passed over.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.files import sync
from pipelines.manifests import sha256_file

if TYPE_CHECKING:
    import torch

KEEP = 2


@dataclass(frozen=True)
class ResumePoint:
    """Everything a run needs to go on from `step`: the data position is the step itself."""

    step: int
    model: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]


def save_resume_point(directory: Path, step: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write the resume point of `step` and keep the last `KEEP`. Killed at any moment, it leaves the older ones whole.

    A point beyond `step` is one that was passed over; it goes, lest it count among the last.
    """
    from safetensors.torch import save_file

    final = directory / f"step-{step:08d}"
    beside = directory / f".{final.name}-{os.getpid()}"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    save_file(_own_tensors(model.state_dict()), beside / "model.safetensors")
    save_file(flat_optimizer_state(model, optimizer), beside / "optimizer.safetensors")
    (beside / "state.json").write_text(json.dumps({"step": step}))
    sums = {path.name: sha256_file(path) for path in sorted(beside.iterdir())}
    (beside / "checksums.json").write_text(json.dumps(sums))
    for path in [*beside.iterdir(), beside]:
        sync(path)
    shutil.rmtree(final, ignore_errors=True)
    beside.rename(final)
    sync(directory)
    points = _points(directory)
    for stale in points[: points.index(final)] + points[points.index(final) + KEEP :]:
        shutil.rmtree(stale, ignore_errors=True)


def latest_resume_point(directory: Path) -> ResumePoint | None:
    """Return the newest resume point that verifies, or None; one that does not verify is named on stderr."""
    from safetensors.torch import load_file

    for point in _points(directory):
        if fault := _fault(point):
            print(f"resume point {point.name} passed over: {fault}", file=sys.stderr)
            continue
        step = json.loads((point / "state.json").read_text())["step"]
        return ResumePoint(step, load_file(point / "model.safetensors"), load_file(point / "optimizer.safetensors"))
    return None


def flat_optimizer_state(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Return the optimizer's tensors by ``<parameter name>/<state name>``, so that they fit in a safetensors file."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    state = {f"{names[p]}/{key}": value for p, entry in optimizer.state.items() for key, value in entry.items()}
    return _own_tensors(state)


def load_optimizer_state(model: torch.nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, torch.Tensor]) -> None:
    """Put `state`, as `flat_optimizer_state` returns it, back into `optimizer`."""
    parameters = dict(model.named_parameters())
    for key, value in state.items():
        name, _, field = key.rpartition("/")
        optimizer.state[parameters[name]][field] = value.clone()


def _own_tensors(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Drop tensors that share storage with an earlier one (tied weights) and make the rest contiguous."""
    seen: set[int] = set()
    kept = {}
    for name, tensor in state.items():
        if tensor.data_ptr() in seen and tensor.numel() > 1:
            continue
        seen.add(tensor.data_ptr())
        kept[name] = tensor.detach().contiguous()
    return kept


def _points(directory: Path) -> list[Path]:
    return sorted((p for p in directory.glob("step-*") if p.is_dir()), reverse=True)


def _fault(point: Path) -> str | None:
    try:
        sums = json.loads((point / "checksums.json").read_text())
    except (OSError, ValueError) as error:
        return f"no readable checksums ({error})"
    for name, expected in sums.items():
        path = point / name
        if not path.exists():
            return f"{name} is missing"
        if sha256_file(path) != expected:
            return f"{name} differs from its checksum"
    return None
