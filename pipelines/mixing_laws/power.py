"""The CMR paper's ratio law ``L(R) = a * R**s + b`` (2407.17467, section 5.1), R being one minus the own share.

Poor for the general loss near no replay; kept as a cross-check of the own-share law there. For the target loss the paper's R is
the own share: that is the own-share law at k > 0. s is scanned; a and b are linear least squares.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from pipelines.mixing_laws import FittedLaw, MixingLaw, Observations
from pipelines.mixing_laws._scan import scan


class Power(MixingLaw):
    """A power of the other corpora's share."""

    reads: ClassVar[frozenset[str]] = frozenset({"own_share"})
    min_points: ClassVar[int] = 3

    s_max: float = 8.0
    """Highest exponent scanned."""
    num_s: int = 200
    """Exponents scanned, evenly spaced above 0."""

    def fit_many(self, observed: Observations, losses_DN: np.ndarray) -> list[FittedLaw]:
        """Fit all draws in one scan of s; at equal error the lowest s is taken."""
        exponents = np.linspace(self.s_max / self.num_s, self.s_max, self.num_s)
        found = scan((1.0 - observed.own_share) ** exponents[:, None], losses_DN)
        chosen = zip(found.slope_D, exponents[found.best_D], found.level_D, strict=True)
        return [_law(observed.own, float(a), float(s), float(b)) for a, s, b in chosen]


def _law(own: int, a: float, s: float, b: float) -> FittedLaw:
    return FittedLaw(
        predict=lambda shares, _tokens: a * np.power(1.0 - shares[:, own], s) + b,
        parameters={"a": a, "s": s, "b": b},
    )
