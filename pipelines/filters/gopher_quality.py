"""Gopher's quality rules (2112.11446, appendix A.1.1), in the order and with the thresholds of datatrove 0.10.1.

Words made of punctuation alone do not count in `num_words` and `mean_word_length`, and do in the other ratios. What a
word is changes verdicts: with spaCy's tokens the rule on letters drops several times more than with whitespace words.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from pipelines.filters import Filter, Rule
from pipelines.words import Dialect, in_groups, split_words

SOURCE = "Gopher, 2112.11446, appendix A.1.1"


class GopherQuality(Filter):
    """Counts of words, symbols, bullet points and stop words."""

    words: Dialect = "spacy_en"
    """What counts as a word; datatrove's verdicts hold for ``spacy_en``."""
    stop_words: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        ("the", "be", "to", "of", "and", "that", "have", "with"), min_length=1, max_length=64
    )
    """Compared with case, as whole words."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule("num_words", "at_least", 50, SOURCE),
        Rule("num_words_max", "at_most", 100_000, SOURCE),
        Rule("mean_word_length", "at_least", 3, SOURCE),
        Rule("mean_word_length_max", "at_most", 10, SOURCE),
        Rule("hash_to_word_ratio", "at_most", 0.1, SOURCE),
        Rule("ellipsis_to_word_ratio", "at_most", 0.1, SOURCE),
        Rule("bullet_line_fraction", "at_most", 0.9, SOURCE),
        Rule("ellipsis_line_fraction", "at_most", 0.3, SOURCE),
        Rule("alphabetic_word_fraction", "at_least", 0.8, SOURCE),
        Rule("num_stop_words", "at_least", 2, SOURCE + "; distinct stop words"),
    )

    def score(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        from pipelines.filters._quality import COLUMNS, quality_scores

        groups = [quality_scores(split_words(group, self.words), self.stop_words) for group in in_groups(texts)]
        found = np.concatenate([np.empty((0, COLUMNS)), *groups]).T
        columns = (0, 0, 1, 1, *range(2, COLUMNS))  # a lower and an upper bound look at the same number
        return {rule.name: found[column] for rule, column in zip(self.rules, columns, strict=True)}
