"""Set functions: an order over passages in which every prefix is a good subset.

`order` returns the full greedy order, so that every budget is a prefix of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from pipelines.plugins import Plugin
from pipelines.set_functions._neighbors import NeighborGraph


@dataclass(frozen=True)
class Points:
    """What is chosen from, and what is known of it."""

    embeddings: np.ndarray
    """int16, shape ``(n, d)``: integer unit vectors."""
    costs: np.ndarray | None = None
    """int64, shape ``(n,)``: tokens, at least 1."""
    scores: np.ndarray | None = None
    """float64, shape ``(n,)``: of the recipe's rule, NaN where it has none."""
    groups: np.ndarray | None = None
    """int64, shape ``(n,)``: the domain of each point."""
    queries: np.ndarray | None = None
    """int16, shape ``(m, d)``: a target set that the selection is to be near to."""
    earlier: np.ndarray | None = None
    """int16, shape ``(k, d)``: what was picked before; the selection extends it."""

    def __len__(self) -> int:
        return len(self.embeddings)


@dataclass(frozen=True)
class Order:
    """A greedy order over ``n`` points."""

    picks: np.ndarray
    """int64, shape ``(m,)``, ``m <= n``: point indices in the order picked; points of zero gain are left out."""
    gains: np.ndarray
    """float64, shape ``(m,)``: the gain of each pick when it was picked."""
    graph: NeighborGraph | None = None
    """The graph in which all points represent each other, where the function built one: the certificate is computed on it."""


class SetFunction(Plugin):
    """Base of every set function."""

    reads: ClassVar[tuple[str, ...]] = ()
    """Fields of `Points` beyond the embeddings that the order depends on where they are given; what a recipe gives and no function reads
    is an error."""
    is_independent: ClassVar[bool] = False
    """Whether a point's place does not depend on which points are near it: such an order extends earlier picks as it is."""

    def order(self, points: Points) -> Order:
        """Order `points` by greedy gain.

        The same points give the same order whatever the thread count; ties go to the lowest index.

        Raises:
            GristmillError: the function needs something of the points that is absent, scores for example.
        """
        raise NotImplementedError
