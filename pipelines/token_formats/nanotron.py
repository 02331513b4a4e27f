"""The files of datatrove, which nanotron trains on: ``X.ds``, ``X.ds.index`` and ``X.ds.metadata``.

Facts from datatrove 0.10.1. `pipeline/tokens/tokenizer.py`, TokenizedFile: ``.ds`` holds ids alone, little-endian, 2 bytes each
or 4; ``.index`` the end of each document in tokens, uint64; ``.metadata`` three lines, the first ``tokenizer|bytes per id``,
the second the number of tokens, the third the same for people. `utils/tokenization.py`, token_size: 4 bytes for more than
65,536 ids. A document ends with the end of text where its writer was told of one (`eos_token`), as ours is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

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

INDEX, METADATA = ".index", ".metadata"
UNITS = ("", "k", "M", "G", "T", "P")


class Nanotron(TokenFormat):
    """One ``.ds`` file with its index and metadata."""

    def write(self, documents: Iterable[np.ndarray], prefix: Path, *, vocabulary: Vocabulary) -> list[Path]:
        size = _token_size(vocabulary)
        path = prefix.with_name(f"{prefix.name}.ds")
        index, metadata = Path(f"{path}{INDEX}"), Path(f"{path}{METADATA}")
        end, last = 0, np.asarray([vocabulary.end_of_text], dtype=f"<u{size}").tobytes()
        with path.open("wb", BUFFER_BYTES) as tokens, index.open("wb", BUFFER_BYTES) as ends:
            for ids in checked(documents, vocabulary, path):
                tokens.write(ids.astype(f"<u{size}").tobytes())
                tokens.write(last)
                end += len(ids) + 1
                ends.write(end.to_bytes(8, "little"))
        metadata.write_text(f"{vocabulary.name}|{size}\n{end}\n{_for_people(end)}", encoding="utf-8")
        return [path, index, metadata]

    def read(self, paths: Sequence[Path], *, vocabulary: Vocabulary) -> Iterator[TokenDocument]:
        for path in paths:
            yield from self._documents(path, vocabulary)

    def companions(self, path: Path) -> list[Path]:
        index = companion(path, Path(f"{path}{INDEX}"), "copy it too, or write the tokens again with save_index=True")
        metadata = Path(f"{path}{METADATA}")
        return [index, metadata] if metadata.is_file() else [index]

    def _documents(self, path: Path, vocabulary: Vocabulary) -> Iterator[TokenDocument]:
        index, *metadata = self.companions(path)
        size, announced = _announced(metadata[0]) if metadata else (_token_size(vocabulary), None)
        tokens, ends = mapped(path, f"<u{size}"), mapped(index, "<u8")
        if index.stat().st_size % 8:
            raise GristmillError(f"{index} is {index.stat().st_size:,} bytes, no multiple of 8; it was cut: copy it again")
        expected = int(ends[-1]) if len(ends) else 0
        for count in {expected, announced} - {None}:
            if count * size != path.stat().st_size:
                raise cut_short(path, path.stat().st_size // size, count, f"ids of {size} bytes")
        begin = 0
        for number, end in enumerate(ends, start=1):
            if not begin <= int(end) <= len(tokens):
                rule = f"document {number} ends at {int(end)}, the one before at {begin}"
                raise GristmillError(f"{index}: {rule}; this is no index of {path.name}: copy both again")
            yield TokenDocument(path, number, without_end(tokens[begin : int(end)], vocabulary.end_of_text))
            begin = int(end)


def _token_size(vocabulary: Vocabulary) -> int:
    return 2 if vocabulary.size <= 65_536 else 4


def _announced(path: Path) -> tuple[int, int]:
    """Return the bytes per id and the number of tokens that a metadata file names."""
    lines = path.read_text(encoding="utf-8").splitlines()
    try:
        size, count = int(lines[0].rpartition("|")[2]), int(lines[1])
    except (IndexError, ValueError):
        raise GristmillError(f"{path} is not `tokenizer|bytes per id` and a number of tokens, on two lines; remove or correct it") from None
    if size not in (2, 4):
        raise GristmillError(f"{path} names {size} bytes per id; ids have 2 or 4")
    return size, count


def _for_people(count: int) -> str:
    """Return `count` as ``1.23 MT``, to three digits."""
    value, unit = float(count), 0
    while value >= 999.5 and unit < len(UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{value:#.3g}".rstrip(".") + f" {UNITS[unit]}T"
