"""Word n-grams: which of a set of items' n-grams occur in a text, found by 64-bit hashes and confirmed word by word.

A word is a maximal run of letters and digits, in lower case; everything between words counts as one gap. An n-gram's hash is a
polynomial over the hashes of its words, both modulo 2**64. A hash that is found is no match until the words are the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np

CODE_POINTS = 0x110000
LAST_LETTER = 0x3FFFF
"""Unicode has no letter or digit after plane 3."""
CHARACTER_FACTOR = np.uint64(0x9E3779B97F4A7C15)
WORD_FACTOR = np.uint64(0xD1B54A32D192ED03)
"""Odd, so that they have an inverse modulo 2**64: a word's hash does not depend on where it stands."""
FILTER_BITS = 22
"""Of the bit table that is asked before the sorted hashes: 512 KiB, which stays in a core's cache."""


@cache
def _tables() -> tuple[np.ndarray, np.ndarray]:
    """Return, by code point, the lower case of a letter or digit (0 for anything else), and its hash (0 for anything else)."""
    characters = [chr(code) for code in range(LAST_LETTER + 1)]
    lower = [c.lower() if c.isalnum() else "\0" for c in characters]
    folded = np.zeros(CODE_POINTS, dtype=np.uint32)
    folded[: LAST_LETTER + 1] = [ord(low) if len(low) == 1 else ord(c) for c, low in zip(characters, lower, strict=True)]
    return folded, np.where(folded > 0, _mixed(folded.astype(np.uint64)), np.uint64(0))


def _mixed(values: np.ndarray) -> np.ndarray:
    """Spread the bits of uint64 `values` (the finalizer of SplitMix64, Steele et al. 2014)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@lru_cache(maxsize=4)
def _powers(factor: np.uint64, count: int) -> np.ndarray:
    powers = np.full(max(count, 1), factor, dtype=np.uint64)
    powers[0] = 1
    return np.multiply.accumulate(powers)


@dataclass(frozen=True)
class Spelled:
    """The words of some texts as one string: lower case, a space after each."""

    text: str
    starts: np.ndarray
    ends: np.ndarray

    def ngram(self, word: int, length: int) -> str:
        """Return `length` words from `word` on, a space between them."""
        return self.text[self.starts[word] : self.ends[word + length - 1]]


@dataclass(frozen=True)
class Words:
    """The words of several texts, one text after another."""

    folded: np.ndarray
    """Code points of all texts, each text followed by one 0: lower case, and 0 where no letter or digit stands."""
    text_starts: np.ndarray
    """Where each text starts in `folded`; one more entry than texts."""
    starts: np.ndarray
    """Where each word starts in `folded`."""
    ends: np.ndarray
    """Where each word ends."""
    offsets: np.ndarray
    """Words of text t are ``offsets[t]`` to ``offsets[t + 1]``."""
    hashes: np.ndarray
    """uint64, one per word."""

    def text_of(self) -> np.ndarray:
        """Return the number of the text of each word."""
        return np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))

    def spelled(self) -> Spelled:
        """Return the words as one string."""
        lengths = self.ends - self.starts
        keep = self.folded != 0
        keep[self.ends] = True  # the gap after each word, as one space
        codes = np.where(self.folded == 0, np.uint32(32), self.folded)[keep]
        starts = np.concatenate(([0], np.cumsum(lengths + 1)[:-1])) if len(lengths) else lengths
        return Spelled(codes.tobytes().decode("utf-32-le", "surrogatepass"), starts, starts + lengths)


def find_words(texts: Sequence[str]) -> Words:
    """Return the words of `texts`. Memory: about 40 bytes per character of all of them together."""
    table, hashes = _tables()
    joined = "\0".join([*texts, ""])
    codes = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    folded = table[codes]
    inside = np.zeros(len(codes) + 1, dtype=bool)
    np.not_equal(folded, 0, out=inside[1:])
    change = np.flatnonzero(inside[1:] != inside[:-1])  # the text ends with a 0, so every word that starts ends too
    starts, ends = change[0::2], change[1::2]
    text_starts = np.concatenate(([0], np.cumsum([len(text) + 1 for text in texts], dtype=np.int64)))
    return Words(folded, text_starts, starts, ends, np.searchsorted(starts, text_starts), _word_hashes(hashes[codes], starts, ends))


def _word_hashes(values: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Return the hash of each word: the sum of its `values` times the powers of a factor, counted from its first character."""
    if not len(starts):
        return np.zeros(0, dtype=np.uint64)
    size = 1 << (len(values) - 1).bit_length()
    sums = np.add.reduceat(values * _powers(CHARACTER_FACTOR, size)[: len(values)], starts)
    inverse = np.uint64(pow(int(CHARACTER_FACTOR), -1, 2**64))
    return _mixed(sums * _powers(inverse, size)[starts] + (ends - starts).astype(np.uint64))


@dataclass(frozen=True)
class Matches:
    """N-grams of some words that are n-grams of the index, ordered by word, then length."""

    word: np.ndarray
    """The n-gram's first word."""
    length: np.ndarray
    """Its number of words."""
    entry: np.ndarray
    """Its number in the index."""


@dataclass(frozen=True)
class _Lookup:
    """The n-grams of one length."""

    hashes: np.ndarray
    """Sorted; two different n-grams may have the same."""
    words: np.ndarray
    """Where the n-gram first stands in the items."""
    maybe: np.ndarray
    """By the top bits of a hash: whether it may be there."""
    first_entry: int


