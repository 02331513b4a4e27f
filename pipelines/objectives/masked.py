"""Masked language modelling: predict hidden tokens from both sides (BERT, Devlin et al. 2019, 1810.04805, section 3.1).

Of the tokens of a window `probability` are predicted: 80 % of them are replaced by the mask token, 10 % by a random one, and
10 % are left as they are. Their number is fixed, ``round(probability * T)``, where BERT's reference code does the same and
transformers' collator draws each position by itself: shapes stay constant, so that compiled code and the step's number of
targets do, too. An end of text is never predicted, replaced or drawn.

A range of probabilities gives MLM-U (2412.05117): each window draws its own share, from almost nothing to everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from pydantic import Field, field_validator, model_validator

from pipelines.batch import IGNORED, Attention, Batch, SpecialTokens, documents_of
from pipelines.errors import GristmillError
from pipelines.objectives import Objective

ROUNDING = 1e-9


class Masked(Objective):
    """Masked-token prediction; the head is computed at the predicted positions alone."""

    attention: ClassVar[Attention] = "bidirectional"

    probability: float | tuple[float, float] = 0.15
    """Share of the tokens of a window that is predicted; of two numbers, the range that each window draws its share from."""
    mask_share: float = Field(default=0.8, ge=0)
    """Of the predicted tokens, share replaced by the mask token."""
    random_share: float = Field(default=0.1, ge=0)
    """Share replaced by a token drawn evenly from the vocabulary without its special tokens."""
    keep_share: float = Field(default=0.1, ge=0)
    """Share left as it is."""

    @field_validator("probability")
    @classmethod
    def _shares_are_shares(cls, value: float | tuple[float, float]) -> float | tuple[float, float]:
        low, high = value if isinstance(value, tuple) else (value, value)
        if not (0.0 <= low <= high <= 1.0 and high > 0.0):
            raise ValueError("give a share above 0 and up to 1, or a range of two such shares, the lower one first")
        return value

    @model_validator(mode="after")
    def _shares_are_all(self) -> Masked:
        total = self.mask_share + self.random_share + self.keep_share
        if abs(total - 1.0) > ROUNDING:
            raise ValueError(f"mask_share, random_share and keep_share add up to {total:g}; make them add up to 1")
        return self

    def batch(
        self, windows_BT: np.ndarray, generators: Sequence[np.random.Generator], tokens: SpecialTokens, *, document_attention: bool = False
    ) -> Batch:
        import torch

        if tokens.mask is None and self.mask_share:
            raise GristmillError(
                "objective masked: the tokenizer has no mask token; train one of this project, take a tokenizer with `mask_token` in its "
                "tokenizer_config.json, or set mask_share: 0, random_share: 0.9"
            )
        inputs_BT = windows_BT[:, :-1].copy()
        documents = torch.tensor(documents_of(inputs_BT, tokens.end_of_text)) if document_attention else None
        targets_BT = np.full_like(inputs_BT, IGNORED)
        for row in range(len(inputs_BT)):
            self._corrupt(inputs_BT[row], targets_BT[row], generators[row], tokens)
        return Batch(torch.from_numpy(inputs_BT), torch.from_numpy(targets_BT), documents)

    def _corrupt(self, inputs_T: np.ndarray, targets_T: np.ndarray, generator: np.random.Generator, tokens: SpecialTokens) -> None:
        """Hide tokens of one window, in place. Which ones, and what stands for them, depends on no token's id."""
        share = generator.uniform(*self.probability) if isinstance(self.probability, tuple) else self.probability
        keys = generator.random(len(inputs_T))
        keys[inputs_T == tokens.end_of_text] = np.inf
        wanted = max(1, round(share * len(inputs_T)))
        places = np.argsort(keys, kind="stable")[:wanted]
        places = places[np.isfinite(keys[places])]
        targets_T[places] = inputs_T[places]
        fates = generator.random(wanted)[: len(places)]
        drawn = self._random_tokens(generator, wanted, tokens)[: len(places)]
        masked = fates < self.mask_share
        replaced = ~masked & (fates < self.mask_share + self.random_share)
        inputs_T[places[replaced]] = drawn[replaced]
        if masked.any() and tokens.mask is not None:
            inputs_T[places[masked]] = tokens.mask

    @staticmethod
    def _random_tokens(generator: np.random.Generator, count: int, tokens: SpecialTokens) -> np.ndarray:
        """Return ids drawn evenly from the vocabulary without end of text and mask."""
        special = sorted({tokens.end_of_text, *([] if tokens.mask is None else [tokens.mask])})
        drawn = generator.integers(0, tokens.vocabulary_size - len(special), count)
        for token in special:  # each special id that a draw reaches moves it up by one
            drawn += drawn >= token
        return drawn
