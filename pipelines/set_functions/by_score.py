"""By score: points in the order of one rule's score, low perplexity first for example.

The source of the idea is CCNet (Wenzek et al. 2020, 1911.00359), which cuts the documents of each language into head, middle and tail:
thirds by perplexity under a model of Wikipedia. The cut is relative to the language, since perplexities of two languages do not
compare; here it is relative to the domain, and as fine as the points.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np

from pipelines.errors import GristmillError
from pipelines.set_functions import Order, Points, SetFunction


class ByScore(SetFunction):
    """Points by score, every domain at the same pace; embeddings, target set and earlier picks are not looked at."""

    reads: ClassVar[tuple[str, ...]] = ("scores", "groups")
    is_independent: ClassVar[bool] = True

    prefer: Literal["low", "high"] = "low"
    """Which scores come first. Low is right for perplexity."""
    within_groups: bool = True
    """Whether a point ranks by its quantile within its domain, so that every prefix holds the same share of each domain. Otherwise
    all points are ranked together, and the domain with the best scores comes first."""

    def order(self, points: Points) -> Order:
        """Order by quantile: the place in the group over the size of the group, from 0 to below 1. A gain is 1 less the quantile.

        Ties, of scores and of quantiles, go to the lowest index. A point without a score ranks last in its group.

        Raises:
            GristmillError: the points have no scores.
        """
        if points.scores is None:
            raise GristmillError(
                "set function 'by_score' needs a score for every document and has none; "
                "name a rule in selection.score, e.g. perplexity.log_perplexity"
            )
        apart = self.within_groups and points.groups is not None
        groups = points.groups if apart else np.zeros(len(points), dtype=np.int64)
        worth = points.scores if self.prefer == "low" else -points.scores
        indices = np.arange(len(points), dtype=np.int64)
        ranked = np.lexsort((indices, worth, groups))  # NaN sorts behind every number
        _, starts, sizes = np.unique(groups[ranked], return_index=True, return_counts=True)
        quantiles = (np.arange(len(points)) - np.repeat(starts, sizes)) / np.repeat(sizes, sizes)
        merged = np.lexsort((ranked, quantiles))
        return Order(picks=indices[ranked[merged]], gains=1.0 - quantiles[merged])
