"""Words between white space, and words between Unicode's word boundaries."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from pipelines.native import KERNEL
from pipelines.words._characters import SPACE, character_classes

if TYPE_CHECKING:
    import regex


@KERNEL
def _split(codes: np.ndarray, bounds: np.ndarray, classes: np.ndarray, starts: np.ndarray, ends: np.ndarray, offsets: np.ndarray) -> int:
    """Fill `starts`, `ends` and `offsets` with the runs of characters that are no white space; return their count."""
    count = 0
    offsets[0] = 0
    for text in range(len(bounds) - 1):
        place, stop = bounds[text], bounds[text + 1]
        while place < stop:
            if classes[codes[place]] & SPACE:
                place += 1
                continue
            starts[count] = place
            while place < stop and not classes[codes[place]] & SPACE:
                place += 1
            ends[count] = place
            count += 1
        offsets[text + 1] = count
    return count


def split_at_spaces(codes: np.ndarray, bounds: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return starts and ends of the words (int32, offsets in `codes`) and each text's first word (int64, one more than texts)."""
    room = len(codes) // 2 + len(bounds)
    starts, ends, offsets = np.empty(room, np.int32), np.empty(room, np.int32), np.empty(len(bounds), np.int64)
    count = _split(codes, bounds, character_classes(), starts, ends, offsets)
    return starts[:count].copy(), ends[:count].copy(), offsets


@cache
def _boundary() -> regex.Pattern[str]:
    import regex

    return regex.compile(r"\b", regex.WORD)


def split_at_boundaries(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return as `split_at_spaces` the stretches between default word boundaries (Unicode Standard Annex 29) that hold a letter or digit."""
    starts: list[int] = []
    ends: list[int] = []
    offsets = np.zeros(len(texts) + 1, np.int64)
    base = 0
    for number, text in enumerate(texts):
        cuts = [match.start() for match in _boundary().finditer(text)]
        for start, end in pairwise([0, *cuts, len(text)] if text else []):
            if any(map(str.isalnum, text[start:end])):
                starts.append(base + start)
                ends.append(base + end)
        base += len(text)
        offsets[number + 1] = len(starts)
    return np.array(starts, np.int32), np.array(ends, np.int32), offsets
