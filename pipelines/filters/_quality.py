"""Gopher's quality scores of a group of documents, in native code."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipelines.filters._punctuation import rule_classes
from pipelines.native import INNER, KERNEL
from pipelines.words import Words, encode
from pipelines.words._characters import IS_ALPHA, LINE_BREAK, SPACE, SYMBOL
from pipelines.words._strings import PAIRS, pair

NUMBER, HYPHEN, PERIOD, BULLET, ELLIPSIS, CARRIAGE_RETURN, NEWLINE = map(ord, "#-.•…\r\n")
COLUMNS = 8


@INNER
def _stop_word(codes: np.ndarray, start: int, end: int, stop_codes: np.ndarray, stop_bounds: np.ndarray, by_pair: np.ndarray) -> int:
    """Return the number of the stop word ``codes[start:end]``, -1 where it is none; `by_pair` masks them by their first characters."""
    candidates = by_pair[pair(codes, start, end)]
    number = 0
    while candidates:
        begin = stop_bounds[number]
        if candidates & np.uint64(1) and stop_bounds[number + 1] - begin == end - start:
            same = True
            for offset in range(end - start):
                if stop_codes[begin + offset] != codes[start + offset]:
                    same = False
                    break
            if same:
                return number
        candidates >>= np.uint64(1)
        number += 1
    return -1


@KERNEL
def _scores(
    text_codes: np.ndarray,
    bounds: np.ndarray,
    codes: np.ndarray,
    starts: np.ndarray,
    ends: np.ndarray,
    offsets: np.ndarray,
    classes: np.ndarray,
    stop_codes: np.ndarray,
    stop_bounds: np.ndarray,
    by_pair: np.ndarray,
    out: np.ndarray,
) -> None:
    """Fill `out`, a row per text: words that are no symbols, their mean length, #, ..., bullets, line ends, letters, stop words."""
    longest = 0
    for number in range(len(stop_bounds) - 1):
        longest = max(longest, stop_bounds[number + 1] - stop_bounds[number])
    for text in range(len(bounds) - 1):
        count = offsets[text + 1] - offsets[text]
        num_words, length, letters = 0, 0, 0
        found = np.uint64(0)
        for word in range(offsets[text], offsets[text + 1]):
            symbol, any_kind = np.uint32(SYMBOL), np.uint32(0)
            for place in range(starts[word], ends[word]):
                kind = classes[codes[place]]
                symbol &= kind
                any_kind |= kind
            size = ends[word] - starts[word]
            if not symbol:
                num_words += 1
                length += size
            if any_kind & IS_ALPHA:
                letters += 1
            if size <= longest:
                number = _stop_word(codes, starts[word], ends[word], stop_codes, stop_bounds, by_pair)
                if number >= 0:
                    found |= np.uint64(1) << np.uint64(number)
        stop_words = 0
        while found:
            found &= found - np.uint64(1)
            stop_words += 1
        numbers, ellipses, run = 0, 0, 0
        lines, bullets, endings = 0, 0, 0
        blank, gap, periods, ellipsis = True, False, 0, False  # the last two: at the end of what is not white space
        place, end = bounds[text], bounds[text + 1]
        open_line = False
        while place < end:
            code = text_codes[place]
            kind = classes[code]
            place += 1
            if code == PERIOD:
                run += 1
                if run == 3:
                    ellipses += 1
                    run = 0
            else:
                run = 0
                if code == NUMBER:
                    numbers += 1
                elif code == ELLIPSIS:
                    ellipses += 1
            if kind & LINE_BREAK:
                if code == CARRIAGE_RETURN and place < end and text_codes[place] == NEWLINE:
                    place += 1
                lines += 1
                endings += ellipsis or periods >= 3
                blank, gap, periods, ellipsis, open_line = True, False, 0, False, False
                continue
            open_line = True
            if kind & SPACE:
                gap = True
                continue
            if blank:
                blank = False
                bullets += code == BULLET or code == HYPHEN
            periods = 0 if code != PERIOD else 1 if gap else periods + 1
            ellipsis = code == ELLIPSIS
            gap = False
        if open_line:
            lines += 1
            endings += ellipsis or periods >= 3
        out[text, 0] = num_words
        out[text, 1] = length / num_words if num_words else np.nan
        out[text, 2] = numbers / count if count else np.nan
        out[text, 3] = ellipses / count if count else np.nan
        out[text, 4] = bullets / lines if lines else np.nan
        out[text, 5] = endings / lines if lines else np.nan
        out[text, 6] = letters / count if count else np.nan
        out[text, 7] = stop_words


def quality_scores(words: Words, stop_words: Sequence[str]) -> np.ndarray:
    """Return float64 ``(texts, COLUMNS)``; NaN where a ratio has nothing to divide by. At most 64 stop words."""
    out = np.empty((len(words.counts), COLUMNS))
    stop_codes, stop_bounds = encode(stop_words)
    by_pair = np.zeros(PAIRS, np.uint64)
    for number in range(len(stop_words)):
        by_pair[pair(stop_codes, stop_bounds[number], stop_bounds[number + 1])] |= np.uint64(1) << np.uint64(number)
    texts = (words.text_codes, words.text_bounds)
    _scores(*texts, words.codes, words.starts, words.ends, words.offsets, rule_classes(), stop_codes, stop_bounds, by_pair, out)
    return out
