"""Why a document was kept or dropped: every stage in order, every score beside its threshold, as stored; no text is read.

`find` says which documents a name stands for; `explain` answers from manifests and their Parquet files, by queries that read
the row groups of one partition. Recipes decide over stored scores, so the answer is that of the decision, not a new one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.documents import DECISION_SCHEMA, partition_file, split_partition
from pipelines.errors import GristmillError
from pipelines.manifests import Json, Manifest

Verdict = Literal["kept", "dropped", "quarantined", "selected", "not selected", "held out", "not reached", "not taken", "not decided"]
MAX_NAMED = 5
"""Documents named where a name stands for several, or for none."""
MAX_PASSAGES = 12
"""Passages of a long document that are listed."""
SCORE_KEYS = ("id", "domain", "snapshot", "characters")
OUTCOMES = ("kept", "dropped", "quarantined", "selected", "not selected", "held out")
"""Verdicts that say where a document stands; the others say that a stage has nothing to say of it."""


@dataclass(frozen=True)
class Place:
    """Where a name was found."""

    partition: str
    name: str
    """The document's id; the locator of what was quarantined at ingestion, which has none."""
    quarantined: bool = False


@dataclass(frozen=True)
class Measured:
    """One score beside its threshold."""

    rule: str
    score: float | str | None
    """None where the rule does not apply to the document; a label (a language, a genre) is text."""
    keep: str | None
    threshold: float | None
    verdict: Literal["passes", "fails", "does not apply", "off", "label", "not decided"]
    """`off`: the recipe has no threshold for this rule in the document's domain."""


@dataclass(frozen=True)
class Finding:
    """What one stage did with the document."""

    stage: str
    verdict: Verdict
    reason: str = ""
    facts: dict[str, Json] = field(default_factory=dict)
    scores: tuple[Measured, ...] = ()


@dataclass(frozen=True)
class Explanation:
    """The stages of one document, in the order of the graph."""

    id: str
    partition: str
    recipe: str
    stages: tuple[Finding, ...]

    @property
    def end(self) -> Finding:
        """Where the document stands: the stage that dropped it, else the last that decided."""
        decided = [stage for stage in self.stages if stage.verdict in OUTCOMES]
        return next((stage for stage in decided if stage.verdict in ("dropped", "quarantined")), decided[-1])


@dataclass(frozen=True)
class Decided:
    """The decisions of one stage and, where it decides by thresholds, the scores of the document's partition that it read."""

    decisions: Manifest
    scores: Manifest | None = None


@dataclass(frozen=True)
class Evidence:
    """The artifacts that speak of one partition under one recipe; what is not materialized is absent."""

    recipe: str
    raw: Manifest
    cleaned: Manifest | None
    decided: Mapping[str, Decided | None]
    """Decision asset to what it decided, in the order of the graph; None where it is not materialized."""
    clusters: Manifest | None
    selection: Manifest | None


def find(name: str, raw: Sequence[Manifest]) -> Place:
    """Return the one document of `raw` that `name` stands for: an id, the start of one, or the locator of quarantined input.

    Raises:
        GristmillError: it stands for none, or for several; the message names the nearest.
    """
    likely = [manifest for manifest in raw if _may_hold(name, manifest)]
    found = _matches(name, likely, exact=True) or _matches(name, raw, exact=True) or _matches(name, raw, exact=False)
    if len(found) == 1:
        return found[0]
    if found:
        named, more = ", ".join(repr(place.name) for place in found[:MAX_NAMED]), " and more" if len(found) > MAX_NAMED else ""
        raise GristmillError(f"{name!r} is the start of several documents: {named}{more}; give more of it")
    near = ", ".join(map(repr, _nearest(name, raw)))
    hint = f"did you mean {near}?" if near else "they hold no document"
    raise GristmillError(f"unknown document {name!r} in {len(raw)} raw corpora; {hint}")


def _may_hold(name: str, raw: Manifest) -> bool:
    domain, snapshot = split_partition(str(raw.partition))
    return name.startswith(f"{domain}-") and name.endswith(snapshot[:7])


def _matches(name: str, raw: Sequence[Manifest], *, exact: bool) -> list[Place]:
    """Return the first documents whose id or locator equals, or begins with, `name`."""
    found: list[Place] = []
    for file, column in (("documents.parquet", "id"), ("quarantine.parquet", "locator")):
        test = f"{column} = $name" if exact else f"{column} >= $name AND starts_with({column}, $name)"
        query = f"SELECT {column}, filename FROM read_parquet($files, filename = true) WHERE {test} ORDER BY ALL LIMIT {MAX_NAMED + 1}"
        files = {str(manifest.file(file)): str(manifest.partition) for manifest in raw}
        if files:
            rows = _query(query, name=name, files=list(files))
            found += [Place(files[str(row["filename"])], str(row[column]), quarantined=column == "locator") for row in rows]
    return found


