"""spaCy's English tokenizer, native: the same tokens as ``spacy.blank("en")`` of 3.8, without spaCy.

A token is a stretch of the text, so a split is a list of offsets. spaCy works on each run of characters without white space
(a chunk) on its own:

    exception?             a chunk of the table of exceptions is split as it says ("don't" -> do, n't)
    affixes                prefixes and suffixes come off one pair at a time; after each, an exception ends it
    URL?, infixes          what is left is one token where it is a URL, else it is split at infixes
    sequences              where the tokens of a run of chunks, one space apart, spell an exception with affixes in it
                           ("(8)" -> 8, ")" -> 8)), they are joined or split as it says; the longest first

The rules are data (`spacy_english.json`); their order is that of spaCy's `tokenizer.pyx` and `lang/en/punctuation.py`. Where
spaCy takes the leftmost match of all suffixes, the longest is taken here: the same, since all end where the chunk ends.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from pipelines.native import INNER, KERNEL
from pipelines.words._characters import (
    ALPHA,
    BEFORE_PERIOD,
    DIGIT,
    ICON,
    INFIX,
    LETTER,
    LOWER,
    PREFIX,
    QUOTE,
    SPACE,
    SUFFIX,
    UPPER,
    character_classes,
    spacy_table,
)
from pipelines.words._sequences import apply_sequences, is_suspect
from pipelines.words._strings import MAX_LENGTH, RECORD, code_points, emit_cuts, find, string_table
from pipelines.words._urls import is_url

BLANK, DOLLAR, APOSTROPHE, STAR, PLUS, COMMA, HYPHEN, PERIOD, CARET, DEGREE, EM_DASH, RIGHT_QUOTE, ELLIPSIS = map(ord, " $'*+,-.^°—’…")


@INNER
def _prefix(codes: np.ndarray, start: int, end: int, classes: np.ndarray) -> int:
    """Return the characters of the prefix of ``codes[start:end]``, 0 where there is none."""
    code = codes[start]
    if code == PERIOD:
        stop = start + 1
        while stop < end and codes[stop] == PERIOD:
            stop += 1
        return stop - start if stop - start > 1 else 0
    if code == PLUS:
        return 0 if start + 1 < end and classes[codes[start + 1]] & DIGIT else 1
    if classes[code] & PREFIX:
        return 1
    if code == 0x55 and end - start > 2 and codes[start + 1] == 0x53 and codes[start + 2] == DOLLAR:  # US$
        return 3
    if (code == 0x43 or code == 0x41) and end - start > 1 and codes[start + 1] == DOLLAR:  # C$, A$
        return 2
    return 0


@INNER
def _suffix(codes: np.ndarray, start: int, end: int, classes: np.ndarray, after_digit: np.ndarray) -> int:
    """Return the characters of the suffix of ``codes[start:end]``, 0 where there is none."""
    if end <= start:
        return 0
    code = codes[end - 1]
    kind = classes[code]
    length = end - start
    if code == PERIOD:
        run = 1
        while run < length and codes[end - 1 - run] == PERIOD:
            run += 1
        if run > 1:
            return run
        if length < 2:
            return 0
        before = codes[end - 2]
        if classes[before] & BEFORE_PERIOD:
            return 1
        if length > 2:
            two = codes[end - 3]
            if classes[before] & UPPER and classes[two] & UPPER:
                return 1
            if two == DEGREE and (before | 0x20 == 0x63 or before | 0x20 == 0x66 or before | 0x20 == 0x6B):
                return 1
        return 0
    best = 0
    if kind & SUFFIX:
        best = 1
        if code == ELLIPSIS and length > 1 and codes[end - 2] == ELLIPSIS:
            best = 2
    if length < 2:
        return best
    before = codes[end - 2]
    if (code == 0x73 or code == 0x53) and (before == APOSTROPHE or before == RIGHT_QUOTE):
        best = 2
    if code == PLUS and classes[before] & DIGIT:
        return 1
    if kind & DIGIT:
        return best
    place = end - 2
    floor = max(start, end - 6)
    while place >= floor and not classes[codes[place]] & DIGIT:
        place -= 1
    if place >= floor and find(after_digit, codes, place + 1, end):
        return max(best, end - place - 1)
    return best


@INNER
def _infix(codes: np.ndarray, start: int, end: int, place: int, classes: np.ndarray) -> int:
    """Return the characters of the infix that begins at `place` within ``codes[start:end]``, 0 where there is none."""
    code = codes[place]
    kind = classes[code]
    if not kind & INFIX:
        return 0
    if kind & ICON or code == ELLIPSIS:
        return 1
    after = classes[codes[place + 1]] if place + 1 < end else np.uint32(0)
    before = classes[codes[place - 1]] if place > start else np.uint32(0)
    if code == PERIOD:
        stop = place + 1
        while stop < end and codes[stop] == PERIOD:
            stop += 1
        if stop - place > 1:
            return stop - place
        return 1 if before & (LOWER | QUOTE) and after & (UPPER | QUOTE) else 0
    if code == PLUS or code == HYPHEN or code == STAR or code == CARET:
        if before & DIGIT and (after & DIGIT or (place + 1 < end and codes[place + 1] == HYPHEN)):
            return 1
        if code != HYPHEN:
            return 0
    if code == COMMA:
        return 1 if before & ALPHA and after & ALPHA else 0
    if not before & (ALPHA | DIGIT):
        return 0
    if after & ALPHA:  # one of - – — ~ : < > = /
        return 1
    if code == HYPHEN or code == EM_DASH:
        most = 3 if code == HYPHEN else 2
        stop = place + 1
        while stop < end and stop - place < most and codes[stop] == code:
            stop += 1
            if stop < end and classes[codes[stop]] & ALPHA:
                return stop - place
    return 0


@INNER
def _emit_rest(codes: np.ndarray, start: int, end: int, starts: np.ndarray, ends: np.ndarray, count: int, classes: np.ndarray) -> int:
    """Add the tokens of ``codes[start:end]``, which has neither affix nor exception: a URL, or the pieces between infixes."""
    place = start
    begin = start
    checked = False
    while place < end:
        size = _infix(codes, start, end, place, classes)
        if not size:
            place += 1
            continue
        if place == start:
            place += size
            continue
        if not checked:
            checked = True
            if is_url(codes, start, end, classes):
                break
        if place != begin:
            starts[count], ends[count] = begin, place
            count += 1
        starts[count], ends[count] = place, place + size
        count += 1
        place += size
        begin = place
    if begin < end:
        starts[count], ends[count] = begin, end
        count += 1
    return count


@INNER
def _split_chunk(
    codes: np.ndarray,
    start: int,
    end: int,
    starts: np.ndarray,
    ends: np.ndarray,
    count: int,
    classes: np.ndarray,
    exceptions: np.ndarray,
    after_digit: np.ndarray,
) -> int:
    """Add the tokens of the chunk ``codes[start:end]``.

    There is room for a token a character: suffixes, which come off from the right, wait at the far end of it.
    """
    room = count + end - start
    suffixes = room
    stop = end
    record = find(exceptions, codes, start, stop)
    while not record and start < stop:
        prefix = _prefix(codes, start, stop, classes)
        if prefix and start + prefix < stop:
            record = find(exceptions, codes, start + prefix, stop)
            if record:
                starts[count], ends[count] = start, start + prefix
                count += 1
                start += prefix
                break
        suffix = _suffix(codes, start + prefix, stop, classes, after_digit)
        if suffix and start < stop - suffix:
            record = find(exceptions, codes, start, stop - suffix)
            if record:
                suffixes -= 1
                starts[suffixes], ends[suffixes] = stop - suffix, stop
                stop -= suffix
                break
        if not prefix and not suffix:
            break
        if prefix:
            starts[count], ends[count] = start, start + prefix
            count += 1
            start += prefix
        if suffix:
            suffixes -= 1
            starts[suffixes], ends[suffixes] = stop - suffix, stop
            stop -= suffix
        record = find(exceptions, codes, start, stop)
    if record:
        count = emit_cuts(np.int64(exceptions[record + 1]), start, stop, starts, ends, count)
    elif start < stop:
        count = _emit_rest(codes, start, stop, starts, ends, count, classes)
    for place in range(suffixes, room):
        starts[count], ends[count] = starts[place], ends[place]
        count += 1
    return count


@KERNEL
def split(
    codes: np.ndarray,
    bounds: np.ndarray,
    classes: np.ndarray,
    exceptions: np.ndarray,
    sequences: np.ndarray,
    after_digit: np.ndarray,
    starts: np.ndarray,
    ends: np.ndarray,
    offsets: np.ndarray,
    buffer: np.ndarray,
    marks: np.ndarray,
) -> int:
    """Fill `starts` and `ends` with the tokens' offsets in `codes`, and `offsets` with the first token of each text; return their count.

    Args:
        codes: code points of all texts, one after the other.
        bounds: text t is ``codes[bounds[t]:bounds[t + 1]]``.
        starts, ends: int32, twice as long as `codes`.
        offsets: int64, as long as `bounds`.
        buffer: uint32, `MAX_LENGTH` long.
        marks: uint32, zeros, as long as `codes`.
    """
    count = 0
    offsets[0] = 0
    for text in range(len(bounds) - 1):
        place, stop = bounds[text], bounds[text + 1]
        run, suspect, previous = count, False, -2
        while place < stop:
            if classes[codes[place]] & SPACE:
                place += 1
                continue
            start = place
            letters = np.uint32(LETTER)
            while place < stop:
                kind = classes[codes[place]]
                if kind & SPACE:
                    break
                letters &= kind
                place += 1
            if start != previous + 1 or codes[previous] != BLANK:
                if suspect:
                    count = apply_sequences(codes, starts, ends, run, count, sequences, buffer, marks)
                run, suspect = count, False
            previous = place
            if letters:
                record = find(exceptions, codes, start, place)
                if record:
                    count = emit_cuts(np.int64(exceptions[record + 1]), start, place, starts, ends, count)
                else:
                    starts[count], ends[count] = start, place
                    count += 1
                continue
            first = count
            count = _split_chunk(codes, start, place, starts, ends, count, classes, exceptions, after_digit)
            if count - first > 1 and not suspect:
                suspect = is_suspect(codes, starts, ends, first, count, sequences, buffer)
        if suspect:
            count = apply_sequences(codes, starts, ends, run, count, sequences, buffer, marks)
        offsets[text + 1] = count
    return count


def split_texts(codes: np.ndarray, bounds: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the starts and ends of the tokens (int32, offsets in `codes`) and each text's first (int64, one more than texts)."""
    starts, ends = np.empty(2 * len(codes), np.int32), np.empty(2 * len(codes), np.int32)
    offsets, buffer, marks = np.empty(len(bounds), np.int64), np.empty(MAX_LENGTH, np.uint32), np.zeros(len(codes), np.uint32)
    count = split(codes, bounds, character_classes(), *rules(), starts, ends, offsets, buffer, marks)
    return starts[:count].copy(), ends[:count].copy(), offsets


