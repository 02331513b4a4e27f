"""The critical mixture ratio: estimated from probes, then verified by a run at it.

The critical ratio is the largest share R of target tokens at which the general loss, after T tokens of continued
pretraining, has risen by no more than the tolerance (2407.17467, definition 1). It is the root of a law fitted to the
losses of a few probes; its interval is a bootstrap over held-out windows and runs. Where the probes do not support an
estimate the step refuses, with a code and a remedy. A run trained at the ratio says whether it holds, and is one more point
of the next fit.

    critical_ratio   critical_ratio.json    verify_ratio writes verified_ratio.json: the same keys, and `verification`
                     critical_ratio.png, trajectories.png, critical_ratio_by_tokens.png
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from pipelines import plugins
from pipelines.errors import GristmillError
from pipelines.manifests import Check, Json, Manifest, Member, Outcome
from pipelines.mixing_laws import MixingLaw, two_shares
from pipelines.probe_courses import resample
from pipelines.probe_losses import SAME_TOKENS, ProbeLosses, ProbePoints, ProbeRun, available_tokens, read_probes, read_run
from pipelines.ratio_estimate import (
    RatioEstimate,
    RatioSettings,
    course_start,
    estimate_ratio,
    measured_length,
    reads_tokens,
    stability_table,
)
from pipelines.ratio_laws import fits, number
from pipelines.ratio_plots import PICTURES, plot_all
from pipelines.ratio_refusals import Evidence, lasting_ratio, refusals, warnings
from pipelines.rounding import rounded
from pipelines.store import advisory

ESTIMATED = "critical_ratio.json"
VERIFIED = "verified_ratio.json"
HELD = 0.5
"""A verification holds within this part of the tolerance."""
SAME_RATIO = 0.01
"""A verification at a ratio no further from the estimate than this is one of it."""


class VerificationSettings(RatioSettings):
    """How the estimate is verified: the settings that it was made with, and what a failure means."""

    on_unverified: Literal["refit", "lower", "error"] = "refit"
    """`refit` hands on the estimate with the verification as one more point; `lower` the highest measured ratio that held the
    tolerance; `error` stops."""


@dataclass(frozen=True)
class Judged:
    """An estimate with what speaks against it, and the ratio that is taken."""

    losses: ProbeLosses
    points: ProbePoints
    found: RatioEstimate
    refusals: list[dict[str, str]]
    warnings: list[dict[str, str]]
    ratio: float
    decision: str


def estimate_critical_ratio(
    settings: RatioSettings, out: Path, *, probes: tuple[Manifest, ...], windows: Manifest, selection: tuple[Member, ...]
) -> Outcome:
    """Fit the law to `probes` and write ``critical_ratio.json``: the ratio, its interval, the evidence, the refusals.

    Raises:
        GristmillError: the estimate is refused and nothing stands in for it, no probe replays general text, or the probes do not belong
            to `windows`.
    """
    judged = judge(settings, read_probes(windows, probes), available_tokens(selection))
    plot_all(out, judged.losses, judged.points, judged.found, judged.ratio, None)
    result = as_json(settings, judged)
    _write(out / ESTIMATED, result)
    return _outcome(judged, result, probes)


def verify_ratio(
    settings: VerificationSettings,
    out: Path,
    *,
    critical_ratio: Manifest,
    probes: tuple[Manifest, ...],
    windows: Manifest,
    verification: Manifest,
    selection: tuple[Member, ...],
) -> Outcome:
    """Compare the probe `verification`, trained at the ratio, with what was wanted, fit again with it, and write ``verified_ratio.json``.

    An estimate holds where the measured general loss lies within half the tolerance of the tolerance; one for more tokens than the
    verification ran, or one by the turn, within that of the prediction. A lower bound or a given ratio holds where the loss
    has risen by at most one and a half tolerances.

    Raises:
        GristmillError: as `estimate_critical_ratio`; or the verification did not hold and `on_unverified` is ``error``, or it was not
            trained at the ratio.
    """
    before = json.loads(critical_ratio.file(ESTIMATED).read_text())
    measured, alone = read_probes(windows, probes), read_probes(windows, (verification,))
    evidence = _evidence(probes, verification)
    checked = _verification(settings, before, measured, alone)
    if not checked["held"] and settings.on_unverified == "error":
        raise GristmillError(f"the critical ratio is not verified: {_said(checked)}")
    anchored = evidence != probes and reads_tokens(before["law"]["name"]) and alone.runs[0].ratio < 1.0
    longest = max(before["measured_tokens"], checked["tokens"] if anchored else 0)
    lengths, anchor = (float(longest), float(before["tokens"])), alone.runs[0] if anchored else None
    judged = judge(settings, read_probes(windows, evidence), available_tokens(selection), lengths=lengths, anchor=anchor)
    judged = judged if checked["held"] else _unverified(settings, judged, checked)
    plot_all(out, judged.losses, judged.points, judged.found, judged.ratio, alone.runs[0])
    result = {**as_json(settings, judged), "verification": checked}
    _write(out / VERIFIED, result)
    return _outcome(judged, result, evidence, verified=checked)


def _evidence(probes: tuple[Manifest, ...], verification: Manifest) -> tuple[Manifest, ...]:
    """Return the probes with the verification: a lower bound is a measured ratio, and the same run is no further point.

    Where it went further than the probe of its ratio and seed it stands in its place.
    """
    new = read_run(verification)
    found = []
    for probe in probes:
        run = read_run(probe)
        same = math.isclose(run.ratio, new.ratio) and run.seed == new.seed
        if same and new.tokens <= SAME_TOKENS * run.tokens:
            return probes
        if not same:
            found.append(probe)
    return (*found, verification)


def ratio_plugins(settings: RatioSettings) -> tuple[str, ...]:
    """Return the plugin modules that an estimate reads, for the code version."""
    return tuple(f"pipelines.mixing_laws.{law}" for law in settings.laws)


def judge(
    settings: RatioSettings,
    losses: ProbeLosses,
    available: Mapping[str, int],
    *,
    lengths: tuple[float, float] | None = None,
    anchor: ProbeRun | None = None,
) -> Judged:
    """Return the estimate of `losses`, why it is refused, and the ratio that is taken.

    Args:
        available: the selected tokens by role.
        lengths: the tokens that are judged at and those that the ratio is for; where absent they follow from `settings`.
        anchor: the run at the ratio, which a law along training is made to pass through.

    Raises:
        GristmillError: the estimate is refused and nothing stands in for it.
    """
    losses, measured, tokens = (losses.including(lengths[0]), *lengths) if lengths else measured_length(settings, losses)
    found, points = estimate_ratio(settings, losses, measured=measured, tokens=tokens, anchor=anchor), losses.at(measured)
    evidence = Evidence(settings, losses, points, found, available)
    reasons = refusals(evidence)
    ratio, decision = _decide(settings, found, reasons, lasting_ratio(evidence))
    return Judged(losses, points, found, reasons, warnings(evidence), ratio, decision)


def _decide(settings: RatioSettings, found: RatioEstimate, reasons: list[dict[str, str]], lasting: float) -> tuple[float, str]:
    """Return the ratio and where it comes from; a lower bound is no ratio that the target's text does not last for."""
    if not reasons:
        return found.value, "estimate"
    if settings.on_refusal == "manual" and settings.ratio is not None:
        return settings.ratio, "manual"
    if settings.on_refusal == "lower_bound" and found.holding is not None:
        limited = any(reason["code"] == "domain_limited" for reason in reasons)
        return min(found.holding, lasting) if limited else found.holding, "lower_bound"
    said = "; ".join(f"{r['code']}: {r['seen']} ({r['remedy']})" for r in reasons)
    raise GristmillError(f"the critical ratio is refused: {said}; or set `mixture.estimate: {{on_refusal: manual}}` with a `ratio`")


