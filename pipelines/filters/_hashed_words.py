"""Words as 64-bit hashes, for models that only ask whether two words are the same.

A word is a run of letters, in lower case; a run of digits, whatever they are, is one word, and so is every other
character but whitespace (the normalisation of CCNet, 1911.00359, section 3.2, but that punctuation stays). Letters are the
ASCII ones and every character beyond ASCII, so scripts without spaces make one word of a run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from pipelines.native import INNER, KERNEL

GROUP_CHARACTERS = 1_000_000
"""Characters taken at a time: bounds the memory of the arrays (about 10 bytes a character)."""

_SPACE, _LETTER, _DIGIT, _OTHER = 0, 1, 2, 3
_CLASSES = np.full(256, _OTHER, dtype=np.uint8)
_CLASSES[[9, 10, 11, 12, 13, 28, 29, 30, 31, 32]] = _SPACE
_CLASSES[ord("a") : ord("z") + 1] = _LETTER
_CLASSES[128:] = _LETTER
_CLASSES[ord("0") : ord("9") + 1] = _DIGIT

_PRIME, _BASIS = np.uint64(0x100000001B3), np.uint64(0xCBF29CE484222325)  # FNV-1a, 64 bits
_M1, _M2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)  # the finalizer of SplitMix64
_S27, _S30, _S31 = np.uint64(27), np.uint64(30), np.uint64(31)
_NUMBER = np.uint64(0x9E3779B97F4A7C15)


def word_groups(texts: Sequence[str]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield ``(hashes, offsets)`` of groups of consecutive `texts`; words of text d of a group are ``offsets[d]:offsets[d + 1]``."""
    start = size = 0
    for number, text in enumerate(texts):
        if size and size + len(text) > GROUP_CHARACTERS:
            yield hash_words(texts[start:number])
            start, size = number, 0
        size += len(text)
    if start < len(texts):
        yield hash_words(texts[start:])


def hash_words(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the words of `texts`, uint64, and their offsets, int64, one more than texts."""
    encoded = [text.lower().encode("utf-8", "replace") for text in texts]
    ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
    data = np.frombuffer(b"".join(encoded), dtype=np.uint8)
    hashes, offsets = np.empty(len(data), dtype=np.uint64), np.zeros(len(ends), dtype=np.int64)
    count = _hash_words(data, ends, _CLASSES, hashes, offsets)
    return hashes[:count].copy(), offsets


@INNER
def mix(value: np.uint64) -> np.uint64:
    """Return `value` with every bit depending on every bit (SplitMix64)."""
    value = (value ^ (value >> _S30)) * _M1
    value = (value ^ (value >> _S27)) * _M2
    return value ^ (value >> _S31)


@INNER
def joined(context: np.uint64, word: np.uint64) -> np.uint64:
    """Return the hash of the n-gram `context` followed by `word`."""
    return mix(context * _M2 + word + _NUMBER)


@KERNEL
def _hash_words(data: np.ndarray, ends: np.ndarray, classes: np.ndarray, hashes: np.ndarray, offsets: np.ndarray) -> int:
    """Write the words into `hashes`, and where each text ends into `offsets`; return their number."""
    count = 0
    for document in range(len(ends) - 1):
        place, end = ends[document], ends[document + 1]
        while place < end:
            kind = classes[data[place]]
            if kind == _LETTER:
                value = _BASIS
                while place < end and classes[data[place]] == _LETTER:
                    value = (value ^ np.uint64(data[place])) * _PRIME
                    place += 1
                hashes[count] = mix(value)
                count += 1
            elif kind == _DIGIT:
                while place < end and classes[data[place]] == _DIGIT:
                    place += 1
                hashes[count] = mix(_NUMBER)
                count += 1
            else:
                if kind == _OTHER:
                    hashes[count] = mix((_BASIS ^ np.uint64(data[place])) * _PRIME)
                    count += 1
                place += 1
        offsets[document + 1] = count
    return count
