"""A fastText classifier that the user has: the probability that it gives one label.

DCLM (2406.11794, section 4.4) filters by such a classifier, published as ``mlfoundations/fasttext-oh-eli5``, and keeps the best tenth:

    fasttext_classifier:
      model: mlfoundations/fasttext-oh-eli5
      file: openhermes_reddit_eli5_vs_rw_v2_bigram_200k_train.bin
      revision: <the commit, 40 digits>
      label: hq

The threshold is of the classifier and the text: choose it from the scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
from pydantic import Field

from pipelines.filters import Filter, Rule
from pipelines.model_files import Commit, downloaded, local_path


class FastTextClassifier(Filter):
    """Probability of one label of a fastText model."""

    model: str
    """File ``.bin`` or ``.ftz``, relative to the project's directory or absolute; with `revision`, ``owner/name`` on the hub."""
    label: str
    """The label whose probability is the score, without ``__label__``."""
    revision: Commit | None = None
    """Commit of the repository on the hub; none for a file of yours, whose content is then part of the scores' identity."""
    file: str = "model.bin"
    """The file in the repository on the hub."""
    max_characters: int | None = Field(default=None, ge=100)
    """Of a longer document, five pieces are read that make this many, evenly from its start to its end; null reads all."""

    rules: ClassVar[tuple[Rule, ...]] = (Rule("probability", "at_least", 0.5, "the label is more probable than all others together"),)
    packages: ClassVar[tuple[str, ...]] = ("fasttext-predict",)

    def files(self) -> Sequence[Path]:
        return () if self.revision else (local_path(self.model, self.root),)

    def score(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """Return the probability of the label for each text; NaN for one without words.

        Raises:
            GristmillError: the model cannot be had, is none, or has no such label.
        """
        from pipelines.filters._fasttext import label_probabilities

        found = label_probabilities(self._path(), texts, self.label, max_characters=self.max_characters) if texts else []
        return {"probability": np.array(found, dtype=np.float64)}

    def _path(self) -> Path:
        if not self.revision:
            return local_path(self.model, self.root)
        import huggingface_hub

        return downloaded(lambda: huggingface_hub.hf_hub_download(self.model, self.file, revision=self.revision), self.model)
