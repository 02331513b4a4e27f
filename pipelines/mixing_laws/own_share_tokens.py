"""The own-share law along training: ``L(s, T) = E(T) - C(T) * BC_k(s + e0)``, E and C linear in log T, one exponent k.

At one T it is the own-share law. Over the course of all probes it needs fewer, shorter runs: the noise of single checkpoints
averages out, a probe that was stopped still bears on the shape, and the law can be read at more tokens than were trained. For a
fixed k it is linear least squares in four coefficients, so k is scanned: no starting points, no local minima. C(T) >= 0 at every
T that was measured.

Shapes: G exponents, N points, D draws, U distinct numbers of tokens.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from pipelines.mixing_laws import FittedLaw, MixingLaw, Observations, relative_tokens
from pipelines.mixing_laws._scan import MAX_RESIDUALS, TIE, box_cox


class OwnShareTokens(MixingLaw):
    """Box-Cox in the corpus' own share, level and slope linear in the logarithm of the tokens."""

    reads: ClassVar[frozenset[str]] = frozenset({"own_share", "tokens"})
    min_points: ClassVar[int] = 3

    offset: float = 0.01
    """e0: keeps the law finite at share 0."""
    k_min: float = -4.0
    """Lowest exponent scanned."""
    k_max: float = 3.0
    """Highest exponent scanned."""
    num_k: int = 141
    """Exponents scanned, evenly spaced."""

    def fit_many(self, observed: Observations, losses_DN: np.ndarray) -> list[FittedLaw]:
        """Fit all draws in one scan of k; at equal error the lowest k is taken.

        Raises:
            GristmillError: a measurement was taken after no tokens.
        """
        relative, longest = relative_tokens(observed)
        exponents = np.linspace(self.k_min, self.k_max, self.num_k)
        basis_GN = box_cox(observed.own_share + self.offset, exponents[:, None])
        time_N = np.log(relative)
        design_GN4 = np.stack(np.broadcast_arrays(np.ones_like(time_N), time_N, -basis_GN, -basis_GN * time_N), axis=2)
        solver_G4N = np.linalg.pinv(design_GN4)
        size = max(1, MAX_RESIDUALS // basis_GN.size)
        found: list[FittedLaw] = []
        for start in range(0, len(losses_DN), size):
            some_DN = losses_DN[start : start + size]
            best_D, coefficients_D4 = _scan(design_GN4, solver_G4N, np.unique(time_N), some_DN)
            flat_D4 = _without_shares(time_N, some_DN)
            chosen_D4 = np.where(best_D[:, None] >= 0, coefficients_D4, flat_D4)
            found += [
                self._law(observed.own, chosen, float(exponents[best]), longest) for chosen, best in zip(chosen_D4, best_D, strict=True)
            ]
        return found

    def _law(self, own: int, coefficients: np.ndarray, k: float, longest: float) -> FittedLaw:
        level, drift, slope, growth = coefficients.tolist()

        def predict(shares: np.ndarray, tokens: np.ndarray) -> np.ndarray:
            time = np.log(tokens / longest)
            return level + drift * time - (slope + growth * time) * box_cox(shares[:, own] + self.offset, k)

        return FittedLaw(
            predict, {"E": level, "E_log_tokens": drift, "C": slope, "C_log_tokens": growth, "k": k, "e0": self.offset, "T0": longest}
        )


def _scan(design_GN4: np.ndarray, solver_G4N: np.ndarray, times_U: np.ndarray, losses_DN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the number of the best exponent of each draw, -1 where C would be negative with every one, and its coefficients."""
    coefficients_DG4 = np.einsum("dn,gcn->dgc", losses_DN, solver_G4N)
    residual_DGN = losses_DN[:, None, :] - np.einsum("dgc,gnc->dgn", coefficients_DG4, design_GN4)
    error_DG = np.einsum("dgn,dgn->dg", residual_DGN, residual_DGN)
    falls_DG = ((coefficients_DG4[:, :, 2, None] + coefficients_DG4[:, :, 3, None] * times_U) < 0).any(axis=2)
    error_DG = np.where(falls_DG, np.inf, error_DG)
    best_D = np.argmax(error_DG <= error_DG.min(axis=1, keepdims=True) + TIE, axis=1)
    rows = np.arange(len(best_D))
    return np.where(np.isinf(error_DG[rows, best_D]), -1, best_D), coefficients_DG4[rows, best_D]


def _without_shares(time_N: np.ndarray, losses_DN: np.ndarray) -> np.ndarray:
    """Return the fit that no share changes, shape (D, 4)."""
    solver_2N = np.linalg.pinv(np.stack([np.ones_like(time_N), time_N], axis=1))
    return np.pad(np.einsum("dn,cn->dc", losses_DN, solver_2N), ((0, 0), (0, 2)))
