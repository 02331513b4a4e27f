"""Cross-entropy of a linear head without its logits: forward and gradient in one pass over chunks of positions.

The logits of a batch, the largest tensor of a small language model, never exist at once: a chunk of them is made, turned into
its gradient and spent. Against ``cross_entropy(hidden @ weight.T)`` that is 2-3x faster on a CPU, since a chunk stays in its
cache. torch's own ``linear_cross_entropy`` does the same at the same speed, and is not used because it gives a sum alone: no
loss for each position beside it, and no soft targets.

Shapes: N predicted positions, C positions of a chunk, D hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

LOGITS_PER_CHUNK = {"cpu": 2**21, "cuda": 2**27}
"""8 MiB fit a CPU's cache (measured: V of 4k to 32k); a GPU wants few launches and half a gigabyte is little of it (not measured)."""
MIN_POSITIONS = 128
"""Positions of a chunk at least: with fewer the matrix product itself slows down (64 positions: 10-15 %)."""


@dataclass(frozen=True)
class SoftTargets:
    """A teacher's distribution at each predicted position, as what its logits are made of (Hinton et al. 2015, 1503.02531).

    With weight w and temperature T the loss of a position is ``(1 - w) CE(target) + w T^2 KL(teacher_T || model_T)``.
    """

    hidden_ND: torch.Tensor
    """The teacher's hidden states, in a width of its own."""
    weight_VD: torch.Tensor
    """The teacher's head."""
    bias_V: torch.Tensor | None = None
    """Its bias, if it has one."""
    temperature: float = 1.0
    """Divides the logits of both."""
    weight: float = 0.5
    """Share of the soft targets in the loss."""


