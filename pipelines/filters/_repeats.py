"""Repeated blocks and n-grams of one document, by a hash table of what was seen; equal hashes are compared character by character.

The table is four arrays that all documents of a group share; a slot counts as empty where its stamp is not that of the search under way.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pipelines.words._native import INNER, KERNEL

BASE = np.uint64(0x9E3779B97F4A7C15)
NUM_POWERS = 4096


class Table(NamedTuple):
    """Room for what one document holds, at most half full."""

    hashes: np.ndarray
    """uint64, a power of two long."""
    items: np.ndarray
    """int32: the number of the first item with this hash."""
    stamps: np.ndarray
    """int32: the search that filled the slot."""
    clock: np.ndarray
    """int32 ``(1,)``: the search under way."""


def new_table(items: int) -> Table:
    """Return an empty table for documents of at most `items` items."""
    size = 1 << max(4, (2 * items).bit_length())
    return Table(np.empty(size, np.uint64), np.empty(size, np.int32), np.zeros(size, np.int32), np.zeros(1, np.int32))


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
def first_slot(value: np.uint64, size: int) -> int:
    """Return the slot at which the search for hash `value` begins in a table of `size` slots."""
    return np.int64((value ^ (value >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9) >> np.uint64(20)) & (size - 1)


@INNER
def fitting_size(items: int, available: int) -> int:
    """Return the power of two at least twice `items`: a short document keeps to a part of the table that stays in the cache."""
    size = 16
    while size < 2 * items and size < available:
        size *= 2
    return size


@KERNEL
def repeated_blocks(
    codes: np.ndarray,
    starts: np.ndarray,
    ends: np.ndarray,
    count: int,
    hashes: np.ndarray,
    items: np.ndarray,
    stamps: np.ndarray,
    clock: np.ndarray,
) -> tuple[int, int]:
    """Return how many of the first `count` blocks were seen before, and their characters; a first copy does not count."""
    clock[0] += 1
    now = clock[0]
    size = fitting_size(count, len(stamps))
    repeated, characters = 0, 0
    for block in range(count):
        start, end = starts[block], ends[block]
        value = np.uint64(end - start)
        for place in range(start, end):
            value = (value ^ np.uint64(codes[place])) * BASE
            value ^= value >> np.uint64(32)
        slot = first_slot(value, size)
        while stamps[slot] == now:
            other = items[slot]
            if hashes[slot] == value and ends[other] - starts[other] == end - start:
                same = True
                for offset in range(end - start):
                    if codes[starts[other] + offset] != codes[start + offset]:
                        same = False
                        break
                if same:
                    break
            slot = (slot + 1) & (size - 1)
        if stamps[slot] == now:
            repeated += 1
            characters += end - start
        else:
            hashes[slot], items[slot], stamps[slot] = value, block, now
    return repeated, characters
