"""Filtering: score every document once; `decisions` decides over the scores, as often as a recipe asks.

score_documents     one filter over one source partition          -> scores.parquet (id, one column per rule and label)
collect_scores      all filters of one source partition           -> scores.parquet (wide: "<filter>.<rule>", "<filter>.<label>")
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field

from pipelines.documents import ROWS_PER_GROUP, read_batches, repeated_ids, row_count
from pipelines.errors import GristmillError
from pipelines.files import file_hashes
from pipelines.filters import Filter, FittedFilter, Scores
from pipelines.manifests import Check, Json, Manifest, Outcome
from pipelines.plugins import Settings, build
from pipelines.row_groups import RowGroup, map_row_groups

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
    score = partial(_score_group, plugin=plugin, state=model.directory if model else None)
    documents = 0
    with pq.ParquetWriter(out / "scores.parquet", _schema(plugin), compression="zstd") as writer:
        for table in map_row_groups(score, cleaned.file("documents.parquet")):
            writer.write_table(table, row_group_size=max(1, table.num_rows))
            documents += table.num_rows
    return Outcome(counts={"documents": documents})


def _score_group(group: RowGroup, *, plugin: Filter, state: Path | None) -> pa.Table:
    """Return the scores of one row group."""
    score = partial(plugin.score, state=state) if state else plugin.score
    batches = []
    for batch in group.batches(("id", *plugin.columns)):
        values = [batch[column].to_pylist() for column in plugin.columns]
        batches.append(pa.record_batch([batch["id"], *_checked(plugin, score(*values), batch.num_rows)], schema=_schema(plugin)))
    return pa.Table.from_batches(batches, _schema(plugin))


def located(settings: ScoreSettings, root: Path) -> ScoreSettings:
    """Return `settings` with `root`, and with the hashes of the files that the filter scores with.

    A fitted filter scores with its state alone, and has none.

    Raises:
        GristmillError: a file that the filter names does not exist.
    """
    plugin = cast(Filter, build("filters", settings.filter, settings.settings)).at(root)
    files = {} if isinstance(plugin, FittedFilter) else file_hashes(plugin.files(), root)
    return settings.model_copy(update={"files": files, "root": root})


def _schema(plugin: Filter) -> pa.Schema:
    return pa.schema([("id", pa.string()), *_columns(plugin)])


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
    readers = [_Reader(family.file("scores.parquet")) for family in families]
    columns = [pa.field(f"{name}.{f.name}", f.type) for name, reader in zip(names, readers, strict=True) for f in reader.fields]
    keys = [("id", pa.string()), ("domain", pa.string()), ("snapshot", pa.string()), ("characters", pa.int64())]
    schema, documents = pa.schema([*keys, *columns]), 0
    with pq.ParquetWriter(out / "scores.parquet", schema, compression="zstd") as writer:
        for batch in read_batches(cleaned.file("documents.parquet"), ("id", "text"), rows=ROWS_PER_GROUP):
            fixed = [pa.repeat(value, batch.num_rows) for value in (settings.domain, settings.snapshot)]
            characters = pc.cast(pc.utf8_length(batch["text"]), pa.int64())
            scores = [column for reader in readers for column in reader.take(batch["id"])]
            writer.write_batch(pa.record_batch([batch["id"], *fixed, characters, *scores], schema=schema))
            documents += batch.num_rows
    return Outcome(counts={"documents": documents})


class _Reader:
    """The scores of one filter, read in the order of the documents a few rows at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._batches = read_batches(path, rows=ROWS_PER_GROUP)
        self._rest = pq.read_schema(path).empty_table()

    @property
    def fields(self) -> list[pa.Field]:
        """The columns that are scores and labels."""
        return [field for field in self._rest.schema if field.name != "id"]

    def take(self, ids: pa.Array) -> list[pa.Array]:
        """Return the columns of the next rows, which are of the documents `ids`.

        Raises:
            GristmillError: they are of others.
        """
        while self._rest.num_rows < len(ids) and (batch := next(self._batches, None)) is not None:
            self._rest = pa.concat_tables([self._rest, pa.Table.from_batches([batch])])
        table, self._rest = self._rest.slice(0, len(ids)).combine_chunks(), self._rest.slice(len(ids))
        if table["id"].to_pylist() != ids.to_pylist():
            raise GristmillError(f"{self._path} holds scores of other documents; materialize the scores of its filter again")
        return [array for field in self.fields for array in table[field.name].chunks or [pa.array([], field.type)]]


def documents_scored(draft: Manifest) -> Check:
    """There is one row for each document, and no score is missing or infinite (NaN means: the rule does not apply)."""
    rows = missing = infinite = 0
    for batch in read_batches(draft.directory / "scores.parquet", rows=ROWS_PER_GROUP):
        rows += batch.num_rows
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            if name in KEYS or not pa.types.is_string(column.type):
                missing += column.null_count
            if name not in KEYS and pa.types.is_floating(column.type):
                infinite += int(np.isinf(column.to_numpy(zero_copy_only=False)).sum())
    documents = draft.counts["documents"]
    return Check(
        name="documents_scored",
        passed=rows == documents and not missing and not infinite,
        description=f"{documents} documents, {rows} rows, {missing} scores missing, {infinite} infinite",
        metadata={"documents": documents, "rows": rows, "missing": missing, "infinite": infinite},
    )


def ids_unique(draft: Manifest) -> Check:
    """Every row has an id of its own."""
    path = draft.directory / "scores.parquet"
    repeated, null = repeated_ids(path)
    return Check(
        name="ids_unique",
        passed=not repeated and not null,
        description=f"{repeated} repeated, {null} null",
        metadata={"documents": row_count(path), "repeated": repeated, "null": null},
    )


SCORE_AUDITS = (documents_scored, ids_unique)
COLLECT_AUDITS = (documents_scored, ids_unique)
