"""Two evaluations of the same held-out documents, row by row: domains, roles, and snapshots and languages within a role.

Documents are paired by id. Each row has a paired interval and a p-value (`paired_bootstrap`), the p-values of all rows are corrected
for their number by Holm's method, and the verdict goes by the corrected one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import cast

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.errors import GristmillError
from pipelines.manifests import Manifest
from pipelines.paired_bootstrap import PairedLosses, holm, paired_change

Row = dict[str, float | int | str]


def paired_documents(roles: Mapping[str, str], candidate: Manifest, baseline: Manifest | None) -> tuple[pa.Table, list[str]]:
    """Return the documents with ``role``, ``nll_baseline`` and ``nll_candidate``, and the domains that only one of the two has.

    Args:
        roles: domain to role, of the candidate.
        candidate: an evaluation artifact.
        baseline: another; without it the candidate's checkpoint is set against the one it was continued from.

    Raises:
        GristmillError: they were measured on different documents, with different evaluators or tokenizers, or share no domain.
    """
    mine = _documents(candidate)
    if baseline is None:
        theirs, column, left_out = mine, "nll_before", []
    else:
        _same_measure(candidate, baseline)
        theirs, column = _documents(baseline), "nll_after"
        domains = [set(table["domain"].to_pylist()) for table in (mine, theirs)]
        shared, left_out = domains[0] & domains[1], sorted(domains[0] ^ domains[1])
        if not shared:
            raise GristmillError(
                f"{candidate.label} and {baseline.label} have no domain in common; choose a baseline with the same domains"
            )
        mine, theirs = (table.filter(pc.is_in(table["domain"], pa.array(sorted(shared)))) for table in (mine, theirs))
        _same_documents(candidate, baseline, mine, theirs)
    roles = pa.array([roles[domain] for domain in mine["domain"].to_pylist()])
    found = mine.select([name for name in ("id", "domain", "tokens", "bytes", "snapshot", "language") if name in mine.column_names])
    columns = {"role": roles, "nll_baseline": theirs[column], "nll_candidate": mine["nll_after"]}
    for name, values in columns.items():
        found = found.append_column(name, values)
    return found, left_out


def _documents(evaluation: Manifest) -> pa.Table:
    """Return the documents of an evaluation, ordered so that those of another stand in the same places."""
    return pq.read_table(evaluation.file("documents.parquet")).sort_by(
        [("domain", "ascending"), ("id", "ascending"), ("bytes", "ascending")]
    )


def _same_measure(candidate: Manifest, baseline: Manifest) -> None:
    for name in ("evaluator", "evaluator_settings"):
        mine, theirs = candidate.settings.get(name), baseline.settings.get(name)
        if mine != theirs:
            raise GristmillError(
                f"{candidate.label} was measured with {name} {mine!r}, {baseline.label} with {theirs!r}; set `evaluation.{name}` alike"
            )


def _same_documents(candidate: Manifest, baseline: Manifest, mine: pa.Table, theirs: pa.Table) -> None:
    keys = [Counter(zip(table["domain"].to_pylist(), table["id"].to_pylist(), strict=True)) for table in (mine, theirs)]
    differ = sum((keys[0] - keys[1]).values()) + sum((keys[1] - keys[0]).values())
    if differ:
        name = baseline.inputs["decisions"][0].partition or baseline.label
        raise GristmillError(
            f"{candidate.label} and {baseline.label} were measured on different documents: {differ} are in one of them alone "
            f"({mine.num_rows} and {theirs.num_rows} in all); set `evaluation.reference: {name}` in the recipe of {candidate.label}, "
            "with the same `evaluation.max_tokens_per_domain`, and materialize its evaluation again"
        )
    if not mine["tokens"].equals(theirs["tokens"]):
        raise GristmillError(
            f"{candidate.label} and {baseline.label} cut the same documents into different tokens, so that losses per token mean "
            "different things; materialize both evaluations with one tokenizer"
        )


def compared_rows(table: pa.Table, *, alpha: float, draws: int, seed: int, groups: Sequence[str] = ("snapshot", "language")) -> list[Row]:
    """Return a row for each domain, and for each role and each of its `groups` that are not the same documents.

    Args:
        table: of `paired_documents`.
        alpha: chance that any row gets a verdict though nothing differs.
        draws: bootstrap draws over documents.
    """

    def row(group: str, name: str, part: pa.Table) -> Row:
        return _row(group, name, part, draws=draws, seed=seed)

    rows = [row("domain", name, table.filter(pc.equal(table["domain"], name))) for name in _values(table, "domain")]
    for role in _values(table, "role"):
        mine = table.filter(pc.equal(table["role"], role))
        if len(_values(mine, "domain")) > 1:
            rows.append(row("role", role, mine))
        for group in groups:
            values = _values(mine, group)
            found = {value: mine.filter(pc.equal(mine[group], value)) for value in values}
            rows += [row(group, f"{role} {value}", part) for value, part in found.items() if part.num_rows < mine.num_rows]
    adjusted = holm([cast(float, found["p_value"]) for found in rows])
    return [{**found, "p_adjusted": p, "verdict": verdict_of(found, p, alpha)} for found, p in zip(rows, adjusted, strict=True)]


def _values(table: pa.Table, column: str) -> list[str]:
    return sorted(set(table[column].drop_null().to_pylist())) if column in table.column_names else []


def _row(group: str, name: str, table: pa.Table, *, draws: int, seed: int) -> Row:
    losses = PairedLosses.of(table, before="nll_baseline", after="nll_candidate", stratum="domain")
    found = paired_change(losses, draws=draws, seed=seed)
    return {
        "group": group,
        "name": name,
        "role": table["role"][0].as_py(),
        "documents": table.num_rows,
        "tokens": int(losses.tokens.sum()),
        "loss_baseline": found.loss_before,
        "loss_candidate": found.loss_after,
        "loss_change": found.loss.change,
        "loss_change_low": found.loss.low,
        "loss_change_high": found.loss.high,
        "bits_per_byte_baseline": found.bits_before,
        "bits_per_byte_candidate": found.bits_after,
        "bits_per_byte_change": found.bits.change,
        "bits_per_byte_change_low": found.bits.low,
        "bits_per_byte_change_high": found.bits.high,
        "p_value": found.p_value,
    }


def verdict_of(row: Row, p_adjusted: float, alpha: float) -> str:
    """Return ``better`` or ``worse`` where the corrected p-value is below `alpha`, else ``no difference``."""
    if p_adjusted >= alpha:
        return "no difference"
    return "worse" if cast(float, row["loss_change"]) > 0 else "better"
