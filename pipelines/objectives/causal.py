"""Causal language modelling: predict each token from those before it (Radford et al. 2019).

The head and the cross-entropy are computed in chunks of positions, forward and gradient in one pass, so that the
logits of a batch never exist at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipelines.objectives import Objective

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

POSITIONS_PER_CHUNK = 1024


class Causal(Objective):
    """Next-token prediction."""

    def loss(self, model: PreTrainedModel, windows_BT: torch.Tensor) -> torch.Tensor:
        hidden_BTD = model.base_model(input_ids=windows_BT[:, :-1], use_cache=False).last_hidden_state
        head_VD = model.get_output_embeddings().weight
        return linear_cross_entropy(hidden_BTD.flatten(0, 1), head_VD, windows_BT[:, 1:].flatten())

    def window_losses(self, model: PreTrainedModel, windows_BT: torch.Tensor) -> torch.Tensor:
        import torch

        with torch.no_grad():
            hidden_BTD = model.base_model(input_ids=windows_BT[:, :-1], use_cache=False).last_hidden_state
            logits_BTV = hidden_BTD @ model.get_output_embeddings().weight.T
            losses = torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1).float(), windows_BT[:, 1:].flatten(), reduction="none")
            return losses.view(windows_BT.shape[0], -1).mean(dim=1)


def linear_cross_entropy(hidden_ND: torch.Tensor, head_VD: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy of ``hidden @ head.T`` against `targets`, equal to autograd's to rounding."""
    import torch

    class LinearCrossEntropy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, hidden_ND, head_VD, targets_N):  # noqa: ANN001, ANN205
            grad_hidden, grad_head = torch.empty_like(hidden_ND), torch.zeros_like(head_VD)
            total, count = hidden_ND.new_zeros(()), len(targets_N)
            for start in range(0, count, POSITIONS_PER_CHUNK):
                chunk = slice(start, start + POSITIONS_PER_CHUNK)
                logits = hidden_ND[chunk] @ head_VD.T
                log_normalizer = torch.logsumexp(logits, dim=1, keepdim=True)
                total += (log_normalizer - logits.gather(1, targets_N[chunk, None])).sum()
                probabilities = logits.sub_(log_normalizer).exp_()
                probabilities.scatter_add_(1, targets_N[chunk, None], probabilities.new_full((len(logits), 1), -1.0))
                probabilities /= count
                grad_hidden[chunk] = probabilities @ head_VD
                grad_head.addmm_(probabilities.T, hidden_ND[chunk])
            ctx.save_for_backward(grad_hidden, grad_head)
            return total / count

        @staticmethod
        def backward(ctx, grad):  # noqa: ANN001, ANN205
            grad_hidden, grad_head = ctx.saved_tensors
            return grad_hidden * grad, grad_head * grad, None

    return LinearCrossEntropy.apply(hidden_ND, head_VD, targets_N)
