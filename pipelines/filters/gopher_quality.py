"""Gopher's quality rules (2112.11446, appendix A.1.1), in the order and with the thresholds of datatrove 0.10.1.

Words made of punctuation alone do not count in `num_words` and `mean_word_length`, and do in the other ratios. What a
word is changes verdicts: with spaCy's tokens the rule on letters drops several times more than with whitespace words.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from pipelines.filters import Filter, Rule
from pipelines.filters._punctuation import PUNCTUATION
from pipelines.filters._words import Dialect, in_groups, share, split_words

SOURCE = "Gopher, 2112.11446, appendix A.1.1"


class GopherQuality(Filter):
    """Counts of words, symbols, bullet points and stop words."""

    words: Dialect = "whitespace"
    """What counts as a word."""
    stop_words: tuple[str, ...] = ("the", "be", "to", "of", "and", "that", "have", "with")
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
        return in_groups(self._score, texts, [rule.name for rule in self.rules])

    def _score(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        words = split_words(texts, self.words)
        counted = words.each(lambda word: not PUNCTUATION.issuperset(word))
        num_words = words.sums(counted)
        mean_length = share(words.sums(counted * words.lengths), num_words)
        lines = [_line_shares(text.splitlines()) for text in texts]
        return {
            "num_words": num_words,
            "num_words_max": num_words,
            "mean_word_length": mean_length,
            "mean_word_length_max": mean_length,
            "hash_to_word_ratio": share(np.array([text.count("#") for text in texts]), words.counts),
            "ellipsis_to_word_ratio": share(np.array([text.count("...") + text.count("…") for text in texts]), words.counts),
            "bullet_line_fraction": np.array([bullets for bullets, _ in lines]),
            "ellipsis_line_fraction": np.array([ellipses for _, ellipses in lines]),
            "alphabetic_word_fraction": share(words.sums(words.each(_has_letter)), words.counts),
            "num_stop_words": self._num_stop_words(texts),
        }

    def _num_stop_words(self, texts: Sequence[str]) -> np.ndarray:
        stop_words = frozenset(self.stop_words)
        return np.array([len(stop_words.intersection(text.split())) for text in texts])


def _line_shares(lines: list[str]) -> tuple[float, float]:
    """Return the shares of `lines` that start with a bullet point and that end with an ellipsis; NaN without lines."""
    if not lines:
        return np.nan, np.nan
    bullets = sum(line.lstrip().startswith(("•", "-")) for line in lines)
    ellipses = sum(line.rstrip().endswith(("...", "…")) for line in lines)
    return bullets / len(lines), ellipses / len(lines)


def _has_letter(word: str) -> bool:
    return word.isalpha() or any(map(str.isalpha, word))
