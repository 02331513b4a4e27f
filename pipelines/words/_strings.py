"""Tables of short strings that native code looks stretches of text up in, each string with the cuts that split it."""

from __future__ import annotations

import numpy as np

from pipelines.native import INNER

SLOTS = 8192
"""Slots of a table of strings; open addressing, at most a fifth filled."""
MAX_LENGTH = 12
"""Characters of the longest exception."""
PAIRS = 2048
"""Buckets of the first two characters of a string."""
ACTIVE, FIRST, SLOT, RECORD, WIDTH = PAIRS, 2 * PAIRS, 3 * PAIRS, 3 * PAIRS + SLOTS, 16
"""Where the parts of a table begin, and the length of a record.

A table of short strings is one array (uint32), which native code passes on without counting references:

    0        by `_pair` of the first two characters: bit L is set where a string of length L begins with them
    ACTIVE   the same for the strings whose two cuts differ
    FIRST    by the same: bit L is set where the first token of such a string has length L
    SLOT     by hash: 1 + the string's number, 0 where empty
    RECORD   by number: length, cuts, cuts as an exception, code points; bit k of a cut is set where a token ends after k + 1 characters
"""


@INNER
def pair(codes: np.ndarray, start: int, end: int) -> int:
    """Return the bucket of the first two characters of ``codes[start:end]``."""
    second = np.int64(codes[start + 1]) if start + 1 < end else 0
    return (np.int64(codes[start]) * 37 + second) & (PAIRS - 1)


@INNER
def _slot(codes: np.ndarray, start: int, end: int) -> int:
    value = np.uint64(0xCBF29CE484222325)
    for position in range(start, end):
        value = (value ^ np.uint64(codes[position])) * np.uint64(0x9E3779B97F4A7C15)
    return np.int64(value >> np.uint64(51))


@INNER
def find(strings: np.ndarray, codes: np.ndarray, start: int, end: int) -> int:
    """Return where the record of ``codes[start:end]`` in `strings` begins, 0 where there is none."""
    length = end - start
    if length > MAX_LENGTH or length < 1:
        return 0
    if not (strings[pair(codes, start, end)] >> np.uint32(length)) & np.uint32(1):
        return 0
    slot = _slot(codes, start, end)
    while strings[SLOT + slot]:
        record = RECORD + WIDTH * (np.int64(strings[SLOT + slot]) - 1)
        if strings[record] == length:
            same = True
            for offset in range(length):
                if strings[record + 3 + offset] != codes[start + offset]:
                    same = False
                    break
            if same:
                return record
        slot = (slot + 1) % SLOTS
    return 0


@INNER
def emit_cuts(cuts: int, start: int, end: int, starts: np.ndarray, ends: np.ndarray, count: int) -> int:
    """Add the tokens into which `cuts` split ``start:end``."""
    begin = start
    for offset in range(end - start - 1):
        if (cuts >> offset) & 1:
            starts[count], ends[count] = begin, start + offset + 1
            count += 1
            begin = start + offset + 1
    starts[count], ends[count] = begin, end
    return count + 1


def string_table(cuts: dict[str, tuple[int, int]]) -> np.ndarray:
    """Return the table of the strings in `cuts`, each with its two cuts."""
    table = np.zeros(RECORD + WIDTH * len(cuts), np.uint32)
    for number, (text, (own, as_exception)) in enumerate(cuts.items()):
        codes = code_points(text)
        record = table[RECORD + WIDTH * number :]
        record[:3] = len(text), own, as_exception
        record[3 : 3 + len(text)] = codes
        slot = int(_slot(codes, 0, len(codes)))
        while table[SLOT + slot]:
            slot = (slot + 1) % SLOTS
        table[SLOT + slot] = number + 1
        bucket = int(pair(codes, 0, len(codes)))
        table[bucket] |= 1 << len(text)
        table[ACTIVE + bucket] |= (own != as_exception) << len(text)
        table[FIRST + bucket] |= 1 << ((own & -own).bit_length() or len(text))
    return table


def code_points(text: str) -> np.ndarray:
    """Return the code points of `text`, uint32."""
    return np.array([ord(character) for character in text], np.uint32)
