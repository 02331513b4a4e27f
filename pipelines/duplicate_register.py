"""The register of documents: in a stated order, each compared with earlier ones only, each given the cluster of its founder.

What the register says about a document depends on the documents before it alone, so appending documents changes nothing
that was said. A document joins the cluster of the earlier document it is most like; it never merges two clusters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.documents import split_partition, stable_fraction
from pipelines.errors import EmptyInput, GristmillError
from pipelines.minhash import agreement, buckets

TRAIN, HELD_OUT = "train", "held_out"

SPLIT_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("cluster", pa.string()),
        ("founder", pa.bool_()),
        ("exact", pa.bool_()),
        ("similarity", pa.float32()),
        ("split", pa.string()),
        ("joins", pa.int32()),
        ("straddles", pa.bool_()),
    ]
)
"""`joins`: older clusters the document matched. `straddles`: they were of both splits. The threshold stands in the metadata."""


@dataclass(frozen=True)
class Register:
    """Every document of all partitions in the order of reading, n in all; within a partition by id."""

    ids: list[str]
    partitions: tuple[str, ...]
    bounds: np.ndarray
    """int64 ``(partitions + 1,)``: partition p is rows ``bounds[p]:bounds[p + 1]``."""
    exact: np.ndarray
    """S16 ``(n,)``: exact hashes."""
    signatures: np.ndarray
    """uint32 ``(n, P)``."""
    shingles: np.ndarray
    characters: np.ndarray

    def rows(self) -> Iterator[tuple[str, slice]]:
        """Yield every partition with its rows."""
        for number, partition in enumerate(self.partitions):
            yield partition, slice(int(self.bounds[number]), int(self.bounds[number + 1]))


@dataclass(frozen=True)
class Clusters:
    """What the register says about every document; arrays of shape ``(n,)``."""

    founder: np.ndarray
    """Row of the cluster's first document."""
    original: np.ndarray
    """Row of the first document with the same exact hash; its own row for most."""
    joins: np.ndarray
    """int32: older clusters the document matched."""
    straddles: np.ndarray
    """bool: they were of both splits, or those of its exact original were."""


