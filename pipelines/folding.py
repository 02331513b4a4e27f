"""How characters are folded before words are compared: tables by code point, for the loops of `minhash_kernels`.

The constants are compiled into these loops (`pipelines.native`).

A character is lower-cased by itself, decomposed (NFD) and stripped of non-spacing marks. Two tables say what else it is: `word_classes`
for the project's own words, `simplified_classes` for datatrove's text simplification (0.10.1, utils/text.py, `simplify_text`).
"""

from __future__ import annotations

import re
import unicodedata
from functools import cache

import numpy as np

FOLDED_CODES = 0x20000
"""Code points below stand in the tables; above are ideographs, and characters of no word."""

SPACE, WORD, SINGLE, MARK, DIGIT, SEPARATOR, SEPARATOR_SPACE, SLOW = range(8)
"""Classes: parts words; part of a word; a word by itself; non-spacing mark; decimal digit; decimal separator, which parts words
(`SEPARATOR_SPACE`) or does not; needs its neighbours to be folded."""

NO_SPACES = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
"""Thai, Lao, Burmese, Khmer, kana and Han: a run of letters there is a sentence, so every character counts as a word."""

JOINERS = "\u00ad\u200b\u200c\u200d\u2060\ufeff"
"""Soft hyphen, zero-width space and joiners, byte-order mark: invisible, so they neither part nor change a word."""

PUNCTUATION = frozenset(
    "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~\u00ab\u00b4\u00bb\u2013\u2014\u2019\u201c\u201d\u201e\u2026\u2236\u2501\u25ba\u3001\u3002"
    "\u3008\u3009\u300a\u300b\u300c\u300d\u3010\u3011\uff01\uff05\uff08\uff09\uff0c\uff0e\uff11\uff1a\uff1b\uff1f\uff5e"
) | frozenset(chr(code) for low, high in ((0, 9), (11, 13), (13, 32), (127, 160)) for code in range(low, high))
"""What datatrove's simplification turns into spaces (utils/text.py, `PUNCTUATION`)."""
DECIMAL_SEPARATORS = frozenset(".,\u060c\u066b\u2396\u2397\u2398")
NUMBER = re.compile(r"\d+(?:[.,\u060c\u066b\u2396\u2397\u2398]\d+)?")
_NEEDS_NEIGHBOURS = frozenset("\u0130\u03a3")
"""Lower case of these is two characters, or depends on the place in the word."""


@cache
def folded_characters() -> tuple[np.ndarray, np.ndarray]:
    """Return ``(bounds, bytes)``: the folded character c is ``bytes[bounds[c]:bounds[c + 1]]`` in UTF-8."""
    parts = [_folded(chr(code)).encode("utf-8", "surrogatepass") for code in range(FOLDED_CODES)]
    bounds = np.zeros(FOLDED_CODES + 1, dtype=np.int32)
    np.cumsum([len(part) for part in parts], out=bounds[1:])
    return bounds, np.frombuffer(b"".join(parts), dtype=np.uint8)


def _folded(character: str) -> str:
    if character < "\x80":
        return character.lower()
    decomposed = unicodedata.normalize("NFD", character.lower())
    return "".join(part for part in decomposed if unicodedata.category(part) != "Mn")


def _table() -> np.ndarray:
    return np.full(FOLDED_CODES, SPACE, dtype=np.uint8)


@cache
def word_classes() -> np.ndarray:
    """Return the classes of the project's words: runs of letters, digits, `_` and spacing marks; single characters in `NO_SPACES`."""
    table, single = _table(), re.compile(f"[{NO_SPACES}]")
    for code in range(FOLDED_CODES):
        character = chr(code)
        if character.isalnum() or character == "_" or unicodedata.category(character) == "Mc":
            table[code] = SINGLE if single.match(character) else WORD
        elif character in JOINERS or unicodedata.category(character) in ("Mn", "Me"):
            table[code] = MARK
    return table


@cache
def simplified_classes() -> np.ndarray:
    """Return the classes of datatrove's simplification."""
    table = _table()
    for code in range(FOLDED_CODES):
        character = chr(code)
        space = character in PUNCTUATION or character.isspace()
        category = unicodedata.category(character)
        if category == "Nd":
            table[code] = DIGIT
        elif character in DECIMAL_SEPARATORS:
            table[code] = SEPARATOR_SPACE if space else SEPARATOR
        elif not space:
            slow = character in _NEEDS_NEIGHBOURS or (category != "Mn" and unicodedata.combining(character))
            table[code] = SLOW if slow else MARK if category == "Mn" else WORD
    return table


def simplified(text: str) -> str:
    """Return `text` lower-cased, numbers as 0, punctuation as space, spaces folded, decomposed, without non-spacing marks."""
    text = NUMBER.sub("0", text.lower())
    text = " ".join("".join(" " if character in PUNCTUATION else character for character in text).split())
    decomposed = unicodedata.normalize("NFD", text)
    return "".join(character for character in decomposed if unicodedata.category(character) != "Mn").strip()
