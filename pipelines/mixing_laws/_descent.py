"""Levenberg-Marquardt steps within bounds for many draws at once (Marquardt 1963): a bootstrap of a law costs one batch of steps.

Shapes: D draws, P parameters.
"""

from __future__ import annotations

from typing import Protocol, Self

import numpy as np

SETTLED = 1e-9
"""A relative fall of the error below this ends a draw."""
DAMPING = (1e-12, 1e12)
"""Bounds of the damping of a step; at the upper one no step helps."""


class Errors(Protocol):
    """Sums of squares of D draws as functions of their parameters."""

    def costs(self, at_DP: np.ndarray) -> np.ndarray:
        """Return the sum of each draw, shape (D,)."""

    def normal_equations(self, at_DP: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the Gauss-Newton matrices, shape (D, P, P), and minus half the gradients, shape (D, P)."""

    def part(self, chosen: np.ndarray) -> Self:
        """Return the draws `chosen`."""


def descend(errors: Errors, start_DP: np.ndarray, lowest_P: np.ndarray, highest_P: np.ndarray, *, max_steps: int) -> np.ndarray:
    """Return the parameters of each draw, shape (D, P), when no step lowers its error by more than `SETTLED`."""
    at_DP = np.clip(start_DP, lowest_P, highest_P)
    cost_D, damping_D, open_D = errors.costs(at_DP), np.full(len(at_DP), 1e-3), np.arange(len(at_DP))
    for _ in range(max_steps):
        if not len(open_D):
            break
        still = errors.part(open_D)
        step_DP = _steps(*still.normal_equations(at_DP[open_D]), damping_D[open_D], at_DP[open_D] <= lowest_P, at_DP[open_D] >= highest_P)
        next_DP = np.clip(at_DP[open_D] + step_DP, lowest_P, highest_P)
        next_D = still.costs(next_DP)
        lower = next_D < cost_D[open_D]
        settled = lower & (next_D > cost_D[open_D] * (1.0 - SETTLED))
        at_DP[open_D[lower]], cost_D[open_D[lower]] = next_DP[lower], next_D[lower]
        damping_D[open_D] = np.clip(np.where(lower, damping_D[open_D] / 5, damping_D[open_D] * 5), *DAMPING)
        open_D = open_D[~settled & (damping_D[open_D] < DAMPING[1])]
    return at_DP


def _steps(
    matrix_DPP: np.ndarray, towards_DP: np.ndarray, damping_D: np.ndarray, at_lowest_DP: np.ndarray, at_highest_DP: np.ndarray
) -> np.ndarray:
    """Return the damped steps, shape (D, P); a parameter at its bound that is drawn beyond it, or changes nothing, stays."""
    diagonal = np.arange(matrix_DPP.shape[1])
    held_DP = (at_lowest_DP & (towards_DP <= 0)) | (at_highest_DP & (towards_DP >= 0)) | (matrix_DPP[:, diagonal, diagonal] <= 0)
    matrix_DPP = np.where(held_DP[:, :, None] | held_DP[:, None, :], 0.0, matrix_DPP)
    matrix_DPP[:, diagonal, diagonal] *= 1.0 + damping_D[:, None]
    matrix_DPP[:, diagonal, diagonal] += held_DP
    return np.linalg.solve(matrix_DPP, np.where(held_DP, 0.0, towards_DP)[:, :, None])[:, :, 0]
