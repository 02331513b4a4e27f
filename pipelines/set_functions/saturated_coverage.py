"""Saturated coverage: every point is represented by many, up to a limit beyond which more adds nothing.

f(S) = sum over points i of min(sum over j in S of s_ij, alpha * sum over all j of s_ij) (Lin, Bilmes 2011, "A Class of Submodular Functions
for Document Summarization", section 4.1), s_ij = max(0, cos(i, j)) on the graph of nearest neighbours.
"""

from __future__ import annotations

import numpy as np
from pydantic import Field

from pipelines.embedders._grid import UNIT
from pipelines.set_functions import Order, Points, SetFunction
from pipelines.set_functions._greedy import saturation_order
from pipelines.set_functions.facility_location import FacilityLocation


class SaturatedCoverage(SetFunction):
    """Exact greedy over the graph of nearest neighbours."""

    alpha: float = Field(default=0.25, gt=0, le=1)
    """Share of a point's similarities at which it is saturated; about the budget's share fits."""
    neighbors: int | None = Field(default=None, ge=1)
    """Edges per point, as in facility_location."""
    exact_up_to: int = Field(default=100_000, ge=0)
    """Points up to which every pair is compared."""
    per_token: bool = True
    """Whether the gain by token decides, where tokens are known."""

    def order(self, points: Points) -> Order:
        """Order by marginal coverage; what adds nothing to an unsaturated point is left out."""
        graph = FacilityLocation(neighbors=self.neighbors, exact_up_to=self.exact_up_to).graph(points.embeddings)
        limits = np.floor(self.alpha * graph.similarities.sum(axis=1, dtype=np.int64)).astype(np.int64)
        picks, gains = saturation_order(graph, limits, costs=points.costs if self.per_token else None)
        return Order(picks=picks, gains=gains / UNIT, graph=graph)
