"""The register of documents: in a stated order, each compared with earlier ones only, each given the cluster of its founder.

What the register says about a document depends on the documents before it alone, so appending documents changes nothing
that was said. A document joins the cluster of the earlier document it is most like; it never merges two clusters.

The register is a chain of links, each over the documents of some partitions: a link is made from its own documents and the index of
the links before (`duplicate_index`). Where the chain is cut into links changes no decision.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.documents import split_partition, stable_fraction
from pipelines.duplicate_index import Index, Segment
from pipelines.errors import GristmillError
from pipelines.minhash import agreement, band_keys

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
    """Every document of a link's partitions in the order of reading, n in all; within a partition by id."""

    ids: list[str]
    partitions: tuple[str, ...]
    bounds: np.ndarray
    """int64 ``(partitions + 1,)``: partition p is rows ``bounds[p]:bounds[p + 1]``."""
    exact: np.ndarray
    """uint64 ``(n, 2)``: exact hashes, big-endian."""
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
    """What the register says about every document of a link; arrays of shape ``(n,)``. Documents go by their number in all links."""

    base: int
    """Number of the link's first document."""
    founder: np.ndarray
    """Number of the cluster's first document."""
    original: np.ndarray
    """Number of the first document with the same exact hash; its own for most."""
    similarity: np.ndarray
    """float32: agreement of the document's signature with its founder's."""
    held: np.ndarray
    """bool: the cluster is held out."""
    joins: np.ndarray
    """int32: older clusters the document matched."""
    straddles: np.ndarray
    """bool: they were of both splits, or those of its exact original were."""
    names: list[str]
    """The cluster's name."""

    @property
    def own(self) -> np.ndarray:
        """Every document's own number."""
        return np.arange(self.base, self.base + len(self.founder))