def _verification(settings: VerificationSettings, before: Mapping[str, Json], probes: ProbeLosses, alone: ProbeLosses) -> dict[str, Json]:
    """Return what was measured at the ratio, what was predicted and wanted there, and whether it held."""
    run, wanted_ratio, asked = alone.runs[0], float(before["ratio"]), float(before["tokens"])  # type: ignore[arg-type]
    if abs(run.ratio - wanted_ratio) > SAME_RATIO:
        raise GristmillError(f"the verification ran at R = {run.ratio:.3f} and the ratio is {wanted_ratio:.3f}; materialize it again")
    reached = alone.tokens_A[alone.full[0] & (alone.tokens_A <= SAME_TOKENS * asked)]
    if not len(reached):
        raise GristmillError(f"the verification was not measured on all windows at any point up to {asked:,.0f} tokens; train it that far")
    points = alone.at(float(reached.max()))
    tolerance = float(before["tolerance_nats"])  # type: ignore[arg-type]
    predicted = _predicted(settings, before, probes, points)
    measured, bound = float(points.general[0]), HELD * tolerance
    row: dict[str, Json] = {
        "ratio": run.ratio,
        "tokens": points.tokens,
        "predicted_general_delta": predicted,
        "measured_general_delta": measured,
        "standard_error": number(points.errors[0]),
        "bound": bound,
        "target_delta": float(points.target[0]),
        "before": wanted_ratio,
    }
    if before["decision"] != "estimate":
        return {**row, "wanted": f"at most {tolerance + bound:.4f}", "held": measured <= tolerance + bound}
    by_level = before["criterion"] == "level" or before["level"] == before["estimate"]
    here = SAME_TOKENS * points.tokens >= asked and by_level
    centre = tolerance if here or predicted is None else predicted
    return {**row, "wanted": f"{centre:.4f} within {bound:.4f}", "held": abs(measured - centre) <= bound}


