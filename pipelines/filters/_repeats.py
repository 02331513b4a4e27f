"""Repeated blocks and n-grams of one document, by a hash table of what was seen; equal hashes are compared character by character.

The table is one array (uint64) that all documents of a group share. A slot holds 32 bits of a hash above 1 + the number of the first
item with it, 0 where it is empty; a short document clears and uses only the front of it, which stays in the cache.
"""

from __future__ import annotations

import numpy as np

from pipelines.native import INNER, KERNEL

BASE = np.uint64(0x9E3779B97F4A7C15)
NUM_POWERS = 4096
NEWLINE = 10


def new_table(items: int) -> np.ndarray:
    """Return a table for documents of at most `items` items."""
    return np.empty(1 << max(4, (2 * items).bit_length()), np.uint64)


def powers() -> np.ndarray:
    """Return ``BASE ** i`` modulo 2^64 for i below `NUM_POWERS`."""
    factors = np.full(NUM_POWERS, BASE)
    factors[0] = 1
    return np.cumprod(factors, dtype=np.uint64)


@INNER
def power(powers: np.ndarray, exponent: int) -> np.uint64:
    """Return ``BASE ** exponent`` modulo 2^64."""
    if exponent < NUM_POWERS:
        return powers[exponent]
    result, factor = np.uint64(1), BASE
    while exponent:
        if exponent & 1:
            result *= factor
        factor *= factor
        exponent >>= 1
    return result


@INNER
def mixed(value: np.uint64) -> np.uint64:
    """Return hash `value` with its bits mixed: the lower half chooses the slot, the upper half is kept in it."""
    value = (value ^ (value >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    return value ^ (value >> np.uint64(32))


@INNER
def cleared(table: np.ndarray, items: int) -> int:
    """Clear the front of `table`, a power of two of slots, at least twice `items`; return its length."""
    size = 16
    while size < 2 * items:
        size *= 2
    for slot in range(size):
        table[slot] = 0
    return size


@INNER
def entry(value: np.uint64, item: int) -> np.uint64:
    """Return what a slot holds for `item` with hash `value`."""
    return (value & np.uint64(0xFFFFFFFF00000000)) | np.uint64(item + 1)


@INNER
def has_hash(held: np.uint64, value: np.uint64) -> bool:
    """Return whether what a slot holds has the upper half of hash `value`."""
    return (held ^ value) >> np.uint64(32) == 0


@INNER
def item_of(held: np.uint64) -> int:
    """Return the item that a slot holds."""
    return np.int64(held & np.uint64(0xFFFFFFFF)) - 1


@KERNEL
def repeated_blocks(codes: np.ndarray, starts: np.ndarray, ends: np.ndarray, count: int, table: np.ndarray) -> tuple[int, int]:
    """Return how many of the first `count` blocks were seen before, and their characters; a first copy does not count."""
    if count < 2:
        return 0, 0
    size = cleared(table, count)
    repeated, characters = 0, 0
    for block in range(count):
        start, end = starts[block], ends[block]
        value = np.uint64(end - start)
        for place in range(start, end - 1, 2):
            value = (value ^ np.uint64(codes[place]) ^ (np.uint64(codes[place + 1]) << np.uint64(32))) * BASE
            value ^= value >> np.uint64(47)
        if (end - start) & 1:
            value = (value ^ np.uint64(codes[end - 1])) * BASE
        value = mixed(value)
        slot = np.int64(value) & (size - 1)
        while table[slot]:
            other = item_of(table[slot])
            if has_hash(table[slot], value) and ends[other] - starts[other] == end - start:
                same = True
                for offset in range(end - start):
                    if codes[starts[other] + offset] != codes[start + offset]:
                        same = False
                        break
                if same:
                    break
            slot = (slot + 1) & (size - 1)
        if table[slot]:
            repeated += 1
            characters += end - start
        else:
            table[slot] = entry(value, block)
    return repeated, characters


@KERNEL
def _find_newlines(codes: np.ndarray, places: np.ndarray) -> int:
    """Write the places of all newlines in `codes` to `places`, followed by the length of `codes`; return their count."""
    count = 0
    for place in range(len(codes)):
        places[count] = place
        count += codes[place] == NEWLINE
    places[count] = len(codes)
    return count


def newlines(codes: np.ndarray) -> np.ndarray:
    """Return the places of all newlines in `codes` (int32), followed by its length."""
    places = np.empty(len(codes) + 1, np.int32)
    return places[: _find_newlines(codes, places) + 1]
