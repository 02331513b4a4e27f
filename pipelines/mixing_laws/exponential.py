"""The exponential law of Data Mixing Laws: ``L(r) = c + k * exp(sum_j t_j * r_j)`` (2403.16952, section 3), for many corpora.

It is convex in the shares r, so a weighted sum of such laws has one lowest value. As shares sum to 1, a number added to every
t_j and taken off log k changes nothing: the t_j returned sum to 0.

The fit scans c below the lowest loss, where log(L - c) is linear in r (least squares weighted by L - c, as the logarithm
magnifies errors near c), and goes on from the best of them by Levenberg-Marquardt steps on the losses themselves, which may
lift c above single measurements. Nothing is random. A ridge on t settles what few mixtures leave open.

Shapes: D draws, N measurements, K corpora, P = K + 2 parameters: c, log k at the mean mixture, t. Losses are scaled to lie
between 0 and 1 in each draw.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from pydantic import Field

from pipelines.mixing_laws import FittedLaw, MixingLaw, Observations
from pipelines.mixing_laws._descent import descend
from pipelines.mixing_laws._scan import MAX_RESIDUALS

LOG_DEPTHS = (-7.0, 4.5)
"""How far c may lie below the lowest loss, logarithm in ranges of the losses; far below, the law is a line in the shares."""
NUM_DEPTHS = 16
MAX_EXPONENT = 50.0
"""Exponents are held below this: a step too long ends in a large loss, not in an overflow."""


class Exponential(MixingLaw):
    """An exponential of a weighted sum of the shares, above a floor."""

    reads: ClassVar[frozenset[str]] = frozenset({"shares"})
    min_points: ClassVar[int] = 4

    ridge: float = Field(default=1e-5, ge=1e-9)
    """Weight of the squared t_j beside squared errors in units of the variance of the losses; above 0, as shares sum to 1."""
    max_steps: int = Field(default=200, ge=1)
    """Levenberg-Marquardt steps at most."""

    def fit_many(self, observed: Observations, losses_DN: np.ndarray) -> list[FittedLaw]:
        """Fit all draws at once: each step solves one small linear system a draw."""
        size = max(1, MAX_RESIDUALS // (observed.shares.size * NUM_DEPTHS))
        parts = [losses_DN[start : start + size] for start in range(0, len(losses_DN), size)]
        return [law for part in parts for law in self._fit(observed.shares, part)]

    def _fit(self, shares_NK: np.ndarray, losses_DN: np.ndarray) -> list[FittedLaw]:
        mean_K = shares_NK.mean(axis=0)
        lowest_D, span_D = losses_DN.min(axis=1), np.ptp(losses_DN, axis=1)
        span_D = np.where(span_D > 0, span_D, 1.0)
        scaled_DN = (losses_DN - lowest_D[:, None]) / span_D[:, None]
        ridge_D = self.ridge * np.maximum(scaled_DN.var(axis=1), 1e-12)
        errors = _Errors(shares_NK - mean_K, scaled_DN, ridge_D)
        unbounded_K1 = np.full(len(mean_K) + 1, np.inf)
        lowest_P, highest_P = np.append(-np.exp(LOG_DEPTHS[1]), -unbounded_K1), np.append(1.0, unbounded_K1)
        found_DP = descend(errors, _start(errors), lowest_P, highest_P, max_steps=self.max_steps)
        floor_D = lowest_D + span_D * found_DP[:, 0]
        scale_D = span_D * np.exp(found_DP[:, 1] - np.einsum("dk,k->d", found_DP[:, 2:], mean_K))
        return [_law(float(c), float(k), t_K) for c, k, t_K in zip(floor_D, scale_D, found_DP[:, 2:], strict=True)]


def _law(c: float, k: float, t_K: np.ndarray) -> FittedLaw:
    return FittedLaw(
        predict=lambda shares, _tokens: c + k * np.exp(np.einsum("mk,k->m", shares, t_K)),
        parameters={"c": c, "k": k, **{f"t_{j}": float(t) for j, t in enumerate(t_K)}},
    )


@dataclass(frozen=True)
class _Errors:
    """What is minimised: the squared errors of each draw, and the ridge."""

    centred_NK: np.ndarray
    losses_DN: np.ndarray
    ridge_D: np.ndarray

    def above_floor(self, at_DP: np.ndarray) -> np.ndarray:
        """Return ``k * exp(t . r)``, shape (D, N)."""
        exponent_DN = at_DP[:, 1:2] + np.einsum("dk,nk->dn", at_DP[:, 2:], self.centred_NK)
        return np.exp(np.minimum(exponent_DN, MAX_EXPONENT))

    def costs(self, at_DP: np.ndarray) -> np.ndarray:
        """Return the minimised sum of each draw, shape (D,)."""
        residual_DN = self.losses_DN - at_DP[:, :1] - self.above_floor(at_DP)
        ridge_D = self.ridge_D * np.einsum("dk,dk->d", at_DP[:, 2:], at_DP[:, 2:])
        return np.einsum("dn,dn->d", residual_DN, residual_DN) + ridge_D

    def normal_equations(self, at_DP: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the Gauss-Newton matrix, shape (D, P, P), and minus half the gradient, shape (D, P)."""
        above_DN = self.above_floor(at_DP)
        residual_DN = self.losses_DN - at_DP[:, :1] - above_DN
        above_DN1 = above_DN[:, :, None]
        slopes_DNP = np.concatenate([np.ones_like(above_DN1), above_DN1, above_DN1 * self.centred_NK], axis=2)
        matrix_DPP = np.einsum("dnp,dnq->dpq", slopes_DNP, slopes_DNP)
        towards_DP = np.einsum("dnp,dn->dp", slopes_DNP, residual_DN)
        ridges = np.arange(2, at_DP.shape[1])
        matrix_DPP[:, ridges, ridges] += self.ridge_D[:, None]
        towards_DP[:, 2:] -= self.ridge_D[:, None] * at_DP[:, 2:]
        return matrix_DPP, towards_DP

    def part(self, chosen: np.ndarray) -> _Errors:
        """Return the draws `chosen`."""
        return _Errors(self.centred_NK, self.losses_DN[chosen], self.ridge_D[chosen])


def _start(errors: _Errors) -> np.ndarray:
    """Return the best of the log-linear fits over the depths scanned, shape (D, P)."""
    design_NQ = np.concatenate([np.ones((len(errors.centred_NK), 1)), errors.centred_NK], axis=1)
    ridges = np.arange(1, design_NQ.shape[1])
    found, costs = [], []
    for log_depth in np.linspace(*LOG_DEPTHS, NUM_DEPTHS):
        above_DN = errors.losses_DN + np.exp(log_depth)
        weighted_DNQ = above_DN[:, :, None] * design_NQ
        matrix_DQQ = np.einsum("dnp,dnq->dpq", weighted_DNQ, weighted_DNQ)
        matrix_DQQ[:, ridges, ridges] += errors.ridge_D[:, None]
        right_DQ = np.einsum("dnq,dn->dq", weighted_DNQ, above_DN * np.log(above_DN))
        solved_DQ = np.linalg.solve(matrix_DQQ, right_DQ[:, :, None])[:, :, 0]
        found.append(np.concatenate([np.full((len(solved_DQ), 1), -np.exp(log_depth)), solved_DQ], axis=1))
        costs.append(errors.costs(found[-1]))
    best_D = np.argmin(np.stack(costs), axis=0)
    return np.stack(found)[best_D, np.arange(len(best_D))]
