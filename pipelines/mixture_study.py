"""The search for a mixture: what is asked, the laws that answer, the optimum, and how far draws of the evidence move it.

Shapes: K corpora that shares are of, D corpora that were measured, N probes, B draws of the bootstrap.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, model_validator

from pipelines import plugins
from pipelines.errors import GristmillError, UnknownName
from pipelines.manifests import Member
from pipelines.mixing_laws import FittedLaw, MixingLaw
from pipelines.plugins import Settings
from pipelines.share_solver import Optimum, Problem, best_mixture, nearest_mixture
from pipelines.shares import role_tokens
from pipelines.swarm import DomainFit, Swarm, bootstrap_fits, fit_domain, fitted_probes, fold_error

AUTOMATIC = ("exponential", "trees")
"""The laws of ``auto``."""
FOLDS = 10
"""Of the cross-validation that compares two laws."""
STARTS = 4
"""Measured mixtures that the search starts from, beside the natural and the even one."""
SURE = (0.025, 0.975)

Nats = Annotated[float, Field(gt=0)]


class SearchSettings(Settings):
    """How the mixture is searched for."""

    tolerance_nats: Nats = 0.05
    """How much the loss of a general domain may rise, in nats per token (2407.17467, section 5.1)."""
    guards: dict[str, Nats] = Field(default_factory=dict)
    """Tolerance of each guarded domain, in nats per token; every measured general domain at `tolerance_nats` where empty."""
    objective: dict[str, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)
    """Weights of the mean loss that is minimised; the target domains by their selected tokens where empty."""
    tokens: int | None = Field(default=None, ge=1)
    """Tokens of the training that the mixture is for, over which epochs are counted; those of the probes where not given."""
    max_epochs: float = Field(default=4.0, gt=0)
    """No domain is read more often (UniMax, 2304.09151; four epochs: 2305.16264)."""
    min_share: float = Field(default=0.02, ge=0, lt=1)
    """Least share of a guarded domain: without replay it follows another regime than the law."""
    law: str = "exponential"
    """A plugin of `mixing_laws/` that reads shares; `auto` takes the one of least cross-validated error in units of the tolerance."""
    cross_check: str | None = "trees"
    """A second law, whose cross-validated error is reported beside the first's where the swarm is large enough for it."""
    draws: int = Field(default=100, ge=0)
    """Bootstrap draws over held-out windows and runs."""
    seed: int = 0
    """Of the bootstrap."""
    max_interval: float = Field(default=0.3, gt=0)
    """A 95 % interval of the target share wider than this is reported."""
    on_refusal: Literal["error", "lower_bound", "manual"] = "lower_bound"
    """`error` stops; `lower_bound` takes the best measured mixture that holds every guard; `manual` takes `shares`."""
    shares: dict[str, Annotated[float, Field(ge=0, le=1)]] | None = None
    """The mixture taken when `on_refusal` is `manual`."""

    @model_validator(mode="after")
    def _manual_shares(self) -> SearchSettings:
        if self.on_refusal == "manual" and self.shares is None:
            raise ValueError("`on_refusal: manual` needs `shares`: the mixture that is taken then")
        if self.shares is not None and abs(sum(self.shares.values()) - 1.0) > 1e-6:
            raise ValueError(f"`shares` sum to {sum(self.shares.values()):.6f}; they must sum to 1")
        return self


class VerifiedSearchSettings(SearchSettings):
    """How a searched mixture is verified: the settings that it was found with, and what a failure means."""

    on_unverified: Literal["refit", "lower", "error"] = "refit"
    """`refit` hands on the mixture found with the verification as one more point; `lower` the best measured mixture that holds
    every guard; `error` stops."""


