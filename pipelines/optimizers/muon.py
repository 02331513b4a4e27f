"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/): hidden matrices move by an orthogonalised momentum.

A hidden matrix is a parameter of two dimensions inside the model's layers; embeddings, heads, norms and biases go by AdamW.
The update of an (m, n) matrix is multiplied by ``0.2 sqrt(max(m, n))`` (Moonlight, 2502.16982, equation 4), so that its root
mean square is AdamW's and one learning rate and one weight decay serve both parts. The scale reads the larger side, so it is
the same for the (in, out) weights of GPT-2 and the (out, in) weights of the rest; fused query-key-value weights are
orthogonalised as the one matrix they are.

torch has a Muon of its own for the matrices alone; this one gives its numbers and orthogonalises in float32 on CPUs, where
bfloat16 products take twice the time, and same-shaped matrices at once on GPUs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from pipelines.optimizers import Optimizer, hidden_matrices
from pipelines.optimizers._muon import muon_class

if TYPE_CHECKING:
    import torch


class Muon(Optimizer):
    """Muon for hidden matrices, AdamW for the rest."""

    momentum: float = Field(default=0.95, ge=0, lt=1)
    """Decay of the momentum of matrices."""
    nesterov: bool = True
    """Whether the gradient is counted once more on top of the momentum."""
    ns_steps: int = Field(default=5, ge=1, le=20)
    """Newton-Schulz iterations that orthogonalise."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled; applied to parameters of two or more dimensions."""
    rest_rate: float = Field(default=4.0, gt=0)
    """Factor on the learning rate of what AdamW moves: embeddings, head, norms and biases. Of 1, 2, 4 and 8 the best or level with the
    best for Llamas of 1.7 and 3.3 million parameters at rates of 0.006 and 0.012."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of AdamW's moments."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of AdamW's second moment."""

    def build(self, model: torch.nn.Module, learning_rate: float) -> torch.optim.Optimizer:
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        hidden = {id(p) for p in hidden_matrices(model)}
        rest = [p for p in trained.values() if id(p) not in hidden]
        adamw = {"orthogonal": False, "initial_lr": learning_rate * self.rest_rate, "lr": learning_rate * self.rest_rate}
        groups = [
            {
                **{"params": [p for p in trained.values() if id(p) in hidden], "weight_decay": self.weight_decay},
                **{"orthogonal": True, "initial_lr": learning_rate, "lr": learning_rate},
            },
            {"params": [p for p in rest if p.dim() >= 2], "weight_decay": self.weight_decay, **adamw},
            {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0, **adamw},
        ]
        shared = {"momentum": self.momentum, "nesterov": self.nesterov, "ns_steps": self.ns_steps, "betas": self.betas, "eps": self.eps}
        return muon_class()([group for group in groups if group["params"]], shared)
