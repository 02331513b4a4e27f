"""C4's line rules and the scores of C4 and FineWeb over lines, in native code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from pipelines.filters._punctuation import ANCHOR, ANCHOR_LETTERS, BRACE, OPENING, rule_classes
from pipelines.filters._repeats import NEWLINE, new_table, newlines, repeated_blocks
from pipelines.native import INNER, KERNEL
from pipelines.words import UNSAFE, decode, encode, split_words
from pipelines.words._characters import DECIMAL, LINE_BREAK, PUNCTUATION, SENTENCE_END, SPACE, TERMINAL

BLANK, QUOTE, APOSTROPHE, PERIOD, EXCLAMATION, QUESTION, OPEN, CLOSE = map(ord, " \"'.!?[]")
CARRIAGE_RETURN, KELVIN = 13, 0x212A
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
def _phrases_in(
    codes: np.ndarray, start: int, end: int, classes: np.ndarray, phrases: np.ndarray, bounds: np.ndarray, anchors: np.ndarray
) -> int:
    """Return a mask of the phrases that ``codes[start:end]`` holds in any case.

    Each has one of the `ANCHOR_LETTERS`, which are rare, at the place that `anchors` says: only there is it compared.
    """
    found = 0
    for place in range(start, end):
        if not classes[codes[place]] & ANCHOR:
            continue
        letter = _lower(np.int64(codes[place]))
        for number in range(len(bounds) - 1):
            first = bounds[number]
            begin, size = place - anchors[number], bounds[number + 1] - first
            if letter != np.int64(phrases[first + anchors[number]]) or begin < start or begin + size > end:
                continue
            same = True
            for offset in range(size):
                if _lower(np.int64(codes[begin + offset])) != np.int64(phrases[first + offset]):
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
    anchors: np.ndarray,
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
            words, longest, start, last, seen = 0, 0, -1, -1, np.uint32(0)
            while place < stop:
                kind = classes[codes[place]]
                if kind & LINE_BREAK:
                    break
                if kind & SPACE:
                    place += 1
                    continue
                word = place
                while place < stop:
                    kind = classes[codes[place]]
                    if kind & SPACE:
                        break
                    seen |= kind
                    place += 1
                if start < 0:
                    start = word
                last = place
                words += 1
                longest = max(longest, place - word)
            end = place
            if place < stop:
                place += 1
                if codes[end] == CARRIAGE_RETURN and place < stop and codes[place] == NEWLINE:
                    place += 1
            if start < 0 or longest > max_word or words < min_words:
                continue
            end = last
            begin = size
            if seen & OPENING:
                end_kept = _without_citations(codes, start, end, classes, marks, mark_bounds, kept, size)
            else:
                for offset in range(end - start):
                    kept[size + offset] = codes[start + offset]
                end_kept = size + end - start
            if punctuated and not _ends_a_sentence(kept, begin, end_kept):
                continue
            found = _phrases_in(kept, begin, end_kept, classes, phrases, phrase_bounds, anchors) if seen & ANCHOR else 0
            counts[text, 0] += found & 1
            if found & 2:
                continue
            counts[text, 1] += seen & BRACE != 0
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
    """Fill `out` with the sentences of each text: those that spaCy's sentencizer finds in its lines.

    A sentence ends after a mark, at the first token that is no punctuation; white space is a token, but for a single space
    after a word, and may be a sentence: a line that held nothing but citation marks counts as one.
    """
    for text in range(len(offsets) - 1):
        sentences = 0
        for line in range(offsets[text], offsets[text + 1]):
            after_mark, empty = False, True
            previous, last = line_bounds[line], line_bounds[line + 1]
            for word in range(word_offsets[line], word_offsets[line + 1] + 1):
                at_end = word == word_offsets[line + 1]
                start, end = (last, last) if at_end else (starts[word], ends[word])
                gap = start - previous
                if gap > 1 or (gap == 1 and (empty or codes[previous] != BLANK)):
                    sentences += empty or after_mark
                    after_mark, empty = False, False
                previous = end
                if at_end:
                    break
                is_mark = end - start == 1 and classes[codes[start]] & SENTENCE_END != 0
                punctuation = np.uint32(PUNCTUATION)
                if after_mark and not is_mark:
                    for place in range(start, end):
                        punctuation &= classes[codes[place]]
                if empty or not punctuation:
                    sentences += 1
                    after_mark, empty = False, False
                after_mark |= is_mark
        out[text] = sentences


@KERNEL
def _fineweb(
    codes: np.ndarray,
    bounds: np.ndarray,
    num_words: np.ndarray,
    classes: np.ndarray,
    breaks: np.ndarray,
    short: int,
    starts: np.ndarray,
    ends: np.ndarray,
    table: np.ndarray,
    out: np.ndarray,
) -> None:
    """Fill `out`, a row per text: shares of lines punctuated and short, of characters in repeated lines; line breaks per word."""
    number = 0
    for text in range(len(bounds) - 1):
        begin, stop = bounds[text], bounds[text + 1]
        lines, num_breaks, punctuated, shorts = 0, 0, 0, 0
        while breaks[number] < begin:
            number += 1
        while begin <= stop:
            end = min(np.int64(breaks[number]), stop)
            place = begin
            while place < end and classes[codes[place]] & SPACE:
                place += 1
            if place < end:
                starts[lines], ends[lines] = begin, end
                lines += 1
                punctuated += classes[codes[end - 1]] & TERMINAL != 0
                shorts += end - begin <= short
            if end < stop:
                num_breaks += 1
                number += 1
            begin = end + 1
        if not lines:
            for column in range(FINEWEB_COLUMNS):
                out[text, column] = np.nan
            continue
        _, repeated = repeated_blocks(codes, starts, ends, lines, table)
        out[text, 0] = punctuated / lines
        out[text, 1] = shorts / lines
        out[text, 2] = repeated / (stop - bounds[text] - num_breaks)
        out[text, 3] = num_breaks / num_words[text] if num_words[text] else np.nan


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
    unsafe: tuple[int, ...]
    """The texts that hold `UNSAFE`."""

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
    anchors = np.array([min(phrase.find(letter) % 99 for letter in ANCHOR_LETTERS) for phrase in phrases])
    limits = (anchors, max_word, min_words, punctuated)
    count = _keep_lines(codes, bounds, rule_classes(), *encode(MARKS), *encode(phrases), *limits, kept, line_bounds, offsets, counts)
    line_bounds = line_bounds[: count + 1].copy()
    return KeptLines(
        kept[: line_bounds[-1]].copy(), line_bounds, offsets, counts, tuple(number for number, text in enumerate(texts) if UNSAFE in text)
    )


def count_sentences(kept: KeptLines) -> np.ndarray:
    """Return the sentences of each text, int64: those that spaCy's sentencizer finds in each line."""
    from pipelines.words._spacy_english import split_texts

    out = np.empty(len(kept.offsets) - 1, np.int64)
    _count_sentences(kept.codes, *split_texts(kept.codes, kept.bounds), kept.bounds, kept.offsets, rule_classes(), out)
    for number in kept.unsafe:
        words = split_words(kept.lines()[kept.offsets[number] : kept.offsets[number + 1]])
        bounds = np.array([0, len(words.counts)])
        _count_sentences(words.codes, words.starts, words.ends, words.offsets, words.bounds, bounds, rule_classes(), out[number:])
    return out


def fineweb_scores(codes: np.ndarray, bounds: np.ndarray, num_words: np.ndarray, *, short: int) -> np.ndarray:
    """Return float64 ``(texts, 4)`` of the texts ``codes[bounds[t]:bounds[t + 1]]``; NaN where a text has no line."""
    breaks = newlines(codes)
    lines = len(breaks)
    out = np.empty((len(bounds) - 1, FINEWEB_COLUMNS))
    starts, ends = np.empty(lines, np.int64), np.empty(lines, np.int64)
    _fineweb(codes, bounds, num_words, rule_classes(), breaks, short, starts, ends, new_table(lines), out)
    return out
