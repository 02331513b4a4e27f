"""Feature-based function: much of every feature, with less for what there is already.

f(S) = sum over features u of g(sum over j in S of m_ju), g concave (Kirchhoff, Bilmes 2014, "Submodularity for Data Selection in
Statistical Machine Translation", section 4). The features are the positive and the negative part of each dimension of the
embeddings: 2 d of them. No pair of points is looked at, so it costs n d to begin with and grows with n log n in practice.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipelines.embedders._grid import NORM
from pipelines.set_functions import Order, Points, SetFunction


class FeatureBased(SetFunction):
    """Lazy greedy (Minoux 1978), exact."""

    concave: Literal["sqrt", "log"] = "sqrt"
    """g: the square root, or ln(1 + x)."""
    power: float = Field(default=2.0, ge=1)
    """Exponent of the components: above 1 a passage's few strong features count, and not the noise in all of them."""
    per_token: bool = True
    """Whether the gain by token decides, where tokens are known."""

    def order(self, points: Points) -> Order:
        """Order by marginal gain; points without features are left out."""
        import numpy as np

        from pipelines.set_functions._feature_kernels import LOG, SQRT, feature_order

        costs = np.ones(len(points)) if points.costs is None or not self.per_token else points.costs.astype(np.float64)
        kind = SQRT if self.concave == "sqrt" else LOG
        picks, gains = feature_order(points.embeddings, 1.0 / NORM, self.power, kind, costs)
        return Order(picks=picks, gains=gains)
