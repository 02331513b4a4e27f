"""C4's line rules and the scores of C4 and FineWeb over lines, in native code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from pipelines.filters._punctuation import rule_classes
from pipelines.filters._repeats import new_table, repeated_blocks
from pipelines.words import UNSAFE, decode, encode, split_words
from pipelines.words._characters import DECIMAL, LINE_BREAK, PUNCTUATION, SENTENCE_END, SPACE, TERMINAL
from pipelines.words._native import INNER, KERNEL

BLANK, QUOTE, APOSTROPHE, PERIOD, EXCLAMATION, QUESTION, OPEN, CLOSE, CURLY = map(ord, " \"'.!?[]{")
CARRIAGE_RETURN, NEWLINE, KELVIN = 13, 10, 0x212A
MARKS = ("[edit]", "[citation needed]")
LOREM, SCRIPT = "lorem ipsum", "javascript"
NOTICES = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
FIRST_NOTICE = 2
FINEWEB_COLUMNS = 4


@INNER
def _begins_with(codes: np.ndarray, place: int, end: int, phrases: np.ndarray, start: int, stop: int) -> bool:
    """Return whether ``codes[place:end]`` begins with ``phrases[start:stop]``."""
    if place + stop - start > end:
        return False
    for offset in range(stop - start):
        if codes[place + offset] != phrases[start + offset]:
            return False
    return True


@INNER
def _lower(code: int) -> int:
    """Return the lower case of an ASCII letter or of the Kelvin sign, which `str.lower` turns into a k."""
    if 0x41 <= code <= 0x5A:
        return code + 0x20
    return 0x6B if code == KELVIN else code


@INNER
def _phrases_in(codes: np.ndarray, start: int, end: int, phrases: np.ndarray, bounds: np.ndarray, firsts: int) -> int:
    """Return a mask of the phrases that ``codes[start:end]`` holds in any case; `firsts` is a mask of their first letters."""
    found = 0
    for place in range(start, end):
        first = np.int64(_lower(np.int64(codes[place]))) - 0x61
        if first < 0 or first > 25 or not (firsts >> first) & 1:
            continue
        for number in range(len(bounds) - 1):
            size = bounds[number + 1] - bounds[number]
            if place + size > end or np.int64(phrases[bounds[number]]) != first + 0x61:
                continue
            same = True
            for offset in range(1, size):
                if _lower(np.int64(codes[place + offset])) != np.int64(phrases[bounds[number] + offset]):
                    same = False
                    break
            if same:
                found |= 1 << number
    return found


@INNER
def _without_citations(
    codes: np.ndarray, start: int, end: int, classes: np.ndarray, marks: np.ndarray, mark_bounds: np.ndarray, kept: np.ndarray, size: int
) -> int:
    """Write ``codes[start:end]`` to `kept` from `size` on, without ``[1]``, ``[]``, ``[edit]`` and the like; return where it ends."""
    place = start
    while place < end:
        code = codes[place]
        if code == OPEN:
            stop = place + 1
            while stop < end and classes[codes[stop]] & DECIMAL:
                stop += 1
            if stop < end and codes[stop] == CLOSE:
                place = stop + 1
                continue
            skipped = False
            for number in range(len(mark_bounds) - 1):
                if _begins_with(codes, place, end, marks, mark_bounds[number], mark_bounds[number + 1]):
                    place += mark_bounds[number + 1] - mark_bounds[number]
                    skipped = True
                    break
            if skipped:
                continue
        kept[size] = code
        size += 1
        place += 1
    return size


@INNER
def _ends_a_sentence(codes: np.ndarray, start: int, end: int) -> bool:
    """Return whether the line ends in one of C4's marks and not in three periods."""
    if end == start:
        return False
    code = codes[end - 1]
    if code == PERIOD:
        return not (end - start > 2 and codes[end - 2] == PERIOD and codes[end - 3] == PERIOD)
    return code == QUESTION or code == EXCLAMATION or code == QUOTE or code == APOSTROPHE


