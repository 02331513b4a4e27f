"""Filtering: score every document once; `decisions` decides over the scores, as often as a recipe asks.

    score_documents     one filter over one source partition          -> scores.parquet (id, one column per rule and label)
    collect_scores      all filters of one source partition           -> scores.parquet (wide: "<filter>.<rule>", "<filter>.<label>")
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import cast

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from pipelines.documents import read_batches, row_count, write_table
from pipelines.errors import GristmillError
from pipelines.files import file_hashes
from pipelines.filters import Filter, FittedFilter, Scores
from pipelines.manifests import Check, Json, Manifest, Outcome
from pipelines.plugins import Settings, build

KEYS = ("id", "domain", "snapshot", "characters")
"""The columns of collected scores that are no scores; neither are columns of strings, which are a filter's labels."""


class ScoreSettings(Settings):
    """One filter and its settings."""

    filter: str
    """A plugin in `filters/`."""
    settings: dict[str, Json] = Field(default_factory=dict)
    """Its settings."""
    files: dict[str, str] = Field(default_factory=dict)
    """File -> SHA-256 of every local file that changes its scores."""
    root: Path = Field(default=Path(), exclude=True)
    """Where relative paths start. Not part of the identity: the same project elsewhere makes the same scores."""


class CollectSettings(Settings):
    """The partition that the scores belong to."""

    domain: str
    snapshot: str


def score_documents(settings: ScoreSettings, out: Path, *, cleaned: Manifest, model: Manifest | None = None) -> Outcome:
    """Write ``scores.parquet``: id, the score of each of the filter's rules and its labels, in the order of the documents.

    Args:
        model: what a fitted filter was fitted to.
    """
    plugin = cast(Filter, build("filters", settings.filter, settings.settings)).at(settings.root)
    if isinstance(plugin, FittedFilter) and model is None:
        raise GristmillError(f"filter {settings.filter!r} is fitted before it scores; materialize filter_models first (job `fit`)")
    if located(settings, settings.root).files != settings.files:
        raise GristmillError(f"filter {settings.filter!r}: its files changed since they were hashed; materialize again")
    score = partial(plugin.score, state=model.directory) if model else plugin.score
    schema = pa.schema([("id", pa.string()), *_columns(plugin)])
    documents = 0
    with pq.ParquetWriter(out / "scores.parquet", schema, compression="zstd") as writer:
        for batch in read_batches(cleaned.file("documents.parquet"), ("id", *plugin.columns)):
            values = [batch[column].to_pylist() for column in plugin.columns]
            writer.write_batch(pa.record_batch([batch["id"], *_checked(plugin, score(*values), batch.num_rows)], schema=schema))
            documents += batch.num_rows
    return Outcome(counts={"documents": documents})


def located(settings: ScoreSettings, root: Path) -> ScoreSettings:
    """Return `settings` with `root`, and with the hashes of the files that the filter scores with.

    A fitted filter scores with its state alone, and has none.

    Raises:
        GristmillError: a file that the filter names does not exist.
    """
    plugin = cast(Filter, build("filters", settings.filter, settings.settings)).at(root)
    files = {} if isinstance(plugin, FittedFilter) else file_hashes(plugin.files(), root)
    return settings.model_copy(update={"files": files, "root": root})


def _columns(plugin: Filter) -> list[tuple[str, pa.DataType]]:
    return [*((rule.name, pa.float64()) for rule in plugin.rules), *((label, pa.string()) for label in plugin.labels)]


def _checked(plugin: Filter, scores: Scores, rows: int) -> list[pa.Array]:
    shapes = {column: np.shape(values) for column, values in scores.items()}
    names = [name for name, _ in _columns(plugin)]
    if shapes != dict.fromkeys(names, (rows,)):
        name = type(plugin).__module__.rpartition(".")[2]
        raise GristmillError(f"filter {name!r} returned scores {shapes}; its rules and labels ask for {names}, each of shape ({rows},)")
    return [
        pa.array(scores[column] if kind == pa.string() else np.asarray(scores[column], kind.to_pandas_dtype()), kind)
        for column, kind in _columns(plugin)
    ]


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
    labels = [field.name for field in table.schema if field.name not in KEYS and pa.types.is_string(field.type)]
    table = table.drop_columns(labels)
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


def _quoted(value: str | Path) -> str:
    return "'" + str(value).replace("'", "''") + "'"


def ids_unique(draft: Manifest) -> Check:
    """Every row has an id of its own."""
    table = pq.read_table(draft.directory / "scores.parquet", columns=["id"])
    repeated = table.num_rows - table.group_by("id").aggregate([]).num_rows
    null = table["id"].null_count
    return Check(
        name="ids_unique",
        passed=not repeated and not null,
        description=f"{repeated} repeated, {null} null",
        metadata={"documents": table.num_rows, "repeated": repeated, "null": null},
    )


SCORE_AUDITS = (documents_scored, ids_unique)
COLLECT_AUDITS = (documents_scored, ids_unique)
