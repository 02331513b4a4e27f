"""A sequence classifier of package transformers that the user has: its regression score, or the probability of one label.

FineWeb-Edu (2406.17557, section 4) scores educational value from 0 to 5 by a regression head and keeps 3 and more:

    hf_classifier: {model: HuggingFaceFW/fineweb-edu-classifier, revision: <the commit, 40 digits>, score: 3}

Weights are read from safetensors alone, and code that comes with a model is never run. A document of 512 tokens takes 0.7 s of one
core with 110 M parameters (BERT base); longer ones cost no more, since the rest is not read.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field

from pipelines.errors import GristmillError, UnknownName
from pipelines.filters import Filter, Rule
from pipelines.hidden_states import one_thread
from pipelines.model_files import Commit, local_path, model_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DIGITS = 4
"""Of a score: the digits below depend on which documents share a batch."""
FINEWEB_EDU = "2406.17557 section 4: 3 of 5 for the classifier of FineWeb-Edu; of another model choose from the scores"
CHARACTERS_PER_TOKEN = 32
"""A text is cut to this many characters a token before it is tokenized: a token of more would be read in part."""


class HfClassifier(Filter):
    """Score of a regression head, or probability of a label."""

    model: str
    """Folder with config.json, model.safetensors and tokenizer, relative to the project's directory or absolute; with `revision`,
    ``owner/name`` on the hub."""
    revision: Commit | None = None
    """Commit of the repository on the hub; none for a folder of yours, whose content is then part of the scores' identity."""
    label: str | None = None
    """The label, by the names of the model's config, whose probability is the score; null for a regression head."""
    max_tokens: int = Field(default=512, ge=1)
    """Of a longer document, the first so many tokens are read."""
    batch_size: int = Field(default=16, ge=1)
    """Documents of one call of the model, of similar length."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the model runs; on ``cpu`` with one thread."""

    rules: ClassVar[tuple[Rule, ...]] = (Rule("score", "at_least", 3.0, FINEWEB_EDU),)
    packages: ClassVar[tuple[str, ...]] = ("torch", "transformers", "tokenizers")

    def files(self) -> Sequence[Path]:
        if self.revision:
            return ()
        folder = local_path(self.model, self.root)
        if not folder.is_dir():
            raise GristmillError(f"model {self.model!r} is a file; give the folder that holds config.json and model.safetensors")
        return sorted(path for path in folder.rglob("*") if path.is_file())

    def score(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """Return the score of each text, to `DIGITS` digits; NaN for one of white space.

        Raises:
            GristmillError: the model cannot be had, is none, or does not answer what is asked of it.
        """
        found = np.full(len(texts), np.nan)
        rows = [row for row, text in enumerate(texts) if text.strip()]
        if not rows:
            return {"score": found}
        model, tokenizer = _load(self._folder(), self.device)
        column = self._column(model)
        cut = [texts[row][: CHARACTERS_PER_TOKEN * self.max_tokens] for row in rows]
        how = {"truncation": True, "max_length": self.max_tokens}
        lengths = [len(ids) for ids in tokenizer(cut, **how)["input_ids"]]
        order = sorted(range(len(rows)), key=lengths.__getitem__)
        with one_thread():
            for start in range(0, len(order), self.batch_size):
                batch = order[start : start + self.batch_size]
                inputs = tokenizer([cut[number] for number in batch], padding=True, return_tensors="pt", **how)
                found[[rows[number] for number in batch]] = _answers(model, inputs, column)
        return {"score": found.round(DIGITS)}

    def _column(self, model: PreTrainedModel) -> int | None:
        """Return the place of the label among the model's; None for a regression head."""
        labels = {name: int(place) for place, name in model.config.id2label.items()}
        if len(labels) == 1 and self.label is None:
            return None
        if self.label is None:
            raise GristmillError(f"model {self.model!r} tells {len(labels)} labels apart; name one as `label`: {', '.join(labels)}")
        if self.label not in labels:
            raise UnknownName(f"label of model {self.model!r}", self.label, labels)
        return labels[self.label]

    def _folder(self) -> Path:
        return model_folder(self.model, self.revision, self.root)


@lru_cache(maxsize=1)
def _load(folder: Path, device: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model = AutoModelForSequenceClassification.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, use_safetensors=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise GristmillError(f"{folder} is no sequence classifier with safetensors and a tokenizer ({error})") from error
    return model.float().eval().to(device), tokenizer


def _answers(model: PreTrainedModel, inputs: dict, column: int | None) -> np.ndarray:
    import torch

    with torch.inference_mode():
        logits = model(**{name: values.to(model.device) for name, values in inputs.items()}).logits.float()
        values = logits[:, 0] if column is None else torch.softmax(logits, dim=-1)[:, column]
    return values.cpu().numpy().astype(np.float64)
