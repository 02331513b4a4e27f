"""Laws of one exponent, fitted by scanning it: ``y = level + slope * basis_g(x)`` is linear least squares for each exponent g.

There are no starting points and no local minima, and one scan serves every draw of a bootstrap.

Shapes: G exponents, N points, D draws.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

TIE = 1e-15
"""Squared errors this close are a tie; the lowest exponent is taken."""
ROUNDING = 1e-12
"""A basis that varies by no more than this part of its size does not vary."""
MAX_RESIDUALS = 2**21
"""Residuals held at a time: 16 MB."""


@dataclass(frozen=True)
class Scanned:
    """The best of each draw, shape (D,)."""

    best_D: np.ndarray
    """Number of the exponent."""
    level_D: np.ndarray
    slope_D: np.ndarray


def scan(basis_GN: np.ndarray, losses_DN: np.ndarray, *, max_slope: float = np.inf) -> Scanned:
    """Return the least-squares fit of each draw over all exponents; slopes above `max_slope` are held at it."""
    mean_G = basis_GN.mean(axis=1)
    centred_GN = basis_GN - mean_G[:, None]
    spread_G = (centred_GN**2).sum(axis=1)
    flat_G = spread_G <= basis_GN.shape[1] * (ROUNDING * np.abs(basis_GN).max(axis=1)) ** 2
    scale_G = np.where(flat_G, 0.0, 1.0 / np.where(flat_G, 1.0, spread_G))
    size = max(1, MAX_RESIDUALS // basis_GN.size)
    parts = [
        _scan(basis_GN, mean_G, centred_GN * scale_G[:, None], losses_DN[start : start + size], max_slope)
        for start in range(0, len(losses_DN), size)
    ]
    return Scanned(*(np.concatenate(values) for values in zip(*parts, strict=True)))


def _scan(
    basis_GN: np.ndarray, mean_G: np.ndarray, dual_GN: np.ndarray, losses_DN: np.ndarray, max_slope: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    mean_D = losses_DN.mean(axis=1)
    # einsum sums in one order whatever the number of draws or threads, which a matrix product does not promise
    slope_DG = np.minimum(max_slope, np.einsum("dn,gn->dg", losses_DN - mean_D[:, None], dual_GN))
    level_DG = mean_D[:, None] - slope_DG * mean_G
    residual_DGN = losses_DN[:, None, :] - level_DG[:, :, None]
    residual_DGN -= slope_DG[:, :, None] * basis_GN
    error_DG = np.einsum("dgn,dgn->dg", residual_DGN, residual_DGN)
    best_D = np.argmax(error_DG <= error_DG.min(axis=1, keepdims=True) + TIE, axis=1)
    rows = np.arange(len(best_D))
    return best_D, level_DG[rows, best_D], slope_DG[rows, best_D]


def box_cox(x: np.ndarray, k: float | np.ndarray) -> np.ndarray:
    """Return ``(x**k - 1) / k``, the logarithm where k is 0; `x` and `k` broadcast."""
    logarithm = np.abs(k) < 1e-9
    exponent = np.where(logarithm, 1.0, k)
    return np.where(logarithm, np.log(x), (np.power(x, exponent) - 1.0) / exponent)
