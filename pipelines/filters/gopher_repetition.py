"""Gopher's repetition rules (2112.11446, appendix A.1.1, table A1), with the definitions of datatrove 0.10.1.

The first copy of a line, paragraph or n-gram does not count. All fractions of characters are of the document's
characters. Top n-grams are joined with spaces, a tie goes to the n-gram that comes first; duplicate n-grams are
joined without spaces and counted from left to right, a repeated one being jumped over.

N-grams are compared by a 64-bit polynomial hash of their characters, computed for all of them at once: within a
document of 100,000 words two different ones fall together with a probability below 1e-6. About 4 MB/s on one core.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from pipelines.filters import Filter, Rule
from pipelines.filters._words import Dialect, Words, in_groups, repeats, share, split_words

SOURCE = "Gopher, 2112.11446, table A1"
TOP = {2: 0.20, 3: 0.18, 4: 0.16}
DUPLICATE = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}

_BASE = np.uint64(0x9E3779B97F4A7C15)
_INVERSE = np.uint64(pow(int(_BASE), -1, 2**64))
_PARAGRAPH_BREAK = re.compile(r"\n{2,}")
_LINE_BREAK = re.compile(r"\n+")


class GopherRepetition(Filter):
    """Shares of a document that repeat what it said before."""

    words: Dialect = "whitespace"
    """What counts as a word of an n-gram."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule("duplicate_paragraph_fraction", "at_most", 0.30, SOURCE),
        Rule("duplicate_paragraph_character_fraction", "at_most", 0.20, SOURCE),
        Rule("duplicate_line_fraction", "at_most", 0.30, SOURCE),
        Rule("duplicate_line_character_fraction", "at_most", 0.20, SOURCE),
        *(Rule(f"top_{n}_gram_character_fraction", "at_most", threshold, SOURCE) for n, threshold in TOP.items()),
        *(Rule(f"duplicate_{n}_gram_character_fraction", "at_most", threshold, SOURCE) for n, threshold in DUPLICATE.items()),
    )

    def score(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        return in_groups(self._score, texts, [rule.name for rule in self.rules])

    def _score(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        characters = np.array([len(text) for text in texts])
        scores = _block_scores("paragraph", [_PARAGRAPH_BREAK.split(text.strip()) for text in texts], characters)
        scores |= _block_scores("line", [_LINE_BREAK.split(text) for text in texts], characters)
        ngrams = _NGrams(split_words(texts, self.words))
        for n in TOP:
            scores[f"top_{n}_gram_character_fraction"] = share(ngrams.top_characters(n), characters)
        for n in DUPLICATE:
            scores[f"duplicate_{n}_gram_character_fraction"] = share(ngrams.duplicate_characters(n), characters)
        return scores


def _block_scores(kind: str, blocks: list[list[str]], characters: np.ndarray) -> dict[str, np.ndarray]:
    found = np.array([repeats(items) for items in blocks], dtype=np.float64).reshape(-1, 2)
    empty = np.where(characters == 0, 0, 1)
    return {
        f"duplicate_{kind}_fraction": share(found[:, 0], empty * np.array([len(items) for items in blocks])),
        f"duplicate_{kind}_character_fraction": share(found[:, 1], characters),
    }


class _NGrams:
    """All n-grams of a group of documents, by hash.

    With characters c_0, c_1, ... of the joined words, scrambled to 64 bits, and ``S(i) = sum of c_t B^-t for t < i``,
    the polynomial hash of characters i to j - 1 is ``(S(j) - S(i)) B^j`` modulo 2^64, whatever words they belong to.
    """

    def __init__(self, words: Words) -> None:
        self._words = words
        self._ends = np.cumsum(words.lengths)
        self._begins = self._ends - words.lengths
        joined = "".join([words.vocabulary[number] for number in words.ids.tolist()])
        codes = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
        self._sums = np.concatenate((np.zeros(1, np.uint64), np.cumsum(_scramble(codes) * _powers(_INVERSE, len(codes)), dtype=np.uint64)))
        self._powers = _powers(_BASE, len(codes) + 1)
        self._salts = _scramble(words.documents.astype(np.uint64) + np.uint64(1 << 32))
        self._single = _scramble(self._hash(self._begins, self._ends))

    def top_characters(self, n: int) -> np.ndarray:
        """Return count times characters of each document's most frequent n-gram, one per document; NaN with fewer than n words."""
        positions = self._positions(n)
        codes = self._salts[positions].copy()
        for offset in range(n):  # joined with spaces: word hashes in order, not one stream of characters
            codes = codes * _BASE + self._single[positions + offset]
        result = np.full(len(self._words.starts) - 1, np.nan)
        first = self._words.starts[:-1][self._words.counts >= n]
        result[self._words.documents[first]] = self._characters(first, n) + n - 1
        repeated = np.flatnonzero(_repeated(codes))
        _, index, counts = np.unique(codes[repeated], return_index=True, return_counts=True)
        begins = positions[repeated[index]]
        documents = self._words.documents[begins]
        order = np.lexsort((begins, -counts, documents))
        best = order[np.concatenate(([True], np.diff(documents[order]) > 0))] if len(order) else order
        result[documents[best]] = (self._characters(begins[best], n) + n - 1) * counts[best]
        return result

    def duplicate_characters(self, n: int) -> np.ndarray:
        """Return the characters of each document's repeated n-grams, found from left to right, one per document."""
        positions = self._positions(n)
        codes = self._hash(self._begins[positions], self._ends[positions + n - 1]) + self._salts[positions]
        repeated = _repeated(codes)
        positions = positions[repeated]
        hits = positions[_greedy(positions.tolist(), codes[repeated].tolist(), n)]
        return np.bincount(self._words.documents[hits], weights=self._characters(hits, n), minlength=len(self._words.starts) - 1)

    def _positions(self, n: int) -> np.ndarray:
        """Return the words at which an n-gram begins that ends within its document."""
        numbers = np.arange(len(self._words.ids))
        return numbers[numbers + n <= self._words.starts[1:][self._words.documents]]

    def _characters(self, positions: np.ndarray, n: int) -> np.ndarray:
        return self._ends[positions + n - 1] - self._begins[positions]

    def _hash(self, begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
        return (self._sums[ends] - self._sums[begins]) * self._powers[ends]


def _greedy(positions: list[int], codes: list[int], n: int) -> list[int]:
    """Return the indices of the n-grams counted as duplicates: seen before, and not within the one counted last."""
    seen: set[int] = set()
    hits, free = [], 0
    for index, (position, code) in enumerate(zip(positions, codes, strict=True)):
        if position < free:
            continue
        if code in seen:
            hits.append(index)
            free = position + n
        seen.add(code)
    return hits


def _repeated(codes: np.ndarray) -> np.ndarray:
    """Return a mask of the codes that occur more than once."""
    ordered = np.sort(codes)
    twice = ordered[1:][ordered[1:] == ordered[:-1]]
    if not len(twice):
        return np.zeros(len(codes), dtype=bool)
    return twice[np.minimum(np.searchsorted(twice, codes), len(twice) - 1)] == codes


def _powers(base: np.uint64, count: int) -> np.ndarray:
    """Return ``base ** i`` modulo 2^64 for i < count."""
    factors = np.full(count, base)
    factors[:1] = 1
    return np.cumprod(factors, dtype=np.uint64)


def _scramble(values: np.ndarray) -> np.ndarray:
    """Return a bijection of uint64 `values` without visible order (the finaliser of SplitMix64, Steele et al. 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
