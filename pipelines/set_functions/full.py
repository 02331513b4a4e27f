"""Full: the corpus in its own order, from which nothing is chosen: what training on everything is compared with.

It is meant for a budget of all there is. Under a smaller one it is the first part of the corpus, which is no baseline, since
neighbours in a corpus resemble each other: use random_order there.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from pipelines.set_functions import Order, Points, SetFunction


class Full(SetFunction):
    """Every point, by index; it looks at nothing of the points but their number."""

    is_independent: ClassVar[bool] = True

    def order(self, points: Points) -> Order:
        """Return all points by index; each gain is 1."""
        return Order(picks=np.arange(len(points), dtype=np.int64), gains=np.ones(len(points)))
