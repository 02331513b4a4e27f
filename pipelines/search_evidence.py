"""Why a searched mixture is not to be trusted, and what is to be known of one that is: codes, what was seen, remedies."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pipelines.mixture_study import Study
from pipelines.share_solver import FEASIBLE

Row = dict[str, str]

NEAR = 0.05
"""Shares further outside the measured ones than this are reported."""
STATIONARY = 1e-3
"""A larger part of the gradient that no constraint explains is reported."""
TIGHT = 1e-3
"""Guards whose excess is this near the largest are those that cannot be held together."""
BETTER = 0.8
"""A second law whose error is below this part of the first's is reported."""


def refusals_of(study: Study) -> list[Row]:
    """Return why the mixture is not to be trusted; empty where it is."""
    if not study.fits:
        return list(_too_few(study))
    return [*_infeasible(study), *_loo_error(study), *_noisy(study), *_not_learned(study)]


def warnings_of(study: Study, unmeasured: tuple[str, ...]) -> list[Row]:
    """Return what a reader of the mixture is to know; the estimate stands. `unmeasured` domains have no held-out window."""
    found = [*_unmeasured(unmeasured), *_base_unconverged(study), *_longer(study)]
    if study.fits:
        found += [*_second_law(study), *_concave(study)]
    if study.optimum is not None:
        found += [*_slack(study), *_outside(study), *_interval(study), *_stationary(study), *_forgotten_target(study)]
    return found


def _row(code: str, seen: str, remedy: str) -> Row:
    return {"code": code, "seen": seen, "remedy": remedy}


# Refusals


def _too_few(study: Study) -> Iterator[Row]:
    found, wanted = study.swarm.num_mixtures, study.needed_mixtures
    lacking = [d for d in study.question.guards if (study.swarm.shares_NK[:, study.question.domains.index(d)] <= 0).any()]
    without = f"; probes without {', '.join(lacking)} are not fitted" if lacking else ""
    yield _row(
        "too_few_mixtures",
        f"{found} distinct mixtures of {len(study.question.roles)} domains{without}",
        f"probe at least {wanted}, better {3 * (len(study.question.roles) + 1)}, with every guarded domain in each",
    )


def _infeasible(study: Study) -> Iterator[Row]:
    if study.optimum is not None or study.nearest is None:
        return
    question, nearest = study.question, study.nearest
    if not study.problem().has_room:
        most = int(question.max_epochs * question.available_K.sum())
        yield _row(
            "infeasible",
            f"{question.max_epochs:g} epochs of every domain fill {question.high_K.sum():.0%} of {question.tokens:,} tokens",
            f"select more text, raise `max_epochs`, or train on at most {most:,} tokens",
        )
        return
    held = dict(zip(study.fits, nearest.values_D, strict=True))
    excess = {d: held[d] / tolerance - 1.0 for d, tolerance in question.guards.items()}
    names = [d for d, value in excess.items() if value > FEASIBLE and value >= max(excess.values()) - TIGHT]
    seen = ", ".join(f"{d} rises by {held[d]:+.4f} nats at best, of {question.guards[d]:g} allowed" for d in names)
    capped = [d for d in names if nearest.shares_K[question.domains.index(d)] >= question.high_K[question.domains.index(d)] - FEASIBLE]
    more = f"select more of {', '.join(capped)} or raise `max_epochs`, or " if capped else ""
    allow = ", ".join(f"{d} {np.ceil(held[d] * 1e3) / 1e3:g}" for d in names)
    yield _row("infeasible", seen, f"{more}allow in `guards` {allow}, train for fewer tokens or at a lower learning rate")


def _loo_error(study: Study) -> Iterator[Row]:
    found = {d: study.fits[d].loo_error for d in study.question.guards}
    wrong = {d: error for d, error in found.items() if not error <= study.question.guards[d] / 2}
    if wrong:
        seen = ", ".join(
            f"{d}: {error:.4f} nats at mixtures left out, tolerance {study.question.guards[d]:g}" for d, error in wrong.items()
        )
        yield _row("loo_error", seen, "probe more mixtures, with more seeds, or measure more windows; it may be half the tolerance")


def _noisy(study: Study) -> Iterator[Row]:
    place = nearest_probe(study)
    wrong = {}
    for domain, tolerance in study.question.guards.items():
        error = study.swarm.standard_errors(domain)[place]
        if not error <= tolerance / 5:
            wrong[domain] = (error, tolerance)
    if not wrong:
        return
    seen = ", ".join(f"{d}: standard error {error:.4f} nats" for d, (error, _) in wrong.items())
    finite = [(error / (tolerance / 5)) ** 2 for error, tolerance in wrong.values() if np.isfinite(error)]
    wanted = f"{np.ceil(max(finite)):.0f}x as many" if finite else "two or more"
    yield _row("noisy_evaluation", f"{seen} at probe {study.swarm.probes[place]}", f"measure {wanted} held-out windows of each")


def _not_learned(study: Study) -> Iterator[Row]:
    measured = float(measured_objective(study)[nearest_probe(study)])
    predicted = study.optimum.objective if study.optimum is not None else measured
    if measured >= 0 or predicted >= 0:
        yield _row(
            "target_not_learned",
            f"the mean target loss changes by {measured:+.4f} nats at the nearest probe, predicted {predicted:+.4f}",
            "train the probes longer, raise their learning rate, or give the target more of the mixture",
        )


