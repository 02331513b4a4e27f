"""Long spans of tokens that held-out windows and documents share with training text, found by rolling hashes.

A span of 2**n tokens is hashed from those of half its length: ``h(2m, i) = h(m, i) * B**m + h(m, i + m)`` modulo 2**64, so n passes
over the text hash every place of it. 64 bits decide: a false match is expected once in 2**64 / (places x spans) texts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from pipelines.shards import PassagePool

SPAN = 32
"""Tokens; about a sentence. A power of two."""
BASE = np.uint64(0x9E3779B97F4A7C15)
TOKENS_AT_A_TIME = 2_000_000
TABLE_BITS = 22


def windows_in_training(windows_WT: np.ndarray, pools: Iterable[PassagePool]) -> np.ndarray:
    """Return whether each window holds a span of `SPAN` tokens that a passage of `pools` holds too.

    Args:
        windows_WT: integers, shape (W, T); windows shorter than a span share none.

    Returns:
        bool, shape (W,).
    """
    spans_WS = span_hashes(windows_WT)
    return _held(spans_WS, pools).any(axis=1)


def tokens_in_training(documents: Sequence[np.ndarray], pools: Iterable[PassagePool]) -> np.ndarray:
    """Return how many tokens of each document lie in a span of `SPAN` tokens that a passage of `pools` holds too.

    Args:
        documents: token ids of each document; one shorter than a span shares none.

    Returns:
        int64, shape (documents,).
    """
    hashes = [span_hashes(np.asarray(tokens)) for tokens in documents]
    held = np.split(_held(np.concatenate(hashes), pools), np.cumsum([len(mine) for mine in hashes])[:-1]) if hashes else []
    return np.asarray([_covered(spans) for spans in held], dtype=np.int64)


def _covered(spans: np.ndarray) -> int:
    """Return how many tokens the marked spans cover together, of the document whose spans they are."""
    (starts,) = np.nonzero(spans)
    return int(np.minimum(np.diff(starts), SPAN).sum()) + SPAN if len(starts) else 0


def _held(spans: np.ndarray, pools: Iterable[PassagePool]) -> np.ndarray:
    """Return which of the hashed `spans` a passage of `pools` holds, in their shape."""
    if not spans.size:
        return np.zeros(spans.shape, dtype=bool)
    wanted = np.unique(spans)
    table = np.zeros(2**TABLE_BITS, dtype=bool)
    table[_slot(wanted)] = True
    found = np.zeros(len(wanted), dtype=bool)
    for hashes in _hashed_passages(pools):
        likely = hashes[table[_slot(hashes)]]
        places = np.searchsorted(wanted, likely)
        places[places == len(wanted)] = 0
        found[places[wanted[places] == likely]] = True
    return found[np.searchsorted(wanted, spans)]


def span_hashes(tokens: np.ndarray) -> np.ndarray:
    """Return the hash of each span of `SPAN` tokens along the last axis, uint64; that axis shrinks by ``SPAN - 1``."""
    if tokens.shape[-1] < SPAN:
        return np.empty((*tokens.shape[:-1], 0), dtype=np.uint64)
    hashes = (tokens.astype(np.uint64) + np.uint64(1)) * BASE
    length, power = 1, BASE
    with np.errstate(over="ignore"):
        while length < SPAN:
            hashes = hashes[..., :-length] * power + hashes[..., length:]
            length, power = 2 * length, power * power
    return hashes


def _slot(hashes: np.ndarray) -> np.ndarray:
    return (hashes >> np.uint64(64 - TABLE_BITS)).astype(np.int64)


def _hashed_passages(pools: Iterable[PassagePool]) -> Iterator[np.ndarray]:
    """Yield the hashes of the spans that lie inside one passage, in stretches that fit memory."""
    for pool in pools:
        for shard in np.unique(pool.shard):
            mine = np.nonzero(pool.shard == shard)[0]
            first, last = pool.offset[mine], pool.offset[mine] + pool.length[mine]
            for low in range(int(first.min()), int(last.max()), TOKENS_AT_A_TIME):
                high = min(low + TOKENS_AT_A_TIME + SPAN - 1, int(last.max()))
                hashes = span_hashes(np.asarray(pool.tokens[shard][low:high]))
                yield hashes[_inside(first - low, last - low - SPAN + 1, len(hashes))]


def _inside(first: np.ndarray, stop: np.ndarray, size: int) -> np.ndarray:
    """Return which of `size` places lie in one of the stretches from `first` to `stop`, which do not overlap."""
    kept = stop > first
    edges = np.zeros(size + 1, dtype=np.int32)
    np.add.at(edges, np.clip(first[kept], 0, size), 1)
    np.add.at(edges, np.clip(stop[kept], 0, size), -1)
    return np.cumsum(edges[:-1]) > 0
