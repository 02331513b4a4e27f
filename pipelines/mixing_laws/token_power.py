"""The CMR paper's token laws for one mixture (2407.17467, equation 6).

The general loss rises and then falls, so it has two terms, ``a2 * T**s2 + a3 * T**s3 + b2``; the target loss has one,
``a1 * T**s1 + b1``. T is counted in units of T0, the longest training measured. The exponents are scanned, in pairs where
there are two, and the rest is linear least squares: there are no starting points.

Shapes: P pairs of exponents, N points, D draws, C columns (the constant and both powers).
"""

from __future__ import annotations

from itertools import combinations
from typing import ClassVar, Literal

import numpy as np

from pipelines.mixing_laws import FittedLaw, MixingLaw, Observations, relative_tokens
from pipelines.mixing_laws._scan import MAX_RESIDUALS, TIE, scan


class TokenPower(MixingLaw):
    """One or two powers of the tokens of training."""

    reads: ClassVar[frozenset[str]] = frozenset({"tokens"})
    min_points: ClassVar[int] = 5

    num_terms: Literal[1, 2] = 2
    """2 for the general loss, 1 for the target loss."""
    s_max: float = 2.0
    """Exponents are scanned between minus this and this; 0 is a constant, so it is left out."""
    num_s: int = 40
    """Exponents scanned for two terms, half of them below 0; pairs grow with its square. Ten times as many for one term."""

    def fit_many(self, observed: Observations, losses_DN: np.ndarray) -> list[FittedLaw]:
        """Fit all draws in one scan; at equal error the lowest exponents are taken.

        Raises:
            GristmillError: a measurement was taken after no tokens.
        """
        tokens, longest = relative_tokens(observed)
        return (self._one if self.num_terms == 1 else self._two)(tokens, longest, losses_DN)

    def _exponents(self, num_above: int) -> np.ndarray:
        above = np.linspace(self.s_max / num_above, self.s_max, num_above)
        return np.concatenate([-above[::-1], above])

    def _one(self, tokens: np.ndarray, longest: float, losses_DN: np.ndarray) -> list[FittedLaw]:
        exponents = self._exponents(5 * self.num_s)
        found = scan(tokens ** exponents[:, None], losses_DN)
        chosen = zip(found.slope_D, exponents[found.best_D], found.level_D, strict=True)
        return [_law({"a1": float(a), "s1": float(s), "b1": float(b), "T0": longest}) for a, s, b in chosen]

    def _two(self, tokens: np.ndarray, longest: float, losses_DN: np.ndarray) -> list[FittedLaw]:
        pairs_P2 = np.asarray(list(combinations(self._exponents(self.num_s // 2), 2)))
        powers_PNC = np.concatenate([np.ones((len(pairs_P2), len(tokens), 1)), tokens[:, None] ** pairs_P2[:, None, :]], axis=2)
        basis_PNC, triangle_PCC = np.linalg.qr(powers_PNC)
        best_D = _best_pairs(basis_PNC, losses_DN)
        laws = []
        for best, losses in zip(best_D, losses_DN, strict=True):
            b2, a2, a3 = np.linalg.lstsq(triangle_PCC[best], basis_PNC[best].T @ losses, rcond=None)[0]
            s2, s3 = pairs_P2[best]
            laws.append(_law({"a2": float(a2), "s2": float(s2), "a3": float(a3), "s3": float(s3), "b2": float(b2), "T0": longest}))
        return laws


def _best_pairs(basis_PNC: np.ndarray, losses_DN: np.ndarray) -> np.ndarray:
    """Return the number of the pair with the least squared error, shape (D,)."""
    size = max(1, MAX_RESIDUALS // basis_PNC[:, :, 0].size)
    best = []
    for start in range(0, len(losses_DN), size):
        part_DN = losses_DN[start : start + size]
        along_DPC = np.einsum("dn,pnc->dpc", part_DN, basis_PNC)
        residual_DPN = part_DN[:, None, :] - np.einsum("dpc,pnc->dpn", along_DPC, basis_PNC)
        error_DP = np.einsum("dpn,dpn->dp", residual_DPN, residual_DPN)
        best.append(np.argmax(error_DP <= error_DP.min(axis=1, keepdims=True) + TIE, axis=1))
    return np.concatenate(best)


def _law(parameters: dict[str, float]) -> FittedLaw:
    terms = [(parameters[f"a{n}"], parameters[f"s{n}"]) for n in (1, 2, 3) if f"a{n}" in parameters]
    constant = parameters["b1" if len(terms) == 1 else "b2"]

    def predict(_shares: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        return sum(a * np.power(tokens / parameters["T0"], s) for a, s in terms) + constant

    return FittedLaw(predict, parameters)
