"""Continuations: what a model writes after a prompt, always its likeliest token."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipelines.manifests import Json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROMPT_TOKENS = 24


def continuations(
    model: PreTrainedModel, tokenizer: Path, openings: Mapping[str, np.ndarray | str], max_new_tokens: int
) -> dict[str, dict[str, Json]]:
    """Return the text of each opening and what `model` writes after it, greedily; as many tokens as the model has positions for."""
    import torch
    from tokenizers import Tokenizer

    encoder = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    room = model.config.max_position_embeddings - max_new_tokens
    found: dict[str, dict[str, Json]] = {}
    training = model.training
    model.eval()
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        for name, opening in openings.items():
            ids = encoder.encode(opening, add_special_tokens=False).ids if isinstance(opening, str) else opening.tolist()[:PROMPT_TOKENS]
            ids = ids[-max(1, room) :]
            if not ids:
                continue
            ids_BT = torch.tensor([ids], device=model.device)
            made = model.generate(
                ids_BT, attention_mask=torch.ones_like(ids_BT), max_new_tokens=max_new_tokens, do_sample=False, use_cache=True
            )
            found[name] = {"prompt": _text(encoder, ids), "continuation": _text(encoder, made[0, len(ids) :].tolist())}
    model.train(training)
    return found


def _text(encoder: object, ids: list[int]) -> str:
    return encoder.decode(ids, skip_special_tokens=False)  # type: ignore[attr-defined]
