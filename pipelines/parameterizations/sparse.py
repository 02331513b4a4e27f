"""Sparse pre-training, dense afterwards (SPDF, 2303.10464): a static mask over the linear weights of the layers.

The same share of every matrix is held at exactly 0 through the phase: the weights, their gradients and the optimizer's
moments. The matrix products are as dense as before: it saves no time on this hardware. After the phase the masked weights
are free, and start from 0.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

import numpy as np
from pydantic import Field

from pipelines.parameterizations import Parameterization

if TYPE_CHECKING:
    import torch
    from torch.utils.hooks import RemovableHandle

ATTRIBUTE = "_sparse_weights"


class Sparse(Parameterization):
    """A fixed share of the linear weights inside the layers is 0."""

    share: float = Field(default=0.5, gt=0, lt=1)
    """Share of each matrix that is 0."""
    choose: Literal["random", "magnitude"] = "random"
    """Which weights: drawn by `seed`, or the smallest at the start of the phase."""
    seed: int = Field(default=0, ge=0)
    """Of the random choice, with the name of the matrix."""

    def apply(self, model: torch.nn.Module, *, optimizer: torch.optim.Optimizer | None = None) -> None:
        import torch

        self.finalize(model)
        held = {name: _Held(parameter, self._kept(name, parameter)) for name, parameter in linear_weights(model)}
        object.__setattr__(model, ATTRIBUTE, held)
        self.after_step(model)
        with torch.no_grad():
            for weight in held.values():
                for value in (optimizer.state.get(weight.parameter, {}) if optimizer else {}).values():
                    if value.shape == weight.parameter.shape:
                        value.mul_(weight.kept)

    def after_step(self, model: torch.nn.Module) -> None:
        import torch

        with torch.no_grad():
            for weight in _held(model).values():
                weight.parameter.mul_(weight.kept)

    def finalize(self, model: torch.nn.Module) -> None:
        for weight in _held(model).values():
            weight.hook.remove()
        object.__setattr__(model, ATTRIBUTE, {})

    def _kept(self, name: str, parameter: torch.Tensor) -> torch.Tensor:
        """Return 1 where a weight is free and 0 where it is held, laid out as `parameter` is."""
        import torch

        count = round(self.share * parameter.numel())
        if self.choose == "random":
            generator = np.random.default_rng([self.seed, zlib.crc32(name.encode())])
            order = torch.from_numpy(generator.permutation(parameter.numel()))
        else:
            whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
            order = whole.detach().abs().flatten().argsort(stable=True).cpu()
        kept = torch.ones(parameter.numel(), dtype=parameter.dtype)
        kept[order[:count]] = 0
        kept = kept.view(parameter.shape).to(parameter.device)
        if not hasattr(parameter, "full_tensor"):
            return kept
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(kept, parameter.device_mesh, parameter.placements)


@dataclass
class _Held:
    """A parameter under a mask, and the hook that masks its gradient before anything reads it."""

    parameter: torch.nn.Parameter
    kept: torch.Tensor

    def __post_init__(self) -> None:
        if hasattr(self.parameter, "full_tensor"):  # FSDP2 puts the gradient there itself, and then runs these hooks
            self.hook: RemovableHandle = self.parameter.register_post_accumulate_grad_hook(lambda p: p.grad.mul_(self.kept))
        else:  # before DDP takes it up
            self.hook = self.parameter.register_hook(lambda gradient: gradient * self.kept)


def _held(model: torch.nn.Module) -> dict[str, _Held]:
    return cast(dict[str, _Held], getattr(model, ATTRIBUTE, {}))


def linear_weights(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield name and weight of the linear maps inside the lists of layers of `model`."""
    import torch

    lists = [f"{name}." for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList)]
    for name, module in model.named_modules():
        if name.startswith(tuple(lists)) and type(module).__name__ in ("Linear", "Conv1D") and module.weight.dim() == 2:
            yield f"{name}.weight", module.weight
