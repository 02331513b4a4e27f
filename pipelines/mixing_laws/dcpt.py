"""The D-CPT law at one model size: ``L(D, r) = E + B * r**eta / D**beta + C / (r + eps)**gamma`` (2406.01375, equation 6).

r is the own share of the corpus that is measured and D the tokens of training, here in units of T0, the longest measured;
the paper's term in the number of parameters is part of E. B and C are at least 0. E is free, as changes of loss may be
negative.

For fixed exponents the law is linear (variable projection, Golub and Pereyra 1973): each term is scanned over its own two
exponents, all pairs of terms are solved at once from their inner products, and Levenberg-Marquardt steps go on from the best
pair of each draw. Nothing is random. gamma and eps trade off against each other over the shares that a sweep covers, so
predictions are determined better than parameters. The paper fits by L-BFGS with a Huber loss.

Where every measurement has one number of tokens, D says nothing: B is 0 and the law is its last term.

Shapes: U and V choices of exponents of the first and the second term, N points, D draws, P = 7 parameters in the order E, B,
C, eta, beta, gamma, log eps, where E and C belong to ``C * ((r + eps)**-gamma - 1) / gamma``: well-behaved at small gamma.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from pydantic import Field

from pipelines.mixing_laws import FittedLaw, MixingLaw, Observations, relative_tokens
from pipelines.mixing_laws._descent import descend
from pipelines.mixing_laws._scan import MAX_RESIDUALS, ROUNDING

NUM_PARAMETERS = 7


class Dcpt(MixingLaw):
    """Own share and tokens, the terms of the D-CPT law."""

    reads: ClassVar[frozenset[str]] = frozenset({"own_share", "tokens"})
    min_points: ClassVar[int] = 5

    eta: tuple[float, float] = (0.0, 2.0)
    """Bounds of the share's exponent in the term of tokens."""
    beta: tuple[float, float] = (0.05, 1.5)
    """Bounds of the tokens' exponent."""
    gamma: tuple[float, float] = (0.02, 3.0)
    """Bounds of the share's exponent in the last term."""
    eps: tuple[float, float] = (0.001, 0.3)
    """Bounds of what is added to the share, scanned by its logarithm."""
    num_scanned: int = Field(default=8, ge=2)
    """Values scanned of each of the four."""
    max_steps: int = Field(default=200, ge=1)
    """Levenberg-Marquardt steps at most."""

    def fit_many(self, observed: Observations, losses_DN: np.ndarray) -> list[FittedLaw]:
        """Fit all draws at once: one scan, and then one small linear system a draw and step.

        Raises:
            GristmillError: a measurement was taken after no tokens.
        """
        tokens, longest = relative_tokens(observed)
        share = observed.own_share
        bounds_42 = np.asarray([self.eta, self.beta, self.gamma, np.log(self.eps)])
        highest_b = np.inf
        if np.ptp(tokens) == 0:
            bounds_42[:2] = highest_b = 0.0
        start_DP = _scan(share, tokens, np.linspace(bounds_42[:, 0], bounds_42[:, 1], self.num_scanned, axis=1), losses_DN)
        lowest_P, highest_P = np.append([-np.inf, 0.0, 0.0], bounds_42[:, 0]), np.append([np.inf, highest_b, np.inf], bounds_42[:, 1])
        size = max(1, MAX_RESIDUALS // (len(share) * NUM_PARAMETERS))
        parts = [slice(first, first + size) for first in range(0, len(losses_DN), size)]
        return [
            _law(observed.own, longest, found)
            for part in parts
            for found in descend(_Errors(share, tokens, losses_DN[part]), start_DP[part], lowest_P, highest_P, max_steps=self.max_steps)
        ]


def _law(own: int, longest: float, found_P: np.ndarray) -> FittedLaw:
    level, b, slope, eta, beta, gamma, log_eps = found_P.tolist()
    c, eps = slope / gamma, float(np.exp(log_eps))

    def predict(shares: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        r = shares[:, own]
        return level - c + b * r**eta / (tokens / longest) ** beta + c / (r + eps) ** gamma

    return FittedLaw(predict, {"E": level - c, "B": b, "C": c, "eta": eta, "beta": beta, "gamma": gamma, "eps": eps, "T0": longest})


@dataclass(frozen=True)
class _Errors:
    """The squared errors of each draw."""

    share: np.ndarray
    tokens: np.ndarray
    losses_DN: np.ndarray

    def costs(self, at_DP: np.ndarray) -> np.ndarray:
        """Return the sum of each draw, shape (D,)."""
        residual_DN = self.losses_DN - self._predicted(at_DP)[0]
        return np.einsum("dn,dn->d", residual_DN, residual_DN)

    def normal_equations(self, at_DP: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the Gauss-Newton matrices, shape (D, P, P), and minus half the gradients, shape (D, P)."""
        predicted_DN, first_DN, second_DN = self._predicted(at_DP)
        _, b, c, _, _, gamma, log_eps = (column[:, None] for column in at_DP.T)
        offset_DN = self.share + np.exp(log_eps)
        power_DN = offset_DN**-gamma
        log_share = np.log(np.where(self.share > 0, self.share, 1.0))  # r**eta does not change with eta at r = 0
        slopes_DPN = np.stack(
            [
                np.ones_like(first_DN),
                first_DN,
                second_DN,
                b * first_DN * log_share,
                -b * first_DN * np.log(self.tokens),
                -c * (np.log(offset_DN) * power_DN + second_DN) / gamma,
                -c * power_DN * np.exp(log_eps) / offset_DN,
            ],
            axis=1,
        )
        towards_DP = np.einsum("dpn,dn->dp", slopes_DPN, self.losses_DN - predicted_DN)
        return np.einsum("dpn,dqn->dpq", slopes_DPN, slopes_DPN), towards_DP

    def part(self, chosen: np.ndarray) -> _Errors:
        """Return the draws `chosen`."""
        return _Errors(self.share, self.tokens, self.losses_DN[chosen])

    def _predicted(self, at_DP: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the losses and both terms, shape (D, N) each."""
        level, b, c, eta, beta, gamma, log_eps = (column[:, None] for column in at_DP.T)
        first_DN = self.share**eta * self.tokens**-beta
        second_DN = ((self.share + np.exp(log_eps)) ** -gamma - 1.0) / gamma
        return level + b * first_DN + c * second_DN, first_DN, second_DN


def _scan(share: np.ndarray, tokens: np.ndarray, grid_4X: np.ndarray, losses_DN: np.ndarray) -> np.ndarray:
    """Return the parameters of the least squared error of each draw, shape (D, P); at equal error the first of the grid."""
    eta, beta, gamma, log_eps = (values.ravel() for values in _pairs(grid_4X))
    first_UN = share ** eta[:, None] * tokens ** -beta[:, None]
    second_VN = ((share + np.exp(log_eps)[:, None]) ** -gamma[:, None] - 1.0) / gamma[:, None]
    size = max(1, MAX_RESIDUALS // (len(first_UN) * len(second_VN)))
    found = []
    for start in range(0, len(losses_DN), size):
        part_DN = losses_DN[start : start + size]
        b_DUV, c_DUV, gain_DUV = _solve(first_UN, second_VN, part_DN)
        rows = np.arange(len(part_DN))
        u, v = np.divmod(np.argmax(gain_DUV.reshape(len(part_DN), -1), axis=1), len(second_VN))
        b, c = b_DUV[rows, u, v], c_DUV[rows, u, v]
        level = part_DN.mean(axis=1) - b * first_UN.mean(axis=1)[u] - c * second_VN.mean(axis=1)[v]
        found.append(np.stack([level, b, c, eta[u], beta[u], gamma[v], log_eps[v]], axis=1))
    return np.concatenate(found)


def _pairs(grid_4X: np.ndarray) -> list[np.ndarray]:
    """Return eta and beta at all their pairs, and gamma and log eps at all of theirs."""
    return [*np.meshgrid(*grid_4X[:2], indexing="ij"), *np.meshgrid(*grid_4X[2:], indexing="ij")]


def _solve(first_UN: np.ndarray, second_VN: np.ndarray, losses_DN: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return B, C >= 0 and what they take off the squared error, each of shape (D, U, V), for every pair of terms beside a constant."""
    centred_DN = losses_DN - losses_DN.mean(axis=1, keepdims=True)
    first_UN, norm_U = _unit(first_UN)
    second_VN, norm_V = _unit(second_VN)
    along_DU = np.einsum("dn,un->du", centred_DN, first_UN)[:, :, None]
    along_DV = np.einsum("dn,vn->dv", centred_DN, second_VN)[:, None, :]
    cosine_UV = np.einsum("un,vn->uv", first_UN, second_VN)
    free_UV = 1.0 - cosine_UV**2
    solvable = free_UV > ROUNDING
    scale_UV = np.where(solvable, 1.0 / np.where(solvable, free_UV, 1.0), 0.0)
    b_DUV = (along_DU - cosine_UV * along_DV) * scale_UV
    c_DUV = (along_DV - cosine_UV * along_DU) * scale_UV
    both = (b_DUV > 0) & (c_DUV > 0)
    # with two non-negative coefficients the optimum is inside, or on one of the two edges
    only_first = ~both & (along_DU > along_DV)
    b_DUV = np.where(both, b_DUV, np.where(only_first, np.maximum(along_DU, 0.0), 0.0))
    c_DUV = np.where(both, c_DUV, np.where(only_first, 0.0, np.maximum(along_DV, 0.0)))
    gain_DUV = b_DUV * along_DU + c_DUV * along_DV
    return b_DUV / norm_U[:, None], c_DUV / norm_V, gain_DUV


def _unit(terms_XN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the terms less their mean at length 1, and their lengths; a term that does not vary becomes 0 with length 1."""
    centred_XN = terms_XN - terms_XN.mean(axis=1, keepdims=True)
    norm_X = np.sqrt(np.einsum("xn,xn->x", centred_XN, centred_XN))
    varies_X = norm_X > ROUNDING * np.abs(terms_XN).max(axis=1) * np.sqrt(terms_XN.shape[1])
    norm_X = np.where(varies_X, norm_X, 1.0)
    return np.where(varies_X[:, None], centred_XN / norm_X[:, None], 0.0), norm_X
