"""Compiled loops of `minhash`: text to words, words to hashed n-grams, n-grams to minima, signatures to agreement.

Text comes as code points, words as UTF-8 bytes parted by one space, with the start and end of each. xxHash64 follows its specification
(https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md, seed 0). Everything is integer arithmetic: same bytes on any machine.
"""

from __future__ import annotations

import numpy as np

from pipelines.folding import DIGIT, FOLDED_CODES, MARK, SEPARATOR, SEPARATOR_SPACE, SINGLE, SLOW, SPACE, WORD
from pipelines.native import ARRAYS, INNER, KERNEL

MERSENNE = np.uint64((1 << 61) - 1)
BLOCK = 512
"""N-grams whose hashes are held at a time: they stay in the first-level cache."""

_P1, _P2, _P3 = np.uint64(0x9E3779B185EBCA87), np.uint64(0xC2B2AE3D27D4EB4F), np.uint64(0x165667B19E3779F9)
_P4, _P5 = np.uint64(0x85EBCA77C2B2AE63), np.uint64(0x27D4EB2F165667C5)


@INNER
def _u64(data: np.ndarray, place: int) -> np.uint64:
    value = np.uint64(0)
    for byte in range(8):
        value |= np.uint64(data[place + byte]) << np.uint64(8 * byte)
    return value


@INNER
def _u32(data: np.ndarray, place: int) -> np.uint64:
    value = np.uint64(0)
    for byte in range(4):
        value |= np.uint64(data[place + byte]) << np.uint64(8 * byte)
    return value


@INNER
def _left(value: np.uint64, bits: int) -> np.uint64:
    return (value << np.uint64(bits)) | (value >> np.uint64(64 - bits))


@INNER
def _round(lane: np.uint64, value: np.uint64) -> np.uint64:
    return _left(lane + value * _P2, 31) * _P1


@INNER
def xxhash64(data: np.ndarray, start: int, end: int) -> int:
    """Return the xxHash64 (seed 0) of ``data[start:end]``, uint8."""
    place = start
    if end - start >= 32:
        one, two, three, four = _P1 + _P2, _P2, np.uint64(0), np.uint64(0) - _P1
        while place + 32 <= end:
            one, two = _round(one, _u64(data, place)), _round(two, _u64(data, place + 8))
            three, four = _round(three, _u64(data, place + 16)), _round(four, _u64(data, place + 24))
            place += 32
        value = _left(one, 1) + _left(two, 7) + _left(three, 12) + _left(four, 18)
        for lane in (one, two, three, four):
            value = (value ^ _round(np.uint64(0), lane)) * _P1 + _P4
    else:
        value = _P5
    value += np.uint64(end - start)
    while place + 8 <= end:
        value = _left(value ^ _round(np.uint64(0), _u64(data, place)), 27) * _P1 + _P4
        place += 8
    if place + 4 <= end:
        value = _left(value ^ (_u32(data, place) * _P1), 23) * _P2 + _P3
        place += 4
    while place < end:
        value = _left(value ^ (np.uint64(data[place]) * _P5), 11) * _P1
        place += 1
    value = (value ^ (value >> np.uint64(33))) * _P2
    value = (value ^ (value >> np.uint64(29))) * _P3
    return value ^ (value >> np.uint64(32))


@KERNEL
def lower_minima(minima: np.ndarray, hashes: np.ndarray, count: int, multipliers: np.ndarray, increments: np.ndarray) -> None:
    """Lower `minima`, uint64 ``(P,)``, by ``((a x + b) mod 2^64) mod (2^61 - 1)`` of the first `count` of `hashes`.

    As 2^61 is 1 modulo the Mersenne prime, the remainder is the low 61 bits plus the high 3, less the prime where that is not below it.
    """
    for row in range(len(multipliers)):
        multiplier, increment, lowest = multipliers[row], increments[row], minima[row]
        for place in range(count):
            value = hashes[place] * multiplier + increment
            value = (value & MERSENNE) + (value >> np.uint64(61))
            value = min(value, value - MERSENNE)  # unsigned: the difference wraps to a large number unless it is due
            lowest = min(lowest, value)
        minima[row] = lowest


@ARRAYS
def sign_words(
    data: np.ndarray,
    starts: np.ndarray,
    ends: np.ndarray,
    offsets: np.ndarray,
    owners: np.ndarray,
    ngram: int,
    multipliers: np.ndarray,
    increments: np.ndarray,
    minima: np.ndarray,
    counts: np.ndarray,
) -> None:
    """Lower ``minima[owners[s]]`` by the n-grams of each segment s, words ``offsets[s]:offsets[s + 1]``; add their number to `counts`.

    A segment with fewer than `ngram` words, and at least one, is one n-gram.
    """
    hashes = np.empty(BLOCK, dtype=np.uint64)
    for segment in range(len(offsets) - 1):
        first, stop, owner = offsets[segment], offsets[segment + 1], owners[segment]
        if stop == first:
            continue
        width = min(ngram, stop - first)
        held = 0
        for word in range(first, stop - width + 1):
            hashes[held] = xxhash64(data, starts[word], ends[word + width - 1])
            held += 1
            if held == BLOCK:
                lower_minima(minima[owner], hashes, held, multipliers, increments)
                held = 0
        lower_minima(minima[owner], hashes, held, multipliers, increments)
        counts[owner] += stop - first - width + 1


