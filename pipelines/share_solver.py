"""The best mixture: a weighted mean of predicted losses, minimised over the shares under guards, floors and caps.

    minimise    sum_d weight_d * L_d(r)
    subject to  L_d(r) + margin_d <= tolerance_d   for every guarded corpus
                low_j <= r_j <= high_j             (caps of epochs: UniMax, 2304.09151)
                sum_j r_j = 1

With exponential laws ``L(r) = c + k * exp(t . r)`` and k >= 0 (2403.16952, equation 1) all of it is convex: the best mixture
found from any start is the best there is. It is found by SLSQP (Kraft 1988) from several starts, and the Karush-Kuhn-Tucker
conditions are then checked apart from it: the multipliers are a non-negative least squares fit of the objective's
gradient by those of the constraints that bind. A multiplier is what the objective would gain per unit of a bound.

Laws without a gradient, as trees, are searched by simulated mixtures, the best of which are averaged (RegMix, 2407.01492).

Shapes: K corpora that shares are of, D corpora with a law, M mixtures, S starts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from pipelines.mixing_laws import FittedLaw

FEASIBLE = 1e-6
"""Excess over a tolerance, in units of it, that counts as none."""
BINDS = 1e-5
"""A bound nearer than this, in shares or in units of the tolerance, binds."""
SIMULATED = 20_000
AVERAGED = 100
"""Mixtures simulated where laws have no gradient, and how many of the best are averaged (RegMix' 100)."""


@dataclass(frozen=True)
class Problem:
    """What is minimised over the shares, and what bounds them."""

    laws: tuple[FittedLaw, ...]
    """One a corpus, D of them."""
    weights_D: np.ndarray
    """Of the objective; 0 where a corpus is not part of it."""
    tolerances_D: np.ndarray
    """Highest change of loss, nats per token; infinite where a corpus is not guarded."""
    margins_D: np.ndarray
    """Added to the predicted change of a guarded corpus before it is held against its tolerance."""
    low_K: np.ndarray
    high_K: np.ndarray
    tokens: float
    """Tokens of training that losses are predicted for."""

    def values(self, shares_MK: np.ndarray) -> np.ndarray:
        """Return the predicted changes of loss, shape (M, D)."""
        if self.exponentials is not None:
            floors_D, scales_D, slopes_DK = self.exponentials
            return floors_D + scales_D * np.exp(np.einsum("mk,dk->md", shares_MK, slopes_DK))
        tokens_M = np.full(len(shares_MK), self.tokens)
        return np.stack([law.predict(shares_MK, tokens_M) for law in self.laws], axis=1)

    def slopes(self, shares_K: np.ndarray) -> np.ndarray:
        """Return the gradient of each exponential law at `shares_K`, shape (D, K)."""
        floors_D, _, slopes_DK = self.exponentials or (0.0, None, np.full((len(self.laws), len(shares_K)), np.nan))
        return (self.values(shares_K[None])[0] - floors_D)[:, None] * slopes_DK

    def objective(self, values_MD: np.ndarray) -> np.ndarray:
        """Return the weighted mean, shape (M,)."""
        return np.einsum("md,d->m", values_MD, self.weights_D)

    def excess(self, values_MD: np.ndarray) -> np.ndarray:
        """Return the largest excess over a tolerance, in units of it, shape (M,); below 0 where all are held."""
        return ((values_MD + self.margins_D) / self.tolerances_D - 1.0).max(axis=1)

    @property
    def guarded(self) -> np.ndarray:
        """Places of the guarded corpora."""
        return np.nonzero(np.isfinite(self.tolerances_D))[0]

    @cached_property
    def exponentials(self) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """Return c (D,), k (D,) and t (D, K) where every law is an exponential; None where one has no gradient."""
        if not all({"c", "k", "t_0"} <= set(law.parameters) for law in self.laws):
            return None
        c, k = (np.asarray([law.parameters[name] for law in self.laws]) for name in ("c", "k"))
        return c, k, np.asarray([[law.parameters[f"t_{j}"] for j in range(len(self.low_K))] for law in self.laws])

    @property
    def is_convex(self) -> bool:
        """Whether every law is an exponential that bends upwards."""
        return self.exponentials is not None and bool((self.exponentials[1] >= 0).all())

    @property
    def has_room(self) -> bool:
        """Whether some mixture lies within floors and caps."""
        return bool(self.low_K.sum() <= 1.0 + 1e-12 and self.high_K.sum() >= 1.0 - 1e-12)


@dataclass(frozen=True)
class Optimum:
    """A mixture that was searched for, and how it was found."""

    shares_K: np.ndarray
    values_D: np.ndarray
    objective: float
    excess: float
    """Largest excess over a tolerance, in units of it."""
    method: str
    starts: int
    agreeing: int
    """Starts that ended within 1e-6 of the best objective; 1 of a simulation."""
    kkt_residual: float | None = None
    """What of the objective's gradient no binding constraint explains, as a part of it; None without a gradient."""
    guard_multipliers_D: np.ndarray | None = None
    """Fall of the objective per nat of tolerance."""
    cap_multipliers_K: np.ndarray | None = None
    """Fall of the objective per unit of a higher cap."""


def best_mixture(problem: Problem, starts_SK: np.ndarray, *, seed: int = 0) -> Optimum | None:
    """Return the best mixture that holds every bound, or None where none was found; `starts_SK` need not be feasible."""
    if not problem.has_room:
        return None
    if problem.exponentials is None:
        return _simulated(problem, starts_SK, seed, lambda values, excess: np.where(excess <= FEASIBLE, problem.objective(values), np.inf))
    ends_SK = _descend(problem, _inside(problem, starts_SK), _objective_of)
    values_SD = problem.values(ends_SK)
    scores_S = np.where(problem.excess(values_SD) <= FEASIBLE, problem.objective(values_SD), np.inf)
    best = int(np.argmin(scores_S))
    if not np.isfinite(scores_S[best]):
        return None
    agreeing = int((scores_S <= scores_S[best] + 1e-6 * max(1.0, abs(scores_S[best]))).sum())
    return _with_multipliers(problem, _optimum(problem, ends_SK[best], "slsqp", len(starts_SK), agreeing))


def nearest_mixture(problem: Problem, starts_SK: np.ndarray, *, seed: int = 0) -> Optimum:
    """Return the mixture within floors and caps whose largest excess over a tolerance is least: how near one gets."""
    if problem.exponentials is None:
        found = _simulated(problem, starts_SK, seed, lambda _values, excess: excess)
        if found is not None:
            return found
    inside_SK = _inside(problem, starts_SK)
    ends_SK = _descend(problem, inside_SK, _excess_of) if problem.exponentials is not None else inside_SK
    excess_S = problem.excess(problem.values(ends_SK))
    best = int(np.argmin(excess_S))
    agreeing = int((excess_S <= excess_S[best] + 1e-6).sum())
    return _optimum(problem, ends_SK[best], "slsqp", len(starts_SK), agreeing)


def within(shares_K: np.ndarray, low_K: np.ndarray, high_K: np.ndarray) -> np.ndarray:
    """Return the nearest shares between `low_K` and `high_K` that sum to 1: all moved alike, then clipped.

    Their sum is piecewise linear in the move, with a kink where a share meets a bound.
    """
    kinks = np.sort(np.concatenate([low_K - shares_K, high_K - shares_K]))
    sums = np.clip(shares_K + kinks[:, None], low_K, high_K).sum(axis=1)
    return np.clip(shares_K + np.interp(1.0, sums, kinks), low_K, high_K)


def _inside(problem: Problem, starts_SK: np.ndarray) -> np.ndarray:
    return np.stack([within(start, problem.low_K, problem.high_K) for start in starts_SK])


def _optimum(problem: Problem, shares_K: np.ndarray, method: str, starts: int, agreeing: int) -> Optimum:
    values_MD = problem.values(shares_K[None])
    objective, excess = float(problem.objective(values_MD)[0]), float(problem.excess(values_MD)[0])
    return Optimum(shares_K, values_MD[0], objective, excess, method, starts, agreeing)


# SLSQP

Function = Callable[[np.ndarray], float]
Gradient = Callable[[np.ndarray], np.ndarray]


def _descend(problem: Problem, starts_SK: np.ndarray, kind: Callable[[Problem], tuple[Function, Gradient, bool]]) -> np.ndarray:
    """Return where SLSQP ends from each start, shape (S, K), within the bounds and summing to 1."""
    from scipy.optimize import minimize

    function, gradient, has_slack = kind(problem)
    num_shares = len(problem.low_K)
    guarded = problem.guarded
    ones = np.append(np.ones(num_shares), np.zeros(int(has_slack)))
    bounds = list(zip(problem.low_K, problem.high_K, strict=True)) + [(None, None)] * int(has_slack)

    def room(x: np.ndarray) -> np.ndarray:
        used = problem.values(x[None, :num_shares])[0] + problem.margins_D
        return 1.0 - used[guarded] / problem.tolerances_D[guarded] + (x[-1] if has_slack else 0.0)

    def room_slopes(x: np.ndarray) -> np.ndarray:
        slopes = -problem.slopes(x[:num_shares])[guarded] / problem.tolerances_D[guarded][:, None]
        return np.concatenate([slopes, np.ones((len(guarded), int(has_slack)))], axis=1)

    constraints: list[dict[str, object]] = [{"type": "eq", "fun": lambda x: x @ ones - 1.0, "jac": lambda _: ones}]
    if len(guarded):
        constraints.append({"type": "ineq", "fun": room, "jac": room_slopes})
    ends = []
    for start in starts_SK:
        slack = [float(problem.excess(problem.values(start[None]))[0])] if has_slack else []
        options = {"ftol": 1e-13, "maxiter": 300}
        found = minimize(
            function, np.append(start, slack), jac=gradient, method="SLSQP", bounds=bounds, constraints=constraints, options=options
        )
        usable = np.isfinite(found.x).all()
        ends.append(within(found.x[:num_shares] if usable else start, problem.low_K, problem.high_K))
    return np.stack(ends)


def _objective_of(problem: Problem) -> tuple[Function, Gradient, bool]:
    return (
        lambda x: float(problem.objective(problem.values(x[None]))[0]),
        lambda x: np.einsum("d,dk->k", problem.weights_D, problem.slopes(x)),
        False,
    )


def _excess_of(problem: Problem) -> tuple[Function, Gradient, bool]:
    """The last variable is the excess that every guard may have."""
    last = np.append(np.zeros(len(problem.low_K)), 1.0)
    return lambda x: float(x[-1]), lambda _: last, True


def _with_multipliers(problem: Problem, found: Optimum) -> Optimum:
    """Return `found` with the multipliers of the constraints that bind, and what they leave of the gradient."""
    from scipy.optimize import nnls

    num_shares, shares = len(problem.low_K), found.shares_K
    slopes_DK = problem.slopes(shares)
    downhill = -np.einsum("d,dk->k", problem.weights_D, slopes_DK)
    used_D = (found.values_D + problem.margins_D) / problem.tolerances_D
    tight = np.nonzero(used_D > 1.0 - BINDS)[0]
    full, empty = np.nonzero(shares >= problem.high_K - BINDS)[0], np.nonzero(shares <= problem.low_K + BINDS)[0]
    unit = np.eye(num_shares)
    free = np.ones((1, num_shares))
    columns = np.concatenate([slopes_DK[tight], unit[full], -unit[empty], free, -free])
    solved, left = nnls(columns.T, downhill)
    guards, caps = np.zeros(len(problem.laws)), np.zeros(num_shares)
    guards[tight], caps[full] = solved[: len(tight)], solved[len(tight) : len(tight) + len(full)]
    size = float(np.linalg.norm(downhill - downhill.mean()))
    residual = float(left) / size if size > 0 else 0.0
    return replace(found, kkt_residual=residual, guard_multipliers_D=guards, cap_multipliers_K=caps)


# Simulation


def _simulated(problem: Problem, starts_SK: np.ndarray, seed: int, score: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Optimum | None:
    """Return the mean of the best simulated mixtures where it scores no worse than the median of them, else the best of all."""
    room = 1.0 - problem.low_K.sum()
    generator = np.random.Generator(np.random.Philox(key=seed))
    drawn = problem.low_K + room * generator.dirichlet(np.ones(len(problem.low_K)), SIMULATED)
    drawn = np.concatenate([_inside(problem, starts_SK), drawn[(drawn <= problem.high_K).all(axis=1)]])
    values = problem.values(drawn)
    scores = score(values, problem.excess(values))
    order = np.argsort(scores, kind="stable")[:AVERAGED]
    order = order[np.isfinite(scores[order])]
    if not len(order):
        return None
    mean = within(drawn[order].mean(axis=0), problem.low_K, problem.high_K)
    mean_values = problem.values(mean[None])
    mean_score = float(score(mean_values, problem.excess(mean_values))[0])
    chosen = mean if mean_score <= float(np.median(scores[order])) else drawn[order[0]]
    return _optimum(problem, chosen, "simulation", len(starts_SK), 1)
