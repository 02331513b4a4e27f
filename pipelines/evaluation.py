"""Evaluation: held-out loss and bits per byte, before and after, with paired intervals over documents.

    evaluation: documents.parquet  id, domain, tokens, bytes, nll_before, nll_after, and what is known of each document (`add_facts`)
                evaluation.json    losses by domain, by snapshot, language and age within a role, and of what training text does not share

Both checkpoints are scored on the same documents, so their difference has an interval far narrower than either.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field

from pipelines import plugins
from pipelines.documents import write_table
from pipelines.encoders import special_tokens
from pipelines.errors import EmptyInput
from pipelines.evaluators import Evaluator
from pipelines.held_out_facts import add_facts, years_of_age
from pipelines.manifests import Check, Json, Manifest, Member, Outcome
from pipelines.models import denormals_flushed, load_checkpoint, set_up_torch
from pipelines.paired_bootstrap import PairedLosses, paired_change
from pipelines.plots import new_figure, save_figure
from pipelines.plugins import Settings
from pipelines.rounding import rounded
from pipelines.shards import HeldOutDocuments, held_out_documents
from pipelines.store import advisory

EVALUATION_PACKAGES = ("torch", "transformers")
Row = dict[str, float | int | str]
GROUPS = {"snapshot": "snapshots", "language": "languages", "age": "ages"}
"""What documents of a role are grouped by, and the key of the groups in ``evaluation.json``."""


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
    max_shared: float = Field(default=0.05, ge=0, le=1)
    """Share of a domain's held-out tokens that may lie in a span of 32 tokens which the training text holds too, before a check warns."""
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
    selection: tuple[Member, ...] = (),
    cleaned: tuple[Manifest, ...] = (),
) -> Outcome:
    """Score `base` and `checkpoint` on the held-out documents; write ``documents.parquet`` and ``evaluation.json``.

    Args:
        decisions: deduplicated_corpus, of which the held-out documents are measured: of the recipe, or of another that it is compared
            with. The split is the project's, so no recipe trains on what another one holds out.
        shards: of every document of `decisions` that has a role, and of every passage of `selection`.
        selection: what was trained on; without it, nothing is said of shared text or of age.
        cleaned: cleaned_corpus, for the dates of documents and for languages that no filter identified.

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
    end_of_text = special_tokens(tokenizer.directory).end_of_text
    table = add_facts(table, held, decisions=decisions, cleaned=cleaned, selection=selection, shards=shards, end_of_text=end_of_text)
    write_table(out / "documents.parquet", table)
    rows = _by_domain(settings, table)
    record = {"domains": rows, **_by_facts(settings, table), "contamination": [], "clean": []}
    if selection:
        record["contamination"] = [_shared(domain, settings.roles[domain], _of_domains(table, [domain])) for domain in held]
        record["clean"] = _by_domain(settings, table.filter(pc.equal(table["shared_tokens"], 0)))
    (out / "evaluation.json").write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    _plot(out / "held_out_loss.png", rows)
    shared = {"contaminated": sum(int(row["contaminated"]) for row in record["contamination"])} if selection else {}
    return Outcome(
        counts={"documents": table.num_rows, "tokens": sum(h.num_tokens for h in held.values()), **shared},
        metrics={
            f"{row['domain'].replace(' ', '_')}_{key}": row[key] for row in rows for key in ("bits_per_byte_before", "bits_per_byte_after")
        },
        tables={"held_out" if name == "domains" else name: rounded(found) for name, found in record.items() if found},
        plots=("held_out_loss.png",),
    )


def _by_domain(settings: EvaluationSettings, table: pa.Table) -> list[Row]:
    """Return a row for each domain that `table` has documents of, and one for each role with more than one of them."""
    domains = sorted(set(table["domain"].to_pylist()))
    rows = [_compare(settings, domain, settings.roles[domain], _of_domains(table, [domain])) for domain in domains]
    for role in ("general", "target"):
        mine = [domain for domain in domains if settings.roles[domain] == role]
        if len(mine) > 1:
            rows.append(_compare(settings, f"all {role}", role, _of_domains(table, mine)))
    return rows


def _by_facts(settings: EvaluationSettings, table: pa.Table) -> dict[str, list[Row]]:
    """Return the rows of each group of `GROUPS` within each role; documents of which the fact is not known are in none."""
    roles = pa.array([settings.roles[domain] for domain in table["domain"].to_pylist()])
    ages = pa.array([years_of_age(months) for months in table["age_months"].to_pylist()], pa.string())
    table = table.append_column("role", roles).append_column("age", ages)
    found: dict[str, list[Row]] = {}
    for fact, name in GROUPS.items():
        known = table.filter(pc.is_valid(table[fact]))
        pairs = sorted(set(zip(known["role"].to_pylist(), known[fact].to_pylist(), strict=True)))
        found[name] = [_of_fact(settings, known, fact, role, value) for role, value in pairs]
    return found


def _of_fact(settings: EvaluationSettings, table: pa.Table, fact: str, role: str, value: str) -> Row:
    mine = table.filter(pc.and_(pc.equal(table["role"], role), pc.equal(table[fact], value)))
    row = _compare(settings, value, role, mine)
    return {fact: value, **{key: row[key] for key in row if key != "domain"}}


def _shared(domain: str, role: str, table: pa.Table) -> Row:
    """Return how much of a domain's held-out text lies in spans that the training text holds too."""
    shared, tokens = table["shared_tokens"].to_numpy(), int(pc.sum(table["tokens"]).as_py())
    return {
        "domain": domain,
        "role": role,
        "documents": table.num_rows,
        "contaminated": int((shared > 0).sum()),
        "share_contaminated": float((shared > 0).mean()),
        "tokens": tokens,
        "shared_tokens": int(shared.sum()),
        "share_tokens": float(shared.sum() / tokens),
    }


