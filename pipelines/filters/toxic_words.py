"""Share of words on a list: LDNOOBW, English, 403 entries (CC BY 4.0, `_wordlists/LICENSE.txt`), as C4 uses it.

Words are compared in lower case without the punctuation around them. An entry of several words counts all of them. The
list has medical and neutral words too, and it misses most insults: a share, not a verdict.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import ClassVar

import numpy as np

from pipelines.errors import GristmillError
from pipelines.filters import Filter, Rule
from pipelines.filters._punctuation import PUNCTUATION

SAMPLE = (
    "more in 66.5% of 993 toxic prompts (RealToxicityPrompts; at 0.02: 66.7%), in 0.08% of 19,914 clean documents of the embedded "
    "sample (0.20%) and in 3.1% of those on sexual health (9.2%)"
)

LIST_SHA256 = "ef2c957d0449baaa86ecdda6c2c998b42151823240179e1efcd427432243c4d6"
"""Of the list's bytes: so a changed list is changed code, and documents are scored again."""

_AROUND = "".join(sorted(PUNCTUATION))


class ToxicWords(Filter):
    """Listed words per word."""

    rules: ClassVar[tuple[Rule, ...]] = (Rule("listed_word_fraction", "at_most", 0.04, SAMPLE),)

    def score(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        return {"listed_word_fraction": np.array([_fraction(text) for text in texts], dtype=np.float64)}


def _fraction(text: str) -> float:
    """Return the share of the words of `text` that stand in a listed entry; NaN without words."""
    entries = _entries()
    words = [word.strip(_AROUND) for word in text.lower().split()]
    listed = bytearray(len(words))
    for position, word in enumerate(words):
        if word in entries:
            size = next((len(entry) for entry in entries[word] if tuple(words[position : position + len(entry)]) == entry), 0)
            listed[position : position + size] = b"\x01" * size
    return sum(listed) / len(words) if words else np.nan


@cache
def _entries() -> dict[str, tuple[tuple[str, ...], ...]]:
    """Return the list by first word, longest entries first."""
    path = Path(__file__).parent / "_wordlists" / "en.txt"
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != LIST_SHA256:
        raise GristmillError(f"{path} is not the list that LIST_SHA256 names; restore it, or set LIST_SHA256 to the new list's hash")
    found: defaultdict[str, list[tuple[str, ...]]] = defaultdict(list)
    for line in content.decode().splitlines():
        entry = tuple(line.lower().split())
        found[entry[0]].append(entry)
    return {first: tuple(sorted(entries, key=lambda entry: (-len(entry), entry))) for first, entries in found.items()}
