"""The data files of llm.c: ``X_000000.bin`` and so on, a header and ids, documents by the end of text alone.

Facts from llm.c (f1e2ace, 2025-05). `dev/data/data_common.py`: 256 int32, of which the first three are magic, version and
number of tokens, fewer than 2**31; then the ids, uint16 with magic 20240520 and version 1 (GPT-2), or uint32 with magic
20240801 and version 7 (Llama 3). `dev/data/fineweb.py`: the end of text stands before each document, and a document that
does not fit in a file goes on in the next. `llmc/dataloader.h` checks magic, version and file size; it reads uint16 alone,
`train_llama3.py` uint32 alone, and both want a batch and one token in every file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import Field

from pipelines.errors import GristmillError
from pipelines.token_formats import BUFFER_BYTES, TokenDocument, TokenFormat, Vocabulary, checked, cut_short, mapped

HEADER_BYTES = 256 * 4
MAX_TOKENS = 2**31 - 1
SCANNED = 1 << 20
"""Ids that are looked through at a time."""


@dataclass(frozen=True)
class Variant:
    """One of the two kinds of file."""

    magic: int
    version: int
    dtype: str


GPT_2, LLAMA_3 = Variant(20240520, 1, "<u2"), Variant(20240801, 7, "<u4")


class LlmC(TokenFormat):
    """Numbered ``.bin`` files: of uint16 where the vocabulary allows it, else of uint32."""

    max_tokens_per_file: int = Field(default=MAX_TOKENS, ge=1, le=MAX_TOKENS)
    """Where a file ends and the next begins, in tokens."""

    def write(self, documents: Iterable[np.ndarray], prefix: Path, *, vocabulary: Vocabulary) -> list[Path]:
        variant = GPT_2 if vocabulary.size <= 65_536 else LLAMA_3
        end = np.asarray([vocabulary.end_of_text], dtype=variant.dtype)
        paths: list[Path] = []
        pieces = (piece for ids in checked(documents, vocabulary, prefix) for piece in (end, ids.astype(variant.dtype)) if len(piece))
        left = next(pieces, None)
        while left is not None:
            path = prefix.with_name(f"{prefix.name}_{len(paths):06d}.bin")
            paths.append(path)
            count = 0
            with path.open("wb", BUFFER_BYTES) as file:
                file.write(bytes(HEADER_BYTES))
                while left is not None and count < self.max_tokens_per_file:
                    taken = left[: self.max_tokens_per_file - count]
                    file.write(taken.tobytes())
                    count += len(taken)
                    left = left[len(taken) :] if len(taken) < len(left) else next(pieces, None)
                file.seek(0)
                file.write(np.asarray([variant.magic, variant.version, count], dtype="<i4").tobytes())
        return paths

    def read(self, paths: Sequence[Path], *, vocabulary: Vocabulary) -> Iterator[TokenDocument]:
        before = False  # an end of text begins the first file: it stands before each document, else behind
        begun: list[np.ndarray] = []
        path, number = Path(), 0
        for place, file in enumerate(paths):
            tokens = _tokens(file)
            counted, begin = 0, 0
            if place == 0:
                before = len(tokens) > 0 and int(tokens[0]) == vocabulary.end_of_text
                path, number, counted = file, int(not before), int(not before)
            for end in _ends(tokens, vocabulary.end_of_text):
                if number:
                    yield TokenDocument(path, number, _whole([*begun, tokens[begin:end]]))
                begun, begin = [], end + 1
                counted += 1
                path, number = file, counted
            begun.append(tokens[begin:])
        if number and (before or any(map(len, begun))):
            yield TokenDocument(path, number, _whole(begun))


def _whole(pieces: list[np.ndarray]) -> np.ndarray:
    """Return `pieces` as one document: memory-mapped where there is one, joined where files were cut inside of it."""
    filled = [piece for piece in pieces if len(piece)] or pieces[:1]
    return filled[0] if len(filled) == 1 else np.concatenate(filled)


def _ends(tokens: np.ndarray, end_of_text: int) -> Iterator[int]:
    """Yield the positions of `end_of_text`."""
    for first in range(0, len(tokens), SCANNED):
        yield from (first + np.nonzero(tokens[first : first + SCANNED] == end_of_text)[0]).tolist()


def _tokens(path: Path) -> np.ndarray:
    header = mapped(path, "<i4")[:256]
    if len(header) < 3:
        raise cut_short(path, path.stat().st_size, HEADER_BYTES, "bytes")
    magic, version, count = header[:3].tolist()
    variant = next((variant for variant in (GPT_2, LLAMA_3) if variant.magic == magic), None)
    if variant is None:
        known = f"{GPT_2.magic} (uint16) and {LLAMA_3.magic} (uint32)"
        raise GristmillError(f"{path} begins with {magic}; the data files of llm.c begin with {known}: see `format`")
    if version != variant.version:
        raise GristmillError(f"{path}: version {version} of magic {magic}; {variant.version} is read")
    tokens = mapped(path, variant.dtype, offset=HEADER_BYTES)
    if path.stat().st_size != HEADER_BYTES + count * tokens.itemsize:
        raise cut_short(path, len(tokens), count, f"ids of {tokens.itemsize} bytes")
    return tokens
