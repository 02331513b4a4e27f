"""Causal language modelling: predict each token from those before it (Radford et al. 2019)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipelines.batch import IGNORED, Batch, SpecialTokens, documents_of
from pipelines.objectives import Objective


class Causal(Objective):
    """Next-token prediction.

    Where attention ends at document boundaries, an end of text predicts nothing: what follows it is another document.
    """

    def batch(
        self, windows_BT: np.ndarray, generators: Sequence[np.random.Generator], tokens: SpecialTokens, *, document_attention: bool = False
    ) -> Batch:
        import torch

        inputs_BT, targets_BT = windows_BT[:, :-1], windows_BT[:, 1:]
        if not document_attention:
            return Batch(torch.tensor(inputs_BT), torch.tensor(targets_BT))
        targets_BT = np.where(inputs_BT == tokens.end_of_text, IGNORED, targets_BT)
        return Batch(torch.tensor(inputs_BT), torch.tensor(targets_BT), torch.tensor(documents_of(inputs_BT, tokens.end_of_text)))

    def _predicts_everywhere(self, batch: Batch) -> bool:
        return batch.documents_BT is None