@dataclass(frozen=True)
class Question:
    """What is minimised, and what bounds it."""

    roles: Mapping[str, str]
    """Role of each domain, in the order of columns; K of them."""
    available_K: np.ndarray
    """Selected tokens."""
    guards: Mapping[str, float]
    weights: Mapping[str, float]
    """Of the objective; they sum to 1."""
    low_K: np.ndarray
    high_K: np.ndarray
    tokens: int
    """Tokens of the training that the mixture is for."""
    max_epochs: float

    @property
    def domains(self) -> tuple[str, ...]:
        """The K domains."""
        return tuple(self.roles)

    def target_share(self, shares_K: np.ndarray) -> float:
        """Return the share of all target domains."""
        return float(sum(share for share, role in zip(shares_K, self.roles.values(), strict=True) if role == "target"))

    def column(self, shares: Mapping[str, float]) -> np.ndarray:
        """Return `shares` by column, shape (K,)."""
        if unknown := sorted(set(shares) - set(self.roles)):
            raise UnknownName("domain of the mixture", unknown[0], self.roles)
        return np.asarray([shares.get(domain, 0.0) for domain in self.roles])


def selected_tokens(selection: Sequence[Member]) -> dict[str, tuple[str, int]]:
    """Return role and selected tokens of each domain, sorted by name."""
    found = {domain: (role, count) for role, tokens in role_tokens(selection).items() for domain, count in tokens.items()}
    return dict(sorted(found.items()))


def ask(settings: SearchSettings, selected: Mapping[str, tuple[str, int]], swarm: Swarm) -> Question:
    """Return what `settings` ask of the domains that are selected and measured.

    Raises:
        UnknownName: a guard or a weight is of a domain without held-out windows.
        GristmillError: nothing is guarded, or nothing is learned.
    """
    measured = tuple(domain for domain in selected if domain in swarm.deltas)
    for name in (*settings.guards, *settings.objective):
        if name not in measured:
            raise UnknownName("domain with held-out windows", name, measured)
    guards = settings.guards or {d: settings.tolerance_nats for d in measured if selected[d][0] == "general"}
    weights = settings.objective or {d: float(selected[d][1]) for d in measured if selected[d][0] == "target"}
    if not guards or sum(weights.values()) <= 0:
        raise GristmillError(
            f"{'no domain is guarded' if not guards else 'no domain is to be learned'}; measured: {', '.join(measured) or 'none'}; "
            "set `windows_per_domain`, or name domains in `guards` and `objective`"
        )
    tokens = settings.tokens or swarm.tokens
    available_K = np.asarray([float(count) for _, count in selected.values()])
    high_K = np.minimum(1.0, settings.max_epochs * available_K / tokens)
    low_K = np.minimum(high_K, [settings.min_share if domain in guards else 0.0 for domain in selected])
    if low_K.sum() > 1.0:
        raise GristmillError(f"`min_share` {settings.min_share} of {len(guards)} guarded domains is more than all; lower it")
    total = sum(weights.values())
    return Question(
        roles={domain: role for domain, (role, _) in selected.items()},
        available_K=available_K,
        guards=dict(sorted(guards.items())),
        weights={domain: weight / total for domain, weight in sorted(weights.items()) if weight > 0},
        low_K=low_K,
        high_K=high_K,
        tokens=tokens,
        max_epochs=settings.max_epochs,
    )