def read_register(files: dict[str, Path]) -> Register:
    """Read the signature files of `files`, partition to path, in that order.

    Raises:
        GristmillError: signatures of different lengths.
    """
    tables = [pq.read_table(path) for path in files.values()]
    bounds = np.cumsum([0, *(table.num_rows for table in tables)], dtype=np.int64)
    widths = sorted({table.schema.field("signature").type.byte_width // 4 for table in tables})
    if len(widths) > 1:
        raise GristmillError(f"signatures of {widths} positions cannot be compared; sign all partitions with the same num_permutations")
    tables = [table.take(pc.sort_indices(table["id"])) for table in tables]
    return Register(
        ids=[name for table in tables for name in table["id"].to_pylist()],
        partitions=tuple(files),
        bounds=bounds,
        exact=np.concatenate([_fixed_bytes(table["exact_hash"], ">u8") for table in tables]).astype(np.uint64),
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


def find_clusters(
    register: Register, held: np.ndarray, index: Index, *, bands: int, rows: int, threshold: float
) -> tuple[Clusters, Segment]:
    """Give every document a cluster; `held` (bool, ``(n,)``) says whether the cluster that a document founds is held out.

    A document joins the cluster of the first document with its exact hash, else that of the earlier document of one of its buckets that
    its signature agrees with most, if on `threshold` at least, ties to the earliest; else it founds one. `index` holds the earlier
    links; the segment returned is what the next ones need of this link.
    """
    from pipelines.register_kernel import place_documents

    base, total = len(index), len(register.ids)
    original = _originals(register.exact, index)
    keys = band_keys(register.signatures, bands=bands, rows=rows)
    usable = register.shingles > 0
    order = np.argsort(keys, axis=None, kind="stable")
    bounds, members, buckets = _buckets(keys, order, usable, index)
    known = np.unique(np.concatenate([members, original[original < base]]))
    new = np.arange(base, base + total)
    numbers = np.concatenate([known, new])
    # A copy is near to what its original is near to, but later: only originals have a signature in the index.
    slots = np.searchsorted(known, members)
    signatures = np.zeros((len(numbers), register.signatures.shape[1]), dtype=np.uint32)
    compared = np.unique(members)
    signatures[np.searchsorted(known, compared)] = index.signatures(compared, signatures.shape[1])
    signatures[len(known) :] = register.signatures
    founder = np.concatenate([index.founder(known), new])
    out = np.concatenate([index.held(known), held])
    straddles = np.concatenate([index.straddles(known), np.zeros(total, dtype=bool)])
    joins = np.zeros(len(numbers), dtype=np.int32)
    places = np.concatenate([np.arange(len(known)), np.searchsorted(numbers, original)])
    kept = place_documents(signatures, buckets, places, bounds, slots, founder, out, straddles, joins, threshold)
    kept &= usable[:, None]
    mine = slice(len(known), None)
    names, segment_names = _cluster_names(register, founder[mine], index)
    clusters = Clusters(
        base=base,
        founder=founder[mine],
        original=original,
        similarity=_similarity(register.signatures, founder[mine], index),
        held=out[mine],
        joins=joins[mine],
        straddles=straddles[mine],
        names=names,
    )
    return clusters, _segment(register, clusters, keys, order[kept.ravel()[order]], segment_names)


def _originals(exact: np.ndarray, index: Index) -> np.ndarray:
    """Return the number of the first document with each exact hash."""
    order = np.lexsort((exact[:, 1], exact[:, 0]))  # stable: the first of equal ones is the earliest
    starts = np.ones(len(exact), dtype=bool)
    starts[1:] = (exact[order[1:]] != exact[order[:-1]]).any(axis=1)
    earlier = index.find_originals(exact[order[starts]])
    original = np.empty(len(exact), dtype=np.int64)
    original[order] = np.where(earlier >= 0, earlier, order[starts] + len(index))[np.cumsum(starts) - 1]
    return original


def _buckets(keys: np.ndarray, order: np.ndarray, usable: np.ndarray, index: Index) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the buckets of the band keys: bounds and earlier members of each, and each document's, -1 where it is alone.

    `order` sorts the keys.
    """
    order = order[usable[order // keys.shape[1]]]
    ordered = keys.ravel()[order]
    starts = np.ones(len(order), dtype=bool)
    starts[1:] = ordered[1:] != ordered[:-1]
    first = np.flatnonzero(starts)
    bounds, members = index.find_members(ordered[first])
    shared = (np.diff(np.append(first, len(order))) > 1) | (np.diff(bounds) > 0)
    numbers = np.where(shared, np.cumsum(shared) - 1, -1)
    buckets = np.full(keys.size, -1, dtype=np.int64)
    buckets[order] = numbers[np.cumsum(starts) - 1]
    return np.append(bounds[:-1][shared], bounds[-1]), members, buckets.reshape(keys.shape)


def _similarity(signatures: np.ndarray, founder: np.ndarray, index: Index) -> np.ndarray:
    """Return the agreement of each document's signature with its founder's, float32."""
    base = len(index)
    similarity = np.ones(len(founder), dtype=np.float32)
    inside = np.flatnonzero((founder >= base) & (founder != np.arange(base, base + len(founder))))
    similarity[inside] = agreement(signatures[inside], signatures[founder[inside] - base])
    before = np.flatnonzero(founder < base)
    wanted, inverse = np.unique(founder[before], return_inverse=True)
    similarity[before] = agreement(signatures[before], index.signatures(wanted, signatures.shape[1])[inverse])
    return similarity


def _cluster_names(register: Register, founder: np.ndarray, index: Index) -> tuple[list[str], list[str]]:
    """Return the name of each document's cluster, and of the cluster it founds, empty where it founds none.

    A cluster has its founder's id, with the partition added where an earlier cluster has that name.
    """
    base = len(index)
    own = np.flatnonzero(founder == np.arange(base, base + len(founder)))
    hashes = _name_hashes([register.ids[row] for row in own.tolist()])
    taken_before, seen = index.names_taken(hashes), set()
    mine = [""] * len(register.ids)
    partitions = np.searchsorted(register.bounds, own, side="right") - 1
    for row, value, taken, partition in zip(own.tolist(), hashes.tolist(), taken_before.tolist(), partitions.tolist(), strict=True):
        name = register.ids[row]
        mine[row] = f"{name}@{register.partitions[partition]}" if taken or value in seen else name
        seen.add(value if mine[row] == name else int(_name_hashes([mine[row]])[0]))
    earlier = {number: index.name(number) for number in np.unique(founder[founder < base]).tolist()}
    return [mine[number - base] if number >= base else earlier[number] for number in founder.tolist()], mine


def _name_hashes(names: Sequence[str]) -> np.ndarray:
    """Return 64-bit hashes (BLAKE2b) of `names`: two names with one hash count as equal."""
    digests = [hashlib.blake2b(name.encode(), digest_size=8).digest() for name in names]
    return np.frombuffer(b"".join(digests), dtype="<u8").astype(np.uint64)


def _segment(register: Register, clusters: Clusters, keys: np.ndarray, kept: np.ndarray, names: Sequence[str]) -> Segment:
    """Return what later links need to know of this one; `kept` are the places in `keys` that later documents look up, by key and row."""
    originals = np.flatnonzero(clusters.original == clusters.own)
    slots = np.full(len(register.ids), -1, dtype=np.int64)
    slots[originals] = np.arange(len(originals))
    by_hash = originals[np.lexsort((register.exact[originals, 1], register.exact[originals, 0]))]
    encoded = [name.encode() for name in names]
    return Segment(
        base=clusters.base,
        keys=keys.ravel()[kept],
        key_rows=kept // keys.shape[1],
        exact=register.exact[by_hash],
        exact_rows=by_hash,
        slots=slots,
        signatures=register.signatures[originals],
        founder=clusters.founder,
        held=clusters.held,
        straddles=clusters.straddles,
        names=np.frombuffer(b"".join(encoded), dtype=np.uint8),
        name_bounds=np.cumsum([0, *map(len, encoded)], dtype=np.int64),
        name_hashes=np.sort(_name_hashes([name for name in names if name])),
    )


def split_tables(register: Register, clusters: Clusters, *, threshold: float) -> Iterator[tuple[str, pa.Table]]:
    """Yield every partition of the link with its table of `SPLIT_SCHEMA`, rows by id."""
    schema = SPLIT_SCHEMA.with_metadata({"threshold": repr(threshold)})
    own = clusters.own
    for partition, rows in register.rows():
        columns = {
            "id": register.ids[rows],
            "cluster": clusters.names[rows],
            "founder": clusters.founder[rows] == own[rows],
            "exact": clusters.original[rows] < own[rows],
            "similarity": clusters.similarity[rows],
            "split": np.where(clusters.held[rows], HELD_OUT, TRAIN).tolist(),
            "joins": clusters.joins[rows],
            "straddles": clusters.straddles[rows],
        }
        yield partition, pa.table(columns, schema=schema)


def _fixed_bytes(column: pa.ChunkedArray, dtype: str) -> np.ndarray:
    """Return a fixed-size binary column as an array ``(rows, items per row)`` of `dtype`."""
    width, item = column.type.byte_width, np.dtype(dtype)
    filled = [chunk for chunk in column.chunks if len(chunk)]
    chunks = [np.frombuffer(chunk.buffers()[1], np.uint8, len(chunk) * width, chunk.offset * width) for chunk in filled]
    joined = np.concatenate(chunks) if chunks else np.empty(0, np.uint8)
    return joined.view(item).reshape(-1, width // item.itemsize)
