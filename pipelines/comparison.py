"""Comparison: what a recipe's checkpoint loses and gains on held-out documents against a baseline, and whether it holds its guards.

    evaluation of a baseline + evaluation of a candidate -> comparison.json, changes.png

The rows are those of `compared_rows`, their verdicts corrected for their number. The guards go by the interval alone, without
correction: a gate that looks at few rows should rather close once too often.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
from pydantic import Field

from pipelines.compared_rows import Row, compared_rows, paired_documents
from pipelines.errors import UnknownName
from pipelines.manifests import Check, Json, Manifest, Outcome
from pipelines.plots import new_figure, save_figure
from pipelines.plugins import Settings
from pipelines.store import advisory

METRICS = {"loss": "nats per token", "bits_per_byte": "bits per byte", "percent": "percent of the baseline's loss"}
"""What a guard may look at, and its unit."""
BEFORE = "before training"
"""Stands for the baseline of a recipe that names none: its own general checkpoint."""
COLORS = {"better": "#228833", "worse": "#cc3311", "no difference": "#888888"}


class ComparisonSettings(Settings):
    """What is compared, and what must not get worse."""

    roles: dict[str, str]
    """Domain to role of the candidate: general, target or evaluation."""
    guards: dict[str, float] = Field(default_factory=lambda: {"general": 0.0})
    """How much worse the candidate may be, by row: a domain, a role (`general`), or a role's snapshot or language (`general en`). In nats
    per token; ``bits_per_byte/`` or ``percent/`` (of the baseline's loss) before the name takes another unit."""
    alpha: float = Field(default=0.05, gt=0, lt=1)
    """Chance that any row gets a verdict though nothing differs."""
    draws: int = Field(default=10_000, ge=100)
    """Bootstrap draws over documents."""
    seed: int = Field(default=0, ge=0)
    """Of the bootstrap."""


def compare_recipes(settings: ComparisonSettings, out: Path, *, candidate: Manifest, baseline: Manifest | None = None) -> Outcome:
    """Compare two evaluation artifacts, or, without `baseline`, the candidate's checkpoint with the one it was continued from.

    Raises:
        GristmillError: they were measured on different documents, with different evaluators or tokenizers, or share no domain.
        UnknownName: a guard names no row.
    """
    table, left_out = paired_documents(settings.roles, candidate, baseline)
    rows = compared_rows(table, alpha=settings.alpha, draws=settings.draws, seed=settings.seed)
    guards = [_guarded(rows, name, max_worse) for name, max_worse in sorted(settings.guards.items())]
    against = baseline.label if baseline else BEFORE
    record = {"baseline": against, "candidate": candidate.label, "alpha": settings.alpha, "left_out": left_out, "guards": guards}
    (out / "comparison.json").write_text(json.dumps({**record, "rows": rows}, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    _plot(out / "changes.png", rows, guards)
    verdicts = Counter(row["verdict"] for row in rows)
    return Outcome(
        counts={
            "documents": table.num_rows,
            "tokens": int(pc.sum(table["tokens"]).as_py()),
            **{v: verdicts[v] for v in ("better", "worse")},
        },
        metrics={f"{row['name']}_loss_change": float(row["loss_change"]) for row in rows},
        tables={"comparison": [_rounded(row) for row in rows], "guards": [_rounded(row) for row in guards]},
        plots=("changes.png",),
        details={"checkpoint": candidate.inputs["checkpoint"][0].fingerprint, "baseline": against},
    )


def _guarded(rows: Sequence[Row], guard: str, max_worse: float) -> Row:
    """Return what a guard found: it is broken where the whole interval of the change lies above what is allowed."""
    prefix, _, name = guard.rpartition("/")
    metric = prefix or "loss"
    if metric not in METRICS:
        raise UnknownName(f"metric of the guard {guard!r}", metric, METRICS)
    by_name = {str(row["name"]): row for row in reversed(rows)}
    by_role = {str(row["role"]): row for row in rows if row["group"] == "domain"}  # of a role with one domain, its domain stands for it
    found = by_name.get(name) or by_role.get(name)
    if found is None:
        raise UnknownName("row named by a guard", name, [*by_name, *by_role])
    column, unit = ("loss", 100 / float(found["loss_baseline"])) if metric == "percent" else (metric, 1.0)
    change, low, high = (float(found[f"{column}_change{end}"]) * unit for end in ("", "_low", "_high"))
    bounds = {"change": change, "change_low": low, "change_high": high, "max_worse": max_worse}
    return {"guard": guard, "metric": metric, "row": str(found["name"]), **bounds, "passed": low <= max_worse}


def _rounded(row: Row) -> dict[str, Json]:
    return {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in row.items()}


def _plot(path: Path, rows: Sequence[Row], guards: Sequence[Row]) -> None:
    """Draw the change of loss of each row with its interval, and where a guard ends."""
    figure, axes = new_figure(6.0, 1.2 + 0.26 * len(rows))
    for place, row in enumerate(rows):
        change, low, high = (float(row[key]) for key in ("loss_change", "loss_change_low", "loss_change_high"))
        axes.errorbar(change, place, xerr=[[change - low], [high - change]], fmt="o", ms=4, capsize=2, color=COLORS[str(row["verdict"])])
    places = {str(row["name"]): place for place, row in enumerate(rows)}
    limits = [(float(guard["max_worse"]), places[str(guard["row"])]) for guard in guards if guard["metric"] == "loss"]
    if limits:
        axes.scatter(*np.transpose(limits), marker="|", s=120, color="#000000", label="guard", zorder=3)
        axes.legend(frameon=False, fontsize=8)
    axes.axvline(0.0, color="grey", linewidth=1)
    axes.set_yticks(range(len(rows)), [str(row["name"]) for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="change of loss, nats per token (95 % interval)")
    save_figure(figure, path)


def _record(draft: Manifest) -> dict[str, list[Row]]:
    return json.loads((draft.directory / "comparison.json").read_text(encoding="utf-8"))


def changes_finite(draft: Manifest) -> Check:
    """Every change lies within its interval, and both are finite."""
    rows = _record(draft)["rows"]
    ends = ("loss_change_low", "loss_change", "loss_change_high")
    wrong = [str(row["name"]) for row in rows if not (np.isfinite([row[end] for end in ends]).all() and row[ends[0]] <= row[ends[2]])]
    return Check(
        name="changes_finite", passed=not wrong and bool(rows), description=f"{len(rows)} rows, not finite: {', '.join(wrong) or 'none'}"
    )


@advisory
def not_worse_than_baseline(draft: Manifest) -> Check:
    """No guarded metric is worse than the baseline by more than its guard allows, beyond the 95 % interval.

    The comparison is published all the same, as the record of what failed; promotion asks for this check to have passed.
    """
    record = _record(draft)
    guards = record["guards"]
    broken = [guard for guard in guards if not guard["passed"]]
    shown = "; ".join(failure(guard) for guard in broken)
    held = f"{len(guards)} guards hold against {record['baseline']}" if guards else "no guard is set; name one under `evaluation.guards`"
    return Check(
        name="not_worse_than_baseline", passed=bool(guards) and not broken, description=shown or held, metadata={"broken": len(broken)}
    )


def failure(guard: Row) -> str:
    """Return a broken guard as a sentence."""
    bounds = f"[{guard['change_low']:+.4f}, {guard['change_high']:+.4f}]"
    return f"{guard['row']}: {guard['change']:+.4f} {METRICS[str(guard['metric'])]} {bounds}, allowed {guard['max_worse']:+.4f}"


COMPARISON_AUDITS = (changes_finite, not_worse_than_baseline)
