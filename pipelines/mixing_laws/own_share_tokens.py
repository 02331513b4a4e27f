"""The own-share law along training: ``L(s, T) = E(T) - C(T) * BC_k(s + e0)``, E and C linear in log T, one exponent k.

At one T it is the own-share law. Over the course of all probes it needs fewer, shorter runs: the noise of single checkpoints
averages out, a probe that was stopped still bears on the shape, and the law can be read at more tokens than were trained. For a
fixed k it is linear least squares in four coefficients, so k is scanned: no starting points, no local minima. C(T) >= 0: it is
linear in log T, so that holds between the first and the last T measured where it holds at both.

Shapes: G exponents, N points, D draws, F fits of an exponent with C free, or 0, at the first and the last T.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from pipelines.mixing_laws import FittedLaw, MixingLaw, Observations, relative_tokens
from pipelines.mixing_laws._scan import MAX_RESIDUALS, TIE, box_cox

FREE = ((1.0, 1.0), (1.0, 0.0), (0.0, 1.0), (0.0, 0.0))
"""Whether C is free or 0 at the last and at the first T: the best of the four with no C below 0 is the least-squares fit under C >= 0."""


class OwnShareTokens(MixingLaw):
    """Box-Cox in the corpus' own share, level and slope linear in the logarithm of the tokens."""

    reads: ClassVar[frozenset[str]] = frozenset({"own_share", "tokens"})
    min_points: ClassVar[int] = 5

    offset: float = 0.01
    """e0: keeps the law finite at share 0."""
    k_min: float = -4.0
    """Lowest exponent scanned."""
    k_max: float = 3.0
    """Highest exponent scanned."""
    num_k: int = 141
    """Exponents scanned, evenly spaced."""

    def fit_many(self, observed: Observations, losses_DN: np.ndarray) -> list[FittedLaw]:
        """Fit all draws in one scan of k; at equal error the fit with C free, then the lowest k, is taken.

        Raises:
            GristmillError: a measurement was taken after no tokens.
        """
        relative, longest = relative_tokens(observed)
        exponents = np.linspace(self.k_min, self.k_max, self.num_k)
        basis_GN = box_cox(observed.own_share + self.offset, exponents[:, None])
        time_N = np.log(relative)
        earliest = float(time_N.min())
        early_N = time_N / earliest if earliest else time_N
        whole_GN4 = np.stack(np.broadcast_arrays(np.ones_like(time_N), time_N, -basis_GN * (1.0 - early_N), -basis_GN * early_N), axis=2)
        free_S4 = np.pad(np.asarray(FREE), ((0, 0), (2, 0)), constant_values=1.0)
        design_FN4 = (whole_GN4 * free_S4[:, None, None, :]).reshape(-1, *whole_GN4.shape[1:])
        solver_F4N = np.linalg.pinv(design_FN4)
        size = max(1, MAX_RESIDUALS // design_FN4[:, :, 0].size)
        found: list[FittedLaw] = []
        for start in range(0, len(losses_DN), size):
            best_D, coefficients_D4 = _scan(design_FN4, solver_F4N, losses_DN[start : start + size])
            for best, (level, drift, last, first) in zip(best_D % self.num_k, coefficients_D4.tolist(), strict=True):
                growth = (first - last) / earliest if earliest else 0.0
                found.append(self._law(observed.own, (level, drift, last, growth), float(exponents[best]), longest))
        return found

    def _law(self, own: int, coefficients: tuple[float, float, float, float], k: float, longest: float) -> FittedLaw:
        level, drift, slope, growth = coefficients

        def predict(shares: np.ndarray, tokens: np.ndarray) -> np.ndarray:
            time = np.log(tokens / longest)
            return level + drift * time - np.maximum(slope + growth * time, 0.0) * box_cox(shares[:, own] + self.offset, k)

        return FittedLaw(
            predict, {"E": level, "E_log_tokens": drift, "C": slope, "C_log_tokens": growth, "k": k, "e0": self.offset, "T0": longest}
        )


def _scan(design_FN4: np.ndarray, solver_F4N: np.ndarray, losses_DN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the number of the best fit of each draw, shape (D,), and its coefficients, shape (D, 4)."""
    # einsum sums in one order whatever the number of draws or threads, which a matrix product does not promise
    coefficients_DF4 = np.einsum("dn,fcn->dfc", losses_DN, solver_F4N)
    residual_DFN = losses_DN[:, None, :] - np.einsum("dfc,fnc->dfn", coefficients_DF4, design_FN4)
    error_DF = np.einsum("dfn,dfn->df", residual_DFN, residual_DFN)
    error_DF[(coefficients_DF4[:, :, 2:] < 0).any(axis=2)] = np.inf
    best_D = np.argmax(error_DF <= error_DF.min(axis=1, keepdims=True) + TIE, axis=1)
    return best_D, coefficients_DF4[np.arange(len(best_D)), best_D]
