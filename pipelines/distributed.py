"""Several processes as one run: whole copies of the model (DDP) or parts of it (FSDP2), started by torchrun.

`launch` starts one process a GPU, or several on the CPU, on this machine and waits for them. Over several machines the
same request is run by torchrun itself:

    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29400 -m pipelines.training REQUEST.json
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from pipelines import interruption
from pipelines.engine import die_with_parent
from pipelines.errors import GristmillError
from pipelines.interruption import Interrupted, grace_seconds

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from pipelines.batch import Batch
    from pipelines.objectives import Objective
    from pipelines.teachers import OpenTeacher

ERROR_NAME = "error.txt"
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class World:
    """The processes of a run, and which of them this one is."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this process writes."""
        return self.rank == 0

    def share(self, sequences: range) -> range:
        """Return the part of `sequences` that this process reads: the parts of all, in order of rank, are the whole."""
        each = len(sequences) // self.size
        return sequences[self.rank * each : (self.rank + 1) * each]

    def total(self, values: np.ndarray, device: torch.device) -> np.ndarray:
        """Return the sum of float64 `values` over all processes."""
        if self.size == 1:
            return values
        import torch

        summed = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float64)).to(device)
        torch.distributed.all_reduce(summed)
        return summed.cpu().numpy()

    def agree(self, wanted: bool) -> bool:  # noqa: FBT001
        """Return what the first process wants, in every process: its clock is the one that counts."""
        if self.size == 1:
            return wanted
        import torch

        word = [wanted]
        torch.distributed.broadcast_object_list(word, src=0)
        return word[0]

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.size > 1:
            import torch

            torch.distributed.barrier()


def current_world() -> World:
    """Return the world that torchrun put this process into, or a world of its own."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    return World(*(int(os.environ[name]) for name in names)) if all(name in os.environ for name in names) else World()


@contextlib.contextmanager
def joined(world: World, device: torch.device) -> Iterator[None]:
    """Join the process group of `world` inside."""
    if world.size == 1:
        yield
        return
    import torch

    torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", device_id=device if device.type == "cuda" else None)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def pick_device(wanted: Literal["auto", "cpu", "cuda"], world: World) -> torch.device:
    """Return the device of this process.

    Raises:
        GristmillError: a GPU is asked for and torch sees none, or fewer than this machine's processes.
    """
    import torch

    count = torch.cuda.device_count()
    if wanted == "cpu" or (wanted == "auto" and not count):
        return torch.device("cpu")
    if world.local_rank >= count:
        raise GristmillError(
            f"device cuda: process {world.local_rank} of this machine has no GPU, torch sees {count}; lower `processes`, or set device: cpu"
        )
    torch.cuda.set_device(world.local_rank)
    return torch.device("cuda", world.local_rank)


def loss_module(model: PreTrainedModel) -> torch.nn.Module:
    """Return the module whose forward pass is the loss of `model`: what DDP and FSDP2 wrap."""
    import torch

    class LossModule(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(
            self, objective: Objective, batch: Batch, teacher: OpenTeacher | None
        ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            losses = objective.losses(self.model, batch, teacher=teacher)
            return losses.total, losses.per_window_B, losses.counts_B

    return LossModule()


def layers_of(model: PreTrainedModel) -> list[torch.nn.Module]:
    """Return the layers of `model`: the modules of its longest list."""
    import torch

    lists = [list(module) for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    return max(lists, key=len, default=[])


def parallelize(
    module: torch.nn.Module, layers: list[torch.nn.Module], world: World, sharding: Literal["ddp", "fsdp"], *, half: bool
) -> torch.nn.Module:
    """Return `module` as one that shares its gradients with the other processes.

    Args:
        layers: the modules that FSDP2 gathers one at a time.
        half: compute in bfloat16 (FSDP2 casts by itself, DDP by autocast).
    """
    if world.size == 1:
        return module
    import torch

    device = next(module.parameters()).device
    if sharding == "ddp":
        ids = [device.index] if device.type == "cuda" else None
        return torch.nn.parallel.DistributedDataParallel(module, device_ids=ids, gradient_as_bucket_view=True)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (world.size,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if half else MixedPrecisionPolicy()
    for part in [*layers, module]:
        fully_shard(part, mesh=mesh, mp_policy=policy)
    return module


@contextlib.contextmanager
def gradients_shared(module: torch.nn.Module, *, last: bool) -> Iterator[None]:
    """Share gradients in the last of several backward passes only."""
    if hasattr(module, "set_requires_gradient_sync"):
        module.set_requires_gradient_sync(last)
        yield
    elif hasattr(module, "no_sync") and not last:
        with module.no_sync():
            yield
    else:
        yield


def launch(module: str, request: Path, processes: int) -> None:
    """Run ``python -m <module> <request>`` in `processes` processes under torchrun and wait for them.

    Rendezvous and traffic stay on the loopback interface. The processes end when this one does, and are asked to end when it is.

    Raises:
        GristmillError: one of them failed; its own words, where it left them beside the request.
        Interrupted: this process was asked to end, and they have ended.
    """
    left = request.parent / ERROR_NAME
    left.unlink(missing_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1", "--nproc-per-node", str(processes)]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{LOOPBACK}:0", "--local-addr", LOOPBACK, "--max-restarts", "0"]
    command += ["--shutdown-timeout", str(int(grace_seconds()))]
    environment = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", **os.environ}
    search = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment["PYTHONPATH"] = search
    launcher = subprocess.Popen([*command, "-m", module, str(request)], env=environment, preexec_fn=die_with_parent)
    with interruption.deferred(launcher.terminate):
        code = launcher.wait()
    if code and interruption.requested():
        raise Interrupted("asked to end; the processes of the run have ended, and left a resume point where they trained")
    if code:
        words = left.read_text(encoding="utf-8") if left.exists() else f"its exit code is {code}; its log says more"
        raise GristmillError(f"training in {processes} processes failed: {words}")
