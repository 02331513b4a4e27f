"""A vocabulary as an open hash table over code points, for kernels that look up every word of a text.

A word is a longest stretch of word characters, as ``\\w+`` of `re` finds it. Import it inside functions: numba loads with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

from pipelines.native import ARRAYS, INNER

OFFSET, PRIME = np.uint64(0xCBF29CE484222325), np.uint64(0x100000001B3)
"""Of FNV-1a, 64 bits, over code points."""
WORD, SPACE, STOP, CLOSER, LINE_FEED = 1, 2, 4, 8, 16
"""Classes of characters: in words, white space, an end of a sentence, what may close one before the space, and the line feed."""
STOPS, CLOSERS = ".!?", "\"'”’)]"


class Vocabulary(NamedTuple):
    """Words by number, to be found by `lookup`."""

    table: np.ndarray
    """int32: number of the word at each hash, -1 where there is none; its length is a power of two."""
    letters: np.ndarray
    """uint32: the code points of all words, one after the other."""
    bounds: np.ndarray
    """int64, one more than words."""


def vocabulary(words: Sequence[str]) -> Vocabulary:
    """Return the vocabulary of `words`, numbered in their order."""
    letters, bounds = encode(words)
    return Vocabulary(_hash_table(letters, bounds, 1 << (4 * len(words)).bit_length()), letters, bounds)


def encode(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the code points of all `texts` (uint32) and where each begins (int64, one more than texts)."""
    bounds = np.zeros(len(texts) + 1, np.int64)
    np.cumsum([len(text) for text in texts], out=bounds[1:])
    return np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), np.uint32), bounds


@cache
def character_classes() -> np.ndarray:
    """Return the classes of every code point, uint8, as `re` and `str` see them."""
    classes = np.zeros(0x110000, np.uint8)
    for code in range(0x110000):
        character = chr(code)
        if character.isalnum():
            classes[code] = WORD
        elif character.isspace():
            classes[code] = SPACE
    classes[ord("_")] = WORD
    classes[[ord(character) for character in STOPS]] |= STOP
    classes[[ord(character) for character in CLOSERS]] |= CLOSER
    classes[ord("\n")] |= LINE_FEED
    return classes


@ARRAYS
def _hash_table(letters: np.ndarray, bounds: np.ndarray, size: int) -> np.ndarray:
    table = np.full(size, -1, np.int32)
    for word in range(len(bounds) - 1):
        hashed = OFFSET
        for place in range(bounds[word], bounds[word + 1]):
            hashed = (hashed ^ np.uint64(letters[place])) * PRIME
        slot = np.int64(hashed & np.uint64(size - 1))
        while table[slot] >= 0:
            slot = (slot + 1) & (size - 1)
        table[slot] = word
    return table


@INNER
def lookup(codes, start, end, hashed, table, letters, bounds):  # noqa: ANN001, ANN202
    """Return the number of the word ``codes[start:end]`` with hash `hashed`, -1 where it is not in the vocabulary."""
    mask = len(table) - 1
    slot = np.int64(hashed & np.uint64(mask))
    while table[slot] >= 0:
        word = table[slot]
        first = bounds[word]
        if bounds[word + 1] - first == end - start:
            place = 0
            while place < end - start and letters[first + place] == codes[start + place]:
                place += 1
            if place == end - start:
                return word
        slot = (slot + 1) & mask
    return np.int32(-1)


def count_groups(texts: Sequence[str], words: Vocabulary, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return how often words of each group stand in each text, int64 ``(texts, groups)``, and each text's number of words.

    Args:
        texts: in lower case, if the vocabulary is.
        groups: bool of shape ``(words, groups)``: a word may be in several.
    """
    codes, bounds = encode(texts)
    return _count_groups(codes, bounds, character_classes(), *words, groups)


@ARRAYS
def _count_groups(codes, texts, classes, table, letters, bounds, groups):  # noqa: ANN001, ANN202
    found, totals = np.zeros((len(texts) - 1, groups.shape[1]), np.int64), np.zeros(len(texts) - 1, np.int64)
    for text in range(len(texts) - 1):
        place, end = texts[text], texts[text + 1]
        while place < end:
            if not classes[codes[place]] & 1:
                place += 1
                continue
            start, hashed = place, OFFSET
            while place < end and classes[codes[place]] & 1:
                hashed = (hashed ^ np.uint64(codes[place])) * PRIME
                place += 1
            totals[text] += 1
            word = lookup(codes, start, place, hashed, table, letters, bounds)
            if word >= 0:
                for group in range(groups.shape[1]):
                    found[text, group] += groups[word, group]
    return found, totals
