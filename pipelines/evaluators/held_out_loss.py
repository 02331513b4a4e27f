"""Held-out loss: the negative log-likelihood of every held-out document, from which loss and bits per byte follow.

A document is read in windows of the model's length without overlap; the first token of each window is predicted from
the last token of the one before (the first of all from the end-of-text token), so every token is predicted once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from pipelines.batch import IGNORED, SpecialTokens
from pipelines.errors import GristmillError
from pipelines.evaluators import Evaluator, document_table
from pipelines.models import sees_both_sides
from pipelines.progress import Progress
from pipelines.shards import HeldOutDocuments

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class HeldOutLoss(Evaluator):
    """Negative log-likelihood per document."""

    batch_windows: int = 16
    """Windows per forward pass."""

    def score(self, model: PreTrainedModel, documents: dict[str, HeldOutDocuments], tokens: SpecialTokens) -> pa.Table:
        if sees_both_sides(model):
            raise GristmillError(
                "held_out_loss predicts each token from those before it, and this checkpoint sees both sides; set evaluator: masked_loss"
            )
        length = model.config.max_position_embeddings
        progress = Progress("held-out loss", sum(d.num_tokens for d in documents.values()), "tokens")
        tables, done = [], 0
        for domain, held in documents.items():
            nll = self._document_nll(model, held, length, tokens.end_of_text)
            done += held.num_tokens
            progress.update(done, domain)
            tables.append(document_table(domain, held, nll))
        return pa.concat_tables(tables)

    def _document_nll(self, model: PreTrainedModel, held: HeldOutDocuments, length: int, end_of_text: int) -> np.ndarray:
        """Return the summed negative log-likelihood of each document, float64 of shape (documents,)."""
        import torch

        owners, windows = _windows(held, length, end_of_text)
        order = np.argsort([len(w) for w in windows], kind="stable")
        totals = np.zeros(len(held.ids))
        head_VD = model.get_output_embeddings().weight
        with torch.no_grad():
            for start in range(0, len(order), self.batch_windows):
                chosen = order[start : start + self.batch_windows]
                inputs, targets = _padded([windows[i] for i in chosen], end_of_text)
                hidden = model.base_model(input_ids=inputs, use_cache=False).last_hidden_state
                logits = (hidden @ head_VD.T).flatten(0, 1).float()
                losses = torch.nn.functional.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED, reduction="none")
                sums = losses.view(targets.shape).double().sum(dim=1).numpy()
                np.add.at(totals, owners[chosen], sums)
        return totals


def _windows(held: HeldOutDocuments, length: int, end_of_text: int) -> tuple[np.ndarray, list[np.ndarray]]:
    owners, windows = [], []
    for number, tokens in enumerate(held.tokens):
        joined = np.concatenate([[end_of_text], tokens.astype(np.int64)])
        for start in range(0, len(joined) - 1, length):
            owners.append(number)
            windows.append(joined[start : start + length + 1])
    return np.asarray(owners), windows


def _padded(windows: list[np.ndarray], fill: int):  # noqa: ANN202 - a pair of torch tensors
    import torch

    width = max(len(w) for w in windows) - 1
    inputs = np.full((len(windows), width), fill, dtype=np.int64)
    targets = np.full((len(windows), width), IGNORED, dtype=np.int64)
    for row, window in enumerate(windows):
        inputs[row, : len(window) - 1] = window[:-1]
        targets[row, : len(window) - 1] = window[1:]
    return torch.from_numpy(inputs), torch.from_numpy(targets)