@dataclass(frozen=True)
class Study:
    """What the swarm answers."""

    settings: SearchSettings
    question: Question
    swarm: Swarm
    law: str
    fits: Mapping[str, DomainFit]
    """By measured domain; empty where there are too few mixtures to fit."""
    fold_errors: Mapping[str, Mapping[str, float]]
    """By law and domain, nats per token: of the laws that were compared."""
    optimum: Optimum | None = None
    nearest: Optimum | None = None
    """Where no mixture holds every guard: the one that comes nearest."""
    safe: Optimum | None = None
    """The optimum with every tolerance less the upper half of its guard's interval at `optimum`."""
    drawn_laws: Mapping[str, Sequence[FittedLaw]] = field(default_factory=dict)
    """By measured domain, B laws."""
    drawn_shares: np.ndarray | None = None
    """The optimum of each draw that has one, shape (at most B, K)."""

    @property
    def needed_mixtures(self) -> int:
        """Distinct mixtures that a fit needs: K + 2, one more than the exponential law has free parameters."""
        return len(self.question.roles) + 2

    def problem(self, laws: Sequence[FittedLaw] | None = None, margins: Mapping[str, float] | None = None) -> Problem:
        """Return what is solved: with the fitted laws, or with `laws` in their order."""
        guards, weights = self.question.guards, self.question.weights
        return Problem(
            laws=tuple(laws or [fit.law for fit in self.fits.values()]),
            weights_D=np.asarray([weights.get(domain, 0.0) for domain in self.fits]),
            tolerances_D=np.asarray([guards.get(domain, np.inf) for domain in self.fits]),
            margins_D=np.asarray([(margins or {}).get(domain, 0.0) for domain in self.fits]),
            low_K=self.question.low_K,
            high_K=self.question.high_K,
            tokens=float(self.swarm.tokens),
        )

    def predicted(self, domain: str, shares_K: np.ndarray) -> tuple[float, float | None, float | None]:
        """Return the predicted change of loss of `domain` and the ends of its 95 % interval."""
        at, tokens = shares_K[None], np.asarray([float(self.swarm.tokens)])
        value = float(self.fits[domain].law.predict(at, tokens)[0])
        drawn = [float(law.predict(at, tokens)[0]) for law in self.drawn_laws.get(domain, ())]
        if not drawn:
            return value, None, None
        low, high = np.quantile(drawn, SURE)
        return value, float(low), float(high)

    def shares_interval(self) -> np.ndarray | None:
        """Return the 95 % interval of each share, shape (2, K); None where fewer than half of the draws have an optimum."""
        if self.drawn_shares is None or len(self.drawn_shares) < max(1, self.settings.draws / 2):
            return None
        return np.quantile(self.drawn_shares, SURE, axis=0)

    def ratio_interval(self) -> tuple[float, float] | None:
        """Return the 95 % interval of the share of all target domains."""
        if self.drawn_shares is None or self.shares_interval() is None:
            return None
        low, high = np.quantile([self.question.target_share(shares) for shares in self.drawn_shares], SURE)
        return float(low), float(high)


def study_swarm(settings: SearchSettings, question: Question, swarm: Swarm) -> Study:
    """Fit the laws, solve for the mixture, and solve again for each draw of the evidence."""
    domains = tuple(domain for domain in question.domains if domain in swarm.deltas)
    errors = _compare(settings, question, swarm, domains)
    name = _chosen_law(settings, question, errors)
    law = _law(name)
    study = Study(settings, question, swarm, name, {}, errors)
    if not _enough(study, law, domains):
        return study
    fits = {domain: fit_domain(law, swarm, domain, with_own=domain in question.guards) for domain in domains}
    study = replace(study, fits=fits)
    starts = _starts(study)
    problem = study.problem()
    optimum = best_mixture(problem, starts, seed=settings.seed)
    nearest = None
    if optimum is None:
        nearest = nearest_mixture(problem, starts, seed=settings.seed)
        optimum = best_mixture(problem, np.stack([nearest.shares_K]), seed=settings.seed) if nearest.excess <= 0 else None
    study = replace(study, optimum=optimum, nearest=nearest)
    return _with_draws(study, law, starts) if settings.draws else study


def _law(name: str) -> MixingLaw:
    law: MixingLaw = plugins.build("mixing_laws", name)  # type: ignore[assignment]
    if "shares" not in law.reads:
        fitting = [other for other in plugins.names("mixing_laws") if "shares" in plugins.load("mixing_laws", other).reads]  # type: ignore[attr-defined]
        raise GristmillError(
            f"law {name!r} reads {', '.join(sorted(law.reads))}; a search needs one that reads shares: {', '.join(fitting)}"
        )
    return law


