"""Gopher's repetition scores of a group of documents, in native code."""

from __future__ import annotations

import numpy as np

from pipelines.filters._punctuation import rule_classes
from pipelines.filters._repeats import BASE, cleared, entry, has_hash, item_of, mixed, new_table, newlines, power, powers, repeated_blocks
from pipelines.native import INNER, KERNEL
from pipelines.words import Words
from pipelines.words._characters import SPACE

FIRST_TOP, LAST_TOP, FIRST_DUPLICATE, LAST_DUPLICATE = 2, 4, 5, 10
COLUMNS = 4 + (LAST_TOP - FIRST_TOP + 1) + (LAST_DUPLICATE - FIRST_DUPLICATE + 1)


@INNER
def _blocks(breaks: np.ndarray, first: int, start: int, end: int, least: int, starts: np.ndarray, ends: np.ndarray) -> int:
    """Fill `starts` and `ends` with the blocks of ``start:end`` between runs of at least `least` newlines; return their count.

    `breaks` are the places of newlines, the first one not before `start` being number `first`.
    """
    count, begin, number = 0, start, first
    while breaks[number] < end:
        place = breaks[number]
        number += 1
        while breaks[number] < end and breaks[number] == breaks[number - 1] + 1:
            number += 1
        if breaks[number - 1] - place + 1 >= least:
            starts[count], ends[count] = begin, place
            count += 1
            begin = breaks[number - 1] + 1
    starts[count], ends[count] = begin, end
    return count + 1


@INNER
def _same_words(codes: np.ndarray, starts: np.ndarray, ends: np.ndarray, one: int, other: int, n: int) -> bool:
    """Return whether the n words from `one` on are those from `other` on."""
    for offset in range(n):
        size = ends[one + offset] - starts[one + offset]
        if size != ends[other + offset] - starts[other + offset]:
            return False
        for place in range(size):
            if codes[starts[one + offset] + place] != codes[starts[other + offset] + place]:
                return False
    return True


@INNER
def _same_characters(codes: np.ndarray, starts: np.ndarray, ends: np.ndarray, one: int, other: int, n: int) -> bool:
    """Return whether the n words from `one` on, written without spaces, are those from `other` on: their borders may differ."""
    last_one, last_other = one + n, other + n
    here, there = starts[one], starts[other]
    while one < last_one and other < last_other:
        if codes[here] != codes[there]:
            return False
        here += 1
        there += 1
        if here == ends[one]:
            one += 1
            if one < last_one:
                here = starts[one]
        if there == ends[other]:
            other += 1
            if other < last_other:
                there = starts[other]
    return one == last_one and other == last_other


@INNER
def _top(
    codes: np.ndarray,
    starts: np.ndarray,
    ends: np.ndarray,
    first: int,
    count: int,
    n: int,
    sums: np.ndarray,
    lengths: np.ndarray,
    powers: np.ndarray,
    times: np.ndarray,
    table: np.ndarray,
) -> int:
    """Return times x characters of the most frequent n-gram, words joined by spaces; of equals the first."""
    size = cleared(table, count)
    for word in range(count - n + 1):
        value = sums[word + n] - sums[word] * power(powers, lengths[word + n] - lengths[word] + n)
        times[word] = 0
        value = mixed(value)
        slot = np.int64(value) & (size - 1)
        while table[slot] and not (
            has_hash(table[slot], value) and _same_words(codes, starts, ends, first + item_of(table[slot]), first + word, n)
        ):
            slot = (slot + 1) & (size - 1)
        if table[slot]:
            times[item_of(table[slot])] += 1
        else:
            table[slot] = entry(value, word)
            times[word] = 1
    best = 0
    for word in range(1, count - n + 1):
        if times[word] > times[best]:
            best = word
    return (lengths[best + n] - lengths[best] + n - 1) * times[best]


@INNER
def _duplicated(
    codes: np.ndarray,
    starts: np.ndarray,
    ends: np.ndarray,
    first: int,
    count: int,
    n: int,
    sums: np.ndarray,
    lengths: np.ndarray,
    powers: np.ndarray,
    table: np.ndarray,
) -> int:
    """Return the characters of n-grams seen before, from left to right, none overlapping the one counted last."""
    size = cleared(table, count)
    characters, word = 0, 0
    while word < count - n + 1:
        length = lengths[word + n] - lengths[word]
        value = sums[word + n] - sums[word] * power(powers, length)
        value = mixed(value)
        slot = np.int64(value) & (size - 1)
        while table[slot] and not (
            has_hash(table[slot], value) and _same_characters(codes, starts, ends, first + item_of(table[slot]), first + word, n)
        ):
            slot = (slot + 1) & (size - 1)
        if table[slot]:
            characters += length
            word += n
        else:
            table[slot] = entry(value, word)
            word += 1
    return characters


