"""Text that is not running text: tags, minified code, tables of numbers, logs.

The thresholds lie between the clean documents of the embedded sample (20,485, HTML extracted) and its planted dirt.
Lists of URLs, formal mathematics and writing without spaces need other ones.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from pipelines.filters import Filter, Rule
from pipelines.filters._pieces import pieces

SAMPLE = "embedded sample, "
CODE_PUNCTUATION = "{}()[];=<>&|"

_TAG = re.compile(r"<[/!?a-zA-Z][^<>]*>")
_TIMESTAMP = re.compile(
    r"""^[ \t]*[\[(]?(?:
        \d{4}[-/]\d\d[-/]\d\d[T\ ]\d\d:\d\d
      | \d{1,2}/[A-Z][a-z]{2}/\d{4}:\d\d:\d\d
      | [A-Z][a-z]{2}\ {1,2}\d{1,2}\ \d\d:\d\d:\d\d
      | \d\d:\d\d:\d\d
    )""",
    re.MULTILINE | re.VERBOSE,
)


class Markup(Filter):
    """Shares of characters and lines by what they are made of."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule("tag_character_fraction", "at_most", 0.20, SAMPLE + "clean outside mathematics: at most 0.10"),
        Rule(
            "code_punctuation_fraction",
            "at_most",
            0.15,
            SAMPLE + "clean outside mathematics: at most 0.12; minified: up to 0.27",
        ),
        Rule(
            "whitespace_fraction",
            "at_least",
            0.05,
            SAMPLE + "clean outside URL lists: 99.9% from 0.067; minified: to 0.035",
        ),
        Rule("digit_fraction", "at_most", 0.30, SAMPLE + "clean: at most 0.23; logs: from 0.34; tables of numbers: from 0.65"),
        Rule("timestamp_line_fraction", "at_most", 0.30, SAMPLE + "clean: below 0.01; logs: 1.0"),
    )

    def score(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        scores = np.array([_shares(text) for text in texts], dtype=np.float64).reshape(-1, 5)
        return {rule.name: scores[:, column] for column, rule in enumerate(self.rules)}


def _shares(text: str) -> tuple[float, float, float, float, float]:
    if not text:
        return np.nan, np.nan, np.nan, np.nan, np.nan
    tags = sum(tag.end() - tag.start() for tag in _TAG.finditer(text)) if "<" in text else 0
    code = sum(map(text.count, CODE_PUNCTUATION))
    spaces = len(text) - sum(len(word) for piece in pieces(text) for word in piece.split())
    digits = sum(map(text.count, "0123456789"))
    lines = sum(1 for line in text.splitlines() if line and not line.isspace())
    stamps = sum(1 for _ in _TIMESTAMP.finditer(text)) if digits else 0
    return tags / len(text), code / len(text), spaces / len(text), digits / len(text), stamps / lines if lines else np.nan
