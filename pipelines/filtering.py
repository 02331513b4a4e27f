"""Filtering: score every document once, decide as often as a recipe asks.

    score_documents     one filter over one source partition          -> scores.parquet (id, one column per rule)
    collect_scores      all filters of one source partition           -> scores.parquet (wide: "<filter>.<rule>")
    filter_corpus       thresholds over the scores of many partitions -> decisions.parquet (verdict, rule, score, threshold)

A changed threshold reads scores only, never text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, cast

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from pipelines.documents import DECISION_SCHEMA, read_batches, row_count, write_table
from pipelines.errors import GristmillError, UnknownName
from pipelines.filters import Filter
from pipelines.manifests import Check, Json, Manifest, Outcome
from pipelines.plots import new_figure, save_figure
from pipelines.plugins import Settings, build, load

KEYS = ("id", "domain", "snapshot", "characters")
"""The columns of collected scores that are no scores."""
PASSED = "passes_all_rules"
"""The reason given where an inverse filter drops a document; it has no score and no threshold."""


class ScoreSettings(Settings):
    """One filter and its settings."""

    filter: str
    """A plugin in `filters/`."""
    settings: dict[str, Json] = Field(default_factory=dict)
    """Its settings."""


class CollectSettings(Settings):
    """The partition that the scores belong to."""

    domain: str
    snapshot: str


class Threshold(Settings):
    """On which side of `value`, itself included, a score passes."""

    keep: Literal["at_least", "at_most"]
    value: float


class FilterSettings(Settings):
    """What decides."""

    mode: Literal["keep", "off", "inverse"] = "keep"
    """``off`` keeps every document; ``inverse`` keeps those that ``keep`` drops (A Pretrainer's Guide, 2305.13169)."""
    thresholds: dict[str, dict[str, Threshold]] = Field(default_factory=dict)
    """By domain, then by ``<filter>.<rule>``. A domain without rules keeps every document in every mode."""


def default_thresholds(filter_name: str) -> dict[str, Threshold]:
    """Return the default threshold of each rule of `filter_name` by ``<filter>.<rule>``, in the filter's order.

    Raises:
        UnknownName: there is no such filter.
    """
    rules = cast(type[Filter], load("filters", filter_name)).rules
    return {f"{filter_name}.{rule.name}": Threshold(keep=rule.keep, value=rule.threshold) for rule in rules}


def score_documents(settings: ScoreSettings, out: Path, *, cleaned: Manifest) -> Outcome:
    """Write ``scores.parquet``: id and the score of each of the filter's rules, in the order of the documents."""
    plugin = cast(Filter, build("filters", settings.filter, settings.settings))
    names = [rule.name for rule in plugin.rules]
    schema = pa.schema([("id", pa.string()), *((name, pa.float64()) for name in names)])
    documents = 0
    with pq.ParquetWriter(out / "scores.parquet", schema, compression="zstd") as writer:
        for batch in read_batches(cleaned.file("documents.parquet"), ("id", *plugin.columns)):
            values = [batch[column].to_pylist() for column in plugin.columns]
            scores = _checked(settings.filter, plugin.score(*values), names, batch.num_rows)
            writer.write_batch(pa.record_batch([batch["id"], *scores], schema=schema))
            documents += batch.num_rows
    return Outcome(counts={"documents": documents})


def _checked(name: str, scores: Mapping[str, np.ndarray], names: Sequence[str], rows: int) -> list[pa.Array]:
    shapes = {column: np.shape(values) for column, values in scores.items()}
    if shapes != dict.fromkeys(names, (rows,)):
        raise GristmillError(f"filter {name!r} returned scores {shapes}; its rules ask for {list(names)}, each of shape ({rows},)")
    return [pa.array(np.asarray(scores[column], dtype=np.float64)) for column in names]


def collect_scores(settings: CollectSettings, out: Path, *, cleaned: Manifest, families: tuple[Manifest, ...]) -> Outcome:
    """Write ``scores.parquet``: id, domain, snapshot, characters, and every score of `families`, in the order of the documents."""
    names = [str(family.settings["filter"]) for family in families]
    if len(set(names)) != len(names):
        raise GristmillError(f"scores of one filter are given twice: {names}; give each filter once")
    columns, joins = ["d.id", "$domain AS domain", "$snapshot AS snapshot", "length(d.text) AS characters"], []
    for number, (name, family) in enumerate(zip(names, families, strict=True)):
        path = family.file("scores.parquet")
        joins.append(f"LEFT JOIN read_parquet({_quoted(path)}) f{number} ON f{number}.id = d.id")
        columns += [f'f{number}."{rule}" AS "{name}.{rule}"' for rule in pq.read_schema(path).names if rule != "id"]
    documents = f"read_parquet({_quoted(cleaned.file('documents.parquet'))}, file_row_number = true) d"
    query = f"SELECT {', '.join(columns)} FROM {documents} {' '.join(joins)} ORDER BY d.file_row_number"
    with duckdb.connect() as connection:
        table = connection.sql(query, params={"domain": settings.domain, "snapshot": settings.snapshot}).to_arrow_table()
    write_table(out / "scores.parquet", table)
    return Outcome(counts={"documents": row_count(cleaned.file("documents.parquet"))})


def documents_scored(draft: Manifest) -> Check:
    """There is one row for each document, and no score is missing or infinite (NaN means: the rule does not apply)."""
    table = pq.read_table(draft.directory / "scores.parquet")
    scores = [table[name].to_numpy() for name in table.column_names if name not in KEYS]
    missing = sum(table[name].null_count for name in table.column_names)
    infinite = sum(int(np.isinf(values).sum()) for values in scores)
    documents = draft.counts["documents"]
    return Check(
        name="documents_scored",
        passed=table.num_rows == documents and not missing and not infinite,
        description=f"{documents} documents, {table.num_rows} rows, {missing} scores missing, {infinite} infinite",
        metadata={"documents": documents, "rows": table.num_rows, "missing": missing, "infinite": infinite},
    )


def filter_corpus(settings: FilterSettings, out: Path, *, scores: tuple[Manifest, ...], previous: Manifest | None = None) -> Outcome:
    """Write ``decisions.parquet`` (`DECISION_SCHEMA`), ordered by domain, snapshot and id.

    With `previous`, only the documents that its decisions keep come in. The first rule that failed is the first in the
    order of the score columns, whatever the order in `settings`.

    Raises:
        UnknownName: a threshold names a rule that was not scored.
    """
    paths = [manifest.file("scores.parquet") for manifest in scores]
    documents_in = previous.counts["kept"] if previous else sum(map(row_count, paths))
    with duckdb.connect() as connection:
        connection.execute(f"CREATE TABLE scored AS {_incoming(paths, previous)}")
        columns = [name for name, *_ in connection.execute("DESCRIBE scored").fetchall() if name not in KEYS]
        connection.execute(f"CREATE TABLE judged AS SELECT id, domain, snapshot, {_reasons(settings, columns)} AS reasons FROM scored")
        decided = connection.sql(_verdicts(settings)).to_arrow_table().cast(DECISION_SCHEMA)
    write_table(out / "decisions.parquet", decided)
    by_domain, by_rule = _tables(decided)
    _plot(by_domain, out / "dropped_by_domain.png")
    kept = sum(cast(int, row["kept"]) for row in by_domain)
    return Outcome(
        counts={"documents_in": documents_in, "kept": kept, "dropped": decided.num_rows - kept, "quarantined": 0},
        metrics={"share_dropped": (decided.num_rows - kept) / decided.num_rows if decided.num_rows else 0.0},
        tables={"by_domain": by_domain, "by_rule": by_rule},
        plots=("dropped_by_domain.png",),
    )


def _incoming(paths: Sequence[Path], previous: Manifest | None) -> str:
    if not paths:
        raise GristmillError("no scores to decide over; a recipe needs at least one source partition")
    files = ", ".join(map(_quoted, paths))
    query = f"SELECT * FROM read_parquet([{files}], union_by_name = true)"
    if previous is None:
        return query
    kept = f"SELECT id, domain, snapshot FROM read_parquet({_quoted(previous.file('decisions.parquet'))}) WHERE kept"
    return f"{query} SEMI JOIN ({kept}) USING (id, domain, snapshot)"


def _reasons(settings: FilterSettings, columns: Sequence[str]) -> str:
    """Return an SQL expression for the list of a document's failing rules, by its domain."""
    nothing = f"CAST([] AS {_REASONS_TYPE})"
    cases = []
    for domain, thresholds in settings.thresholds.items():
        for rule in thresholds:
            if rule not in columns:
                raise UnknownName(f"rule in the thresholds of domain {domain!r}", rule, columns)
        tests = [_test(rule, thresholds[rule]) for rule in columns if rule in thresholds]
        if tests and settings.mode != "off":
            cases.append(f"WHEN {_quoted(domain)} THEN list_filter([{', '.join(tests)}], lambda reason: reason IS NOT NULL)")
    return f"CASE domain {' '.join(cases)} ELSE {nothing} END" if cases else nothing


_REASONS_TYPE = "STRUCT(rule VARCHAR, score DOUBLE, threshold DOUBLE)[]"


def _test(rule: str, threshold: Threshold) -> str:
    comparison = "<" if threshold.keep == "at_least" else ">"
    value = f"CAST({threshold.value!r} AS DOUBLE)"
    return f"""CASE WHEN NOT isnan("{rule}") AND "{rule}" {comparison} {value}
        THEN {{'rule': {_quoted(rule)}, 'score': "{rule}", 'threshold': {value}}} END"""


def _verdicts(settings: FilterSettings) -> str:
    fails = "len(reasons) > 0"
    passed = f"[{{'rule': {_quoted(PASSED)}, 'score': CAST(NULL AS DOUBLE), 'threshold': CAST(NULL AS DOUBLE)}}]"
    judged = [domain for domain, thresholds in settings.thresholds.items() if thresholds]
    if settings.mode == "inverse" and judged:
        inverted = f"domain IN ({', '.join(map(_quoted, judged))})"
        source = f"""SELECT id, domain, snapshot, ({fails}) OR NOT {inverted} AS kept,
            CASE WHEN {fails} OR NOT {inverted} THEN reasons ELSE {passed} END AS reasons FROM judged"""
    else:
        source = f"SELECT id, domain, snapshot, NOT ({fails}) AS kept, reasons FROM judged"
    return f"""SELECT id, domain, snapshot, kept,
        CASE WHEN NOT kept THEN reasons[1].rule END AS rule,
        CASE WHEN NOT kept THEN reasons[1].score END AS score,
        CASE WHEN NOT kept THEN reasons[1].threshold END AS threshold,
        reasons FROM ({source}) ORDER BY domain, snapshot, id"""


def _tables(decided: pa.Table) -> tuple[list[dict[str, Json]], list[dict[str, Json]]]:
    with duckdb.connect() as connection:
        connection.register("decided", decided)
        by_domain = connection.sql(
            """SELECT domain, count(*) AS documents_in, count(*) FILTER (kept) AS kept, count(*) FILTER (NOT kept) AS dropped,
            round(dropped / documents_in, 6) AS share_dropped FROM decided GROUP BY domain ORDER BY domain"""
        ).to_arrow_table()
        by_rule = connection.sql(
            "SELECT domain, rule, count(*) AS dropped FROM decided WHERE NOT kept GROUP BY ALL ORDER BY domain, dropped DESC, rule"
        ).to_arrow_table()
    return by_domain.to_pylist(), by_rule.to_pylist()


def _plot(by_domain: Sequence[Mapping[str, Json]], path: Path) -> None:
    """Draw the share of documents dropped in each domain; 7 inches wide, 100 dots an inch."""
    rows = list(reversed(by_domain))
    figure, axes = new_figure(7, 1.2 + 0.3 * len(rows))
    bars = axes.barh([str(row["domain"]) for row in rows], [100 * cast(float, row["share_dropped"]) for row in rows], color="#4477aa")
    axes.bar_label(bars, [f"{row['dropped']} of {row['documents_in']}" for row in rows], padding=3, fontsize=8)
    axes.set_xlim(0, max([10.0, *(130 * cast(float, row["share_dropped"]) for row in rows)]))
    axes.set_xlabel("documents dropped (%)")
    axes.grid(visible=False)
    save_figure(figure, path)


def _quoted(value: str | Path) -> str:
    return "'" + str(value).replace("'", "''") + "'"


def documents_conserved(draft: Manifest) -> Check:
    """Documents that came in = documents kept + dropped = rows of the decisions."""
    kept = pq.read_table(draft.directory / "decisions.parquet", columns=["kept"])["kept"].to_numpy()
    came, stays, goes = (draft.counts[name] for name in ("documents_in", "kept", "dropped"))
    return Check(
        name="documents_conserved",
        passed=came == len(kept) == stays + goes and stays == int(kept.sum()),
        description=f"{came} came in, {stays} kept, {goes} dropped, {len(kept)} rows",
        metadata={"documents_in": came, "kept": stays, "dropped": goes, "rows": len(kept)},
    )


def ids_unique(draft: Manifest) -> Check:
    """Every row has an id of its own within its domain and snapshot."""
    name = "decisions.parquet" if (draft.directory / "decisions.parquet").exists() else "scores.parquet"
    keys = [key for key in ("domain", "snapshot", "id") if key in pq.read_schema(draft.directory / name).names]
    table = pq.read_table(draft.directory / name, columns=keys)
    repeated = table.num_rows - table.group_by(keys).aggregate([]).num_rows
    null = table["id"].null_count
    return Check(
        name="ids_unique",
        passed=not repeated and not null,
        description=f"{repeated} repeated, {null} null",
        metadata={"documents": table.num_rows, "repeated": repeated, "null": null},
    )


def every_drop_has_a_reason(draft: Manifest) -> Check:
    """A dropped document names the rule that dropped it, a kept one names none."""
    table = pq.read_table(draft.directory / "decisions.parquet", columns=["kept", "rule"])
    kept, named = table["kept"].to_numpy(), table["rule"].is_valid().to_numpy()
    wrong = int((kept == named).sum())
    return Check(name="every_drop_has_a_reason", passed=not wrong, description=f"{wrong} documents differ", metadata={"documents": wrong})


def something_left(draft: Manifest) -> Check:
    """At least one document is kept; domains of which none is kept are named."""
    rows = draft.outcome.tables["by_domain"]
    empty = [str(row["domain"]) for row in rows if not row["kept"]]
    kept = draft.counts["kept"]
    remedy = "; no document is left: loosen the thresholds, or set the filter off for these domains" if not kept else ""
    return Check(
        name="something_left",
        passed=kept > 0,
        description=f"domains of which nothing is left: {', '.join(empty) or 'none'}{remedy}",
        metadata={"kept": kept, "domains_empty": ", ".join(empty)},
    )


SCORE_AUDITS = (documents_scored, ids_unique)
COLLECT_AUDITS = (documents_scored, ids_unique)
FILTER_AUDITS = (documents_conserved, ids_unique, every_drop_has_a_reason, something_left)