def _nearest(name: str, raw: Sequence[Manifest]) -> list[str]:
    if not raw:
        return []
    query = f"SELECT id FROM read_parquet($files) ORDER BY levenshtein(id, $name), id LIMIT {MAX_NAMED - 2}"
    return [str(row["id"]) for row in _query(query, files=[str(manifest.file("documents.parquet")) for manifest in raw], name=name)]


def explain(place: Place, evidence: Evidence) -> Explanation:
    """Return what every stage did with the document at `place`."""
    stages = [_ingested(place, evidence.raw)]
    going = not place.quarantined
    if going:
        stages.append(_cleaned(place, evidence.cleaned))
        going = stages[-1].verdict == "kept"
    for asset, decided in evidence.decided.items():
        stages.append(_decided(asset, place, decided, going=going))
        if asset == "deduplicated_corpus" and not place.quarantined:
            stages[-1].facts.update(_duplicates(place, evidence.clusters, decided))
        going = going and stages[-1].verdict in ("kept", "not decided")  # what is not materialized drops nothing
    stages.append(_selected(place, evidence.selection, stages[-1], going=going))
    return Explanation(place.name, place.partition, evidence.recipe, tuple(stages))


def _ingested(place: Place, raw: Manifest) -> Finding:
    if place.quarantined:
        (row,) = _rows(raw.file("quarantine.parquet"), "locator", place.name)[:1]
        return Finding("raw_corpus", "quarantined", str(row["reason"]), {"locator": row["locator"], "excerpt": row["excerpt"]})
    columns = ("source", "license", "date", "url", "lang", "title")
    (row,) = _rows(raw.file("documents.parquet"), "id", place.name, columns)
    return Finding("raw_corpus", "kept", "", {key: value for key, value in row.items() if value})


def _cleaned(place: Place, cleaned: Manifest | None) -> Finding:
    if cleaned is None:
        return Finding("cleaned_corpus", "not decided", "not materialized")
    changes = {str(row["change"]): row["count"] for row in _rows(cleaned.file("changes.parquet"), "id", place.name)}
    if dropped := _rows(cleaned.file("dropped.parquet"), "id", place.name):
        return Finding("cleaned_corpus", "dropped", str(dropped[0]["reason"]), changes)
    return Finding("cleaned_corpus", "kept", "", changes)


def _decided(asset: str, place: Place, decided: Decided | None, *, going: bool) -> Finding:
    if decided is None:
        return Finding(asset, "not decided" if going else "not reached", "not materialized" if going else "")
    scores = () if place.quarantined else _measured(place, decided)
    if not going:
        return Finding(asset, "not reached", scores=scores)
    rows = _rows(decided.decisions.file("decisions.parquet"), "id", place.name, place=place)
    if not rows:
        return Finding(asset, "not taken", f"the recipe's decisions do not cover {place.partition}", scores=scores)
    (row,) = rows
    mode = decided.decisions.settings.get("mode")
    facts = {"mode": mode} if mode in ("off", "inverse", "exact") else {}
    facts |= {key: value for key, value in row.items() if (key == "lang" or key not in DECISION_SCHEMA.names) and value is not None}
    reason = "" if row["kept"] else _reason(row)
    return Finding(asset, "kept" if row["kept"] else "dropped", reason, facts, scores)


def _reason(row: Mapping[str, Json]) -> str:
    """Return the first rule that failed, its score and threshold, and how many more failed."""
    reasons = row["reasons"] if isinstance(row["reasons"], list) else []
    values = f": {written(row['score'])}, threshold {written(row['threshold'])}" if row["score"] is not None else ""
    return f"{row['rule']}{values}{f'; {len(reasons) - 1} more' if len(reasons) > 1 else ''}"


def _measured(place: Place, decided: Decided) -> tuple[Measured, ...]:
    if decided.scores is None:
        return ()
    path = decided.scores.file("scores.parquet")
    found = _rows(path, "id", place.name)
    labels = {column.name for column in pq.read_schema(path) if pa.types.is_string(column.type)}
    domain, _ = split_partition(place.partition)
    by_domain = decided.decisions.settings.get("thresholds")
    thresholds = by_domain.get(domain) if isinstance(by_domain, dict) else None
    taken = isinstance(thresholds, dict)
    return tuple(
        Measured(rule, score, None, None, "label")
        if rule in labels
        else _beside(rule, score, thresholds.get(rule) if taken else None, taken=taken)
        for row in found
        for rule, score in row.items()
        if rule not in SCORE_KEYS
    )


