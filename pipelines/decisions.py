"""Decisions: thresholds over the scores of many partitions, as often as a recipe asks, and what each rule costs.

    filter_corpus    scores.parquet of source partitions -> decisions.parquet (verdict, rule, score, threshold, all reasons)

One query in DuckDB reads scores, never text. It sorts and joins on disk beyond `MEMORY_LIMIT`, and its result is written as
it streams, so that memory does not grow with the number of documents.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, cast

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from pipelines.documents import ALL_DOMAINS, DECISION_SCHEMA, ROWS_PER_GROUP, row_count
from pipelines.errors import GristmillError, UnknownName
from pipelines.filters import Filter
from pipelines.intervals import wilson
from pipelines.manifests import Check, Json, Manifest, Outcome
from pipelines.plots import new_figure, save_figure
from pipelines.plugins import Settings, load

MEMORY_LIMIT = "512MB"
"""Of DuckDB's own memory; what does not fit goes to a directory beside the result."""
THREADS = min(8, len(os.sched_getaffinity(0)))
"""Each takes memory of its own: no more than the limit feeds."""
PASSED = "passes_all_rules"
"""The reason given where an inverse filter drops a document; it has no score and no threshold."""
LANGUAGE, TOPICS = "language.language", "topics.mentioned"
"""Columns of labels that the tables read where they were scored: a document's language; its topics, with commas between them."""

Rows = list[dict[str, Json]]


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


def filter_corpus(settings: FilterSettings, out: Path, *, scores: tuple[Manifest, ...], previous: Manifest | None = None) -> Outcome:
    """Write ``decisions.parquet`` (`DECISION_SCHEMA`), ordered by domain, snapshot and id.

    With `previous`, only the documents that its decisions keep come in. The first rule that failed is the first in the
    order of the score columns, whatever the order in `settings`. A document's language is the one scored, else that of
    `previous`.

    Raises:
        UnknownName: a threshold names a rule that was not scored.
    """
    paths = [manifest.file("scores.parquet") for manifest in scores]
    documents_in = previous.counts["kept"] if previous else sum(map(row_count, paths))
    before = previous.file("decisions.parquet") if previous else None
    with _database(out) as connection:
        tables = decide(connection, settings, out / "decisions.parquet", paths, before)
    by_domain = tables["by_domain"]
    _plot(by_domain, out / "dropped_by_domain.png")
    kept, dropped = (sum(cast(int, row[key]) for row in by_domain) for key in ("kept", "dropped"))
    return Outcome(
        counts={"documents_in": documents_in, "kept": kept, "dropped": dropped, "quarantined": 0},
        metrics={"share_dropped": dropped / (kept + dropped) if kept + dropped else 0.0},
        tables=tables,
        plots=("dropped_by_domain.png",),
    )


