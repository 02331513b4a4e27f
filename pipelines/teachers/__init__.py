"""Teachers: frozen models whose distributions are soft targets of a phase."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from pipelines.batch import Attention, Batch, SpecialTokens
from pipelines.linear_cross_entropy import SoftTargets
from pipelines.models import hidden_states, prediction_head
from pipelines.plugins import Plugin

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


class Teacher(Plugin):
    """Base of every teacher."""

    temperature: float = Field(default=1.0, gt=0)
    """Divides the logits of teacher and model before they are compared; the loss is multiplied by its square."""
    weight: float = Field(default=0.5, gt=0, le=1)
    """Share of the soft targets in the loss; the rest is the objective's own."""

    def files(self) -> Sequence[Path]:
        """Return the local files that the teacher is made of: their content is part of the identity of what it teaches.

        Relative paths start where the project does.
        """
        return ()

    def open(self, device: torch.device | str, tokens: SpecialTokens, *, root: Path = Path()) -> OpenTeacher:
        """Load the teacher onto `device`.

        Args:
            tokens: of the model that is taught.
            root: where relative paths start.

        Raises:
            GristmillError: it is not there, or has another vocabulary.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class OpenTeacher:
    """A teacher in memory. It sees the very inputs of the batch, and no gradient reaches it."""

    model: PreTrainedModel
    """In evaluation mode."""
    temperature: float
    """As in the settings."""
    weight: float
    """As in the settings."""

    def soft_targets(self, batch: Batch, attention: Attention, chosen: Callable[[torch.Tensor], torch.Tensor]) -> SoftTargets:
        """Return the distributions at the positions that `chosen` takes of a tensor of shape (B, T, ...)."""
        import torch

        with torch.no_grad():
            head = prediction_head(self.model)
            hidden_ND = head.transform(chosen(hidden_states(self.model, batch, attention)))
        bias_V = None if head.bias_V is None else head.bias_V.detach()
        return SoftTargets(hidden_ND, head.weight_VD.detach(), bias_V, temperature=self.temperature, weight=self.weight)
