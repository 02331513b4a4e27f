"""The step of Muon, with AdamW for other parameters, as one torch optimizer whose state is tensors by parameter."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of Jordan's quintic: steepest at 0, and every singular value ends between about 0.7 and 1.2."""
MIN_NORM = 1e-7
RMS_OF_ADAMW = 0.2
"""Root mean square of a typical AdamW update (Moonlight, 2502.16982, section 2.2)."""


@cache
def muon_class() -> type[torch.optim.Optimizer]:
    """Return the optimizer's class; made at the first call, for torch is heavy to import."""
    import torch
    from torch.optim.adamw import adamw

    class MuonWithAdamW(torch.optim.Optimizer):
        """Groups with ``orthogonal`` are moved by Muon, the others by AdamW."""

        @torch.no_grad()
        def step(self, closure: Callable[[], float] | None = None) -> float | None:
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            for group in self.param_groups:
                parameters = [p for p in group["params"] if p.grad is not None]
                if parameters and group["orthogonal"]:
                    self._muon(group, parameters)
                elif parameters:
                    self._adamw(group, parameters)
            return loss

        def _muon(self, group: dict[str, float], parameters: list[torch.nn.Parameter]) -> None:
            by_shape: dict[tuple[object, ...], list[tuple[torch.nn.Parameter, torch.Tensor]]] = defaultdict(list)
            for parameter in parameters:
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum = state["momentum"].lerp_(parameter.grad, 1.0 - group["momentum"])
                update = parameter.grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
                whole = _whole(update)
                if whole.shape[0] > whole.shape[1]:
                    whole = whole.T
                by_shape[whole.device, whole.dtype, *whole.shape].append((parameter, whole))
            for members in by_shape.values():
                for part in _stacks(members):
                    orthogonal = orthogonalize(torch.stack([update for _, update in part]), steps=int(group["ns_steps"]))
                    for (parameter, _), update in zip(part, orthogonal, strict=True):
                        parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
                        turned = update if update.shape == parameter.shape else update.T
                        scale = RMS_OF_ADAMW * max(parameter.shape) ** 0.5
                        parameter.add_(_like(parameter, turned), alpha=-group["lr"] * scale)

        def _adamw(self, group: dict[str, object], parameters: list[torch.nn.Parameter]) -> None:
            for parameter in parameters:
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            states = [self.state[parameter] for parameter in parameters]
            adamw(
                parameters,
                [parameter.grad for parameter in parameters],
                *([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq")),
                [],
                [state["step"] for state in states],
                fused=True,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )

    return MuonWithAdamW


def orthogonalize(matrices_KMN: torch.Tensor, *, steps: int) -> torch.Tensor:
    """Return nearly orthogonal matrices with the singular vectors of `matrices`, of shape (K, M, N) with M <= N.

    Products are in float32 on a CPU and in bfloat16 on a GPU, as each of them is fastest.
    """
    import torch

    a, b, c = COEFFICIENTS
    wide = torch.promote_types(matrices_KMN.dtype, torch.float32)
    x = matrices_KMN.to(torch.bfloat16 if matrices_KMN.is_cuda else wide)
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=MIN_NORM)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.to(matrices_KMN.dtype)


def _stacks(members: list[tuple[torch.nn.Parameter, torch.Tensor]]) -> Iterator[list[tuple[torch.nn.Parameter, torch.Tensor]]]:
    """Yield what is orthogonalised at once: all on a GPU, where launches cost; one on a CPU, where a matrix stays in its cache."""
    size = len(members) if members[0][1].is_cuda else 1
    for start in range(0, len(members), size):
        yield members[start : start + size]


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return all of `tensor`, gathered where it is shared out over processes (FSDP2)."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _like(parameter: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """Return `whole` laid out as `parameter` is; every process holds all of it, so none is asked for its part."""
    if not hasattr(parameter, "full_tensor"):
        return whole
    from torch.distributed.tensor import DTensor, Replicate

    mesh = parameter.device_mesh
    return DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False).redistribute(placements=parameter.placements)