class NgramIndex:
    """The n-grams of a set of items; an item with fewer words than `ngram` counts as one n-gram, if it has `min_words`.

    Memory: about 60 bytes per word of the items, and their text.
    """

    def __init__(self, texts: Sequence[str], *, ngram: int, min_words: int, hash_bits: int = 64) -> None:
        """Index `texts`; with few `hash_bits` many hashes are equal, which slows the search and changes no result."""
        self._words = find_words(texts)
        self._spelled = self._words.spelled()
        self._mask = np.uint64(2**hash_bits - 1)
        counts = np.diff(self._words.offsets)
        self.item_words = counts
        """Words of each item."""
        lengths = np.where(counts >= ngram, ngram, np.where(counts >= min_words, counts, 0))
        self._lookups: dict[int, _Lookup] = {}
        entries, items, total = [], [], 0
        for length, hashes in _ngram_hashes(self._words, sorted(set(lengths.tolist()) - {0}), self._mask):
            item = self._words.text_of()[: len(hashes)]
            position = np.flatnonzero((lengths[item] == length) & _within_text(self._words, length))
            lookup, entry = self._group(hashes[position], position, length, total)
            self._lookups[length] = lookup
            entries.append(entry)
            items.append(item[position])
            total += len(lookup.hashes)
        pairs = np.unique(np.stack([_joined(entries), _joined(items)], axis=1), axis=0)
        self._posting_offsets = np.searchsorted(pairs[:, 0], np.arange(total + 1))
        self._posting_items = pairs[:, 1]
        self.item_ngrams = np.bincount(pairs[:, 1], minlength=len(texts))
        """Different n-grams of each item; 0 for an item that is too short to be looked for."""

    def _group(self, hashes: np.ndarray, position: np.ndarray, length: int, first_entry: int) -> tuple[_Lookup, np.ndarray]:
        """Return the different n-grams among those at `position`, and the entry of each."""
        order = np.argsort(hashes, kind="stable")
        ordered, words = hashes[order], position[order]
        new = np.ones(len(order), dtype=bool)  # the first with its words
        new[1:] = ordered[1:] != ordered[:-1]
        group = np.cumsum(new) - 1
        within = np.zeros(len(order), dtype=np.int64)
        known: dict[str, int] = {}
        last = -1
        for place in np.flatnonzero(np.bincount(group)[group] > 1).tolist() if len(group) else []:
            if group[place] != last:
                last, known = group[place], {}
            spelled = self._spelled.ngram(int(words[place]), length)
            new[place] = spelled not in known
            within[place] = known.setdefault(spelled, len(known))
        sizes = np.bincount(group, weights=new).astype(np.int64) if len(group) else np.zeros(0, dtype=np.int64)
        entry = np.empty(len(order), dtype=np.int64)
        entry[order] = first_entry + (np.cumsum(sizes) - sizes)[group] + within
        sorted_hashes, found_words = ordered[new], words[new]
        maybe = np.zeros(1 << FILTER_BITS, dtype=bool)
        maybe[_slot(sorted_hashes)] = True
        return _Lookup(sorted_hashes, found_words, maybe, first_entry), entry

    def find(self, words: Words) -> Matches:
        """Return the n-grams of `words`, none across two texts, that are in the index."""
        found: list[tuple[int, int, int]] = []
        spelled: Spelled | None = None
        for length, hashes in _ngram_hashes(words, sorted(self._lookups), self._mask):
            lookup = self._lookups[length]
            candidates = np.flatnonzero(lookup.maybe[_slot(hashes)] & _within_text(words, length))
            places = np.searchsorted(lookup.hashes, hashes[candidates])
            there = places < len(lookup.hashes)
            there[there] = lookup.hashes[places[there]] == hashes[candidates[there]]
            for word, place in zip(candidates[there].tolist(), places[there].tolist(), strict=True):
                spelled = spelled or words.spelled()
                text = spelled.ngram(word, length)
                entry = self._entry(lookup, place, length, text)
                if entry is not None:
                    found.append((word, length, entry))
        table = np.array(sorted(found), dtype=np.int64).reshape(-1, 3)
        return Matches(table[:, 0], table[:, 1], table[:, 2])

    def _entry(self, lookup: _Lookup, place: int, length: int, text: str) -> int | None:
        """Return the entry, from `place` on, whose words are `text`."""
        value = lookup.hashes[place]
        while place < len(lookup.hashes) and lookup.hashes[place] == value:
            if self._spelled.ngram(int(lookup.words[place]), length) == text:
                return lookup.first_entry + place
            place += 1
        return None

    def items_of(self, entries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the items that hold each of `entries`: for each pair the place in `entries`, and the item."""
        first, count = self._posting_offsets[entries], self._posting_offsets[entries + 1] - self._posting_offsets[entries]
        place = np.repeat(np.arange(len(entries)), count)
        within = np.arange(len(place)) - np.repeat(np.cumsum(count) - count, count)
        return place, self._posting_items[first[place] + within]


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


def _slot(hashes: np.ndarray) -> np.ndarray:
    return (_mixed(hashes) >> np.uint64(64 - FILTER_BITS)).astype(np.int64)


def _within_text(words: Words, length: int) -> np.ndarray:
    """Return, for each n-gram of `length` words, whether it lies in one text."""
    text = words.text_of()
    return text[: max(0, len(text) - length + 1)] == text[length - 1 :]


def _ngram_hashes(words: Words, lengths: Sequence[int], mask: np.uint64) -> Iterator[tuple[int, np.ndarray]]:
    """Yield, for each of the sorted `lengths`, the hash of the n-gram that starts at each word, those across two texts included."""
    values = words.hashes
    total = np.zeros(len(values), dtype=np.uint64)
    powers = _powers(WORD_FACTOR, max(lengths, default=1))
    for place in range(max(lengths, default=0)):
        count = max(0, len(values) - place)
        total = total[:count] + values[place:] * powers[place]
        if place + 1 in lengths:
            yield place + 1, total & mask
