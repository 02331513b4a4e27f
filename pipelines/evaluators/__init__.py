"""Evaluators: what is measured of a checkpoint, document by document, so that any two checkpoints can be compared in pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from pipelines.batch import SpecialTokens
from pipelines.plugins import Plugin
from pipelines.shards import HeldOutDocuments

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Evaluator(Plugin):
    """Base of every evaluator."""

    def score(self, model: PreTrainedModel, documents: dict[str, HeldOutDocuments], tokens: SpecialTokens) -> pa.Table:
        """Return one row per document: ``id, domain, tokens, bytes, nll`` (negative log-likelihood in nats, summed)."""
        raise NotImplementedError


def document_table(domain: str, held: HeldOutDocuments, nll: np.ndarray) -> pa.Table:
    """Return the rows of the documents of one domain."""
    lengths = [len(tokens) for tokens in held.tokens]
    return pa.table({"id": held.ids, "domain": [domain] * len(nll), "tokens": lengths, "bytes": held.bytes, "nll": nll})
