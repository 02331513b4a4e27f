"""The own-share Box-Cox law: ``L(s) = E - C * BC_k(s + e0)`` with ``BC_k(x) = (x**k - 1) / k`` and ``C >= 0``.

It contains the last term of the D-CPT law (2406.01375, equation 6) at k < 0, a logarithm at k = 0, and the CMR paper's
``a * R**s + b`` (2407.17467, section 5.1) at k > 0. For a fixed k it is linear least squares, so k is scanned: there
are no starting points and no local minima.

Shapes: K exponents, N points.
"""

from __future__ import annotations

import numpy as np

from pipelines.mixing_laws import FittedLaw, MixingLaw

TIE = 1e-15
"""Squared errors this close are a tie; the lowest exponent is taken."""


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
        exponents = np.linspace(self.k_min, self.k_max, self.num_k)
        z_KN = np.stack([box_cox(shares + self.offset, k) for k in exponents])
        centred_KN = z_KN - z_KN.mean(axis=1, keepdims=True)
        spread_K = np.maximum((centred_KN**2).sum(axis=1), np.finfo(float).tiny)
        slope_K = np.maximum(0.0, -(centred_KN @ (deltas - deltas.mean())) / spread_K)
        level_K = deltas.mean() + slope_K * z_KN.mean(axis=1)
        error_K = ((deltas - level_K[:, None] + slope_K[:, None] * z_KN) ** 2).sum(axis=1)
        best = int(np.argmax(error_K <= error_K.min() + TIE))
        k, level, slope = float(exponents[best]), float(level_K[best]), float(slope_K[best])
        return FittedLaw(
            predict=lambda share: level - slope * box_cox(np.asarray(share, dtype=float) + self.offset, k),
            parameters={"E": level, "C": slope, "k": k, "e0": self.offset},
        )


def box_cox(x: np.ndarray, k: float) -> np.ndarray:
    """Return ``(x**k - 1) / k``, the logarithm where k is 0."""
    return np.log(x) if abs(k) < 1e-9 else (np.power(x, k) - 1.0) / k