def _beside(rule: str, score: Json, bound: Json, *, taken: bool) -> Measured:
    value = None if score is None or (isinstance(score, float) and math.isnan(score)) else score
    if not isinstance(bound, dict):
        return Measured(rule, value, None, None, "off" if taken else "not decided")
    keep, threshold = str(bound["keep"]), float(bound["value"])
    if value is None:
        return Measured(rule, None, keep, threshold, "does not apply")
    passes = value >= threshold if keep == "at_least" else value <= threshold  # type: ignore[operator]
    return Measured(rule, value, keep, threshold, "passes" if passes else "fails")  # type: ignore[arg-type]


def _duplicates(place: Place, clusters: Manifest | None, decided: Decided | None) -> dict[str, Json]:
    """Return the document's cluster: its name, its split, how near the founder is, and which document of it stays."""
    name = f"splits/{partition_file(place.partition)}"
    if clusters is None or name not in {entry.path for entry in clusters.files}:
        return {}
    rows = _rows(clusters.file(name), "id", place.name)
    if not rows:
        return {}
    (row,) = rows
    found: dict[str, Json] = {key: row[key] for key in ("cluster", "split", "similarity")}
    if decided is None:
        return found
    query = """SELECT count(*) AS documents, list(id ORDER BY id) FILTER (kept) AS stays
        FROM read_parquet($path) WHERE cluster = $cluster"""
    (counted,) = _query(query, path=str(decided.decisions.file("decisions.parquet")), cluster=row["cluster"])
    stays = counted["stays"] if isinstance(counted["stays"], list) else []
    return found | {"documents_in_cluster": counted["documents"], "kept_of_cluster": ", ".join(map(str, stays[:MAX_NAMED])) or "none"}


def _selected(place: Place, selection: Manifest | None, last: Finding, *, going: bool) -> Finding:
    asset = "selected_subset"
    if not going:
        return Finding(asset, "not reached")
    if last.facts.get("split") == "held_out":
        return Finding(asset, "held out", "kept for evaluation: nothing held out is selected or trained on")
    if selection is None:
        return Finding(asset, "not decided", "not materialized")
    files = [str(selection.directory / entry.path) for entry in selection.files if entry.path.endswith(".parquet")]
    rows = _query("SELECT * FROM read_parquet($files) WHERE id = $name ORDER BY passage", files=files, name=place.name)
    if not rows:
        return Finding(asset, "not taken", "its domain has no role in the selection")
    chosen = [row for row in rows if row["selected"]]
    keys = ("passage", "rank", "selected", "gain", "tokens", "representative_id", "representative_passage", "similarity")
    passages: list[Json] = [{key: row[key] for key in keys} for row in rows[:MAX_PASSAGES]]
    facts: dict[str, Json] = {"role": rows[0]["role"], "passages": len(rows), "selected_passages": len(chosen), "listed": passages}
    return Finding(asset, "selected" if chosen else "not selected", f"{len(chosen)} of {len(rows)} passages", facts)


def _rows(path: Path, column: str, name: str, columns: Iterable[str] = (), *, place: Place | None = None) -> list[dict[str, Json]]:
    """Return the rows of `path` whose `column` is `name`; with `place`, those of its domain and snapshot alone."""
    chosen = ", ".join(f'"{key}"' for key in columns) or "*"
    query, values = f'SELECT {chosen} FROM read_parquet($path) WHERE "{column}" = $name', {"path": str(path), "name": name}
    if place and {"domain", "snapshot"} <= set(pq.read_schema(path).names):
        domain, snapshot = split_partition(place.partition)
        query, values = f"{query} AND domain = $domain AND snapshot = $snapshot", values | {"domain": domain, "snapshot": snapshot}
    return _query(query, **values)


def _query(query: str, **values: object) -> list[dict[str, Json]]:
    with duckdb.connect() as connection:
        return connection.sql(query, params=values).to_arrow_table().to_pylist()


def written(value: Json) -> str:
    """Return a score or threshold as it is shown: whole numbers whole, others to four significant digits."""
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() and abs(value) < 1e15 else f"{value:.4g}"
    return "" if value is None else str(value)
