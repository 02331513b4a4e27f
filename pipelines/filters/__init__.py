"""Filters: each measures documents once; recipes decide by thresholds over the stored scores.

A filter is a frozen settings class with `rules` (the columns it scores and the default threshold of each) and
`score`. What changes a score is a field; a threshold is not: it belongs to the recipe.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from pipelines.plugins import Plugin


@dataclass(frozen=True)
class Rule:
    """A document passes where its score in column `name` lies on the kept side of the threshold, bound included.

    A score of NaN passes: the rule does not apply to the document.
    """

    name: str
    """The score's column, and the reason given for a drop."""
    keep: Literal["at_least", "at_most"]
    threshold: float
    source: str
    """The paper and section, or the measurement, that the default threshold comes from."""


class Filter(Plugin):
    """Base of every filter."""

    rules: ClassVar[tuple[Rule, ...]]
    """In the order in which a drop's first reason is looked for."""
    columns: ClassVar[tuple[str, ...]] = ("text",)
    """Columns of a document that `score` takes, in the order of its arguments."""
    packages: ClassVar[tuple[str, ...]] = ()
    """Installed packages whose version changes the scores: part of the scores' identity."""

    def score(self, *columns: Sequence[str]) -> dict[str, np.ndarray]:
        """Return, for each rule's name, float64 scores, one per document. Pure, one thread, no order effects.

        Args:
            columns: the values of each of the class's `columns`; by default one argument, the texts.
        """
        raise NotImplementedError
