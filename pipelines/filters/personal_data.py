"""How much personal data a document holds, masked or not: what to drop a list of members or a leaked table by.

Cleaning masks or counts each occurrence (`cleaning: {personal_data: ...}`); here a document's own count becomes a score, so
that a recipe can drop it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from pipelines.filters import Filter, Rule
from pipelines.personal_data import KINDS, TOKEN, find

SAMPLE = "most in a clean document of the embedded sample: "


class PersonalData(Filter):
    """Occurrences by kind: the masks that cleaning left, and what is not masked."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule("emails", "at_most", 20, SAMPLE + "10"),
        Rule("ibans", "at_most", 1, SAMPLE + "0"),
        Rule("cards", "at_most", 1, SAMPLE + "0"),
        Rule("national_ids", "at_most", 1, SAMPLE + "0"),
        Rule("phones", "at_most", 10, SAMPLE + "2"),
        Rule("ips", "at_most", 20, SAMPLE + "6"),
    )

    def score(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        counts = [_count(text) for text in texts]
        return {f"{kind}s": np.array([found[kind] for found in counts], dtype=np.float64) for kind in KINDS}


def _count(text: str) -> Counter[str]:
    found = Counter(each.kind for each in find(text))
    if "<" in text:
        found.update(match[1].lower() for match in TOKEN.finditer(text))
    return found
