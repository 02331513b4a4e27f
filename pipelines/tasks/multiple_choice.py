"""Multiple choice: which continuation of a question is the most likely one, by a Parquet file of one's own.

Scored as lm-evaluation-harness 0.4.13 does (`api/task.py`, `ConfigurableTask.process_results`): the log-likelihood of a space and
the choice after the question; `acc` takes the largest, `acc_norm` the largest by character of the choice, and the first of equals.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from pydantic import Field

from pipelines.errors import GristmillError
from pipelines.model_files import local_path
from pipelines.tasks import Task, item_table
from pipelines.tasks._items import numbered, read_columns
from pipelines.tasks._likelihoods import score_pairs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

METRICS = ("acc", "acc_norm")


class MultipleChoice(Task):
    """Accuracy on questions with choices: two rows per item, ``acc`` and ``acc_norm``."""

    path: Path
    """A Parquet file, relative to the project."""
    question: str = "question"
    """Its column of contexts; an empty one stands for the beginning of a text."""
    choices: str = "choices"
    """Its column of lists of continuations, two at least."""
    answer: str = "answer"
    """Its column of the right one: its number in the list, from 0, or its text."""
    group: str | None = None
    """Its column of what an item belongs to; one group where there is none."""
    prompt: str = "{question}"
    """The context; ``{question}`` stands for the column's value."""
    delimiter: str = " "
    """Stands between context and choice."""
    batch_tokens: int = Field(default=2048, ge=1)
    """Tokens per forward pass."""

    def files(self) -> Sequence[Path]:
        return (local_path(str(self.path), self.root, key="path"),)

    def score(self, model: PreTrainedModel, tokenizer: Path) -> pa.Table:
        path = self.files()[0]
        grouped = (self.group,) if self.group else ()
        columns = read_columns(path, (self.question, self.choices, self.answer, *grouped), text=grouped)
        choices = [_choices(path, row, value) for row, value in enumerate(columns[self.choices])]
        answers = [_answer(path, row, value, choices[row]) for row, value in enumerate(columns[self.answer])]
        groups = columns[self.group] if self.group else ["all"] * len(choices)
        contexts = [self.prompt.replace("{question}", question or "") for question in columns[self.question]]
        pairs = [(context, self.delimiter + choice) for context, mine in zip(contexts, choices, strict=True) for choice in mine]
        scored = score_pairs(model, tokenizer, pairs, batch_tokens=self.batch_tokens, label="multiple_choice")
        ends = np.cumsum([len(mine) for mine in choices])[:-1]
        right = [_right(nats, *item) for nats, *item in zip(np.split(scored.nats, ends), choices, answers, strict=True)]
        return item_table(
            {
                "group": np.repeat(groups, len(METRICS)).tolist(),
                "item": np.repeat(numbered(groups), len(METRICS)).tolist(),
                "metric": list(METRICS) * len(choices),
                "score": np.asarray(right, dtype=float).ravel(),
                "tokens": np.repeat([part.sum() for part in np.split(scored.tokens, ends)], len(METRICS)),
                "bytes": np.repeat([sum(len(choice.encode()) for choice in mine) for mine in choices], len(METRICS)),
            }
        )


def _right(nats: np.ndarray, choices: Sequence[str], answer: int) -> tuple[bool, bool]:
    """Return whether the answer is taken by log-likelihood, and by log-likelihood per character; the first of equals is taken."""
    return int(np.argmax(nats)) == answer, int(np.argmax(nats / [float(len(choice)) for choice in choices])) == answer


def _choices(path: Path, row: int, value: object) -> list[str]:
    """Return the choices of one item."""
    if not isinstance(value, list) or len(value) < 2 or not all(isinstance(choice, str) and choice for choice in value):
        raise GristmillError(f"{path.name}: row {row} has the choices {value!r}; a list of two texts at least is needed")
    return value


def _answer(path: Path, row: int, value: object, choices: Sequence[str]) -> int:
    """Return the number of the right choice of one item."""
    if isinstance(value, str) and value in choices:
        return choices.index(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(choices):
        return value
    raise GristmillError(f"{path.name}: row {row} has the answer {value!r}; give the text of a choice, or its number below {len(choices)}")
