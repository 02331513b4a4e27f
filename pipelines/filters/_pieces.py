"""A long text in pieces, so that what a filter makes of its words does not take many times its size."""

from __future__ import annotations

import re
from collections.abc import Iterator

PIECE_CHARACTERS = 1 << 20
_SPACE = re.compile(r"\s")


def pieces(text: str, characters: int = PIECE_CHARACTERS) -> Iterator[str]:
    """Yield `text` in consecutive pieces of about `characters`, each but the last ending in white space: no word is cut."""
    start = 0
    while len(text) - start > characters and (gap := _SPACE.search(text, start + characters)):
        yield text[start : gap.end()]
        start = gap.end()
    if start < len(text):
        yield text[start:] if start else text
