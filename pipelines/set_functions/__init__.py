"""Set functions: an order over passages in which every prefix is a good subset.

`order` returns the full greedy order, so that every budget is a prefix of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipelines.plugins import Plugin
from pipelines.set_functions._neighbors import NeighborGraph


@dataclass(frozen=True)
class Order:
    """A greedy order over ``n`` points."""

    picks: np.ndarray
    """int64, shape ``(m,)``, ``m <= n``: point indices in the order picked; points of zero gain are left out."""
    gains: np.ndarray
    """float64, shape ``(m,)``: the gain of each pick when it was picked."""
    graph: NeighborGraph | None = None
    """The neighbour graph, where the function built one: the certificate is computed on it."""


class SetFunction(Plugin):
    """Base of every set function."""

    def order(self, embeddings: np.ndarray) -> Order:
        """Order the rows of `embeddings` (int16, shape ``(n, d)``, integer unit vectors) by greedy gain.

        The same rows give the same order whatever the thread count; ties go to the lowest index.
        """
        raise NotImplementedError
