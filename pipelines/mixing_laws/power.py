"""The CMR paper's ratio law ``L(R) = a * R**s + b`` (2407.17467, section 5.1), R being one minus the own share.

Poor for the general loss near no replay; kept as a cross-check of the own-share law. s is scanned; a and b are linear
least squares.
"""

from __future__ import annotations

import numpy as np

from pipelines.mixing_laws import FittedLaw, MixingLaw


class Power(MixingLaw):
    """A power of the other corpus' share."""

    s_max: float = 8.0
    """Highest exponent scanned."""
    num_s: int = 200
    """Exponents scanned, evenly spaced above 0."""

    def fit(self, shares: np.ndarray, deltas: np.ndarray) -> FittedLaw:
        other = 1.0 - shares
        best: tuple[float, float, float, float] | None = None
        for s in np.linspace(self.s_max / self.num_s, self.s_max, self.num_s):
            design = np.stack([other**s, np.ones_like(other)], axis=1)
            (a, b), *_ = np.linalg.lstsq(design, deltas, rcond=None)
            error = float(((design @ np.array([a, b]) - deltas) ** 2).sum())
            if best is None or error < best[0] - 1e-15:
                best = (error, float(s), float(a), float(b))
        _, s, a, b = best
        return FittedLaw(
            predict=lambda share: a * np.power(1.0 - np.asarray(share, dtype=float), s) + b,
            parameters={"a": a, "s": s, "b": b},
        )
