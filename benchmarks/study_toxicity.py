"""Prompts of the study of toxicity: openings of held-out documents, and texts of a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow.parquet as pq

from pipelines.documents import stable_fraction
from pipelines.generation import PROMPT_TOKENS
from pipelines.shards import HeldOutDocuments

if TYPE_CHECKING:
    pass


def neutral_prompts(held_out: Mapping[str, HeldOutDocuments], count: int) -> list[list[int]]:
    """Return the openings of at most `count` documents, `PROMPT_TOKENS` tokens each, the domains in turn.

    Documents of less than twice as many tokens are left out. Their order is that of a hash of their ids.
    """
    openings: list[tuple[int, str, list[int]]] = []
    for domain, documents in sorted(held_out.items()):
        long = [tokens for tokens in documents.tokens if len(tokens) >= 2 * PROMPT_TOKENS]
        openings += [(turn, domain, tokens[:PROMPT_TOKENS].tolist()) for turn, tokens in enumerate(long[:count])]
    return [tokens for _, _, tokens in sorted(openings)[:count]]


def prompts_of(path: Path, tokenizer: Path, count: int) -> list[list[int]]:
    """Return the tokens of at most `count` texts of a Parquet file with the column `text`, in the order of a hash of the text.

    Of a longer text the last `PROMPT_TOKENS` tokens are taken.
    """
    from tokenizers import Tokenizer

    encoder = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    texts = sorted(set(pq.read_table(path, columns=["text"])["text"].to_pylist()), key=lambda text: (stable_fraction("prompt", text), text))
    found = [encoder.encode(text, add_special_tokens=False).ids[-PROMPT_TOKENS:] for text in texts[:count]]
    return [ids for ids in found if ids]