def read_register(files: dict[str, Path]) -> Register:
    """Read the signature files of `files`, partition to path, in that order.

    Raises:
        EmptyInput: no partition holds a document.
        GristmillError: signatures of different lengths.
    """
    tables = [pq.read_table(path) for path in files.values()]
    bounds = np.cumsum([0, *(table.num_rows for table in tables)], dtype=np.int64)
    if not bounds[-1]:
        raise EmptyInput("no document to cluster: every partition is empty; ingest a source that holds documents")
    widths = sorted({table.schema.field("signature").type.byte_width // 4 for table in tables})
    if len(widths) > 1:
        raise GristmillError(f"signatures of {widths} positions cannot be compared; sign all partitions with the same num_permutations")
    tables = [table.take(pc.sort_indices(table["id"])) for table in tables]
    return Register(
        ids=[name for table in tables for name in table["id"].to_pylist()],
        partitions=tuple(files),
        bounds=bounds,
        exact=np.concatenate([_fixed_bytes(table["exact_hash"], "S16").ravel() for table in tables]),
        signatures=np.concatenate([_fixed_bytes(table["signature"], "<u4") for table in tables]),
        shingles=np.concatenate([table["shingles"].to_numpy() for table in tables]),
        characters=np.concatenate([table["characters"].to_numpy() for table in tables]).astype(np.int64),
    )


def held_out_as_founder(register: Register, shares: Mapping[str, float], epoch: int) -> np.ndarray:
    """Return for every document whether the cluster it founds is held out: a hash of its id against its domain's share; bool ``(n,)``."""
    held = np.zeros(len(register.ids), dtype=bool)
    for partition, rows in register.rows():
        share = shares.get(split_partition(partition)[0], 0.0)
        if share:
            held[rows] = [stable_fraction("split", str(epoch), name) < share for name in register.ids[rows]]
    return held


class Representatives:
    """Earlier texts that later ones of the same bucket are compared with.

    A bucket keeps at most `MAX_PER_CLUSTER` texts of one cluster and of at most `MAX_CLUSTERS` clusters, the earliest
    ones, so that a template shared by a million pages costs a constant number of comparisons a page, not a million.
    """

    MAX_PER_CLUSTER = 4
    MAX_CLUSTERS = 64

    def __init__(self) -> None:
        self._clusters: dict[int, dict[int, list[int]]] = {}

    def of(self, numbers: Sequence[int]) -> list[int]:
        """Return the representatives of buckets `numbers`, earliest first."""
        clusters = (self._clusters.get(number, {}) for number in numbers)
        return sorted({text for bucket in clusters for texts in bucket.values() for text in texts})

    def add(self, numbers: Sequence[int], cluster: int, text: int) -> None:
        """Make `text` of `cluster` a representative of those of buckets `numbers` that have room."""
        for number in numbers:
            bucket = self._clusters.setdefault(number, {})
            if cluster not in bucket and len(bucket) >= self.MAX_CLUSTERS:
                continue
            texts = bucket.setdefault(cluster, [])
            if len(texts) < self.MAX_PER_CLUSTER:
                texts.append(text)


def find_clusters(register: Register, held: np.ndarray, *, bands: int, rows: int, threshold: float) -> Clusters:
    """Give every document a cluster; `held` (bool, ``(n,)``) says whether the cluster that a document founds is held out.

    A document joins the cluster of the first document with its exact hash, else that of the representative its signature
    agrees with most, if on `threshold` at least, ties to the earliest; else it founds one.
    """
    total = len(register.ids)
    _, first, inverse = np.unique(register.exact, return_index=True, return_inverse=True)
    original = first[inverse]
    numbers = buckets(register.signatures, bands=bands, rows=rows, usable=register.shingles > 0)
    founder, joins, straddles = np.arange(total), np.zeros(total, dtype=np.int32), np.zeros(total, dtype=bool)
    representatives = Representatives()
    for row in np.flatnonzero((numbers >= 0).any(axis=1) | (original < founder)).tolist():
        shared = numbers[row][numbers[row] >= 0].tolist()
        near = np.array(representatives.of(shared), dtype=np.int64)
        similarity = agreement(register.signatures[near], register.signatures[row])
        near, similarity = near[similarity >= threshold], similarity[similarity >= threshold]
        matched = set(founder[near].tolist())
        if original[row] < row:
            founder[row] = founder[original[row]]
            matched.add(int(founder[row]))
        elif len(near):
            founder[row] = founder[near[similarity.argmax()]]
        joins[row] = len(matched)
        straddles[row] = straddles[original[row]] or len({bool(held[cluster]) for cluster in matched}) > 1
        if original[row] == row:
            representatives.add(shared, int(founder[row]), row)
    return Clusters(founder=founder, original=original, joins=joins, straddles=straddles)


def split_tables(register: Register, clusters: Clusters, held: np.ndarray, *, threshold: float) -> Iterator[tuple[str, pa.Table]]:
    """Yield every partition with its table of `SPLIT_SCHEMA`, rows by id; `held` as in `find_clusters`."""
    names = _cluster_names(register, clusters)
    schema = SPLIT_SCHEMA.with_metadata({"threshold": repr(threshold)})
    for partition, rows in register.rows():
        founder, own = clusters.founder[rows], np.arange(rows.start, rows.stop)
        joined = np.flatnonzero(founder != own)
        similarity = np.ones(len(own), dtype=np.float32)
        similarity[joined] = agreement(register.signatures[own[joined]], register.signatures[founder[joined]])
        columns = {
            "id": register.ids[rows],
            "cluster": [names[row] for row in founder.tolist()],
            "founder": founder == own,
            "exact": clusters.original[rows] < own,
            "similarity": similarity,
            "split": np.where(held[founder], HELD_OUT, TRAIN).tolist(),
            "joins": clusters.joins[rows],
            "straddles": clusters.straddles[rows],
        }
        yield partition, pa.table(columns, schema=schema)


def _cluster_names(register: Register, clusters: Clusters) -> dict[int, str]:
    """Return the name of every founder's cluster: its id, with the partition added where an earlier founder has that id."""
    names: dict[int, str] = {}
    taken: set[str] = set()
    for partition, rows in register.rows():
        for row in (np.flatnonzero(clusters.founder[rows] == np.arange(rows.start, rows.stop)) + rows.start).tolist():
            name = register.ids[row]
            names[row] = f"{name}@{partition}" if name in taken else name
            taken.add(names[row])
    return names


def _fixed_bytes(column: pa.ChunkedArray, dtype: str) -> np.ndarray:
    """Return a fixed-size binary column as an array ``(rows, items per row)`` of `dtype`."""
    width, item = column.type.byte_width, np.dtype(dtype)
    filled = [chunk for chunk in column.chunks if len(chunk)]
    chunks = [np.frombuffer(chunk.buffers()[1], np.uint8, len(chunk) * width, chunk.offset * width) for chunk in filled]
    joined = np.concatenate(chunks) if chunks else np.empty(0, np.uint8)
    return joined.view(item).reshape(-1, width // item.itemsize)