def nearest_probe(study: Study) -> int:
    """Return the probe nearest to the optimum, or to where the guards are held best, by the sum of differences of shares."""
    found = study.optimum or study.nearest
    if found is None:
        return 0
    return int(np.argmin(np.abs(study.swarm.shares_NK - found.shares_K).sum(axis=1)))


def measured_objective(study: Study) -> np.ndarray:
    """Return the weighted mean change of the target's loss by probe, shape (N,)."""
    return np.sum([weight * study.swarm.means(domain) for domain, weight in study.question.weights.items()], axis=0)


# Warnings


def _unmeasured(names: tuple[str, ...]) -> Iterator[Row]:
    if names:
        yield _row(
            "unmeasured",
            f"no held-out window of {', '.join(names)}: neither guarded nor learned on purpose",
            "raise `held_out` of them in project.yaml, and set `windows_per_domain`",
        )


def _base_unconverged(study: Study) -> Iterator[Row]:
    lowest = int(np.argmin([study.question.target_share(shares) for shares in study.swarm.shares_NK]))
    for domain, tolerance in study.question.guards.items():
        change = float(study.swarm.means(domain)[lowest])
        if change < -tolerance:
            yield _row(
                "base_unconverged",
                f"{domain} loss {change:+.4f} nats at {study.swarm.probes[lowest]}: the base still improves on it",
                "the mixture depends on its spare learning; train the base longer",
            )


def _longer(study: Study) -> Iterator[Row]:
    if study.question.tokens > study.swarm.tokens:
        yield _row(
            "longer_than_measured",
            f"the mixture is for {study.question.tokens:,} tokens, the probes measured after {study.swarm.tokens:,}",
            "guards hold at the measured length; train the probes longer where losses still move at their end",
        )


def _second_law(study: Study) -> Iterator[Row]:
    mine = study.fold_errors.get(study.law, {})
    for name, errors in study.fold_errors.items():
        better = [d for d in study.question.guards if name != study.law and errors[d] < BETTER * mine[d]]
        if better:
            seen = ", ".join(f"{d} {errors[d]:.4f} against {mine[d]:.4f} nats" for d in better)
            yield _row("cross_check_better", f"{name} predicts left-out folds better than {study.law}: {seen}", "set `law: auto`")


def _concave(study: Study) -> Iterator[Row]:
    problem = study.problem()
    if problem.exponentials is not None and not problem.is_convex:
        names = [d for d, fit in study.fits.items() if fit.law.parameters["k"] < 0]
        yield _row(
            "concave_law",
            f"the law of {', '.join(names)} bends downwards: the search may end in a mixture that is best only near it",
            "compare with the best measured mixture; probe more mixtures",
        )


def _slack(study: Study) -> Iterator[Row]:
    if study.optimum is not None and study.optimum.excess < -TIGHT:
        yield _row(
            "no_guard_binds",
            f"every guard has room at the best mixture: {-study.optimum.excess:.0%} of its tolerance or more",
            "lower the tolerances, or read it as bounded by floors and epochs alone",
        )


def _outside(study: Study) -> Iterator[Row]:
    if study.optimum is None:
        return
    low, high = study.swarm.shares_NK.min(axis=0), study.swarm.shares_NK.max(axis=0)
    for place, domain in enumerate(study.question.domains):
        share = float(study.optimum.shares_K[place])
        if share < low[place] - NEAR or share > high[place] + NEAR:
            yield _row(
                "outside_measured",
                f"share {share:.3f} of {domain}, measured from {low[place]:.3f} to {high[place]:.3f}",
                "probe mixtures there, or verify the mixture by a run",
            )


def _interval(study: Study) -> Iterator[Row]:
    if not study.settings.draws:
        return
    interval = study.ratio_interval()
    if interval is None:
        drawn = 0 if study.drawn_shares is None else len(study.drawn_shares)
        yield _row(
            "wide_interval",
            f"only {drawn} of {study.settings.draws} draws of the evidence have a mixture that holds every guard",
            "measure more windows, or probe more mixtures near the best",
        )
    elif interval[1] - interval[0] > study.settings.max_interval:
        yield _row(
            "wide_interval",
            f"the 95 % interval of the target share is {interval[1] - interval[0]:.2f} wide",
            "measure more windows, or probe more mixtures near the best",
        )


def _stationary(study: Study) -> Iterator[Row]:
    residual = study.optimum.kkt_residual if study.optimum is not None else None
    if residual is not None and residual > STATIONARY:
        yield _row(
            "not_stationary",
            f"{residual:.1%} of the objective's gradient is left at the best mixture",
            "the search did not settle: compare with the best measured mixture",
        )


def _forgotten_target(study: Study) -> Iterator[Row]:
    if study.optimum is None:
        return
    values = dict(zip(study.fits, study.optimum.values_D, strict=True))
    for domain in study.question.weights:
        if values[domain] >= 0:
            yield _row(
                "target_domain_rises",
                f"{domain} is part of the objective, and its loss is predicted to change by {values[domain]:+.4f} nats",
                "give it more weight in `objective`, or guard it",
            )
