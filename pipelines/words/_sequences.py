"""Sequences of tokens that spell an exception of spaCy with affixes in it: joined or split again as the exception says."""

from __future__ import annotations

import numpy as np

from pipelines.words._native import INNER, KERNEL
from pipelines.words._strings import ACTIVE, MAX_LENGTH, emit_cuts, find, pair

MAX_TOKENS = 12
"""Tokens of the longest sequence, and more."""


@KERNEL
def _sequence(
    codes: np.ndarray, starts: np.ndarray, ends: np.ndarray, first: int, last: int, sequences: np.ndarray, buffer: np.ndarray
) -> int:
    """Return the record of the sequence that tokens ``first:last`` spell, spaces between them left out; 0 where there is none."""
    length, cuts = 0, 0
    for token in range(first, last):
        if length:
            cuts |= 1 << (length - 1)
        size = ends[token] - starts[token]
        if length + size > MAX_LENGTH:
            return 0
        for offset in range(size):
            buffer[length + offset] = codes[starts[token] + offset]
        length += size
    record = find(sequences, buffer, 0, length)
    return record if record and sequences[record + 1] == cuts else 0


@INNER
def is_suspect(
    codes: np.ndarray, starts: np.ndarray, ends: np.ndarray, first: int, count: int, sequences: np.ndarray, buffer: np.ndarray
) -> bool:
    """Return whether tokens ``first:count`` of one chunk hold a sequence whose cuts change."""
    for token in range(first, count - 1):
        lengths = sequences[ACTIVE + pair(codes, starts[token], ends[count - 1])]
        if not lengths:
            continue
        for last in range(token + 2, min(count, token + MAX_TOKENS) + 1):
            length = ends[last - 1] - starts[token]
            if length > MAX_LENGTH:
                break
            if not (lengths >> np.uint32(length)) & np.uint32(1):
                continue
            record = _sequence(codes, starts, ends, token, last, sequences, buffer)
            if record and sequences[record + 1] != sequences[record + 2]:
                return True
    return False


@KERNEL
def apply_sequences(
    codes: np.ndarray,
    starts: np.ndarray,
    ends: np.ndarray,
    first: int,
    count: int,
    sequences: np.ndarray,
    buffer: np.ndarray,
    marks: np.ndarray,
) -> int:
    """Join or split the tokens ``first:count`` of a run as the sequences in them say; return the count of tokens after it.

    The longest match wins, then the first; a match, taken or not, bars every later one that begins or ends within it.
    `marks` holds per token 1 where it was seen, plus twice the record taken there; it is left as it was found: zero.
    """
    for size in range(MAX_TOKENS, 0, -1):
        for token in range(first, count - size + 1):
            record = _sequence(codes, starts, ends, token, token + size, sequences, buffer)
            if not record:
                continue
            last = token + size - 1
            together = ends[last] - starts[token] == np.int64(sequences[record])
            if together and not marks[token] & 1 and not marks[last] & 1:
                marks[token] |= 2 * record
            for inner in range(token, token + size):
                marks[inner] |= 1
    for token in range(first, count):  # the old tokens move out of the way: a sequence may have more than it replaces
        starts[count + token - first], ends[count + token - first] = starts[token], ends[token]
    place, token, size = first, count, count - first
    while token < count + size:
        record = marks[first + token - count] >> 1
        if not record:
            starts[place], ends[place] = starts[token], ends[token]
            place += 1
            token += 1
            continue
        begin = starts[token]
        end = begin + np.int64(sequences[record])
        while token < count + size and starts[token] < end:
            token += 1
        place = emit_cuts(np.int64(sequences[record + 2]), begin, end, starts, ends, place)
    for token in range(first, count):
        marks[token] = 0
    return place