@KERNEL
def _scores(
    text_codes: np.ndarray,
    bounds: np.ndarray,
    codes: np.ndarray,
    starts: np.ndarray,
    ends: np.ndarray,
    offsets: np.ndarray,
    classes: np.ndarray,
    powers: np.ndarray,
    breaks: np.ndarray,
    block_starts: np.ndarray,
    block_ends: np.ndarray,
    spaced: np.ndarray,
    joined: np.ndarray,
    lengths: np.ndarray,
    times: np.ndarray,
    table: np.ndarray,
    out: np.ndarray,
) -> None:
    """Fill `out`, a row per text: fractions of paragraphs and lines, then of top and of duplicate n-grams by n."""
    line_break = 0
    for text in range(len(bounds) - 1):
        start, end = bounds[text], bounds[text + 1]
        characters = end - start
        if not characters:
            for column in range(COLUMNS):
                out[text, column] = np.nan
            continue
        inner, outer = start, end
        while inner < outer and classes[text_codes[inner]] & SPACE:
            inner += 1
        while outer > inner and classes[text_codes[outer - 1]] & SPACE:
            outer -= 1
        while breaks[line_break] < start:
            line_break += 1
        inner_break = line_break
        while breaks[inner_break] < inner:
            inner_break += 1
        count = _blocks(breaks, inner_break, inner, outer, 2, block_starts, block_ends)
        repeated, size = repeated_blocks(text_codes, block_starts, block_ends, count, table)
        out[text, 0], out[text, 1] = repeated / count, size / characters
        count = _blocks(breaks, line_break, start, end, 1, block_starts, block_ends)
        repeated, size = repeated_blocks(text_codes, block_starts, block_ends, count, table)
        out[text, 2], out[text, 3] = repeated / count, size / characters
        first, count = offsets[text], offsets[text + 1] - offsets[text]
        spaced[0], joined[0], lengths[0] = 0, 0, 0
        for word in range(count):
            with_space, without = spaced[word] * BASE, joined[word]
            for place in range(starts[first + word], ends[first + word]):
                code = np.uint64(codes[place]) * np.uint64(0xD6E8FEB86659FD93)
                code ^= code >> np.uint64(32)
                with_space = with_space * BASE + code
                without = without * BASE + code
            spaced[word + 1], joined[word + 1] = with_space, without
            lengths[word + 1] = lengths[word] + ends[first + word] - starts[first + word]
        column = 4
        for n in range(FIRST_TOP, LAST_TOP + 1):
            if count < n:
                out[text, column] = np.nan
            else:
                top = _top(codes, starts, ends, first, count, n, spaced, lengths, powers, times, table)
                out[text, column] = top / characters
            column += 1
        for n in range(FIRST_DUPLICATE, LAST_DUPLICATE + 1):
            found = _duplicated(codes, starts, ends, first, count, n, joined, lengths, powers, table)
            out[text, column] = found / characters
            column += 1


def repetition_scores(words: Words) -> np.ndarray:
    """Return float64 ``(texts, COLUMNS)``; NaN where a text is empty, or has fewer than n words (top n-grams)."""
    breaks = newlines(words.text_codes)
    most = int(words.counts.max(initial=0))
    blocks = len(breaks) + 1
    out = np.empty((len(words.counts), COLUMNS))
    starts, ends = np.empty(blocks, np.int64), np.empty(blocks, np.int64)
    sums = [np.empty(most + 1, np.uint64) for _ in range(2)]
    lengths, times = np.empty(most + 1, np.int64), np.empty(most + 1, np.int64)
    _scores(
        words.text_codes,
        words.text_bounds,
        words.codes,
        words.starts,
        words.ends,
        words.offsets,
        rule_classes(),
        powers(),
        breaks,
        starts,
        ends,
        *sums,
        lengths,
        times,
        new_table(max(most, blocks)),
        out,
    )
    return out
