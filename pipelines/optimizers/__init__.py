"""Optimizers: settings that build a torch optimizer over a model's named parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipelines.plugins import Plugin

if TYPE_CHECKING:
    import torch


class Optimizer(Plugin):
    """Base of every optimizer."""

    def build(self, model: torch.nn.Module, learning_rate: float) -> torch.optim.Optimizer:
        """Return an optimizer over `model` whose groups each carry ``initial_lr``, the rate that a schedule multiplies."""
        raise NotImplementedError
