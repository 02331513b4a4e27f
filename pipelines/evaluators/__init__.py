"""Evaluators: what is measured of a checkpoint, document by document, so that any two checkpoints can be compared in pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pyarrow as pa

from pipelines.plugins import Plugin
from pipelines.shards import HeldOutDocuments

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Evaluator(Plugin):
    """Base of every evaluator."""

    def score(self, model: PreTrainedModel, documents: dict[str, HeldOutDocuments], end_of_text: int) -> pa.Table:
        """Return one row per document: ``id, domain, tokens, bytes, nll`` (negative log-likelihood in nats, summed)."""
        raise NotImplementedError
