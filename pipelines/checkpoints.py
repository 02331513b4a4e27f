"""Checkpoints of a training run: resume points, written beside the training, and checkpoints that are kept in the artifact.

    <out>/resume/step-00000200/    model.safetensors optimizer.safetensors state.json checksums.json
                   carried/        what the run had written besides: its records, the checkpoints it keeps
    <out>/checkpoints/<name>/      a Hugging Face directory, with checksums.json

Both are written beside, flushed to the disk, checksummed, and published by rename: a directory without its dot in front is
whole. A resume point is all that a run needs: whatever else lies in `<out>` may be lost, or be of steps that the run goes
back behind, and is put back as it was by `restore_carried`. Directories are carried as hard links, so they cost no room.
The newest resume point that verifies is used; a corrupt one is named and passed over.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from pipelines.errors import OutOfSpace
from pipelines.files import is_out_of_space, sync
from pipelines.manifests import Json, sha256_file
from pipelines.model_state import full_model_state, full_optimizer_state, load_model_state, load_optimizer_state
from pipelines.plugins import Settings

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

__all__ = [
    "CheckpointWriter",
    "RetentionSettings",
    "TrainingState",
    "full_model_state",
    "full_optimizer_state",
    "latest_state",
    "load_model_state",
    "load_optimizer_state",
    "restore_carried",
    "save_kept",
]

FORMAT = 1
CHECKSUMS, CARRIED = "checksums.json", "carried"
POINT = re.compile(r"step-\d{8,}")


class RetentionSettings(Settings):
    """Which checkpoints are kept: the last ones to resume from, some or the best as models in the artifact."""

    last: int = Field(default=2, ge=1, exclude=True)
    """Resume points that are kept while the run lasts: with two, a damaged one costs the steps since the one before."""
    every_steps: int | None = Field(default=None, ge=1)
    """Steps between checkpoints that are kept in the artifact, to study how the model became what it is."""
    best: bool = False
    """Whether the checkpoint with the lowest validation loss is kept in the artifact."""


@dataclass(frozen=True)
class TrainingState:
    """Everything a run needs to go on from `step`: the data position is the step itself."""

    step: int
    model: dict[str, torch.Tensor]
    """Full tensors by parameter name, as `full_model_state` returns them."""
    optimizer: dict[str, torch.Tensor]
    """Full tensors by ``<parameter name>/<state name>``."""
    loop: dict[str, Json]
    """What the loop needs besides."""


class CheckpointWriter:
    """Writes the resume points of one run; one of its processes has one.

    `save` copies the state and returns; a thread writes it, one at a time. What goes wrong there is raised by the next call.
    Only a full disk is no reason to stop: the point is given up, which is said once, and the older ones stay.
    """

    def __init__(self, directory: Path, retention: RetentionSettings, *, background: bool = True, carried: Sequence[Path] = ()) -> None:
        """Prepare to write under `directory`.

        Args:
            background: write while training goes on.
            carried: files that the run appends to, and directories of files that never change; each point holds them as
                they are when it is saved. They lie where the points do, so that they can be linked.
        """
        self.directory, self._retention, self._carried = directory, retention, tuple(carried)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint") if background else None
        self._pending: Future[OutOfSpace | None] | None = None
        self._copies: dict[str, torch.Tensor] = {}
        self._hashes: dict[tuple[int, int, int], str] = {}
        self._short_of_room = False
        directory.mkdir(parents=True, exist_ok=True)
        for left in directory.glob(".step-*"):
            shutil.rmtree(left, ignore_errors=True)

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.close()
            return
        try:
            self.close()
        except Exception as failure:  # noqa: BLE001  told with the error that ended the run, which it must not hide
            error.add_note(f"the checkpoint writer failed, too: {failure!r}")

    def save(self, state: TrainingState, *, wait: bool = False) -> None:
        """Copy `state` and have it written as the newest point; points beyond its step are passed over, and go.

        Args:
            wait: return when the point is on the disk.

        Raises:
            OutOfSpace: there is no room for it and it was waited for.
            Exception: what the write before this one failed with.
        """
        self.flush()
        beside = self.directory / f".{_name(state.step)}-{os.getpid()}"
        refused = self._guarded(beside, state, partial(self._stage, beside))
        if refused is None:
            sizes = {path: path.stat().st_size for path in self._carried if path.is_file()}
            copied = self._copied(state)
            write = partial(self._guarded, beside, copied, partial(self._publish, beside, copied, sizes))
            if self._pool:
                self._pending = self._pool.submit(write)
                refused = self._settle() if wait else None
            else:
                refused = write()
        if refused and wait:
            raise refused

    def flush(self) -> None:
        """Wait until the last point is written; raise what that failed with."""
        self._settle()

    def close(self) -> None:
        """Wait until the last point is written, and end the thread; raise what the write failed with."""
        try:
            self._settle()
        finally:
            if self._pool:
                self._pool.shutdown()

    def _settle(self) -> OutOfSpace | None:
        pending, self._pending = self._pending, None
        return pending.result() if pending else None

    def _guarded(self, beside: Path, state: TrainingState, work: Callable[[], None]) -> OutOfSpace | None:
        """Do `work`; where it fails nothing is left at `beside`. Return the error of a full disk."""
        try:
            work()
        except Exception as error:
            shutil.rmtree(beside, ignore_errors=True)
            if not is_out_of_space(error):
                raise
            return self._no_room(state)
        return None

    def _no_room(self, state: TrainingState) -> OutOfSpace:
        free = shutil.disk_usage(self.directory).free / 1e6
        left = [path.name for path in _points(self.directory)]
        words = (
            f"resume point {_name(state.step)} was not written: it needs {_num_bytes(state) / 1e6:.1f} MB, and {free:.1f} MB are free "
            f"at {self.directory}; {f'{left[0]} stays the newest' if left else 'there is none before it'}. Free space there, "
            "or point GRISTMILL_HOME at a larger disk"
        )
        if not self._short_of_room:
            print(f"{words}; training goes on", file=sys.stderr)
        self._short_of_room = True
        return OutOfSpace(words)

    def _stage(self, beside: Path) -> None:
        """Begin the point at `beside` with links to the directories that it carries."""
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        for path in self._carried:
            if path.is_dir():
                _link_tree(path, beside / CARRIED / path.name)

    def _copied(self, state: TrainingState) -> TrainingState:
        """Return `state` with its tensors copied to memory of this writer, the same every time: fresh memory costs twice the time.

        From a GPU they come through pinned memory, all on their way at once.
        """
        import torch

        parts = {"model": state.model, "optimizer": state.optimizer}
        wanted = {f"{part}/{name}": tensor.detach() for part, tensors in parts.items() for name, tensor in tensors.items()}
        devices = {tensor.device for tensor in wanted.values() if tensor.is_cuda}
        self._copies = {key: copy for key, copy in self._copies.items() if key in wanted}
        for key, tensor in wanted.items():
            copy = self._copies.get(key)
            if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
                copy = self._copies[key] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            copy.copy_(tensor, non_blocking=tensor.is_cuda)
        for device in devices:
            torch.cuda.current_stream(device).synchronize()
        copies = {part: {name: self._copies[f"{part}/{name}"] for name in tensors} for part, tensors in parts.items()}
        return replace(state, **copies, loop=json.loads(json.dumps(state.loop)))

    def _publish(self, beside: Path, state: TrainingState, sizes: Mapping[Path, int]) -> None:
        from safetensors.torch import save_file

        if _num_bytes(state) + sum(sizes.values()) > shutil.disk_usage(beside).free:
            raise OutOfSpace("No space left on device")  # rather than to fill what is left, which the run itself needs
        save_file(state.model, beside / "model.safetensors")
        save_file(state.optimizer, beside / "optimizer.safetensors")
        facts = {"step": state.step, "loop": state.loop, "arithmetic": _arithmetic()}
        (beside / "state.json").write_text(json.dumps(facts), encoding="utf-8")
        for path, size in sizes.items():
            (beside / CARRIED).mkdir(exist_ok=True)
            _copy_beginning(path, beside / CARRIED / path.name, size)
        _seal(beside, {}, self._hashes)
        _swap(beside, self.directory / _name(state.step))
        points = _points(self.directory)
        newest = points.index(self.directory / _name(state.step))
        for stale in points[:newest] + points[newest + self._retention.last :]:
            shutil.rmtree(stale, ignore_errors=True)
        self._short_of_room = False


def latest_state(directory: Path, *, step: int | None = None) -> TrainingState | None:
    """Return the newest resume point that verifies, or None; one that does not verify is named on stderr.

    Args:
        step: only the point of this step will do.
    """
    from safetensors.torch import load_file

    for point in _points(directory):
        if step is not None and point.name != _name(step):
            continue
        if fault := _fault(point):
            print(f"resume point {point.name} passed over: {fault}", file=sys.stderr)
            continue
        state = json.loads((point / "state.json").read_bytes())
        if state["arithmetic"] != _arithmetic():
            here = f"written with {state['arithmetic']}, read with {_arithmetic()}"
            print(f"resume point {point.name} was {here}: the last bits of what follows may differ", file=sys.stderr)
        model, optimizer = (load_file(point / f"{name}.safetensors") for name in ("model", "optimizer"))
        return TrainingState(state["step"], model, optimizer, state["loop"])
    return None


def restore_carried(directory: Path, step: int | None, carried: Iterable[Path]) -> None:
    """Put back what the resume point of `step` carries; what it does not hold is removed, and all of it where `step` is None.

    So nothing is left of steps that a run goes back behind, nor of a checkpoint that a kill left half written.
    """
    for path in carried:
        source = directory / _name(step) / CARRIED / path.name if step is not None else None
        beside = path.with_name(f".{path.name}-restored")
        _remove(beside)
        if source and source.is_dir():
            _link_tree(source, beside)
        elif source and source.exists():
            shutil.copyfile(source, beside)
        _remove(path)
        if beside.exists():
            beside.rename(path)


def save_kept(
    directory: Path, model: PreTrainedModel, state: dict[str, torch.Tensor], tokenizer_files: Iterable[Path], *, step: int
) -> None:
    """Write `state` as a Hugging Face directory that transformers opens alone. Killed at any moment, it leaves the one before whole."""
    beside = directory.with_name(f".{directory.name}-{os.getpid()}")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    model.save_pretrained(beside, state_dict=state)
    for path in tokenizer_files:
        shutil.copyfile(path, beside / path.name)
    _seal(beside, {"step": step}, {})
    _swap(beside, directory)


def _seal(directory: Path, facts: Mapping[str, Json], hashes: dict[tuple[int, int, int], str]) -> None:
    """Write the checksums of all files under `directory` and flush everything to the disk.

    Args:
        hashes: of files that were sealed before and are linked here: by inode, size and time of change.
    """
    sums = {}
    for path in _files(directory):
        status = path.stat()
        key = (status.st_ino, status.st_size, status.st_mtime_ns)
        found = hashes.get(key)
        if found is None:
            sync(path)
            found = sha256_file(path)
            if status.st_nlink > 1:
                hashes[key] = found
        sums[path.relative_to(directory).as_posix()] = found
    place = directory / CHECKSUMS
    place.write_text(json.dumps({"format": FORMAT, **facts, "files": sums}), encoding="utf-8")
    for path in [place, *(path for path in directory.rglob("*") if path.is_dir()), directory]:
        sync(path)


def _swap(beside: Path, final: Path) -> None:
    """Publish `beside` as `final`, in the place of what is there."""
    replaced = beside.with_name(f"{beside.name}-replaced")
    with contextlib.suppress(FileNotFoundError):
        final.rename(replaced)
    beside.rename(final)
    sync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _fault(point: Path) -> str | None:
    """Return what is wrong with a resume point, or None."""
    try:
        content = json.loads((point / CHECKSUMS).read_bytes())
    except (OSError, ValueError) as error:
        return f"no readable {CHECKSUMS} ({error})"
    if not isinstance(content, dict) or content.get("format") != FORMAT or not isinstance(content.get("files"), dict):
        found = content.get("format") if isinstance(content, dict) else content
        return f"{CHECKSUMS} has format {found!r}; known: {FORMAT}"
    sums = content["files"]
    found = {path.relative_to(point).as_posix() for path in _files(point)} - {CHECKSUMS}
    if missing := sorted({"model.safetensors", "optimizer.safetensors", "state.json", *sums} - found):
        return f"{missing[0]} is missing"
    if unknown := sorted(found - set(sums)):
        return f"{unknown[0]} is not among its checksums"
    for name in sums:
        try:
            if sha256_file(point / name) != sums[name]:
                return f"{name} differs from its checksum"
        except OSError as error:
            return f"{name} cannot be read ({error})"
    step = json.loads((point / "state.json").read_bytes())["step"]
    return None if point.name == _name(step) else f"it holds step {step}"


def _arithmetic() -> dict[str, Json]:
    """Return what the last bits depend on besides the settings."""
    import torch

    return {"torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability()}


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _points(directory: Path) -> list[Path]:
    """Return the resume points under `directory`, the newest first."""
    found = [path for path in directory.glob("step-*") if path.is_dir() and POINT.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.partition("-")[2]), reverse=True)


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def _num_bytes(state: TrainingState) -> int:
    tensors = [*state.model.values(), *state.optimizer.values()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _link_tree(source: Path, target: Path) -> None:
    """Link the files under `source` at `target`; copy them where the file system has no links."""
    shutil.copytree(source, target, copy_function=_link, ignore=shutil.ignore_patterns(".*"))


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        if is_out_of_space(error):
            raise
        shutil.copyfile(source, target)


def _copy_beginning(source: Path, target: Path, size: int) -> None:
    """Copy the first `size` bytes: the file may have grown."""
    with source.open("rb") as reader, target.open("wb") as writer:
        while size > 0 and (block := reader.read(min(size, 1 << 20))):
            writer.write(block)
            size -= len(block)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
