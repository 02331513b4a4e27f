"""The index of one link of the register: what later documents are compared with, in a file that is mapped into memory, not read.

    index.safetensors   sorted hashes with the documents they belong to, the signatures, what was decided; little-endian

Looking up a new document touches the pages its hashes fall on. A document's number is its row in the whole register: the links' rows
one after the other, in order.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

INDEX = "index.safetensors"
_DTYPES = {"U8": np.uint8, "BOOL": np.bool_, "U32": np.uint32, "I64": np.int64, "U64": np.uint64}


@dataclass(frozen=True)
class Segment:
    """One link's part of the index, n documents; the arrays are mapped from the file.

    Documents are named by their row in this segment unless said otherwise.
    """

    base: int
    """Number of the first document."""
    keys: np.ndarray
    """uint64, sorted: band keys of the documents that are compared with later ones."""
    key_rows: np.ndarray
    """int64: the document of each key; in order where keys are equal."""
    exact: np.ndarray
    """uint64 ``(originals, 2)``, sorted: the exact hashes, big-endian, of documents without an earlier copy."""
    exact_rows: np.ndarray
    slots: np.ndarray
    """int64 ``(n,)``: row of each document in `signatures`, -1 for a copy of an earlier one."""
    signatures: np.ndarray
    """uint32 ``(originals, P)``."""
    founder: np.ndarray
    """int64 ``(n,)``: number of the founder of the document's cluster, in the whole register."""
    held: np.ndarray
    """bool ``(n,)``: whether that cluster is held out."""
    straddles: np.ndarray
    """bool ``(n,)``."""
    names: np.ndarray
    """uint8: the names of the clusters that documents of this segment found, in UTF-8, one after the other."""
    name_bounds: np.ndarray
    """int64 ``(n + 1,)``: where the name of each document's own cluster stands; empty where it founds none."""
    name_hashes: np.ndarray
    """uint64, sorted: hashes of the names."""

    def __len__(self) -> int:
        return len(self.founder)

    def name(self, row: int) -> str:
        """Return the name of the cluster that document `row` founds."""
        return self.names[self.name_bounds[row] : self.name_bounds[row + 1]].tobytes().decode()


def write_segment(path: Path, segment: Segment) -> None:
    """Write `segment`."""
    from safetensors.numpy import save_file

    arrays = {name: np.ascontiguousarray(value) for name, value in vars(segment).items() if name != "base"}
    save_file(arrays, path, metadata={"base": str(segment.base)})


def open_segment(path: Path) -> Segment:
    """Map the segment in `path` into memory."""
    with path.open("rb") as file:
        size = struct.unpack("<Q", file.read(8))[0]
        header = json.loads(file.read(size))
    base = int(header.pop("__metadata__")["base"])
    filled = any(entry["data_offsets"][1] for entry in header.values())
    mapped = np.memmap(path, dtype=np.uint8, mode="r", offset=8 + size) if filled else np.empty(0, dtype=np.uint8)
    arrays = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        arrays[name] = np.asarray(mapped[begin:end]).view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return Segment(base=base, **arrays)


class Index:
    """The segments of all earlier links as one."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self._segments = sorted(segments, key=lambda segment: segment.base)

    def __len__(self) -> int:
        return sum(map(len, self._segments))

    @property
    def positions(self) -> set[int]:
        """Lengths of the signatures."""
        return {segment.signatures.shape[1] for segment in self._segments if len(segment)}

    def find_originals(self, hashes: np.ndarray) -> np.ndarray:
        """Return the number of the document with each exact hash (uint64, ``(n, 2)``), -1 where there is none."""
        found = np.full(len(hashes), -1, dtype=np.int64)
        for segment in self._segments:
            places, matches = _lookup(segment.exact[:, 0], hashes[:, 0])
            for row in np.flatnonzero(matches):  # more than one step only where 64 bits of two hashes are equal
                while places[row] < len(segment.exact) and segment.exact[places[row], 0] == hashes[row, 0]:
                    if segment.exact[places[row], 1] == hashes[row, 1]:
                        found[row] = segment.exact_rows[places[row]] + segment.base
                    places[row] += 1
        return found

    def find_members(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the documents of band keys `keys` (sorted, unique): bounds ``(keys + 1,)`` and document numbers, in order."""
        whose, numbers = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for segment in self._segments:
            first, matches = _lookup(segment.keys, keys)
            hits = np.flatnonzero(matches)
            counts = np.searchsorted(segment.keys, keys[hits], side="right") - first[hits]
            whose.append(np.repeat(hits, counts))
            numbers.append(segment.key_rows[_ranges(first[hits], counts)] + segment.base)
        order = np.argsort(np.concatenate(whose), kind="stable")
        bounds = np.searchsorted(np.concatenate(whose)[order], np.arange(len(keys) + 1))
        return bounds, np.concatenate(numbers)[order]

    def names_taken(self, hashes: np.ndarray) -> np.ndarray:
        """Return whether a cluster's name has each hash; bool."""
        taken = np.zeros(len(hashes), dtype=bool)
        for segment in self._segments:
            taken |= _lookup(segment.name_hashes, hashes)[1]
        return taken

    def name(self, number: int) -> str:
        """Return the name of the cluster that document `number` founds."""
        segment = self._segments[int(np.searchsorted([s.base for s in self._segments], number, side="right")) - 1]
        return segment.name(number - segment.base)

    def founder(self, numbers: np.ndarray) -> np.ndarray:
        """Return the founder's number of the clusters of documents `numbers` (sorted)."""
        return self._gather(numbers, "founder", np.int64)

    def held(self, numbers: np.ndarray) -> np.ndarray:
        """Return whether those clusters are held out."""
        return self._gather(numbers, "held", np.bool_)

    def straddles(self, numbers: np.ndarray) -> np.ndarray:
        """Return whether the documents matched clusters of both splits."""
        return self._gather(numbers, "straddles", np.bool_)

    def signatures(self, numbers: np.ndarray, positions: int) -> np.ndarray:
        """Return the signatures of documents `numbers` (sorted), none a copy, uint32 ``(n, positions)``."""
        found = np.empty((len(numbers), positions), dtype=np.uint32)
        for segment, rows, place in self._parts(numbers):
            found[place] = segment.signatures[segment.slots[rows]]
        return found

    def _gather(self, numbers: np.ndarray, column: str, dtype: type) -> np.ndarray:
        found = np.empty(len(numbers), dtype=dtype)
        for segment, rows, place in self._parts(numbers):
            found[place] = getattr(segment, column)[rows]
        return found

    def _parts(self, numbers: np.ndarray) -> Iterator[tuple[Segment, np.ndarray, slice]]:
        for segment in self._segments:
            place = slice(*np.searchsorted(numbers, [segment.base, segment.base + len(segment)]).tolist())
            yield segment, numbers[place] - segment.base, place


def _lookup(values: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return where each of `wanted` stands in sorted `values`, or would, and whether it does."""
    places = np.searchsorted(values, wanted)
    matches = np.zeros(len(wanted), dtype=bool)
    inside = places < len(values)
    matches[inside] = values[places[inside]] == wanted[inside]
    return places, matches


def _ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return ``start, start + 1, ...`` for each start, `counts` numbers each, one after the other."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - counts), counts)
