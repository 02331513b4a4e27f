"""Masked loss: how well a model that sees both sides fills in held-out text.

The positions of a window are dealt into `passes` groups at random; each pass hides one group and predicts it from the rest,
so that every token is predicted once from about ``1 - 1 / passes`` of its window. The sum over a document is a
pseudo-log-likelihood (Salazar et al. 2020, 1910.14659, section 2) with several positions hidden at a time: losses and bits per
byte compare such checkpoints among each other, not with the likelihoods of left-to-right ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from pydantic import Field

from pipelines.batch import IGNORED, Batch, SpecialTokens
from pipelines.errors import GristmillError
from pipelines.evaluators import Evaluator, document_table
from pipelines.models import hidden_states, prediction_head
from pipelines.progress import Progress
from pipelines.shards import HeldOutDocuments

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class MaskedLoss(Evaluator):
    """Negative pseudo-log-likelihood per document."""

    passes: int = Field(default=7, ge=2)
    """Groups that the positions of a window are dealt into; 7 hides about the 15 % of BERT."""
    batch_windows: int = Field(default=16, ge=1)
    """Windows per forward pass."""
    seed: int = Field(default=0, ge=0)
    """Of the groups."""

    def score(self, model: PreTrainedModel, documents: dict[str, HeldOutDocuments], tokens: SpecialTokens) -> pa.Table:
        if tokens.mask is None:
            raise GristmillError("masked_loss needs a mask token, and the tokenizer has none; bring one that has, or train it here")
        progress = Progress("masked loss", sum(d.num_tokens for d in documents.values()), "tokens")
        tables, done = [], 0
        for domain, held in documents.items():
            tables.append(document_table(domain, held, self._document_nll(model, held, tokens)))
            done += held.num_tokens
            progress.update(done, domain)
        return pa.concat_tables(tables)

    def _document_nll(self, model: PreTrainedModel, held: HeldOutDocuments, tokens: SpecialTokens) -> np.ndarray:
        """Return the summed negative pseudo-log-likelihood of each document, float64 of shape (documents,)."""
        import torch

        length = model.config.max_position_embeddings
        windows = [(n, t[i : i + length].astype(np.int64)) for n, t in enumerate(held.tokens) for i in range(0, len(t), length)]
        windows.sort(key=lambda pair: len(pair[1]))
        totals = np.zeros(len(held.ids))
        with torch.no_grad():
            for start in range(0, len(windows), self.batch_windows):
                chosen = windows[start : start + self.batch_windows]
                for owner, nats in zip([n for n, _ in chosen], self._nats(model, [w for _, w in chosen], tokens), strict=True):
                    totals[owner] += nats
        return totals

    def _nats(self, model: PreTrainedModel, windows: list[np.ndarray], tokens: SpecialTokens) -> np.ndarray:
        """Return the nats of each window, summed over its positions."""
        import torch

        width = max(map(len, windows))
        ids_BT = np.full((len(windows), width), tokens.end_of_text, dtype=np.int64)
        groups_BT = np.full((len(windows), width), -1)
        lengths_B = np.asarray([len(window) for window in windows])
        for row, window in enumerate(windows):
            generator = np.random.Generator(np.random.Philox(key=[self.seed, len(window)]))
            ids_BT[row, : len(window)] = window
            groups_BT[row, : len(window)] = generator.permutation(len(window)) % self.passes
        padding_BT = torch.from_numpy(np.arange(width)[None, :] >= lengths_B[:, None]).long()
        total_B = np.zeros(len(windows))
        for number in range(self.passes):
            hidden = groups_BT == number
            inputs = torch.from_numpy(np.where(hidden, tokens.mask, ids_BT))
            targets = torch.from_numpy(np.where(hidden, ids_BT, IGNORED))
            # Padding is a document of its own: no position of the text attends to it.
            total_B += self._pass(model, Batch(inputs, targets, padding_BT))
        return total_B

    @staticmethod
    def _pass(model: PreTrainedModel, batch: Batch) -> np.ndarray:
        import torch

        places = batch.targets_BT != IGNORED
        head = prediction_head(model)
        hidden_ND = head.transform(hidden_states(model, batch, "bidirectional")[places])
        logits_NV = torch.nn.functional.linear(hidden_ND, head.weight_VD, head.bias_V).float()
        nats = torch.zeros(places.shape, dtype=torch.float64)
        nats[places] = torch.nn.functional.cross_entropy(logits_NV, batch.targets_BT[places], reduction="none").double()
        return nats.sum(dim=1).numpy()