@contextlib.contextmanager
def _database(directory: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """Yield a database that takes no more than `MEMORY_LIMIT` of memory and keeps the rest in `directory` meanwhile."""
    with contextlib.ExitStack() as stack:
        spill = stack.enter_context(tempfile.TemporaryDirectory(prefix=".duckdb-", dir=directory))
        yield stack.enter_context(duckdb.connect(config={"memory_limit": MEMORY_LIMIT, "temp_directory": spill, "threads": THREADS}))


def decide(
    connection: duckdb.DuckDBPyConnection, settings: FilterSettings, path: Path, scores: Sequence[Path], previous: Path | None = None
) -> dict[str, Rows]:
    """Write the decisions over the Parquet files `scores` to `path`, and return the tables that count them.

    Neither depends on the order of the files or of their rows, nor on the connection's threads.

    Tables:
        by_domain: documents and characters that came in and that were dropped.
        by_language: documents by domain and language.
        by_rule: for each rule that is on in a domain, the documents that fail it, that fail it first (`dropped`: they add up
            to all that were dropped) and that fail nothing else (`alone`: what the rule costs), and the characters of the
            first and of the last. Rules that dropped nothing are there too.
        by_topic: of documents that mention a topic, the share that fails a rule, beside that of all documents of the domain.
    """
    # Parquet statistics leave NaN out, and DuckDB 2.0 folds isnan() to false by them: a rule that does not apply would fail.
    connection.execute("SET disabled_optimizers = 'statistics_propagation'")
    connection.execute(f"CREATE TEMP VIEW scored AS {_incoming(scores, previous)}")
    columns = {str(name): str(kind) for name, kind, *_ in connection.execute("DESCRIBE scored").fetchall()}
    rules = [name for name, kind in columns.items() if kind == "DOUBLE"]
    topics = f'"{TOPICS}"' if TOPICS in columns else "NULL::VARCHAR"
    connection.execute(
        f"""CREATE TEMP TABLE judged AS SELECT id, domain, snapshot, {_language(columns)} AS lang, characters, {topics} AS topics,
        {_reasons(settings, rules)} AS reasons FROM scored"""
    )
    _write(connection.sql(_verdicts(settings)).to_arrow_reader(ROWS_PER_GROUP), path)
    connection.execute(f"CREATE TEMP VIEW verdicts AS SELECT *, {_kept(settings)} AS kept FROM judged")
    return {
        "by_domain": _rows(connection, _BY_DOMAIN),
        "by_language": _rows(connection, _BY_LANGUAGE),
        "by_rule": _rows(connection, _by_rule(settings, rules)),
        "by_topic": _by_topic(connection, settings) if TOPICS in columns else [],
    }


def _incoming(paths: Sequence[Path], previous: Path | None) -> str:
    if not paths:
        raise GristmillError("no scores to decide over; a recipe needs at least one source partition")
    files = ", ".join(map(_quoted, paths))
    query = f"SELECT s.*, {'p.lang' if previous else 'NULL::VARCHAR'} AS lang_before FROM read_parquet([{files}], union_by_name = true) s"
    if previous is None:
        return query
    kept = f"SELECT id, domain, snapshot, lang FROM read_parquet({_quoted(previous)}) WHERE kept"
    return f"{query} JOIN ({kept}) p ON s.id = p.id AND s.domain = p.domain AND s.snapshot = p.snapshot"


def _language(columns: Mapping[str, str]) -> str:
    return f'coalesce("{LANGUAGE}", lang_before)' if LANGUAGE in columns else "lang_before"


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


def _judging(settings: FilterSettings) -> list[str]:
    """Return the domains in which a rule is on."""
    return [domain for domain, thresholds in settings.thresholds.items() if thresholds and settings.mode != "off"]


def _kept(settings: FilterSettings) -> str:
    judging = _judging(settings)
    if settings.mode == "inverse" and judging:
        return f"(len(reasons) > 0 OR domain NOT IN ({', '.join(map(_quoted, judging))}))"
    return "(len(reasons) = 0)"


def _verdicts(settings: FilterSettings) -> str:
    passed = f"[{{'rule': {_quoted(PASSED)}, 'score': CAST(NULL AS DOUBLE), 'threshold': CAST(NULL AS DOUBLE)}}]"
    given = f"SELECT * REPLACE (CASE WHEN {_kept(settings)} OR len(reasons) > 0 THEN reasons ELSE {passed} END AS reasons)"
    return f"""SELECT id, domain, snapshot, lang, kept,
        CASE WHEN NOT kept THEN reasons[1].rule END AS rule,
        CASE WHEN NOT kept THEN reasons[1].score END AS score,
        CASE WHEN NOT kept THEN reasons[1].threshold END AS threshold,
        reasons FROM ({given}, {_kept(settings)} AS kept FROM judged) ORDER BY domain, snapshot, id"""


def _write(reader: pa.RecordBatchReader, path: Path) -> None:
    """Write what streams in as row groups of `ROWS_PER_GROUP`, however DuckDB cut it: so threads do not show in the bytes."""
    with pq.ParquetWriter(path, DECISION_SCHEMA, compression="zstd") as writer:
        for table in _even(reader):
            writer.write_table(table.cast(DECISION_SCHEMA), row_group_size=ROWS_PER_GROUP)


def _even(reader: pa.RecordBatchReader) -> Iterator[pa.Table]:
    held = reader.schema.empty_table()
    for batch in reader:
        held = pa.concat_tables([held, pa.Table.from_batches([batch])])
        while held.num_rows >= ROWS_PER_GROUP:
            yield held.slice(0, ROWS_PER_GROUP).combine_chunks()
            held = held.slice(ROWS_PER_GROUP)
    if held.num_rows:
        yield held.combine_chunks()


_COUNTED = """count(*) AS documents_in, count(*) FILTER (kept) AS kept, count(*) FILTER (NOT kept) AS dropped,
    round(dropped / documents_in, 6) AS share_dropped"""
_BY_DOMAIN = f"""SELECT domain, {_COUNTED}, coalesce(sum(characters), 0)::BIGINT AS characters,
    coalesce(sum(characters) FILTER (NOT kept), 0)::BIGINT AS dropped_characters FROM verdicts GROUP BY domain ORDER BY domain"""
_BY_LANGUAGE = f"SELECT domain, lang, {_COUNTED} FROM verdicts GROUP BY domain, lang ORDER BY domain, documents_in DESC, lang"


def _by_rule(settings: FilterSettings, columns: Sequence[str]) -> str:
    judging = _judging(settings)
    pairs = [f"({_quoted(domain)}, {_quoted(rule)})" for domain in judging for rule in columns if rule in settings.thresholds[domain]]
    rules = f"SELECT domain, rule FROM (VALUES {', '.join(pairs)}) r(domain, rule)" if pairs else "SELECT '' AS domain, '' AS rule LIMIT 0"
    return f"""WITH failed AS (SELECT domain, unnest(list_transform(reasons, lambda reason: reason.rule)) AS rule,
            NOT kept AND rule = reasons[1].rule AS first, len(reasons) = 1 AS alone, characters FROM verdicts)
        SELECT r.domain, r.rule, count(f.rule) AS failed, count(*) FILTER (f.first) AS dropped, count(*) FILTER (f.alone) AS alone,
            coalesce(sum(f.characters), 0)::BIGINT AS characters,
            coalesce(sum(f.characters) FILTER (f.alone), 0)::BIGINT AS alone_characters
        FROM ({rules}) r LEFT JOIN failed f USING (domain, rule) WHERE r.domain IN (SELECT domain FROM verdicts) GROUP BY r.domain, r.rule
        UNION ALL SELECT domain, {_quoted(PASSED)}, count(*), count(*), count(*), sum(characters)::BIGINT, sum(characters)::BIGINT
        FROM verdicts WHERE NOT kept AND len(reasons) = 0 GROUP BY domain
        ORDER BY domain, dropped DESC, failed DESC, rule"""


def _by_topic(connection: duckdb.DuckDBPyConnection, settings: FilterSettings) -> Rows:
    """Return, by domain and topic, the share of documents flagged, with Wilson's 95 % interval and the ratio to the domain's own share.

    The interval of the ratio is that of the share, over the domain's share as it was measured. For all domains together that is
    the share to be expected of documents from the same domains (indirect standardisation): a topic is not blamed for its domain.
    """
    judging = _judging(settings)
    if not judging:
        return []
    flagged = f"SELECT domain, topics, len(reasons) > 0 AS flagged FROM judged WHERE domain IN ({', '.join(map(_quoted, judging))})"
    counted = f"""WITH f AS ({flagged}), base AS (SELECT domain, count(*) FILTER (flagged) AS hits, count(*) AS of FROM f GROUP BY domain),
        mentioned AS (SELECT domain, unnest(string_split(topics, ',')) AS topic, count(*) AS documents, count(*) FILTER (flagged) AS flagged
            FROM f WHERE topics <> '' GROUP BY domain, topic),
        expected AS (SELECT *, documents * hits / of AS expected FROM mentioned JOIN base USING (domain))
        SELECT domain, topic, documents, flagged, expected / documents AS base FROM expected
        UNION ALL SELECT {_quoted(ALL_DOMAINS)}, topic, sum(documents)::BIGINT, sum(flagged)::BIGINT,
            list_sum(list(expected ORDER BY domain)) / sum(documents) FROM expected GROUP BY topic
        ORDER BY domain, topic"""
    rows: Rows = []
    for row in _rows(connection, counted):
        documents, hits, base = cast(int, row["documents"]), cast(int, row["flagged"]), cast(float, row["base"])
        share, (low, high) = hits / documents, wilson(hits, documents)
        shares = {"share_flagged": share, "share_flagged_low": low, "share_flagged_high": high, "base": base}
        ratios = {"ratio": share, "ratio_low": low, "ratio_high": high}
        rounded = {key: round(value, 6) for key, value in shares.items()}
        rows.append({**row, **rounded, **{key: round(value / base, 4) if base else None for key, value in ratios.items()}})
    return rows


def _rows(connection: duckdb.DuckDBPyConnection, query: str) -> Rows:
    return connection.sql(query).to_arrow_table().to_pylist()


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
    rows, kept = _asked(draft, "count(*), count(*) FILTER (kept)")
    came, stays, goes = (draft.counts[name] for name in ("documents_in", "kept", "dropped"))
    return Check(
        name="documents_conserved",
        passed=came == rows == stays + goes and stays == kept,
        description=f"{came} came in, {stays} kept, {goes} dropped, {rows} rows",
        metadata={"documents_in": came, "kept": stays, "dropped": goes, "rows": rows},
    )


def ids_unique(draft: Manifest) -> Check:
    """Every row has an id of its own within its domain and snapshot."""
    rows, named, distinct = _asked(draft, "count(*), count(id), count(DISTINCT (domain, snapshot, id))")
    return Check(
        name="ids_unique",
        passed=rows == named == distinct,
        description=f"{rows - distinct} repeated, {rows - named} null",
        metadata={"documents": rows, "repeated": rows - distinct, "null": rows - named},
    )


def every_drop_has_a_reason(draft: Manifest) -> Check:
    """A dropped document names the rule that dropped it, a kept one names none."""
    (wrong,) = _asked(draft, "count(*) FILTER (kept = (rule IS NOT NULL))")
    return Check(name="every_drop_has_a_reason", passed=not wrong, description=f"{wrong} documents differ", metadata={"documents": wrong})


def _asked(draft: Manifest, what: str) -> tuple[int, ...]:
    """Return the row of numbers that `what` selects of the decisions, within `MEMORY_LIMIT`."""
    path = draft.directory / "decisions.parquet"
    with _database(draft.directory) as connection:
        return connection.execute(f"SELECT {what} FROM read_parquet({_quoted(path)})").fetchall()[0]


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


FILTER_AUDITS = (documents_conserved, ids_unique, every_drop_has_a_reason, something_left)
