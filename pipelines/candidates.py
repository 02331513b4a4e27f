"""Candidates: the passages that a selection chooses from, and what is known of each; and the passages it is to be near to.

A candidate is a passage of a document that the recipe keeps for training, in one of the role's domains. Its vector comes from
document_embeddings, its tokens from tokenized_shards, its score from quality_scores or toxicity_scores.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.documents import split_partition, stable_fraction
from pipelines.errors import EmptyInput, GristmillError, MissingArtifact, UnknownName
from pipelines.manifests import Manifest
from pipelines.set_functions import Points

Unit = Literal["tokens", "documents", "bytes"]
"""What a budget counts."""

ROWS_AT_ONCE = 65_536
KEPT = "kept AND split = 'train'"
"""Of which documents passages are candidates."""
JOINED = f"""
    WITH train AS (
        SELECT id FROM read_parquet($decisions) WHERE {KEPT} AND domain = $domain AND CAST(snapshot AS VARCHAR) = $snapshot
    ),
    embedded AS (SELECT * FROM read_parquet($passages, file_row_number = true) SEMI JOIN train USING (id)),
    tokenized AS (SELECT id, passage, length FROM read_parquet($shard) SEMI JOIN train USING (id))
    SELECT e.file_row_number AS row, id, passage, t.length AS tokens, e.bytes AS bytes
    FROM embedded e FULL JOIN tokenized t USING (id, passage) ORDER BY row
"""
PARTITIONS = f"""
    SELECT DISTINCT domain, CAST(snapshot AS VARCHAR) AS snapshot FROM read_parquet($decisions)
    WHERE {KEPT} AND domain IN (SELECT unnest($domains)) ORDER BY snapshot, domain
"""


@dataclass(frozen=True)
class Candidates:
    """The passages of one role, ordered by snapshot, domain and place in the corpus: a later snapshot only adds rows behind."""

    table: pa.Table
    """Columns id, passage, domain, snapshot, tokens, bytes."""
    embeddings: np.ndarray
    """int16, shape ``(n, d)``."""
    scores: np.ndarray | None
    """float64, shape ``(n,)``: of the recipe's rule, NaN where a document has none; None where the recipe names no rule."""
    partitions: tuple[tuple[str, str, int], ...]
    """Domain, snapshot and number of rows of each source partition, in the order of the rows."""

    def __len__(self) -> int:
        return len(self.embeddings)

    @cached_property
    def tokens(self) -> np.ndarray:
        """int64, shape ``(n,)``."""
        return self.table["tokens"].to_numpy()

    @property
    def costs(self) -> np.ndarray:
        """int64, shape ``(n,)``: tokens, but at least 1."""
        return np.maximum(self.tokens, 1)

    @cached_property
    def documents(self) -> np.ndarray:
        """int32, shape ``(n,)``: a number for the document of each passage."""
        return pc.dictionary_encode(self.table["id"].combine_chunks()).indices.to_numpy()

    @cached_property
    def domains(self) -> tuple[str, ...]:
        """The domains, sorted."""
        return tuple(sorted({domain for domain, _, _ in self.partitions}))

    @cached_property
    def groups(self) -> np.ndarray:
        """int64, shape ``(n,)``: the place of each passage's domain in `domains`."""
        numbers = [self.domains.index(domain) for domain, _, _ in self.partitions]
        return np.repeat(np.array(numbers, dtype=np.int64), [rows for _, _, rows in self.partitions])

    def snapshots(self) -> Iterator[tuple[str, slice]]:
        """Yield each snapshot, in time order, with the rows that belong to it."""
        start = 0
        for snapshot in sorted({snapshot for _, snapshot, _ in self.partitions}):
            rows = sum(rows for _, given, rows in self.partitions if given == snapshot)
            yield snapshot, slice(start, start + rows)
            start += rows

    def points(self, rows: slice, *, queries: np.ndarray | None, earlier: np.ndarray | None) -> Points:
        """Return candidates `rows` as a set function reads them: vectors and scores share memory with this."""
        return Points(
            embeddings=self.embeddings[rows],
            costs=self.costs[rows],
            scores=self.scores[rows] if self.scores is not None else None,
            groups=self.groups[rows],
            queries=queries,
            earlier=earlier,
        )

    def amounts(self, picks: np.ndarray, unit: Unit) -> np.ndarray:
        """Return what each pick adds to what was picked before it (int64): its tokens, its bytes, or 1 for a new document."""
        if unit != "documents":
            return self.table[unit].to_numpy()[picks]
        new = np.zeros(len(picks), dtype=np.int64)
        new[np.unique(self.documents[picks], return_index=True)[1]] = 1
        return new


