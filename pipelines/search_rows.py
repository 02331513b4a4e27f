"""The record of a searched mixture: shares, guards, caps, laws and points as rows, in the order that they are written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from pipelines.manifests import Json
from pipelines.mixture_study import Study, best_measured
from pipelines.rounding import rounded
from pipelines.search_evidence import Row, measured_objective
from pipelines.share_solver import Optimum
from pipelines.swarm import Swarm, rounded_shares

SAME_MIXTURE = 1e-3
"""Mixtures none of whose shares differ by more are one."""
PLAN_ERROR = 1e-3
"""Part of a tolerance by which rounded shares may exceed it."""


def result_of(
    study: Study, shares: Mapping[str, float], decision: str, refusals: Sequence[Row], warnings: Sequence[Row]
) -> dict[str, Json]:
    """Return what is written of `study` and the mixture `shares` that is taken."""
    question, optimum = study.question, study.optimum
    shares_K = question.column(shares)
    safe = _safe_shares(study, shares)
    interval = study.shares_interval()
    targets = _target_rows(study, shares_K)
    predicted = [row["weight"] * row["predicted"] for row in targets if row["predicted"] is not None]
    return {
        "ratio": question.target_share(shares_K),
        "shares": dict(shares),
        "decision": decision,
        "estimate": question.target_share(optimum.shares_K) if optimum is not None else None,
        "estimate_shares": rounded_shares(question.domains, optimum.shares_K) if optimum is not None else None,
        "interval_95": list(study.ratio_interval() or ()) or None,
        "shares_interval_95": None
        if interval is None
        else {domain: [float(low), float(high)] for domain, (low, high) in zip(question.domains, interval.T, strict=True)},
        "safe": question.target_share(question.column(safe)),
        "safe_shares": dict(safe),
        "guards": _guard_rows(study, shares_K),
        "targets": targets,
        "target_prediction": float(sum(predicted)) if len(predicted) == len(targets) else None,
        "caps": _cap_rows(study, shares_K),
        "laws": _law_rows(study),
        "law": {"name": study.law},
        "cross_check": {name: dict(errors) for name, errors in study.fold_errors.items()} or None,
        "solution": _solution(study),
        "tokens": study.swarm.tokens,
        "budget_tokens": question.tokens,
        "tolerance_nats": study.settings.tolerance_nats,
        "points": _point_rows(study),
        "refusals": list(refusals),
        "warnings": list(warnings),
    }


def _safe_shares(study: Study, shares: Mapping[str, float]) -> Mapping[str, float]:
    """Return the mixture whose guards hold at the upper end of their intervals; else the best measured that holds; else `shares`."""
    if study.safe is not None:
        return rounded_shares(study.question.domains, study.safe.shares_K)
    best = best_measured(study.question, study.swarm)
    return shares if best is None else rounded_shares(study.question.domains, study.swarm.mixtures()[best])


def _guard_rows(study: Study, shares_K: np.ndarray) -> list[dict[str, Json]]:
    """Return each guard at the mixture that is taken; where it binds, its multiplier is what the objective gains per nat."""
    optimum = _optimum_at(study, shares_K)
    multipliers = optimum.guard_multipliers_D if optimum is not None else None
    by_domain = {} if multipliers is None else dict(zip(study.fits, multipliers, strict=True))
    rows: list[dict[str, Json]] = []
    for domain, tolerance in study.question.guards.items():
        value, low, high = study.predicted(domain, shares_K) if study.fits else (None, None, None)
        multiplier = float(by_domain[domain]) if domain in by_domain else None
        rows.append(
            {
                "domain": domain,
                "tolerance_nats": tolerance,
                "predicted": value,
                "low": low,
                "high": high,
                "measured": _measured_at(study.swarm, domain, shares_K),
                "binding": value is not None and value >= tolerance * (1 - PLAN_ERROR),
                "multiplier": multiplier,
                "gain_per_0.01_nats": None if multiplier is None else 0.01 * multiplier,
            }
        )
    return rows


def _optimum_at(study: Study, shares_K: np.ndarray) -> Optimum | None:
    """Return the optimum where that is what was taken: multipliers are of no other mixture."""
    optimum = study.optimum
    return optimum if optimum is not None and np.abs(shares_K - optimum.shares_K).max() < 1e-5 else None


def _target_rows(study: Study, shares_K: np.ndarray) -> list[dict[str, Json]]:
    rows: list[dict[str, Json]] = []
    for domain, weight in study.question.weights.items():
        value, low, high = study.predicted(domain, shares_K) if study.fits else (None, None, None)
        rows.append({"domain": domain, "weight": weight, "predicted": value, "low": low, "high": high})
    return rows


def _measured_at(swarm: Swarm, domain: str, shares_K: np.ndarray) -> float | None:
    """Return the change of loss of `domain` where this very mixture was measured."""
    apart = np.abs(swarm.mixtures() - shares_K).max(axis=1)
    place = int(np.argmin(apart))
    return float(swarm.over_seeds(swarm.means(domain))[place]) if apart[place] < SAME_MIXTURE else None


def _cap_rows(study: Study, shares_K: np.ndarray) -> list[dict[str, Json]]:
    """Return how often each domain is read; a cap that binds says what one more epoch would buy."""
    question, optimum = study.question, _optimum_at(study, shares_K)
    multipliers = optimum.cap_multipliers_K if optimum is not None else None
    rows: list[dict[str, Json]] = []
    for place, (domain, role) in enumerate(question.roles.items()):
        available, planned = float(question.available_K[place]), float(shares_K[place]) * question.tokens
        binding = bool(question.high_K[place] < 1.0 and shares_K[place] >= question.high_K[place] - 1e-5)
        gain = float(multipliers[place]) * available / question.tokens if binding and multipliers is not None else None
        rows.append(
            {
                "domain": domain,
                "role": role,
                "share": float(shares_K[place]),
                "available_tokens": int(available),
                "planned_tokens": round(planned),
                "epochs": planned / available,
                "max_epochs": question.max_epochs,
                "binding": binding,
                "gain_per_epoch": gain,
            }
        )
    return rows


def _law_rows(study: Study) -> list[dict[str, Json]]:
    rows: list[dict[str, Json]] = []
    for domain, fit in study.fits.items():
        unit = study.question.guards.get(domain, study.settings.tolerance_nats)
        rmse = fit.rmse(study.swarm.shares_NK, float(study.swarm.tokens))
        rows.append(
            {
                "domain": domain,
                "law": study.law,
                "rmse_nats": rmse,
                "loo_error_nats": fit.loo_error,
                "rmse": rmse / unit,
                "loo_error": fit.loo_error / unit,
                "mixtures": len(np.unique(study.swarm.mixture_N[fit.fitted_N])),
                "parameters": dict(fit.law.parameters),
            }
        )
    return rows


def _point_rows(study: Study) -> list[dict[str, Json]]:
    swarm, means = study.swarm, {domain: study.swarm.means(domain) for domain in study.swarm.deltas}
    objective = measured_objective(study)
    return [
        {
            "probe": swarm.probes[place],
            "seed": int(swarm.seeds_N[place]),
            "ratio": study.question.target_share(swarm.shares_NK[place]),
            "shares": {domain: float(share) for domain, share in zip(swarm.domains, swarm.shares_NK[place], strict=True)},
            "deltas": {domain: float(values[place]) for domain, values in means.items()},
            "objective": float(objective[place]),
            "holds": all(float(means[domain][place]) <= tolerance for domain, tolerance in study.question.guards.items()),
        }
        for place in range(len(swarm.probes))
    ]


def _solution(study: Study) -> dict[str, Json] | None:
    found = study.optimum or study.nearest
    if found is None:
        return None
    return {
        "method": found.method,
        "convex": study.problem().is_convex,
        "feasible": study.optimum is not None,
        "largest_excess": found.excess,
        "starts": found.starts,
        "agreeing": found.agreeing,
        "kkt_residual": found.kkt_residual,
    }


def tables_of(result: Mapping[str, Json]) -> dict[str, list[dict[str, Json]]]:
    """Return the rows of `result` as tables of four decimals, one value a cell."""
    laws = [{name: value for name, value in row.items() if name != "parameters"} for row in result["laws"]]  # type: ignore[union-attr]
    tables = {name: result[name] for name in ("guards", "caps", "targets")} | {"laws": laws}
    tables |= {"probes": [_flat(row) for row in result["points"]]}  # type: ignore[union-attr,arg-type]
    tables |= {name: result[name] for name in ("refusals", "warnings")}
    return {name: rounded(rows) for name, rows in tables.items()}  # type: ignore[arg-type]


def _flat(row: Mapping[str, Json]) -> dict[str, Json]:
    plain = {name: value for name, value in row.items() if name not in ("shares", "deltas")}
    shares = {f"share of {domain}": share for domain, share in row["shares"].items()}  # type: ignore[union-attr]
    return {**plain, **shares, **{f"change of {domain}": delta for domain, delta in row["deltas"].items()}}  # type: ignore[union-attr]
