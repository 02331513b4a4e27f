"""Shared spans against a search by hand."""

from __future__ import annotations

import numpy as np
import pytest

from pipelines import shared_spans
from pipelines.shards import PassagePool
from pipelines.shared_spans import SPAN, span_hashes, windows_in_training


def pool(tokens: np.ndarray, lengths: list[int], kept: list[bool]) -> PassagePool:
    offset = np.cumsum([0, *lengths[:-1]])
    chosen = np.asarray(kept)
    return PassagePool([tokens], np.zeros(sum(kept), dtype=int), offset[chosen], np.asarray(lengths)[chosen], end_of_text=0)


def spans(tokens: np.ndarray) -> set[tuple[int, ...]]:
    return {tuple(tokens[place : place + SPAN].tolist()) for place in range(len(tokens) - SPAN + 1)}


@pytest.mark.parametrize("at_a_time", [40, 101, 10**6])
@pytest.mark.parametrize("seed", range(4))
def test_a_window_is_found_where_a_kept_passage_holds_a_span_of_it(monkeypatch: pytest.MonkeyPatch, seed: int, at_a_time: int) -> None:
    monkeypatch.setattr(shared_spans, "TOKENS_AT_A_TIME", at_a_time)
    random = np.random.default_rng(seed)
    lengths = random.integers(10, 90, 12).tolist()
    kept = (random.random(12) < 0.6).tolist()
    text = random.integers(0, 500, sum(lengths)).astype(np.uint16)
    windows = random.integers(0, 500, (30, 70))
    for window in windows[:20]:  # most of them copy a stretch, of about a span, into their middle
        length = int(random.integers(SPAN - 4, SPAN + 5))
        place = int(random.integers(0, len(text) - length))
        window[10 : 10 + length] = text[place : place + length]
    ends = np.cumsum(lengths)
    passages = [text[end - length : end] for end, length, keep in zip(ends, lengths, kept, strict=True) if keep]
    held = set().union(*(spans(passage) for passage in passages))
    expected = [bool(spans(window) & held) for window in windows]
    assert windows_in_training(windows, [pool(text, lengths, kept)]).tolist() == expected
    assert any(expected) and not all(expected)


def test_windows_shorter_than_a_span_share_none() -> None:
    assert span_hashes(np.ones((3, SPAN - 1), dtype=int)).shape == (3, 0)
    assert not windows_in_training(np.ones((3, SPAN - 1), dtype=int), [pool(np.ones(99, dtype=int), [99], [True])]).any()
