"""Mixing laws: the change of a corpus' loss as a function of that corpus' own share of the mixture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pipelines.plugins import Plugin


@dataclass(frozen=True)
class FittedLaw:
    """A law with its parameters."""

    predict: Callable[[np.ndarray], np.ndarray]
    """Share in [0, 1] to change of loss in nats per token."""
    parameters: dict[str, float]


class MixingLaw(Plugin):
    """Base of every mixing law."""

    def fit(self, shares: np.ndarray, deltas: np.ndarray) -> FittedLaw:
        """Fit changes of loss `deltas` (nats per token, shape (n,)) over the corpus' own `shares` (shape (n,), n >= 3)."""
        raise NotImplementedError
