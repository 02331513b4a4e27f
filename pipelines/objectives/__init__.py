"""Objectives: how windows of tokens become a batch, and a batch becomes a loss.

Shapes: B windows, T positions, N predicted positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from pipelines.batch import IGNORED, Attention, Batch, SpecialTokens
from pipelines.linear_cross_entropy import linear_cross_entropy
from pipelines.models import hidden_states, prediction_head
from pipelines.plugins import Plugin

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from pipelines.teachers import OpenTeacher


@dataclass(frozen=True)
class Losses:
    """The loss of a batch, as sums: the trainer divides by the targets of the whole step."""

    total: torch.Tensor
    """Scalar with gradient: nats over all predicted positions, a teacher's share included."""
    per_window_B: torch.Tensor
    """Nats of the targets over the predicted positions of each window, without gradient and without a teacher's share."""
    counts_B: torch.Tensor
    """Predicted positions of each window, int64."""


class Objective(Plugin):
    """Base of every objective. The head is applied to predicted positions alone."""

    attention: ClassVar[Attention] = "causal"

    def batch(
        self, windows_BT: np.ndarray, generators: Sequence[np.random.Generator], tokens: SpecialTokens, *, document_attention: bool = False
    ) -> Batch:
        """Return the batch of int64 windows of shape (B, T + 1); pure, on the CPU.

        Args:
            generators: one per window, keyed by its number in the run: what is drawn depends on nothing else.
            document_attention: attention ends at document boundaries.
        """
        raise NotImplementedError

    def losses(self, model: PreTrainedModel, batch: Batch, *, teacher: OpenTeacher | None = None) -> Losses:
        """Return the losses of `batch` under `model`: the cross-entropy of its targets.

        Args:
            teacher: its distributions are soft targets of the same positions, with the same attention.
        """
        import torch

        predicted_BT = batch.targets_BT != IGNORED
        everywhere = self._predicts_everywhere(batch)

        def chosen(values: torch.Tensor) -> torch.Tensor:
            return values.flatten(0, 1) if everywhere else values[predicted_BT]  # a mask makes the host wait for the GPU

        head = prediction_head(model)
        total, losses_N = linear_cross_entropy(
            head.transform(chosen(hidden_states(model, batch, self.attention))),
            head.weight_VD,
            bias_V=head.bias_V,
            targets_N=chosen(batch.targets_BT),
            teacher=None if teacher is None else teacher.soft_targets(batch, self.attention, chosen),
        )
        if everywhere:
            losses_BT = losses_N.view(predicted_BT.shape)
        else:
            losses_BT = torch.zeros(predicted_BT.shape, dtype=losses_N.dtype, device=losses_N.device)
            losses_BT[predicted_BT] = losses_N
        return Losses(total, losses_BT.sum(dim=1), predicted_BT.sum(dim=1))

    def _predicts_everywhere(self, batch: Batch) -> bool:
        """Return whether every position of `batch` has a target, known without looking."""
        return False
