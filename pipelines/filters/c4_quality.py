"""C4's rules that judge a whole document (1910.10683, section 2.2), over the lines that its line rules leave.

A line is left out when it has a word of more than 1,000 characters, fewer than 3 words, "javascript" or a phrase of a
cookie or privacy notice; the text itself is not changed. Order, phrases and sentences (spaCy's sentencizer, line by line)
are those of datatrove 0.10.1. Where a document has lines with "lorem ipsum" and others with a curly bracket, datatrove names
the line that comes first; here both are counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from pipelines.filters import Filter, Rule
from pipelines.words import in_groups

SOURCE = "C4, 1910.10683, section 2.2"
MAX_WORD_LENGTH = 1_000
MIN_WORDS_PER_LINE = 3


class C4Quality(Filter):
    """Number of sentences, and marks of placeholder text and of code."""

    require_terminal_punctuation: bool = False
    """Leave out lines that do not end in ``. ? ! " '`` (C4 does; FineWeb, 2406.17557, section 3.4, does not)."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule("num_lorem_ipsum_lines", "at_most", 0, SOURCE),
        Rule("num_curly_bracket_lines", "at_most", 0, SOURCE),
        Rule("num_sentences", "at_least", 5, SOURCE),
    )

    def score(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        from pipelines.filters._lines import count_sentences, keep_lines

        found = [np.empty((0, 3))]
        for group in in_groups(texts):
            kept = keep_lines(group, max_word=MAX_WORD_LENGTH, min_words=MIN_WORDS_PER_LINE, punctuated=self.require_terminal_punctuation)
            found.append(np.column_stack((kept.counts, count_sentences(kept))))
        return {rule.name: column.astype(np.float64) for rule, column in zip(self.rules, np.concatenate(found).T, strict=True)}
