"""What each code point is, as bits of one table: the classes that word splitters and rules ask for, looked up by native code.

Classes of Python (`str.isspace`, `str.isalpha`, `\\w`, `\\d`, Unicode's general category P) follow the running interpreter, as they do in
the rules that are reproduced; the classes of spaCy's English tokenizer come from `spacy_english.json`.
"""

from __future__ import annotations

import json
import re
import unicodedata
from functools import cache
from pathlib import Path

import numpy as np

CODE_POINTS = 0x110000

SPACE = 1
"""`str.isspace`."""
ALPHA = 2
"""spaCy's letters, any case."""
LOWER = 4
"""spaCy's lower-case letters and letters without case."""
UPPER = 8
"""spaCy's upper-case letters and letters without case."""
DIGIT = 16
"""0 to 9."""
QUOTE = 32
"""spaCy's quotes."""
ICON = 64
"""spaCy's symbols."""
PREFIX = 128
"""One character that spaCy splits off the front of a word, whatever follows."""
SUFFIX = 256
"""One character that spaCy splits off the end of a word, whatever stands before it."""
BEFORE_PERIOD = 512
"""spaCy splits off a period after it."""
IS_ALPHA = 1024
"""`str.isalpha`."""
WORD = 2048
"""`\\w`."""
DECIMAL = 4096
"""`\\d`."""
PUNCTUATION = 8192
"""General category P."""
SENTENCE_END = 16384
"""Marks after which spaCy's sentencizer may begin a sentence."""
LINE_BREAK = 32768
"""`str.splitlines` breaks after it."""
SYMBOL = 65536
"""Set by `marked`: a word of these characters alone is no word to the rule that asks."""
TERMINAL = 131072
"""Set by `marked`: ends a line of prose to the rule that asks."""
LABEL = 262144
"""May begin and end a label of a host name: A-Z, a-z, 0-9 and U+00A1 to U+FFFF."""
LETTER = 524288
"""A-Z and a-z."""
INFIX = 1048576
"""A character at which an infix of spaCy's English rules may begin."""

TABLE = Path(__file__).parent / "spacy_english.json"
TABLE_SHA256 = "54867b4fb22250cab9328421b9bf2087397e3fbd01e8f5d8baaabe93522b724e"
"""Of `TABLE`: enters the code version, so that another table is another version."""


@cache
def spacy_table() -> dict[str, object]:
    """Return the rules of spaCy's English tokenizer as data."""
    return json.loads(TABLE.read_text(encoding="utf-8"))


@cache
def character_classes() -> np.ndarray:
    """Return uint32 ``(0x110000,)``: the classes of every code point, as the bits above."""
    classes = np.zeros(CODE_POINTS, dtype=np.uint32)
    everything = "".join(map(chr, range(CODE_POINTS)))
    for pattern, bit in ((r"\s+", SPACE), (r"\w+", WORD), (r"\d+", DECIMAL)):
        for match in re.finditer(pattern, everything):
            classes[match.start() : match.end()] |= bit
    for code in np.flatnonzero(classes & WORD).tolist():
        if everything[code].isalpha():
            classes[code] |= IS_ALPHA
    named = [*range(0x20000), *range(0xE0000, 0xE0200)]  # planes 2 and up hold letters and private use alone
    classes[[code for code in named if unicodedata.category(everything[code])[0] == "P"]] |= PUNCTUATION
    table: dict[str, str] = spacy_table()["classes"]  # type: ignore[assignment]
    bits = {"alpha": ALPHA, "alpha_lower": LOWER, "alpha_upper": UPPER, "before_period": BEFORE_PERIOD, "icon": ICON | INFIX}
    bits |= {"prefix": PREFIX, "quote": QUOTE, "sentence_end": SENTENCE_END, "suffix": SUFFIX}
    for name, bit in bits.items():
        for start, end in _ranges(table[name]):
            classes[start : end + 1] |= bit
    classes[ord("0") : ord("9") + 1] |= DIGIT
    for first, last in ("AZ", "az"):
        classes[ord(first) : ord(last) + 1] |= LETTER | LABEL
    classes[ord("0") : ord("9") + 1] |= LABEL
    classes[0xA1:0x10000] |= LABEL
    classes[[ord(mark) for mark in ".…+-*^,–—~:<>=/"]] |= INFIX
    classes[[code for code in range(0x2030) if len(f"a{chr(code)}b".splitlines()) == 2]] |= LINE_BREAK
    return classes


def _ranges(text: str) -> list[tuple[int, int]]:
    """Return inclusive ranges of code points written as ``61-7a c0``."""
    ends = [part.partition("-") for part in text.split()]
    return [(int(first, 16), int(last or first, 16)) for first, _, last in ends]


def marked(characters: dict[int, frozenset[str]]) -> np.ndarray:
    """Return `character_classes` with each bit in `characters` set for its characters."""
    classes = character_classes().copy()
    for bit, members in characters.items():
        classes[[ord(character) for character in members]] |= bit
    return classes
