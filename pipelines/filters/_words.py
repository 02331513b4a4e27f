"""Words of a batch of documents as integer ids, so that a property of a word is computed once per distinct word."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

Dialect = Literal["whitespace"]
"""What a word is. ``whitespace``: `str.split`, so that punctuation stays on its word (Dolma and NeMo Curator; datatrove uses spaCy)."""

GROUP_CHARACTERS = 1_000_000
"""Characters taken at a time: bounds the memory of the arrays (about 60 bytes a character at most)."""


@dataclass(frozen=True)
class Words:
    """The words of a group of documents."""

    vocabulary: tuple[str, ...]
    """Distinct words, by first occurrence."""
    ids: np.ndarray
    """int64, one per word of all documents in order: its place in `vocabulary`."""
    starts: np.ndarray
    """int64, one more than documents: document d has words ``starts[d]:starts[d + 1]``."""

    @property
    def counts(self) -> np.ndarray:
        """Number of words of each document."""
        return np.diff(self.starts)

    @cached_property
    def documents(self) -> np.ndarray:
        """The document that each word stands in."""
        return np.repeat(np.arange(len(self.starts) - 1), self.counts)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Characters of each word."""
        return self.each(len)

    def each(self, property_of: Callable[[str], int | bool]) -> np.ndarray:
        """Return ``property_of(word)`` for every word of every document, int64, computed once per distinct word."""
        return np.fromiter(map(property_of, self.vocabulary), np.int64, len(self.vocabulary))[self.ids]

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Return the sum of `values` over each document."""
        total = np.concatenate(([0], np.cumsum(values)))
        return total[self.starts[1:]] - total[self.starts[:-1]]


def split_words(texts: Sequence[str], dialect: Dialect = "whitespace") -> Words:
    """Return the words of `texts` in `dialect`."""
    if dialect != "whitespace":
        raise ValueError(f"words: {dialect!r} is not a dialect of words; known: whitespace")
    numbers: defaultdict[str, int] = defaultdict(itertools.count().__next__)
    ids = [np.fromiter(map(numbers.__getitem__, text.split()), np.int64) for text in texts]
    starts = np.concatenate(([0], np.cumsum([len(part) for part in ids], dtype=np.int64))).astype(np.int64)
    return Words(tuple(numbers), np.concatenate(ids) if ids else np.zeros(0, np.int64), starts)


def in_groups(score: Callable[[Sequence[str]], dict[str, np.ndarray]], texts: Sequence[str], names: Sequence[str]) -> dict[str, np.ndarray]:
    """Return ``score(texts)``, computed over groups of about `GROUP_CHARACTERS`, as float64 columns `names`."""
    parts = [score(group) for group in _groups(texts)]
    return {name: np.concatenate([np.zeros(0), *(np.asarray(part[name], dtype=np.float64) for part in parts)]) for name in names}


def share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Return ``part / whole`` as float64, NaN where `whole` is 0."""
    result = np.full(len(whole), np.nan)
    np.divide(part, whole, out=result, where=np.asarray(whole) != 0)
    return result


def repeats(items: Sequence[str]) -> tuple[int, int]:
    """Return the number of `items` seen before, and their characters; the first copy does not count (datatrove `find_duplicates`)."""
    if len(set(items)) == len(items):
        return 0, 0
    seen: set[str] = set()
    count = characters = 0
    for item in items:
        if item in seen:
            count += 1
            characters += len(item)
        seen.add(item)
    return count, characters


def _groups(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    start = size = 0
    for number, text in enumerate(texts):
        if size and size + len(text) > GROUP_CHARACTERS:
            yield texts[start:number]
            start, size = number, 0
        size += len(text)
    if start < len(texts):
        yield texts[start:]
