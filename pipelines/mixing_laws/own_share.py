"""The own-share Box-Cox law: ``L(s) = E - C * BC_k(s + e0)`` with ``BC_k(x) = (x**k - 1) / k`` and ``C >= 0``.

It contains the last term of the D-CPT law (2406.01375, equation 6) at k < 0, a logarithm at k = 0, and the CMR paper's
``a * R**s + b`` (2407.17467, section 5.1) at k > 0. For a fixed k it is linear least squares, so k is scanned: there
are no starting points and no local minima. A mixture without any of the corpus follows another regime: leave it out.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from pipelines.mixing_laws import FittedLaw, MixingLaw, Observations
from pipelines.mixing_laws._scan import box_cox, scan


class OwnShare(MixingLaw):
    """Box-Cox in the corpus' own share."""

    reads: ClassVar[frozenset[str]] = frozenset({"own_share"})
    min_points: ClassVar[int] = 3

    offset: float = 0.01
    """e0: keeps the law finite at share 0."""
    k_min: float = -4.0
    """Lowest exponent scanned."""
    k_max: float = 3.0
    """Highest exponent scanned."""
    num_k: int = 281
    """Exponents scanned, evenly spaced."""

    def fit_many(self, observed: Observations, losses_DN: np.ndarray) -> list[FittedLaw]:
        """Fit all draws in one scan of k; at equal error the lowest k is taken."""
        exponents = np.linspace(self.k_min, self.k_max, self.num_k)
        found = scan(box_cox(observed.own_share + self.offset, exponents[:, None]), losses_DN, max_slope=0.0)
        chosen = zip(found.level_D, 0.0 - found.slope_D, exponents[found.best_D], strict=True)
        return [self._law(observed.own, float(level), float(slope), float(k)) for level, slope, k in chosen]

    def _law(self, own: int, level: float, slope: float, k: float) -> FittedLaw:
        return FittedLaw(
            predict=lambda shares, _tokens: level - slope * box_cox(shares[:, own] + self.offset, k),
            parameters={"E": level, "C": slope, "k": k, "e0": self.offset},
        )
