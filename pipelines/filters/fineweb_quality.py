"""FineWeb's own rules (2406.17557, section 3.6), with the definitions of datatrove 0.10.1. Blank lines do not count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np

from pipelines.filters import Filter, Rule
from pipelines.filters.c4_quality import MAX_WORD_LENGTH, MIN_WORDS_PER_LINE
from pipelines.words import Dialect, in_groups, split_words

SOURCE = "FineWeb, 2406.17557, section 3.6, as datatrove 0.10.1 sets it"


class FinewebQuality(Filter):
    """Shares of lines: punctuated, short, repeated, and lines per word."""

    words: Dialect = "spacy_en"
    """What counts as a word; datatrove's verdicts hold for ``spacy_en``."""
    lines: Literal["all", "c4"] = "all"
    """Which lines are judged: ``c4`` are those that `c4_quality` leaves, as in FineWeb, where C4's rules come first."""
    short_line_length: int = 30
    """A line of at most this many characters is short."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule("punctuated_line_fraction", "at_least", 0.12, SOURCE),
        Rule("short_line_fraction", "at_most", 0.67, SOURCE),
        Rule("duplicate_line_character_fraction", "at_most", 0.01, SOURCE),
        Rule("line_break_to_word_ratio", "at_most", 0.3, SOURCE),
    )

    def score(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        from pipelines.filters._lines import FINEWEB_COLUMNS, fineweb_scores, keep_lines

        found = [np.empty((0, FINEWEB_COLUMNS))]
        for group in in_groups(texts):
            judged: Sequence[str] = group
            if self.lines == "c4":
                judged = keep_lines(group, max_word=MAX_WORD_LENGTH, min_words=MIN_WORDS_PER_LINE, punctuated=False).texts()
            words = split_words(judged, self.words)
            found.append(fineweb_scores(words.text_codes, words.text_bounds, words.counts, short=self.short_line_length))
        return {rule.name: column for rule, column in zip(self.rules, np.concatenate(found).T, strict=True)}