def _predicted(settings: RatioSettings, before: Mapping[str, Json], probes: ProbeLosses, points: ProbePoints) -> float | None:
    """Return what the law of the estimate, fitted without the verification, says at its ratio and tokens."""
    there, law = probes.including(points.tokens), str(before["law"]["name"])  # type: ignore[index,call-overload]
    first = course_start(settings, float(before["measured_tokens"]), float(before["tokens"]))  # type: ignore[arg-type]
    courses = resample(there, draws=0, seed=settings.seed, run_noise_nats=0.0, first=first, parts=reads_tokens(law))
    plugin: MixingLaw = plugins.build("mixing_laws", law)  # type: ignore[assignment]
    fitted = fits(plugin, courses, there.place(points.tokens))
    return number(fitted[0].predict(two_shares(points.ratios), np.asarray([float(points.tokens)]))[0]) if fitted else None


def _unverified(settings: VerificationSettings, judged: Judged, checked: Mapping[str, Json]) -> Judged:
    """Return what is handed on where the verification did not hold: the refit with a warning, or the highest ratio that held."""
    row = {"code": "not_verified", "seen": _said(checked), "remedy": f"the refit says {judged.ratio:.3f}; train a verification there"}
    if settings.on_unverified == "refit":
        return replace(judged, warnings=[*judged.warnings, row])
    if judged.found.holding is None:
        raise GristmillError(
            f"the critical ratio is not verified: {row['seen']}; and no measured ratio held the tolerance: add a lower one"
        )
    return replace(judged, refusals=[*judged.refusals, row], ratio=judged.found.holding, decision="lower_bound")


def _said(checked: Mapping[str, Json]) -> str:
    return (
        f"a run at R = {checked['ratio']:.3f} changed the general loss by {checked['measured_general_delta']:+.4f} nats after "
        f"{checked['tokens']:,} tokens; wanted: {checked['wanted']}"
    )


def as_json(settings: RatioSettings, judged: Judged) -> dict[str, Json]:
    """Return ``critical_ratio.json``; what has no number is null."""
    found, points, held = judged.found, judged.points, judged.losses.windows
    others = [row for row in found.laws if not row["chosen"]]
    replayed = [law.parameters for law in found.fitted[:1]]
    further = found.extrapolation
    return {
        "ratio": judged.ratio,
        "decision": judged.decision,
        "estimate": number(found.value),
        "interval_95": list(found.interval) if found.interval else None,
        "safe": min(judged.ratio, found.interval[0]) if found.interval else judged.ratio,
        "jackknife": found.jackknife,
        "cross_check": {"law": others[0]["law"], "estimate": others[0]["estimate"]},
        "tolerance": settings.tolerance.model_dump(exclude_none=True),
        "tolerance_nats": found.tolerance,
        "criterion": settings.criterion,
        "level": number(found.level),
        "turn": {"estimate": number(found.turn), "between": list(found.turn_between) if found.turn_between else None},
        "tokens": round(found.tokens),
        "measured_tokens": points.tokens,
        "extrapolated": further is not None,
        "extrapolation": {"factor": further.factor, "lengths": further.lengths, "token_law": number(further.token_law)}
        if further
        else None,
        "law": {"name": found.law, **(replayed[0] if replayed else {})},
        "laws": found.laws,
        "by_tokens": found.by_tokens,
        "stability": stability_table(judged.losses, found.tolerance),
        "general_loss_of_base": held.mean_loss("general"),
        "bytes_per_token": held.bytes_per_token("general"),
        "cost": {"tokens": sum(run.tokens for run in judged.losses.runs)},
        "measured_on": {"base": held.base_fingerprint},
        "refusals": judged.refusals,
        "warnings": judged.warnings,
        "points": _last_points(judged.losses, points.tokens),
    }