@KERNEL
def cut_words(
    codes: np.ndarray,
    bounds: np.ndarray,
    classes: np.ndarray,
    folds: np.ndarray,
    folded: np.ndarray,
    out: np.ndarray,
    starts: np.ndarray,
    ends: np.ndarray,
    offsets: np.ndarray,
) -> int:
    """Cut the texts ``codes[bounds[t]:bounds[t + 1]]`` into folded words, each after a space in `out`; return the number of words."""
    length, words = 0, 0
    for text in range(len(bounds) - 1):
        offsets[text] = words
        inside = False
        for place in range(bounds[text], bounds[text + 1]):
            code = np.int64(codes[place])
            kind = classes[code] if code < FOLDED_CODES else (SINGLE if code < 0x40000 else SPACE)
            if kind == MARK:
                continue
            if inside and kind != WORD:
                ends[words] = length
                words += 1
                inside = False
            if kind != WORD and kind != SINGLE:
                continue
            if not inside:
                out[length] = 32
                length += 1
                starts[words] = length
                inside = True
            if code < 0x80:
                out[length] = folded[code]
                length += 1
            elif code < FOLDED_CODES:
                for byte in range(folds[code], folds[code + 1]):
                    out[length] = folded[byte]
                    length += 1
            else:
                for shift in (18, 12, 6, 0):
                    out[length] = (0xF0 if shift == 18 else 0x80) | (code >> shift) & 0x3F
                    length += 1
            if kind == SINGLE:
                ends[words] = length
                words += 1
                inside = False
        if inside:
            ends[words] = length
            words += 1
    offsets[len(bounds) - 1] = words
    return words


@KERNEL
def simplify(
    codes: np.ndarray,
    bounds: np.ndarray,
    classes: np.ndarray,
    folds: np.ndarray,
    folded: np.ndarray,
    out: np.ndarray,
    out_starts: np.ndarray,
    out_ends: np.ndarray,
) -> None:
    """Simplify the texts ``codes[bounds[t]:bounds[t + 1]]`` as datatrove does, into ``out[out_starts[t]:out_ends[t]]``, UTF-8.

    A text that the tables do not serve gets the end -1.
    """
    length = 0
    for text in range(len(bounds) - 1):
        begin = length
        place, stop = bounds[text], bounds[text + 1]
        blank = True  # what was written last is a space, or nothing was written
        while place < stop:
            code = np.int64(codes[place])
            kind = classes[code] if code < FOLDED_CODES else SLOW
            place += 1
            if kind in (SPACE, SEPARATOR_SPACE):
                if not blank:
                    out[length] = 32
                    length += 1
                blank = True
                continue
            blank = False
            if kind == SLOW:
                break
            if kind == DIGIT:
                out[length] = 48
                length += 1
                while place < stop and _kind(codes[place], classes) == DIGIT:
                    place += 1
                if place + 1 < stop and _kind(codes[place + 1], classes) == DIGIT:
                    between = _kind(codes[place], classes)
                    if between in (SEPARATOR, SEPARATOR_SPACE):
                        place += 2
                        while place < stop and _kind(codes[place], classes) == DIGIT:
                            place += 1
            elif code < 0x80:
                out[length] = folded[code]
                length += 1
            else:
                for byte in range(folds[code], folds[code + 1]):
                    out[length] = folded[byte]
                    length += 1
        if place < stop or (stop > bounds[text] and _kind(codes[stop - 1], classes) == SLOW):
            length = begin
            out_ends[text] = -1
            continue
        while length > begin and out[length - 1] == 32:
            length -= 1
        while begin < length and out[begin] == 32:
            begin += 1
        out_starts[text], out_ends[text] = begin, length


@INNER
def _kind(code: int, classes: np.ndarray) -> int:
    return classes[code] if code < FOLDED_CODES else SLOW


@ARRAYS
def joined_words(codes: np.ndarray, starts: np.ndarray, ends: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the words ``codes[starts[w]:ends[w]]`` as UTF-8 joined by spaces, and where each starts and ends there."""
    size = 1
    for word in range(len(starts)):
        size += 1 + 4 * (ends[word] - starts[word])
    out = np.empty(size, dtype=np.uint8)
    out_starts, out_ends = np.empty(len(starts), dtype=np.int64), np.empty(len(starts), dtype=np.int64)
    length = 0
    for word in range(len(starts)):
        if word:
            out[length] = 32
            length += 1
        out_starts[word] = length
        for place in range(starts[word], ends[word]):
            code = np.int64(codes[place])
            if code < 0x80:
                out[length] = code
                length += 1
                continue
            size = 2 if code < 0x800 else 3 if code < 0x10000 else 4
            out[length] = (0xF00 >> size) & 0xFF | code >> 6 * (size - 1)
            for byte in range(1, size):
                out[length + byte] = 0x80 | (code >> 6 * (size - 1 - byte)) & 0x3F
            length += size
        out_ends[word] = length
    return out, out_starts, out_ends


@ARRAYS
def band_keys(signatures: np.ndarray, bands: int, rows: int) -> np.ndarray:
    """Return for each of `signatures` and each band a hash of the band's number and positions, by the finaliser of SplitMix64.

    Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    keys = np.empty((len(signatures), bands), dtype=np.uint64)
    for document in range(len(signatures)):
        for band in range(bands):
            key = np.uint64(band) * np.uint64(0x9E3779B97F4A7C15)  # far apart, so that no position makes up for the band
            for row in range(band * rows, (band + 1) * rows):
                key += np.uint64(signatures[document, row]) + np.uint64(1)
                key = (key ^ (key >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
                key = (key ^ (key >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
                key ^= key >> np.uint64(31)
            keys[document, band] = key
    return keys
