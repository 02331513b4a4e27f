"""The own-share Box-Cox law: ``L(s) = E - C * BC_k(s + e0)`` with ``BC_k(x) = (x**k - 1) / k`` and ``C >= 0``.

It contains the last term of the D-CPT law (2406.01375, equation 6) at k < 0, a logarithm at k = 0, and the CMR paper's
``a * R**s + b`` (2407.17467, section 5.1) at k > 0. For a fixed k it is linear least squares, so k is scanned: there
are no starting points and no local minima. With three points k is chosen among a coarse grid and the fit is exact.
"""

from __future__ import annotations

import numpy as np

from pipelines.mixing_laws import FittedLaw, MixingLaw


class OwnShare(MixingLaw):
    """Box-Cox in the corpus' own share."""

    offset: float = 0.01
    """e0: keeps the law finite at share 0."""
    k_min: float = -4.0
    """Lowest exponent scanned."""
    k_max: float = 3.0
    """Highest exponent scanned."""
    num_k: int = 281
    """Exponents scanned, evenly spaced."""

    def fit(self, shares: np.ndarray, deltas: np.ndarray) -> FittedLaw:
        best: tuple[float, float, float, float] | None = None
        for k in np.linspace(self.k_min, self.k_max, self.num_k):
            level, slope, error = _line(box_cox(shares + self.offset, k), deltas)
            if best is None or error < best[0] - 1e-15:
                best = (error, float(k), level, slope)
        _, k, level, slope = best
        return FittedLaw(
            predict=lambda share: level - slope * box_cox(np.asarray(share, dtype=float) + self.offset, k),
            parameters={"E": level, "C": slope, "k": k, "e0": self.offset},
        )


def box_cox(x: np.ndarray, k: float) -> np.ndarray:
    """Return ``(x**k - 1) / k``, the logarithm where k is 0."""
    return np.log(x) if abs(k) < 1e-9 else (np.power(x, k) - 1.0) / k


def _line(z: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """Return level, slope and squared error of the least-squares ``y = level - slope * z`` with slope >= 0."""
    centred = z - z.mean()
    spread = float(centred @ centred)
    slope = max(0.0, -float(centred @ (y - y.mean())) / spread) if spread > 0 else 0.0
    level = float(y.mean() + slope * z.mean())
    residual = y - (level - slope * z)
    return level, slope, float(residual @ residual)
