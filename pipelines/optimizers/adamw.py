"""AdamW (Loshchilov and Hutter 2019, 1711.05101): weight decay on matrices only."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from pipelines.optimizers import Optimizer, hidden_matrices

if TYPE_CHECKING:
    import torch


class AdamW(Optimizer):
    """AdamW, fused where torch has a fused kernel for the device."""

    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the first and second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the second moment."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Applied to parameters of two or more dimensions."""
    rest_rate: float = Field(default=1.0, gt=0)
    """Factor on the learning rate of everything but the matrices inside the layers: embeddings, head, norms and biases."""

    def build(self, model: torch.nn.Module, learning_rate: float) -> torch.optim.Optimizer:
        import torch

        hidden = {id(p) for p in hidden_matrices(model)}
        parts: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
        for parameter in model.parameters():
            if parameter.requires_grad:
                rate = learning_rate * (1.0 if id(parameter) in hidden else self.rest_rate)
                parts.setdefault((self.weight_decay if parameter.dim() >= 2 else 0.0, rate), []).append(parameter)
        groups = [{"params": held, "weight_decay": decay, "lr": rate, "initial_lr": rate} for (decay, rate), held in parts.items()]
        return torch.optim.AdamW(groups, lr=learning_rate, betas=self.betas, eps=self.eps, fused=True)
