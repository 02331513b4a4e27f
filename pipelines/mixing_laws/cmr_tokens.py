"""The CMR scaling law ``R_CMR(T) = a4 * T**s4 + b3`` (2407.17467, equation 8) for one model: the critical ratio over tokens.

Here `losses` are the critical ratios measured at each number of tokens. The form fitted is ``b + a * BC_s(T / T0)`` with
``BC_s(x) = (x**s - 1) / s`` and T0 the longest training measured, so that b is the ratio at T0; it is the paper's with
``a4 = a / (s * T0**s)``, ``s4 = s`` and ``b3 = b - a / s``, and at s = 0 it goes over into a line in log T. s is scanned, a
and b are linear least squares.

The law leaves [0, 1] by nature: with the paper's own coefficients it gives -6.3 % for 460M parameters at T = 10. Callers clip.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from pipelines.mixing_laws import FittedLaw, MixingLaw, Observations, relative_tokens
from pipelines.mixing_laws._scan import box_cox, scan


class CmrTokens(MixingLaw):
    """A power of the tokens, or their logarithm."""

    reads: ClassVar[frozenset[str]] = frozenset({"tokens"})
    min_points: ClassVar[int] = 3

    s_min: float = -2.0
    """Lowest exponent scanned; the paper's four lie between -0.42 and 0.27 (table 5)."""
    s_max: float = 2.0
    """Highest exponent scanned."""
    num_s: int = 801
    """Exponents scanned, evenly spaced."""

    def fit_many(self, observed: Observations, losses_DN: np.ndarray) -> list[FittedLaw]:
        """Fit all draws in one scan of s; at equal error the lowest s is taken.

        Raises:
            GristmillError: a measurement was taken after no tokens.
        """
        tokens, longest = relative_tokens(observed)
        exponents = np.linspace(self.s_min, self.s_max, self.num_s)
        found = scan(box_cox(tokens, exponents[:, None]), losses_DN)
        chosen = zip(found.slope_D, exponents[found.best_D], found.level_D, strict=True)
        return [_law(longest, float(a), float(s), float(b)) for a, s, b in chosen]


def _law(longest: float, a: float, s: float, b: float) -> FittedLaw:
    return FittedLaw(
        predict=lambda _shares, tokens: b + a * box_cox(tokens / longest, s),
        parameters={"a": a, "s": s, "b": b, "T0": longest},
    )
