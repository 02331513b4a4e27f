"""Evaluation: held-out loss and bits per byte per domain, before and after, with paired intervals over documents.

Both checkpoints are scored on the same documents, so their difference has an interval far narrower than either.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from pipelines import plugins
from pipelines.documents import write_table
from pipelines.encoders import special_tokens
from pipelines.errors import EmptyInput
from pipelines.evaluators import Evaluator
from pipelines.manifests import Check, Json, Manifest, Outcome
from pipelines.models import denormals_flushed, load_checkpoint, set_up_torch
from pipelines.plots import new_figure, save_figure
from pipelines.plugins import Settings
from pipelines.shards import HeldOutDocuments, held_out_documents
from pipelines.store import advisory

EVALUATION_PACKAGES = ("torch", "transformers")


class EvaluationSettings(Settings):
    """What is measured, and how sure it has to be."""

    evaluator: str = "held_out_loss"
    """A plugin of `evaluators/`."""
    evaluator_settings: dict[str, Json] = Field(default_factory=dict)
    """Settings of the evaluator."""
    roles: dict[str, str]
    """Domain to role: general, target or evaluation."""
    max_tokens_per_domain: int = 120_000
    """Held-out tokens per domain; documents are taken in the order of a stable hash."""
    draws: int = 2000
    """Bootstrap draws over documents."""
    seed: int = 0
    """Of the bootstrap."""
    threads: int = 2
    """Torch threads."""


def evaluate(
    settings: EvaluationSettings,
    out: Path,
    *,
    base: Manifest,
    checkpoint: Manifest,
    decisions: Manifest,
    shards: tuple[Manifest, ...],
    tokenizer: Manifest,
) -> Outcome:
    """Score `base` and `checkpoint` on the held-out documents; write ``documents.parquet`` and ``evaluation.json``.

    Raises:
        EmptyInput: a domain with a role has no held-out document left.
    """
    held = held_out_documents(decisions, shards, max_tokens=settings.max_tokens_per_domain)
    missing = sorted(domain for domain in settings.roles if domain not in held)
    if missing:
        raise EmptyInput(
            f"no held-out document of {', '.join(missing)}; raise `held_out` of that domain in project.yaml, or loosen its filters"
        )
    held = {domain: held[domain] for domain in sorted(settings.roles)}
    before = _score(settings, base, held, tokenizer)
    after = _score(settings, checkpoint, held, tokenizer)
    table = before.rename_columns(["id", "domain", "tokens", "bytes", "nll_before"]).append_column("nll_after", after["nll"])
    write_table(out / "documents.parquet", table)
    rows = [_compare(settings, domain, settings.roles[domain], _of_domains(table, [domain])) for domain in held]
    for role in ("general", "target"):
        domains = [domain for domain in held if settings.roles[domain] == role]
        if len(domains) > 1:
            rows.append(_compare(settings, f"all {role}", role, _of_domains(table, domains)))
    (out / "evaluation.json").write_text(json.dumps({"domains": rows}, indent=1, sort_keys=True) + "\n")
    _plot(out / "held_out_loss.png", rows)
    return Outcome(
        counts={"documents": table.num_rows, "tokens": sum(h.num_tokens for h in held.values())},
        metrics={
            f"{row['domain'].replace(' ', '_')}_{key}": row[key] for row in rows for key in ("bits_per_byte_before", "bits_per_byte_after")
        },
        tables={"held_out": [_rounded(row) for row in rows]},
        plots=("held_out_loss.png",),
    )


@denormals_flushed()
def _score(settings: EvaluationSettings, checkpoint: Manifest, held: dict[str, HeldOutDocuments], tokenizer: Manifest) -> pa.Table:
    set_up_torch(settings.threads)
    model = load_checkpoint(checkpoint.directory).eval()
    evaluator: Evaluator = plugins.build("evaluators", settings.evaluator, settings.evaluator_settings)  # type: ignore[assignment]
    return evaluator.score(model, held, special_tokens(tokenizer.directory))


def _of_domains(table: pa.Table, domains: list[str]) -> pa.Table:
    return table.filter(pa.compute.is_in(table["domain"], pa.array(domains)))


def _compare(settings: EvaluationSettings, name: str, role: str, table: pa.Table) -> dict[str, float | int | str]:
    """Return loss (nats per token) and bits per byte before and after, and their paired differences with 95 % intervals."""
    columns = {key: table[key].to_numpy().astype(float) for key in ("tokens", "bytes", "nll_before", "nll_after")}
    generator = np.random.Generator(np.random.Philox(key=settings.seed))
    n = table.num_rows
    draws = np.stack([_ratios(columns, generator.integers(0, n, n)) for _ in range(settings.draws)])
    loss_before, loss_after, bits_before, bits_after = _ratios(columns, np.arange(n))
    low, high = np.quantile(draws[:, 1] - draws[:, 0], [0.025, 0.975])
    bits_low, bits_high = np.quantile(draws[:, 3] - draws[:, 2], [0.025, 0.975])
    return {
        "domain": name,
        "role": role,
        "documents": n,
        "tokens": int(columns["tokens"].sum()),
        "loss_before": loss_before,
        "loss_after": loss_after,
        "loss_change": loss_after - loss_before,
        "loss_change_low": float(low),
        "loss_change_high": float(high),
        "bits_per_byte_before": bits_before,
        "bits_per_byte_after": bits_after,
        "bits_per_byte_change": bits_after - bits_before,
        "bits_per_byte_change_low": float(bits_low),
        "bits_per_byte_change_high": float(bits_high),
    }


def _ratios(columns: Mapping[str, np.ndarray], rows: np.ndarray) -> tuple[float, float, float, float]:
    tokens, size = columns["tokens"][rows].sum(), columns["bytes"][rows].sum()
    before, after = columns["nll_before"][rows].sum(), columns["nll_after"][rows].sum()
    return before / tokens, after / tokens, before / math.log(2) / size, after / math.log(2) / size


def _rounded(row: Mapping[str, float | int | str]) -> dict[str, Json]:
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}


def _plot(path: Path, rows: list[dict[str, float | int | str]]) -> None:
    figure, axes = new_figure(height=1.0 + 0.3 * len(rows))
    names = [str(row["domain"]) for row in rows]
    change = np.asarray([row["bits_per_byte_change"] for row in rows], dtype=float)
    low = np.asarray([row["bits_per_byte_change_low"] for row in rows], dtype=float)
    high = np.asarray([row["bits_per_byte_change_high"] for row in rows], dtype=float)
    axes.errorbar(change, names, xerr=[change - low, high - change], fmt="o", markersize=4, capsize=2)
    axes.axvline(0.0, color="grey", linewidth=1)
    axes.invert_yaxis()
    axes.set(xlabel="change of bits per byte (95 % interval)")
    save_figure(figure, path)


def losses_finite(draft: Manifest) -> Check:
    """Every document has a finite negative log-likelihood under both checkpoints."""
    table = pq.read_table(draft.directory / "documents.parquet")
    wrong = sum(int((~np.isfinite(table[key].to_numpy())).sum()) for key in ("nll_before", "nll_after"))
    return Check(name="losses_finite", passed=wrong == 0, description=f"{table.num_rows} documents, {wrong} losses not finite")


@advisory
def target_improved(draft: Manifest) -> Check:
    """The target loss fell beyond its interval."""
    rows = [row for row in json.loads((draft.directory / "evaluation.json").read_text())["domains"] if row["role"] == "target"]
    if not rows:
        return Check(name="target_improved", passed=False, description="no target domain was evaluated")
    worst = max(rows, key=lambda row: row["loss_change_high"])
    bounds = f"[{worst['loss_change_low']:+.3f}, {worst['loss_change_high']:+.3f}]"
    description = f"{worst['domain']}: {worst['loss_change']:+.3f} nats {bounds}"
    return Check(name="target_improved", passed=worst["loss_change_high"] < 0, description=description)


@advisory
def enough_held_out_tokens(draft: Manifest) -> Check:
    """At least 100,000 held-out tokens for each general and target domain."""
    rows = [
        row for row in json.loads((draft.directory / "evaluation.json").read_text())["domains"] if not str(row["domain"]).startswith("all ")
    ]
    short = [f"{row['domain']} ({row['tokens']:,})" for row in rows if row["tokens"] < 100_000 and row["role"] in ("general", "target")]
    return Check(
        name="enough_held_out_tokens",
        passed=not short,
        description=f"below 100,000 held-out tokens: {', '.join(short) or 'none'}; raise `held_out` in project.yaml for those",
    )


EVALUATION_AUDITS = (losses_finite, target_improved, enough_held_out_tokens)
