"""Graph cut: near to all points, and not to each other.

f(S) = sum over points i and j in S of s_ij - trade_off * sum over i, j in S of s_ij (Iyer, Bilmes 2019 and 2021; lambda is the trade-off),
s_ij = max(0, cos(i, j)) on the graph of nearest neighbours, where a pair counts in each direction that is an edge.
"""

from __future__ import annotations

from pydantic import Field

from pipelines.embedders._grid import UNIT
from pipelines.set_functions import Order, Points, SetFunction
from pipelines.set_functions._greedy import THOUSANDTHS, cut_order
from pipelines.set_functions.facility_location import FacilityLocation


class GraphCut(SetFunction):
    """Exact greedy over the graph of nearest neighbours."""

    trade_off: float = Field(default=0.4, ge=0, le=1)
    """Weight of redundancy, kept to three digits; f rises with every pick up to 0.5. 0.4 is what INGENIOUS's code offers."""
    neighbors: int | None = Field(default=None, ge=1)
    """Edges per point, as in facility_location."""
    exact_up_to: int = Field(default=100_000, ge=0)
    """Points up to which every pair is compared."""
    per_token: bool = True
    """Whether the gain by token decides, where tokens are known."""

    def order(self, points: Points) -> Order:
        """Order by marginal gain, as long as it is above 0."""
        graph = FacilityLocation(neighbors=self.neighbors, exact_up_to=self.exact_up_to).graph(points.embeddings)
        picks, gains = cut_order(graph, self.trade_off, costs=points.costs if self.per_token else None)
        return Order(picks=picks, gains=gains / (THOUSANDTHS * UNIT), graph=graph)
