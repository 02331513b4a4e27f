"""AdamW (Loshchilov and Hutter 2019, 1711.05101): weight decay on matrices only."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipelines.optimizers import Optimizer

if TYPE_CHECKING:
    import torch


class AdamW(Optimizer):
    """AdamW, fused where torch has a fused kernel for the device."""

    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the first and second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Applied to parameters of two or more dimensions."""

    def build(self, model: torch.nn.Module, learning_rate: float) -> torch.optim.Optimizer:
        import torch

        parameters = [p for p in model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": self.weight_decay, "initial_lr": learning_rate},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0, "initial_lr": learning_rate},
        ]
        return torch.optim.AdamW(groups, lr=learning_rate, betas=self.betas, eps=self.eps, fused=True)
