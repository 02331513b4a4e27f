"""Optimizers: settings that build a torch optimizer over a model's named parameters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pipelines.plugins import Plugin

if TYPE_CHECKING:
    import torch


class Optimizer(Plugin):
    """Base of every optimizer."""

    def build(self, model: torch.nn.Module, learning_rate: float) -> torch.optim.Optimizer:
        """Return an optimizer over `model` whose groups each carry ``initial_lr``, the rate that a schedule multiplies."""
        raise NotImplementedError


def hidden_matrices(model: torch.nn.Module) -> Iterator[torch.nn.Parameter]:
    """Yield the matrices inside the lists of layers of `model`; what stands outside of them are embeddings, heads and last norms."""
    import torch

    for layers in model.modules():
        if isinstance(layers, torch.nn.ModuleList):
            for module in layers.modules():
                if not isinstance(module, torch.nn.Embedding):
                    yield from (p for p in module.parameters(recurse=False) if p.dim() == 2)