@dataclass(frozen=True)
class Sources:
    """The artifacts that candidates are read from; those of source partitions by partition."""

    decisions: Manifest
    """deduplicated_corpus."""
    embeddings: Mapping[str, Manifest]
    """document_embeddings."""
    shards: Mapping[str, Manifest]
    """tokenized_shards, cut into the same passages."""
    scores: Mapping[str, Manifest]
    """quality_scores or toxicity_scores; read only where `score` names a rule."""
    score: str | None
    """``<filter>.<rule>``."""

    def candidates(self, role: str, domains: Sequence[str]) -> Candidates:
        """Read the passages of `domains`, which have `role`.

        Raises:
            EmptyInput: there is none.
            MissingArtifact: a partition with candidates has no embeddings, shards or scores.
            UnknownName: `score` was not scored.
            GristmillError: embeddings and shards are cut into different passages, or embeddings are of different embedders.
        """
        tables, rows, scores = {}, {}, []
        for partition in self._partitions(domains):
            table = self._passages(partition)
            if not table.num_rows:
                continue
            rows[partition] = table["row"].to_numpy()
            tables[partition] = _located(table, partition)
            if self.score:
                scores.append(self._scores_of(table["id"], partition))
        if not tables:
            raise EmptyInput(
                f"role {role!r}: no kept training passage in {', '.join(domains)}; loosen the filters of these domains, "
                "materialize snapshots that hold them, or give the role to other domains"
            )
        counted = tuple((*split_partition(partition), table.num_rows) for partition, table in tables.items())
        return Candidates(
            table=pa.concat_tables(tables.values()),
            embeddings=self._vectors(rows),
            scores=np.concatenate(scores) if self.score else None,
            partitions=counted,
        )

    def queries(self, role: str, domains: Sequence[str], max_queries: int) -> np.ndarray:
        """Return the vectors (int16, shape ``(m, d)``) of at most `max_queries` kept training passages of `domains`, by a stable hash.

        Raises:
            EmptyInput: there is none. Else as `candidates`.
        """
        found = {partition: self._passages(partition) for partition in self._partitions(domains)}
        tables = {partition: table for partition, table in found.items() if table.num_rows}
        if not tables:
            raise EmptyInput(
                f"selection.towards.{role}: no kept training passage in {', '.join(domains)}; name domains of the recipe that hold some"
            )
        fractions = np.concatenate([_fractions(table) for table in tables.values()])
        chosen = np.zeros(len(fractions), dtype=bool)
        chosen[np.argsort(fractions, kind="stable")[:max_queries]] = True
        rows, start = {}, 0
        for partition, table in tables.items():
            rows[partition] = table["row"].to_numpy()[chosen[start : start + table.num_rows]]
            start += table.num_rows
        return self._vectors(rows)

    def _partitions(self, domains: Sequence[str]) -> list[str]:
        """Return the source partitions that hold kept training documents of `domains`, snapshots in time order, then domains."""
        found = query(PARTITIONS, decisions=str(self.decisions.file("decisions.parquet")), domains=list(domains)).fetchall()
        return [f"{domain}|{snapshot}" for domain, snapshot in found]

    def _of(self, partition: str, asset: str, manifests: Mapping[str, Manifest]) -> Manifest:
        if partition not in manifests:
            raise MissingArtifact(
                f"{self.decisions.label} keeps documents of {partition}, but {asset} lacks it; materialize {asset}[{partition}]"
            )
        return manifests[partition]

    def _passages(self, partition: str) -> pa.Table:
        """Return columns row (in the embeddings), id, passage, tokens, bytes of one partition's candidates."""
        domain, snapshot = split_partition(partition)
        embedded = self._of(partition, "document_embeddings", self.embeddings)
        shard = self._of(partition, "tokenized_shards", self.shards)
        table = query(
            JOINED,
            decisions=str(self.decisions.file("decisions.parquet")),
            domain=domain,
            snapshot=snapshot,
            passages=str(embedded.file("passages.parquet")),
            shard=str(shard.file("passages.parquet")),
        ).to_arrow_table()
        if unmatched := max(table["row"].null_count, table["tokens"].null_count):
            raise GristmillError(
                f"{embedded.label} and {shard.label} differ in {unmatched} passages; "
                "set the same max_characters for both and materialize them again"
            )
        return table

    def _scores_of(self, ids: pa.ChunkedArray, partition: str) -> np.ndarray:
        """Return the score of the document of each passage, NaN where it has none."""
        scored = self._of(partition, _asset(self.scores), self.scores)
        path = scored.file("scores.parquet")
        known = [field.name for field in pq.read_schema(path) if pa.types.is_floating(field.type)]
        if self.score not in known:
            raise UnknownName(f"rule of {scored.label} in selection.score", str(self.score), known)
        table = pq.read_table(path, columns=["id", self.score])
        place = pc.index_in(ids, value_set=table["id"].combine_chunks())
        return pc.fill_null(table[self.score].combine_chunks().take(place.combine_chunks()), float("nan")).to_numpy(zero_copy_only=False)

    def _vectors(self, rows: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return rows of the partitions' embeddings in one array, without a second copy of any."""
        self._check_embedder(list(rows))
        files = {partition: self.embeddings[partition].file("embeddings.npy") for partition in rows}
        dimensions = np.load(next(iter(files.values())), mmap_mode="r").shape[1]
        vectors = np.empty((sum(map(len, rows.values())), dimensions), dtype=np.int16)
        start = 0
        for partition, chosen in rows.items():
            _copy_rows(files[partition], chosen, vectors[start : start + len(chosen)])
            start += len(chosen)
        return vectors

    def _check_embedder(self, partitions: Sequence[str]) -> None:
        by_embedder: dict[str, str] = {}
        for partition in partitions:
            for reference in self.embeddings[partition].inputs.get("embedder", ()):
                by_embedder.setdefault(reference.fingerprint, partition)
        if len(by_embedder) > 1:
            raise GristmillError(
                f"document_embeddings of {' and '.join(list(by_embedder.values())[:2])} come from different embedders, whose vectors "
                "cannot be compared; materialize document_embeddings of all partitions again"
            )


def query(text: str, **values: object) -> duckdb.DuckDBPyRelation:
    """Return what DuckDB finds for a query with named parameters."""
    return duckdb.connect().sql(text, params=values)


def _copy_rows(path: Path, rows: np.ndarray, into: np.ndarray) -> None:
    """Copy `rows` (rising) of the array at `path`, mapping the file anew for every block: what was read does not stay in memory."""
    for start in range(0, len(rows), ROWS_AT_ONCE):
        block = slice(start, start + ROWS_AT_ONCE)
        np.take(np.load(path, mmap_mode="r"), rows[block], axis=0, out=into[block], mode="clip")  # "raise" would buffer what it writes


def _located(table: pa.Table, partition: str) -> pa.Table:
    domain, snapshot = (pa.repeat(value, table.num_rows) for value in split_partition(partition))
    names = ["id", "passage", "domain", "snapshot", "tokens", "bytes"]
    return pa.table([table["id"], table["passage"], domain, snapshot, table["tokens"].cast(pa.int64()), table["bytes"]], names=names)


def _fractions(table: pa.Table) -> np.ndarray:
    """Return a number in [0, 1) for each passage that depends on its id and number alone."""
    batches = (zip(batch["id"].to_pylist(), batch["passage"].to_pylist(), strict=True) for batch in table.to_batches(max_chunksize=10_000))
    return np.array([stable_fraction("query", name, str(number)) for batch in batches for name, number in batch])


def _asset(manifests: Mapping[str, Manifest]) -> str:
    return next((manifest.asset for manifest in manifests.values()), "quality_scores")
