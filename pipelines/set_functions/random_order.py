"""Random order: the baseline every other set function is measured against."""

from __future__ import annotations

import numpy as np

from pipelines.set_functions import Order, SetFunction


class RandomOrder(SetFunction):
    """A uniformly random permutation."""

    seed: int = 0
    """Seed of the permutation."""

    def order(self, embeddings: np.ndarray) -> Order:
        """Return all rows in random order; each gain is 1, since no point is worth more than another."""
        picks = np.random.default_rng(self.seed).permutation(len(embeddings)).astype(np.int64)
        return Order(picks=picks, gains=np.ones(len(picks)))
