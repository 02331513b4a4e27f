"""What a document is: its schema, its id, its passages, and how tables of documents are written and read.

A document is a row ``id, text, domain, source, license, date, url, lang, title, metadata``. A passage is a
stretch of a document's characters; selection ranks passages and training reads them, so both cut with `passages`.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

DOCUMENT_SCHEMA = pa.schema(
    [pa.field(name, pa.string()) for name in ("id", "text", "domain", "source", "license", "date", "url", "lang", "title", "metadata")]
)
"""`metadata` is a JSON object as text; `date` is ISO 8601; `lang` is a BCP 47 tag or null."""

QUARANTINE_SCHEMA = pa.schema([pa.field(name, pa.string()) for name in ("locator", "reason", "excerpt")])
"""`locator` says where the input stood (file and line or row), `excerpt` its first characters, escaped."""

REASON = pa.struct([("rule", pa.string()), ("score", pa.float64()), ("threshold", pa.float64())])
DECISION_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("domain", pa.string()),
        ("snapshot", pa.string()),
        ("lang", pa.string()),
        ("kept", pa.bool_()),
        ("rule", pa.string()),
        ("score", pa.float64()),
        ("threshold", pa.float64()),
        ("reasons", pa.list_(REASON)),
    ]
)
"""A decision per document that came in: `lang` is the language that a filter identified, null where none did; `rule`, `score`
and `threshold` are of the first rule that failed, null for a kept document; `reasons` has all that failed."""

ALL_DOMAINS = "(all)"
"""Stands for every domain together in tables by domain."""

ROWS_PER_GROUP = 2_000
ROWS_PER_BATCH = 500
BYTES_PER_BATCH = 8 * 1024 * 1024
"""Of strings, read at a time: what a step makes of them may take ten times as much."""
BYTES_PER_GROUP = 32 * 1024 * 1024
"""A row group is closed when its strings reach this size, so that long documents are written in bounded memory too."""


@dataclass(frozen=True)
class Document:
    """One document as a source yields it; `id` is made from `locator` where the source has none."""

    text: str
    locator: str
    """Where the document stands in its source: stable from run to run, unique within the source."""
    id: str | None = None
    source: str | None = None
    license: str | None = None
    date: str | None = None
    url: str | None = None
    lang: str | None = None
    title: str | None = None
    metadata: str | None = None


@dataclass(frozen=True)
class Quarantined:
    """Input that could not be read as a document: kept aside with its reason, never lost."""

    locator: str
    reason: str
    excerpt: str = ""


def document_id(domain: str, *parts: str) -> str:
    """Return ``<domain>-<16 hex digits>``, a stable hash (BLAKE2b) of `parts`."""
    digest = hashlib.blake2b("\x00".join(parts).encode("utf-8", "surrogatepass"), digest_size=8)
    return f"{domain}-{digest.hexdigest()}"


def stable_fraction(*parts: str) -> float:
    """Return a number in [0, 1) that depends on `parts` alone (BLAKE2b, 64 bits)."""
    digest = hashlib.blake2b("\x00".join(parts).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def passages(text: str, max_characters: int) -> list[tuple[int, int]]:
    """Cut `text` into passages of at most `max_characters`; return ``(start, end)`` character offsets.

    A cut falls after the last blank line in the second half of the window, else after the last line break
    there, else after the last space, else at the limit. The passages cover the text without overlap.
    """
    cuts: list[tuple[int, int]] = []
    start = 0
    while len(text) - start > max_characters:
        end = start + max_characters
        floor = start + max_characters // 2
        cut = next((p + len(mark) for mark in ("\n\n", "\n", " ") if (p := text.rfind(mark, floor, end)) >= 0), end)
        cuts.append((start, cut))
        start = cut
    if start < len(text):
        cuts.append((start, len(text)))
    return cuts


class TableWriter:
    """Write rows to one Parquet file in bounded memory; the file exists, with its schema, even without rows.

    Rows are written in the order given. Compression zstd; a row group per `rows_per_group` rows or `BYTES_PER_GROUP`
    characters of strings, whichever comes first.
    """

    def __init__(self, path: Path, schema: pa.Schema, *, rows_per_group: int = ROWS_PER_GROUP) -> None:
        self._writer = table_writer(path, schema)
        self._schema = schema
        self._rows: list[Mapping[str, object]] = []
        self._rows_per_group = rows_per_group
        self._buffered = 0
        self.rows = 0

    def write(self, row: Mapping[str, object]) -> None:
        """Add one row."""
        self._rows.append(row)
        self.rows += 1
        self._buffered += sum(len(value) for value in row.values() if isinstance(value, str | bytes))
        if len(self._rows) >= self._rows_per_group or self._buffered >= BYTES_PER_GROUP:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_table(pa.Table.from_pylist(self._rows, schema=self._schema))
            self._rows = []
            self._buffered = 0

    def __enter__(self) -> TableWriter:
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is None:
            self._flush()
        self._writer.close()


def table_writer(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    """Open a Parquet file for tables that may hold long texts.

    Their column has no dictionary, which values that are all different do not need, and no statistics: the smallest and the
    largest text are copied for them, six times the size of a long one in all, and never read.
    """
    others = [name for name in schema.names if name != "text"]
    return pq.ParquetWriter(path, schema, compression="zstd", use_dictionary=others, write_statistics=others)


def write_table(path: Path, table: pa.Table) -> None:
    """Write `table` as this project writes Parquet (zstd, row groups of `ROWS_PER_GROUP`)."""
    pq.write_table(table, path, compression="zstd", row_group_size=ROWS_PER_GROUP)


def read_batches(path: Path, columns: Iterable[str] | None = None, *, rows: int = ROWS_PER_BATCH) -> Iterator[pa.RecordBatch]:
    """Yield the record batches of Parquet file `path` in file order: at most `rows` rows and, but for one row, `BYTES_PER_BATCH` each."""
    with pq.ParquetFile(path) as file:
        yield from batches_of(file, columns, rows=rows)


def batches_of(
    file: pq.ParquetFile, columns: Iterable[str] | None = None, *, groups: Sequence[int] | None = None, rows: int = ROWS_PER_BATCH
) -> Iterator[pa.RecordBatch]:
    """Yield the record batches of an open file, of all row groups or of `groups`, bounded as `read_batches` does."""
    chosen = list(columns) if columns else None
    for group in range(file.num_row_groups) if groups is None else groups:
        num_rows = min(rows, _rows_at_a_time(file.metadata.row_group(group), chosen))
        for batch in file.iter_batches(batch_size=num_rows, row_groups=[group], columns=chosen):
            yield from bounded(batch)


def _rows_at_a_time(group: pq.RowGroupMetaData, columns: Sequence[str] | None) -> int:
    """Return how many rows of `group` are about `BYTES_PER_BATCH` of `columns`: all of it need not fit in memory."""
    chunks = (group.column(number) for number in range(group.num_columns))
    size = sum(chunk.total_uncompressed_size for chunk in chunks if columns is None or chunk.path_in_schema.split(".")[0] in columns)
    return max(1, BYTES_PER_BATCH * group.num_rows // max(1, size))


def bounded(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """Yield `batch` in slices of at most `BYTES_PER_BATCH` of strings each, but for one row that is longer."""
    lengths = np.zeros(batch.num_rows, dtype=np.int64)
    for column in batch.columns:
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type) or pa.types.is_binary(column.type):
            lengths += pc.fill_null(pc.binary_length(column), 0).to_numpy(zero_copy_only=False)
    ends = np.cumsum(lengths)
    start = 0
    while start < batch.num_rows:
        before = int(ends[start - 1]) if start else 0
        end = max(start + 1, int(np.searchsorted(ends, before + BYTES_PER_BATCH, side="right")))
        yield batch.slice(start, end - start)
        start = end


def row_count(path: Path) -> int:
    """Return the number of rows of Parquet file `path` from its footer."""
    return pq.read_metadata(path).num_rows


def repeated_ids(path: Path) -> tuple[int, int]:
    """Return how many rows of Parquet file `path` repeat the id of another, and how many have none; holds 8 bytes a row."""
    hashes, null = array("q"), 0
    for batch in read_batches(path, ["id"], rows=ROWS_PER_GROUP):
        null += batch.column(0).null_count
        hashes.extend(map(hash, batch.column(0).drop_null().to_pylist()))
    found = np.sort(np.frombuffer(hashes, dtype=np.int64)) if hashes else np.empty(0, np.int64)
    shared = set(found[1:][found[1:] == found[:-1]].tolist())
    if not shared:
        return 0, null
    ids: Counter[str] = Counter()  # equal hashes are most often, not always, equal ids
    for batch in read_batches(path, ["id"], rows=ROWS_PER_GROUP):
        ids.update(name for name in batch.column(0).drop_null().to_pylist() if hash(name) in shared)
    return ids.total() - len(ids), null


def split_partition(partition: str) -> tuple[str, str]:
    """Return ``(domain, snapshot)`` of a source partition key such as ``wiki|2026-01-01``."""
    domain, _, snapshot = partition.partition("|")
    return domain, snapshot


def partition_file(partition: str) -> str:
    """Return the file name that stands for source partition `partition`: ``wiki@2026-01-01.parquet``."""
    return partition.replace("|", "@") + ".parquet"