@denormals_flushed()
def _score(settings: EvaluationSettings, checkpoint: Manifest, held: dict[str, HeldOutDocuments], tokenizer: Manifest) -> pa.Table:
    set_up_torch(settings.threads)
    model = load_checkpoint(checkpoint.directory).eval()
    evaluator: Evaluator = plugins.build("evaluators", settings.evaluator, settings.evaluator_settings)  # type: ignore[assignment]
    return evaluator.score(model, held, special_tokens(tokenizer.directory))


def _of_domains(table: pa.Table, domains: list[str]) -> pa.Table:
    return table.filter(pc.is_in(table["domain"], pa.array(domains)))


def _compare(settings: EvaluationSettings, name: str, role: str, table: pa.Table) -> Row:
    """Return loss (nats per token) and bits per byte before and after, and their paired differences with 95 % intervals.

    Documents are drawn within their domains, where `table` names them.
    """
    losses = PairedLosses.of(table, stratum="domain" if "domain" in table.column_names else None)
    found = paired_change(losses, draws=settings.draws, seed=settings.seed)
    return {
        "domain": name,
        "role": role,
        "documents": table.num_rows,
        "tokens": int(losses.tokens.sum()),
        "loss_before": found.loss_before,
        "loss_after": found.loss_after,
        "loss_change": found.loss.change,
        "loss_change_low": found.loss.low,
        "loss_change_high": found.loss.high,
        "bits_per_byte_before": found.bits_before,
        "bits_per_byte_after": found.bits_after,
        "bits_per_byte_change": found.bits.change,
        "bits_per_byte_change_low": found.bits.low,
        "bits_per_byte_change_high": found.bits.high,
    }


def _plot(path: Path, rows: list[Row]) -> None:
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


@advisory
def held_out_not_in_training(draft: Manifest) -> Check:
    """Of each domain's held-out tokens, no more than `max_shared` lie in a span of 32 tokens that a selected passage holds too."""
    rows = json.loads((draft.directory / "evaluation.json").read_text())["contamination"]
    if not rows:
        return Check(name="held_out_not_in_training", passed=False, description="the training text was not looked at")
    limit = float(draft.settings["max_shared"])
    over = [row for row in rows if row["share_tokens"] > limit]
    shown = ", ".join(f"{row['domain']} {row['share_tokens']:.1%} of tokens" for row in over or [max(rows, key=_share_of_tokens)])
    return Check(
        name="held_out_not_in_training",
        passed=not over,
        description=f"{'above' if over else 'all within'} {limit:.1%}: {shown}{'; read the losses under `clean`' if over else ' at most'}",
        metadata={"contaminated": sum(row["contaminated"] for row in rows), "documents": sum(row["documents"] for row in rows)},
    )


def _share_of_tokens(row: Mapping[str, float]) -> float:
    return row["share_tokens"]


EVALUATION_AUDITS = (losses_finite, target_improved, enough_held_out_tokens, held_out_not_in_training)
