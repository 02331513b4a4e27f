"""Objectives: how a batch of windows becomes a loss.

Shapes: B windows, T positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipelines.plugins import Plugin

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


class Objective(Plugin):
    """Base of every objective."""

    def loss(self, model: PreTrainedModel, windows_BT: torch.Tensor) -> torch.Tensor:
        """Return the mean loss in nats per predicted token of int64 windows of shape (B, T + 1)."""
        raise NotImplementedError

    def window_losses(self, model: PreTrainedModel, windows_BT: torch.Tensor) -> torch.Tensor:
        """Return the mean loss of each window, shape (B,), without gradient."""
        raise NotImplementedError