@KERNEL
def _keep_lines(
    codes: np.ndarray,
    bounds: np.ndarray,
    classes: np.ndarray,
    marks: np.ndarray,
    mark_bounds: np.ndarray,
    phrases: np.ndarray,
    phrase_bounds: np.ndarray,
    firsts: int,
    max_word: int,
    min_words: int,
    punctuated: int,
    kept: np.ndarray,
    line_bounds: np.ndarray,
    offsets: np.ndarray,
    counts: np.ndarray,
) -> int:
    """Write the lines that C4's rules leave to `kept`, and count lines with lorem ipsum and with a curly bracket.

    Line l is ``kept[line_bounds[l]:line_bounds[l + 1]]``, text t has lines ``offsets[t]:offsets[t + 1]``. Returns the number of lines.
    """
    lines, size = 0, 0
    line_bounds[0], offsets[0] = 0, 0
    for text in range(len(bounds) - 1):
        place, stop = bounds[text], bounds[text + 1]
        while place < stop:
            start, words, longest, word = place, 0, 0, 0
            first, last, has_open, curly = -1, -1, False, False
            while place < stop:
                code = codes[place]
                kind = classes[code]
                if kind & SPACE:
                    if kind & LINE_BREAK:
                        break
                    word = 0
                else:
                    if first < 0:
                        first = place
                    last = place
                    words += word == 0
                    word += 1
                    longest = max(longest, word)
                    has_open |= code == OPEN
                    curly |= code == CURLY
                place += 1
            end = place
            if place < stop:
                place += 1
                if codes[end] == CARRIAGE_RETURN and place < stop and codes[place] == NEWLINE:
                    place += 1
            if first < 0 or longest > max_word or words < min_words:
                continue
            start, end = first, last + 1
            begin = size
            if has_open:
                end_kept = _without_citations(codes, start, end, classes, marks, mark_bounds, kept, size)
            else:
                for offset in range(end - start):
                    kept[size + offset] = codes[start + offset]
                end_kept = size + end - start
            if punctuated and not _ends_a_sentence(kept, begin, end_kept):
                continue
            found = _phrases_in(kept, begin, end_kept, phrases, phrase_bounds, firsts)
            counts[text, 0] += found & 1
            if found & 2:
                continue
            counts[text, 1] += curly
            if found >> FIRST_NOTICE:
                continue
            size = end_kept
            lines += 1
            line_bounds[lines] = size
        offsets[text + 1] = lines
    return lines


@KERNEL
def _count_sentences(
    codes: np.ndarray,
    starts: np.ndarray,
    ends: np.ndarray,
    word_offsets: np.ndarray,
    line_bounds: np.ndarray,
    offsets: np.ndarray,
    classes: np.ndarray,
    out: np.ndarray,
) -> None:
    """Fill `out` with the sentences of each text: those of its lines as spaCy's sentencizer finds them, empty ones left out.

    A sentence ends after a mark, at the first token that is no punctuation; white space but a single space is a token too.
    """
    for text in range(len(offsets) - 1):
        sentences = 0
        for line in range(offsets[text], offsets[text + 1]):
            after_mark, new = False, True
            previous = line_bounds[line]
            for word in range(word_offsets[line], word_offsets[line + 1]):
                start, end = starts[word], ends[word]
                gap = start - previous
                if after_mark and (gap > 1 or (gap == 1 and codes[previous] != BLANK)):
                    after_mark, new = False, True
                previous = end
                is_mark = end - start == 1 and classes[codes[start]] & SENTENCE_END != 0
                if after_mark and not is_mark:
                    punctuation = np.uint32(PUNCTUATION)
                    for place in range(start, end):
                        punctuation &= classes[codes[place]]
                    if not punctuation:
                        after_mark, new = False, True
                if new:
                    sentences += 1
                    new = False
                after_mark |= is_mark
        out[text] = sentences


@KERNEL
def _fineweb(
    codes: np.ndarray,
    bounds: np.ndarray,
    num_words: np.ndarray,
    classes: np.ndarray,
    short: int,
    starts: np.ndarray,
    ends: np.ndarray,
    hashes: np.ndarray,
    items: np.ndarray,
    stamps: np.ndarray,
    clock: np.ndarray,
    out: np.ndarray,
) -> None:
    """Fill `out`, a row per text: shares of lines punctuated and short, of characters in repeated lines; line breaks per word."""
    for text in range(len(bounds) - 1):
        place, stop = bounds[text], bounds[text + 1]
        lines, breaks, punctuated, shorts = 0, 0, 0, 0
        begin, blank = place, True
        for place in range(bounds[text], stop + 1):
            at_end = place == stop
            if not at_end and codes[place] != NEWLINE:
                blank &= classes[codes[place]] & SPACE != 0
                continue
            breaks += not at_end
            if not blank:
                starts[lines], ends[lines] = begin, place
                lines += 1
                punctuated += classes[codes[place - 1]] & TERMINAL != 0
                shorts += place - begin <= short
            begin, blank = place + 1, True
        if not lines:
            for column in range(FINEWEB_COLUMNS):
                out[text, column] = np.nan
            continue
        _, repeated = repeated_blocks(codes, starts, ends, lines, hashes, items, stamps, clock)
        out[text, 0] = punctuated / lines
        out[text, 1] = shorts / lines
        out[text, 2] = repeated / (stop - bounds[text] - breaks)
        out[text, 3] = breaks / num_words[text] if num_words[text] else np.nan


