"""Rules for files of source code: long lines and few letters mark minified, generated and data files.

DeepSeek-Coder (2401.14196, section 2.1; after Codex and StarCoder) drops files whose lines have more than 100 characters
on average, or one of more than 1,000, and files with fewer than 25% alphabetic characters. Meant for code alone: a
paragraph of prose is one line.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from pipelines.filters import Filter, Rule

SOURCE = "DeepSeek-Coder, 2401.14196, section 2.1"


class CodeQuality(Filter):
    """Line lengths in characters, and the share of letters."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule("mean_line_length", "at_most", 100, SOURCE),
        Rule("longest_line_length", "at_most", 1_000, SOURCE),
        Rule("alphabetic_character_fraction", "at_least", 0.25, SOURCE),
    )

    def score(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        scores = np.array([_shares(text) for text in texts], dtype=np.float64).reshape(-1, 3)
        return {rule.name: scores[:, column] for column, rule in enumerate(self.rules)}


def _shares(text: str) -> tuple[float, float, float]:
    lines = list(map(len, text.splitlines()))
    if not lines:
        return np.nan, np.nan, np.nan
    return sum(lines) / len(lines), max(lines), sum(map(str.isalpha, text)) / len(text)
