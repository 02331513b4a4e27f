"""Topics that toxicity filters are known to confuse with toxicity: a label, nothing to decide by.

Dixon et al. (2018, Measuring and Mitigating Unintended Bias in Text Classification) and Dodge et al. (2021, Documenting Large
Webtext Corpora, section 5.3) found that classifiers and word lists remove text about the people whom insults name. Which
documents mention them is measured here, once; the table `by_topic` of a filtered corpus then sets what its rules flag in
each topic beside what they flag in all. English single words, 439 of them (`_wordlists/topics.txt`); words that mean something
else more often (disabled, white, polish) are not on the list.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import Field

from pipelines.errors import GristmillError
from pipelines.filters import Filter, Rule

if TYPE_CHECKING:
    from pipelines.filters._vocabulary import Vocabulary

LIST_SHA256 = "c7c6de1936d98a5232b6bf1cf85cb3dbac8948d61dfc9f948ec29df46a3b15e6"
"""Of the list's bytes: so a changed list is changed code, and documents are scored again."""
IDENTITY = ("religion", "ethnicity", "gender", "sexuality", "disability", "nationality")
"""The topics that `identity` stands for, besides their own."""


class Topics(Filter):
    """Topics mentioned, with commas between them: of `IDENTITY` and identity itself, violence, medicine, sexual_health."""

    min_per_thousand_words: float = Field(default=2.0, gt=0)
    """A topic is mentioned by at least one word, and by at least this many of a thousand: one word does not make a novel's topic."""

    rules: ClassVar[tuple[Rule, ...]] = ()
    labels: ClassVar[tuple[str, ...]] = ("mentioned",)

    def score(self, texts: Sequence[str]) -> dict[str, list[str | None]]:
        from pipelines.filters._vocabulary import count_groups

        words, groups, names = _list()
        found: list[str | None] = []
        for text in texts:  # one at a time: a text is short beside the arrays that a batch of them would need
            counts, totals = count_groups([text.lower()], words, groups)
            needed = max(1.0, self.min_per_thousand_words * totals[0] / 1_000)
            found.append(",".join(name for name, count in zip(names, counts[0], strict=True) if count >= needed))
        return {"mentioned": found}


@cache
def _list() -> tuple[Vocabulary, np.ndarray, tuple[str, ...]]:
    """Return the list's words, the topics of each (bool, words by topics), and the topics."""
    from pipelines.filters._vocabulary import vocabulary

    path = Path(__file__).parent / "_wordlists" / "topics.txt"
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != LIST_SHA256:
        raise GristmillError(f"{path} is not the list that LIST_SHA256 names; restore it, or set LIST_SHA256 to the new list's hash")
    topics: defaultdict[str, set[str]] = defaultdict(set)
    for line in content.decode().splitlines():
        topic, _, words = line.partition(":")
        topics[topic].update(words.split())
    topics["identity"] = set().union(*(topics[topic] for topic in IDENTITY))
    names, every = tuple(sorted(topics)), sorted(set().union(*topics.values()))
    return vocabulary(every), np.array([[word in topics[name] for name in names] for word in every]), names
