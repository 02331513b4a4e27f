"""Sequences of tokens that spell an exception of spaCy with affixes in it: joined or split again as the exception says."""

from __future__ import annotations

import numpy as np

from pipelines.native import INNER, KERNEL
from pipelines.words._strings import ACTIVE, FIRST, MAX_LENGTH, emit_cuts, find, pair

MAX_TOKENS = 12
"""Tokens of the longest sequence, and more."""
SEEN, FIRST_SIZE, TAKEN = np.uint32(1), np.uint32(2), np.uint32(16)
"""Marks of a token: part of a match; ``FIRST_SIZE << n``: n tokens from it on match; from bit `TAKEN` on, the tokens taken there."""


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
    One token alone bars nothing and is not looked at. `marks` is left as it was found: zero.
    """
    begin, stop = count, first
    for token in range(first, count - 1):
        start, size = starts[token], ends[token] - starts[token]
        buffer[0], buffer[1] = codes[start], codes[start + 1 if size > 1 else starts[token + 1]]
        bucket = pair(buffer, 0, 2)
        if size > MAX_LENGTH or not (sequences[FIRST + bucket] >> np.uint32(size)) & np.uint32(1):
            continue
        lengths = sequences[bucket]
        last = token + 1
        while last < count and last - token < MAX_TOKENS:
            size += ends[last] - starts[last]
            last += 1
            if size > MAX_LENGTH:
                break
            if (lengths >> np.uint32(size)) & np.uint32(1) and _sequence(codes, starts, ends, token, last, sequences, buffer):
                marks[token] |= FIRST_SIZE << np.uint32(last - token)
                begin, stop = min(begin, token), token + 1
    for size in range(MAX_TOKENS, 1, -1):
        for token in range(begin, stop):
            if not marks[token] & (FIRST_SIZE << np.uint32(size)):
                continue
            last = token + size - 1
            if not marks[token] & SEEN and not marks[last] & SEEN:
                record = _sequence(codes, starts, ends, token, token + size, sequences, buffer)
                if ends[last] - starts[token] == np.int64(sequences[record]):
                    marks[token] |= np.uint32(size) << TAKEN
            for inner in range(token, token + size):
                marks[inner] |= SEEN
    if begin == count:
        return count
    for token in range(begin, count):  # the old tokens move out of the way: a sequence may have more than it replaces
        starts[count + token - begin], ends[count + token - begin] = starts[token], ends[token]
    place, token, moved = begin, begin, count - begin
    while token < count:
        size = np.int64(marks[token] >> TAKEN)
        if not size:
            starts[place], ends[place] = starts[token + moved], ends[token + moved]
            place += 1
            token += 1
            continue
        start, end = starts[token + moved], ends[token + size - 1 + moved]
        record = find(sequences, codes, start, end)
        place = emit_cuts(np.int64(sequences[record + 2]), start, end, starts, ends, place)
        token += size
    for token in range(begin, count):
        marks[token] = 0
    return place
