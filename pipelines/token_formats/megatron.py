"""The indexed dataset of Megatron Core: ``X.bin`` with the ids and ``X.idx`` with lengths and documents.

Facts from Megatron-LM, `megatron/core/datasets/indexed_dataset.py` (d98e8a64dd, 2026-08): the index begins with the 9 bytes
``MMIDIDX\\0\\0``, the version 1 (uint64), the code of the ids' type (uint8) and the numbers of sequences and of documents + 1
(uint64); then follow the sequences' lengths (int32) and byte offsets (int64), and the number of the first sequence of each
document and of the end (int64); all little-endian. `DType`: the codes. `optimal_dtype`: uint16 for fewer than 65,500 ids, else
int32. `tools/preprocess_data.py --append-eod`: an end of text ends each document, as it does in what is written here; there
and here a document is one sequence.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipelines.errors import GristmillError
from pipelines.token_formats import (
    BUFFER_BYTES,
    TokenDocument,
    TokenFormat,
    Vocabulary,
    checked,
    companion,
    cut_short,
    mapped,
    without_end,
)

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
CODES = {1: "|u1", 2: "|i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
"""Types of ids; 6 and 7 are floating-point numbers."""
MAX_SEQUENCE = 2**31 - 1
"""Lengths are int32."""
BLOCK = 1 << 20
"""Entries of the index that are written at a time."""


class Index(NamedTuple):
    """What an index file says, memory-mapped."""

    dtype: np.dtype
    lengths: np.ndarray
    """int32, shape (sequences,)."""
    offsets: np.ndarray
    """int64, shape (sequences,), in bytes."""
    documents: np.ndarray
    """int64, shape (documents + 1,): first sequence of each, and the end."""


class Megatron(TokenFormat):
    """One ``.bin`` file with its index."""

    def write(self, documents: Iterable[np.ndarray], prefix: Path, *, vocabulary: Vocabulary) -> list[Path]:
        code = 8 if vocabulary.size < 65_500 else 4
        path, index = prefix.with_name(f"{prefix.name}.bin"), prefix.with_name(f"{prefix.name}.idx")
        lengths = array("i")
        end = np.asarray([vocabulary.end_of_text], dtype=CODES[code]).tobytes()
        with path.open("wb", BUFFER_BYTES) as tokens:
            for ids in checked(documents, vocabulary, path):
                if len(ids) >= MAX_SEQUENCE:
                    raise GristmillError(f"{path}: a document of {len(ids):,} ids; the format holds fewer than {MAX_SEQUENCE:,}: cut it")
                tokens.write(ids.astype(CODES[code]).tobytes())
                tokens.write(end)
                lengths.append(len(ids) + 1)
        _write_index(index, code, np.frombuffer(lengths, dtype=np.int32))
        return [path, index]

    def read(self, paths: Sequence[Path], *, vocabulary: Vocabulary) -> Iterator[TokenDocument]:
        for path in paths:
            yield from self._documents(path, vocabulary)

    def companions(self, path: Path) -> list[Path]:
        return [companion(path, path.with_suffix(".idx"), "copy it too")]

    def _documents(self, path: Path, vocabulary: Vocabulary) -> Iterator[TokenDocument]:
        index = _read_index(self.companions(path)[0])
        tokens, size = mapped(path, index.dtype.str), index.dtype.itemsize
        last = int(index.offsets[-1]) // size + int(index.lengths[-1]) if len(index.lengths) else 0
        if last > len(tokens):
            raise cut_short(path, len(tokens), last, f"ids of {size} bytes")
        for number, (first, stop) in enumerate(zip(index.documents[:-1], index.documents[1:], strict=True), start=1):
            parts = []
            for offset, length in zip(index.offsets[first:stop].tolist(), index.lengths[first:stop].tolist(), strict=True):
                if offset % size or not 0 <= offset // size <= offset // size + length <= len(tokens):
                    rule = f"document {number} is to begin at byte {offset} and to have {length} ids"
                    raise GristmillError(f"{path}: {rule}, which it does not hold: the index is of another file; copy both again")
                parts.append(tokens[offset // size : offset // size + length])
            ids = parts[0] if len(parts) == 1 else np.concatenate([*parts, np.empty(0, index.dtype)])
            yield TokenDocument(path, number, without_end(ids, vocabulary.end_of_text))


def _write_index(path: Path, code: int, lengths: np.ndarray) -> None:
    """Write the index of documents of one sequence each."""
    size = np.dtype(CODES[code]).itemsize
    blocks = range(0, len(lengths), BLOCK)
    with path.open("wb", BUFFER_BYTES) as file:
        file.write(HEADER.pack(MAGIC, 1, code, len(lengths), len(lengths) + 1))
        file.write(lengths.astype("<i4", copy=False).tobytes())
        begin = 0
        for block in blocks:
            ends = begin + np.cumsum(lengths[block : block + BLOCK], dtype=np.int64) * size
            file.write(np.concatenate([[begin], ends[:-1]]).astype("<i8").tobytes())
            begin = int(ends[-1])
        for block in range(0, len(lengths) + 1, BLOCK):
            file.write(np.arange(block, min(block + BLOCK, len(lengths) + 1), dtype="<i8").tobytes())


def _read_index(path: Path) -> Index:
    size = path.stat().st_size
    with path.open("rb") as file:
        header = file.read(HEADER.size)
    if header[: len(MAGIC)] != MAGIC:
        raise GristmillError(f"{path} begins with {header[: len(MAGIC)]!r}, the indexes of Megatron Core with {MAGIC!r}: see `format`")
    if size < HEADER.size:
        raise cut_short(path, size, HEADER.size, "bytes")
    _, version, code, num_sequences, num_bounds = HEADER.unpack(header)
    if version != 1 or code not in CODES:
        raise GristmillError(
            f"{path}: version {version} and type {code} of ids; version 1 and one of {', '.join(map(str, CODES))} are read"
        )
    expected = HEADER.size + 12 * num_sequences + 8 * num_bounds
    if size not in (expected, expected + num_sequences):  # an index of several modes has a byte more for each sequence
        raise cut_short(path, size, expected, "bytes")
    whole = np.memmap(path, dtype=np.uint8, mode="r")
    lengths, offsets, documents = np.split(whole[HEADER.size : expected], [4 * num_sequences, 12 * num_sequences])
    index = Index(np.dtype(CODES[code]), lengths.view("<i4"), offsets.view("<i8"), documents.view("<i8"))
    if not num_bounds or index.documents[0] != 0 or index.documents[-1] != num_sequences or (np.diff(index.documents) < 0).any():
        raise GristmillError(f"{path}: the bounds of the documents do not run from 0 to {num_sequences} sequences; copy it again")
    return index
