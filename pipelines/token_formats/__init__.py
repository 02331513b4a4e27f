"""Token formats: files of token ids as other trainers write and read them.

A document here is its token ids without an end of text: whether one stands before it, behind it or not at all is the format's.
Reading maps the files into memory and gives one document at a time; writing takes one at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipelines.errors import EmptyInput, GristmillError
from pipelines.plugins import Plugin

BUFFER_BYTES = 1 << 20
"""Written at a time."""


@dataclass(frozen=True)
class Vocabulary:
    """What a format has to know of the tokenizer."""

    size: int
    """Number of ids."""
    end_of_text: int
    """The id that separates documents."""
    name: str = "tokenizer.json"
    """The tokenizer, as a format names it that has a place for it."""


class TokenDocument(NamedTuple):
    """A document of a token file."""

    path: Path
    """The file in which it begins."""
    number: int
    """Its number in that file, from 1."""
    ids: np.ndarray
    """Token ids, integers of shape (n,), without end of text; memory-mapped where the file holds them in one piece."""


class TokenFormat(Plugin):
    """Base of every format."""

    def write(self, documents: Iterable[np.ndarray], prefix: Path, *, vocabulary: Vocabulary) -> list[Path]:
        """Write `documents` (integers of shape (n,)) to files whose names begin with `prefix`; return them, the token files first.

        Raises:
            EmptyInput: there is no document.
            GristmillError: an id is outside of the vocabulary, or something is too large for the format.
        """
        raise NotImplementedError

    def read(self, paths: Sequence[Path], *, vocabulary: Vocabulary) -> Iterator[TokenDocument]:
        """Yield the documents of token files `paths`, in order.

        Raises:
            GristmillError: a file is not of this format, or not whole, or its index is missing.
        """
        raise NotImplementedError

    def companions(self, path: Path) -> list[Path]:
        """Return the files that are read together with token file `path`, such as its index.

        Raises:
            GristmillError: one that the format needs is not there.
        """
        return []


def checked(documents: Iterable[np.ndarray], vocabulary: Vocabulary, prefix: Path) -> Iterator[np.ndarray]:
    """Yield `documents`, each looked at.

    Raises:
        EmptyInput: there is none.
        GristmillError: an id is outside of the vocabulary.
    """
    number = 0
    for number, ids in enumerate(documents, start=1):
        if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= vocabulary.size):
            wrong = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
            rule = f"document {number} holds id {wrong}, the vocabulary has {vocabulary.size} ids from 0"
            raise GristmillError(f"{prefix}: {rule}; name the tokenizer that the ids came from")
        yield ids
    if not number:
        raise EmptyInput(f"{prefix}: no document to write; loosen the filters or raise the budget")


def without_end(ids: np.ndarray, end_of_text: int) -> np.ndarray:
    """Return `ids` without the end of text that they may end with."""
    return ids[:-1] if len(ids) and int(ids[-1]) == end_of_text else ids


def mapped(path: Path, dtype: str, *, offset: int = 0) -> np.ndarray:
    """Return the integers of `path` from byte `offset` on, memory-mapped; a part of an integer at the end is left out."""
    count = (path.stat().st_size - offset) // np.dtype(dtype).itemsize
    return np.asarray(np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(count,))) if count > 0 else np.empty(0, dtype)


def companion(path: Path, beside: Path, remedy: str) -> Path:
    """Return `beside`, the file that says where the documents of `path` end.

    Raises:
        GristmillError: it is not there.
    """
    if not beside.is_file():
        raise GristmillError(f"{path} has no {beside.name} beside it, which says where documents end; {remedy}")
    return beside


def cut_short(path: Path, found: int, expected: int, unit: str) -> GristmillError:
    """Return the error that `path` is not whole."""
    return GristmillError(f"{path} holds {found:,} {unit}, {expected:,} are announced; it was cut or is being written: copy it again")