def chunk_positions(vocabulary_size: int, device: str = "cpu") -> int:
    """Return how many positions are computed at once."""
    return max(MIN_POSITIONS, LOGITS_PER_CHUNK.get(device, LOGITS_PER_CHUNK["cuda"]) // vocabulary_size)


def linear_cross_entropy(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    *,
    targets_N: torch.Tensor,
    bias_V: torch.Tensor | None = None,
    teacher: SoftTargets | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the summed loss of ``hidden @ weight.T + bias`` with gradient, and the cross-entropy of each position without.

    Both are in nats, float32 or wider; equal to autograd's to rounding. Under autocast the products are in its type, the
    logits in float32. Every target is a token id: positions that predict nothing are left out by the caller. The second
    result is the plain cross-entropy with a teacher, too, so that runs with and without one compare.
    """
    import torch

    device = hidden_ND.device.type
    half = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_ND.dtype
    if not torch.is_grad_enabled():  # what a function is told of its inputs does not say so, and it would make their gradients
        hidden_ND, weight_VD, bias_V = hidden_ND.detach(), weight_VD.detach(), None if bias_V is None else bias_V.detach()
    with torch.autocast(device, enabled=False):
        return _function().apply(hidden_ND, weight_VD, bias_V, targets_N, teacher, half)


@cache
def _function() -> type[torch.autograd.Function]:
    """Return the autograd function; made at the first call, for torch is heavy to import."""
    import torch

    class LinearCrossEntropy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, hidden_ND, weight_VD, bias_V, targets_N, teacher, dtype):  # noqa: ANN001, ANN205
            ctx.set_materialize_grads(False)
            wide = torch.promote_types(dtype, torch.float32)
            head, guide_head = _Head.of(weight_VD, bias_V, dtype), None
            if teacher is not None:
                guide_head = _Head.of(teacher.weight_VD, teacher.bias_V, dtype)
            wanted = ctx.needs_input_grad[:3]
            grad_hidden = torch.empty_like(hidden_ND) if any(wanted) else None
            grad_weight = torch.zeros_like(weight_VD, dtype=wide) if any(wanted) else None
            grad_bias = torch.zeros_like(bias_V, dtype=wide) if any(wanted) and bias_V is not None else None
            losses_N = torch.empty(len(targets_N), dtype=wide, device=hidden_ND.device)
            soft, size = losses_N.new_zeros(()), chunk_positions(len(weight_VD), hidden_ND.device.type)
            room = torch.empty((min(size, len(targets_N)), len(weight_VD)), dtype=wide, device=hidden_ND.device)
            for chunk in _chunks(len(targets_N), size):
                hidden, targets = hidden_ND[chunk].to(dtype), targets_N[chunk, None]
                logits = head.logits(hidden, room[: len(hidden)])
                guide, kept = None, 1.0
                if teacher is not None:
                    theirs = guide_head.logits(teacher.hidden_ND[chunk].to(dtype), torch.empty_like(logits))
                    divergence, guide = _soft(logits, theirs, teacher, gradient=any(wanted))
                    soft, kept = soft + divergence, 1.0 - teacher.weight
                torch.log_softmax(logits, 1, out=logits)
                losses_N[chunk] = logits.gather(1, targets).squeeze(1).neg_()
                if not any(wanted):
                    continue
                slope = logits.exp_()
                slope.scatter_add_(1, targets, slope.new_full(targets.shape, -1.0))
                if guide is not None:
                    slope.mul_(kept).add_(guide)
                if grad_bias is not None:
                    grad_bias += slope.sum(dim=0)
                slope = slope.to(dtype)
                if grad_hidden.dtype == dtype:
                    torch.mm(slope, head.weight_VD, out=grad_hidden[chunk])
                else:
                    grad_hidden[chunk] = slope @ head.weight_VD
                _accumulate(grad_weight, slope.T, hidden)
            ctx.gradients = (grad_hidden, grad_weight, grad_bias)
            ctx.mark_non_differentiable(losses_N)
            hard = losses_N.sum()
            return hard if teacher is None else hard * (1.0 - teacher.weight) + soft, losses_N

        @staticmethod
        def backward(ctx, grad, _):  # noqa: ANN001, ANN205
            gradients, ctx.gradients = ctx.gradients, None
            if gradients is None:
                raise RuntimeError("the gradients of this loss were scaled in place and are spent; go through backward once")
            return (*(None if g is None else g.mul_(grad) for g in gradients), None, None, None)

    return LinearCrossEntropy


@dataclass(frozen=True)
class _Head:
    weight_VD: torch.Tensor
    bias_V: torch.Tensor | None

    @classmethod
    def of(cls, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, dtype: torch.dtype) -> _Head:
        import torch

        return cls(weight_VD.to(dtype), None if bias_V is None else bias_V.to(torch.promote_types(dtype, torch.float32)))

    def logits(self, hidden_CD: torch.Tensor, room_CV: torch.Tensor) -> torch.Tensor:
        """Return logits in `room_CV`: float32, or float64 of float64. Memory that is used again stays in the cache."""
        import torch

        if room_CV.dtype == hidden_CD.dtype:
            torch.mm(hidden_CD, self.weight_VD.T, out=room_CV)
        elif hidden_CD.is_cuda:
            torch.mm(hidden_CD, self.weight_VD.T, out_dtype=room_CV.dtype, out=room_CV)
        else:
            room_CV.copy_(hidden_CD @ self.weight_VD.T)
        return room_CV if self.bias_V is None else room_CV.add_(self.bias_V)


def _chunks(length: int, size: int) -> Iterator[slice]:
    for start in range(0, length, size):
        yield slice(start, start + size)


def _accumulate(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add ``left @ right`` to `total`, whose type may be wider."""
    import torch

    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif left.is_cuda:
        total += torch.mm(left, right, out_dtype=total.dtype)
    else:
        total += left @ right


def _soft(
    logits_CV: torch.Tensor, guide_CV: torch.Tensor, teacher: SoftTargets, *, gradient: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the teacher's part of the chunk's loss, and of its gradient in the logits; `guide_CV`, its logits, is spent."""
    import torch

    wanted = torch.log_softmax(guide_CV.div_(teacher.temperature), 1)
    found = torch.log_softmax(logits_CV / teacher.temperature, 1)
    scale = teacher.weight * teacher.temperature
    likely = wanted.exp()
    divergence = scale * teacher.temperature * (likely * (wanted - found)).sum()
    return divergence, found.exp_().sub_(likely).mul_(scale) if gradient else None