def _compare(settings: SearchSettings, question: Question, swarm: Swarm, domains: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return the cross-validated errors of the laws, where the swarm is large enough to fit two of them without a fold."""
    names = AUTOMATIC if settings.law == "auto" else tuple(dict.fromkeys([settings.law, settings.cross_check or settings.law]))
    folds = min(FOLDS, swarm.num_mixtures)
    fitted = [fitted_probes(swarm, domain, with_own=domain in question.guards) for domain in domains]
    fewest = min(int((mine & (swarm.mixture_N % folds != fold)).sum()) for mine in fitted for fold in range(folds))
    names = tuple(name for name in names if fewest >= max(_law(name).min_points, 1))
    if len(names) < 2:
        return {}
    return {
        name: {domain: fold_error(_law(name), swarm, domain, with_own=domain in question.guards, folds=folds) for domain in domains}
        for name in names
    }


def _chosen_law(settings: SearchSettings, question: Question, errors: Mapping[str, Mapping[str, float]]) -> str:
    """Return the law of least mean error in units of the tolerance; the first of `AUTOMATIC` where none could be compared."""
    if settings.law != "auto":
        return settings.law
    if not errors:
        return AUTOMATIC[0]
    means = {
        name: np.mean([error / question.guards.get(domain, settings.tolerance_nats) for domain, error in by_domain.items()])
        for name, by_domain in errors.items()
    }
    return min(means, key=means.__getitem__)


def _enough(study: Study, law: MixingLaw, domains: Sequence[str]) -> bool:
    swarm = study.swarm
    fitted = [fitted_probes(swarm, domain, with_own=domain in study.question.guards) for domain in domains]
    return all(len(np.unique(swarm.mixture_N[mine])) >= study.needed_mixtures and int(mine.sum()) > law.min_points for mine in fitted)


def _starts(study: Study) -> np.ndarray:
    """Return where the search starts: the best measured mixture, more of those predicted best, the natural and the even one."""
    swarm, question, problem = study.swarm, study.question, study.problem()
    mixtures = swarm.mixtures()
    values = problem.values(mixtures)
    ranks = problem.objective(values) + 1e3 * np.maximum(0.0, problem.excess(values))
    best = best_measured(question, swarm)
    chosen = [mixtures[best]] if best is not None else []
    chosen += list(mixtures[np.argsort(ranks, kind="stable")[:STARTS]])
    even = np.full(len(question.roles), 1.0 / len(question.roles))
    return np.stack([*chosen, question.available_K / question.available_K.sum(), even])


def best_measured(question: Question, swarm: Swarm) -> int | None:
    """Return the measured mixture of least objective that held every guard and holds every cap; None where none does."""
    held = (swarm.mixtures() <= question.high_K + 1e-9).all(axis=1)
    for domain, tolerance in question.guards.items():
        held &= swarm.over_seeds(swarm.means(domain)) <= tolerance
    objective = sum(weight * swarm.over_seeds(swarm.means(domain)) for domain, weight in question.weights.items())
    return int(np.argmin(np.where(held, objective, np.inf))) if held.any() else None


def _with_draws(study: Study, law: MixingLaw, starts: np.ndarray) -> Study:
    """Return `study` with the laws and the optimum of each draw, each searched from the optimum, and the safe mixture."""
    settings, generator = study.settings, np.random.Generator(np.random.Philox(key=study.settings.seed))
    laws = {
        domain: bootstrap_fits(law, study.swarm, domain, fit, draws=settings.draws, generator=generator)
        for domain, fit in study.fits.items()
    }
    study = replace(study, drawn_laws=laws)
    if study.optimum is None:
        return study
    warm = np.stack([study.optimum.shares_K, starts[0]])
    found = [best_mixture(study.problem(drawn), warm, seed=settings.seed) for drawn in zip(*laws.values(), strict=True)]
    shares = np.asarray([optimum.shares_K for optimum in found if optimum is not None])
    study = replace(study, drawn_shares=shares.reshape(-1, len(study.question.roles)))
    margins = {}
    for domain in study.question.guards:
        value, _, high = study.predicted(domain, study.optimum.shares_K)
        margins[domain] = max(0.0, (high or value) - value)
    return replace(study, safe=best_mixture(study.problem(margins=margins), np.concatenate([warm, starts]), seed=settings.seed))
