"""A batch: what a model reads and what it is to predict.

Shapes: B windows, T positions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    import torch

IGNORED = -100
"""The target of a position at which nothing is predicted, as in transformers."""
Attention = Literal["causal", "bidirectional"]


@dataclass(frozen=True)
class SpecialTokens:
    """What an objective has to know of the tokenizer."""

    end_of_text: int
    """Ends every document."""
    mask: int | None
    """Stands for a hidden token; None where the tokenizer has none."""
    vocabulary_size: int
    """Number of ids."""


@dataclass(frozen=True)
class Batch:
    """What the model reads and what it is to predict."""

    inputs_BT: torch.Tensor
    """Token ids, int64."""
    targets_BT: torch.Tensor
    """Token ids, int64; IGNORED where nothing is predicted."""
    documents_BT: torch.Tensor | None = None
    """Number of each position's document within its window, int64; given where attention ends at document boundaries."""

    @property
    def num_targets(self) -> int:
        """Predicted positions."""
        return int((self.targets_BT != IGNORED).sum())

    def rows(self, first: int, stop: int) -> Batch:
        """Return the windows from `first` to `stop`."""
        documents = None if self.documents_BT is None else self.documents_BT[first:stop]
        return Batch(self.inputs_BT[first:stop], self.targets_BT[first:stop], documents)

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on `device`; the copy of pinned memory does not wait."""
        moved = {
            name: tensor.to(device, non_blocking=True)
            for name in ("inputs_BT", "targets_BT", "documents_BT")
            if (tensor := getattr(self, name)) is not None
        }
        return replace(self, **moved)


def documents_of(windows_BT: np.ndarray, end_of_text: int) -> np.ndarray:
    """Return the number of the document of each position within its window, int64 of shape (B, T).

    An end-of-text token belongs to the document that it ends.
    """
    from pipelines.stream_kernels import number_documents

    out = np.empty(windows_BT.shape, dtype=np.int64)
    number_documents(windows_BT, end_of_text, out)
    return out
