"""An n-gram language model with modified Kneser-Ney smoothing, in hash tables of n-grams and of contexts.

Chen and Goodman 1999, "An empirical study of smoothing techniques for language modeling", interpolated form: discounts
D1, D2, D3+ by order (its section 3.2), continuation counts below the highest order, the unigrams interpolated with a uniform
distribution, to whose mass an unknown word is left. N-grams of order 3 and more that were seen once can be pruned; their
mass goes to the lower order. An n-gram is its 64-bit hash: two share one with a chance of about 1e-7 in a million.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipelines.filters._hashed_words import joined
from pipelines.native import INNER, KERNEL

START = np.uint64(0x5BF03635F0935AD1)
"""Stands before a document's first word."""
FALLBACK = (0.5, 1.0, 1.5)
"""Discounts where the counts of counts do not allow an estimate (KenLM's ``--discount_fallback``)."""
LARGEST_LOAD = 0.6


@dataclass(frozen=True)
class NgramModel:
    """Hash tables with open addressing; a key of 0 is an empty place."""

    ngram_keys: np.ndarray
    """uint64: n-grams of all orders."""
    ngram_values: np.ndarray
    """float32: the discounted probability of the n-gram's last word after the others; of a unigram, its probability."""
    context_keys: np.ndarray
    """uint64: contexts of all orders above the first."""
    context_values: np.ndarray
    """float32: the mass that a context leaves to the lower order."""
    unknown: float
    """Probability of a word that was not seen."""


def fit(hashes: np.ndarray, offsets: np.ndarray, *, order: int, prune: bool) -> NgramModel:
    """Return the model of the words `hashes` (uint64) of documents ``offsets[d]:offsets[d + 1]``."""
    counts = None
    ngrams, contexts, held = [], [], np.zeros(0, dtype=np.int64)
    for n in range(order, 0, -1):
        keys = _keys(hashes, offsets, n)
        if counts is None:
            unique, first, counts = np.unique(keys, return_index=True, return_counts=True)
        else:  # distinct words seen to the left: one for each distinct n-gram of the order above
            unique, first, counts = np.unique(keys[first], return_index=True, return_counts=True)
            first = _first_of(keys, unique)
        if n == 1:
            break
        found = _contexts(hashes, offsets, n)
        values, heads, left = _discounted(counts, found[first], prune=prune and n > 2)
        kept = values > 0
        ngrams.append((unique[kept], values[kept]))
        held = np.concatenate([held, first[kept]])
        followed = (left < 1) | np.isin(heads, found[held])  # a context stays where it, or a longer one, has an n-gram
        contexts.append((heads[followed], left[followed]))
    values, _, left = _discounted(counts, np.zeros(len(counts), dtype=np.uint64), prune=False)
    uniform = float(left[0]) / (len(unique) + 1)
    ngrams.append((unique, values + uniform))
    ngram_keys, ngram_values = _table(*map(np.concatenate, zip(*ngrams, strict=True)))
    nothing = (np.zeros(0, dtype=np.uint64), np.zeros(0))
    context_keys, context_values = _table(*map(np.concatenate, zip(nothing, *contexts, strict=True)))
    return NgramModel(ngram_keys, ngram_values, context_keys, context_values, uniform)


def log_probabilities(hashes: np.ndarray, offsets: np.ndarray, model: NgramModel, *, order: int) -> tuple[np.ndarray, np.ndarray]:
    """Return each document's sum of log probabilities (nats) of its words, by the whole model and by its unigrams alone."""
    tables = (model.ngram_keys, model.ngram_values, model.context_keys, model.context_values)
    whole, single = np.zeros(len(offsets) - 1), np.zeros(len(offsets) - 1)
    _log_probabilities(hashes, offsets, *tables, model.unknown, order, whole, single)
    return whole, single


