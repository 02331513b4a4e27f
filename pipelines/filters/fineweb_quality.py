"""FineWeb's own rules (2406.17557, section 3.6), with the definitions of datatrove 0.10.1. Blank lines do not count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from pipelines.filters import Filter, Rule
from pipelines.filters._punctuation import TERMINAL_PUNCTUATION
from pipelines.filters._words import Dialect, repeats

SOURCE = "FineWeb, 2406.17557, section 3.6, as datatrove 0.10.1 sets it"


class FinewebQuality(Filter):
    """Shares of lines: punctuated, short, repeated, and lines per word."""

    words: Dialect = "whitespace"
    """What counts as a word."""
    short_line_length: int = 30
    """A line of at most this many characters is short."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule("punctuated_line_fraction", "at_least", 0.12, SOURCE),
        Rule("short_line_fraction", "at_most", 0.67, SOURCE),
        Rule("duplicate_line_character_fraction", "at_most", 0.01, SOURCE),
        Rule("line_break_to_word_ratio", "at_most", 0.3, SOURCE),
    )

    def score(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        scores = np.array([self._shares(text) for text in texts], dtype=np.float64).reshape(-1, 4)
        return {rule.name: scores[:, column] for column, rule in enumerate(self.rules)}

    def _shares(self, text: str) -> tuple[float, float, float, float]:
        lines = [line for line in text.split("\n") if line and not line.isspace()]
        if not lines:
            return np.nan, np.nan, np.nan, np.nan
        breaks = text.count("\n")
        return (
            sum(line[-1] in TERMINAL_PUNCTUATION for line in lines) / len(lines),
            sum(len(line) <= self.short_line_length for line in lines) / len(lines),
            repeats(lines)[1] / (len(text) - breaks),
            breaks / len(text.split()),
        )