def _last_points(losses: ProbeLosses, up_to: float) -> list[dict[str, Json]]:
    """Return what each run measured on all windows where it last did so up to `up_to` tokens."""
    rows: list[dict[str, Json]] = []
    for index, run in enumerate(losses.runs):
        reached = losses.tokens_A[losses.full[index] & (losses.tokens_A <= up_to)]
        if not len(reached):
            continue
        point = losses.at(float(reached.max()))
        place = point.runs.index(run)
        measured = {"general_delta": point.general, "general_standard_error": point.errors, "target_delta": point.target}
        values = {name: number(found[place]) for name, found in measured.items()}
        rows.append({"ratio": run.ratio, "seed": run.seed, "tokens": point.tokens, **values})
    return rows


def _outcome(
    judged: Judged, result: Mapping[str, Json], probes: tuple[Manifest, ...], *, verified: Mapping[str, Json] | None = None
) -> Outcome:
    found, held = judged.found, judged.losses.windows
    metrics = {"ratio": judged.ratio, "tolerance_nats": found.tolerance}
    if found.interval:
        metrics |= {"interval_low": found.interval[0], "interval_high": found.interval[1]}
    if verified:
        metrics |= {f"verified_{corpus}_delta": float(verified[key]) for corpus, key in VERIFIED_LOSSES}  # type: ignore[arg-type]
    seconds = [probe.outcome.metrics.get("cpu_seconds") for probe in probes]
    if all(value is not None for value in seconds):
        metrics["cpu_seconds"] = math.fsum(value for value in seconds if value is not None)
    tables = {name: rounded(result[name]) for name in ("points", "laws", "by_tokens", "stability")}  # type: ignore[arg-type]
    return Outcome(
        counts={
            "probes": len(judged.losses.runs),
            "general_windows": len(held.of("general")),
            "target_windows": len(held.of("target")),
            "tokens": sum(run.tokens for run in judged.losses.runs),
        },
        metrics=metrics,
        tables={
            "probes": tables.pop("points"),
            "refusals": judged.refusals,
            "warnings": judged.warnings,
            **tables,
            **({"verification": rounded([dict(verified)])} if verified else {}),
        },
        plots=PICTURES,
        details={"decision": judged.decision, **({"verified": verified["held"]} if verified else {})},
    )


VERIFIED_LOSSES = (("general", "measured_general_delta"), ("target", "target_delta"))


def _write(path: Path, result: Mapping[str, Json]) -> None:
    path.write_text(json.dumps(result, indent=1, sort_keys=True, allow_nan=False) + "\n")


def _read(draft: Manifest) -> dict[str, Json]:
    path = draft.directory / VERIFIED
    return json.loads((path if path.exists() else draft.directory / ESTIMATED).read_text())


def estimate_consistent(draft: Manifest) -> Check:
    """The ratio lies inside its interval, or a refusal with its reason stands beside it."""
    result = _read(draft)
    interval = result["interval_95"]
    inside = bool(interval) and interval[0] <= result["ratio"] <= interval[1]
    codes = ", ".join(refusal["code"] for refusal in result["refusals"])
    bounds = f"95 % interval {interval[0]:.3f} to {interval[1]:.3f}" if interval else "no interval"
    description = f"{result['decision']} {result['ratio']:.3f}, {bounds}" + (f", refused: {codes}" if codes else "")
    return Check(name="estimate_consistent", passed=(result["decision"] == "estimate" and inside) or bool(codes), description=description)


@advisory
def estimate_not_refused(draft: Manifest) -> Check:
    """The ratio is the law's estimate, not a fallback."""
    result = _read(draft)
    reasons = "; ".join(f"{r['code']}: {r['seen']}; {r['remedy']}" for r in result["refusals"])
    return Check(name="estimate_not_refused", passed=not result["refusals"], description=reasons or "no refusal")


@advisory
def verification_held(draft: Manifest) -> Check:
    """A run trained at the ratio changed the general loss as it was to."""
    result = _read(draft)
    checked = result["verification"]
    now = f"; {result['decision']} {result['ratio']:.3f} is handed on, before it {checked['before']:.3f}"
    remedy = "" if checked["held"] else "; verify again at it, or add probes near it"
    return Check(name="verification_held", passed=checked["held"], description=_said(checked) + now + remedy)


RATIO_AUDITS = (estimate_consistent, estimate_not_refused)
VERIFICATION_AUDITS = (*RATIO_AUDITS, verification_held)