@dataclass(frozen=True)
class KeptLines:
    """The lines of a group of texts that C4's line rules leave, without citation marks."""

    codes: np.ndarray
    """uint32: the code points of all lines, one after the other."""
    bounds: np.ndarray
    """int64, one more than lines."""
    offsets: np.ndarray
    """int64, one more than texts: text t has lines ``offsets[t]:offsets[t + 1]``."""
    counts: np.ndarray
    """int64 ``(texts, 2)``: lines with "lorem ipsum", lines with a curly bracket."""
    unsafe: bool
    """Some text holds `UNSAFE`."""

    def lines(self) -> list[str]:
        """Return the lines."""
        text, bounds = decode(self.codes), self.bounds.tolist()
        return [text[start:end] for start, end in pairwise(bounds)]

    def texts(self) -> list[str]:
        """Return what is left of each text: its lines, and no white space at the ends."""
        lines = self.lines()
        return ["\n".join(lines[start:end]).strip() for start, end in pairwise(self.offsets.tolist())]


def keep_lines(texts: Sequence[str], *, max_word: int, min_words: int, punctuated: bool) -> KeptLines:
    """Return the lines that C4 leaves of `texts`, in the order of datatrove 0.10.1's rules.

    Args:
        max_word: a line with a longer word is left out.
        min_words: a line with fewer words is left out; citation marks count as words.
        punctuated: a line that does not end in ``. ? ! " '``, or ends in ``...``, is left out.
    """
    codes, bounds = encode(texts)
    kept = np.empty(len(codes), np.uint32)
    line_bounds = np.empty(len(codes) // max(1, 2 * min_words - 1) + len(bounds) + 1, np.int64)
    offsets, counts = np.empty(len(bounds), np.int64), np.zeros((len(texts), 2), np.int64)
    phrases = (LOREM, SCRIPT, *NOTICES)
    firsts = sum({1 << (ord(phrase[0]) - 0x61) for phrase in phrases})
    limits = (firsts, max_word, min_words, punctuated)
    count = _keep_lines(codes, bounds, rule_classes(), *encode(MARKS), *encode(phrases), *limits, kept, line_bounds, offsets, counts)
    line_bounds = line_bounds[: count + 1].copy()
    return KeptLines(kept[: line_bounds[-1]].copy(), line_bounds, offsets, counts, any(UNSAFE in text for text in texts))


def count_sentences(kept: KeptLines) -> np.ndarray:
    """Return the sentences of each text, int64: those that spaCy's sentencizer finds in each line."""
    out = np.empty(len(kept.offsets) - 1, np.int64)
    if kept.unsafe:  # rare: the lines are made anew without the name that datatrove takes out
        words = split_words(kept.lines())
        _count_sentences(words.codes, words.starts, words.ends, words.offsets, words.bounds, kept.offsets, rule_classes(), out)
        return out
    from pipelines.words._spacy_english import split_texts

    words = split_texts(kept.codes, kept.bounds)
    _count_sentences(kept.codes, *words, kept.bounds, kept.offsets, rule_classes(), out)
    return out


def fineweb_scores(codes: np.ndarray, bounds: np.ndarray, num_words: np.ndarray, *, short: int) -> np.ndarray:
    """Return float64 ``(texts, 4)`` of the texts ``codes[bounds[t]:bounds[t + 1]]``; NaN where a text has no line."""
    lines = int(np.count_nonzero(codes == NEWLINE)) + 1
    out = np.empty((len(bounds) - 1, FINEWEB_COLUMNS))
    starts, ends = np.empty(lines, np.int64), np.empty(lines, np.int64)
    _fineweb(codes, bounds, num_words, rule_classes(), short, starts, ends, *new_table(lines), out)
    return out
