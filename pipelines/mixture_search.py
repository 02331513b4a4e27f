"""The best mixture of many corpora: the least loss on the targets that every guarded corpus bears.

A law is fitted to each corpus' change of loss over a swarm of probes (Data Mixing Laws, 2403.16952, equation 1), and the
weighted mean of the targets' predicted losses is minimised over the shares, while every guarded corpus' predicted rise stays
within its tolerance and no corpus is read more often than `max_epochs`. With two corpora and one guard that is the critical
mixture ratio (2407.17467, definition 1). Where the probes do not support an estimate the step refuses, with a code and a
remedy; `verify_mixture` holds the prediction against a run at it, and searches again with that run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipelines.errors import GristmillError
from pipelines.manifests import Check, Json, Manifest, Member, Outcome
from pipelines.mixture_study import (
    AUTOMATIC,
    SearchSettings,
    Study,
    VerifiedSearchSettings,
    ask,
    best_measured,
    selected_tokens,
    study_swarm,
)
from pipelines.rounding import rounded
from pipelines.search_evidence import Row, refusals_of, warnings_of
from pipelines.search_plots import plot_fits, plot_guards
from pipelines.search_rows import PLAN_ERROR, SAME_MIXTURE, result_of, tables_of
from pipelines.store import advisory
from pipelines.swarm import Swarm, read_swarm, rounded_shares

ESTIMATED = "critical_ratio.json"
VERIFIED = "verified_ratio.json"
PLOTS = ("mixture_search.png", "guards.png")


def search_mixture(
    settings: SearchSettings, out: Path, *, probes: tuple[Manifest, ...], windows: Manifest, selection: tuple[Member, ...]
) -> Outcome:
    """Search the best mixture and write ``critical_ratio.json``: the shares, their interval, the evidence, the refusals.

    Raises:
        GristmillError: the mixture is refused and `on_refusal` is ``error``, or nothing measured holds every guard.
        UnknownName: a setting names a domain that was not measured.
    """
    found = _search(settings, probes, windows, selection)
    _write(out / ESTIMATED, found.result)
    _plot(out, found)
    return _outcome(found)


def verify_mixture(
    settings: VerifiedSearchSettings,
    out: Path,
    *,
    critical_ratio: Manifest,
    probes: tuple[Manifest, ...],
    windows: Manifest,
    verification: Manifest,
    selection: tuple[Member, ...],
) -> Outcome:
    """Hold the predictions of `critical_ratio` against the run at its mixture, search again with it, and write ``verified_ratio.json``.

    A guard holds where its measured rise is within its tolerance, or within half its tolerance of what was predicted.

    Raises:
        GristmillError: the run was not trained on the mixture that was found; it did not hold and `on_unverified` is ``error``; or as
            `search_mixture`.
    """
    before = json.loads(critical_ratio.file(ESTIMATED).read_text())
    run = read_swarm((verification,), windows, tuple(selected_tokens(selection)))
    apart = max(abs(share - before["shares"].get(domain, 0.0)) for domain, share in zip(run.domains, run.shares_NK[0], strict=True))
    if apart > SAME_MIXTURE:
        raise GristmillError(
            f"{verification.label} has a share {apart:.4f} away from the mixture of {critical_ratio.label}; materialize it again"
        )
    checked = _verification(before, run)
    if not checked["held"] and settings.on_unverified == "error":
        raise GristmillError(f"the mixture is not verified: {_said(checked)}")
    known = {probe.fingerprint for probe in probes}  # a mixture that was measured is verified by the very run
    found = _search(settings, probes if verification.fingerprint in known else (*probes, verification), windows, selection)
    found = found if checked["held"] else _unverified(settings, found, checked)
    _write(out / VERIFIED, {**found.result, "verification": checked})
    _plot(out, found)
    plot_guards(out / PLOTS[1], checked["guards"])  # type: ignore[arg-type]
    outcome = _outcome(found)
    tables = {"verification": rounded(checked["guards"]), **outcome.tables}  # type: ignore[arg-type]
    details = {**outcome.details, "held": checked["held"], "shares_before": before["shares"]}
    return outcome.model_copy(update={"tables": tables, "details": details})


@dataclass(frozen=True)
class _Found:
    """A study, and what it leads to."""

    study: Study
    result: dict[str, Json]


def search_plugins(settings: SearchSettings) -> tuple[str, ...]:
    """Return the modules of the laws that a search reads."""
    names = AUTOMATIC if settings.law == "auto" else (settings.law, *([settings.cross_check] if settings.cross_check else []))
    return tuple(f"pipelines.mixing_laws.{name}" for name in sorted(set(names)))


def _search(settings: SearchSettings, probes: Sequence[Manifest], windows: Manifest, selection: Sequence[Member]) -> _Found:
    selected = selected_tokens(selection)
    swarm = read_swarm(probes, windows, tuple(selected))
    question = ask(settings, selected, swarm)
    study = study_swarm(settings, question, swarm)
    refusals = refusals_of(study)
    shares_K, decision = _decide(study, refusals)
    shares = rounded_shares(question.domains, shares_K)
    unmeasured = tuple(domain for domain in selected if domain not in swarm.deltas)
    return _Found(study, result_of(study, shares, decision, refusals, warnings_of(study, unmeasured)))


def _decide(study: Study, refusals: Sequence[Row]) -> tuple[np.ndarray, str]:
    """Return the mixture that is taken, and whether it is the estimate."""
    settings = study.settings
    if not refusals and study.optimum is not None:
        return study.optimum.shares_K, "estimate"
    if settings.on_refusal == "manual" and settings.shares is not None:
        return study.question.column(settings.shares), "manual"
    best = best_measured(study.question, study.swarm)
    if settings.on_refusal == "lower_bound" and best is not None:
        return study.swarm.mixtures()[best], "lower_bound"
    reasons = "; ".join(f"{row['code']}: {row['seen']} ({row['remedy']})" for row in refusals)
    none = "; no measured mixture holds every guard either" if settings.on_refusal == "lower_bound" else ""
    raise GristmillError(f"the mixture is refused: {reasons}{none}; or set `on_refusal: manual` with `shares`")


# The verification


def _verification(before: Mapping[str, Json], run: Swarm) -> dict[str, Json]:
    """Return what `run` measured of guards and targets beside what was predicted of them, and whether that holds."""
    guards = [_verified(row, run) for row in before["guards"]]  # type: ignore[union-attr]
    targets = [{**row, **_measurement(row["domain"], run)} for row in before["targets"]]  # type: ignore[union-attr,arg-type]
    return {
        "held": all(row["held"] for row in guards),
        "guards": guards,
        "targets": targets,
        "tokens": run.tokens,
        "before": before["ratio"],
        "before_shares": before["shares"],
    }


def _verified(row: Mapping[str, Json], run: Swarm) -> dict[str, Json]:
    """Return a guard's row with what the run measured, and whether that holds."""
    tolerance, predicted = float(row["tolerance_nats"]), row["predicted"]  # type: ignore[arg-type]
    found = _measurement(str(row["domain"]), run)
    bound = max(tolerance, tolerance / 2 + min(tolerance, float(predicted))) if predicted is not None else tolerance  # type: ignore[arg-type]
    kept = {name: row[name] for name in ("domain", "tolerance_nats", "predicted", "low", "high")}
    return {**kept, **found, "wanted": f"at most {bound:.4f}", "held": found["measured"] <= bound}