@cache
def rules() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the tables of exceptions, of sequences (exceptions with affixes in them), and of what is split off a digit."""
    table = spacy_table()
    written: list[str] = table["exceptions"]  # type: ignore[assignment]
    units: list[str] = table["after_digit"]  # type: ignore[assignment]
    exceptions = {text.replace(" ", ""): _cuts(text) for text in written}
    after_digit = string_table(dict.fromkeys(units, (0, 0)))
    sequences = {text: (_cuts_of_affixes(text, after_digit), cuts) for text, cuts in exceptions.items() if _has_affix(text, after_digit)}
    return string_table({text: (cuts, cuts) for text, cuts in exceptions.items()}), string_table(sequences), after_digit


def _cuts(text: str) -> int:
    """Return the cuts of an exception written as its tokens with spaces between them."""
    ends = np.cumsum([len(token) for token in text.split(" ")])[:-1]
    return sum(1 << int(end - 1) for end in ends)


def _has_affix(text: str, after_digit: np.ndarray) -> bool:
    codes, classes = code_points(text), character_classes()
    if _prefix(codes, 0, len(codes), classes) or _suffix(codes, 0, len(codes), classes, after_digit):
        return True
    return any(_infix(codes, 0, len(codes), place, classes) for place in range(len(codes)))


def _cuts_of_affixes(text: str, after_digit: np.ndarray) -> int:
    """Return the cuts of `text` by affixes and infixes alone."""
    codes = code_points(text)
    starts, ends = np.zeros(len(codes), np.int32), np.zeros(len(codes), np.int32)
    nothing = np.zeros(RECORD, np.uint32)
    count = _split_chunk(codes, 0, len(codes), starts, ends, 0, character_classes(), nothing, after_digit)
    return sum(1 << int(end - 1) for end in ends[: count - 1])
