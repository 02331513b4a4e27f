"""Random order: the baseline every other set function is measured against."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from pipelines.set_functions import Order, Points, SetFunction


class RandomOrder(SetFunction):
    """A uniformly random permutation; it looks at nothing of the points but their number."""

    is_independent: ClassVar[bool] = True

    seed: int = 0
    """Seed of the permutation."""

    def order(self, points: Points) -> Order:
        """Return all points in random order; each gain is 1, since no point is worth more than another."""
        picks = np.random.default_rng(self.seed).permutation(len(points)).astype(np.int64)
        return Order(picks=picks, gains=np.ones(len(picks)))
