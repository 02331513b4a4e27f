"""Damage that encoding repair left: replacement characters, and characters in the orders that mojibake has.

Mojibake is recognised by ftfy's expression (Speer, ftfy 6, `badness`): sequences of characters that UTF-8 read as a
single-byte encoding gives and text does not have.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from pipelines.filters import Filter, Rule

SAMPLE = "embedded sample, "


class Encoding(Filter):
    """Shares of damaged characters."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule("replacement_character_fraction", "at_most", 0.001, SAMPLE + "clean documents: 0"),
        Rule(
            "mojibake_fraction",
            "at_most",
            0.01,
            SAMPLE + "clean documents: at most 0.0065; before repair, 48% of the mojibake: more",
        ),
    )
    packages: ClassVar[tuple[str, ...]] = ("ftfy",)

    def score(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        from ftfy.badness import BADNESS_RE

        scores = np.full((len(texts), 2), np.nan)
        for row, text in enumerate(texts):
            if text:
                damaged = 0 if text.isascii() else sum(len(match[0]) for match in BADNESS_RE.finditer(text))
                scores[row] = text.count("\ufffd") / len(text), damaged / len(text)
        return {rule.name: scores[:, column] for column, rule in enumerate(self.rules)}
