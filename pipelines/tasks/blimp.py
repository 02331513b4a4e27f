"""BLiMP: of two sentences that differ in one point of grammar, is the right one more likely? (Warstadt et al. 2020, 1912.00582)

Scored as lm-evaluation-harness 0.4.13 does (`tasks/blimp/_template_yaml`): a space and the sentence after the beginning-of-text
token, summed log-likelihoods that are not divided by lengths, and a tie counts for the right sentence, which stands first. Groups
are the paradigms.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
from pydantic import Field

from pipelines.model_files import local_path
from pipelines.tasks import Task, item_table
from pipelines.tasks._items import numbered, read_columns
from pipelines.tasks._likelihoods import score_pairs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DELIMITER = " "
"""Stands between the (empty) context and a sentence: the harness's `target_delimiter`."""


class Blimp(Task):
    """Accuracy on minimal pairs: ``acc`` is 1 where the good sentence is at least as likely as the bad one."""

    path: Path = Path("data/eval/blimp.parquet")
    """A Parquet file, relative to the project."""
    good: str = "good"
    """Its column of sentences that should be the more likely ones."""
    bad: str = "bad"
    """Its column of sentences that should be the less likely ones."""
    group: str = "paradigm"
    """Its column of what a pair tests."""
    batch_tokens: int = Field(default=2048, ge=1)
    """Tokens per forward pass."""

    def files(self) -> Sequence[Path]:
        return (local_path(str(self.path), self.root, key="path"),)

    def score(self, model: PreTrainedModel, tokenizer: Path) -> pa.Table:
        columns = read_columns(self.files()[0], (self.good, self.bad, self.group), text=(self.good, self.bad, self.group))
        good, bad, groups = (columns[name] for name in (self.good, self.bad, self.group))
        pairs = [("", DELIMITER + sentence) for both in zip(good, bad, strict=True) for sentence in both]
        scored = score_pairs(model, tokenizer, pairs, batch_tokens=self.batch_tokens, label="blimp")
        return item_table(
            {
                "group": groups,
                "item": numbered(groups),
                "metric": ["acc"] * len(groups),
                "score": (scored.nats[0::2] >= scored.nats[1::2]).astype(float),
                "tokens": scored.tokens[0::2] + scored.tokens[1::2],
                "bytes": [len(one.encode()) + len(other.encode()) for one, other in zip(good, bad, strict=True)],
            }
        )
