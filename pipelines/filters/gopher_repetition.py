"""Gopher's repetition rules (2112.11446, appendix A.1.1, table A1), with the definitions of datatrove 0.10.1.

The first copy of a line, paragraph or n-gram does not count. All fractions of characters are of the document's
characters. Top n-grams are joined with spaces, a tie goes to the n-gram that comes first; duplicate n-grams are
joined without spaces and counted from left to right, a repeated one being jumped over.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from pipelines.filters import Filter, Rule
from pipelines.words import Dialect, in_groups, split_words

SOURCE = "Gopher, 2112.11446, table A1"
TOP = {2: 0.20, 3: 0.18, 4: 0.16}
DUPLICATE = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}


class GopherRepetition(Filter):
    """Shares of a document that repeat what it said before."""

    words: Dialect = "spacy_en"
    """What counts as a word of an n-gram; datatrove's verdicts hold for ``spacy_en``."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule("duplicate_paragraph_fraction", "at_most", 0.30, SOURCE),
        Rule("duplicate_paragraph_character_fraction", "at_most", 0.20, SOURCE),
        Rule("duplicate_line_fraction", "at_most", 0.30, SOURCE),
        Rule("duplicate_line_character_fraction", "at_most", 0.20, SOURCE),
        *(Rule(f"top_{n}_gram_character_fraction", "at_most", threshold, SOURCE) for n, threshold in TOP.items()),
        *(Rule(f"duplicate_{n}_gram_character_fraction", "at_most", threshold, SOURCE) for n, threshold in DUPLICATE.items()),
    )

    def score(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        from pipelines.filters._repetition import COLUMNS, repetition_scores

        groups = [repetition_scores(split_words(group, self.words)) for group in in_groups(texts)]
        found = np.concatenate([np.empty((0, COLUMNS)), *groups]).T
        return {rule.name: column for rule, column in zip(self.rules, found, strict=True)}
