"""Word order of English, by pairs of function words that never stand side by side ("the of", "of was", "a the").

In shuffled text a function word is followed by another one at random, about every fourth time; in running English the
pairs listed here hardly occur. Documents with few function words get no score.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar

import numpy as np

from pipelines.filters import Filter, Rule
from pipelines.filters._pieces import pieces

_VERBS = "is was were are be been has had have do does did"
_PREPOSITIONS = "of to in for with from by at on into"
IMPOSSIBLE = {
    "the": f"{_VERBS} {_PREPOSITIONS} and or but the a an it he they that which this his their its as",
    "a": f"{_VERBS} {_PREPOSITIONS} and or but the a an it he they that which this his their its as",
    "an": f"{_VERBS} {_PREPOSITIONS} and or but the a an it he they that which this his their its as",
    "of": f"{_VERBS} of and or but he they to for",
    "to": "is was were are been has had did of and or but he they to for",
    "and": "and or",
    "in": f"{_VERBS} of and or but he they to with from by",
    "their": f"{_VERBS} {_PREPOSITIONS} and or but the a an it he they that which this his their its as",
}
"""First word, and the words that never follow it."""
SAMPLE = "embedded sample: more in 87% of shuffled documents (95% of prose), in at most 0.8% of clean ones of any domain"

_LEADING = {word: number for number, word in enumerate(IMPOSSIBLE, start=1)}
_FOLLOWING = {
    word: sum(1 << number for lead, number in _LEADING.items() if word in IMPOSSIBLE[lead].split())
    for word in sorted({word for words in IMPOSSIBLE.values() for word in words.split()})
}


class WordOrder(Filter):
    """Share of impossible pairs among the pairs that begin with a listed word."""

    min_pairs: int = 6
    """A document with fewer pairs that begin with a listed word is not scored."""

    rules: ClassVar[tuple[Rule, ...]] = (Rule("impossible_pair_fraction", "at_most", 0.10, SAMPLE),)

    def score(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        return {"impossible_pair_fraction": np.array([self._fraction(text) for text in texts], dtype=np.float64)}

    def _fraction(self, text: str) -> float:
        num_pairs = impossible = 0
        last: list[str] = []
        for piece in pieces(text):
            words = last + piece.lower().split()
            pairs = [(_LEADING[first], second) for first, second in pairwise(words) if first in _LEADING]
            num_pairs += len(pairs)
            impossible += sum((_FOLLOWING.get(second, 0) >> leading) & 1 for leading, second in pairs)
            last = words[-1:]
        return impossible / num_pairs if num_pairs >= self.min_pairs else np.nan