def _discounted(counts: np.ndarray, heads: np.ndarray, *, prune: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return each n-gram's discounted share of its context, the contexts, and the mass that each leaves."""
    of_counts = [float((counts == number).sum()) for number in (1, 2, 3, 4)]
    discounts = np.array([0.0, *FALLBACK])
    if all(of_counts):
        share = of_counts[0] / (of_counts[0] + 2 * of_counts[1])
        found = [number - (number + 1) * share * of_counts[number] / of_counts[number - 1] for number in (1, 2, 3)]
        if all(0 < value < number for number, value in enumerate(found, start=1)):
            discounts[1:] = found
    unique, place = np.unique(heads, return_inverse=True)
    totals = np.bincount(place, weights=counts)
    values = (counts - discounts[np.minimum(counts, 3)]) / totals[place]
    if prune:
        values[counts < 2] = 0.0
    return values, unique, 1.0 - np.bincount(place, weights=values)


def _first_of(keys: np.ndarray, unique: np.ndarray) -> np.ndarray:
    """Return a place in `keys` of each of `unique`."""
    found, first = np.unique(keys, return_index=True)
    return first[np.searchsorted(found, unique)]


def _table(keys: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    size = 1 << max(4, int(np.ceil(np.log2(max(1, len(keys)) / LARGEST_LOAD))))
    table, found = np.zeros(size, dtype=np.uint64), np.zeros(size, dtype=np.float32)
    _fill(keys, values.astype(np.float32), table, found)
    return table, found


@KERNEL
def _fill(keys: np.ndarray, values: np.ndarray, table: np.ndarray, found: np.ndarray) -> None:
    size = len(table)
    for number in range(len(keys)):
        place = keys[number] & np.uint64(size - 1)
        while table[place] != 0 and table[place] != keys[number]:
            place = (place + np.uint64(1)) & np.uint64(size - 1)
        table[place] = keys[number]
        found[place] = values[number]


@INNER
def _look_up(table: np.ndarray, values: np.ndarray, key: np.uint64) -> np.float32:
    mask = np.uint64(len(table) - 1)
    place = key & mask
    while table[place] != 0:
        if table[place] == key:
            return values[place]
        place = (place + np.uint64(1)) & mask
    return np.float32(-1.0)


@INNER
def _key(hashes: np.ndarray, start: int, last: int, begin: int) -> np.uint64:
    """Return the hash of words ``begin..last`` of the document that starts at `start`; before it stand start marks."""
    value = np.uint64(last - begin + 1)  # n-grams of different orders are different keys
    for place in range(begin, last + 1):
        value = joined(value, hashes[place] if place >= start else START)
    return value | np.uint64(1)  # never the empty place's key


def _keys(hashes: np.ndarray, offsets: np.ndarray, n: int) -> np.ndarray:
    """Return the n-gram that ends at each word."""
    keys = np.empty(len(hashes), dtype=np.uint64)
    _write_keys(hashes, offsets, n, 0, keys)
    return keys


def _contexts(hashes: np.ndarray, offsets: np.ndarray, n: int) -> np.ndarray:
    """Return the context of the n-gram that ends at each word."""
    keys = np.empty(len(hashes), dtype=np.uint64)
    _write_keys(hashes, offsets, n, 1, keys)
    return keys


@KERNEL
def _write_keys(hashes: np.ndarray, offsets: np.ndarray, n: int, before: int, keys: np.ndarray) -> None:
    for document in range(len(offsets) - 1):
        for place in range(offsets[document], offsets[document + 1]):
            keys[place] = _key(hashes, offsets[document], place - before, place - n + 1)


@KERNEL
def _log_probabilities(
    hashes: np.ndarray,
    offsets: np.ndarray,
    ngram_keys: np.ndarray,
    ngram_values: np.ndarray,
    context_keys: np.ndarray,
    context_values: np.ndarray,
    unknown: float,
    order: int,
    whole: np.ndarray,
    single: np.ndarray,
) -> None:
    for document in range(len(offsets) - 1):
        start = offsets[document]
        for place in range(start, offsets[document + 1]):
            value = _look_up(ngram_keys, ngram_values, _key(hashes, start, place, place))
            probability = unknown if value < 0 else float(value)
            single[document] += np.log(probability)
            for n in range(2, order + 1):
                left = _look_up(context_keys, context_values, _key(hashes, start, place - 1, place - n + 1))
                if left < 0:
                    break  # a context that was not seen has no longer one that was
                value = _look_up(ngram_keys, ngram_values, _key(hashes, start, place, place - n + 1))
                probability = left * probability + max(value, np.float32(0.0))
            whole[document] += np.log(probability)
