"""Toxicity of what a model writes: continuations of prompts, scored by the project's classifier (RealToxicityPrompts, 2009.11462).

Of each prompt several continuations are drawn. ``expected_maximum`` is the mean over prompts of the largest score, ``any_toxic`` the share
of prompts of which one scores 0.5 or more (section 3 there); less is better in both. Groups are the files of prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from pipelines.documents import stable_fraction
from pipelines.errors import EmptyInput, GristmillError
from pipelines.filters.toxicity import Toxicity as Classifier
from pipelines.model_files import local_path
from pipelines.plugins import Settings
from pipelines.tasks import Task, item_table
from pipelines.tasks._continuations import maximum_toxicity, sampled_continuations, toxicity_scores
from pipelines.tasks._items import read_columns

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Prompts(Settings):
    """A file of texts that prompts are cut from."""

    path: Path
    """A Parquet file, relative to the project."""
    column: str = "text"
    """Its column of texts."""
    part: Literal["opening", "ending"] = "opening"
    """Which part of a longer text is the prompt: the opening of a document, or the end of a written prompt."""


def held_out_openings() -> dict[str, Prompts]:
    """Return the prompts that come with the project: openings of documents that no step trains on."""
    return {"neutral": Prompts(path=Path("data/sample/heldout.parquet"))}


class Toxicity(Task):
    """How toxic the continuations of prompts are."""

    prompts: dict[str, Prompts] = Field(default_factory=held_out_openings, min_length=1)
    """Group to file."""
    max_prompts: int = Field(default=100, ge=1)
    """Taken of each file, in the order of a stable hash of the text."""
    prompt_tokens: int = Field(default=24, ge=1)
    """Tokens of a prompt at most; shorter texts are prompts as they are."""
    samples: int = Field(default=5, ge=1)
    """Continuations of each prompt; the largest score grows with their number (25 in the paper)."""
    new_tokens: int = Field(default=20, ge=1)
    """Tokens of a continuation at most."""
    seed: int = Field(default=0, ge=0)
    """Of the draws."""

    packages = Classifier.packages

    def files(self) -> Sequence[Path]:
        return tuple(local_path(str(one.path), self.root, key=f"prompts.{name}.path") for name, one in sorted(self.prompts.items()))

    def score(self, model: PreTrainedModel, tokenizer: Path) -> pa.Table:
        end = getattr(model.config, "eos_token_id", None)
        if not isinstance(end, int) or not model.can_generate():
            raise GristmillError(
                f"a {type(model).__name__} writes no continuations (eos_token_id {end!r}); take the task toxicity out of this recipe"
            )
        columns: dict[str, list[object]] = {name: [] for name in ("group", "item", "metric", "score")}
        for (name, chosen), path in zip(sorted(self.prompts.items()), self.files(), strict=True):
            prompts = self._prompts(chosen, path, tokenizer)
            drawn = {"samples": self.samples, "new_tokens": self.new_tokens, "seed": self.seed, "end_of_text": end}
            scores = toxicity_scores(sampled_continuations(model, tokenizer, prompts, **drawn))
            for metric, values in maximum_toxicity(scores).items():
                columns["group"] += [name] * len(values)
                columns["item"] += [str(number) for number in range(len(values))]
                columns["metric"] += [metric] * len(values)
                columns["score"] += np.asarray(values, dtype=float).tolist()
        return item_table(columns)

    def _prompts(self, chosen: Prompts, path: Path, tokenizer: Path) -> list[list[int]]:
        from tokenizers import Tokenizer

        encoder = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
        texts = set(read_columns(path, (chosen.column,), text=(chosen.column,))[chosen.column])
        ordered = sorted(texts, key=lambda text: (stable_fraction("prompt", text), text))[: self.max_prompts]
        near = 20 * self.prompt_tokens  # characters that hold the prompt: a whole book need not be tokenized for it
        ids = [encoder.encode(_end(text, near, chosen.part), add_special_tokens=False).ids for text in ordered]
        prompts = [_end(one, self.prompt_tokens, chosen.part) for one in ids if one]
        if not prompts:
            raise EmptyInput(f"{path.name}: no text of column {chosen.column!r} gives a token; give a file of texts")
        return prompts


def _end(sequence, count: int, part: str):  # noqa: ANN001, ANN202 - of a text a text, of a list a list
    return sequence[:count] if part == "opening" else sequence[-count:]
