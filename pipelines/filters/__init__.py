"""Filters: each measures documents once; recipes decide by thresholds over the stored scores.

A filter is a frozen settings class with `rules` (the columns it scores and the default threshold of each) and
`score`. What changes a score is a field; a threshold is not: it belongs to the recipe. A `FittedFilter` is first fitted
on training documents, once for all partitions, and scores with the state that `fit` wrote.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, Protocol

import numpy as np

from pipelines.manifests import Outcome
from pipelines.plugins import LocatedPlugin

Scores = Mapping[str, np.ndarray | Sequence[str | None]]
"""By rule float64 of shape ``(documents,)``, by label a list of as many strings, None where nothing can be said."""


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


class Filter(LocatedPlugin):
    """Base of every filter."""

    rules: ClassVar[tuple[Rule, ...]]
    """In the order in which a drop's first reason is looked for."""
    labels: ClassVar[tuple[str, ...]] = ()
    """String columns that `score` returns beside its rules; nothing is decided by them."""
    columns: ClassVar[tuple[str, ...]] = ("text",)
    """Columns of a document that `score` takes, in the order of its arguments."""
    packages: ClassVar[tuple[str, ...]] = ()
    """Installed packages whose version changes the scores: part of the scores' identity."""

    def score(self, *columns: Sequence[str]) -> Scores:
        """Return the scores of each rule and the strings of each label. Pure, one thread, no order effects.

        Args:
            columns: the values of each of the class's `columns`; by default one argument, the texts.
        """
        raise NotImplementedError


class Sample(Protocol):
    """The training split of the pinned sample: what a filter may be fitted on."""

    def documents(self, domain: str) -> Iterator[tuple[str, str]]:
        """Yield ``(id, text)`` of the training documents of `domain`, in the order of partitions and rows; any number of times."""
        ...


class FittedFilter(Filter):
    """Base of the filters that learn from text first.

    `fit` runs once, in one thread, for all partitions; nothing held out reaches it.
    """

    def domains(self) -> tuple[str, ...]:
        """Return the domains of the project whose training documents `fit` reads; a change of another one fits nothing anew."""
        raise NotImplementedError

    def fit(self, sample: Sample, state: Path) -> Outcome:
        """Fit, write the state (safetensors, JSON, Parquet; plots as PNG) into directory `state`, return what was measured.

        The files of `files` are read too. The same sample gives the same bytes, whatever the number of threads.
        """
        raise NotImplementedError

    def score(self, *columns: Sequence[str], state: Path) -> Scores:
        """Return the scores as `Filter.score` does, with the state that `fit` wrote into directory `state`."""
        raise NotImplementedError
