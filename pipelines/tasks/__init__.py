"""Tasks: what a checkpoint can do after its training, item by item, so that any two checkpoints can be compared in pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import pyarrow as pa

from pipelines.plugins import LocatedPlugin

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ITEM_SCHEMA = pa.schema(
    [
        ("group", pa.string()),
        ("item", pa.string()),
        ("metric", pa.string()),
        ("score", pa.float64()),
        ("weight", pa.float64()),
        ("tokens", pa.int64()),
        ("bytes", pa.int64()),
    ]
)
"""A row per item and metric. `item` names it within its group; `weight` is what it counts in a mean (1 but for losses per byte or
word); `tokens` and `bytes` are those of the text whose likelihood was taken, null where a task does not know them."""

LOWER_IS_BETTER = frozenset(("nats_per_byte", "nats_per_word", "bits_per_byte", "expected_maximum", "any_toxic"))
"""Metrics of which less is better."""


class Task(LocatedPlugin):
    """Base of every task."""

    packages: ClassVar[tuple[str, ...]] = ()
    """Installed packages whose version changes the scores, beside those of the models."""

    def score(self, model: PreTrainedModel, tokenizer: Path) -> pa.Table:
        """Return the scores of `model`, a row per item and metric, as `ITEM_SCHEMA` says.

        Args:
            model: a language model in evaluation mode, on the device where it is to be scored.
            tokenizer: a Hugging Face directory.

        Raises:
            GristmillError: an item cannot be read or scored.
        """
        raise NotImplementedError


def item_table(columns: Mapping[str, Sequence[object]]) -> pa.Table:
    """Return rows of `ITEM_SCHEMA` from its columns; `weight` is 1 where it is left out, the rest null."""
    rows = len(columns["item"])
    absent: dict[str, list[object]] = {"weight": [1.0] * rows, "tokens": [None] * rows, "bytes": [None] * rows}
    return pa.table({name: columns.get(name, absent.get(name)) for name in ITEM_SCHEMA.names}, schema=ITEM_SCHEMA)
