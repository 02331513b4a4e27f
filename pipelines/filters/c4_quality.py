"""C4's rules that judge a whole document (1910.10683, section 2.2), over the lines that its line rules leave.

A line is left out when it has a word of more than 1,000 characters, fewer than 3 words, "javascript" or a phrase of a
cookie or privacy notice; the text itself is not changed. The order and the phrases are those of datatrove 0.10.1.
Sentences are counted by a pattern where datatrove takes spaCy's sentencizer: a run of ``. ! ?`` with closing quotes or
brackets, before white space or the line's end, ends one; what follows the last one counts as one more.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from pipelines.filters import Filter, Rule

SOURCE = "C4, 1910.10683, section 2.2"
MAX_WORD_LENGTH = 1_000
MIN_WORDS_PER_LINE = 3
NOTICES = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")

_CITATION = re.compile(r"\[\d*\]|\[edit\]|\[citation needed\]")
_SENTENCE_END = re.compile(r"[.!?]+[\"'”’)\]]*(?=\s|$)")


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
        counts = np.array([self._count(text) for text in texts], dtype=np.float64).reshape(-1, 3)
        return {rule.name: counts[:, column] for column, rule in enumerate(self.rules)}

    def _count(self, text: str) -> tuple[int, int, int]:
        """Return the lines with "lorem ipsum", the lines with a curly bracket, and the sentences."""
        lorem = curly = sentences = 0
        for raw in text.splitlines():
            line = raw.strip()
            if not self._is_kept(line):
                continue
            line = _CITATION.sub("", line) if "[" in line else line
            lower = line.lower()
            if "lorem ipsum" in lower:
                lorem += 1
            elif "javascript" in lower:
                continue
            elif "{" in line:
                curly += 1
            elif not any(notice in lower for notice in NOTICES):
                sentences += _num_sentences(line)
        return lorem, curly, sentences

    def _is_kept(self, line: str) -> bool:
        words = line.split(maxsplit=MIN_WORDS_PER_LINE)
        if len(words) < MIN_WORDS_PER_LINE or (len(line) > MAX_WORD_LENGTH and max(map(len, line.split())) > MAX_WORD_LENGTH):
            return False
        if not self.require_terminal_punctuation:
            return True
        end = _CITATION.sub("", line)
        return end.endswith((".", "?", "!", '"', "'")) and not end.endswith("...")


def _num_sentences(line: str) -> int:
    ends = [match.end() for match in _SENTENCE_END.finditer(line)]
    return len(ends) + bool(line[ends[-1] if ends else 0 :].strip())