def _measurement(domain: str, run: Swarm) -> dict[str, float | None]:
    error = float(run.standard_errors(domain)[0])
    return {"measured": float(run.means(domain)[0]), "standard_error": error if np.isfinite(error) else None}


def _unverified(settings: VerifiedSearchSettings, found: _Found, checked: Mapping[str, Json]) -> _Found:
    """Return what is handed on where the verification did not hold: the refit with a warning, or the best mixture that held."""
    row = {"code": "not_verified", "seen": _said(checked), "remedy": "train a verification at the mixture of the refit"}
    study = found.study
    warnings = [*found.result["warnings"], row]  # type: ignore[misc]
    if settings.on_unverified == "refit":
        return _Found(study, {**found.result, "warnings": warnings})
    best = best_measured(study.question, study.swarm)
    if best is None:
        raise GristmillError(f"the mixture is not verified: {row['seen']}; and no measured one holds every guard: probe more replay")
    shares = rounded_shares(study.question.domains, study.swarm.mixtures()[best])
    refusals = [*found.result["refusals"], row]  # type: ignore[misc]
    return _Found(study, result_of(study, shares, "lower_bound", refusals, found.result["warnings"]))  # type: ignore[arg-type]


def _said(checked: Mapping[str, Json]) -> str:
    rows = [row for row in checked["guards"] if not row["held"]] or checked["guards"]  # type: ignore[union-attr,index]
    said = ", ".join(f"{row['domain']} changed by {row['measured']:+.4f} nats, wanted: {row['wanted']}" for row in rows)  # type: ignore[index,call-overload]
    return f"a run at the mixture: {said}"


