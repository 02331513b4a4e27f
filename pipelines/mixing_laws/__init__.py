"""Mixing laws: the loss of a corpus as a function of the mixture that is trained on, and of the tokens of training.

A law is fitted to measured mixtures of K corpora and predicts others. What it depends on is its `reads`: a law of
``own_share`` sees the corpus' own share alone, a law of ``shares`` the whole mixture, a law of ``tokens`` the length of
training; `losses` may be losses or changes of loss, and for a law of ``tokens`` alone any quantity that tokens change.

Shapes: N measurements, K corpora, D draws of the losses of the same measurements, M mixtures to predict.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from pipelines.errors import GristmillError
from pipelines.plugins import Plugin


@dataclass(frozen=True)
class Observations:
    """Measured losses of one corpus; N measurements of mixtures over K corpora."""

    shares: np.ndarray
    """float64 (N, K): token shares of each mixture, rows sum to 1."""
    tokens: np.ndarray
    """float64 (N,): tokens of continued pretraining after which it was measured."""
    losses: np.ndarray
    """float64 (N,): loss, or change of loss from the base, nats per token."""
    own: int
    """Column of `shares` that is the corpus itself."""

    @property
    def own_share(self) -> np.ndarray:
        """Share of the corpus itself, float64 (N,)."""
        return self.shares[:, self.own]

    def with_losses(self, losses: np.ndarray) -> Observations:
        """Return the same measurements with other `losses`, shape (N,)."""
        return replace(self, losses=losses)


def two_corpora(target_shares: np.ndarray, tokens: np.ndarray | float, losses: np.ndarray, *, own: int = 0) -> Observations:
    """Return observations of the columns (general, target) at `target_shares`, shape (N,); `own` 0 is the general corpus' loss."""
    target = np.asarray(target_shares, dtype=np.float64)
    lengths = np.broadcast_to(np.asarray(tokens, dtype=np.float64), target.shape)
    return Observations(two_shares(target), lengths, np.asarray(losses, dtype=np.float64), own)


def two_shares(target_shares: np.ndarray) -> np.ndarray:
    """Return the mixtures (general, target) at `target_shares` (M,), shape (M, 2)."""
    target = np.asarray(target_shares, dtype=np.float64)
    return np.stack([1.0 - target, target], axis=1)


def relative_tokens(observed: Observations) -> tuple[np.ndarray, float]:
    """Return tokens in units of the longest training measured, shape (N,), and that unit.

    Raises:
        GristmillError: a measurement was taken after no tokens, where a power of the tokens has no value.
    """
    longest = float(observed.tokens.max())
    if observed.tokens.min() <= 0:
        raise GristmillError(
            f"a law of tokens was given a measurement after {observed.tokens.min():g} tokens; powers need tokens above 0, so leave it out"
        )
    return observed.tokens / longest, longest


@dataclass(frozen=True)
class FittedLaw:
    """A law with its parameters."""

    predict: Callable[[np.ndarray, np.ndarray], np.ndarray]
    """Shares (M, K) and tokens (M,) to losses (M,), nats per token."""
    parameters: dict[str, float]
    """Flat, JSON-able."""


class MixingLaw(Plugin):
    """Base of every mixing law."""

    reads: ClassVar[frozenset[str]]
    """What the law depends on, of ``own_share``, ``shares`` and ``tokens``."""
    min_points: ClassVar[int]
    """Fewer measurements are refused by the caller."""

    def fit(self, observed: Observations) -> FittedLaw:
        """Fit the law to `observed` by least squares."""
        return self.fit_many(observed, observed.losses[None])[0]

    def fit_many(self, observed: Observations, losses_DN: np.ndarray) -> list[FittedLaw]:
        """Fit the law to each row of `losses_DN`, measured at the mixtures and tokens of `observed`: a bootstrap in one call.

        A law overrides `fit` or `fit_many`; the other follows.
        """
        return [self.fit(observed.with_losses(losses)) for losses in losses_DN]