def _outcome(found: _Found) -> Outcome:
    result, study = found.result, found.study
    metrics = {"ratio": result["ratio"], "tolerance_nats": result["tolerance_nats"], "target_prediction_nats": result["target_prediction"]}
    if result["interval_95"]:
        metrics |= {"interval_low": result["interval_95"][0], "interval_high": result["interval_95"][1]}  # type: ignore[index]
    return Outcome(
        counts={
            "probes": len(study.swarm.probes),
            "mixtures": study.swarm.num_mixtures,
            "domains": len(study.question.roles),
            "windows": sum(deltas.shape[1] for deltas in study.swarm.deltas.values()),
        },
        metrics={name: float(value) for name, value in metrics.items() if value is not None},  # type: ignore[arg-type]
        tables=tables_of(result),
        plots=PLOTS,
        details={"decision": result["decision"], "shares": result["shares"]},
    )


def _plot(out: Path, found: _Found) -> None:
    plot_fits(out / PLOTS[0], found.study.fits, found.study.question.guards)
    plot_guards(out / PLOTS[1], found.result["guards"])  # type: ignore[arg-type]


def _write(path: Path, result: Mapping[str, Json]) -> None:
    path.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")


# Audits


def _read(draft: Manifest) -> dict:
    path = draft.directory / VERIFIED
    return json.loads((path if path.exists() else draft.directory / ESTIMATED).read_text())


def estimate_consistent(draft: Manifest) -> Check:
    """The shares are a mixture that is predicted to hold every guard and every cap of epochs, or a refusal stands beside it."""
    result = _read(draft)
    shares = result["shares"].values()
    mixture = abs(sum(shares) - 1.0) < 1e-9 and min(shares) > 0
    over = [r["domain"] for r in result["guards"] if r["predicted"] is not None and r["predicted"] > r["tolerance_nats"] * (1 + PLAN_ERROR)]
    over += [row["domain"] for row in result["caps"] if row["epochs"] > row["max_epochs"] * (1 + PLAN_ERROR)]
    rows = ", ".join(
        f"{r['domain']} {r['predicted']:+.4f} of {r['tolerance_nats']:g}" for r in result["guards"] if r["predicted"] is not None
    )
    passed = mixture and (bool(result["refusals"]) or (result["decision"] == "estimate" and not over))
    description = f"{result['decision']}: {rows or 'no prediction'}; {len(shares)} shares sum to {sum(shares):.9f}"
    return Check(name="estimate_consistent", passed=passed, description=description)


@advisory
def estimate_not_refused(draft: Manifest) -> Check:
    """The mixture is the laws' estimate, not a fallback."""
    refusals = _read(draft)["refusals"]
    reasons = "; ".join(f"{r['code']}: {r['seen']}; {r['remedy']}" for r in refusals)
    return Check(name="estimate_not_refused", passed=not refusals, description=reasons or "no refusal")


@advisory
def verification_held(draft: Manifest) -> Check:
    """In a run at the mixture every guard held its tolerance, or lay within half of it of what was predicted."""
    result = _read(draft)
    checked = result["verification"]
    now = f"; {result['decision']} with target share {result['ratio']:.3f} is handed on, before it {checked['before']:.3f}"
    return Check(name="verification_held", passed=checked["held"], description=_said(checked) + now)


SEARCH_AUDITS = (estimate_consistent, estimate_not_refused)
VERIFICATION_AUDITS = (*SEARCH_AUDITS, verification_held)
