"""Toxicity as a probability, by the linear model that alt-profanity-check brings (TF-IDF of words, calibrated linear SVM).

It takes the place of Perspective, which A Pretrainer's Guide (2305.13169) uses and which ends on 2026-12-31. Trained on
comments and tweets: it sees insults, not stance. About 4 MB/s on one core, documents and sentences together.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from pipelines.filters import Filter, Rule

SAMPLE = "more in these shares of 993 toxic prompts (RealToxicityPrompts) and of 3,000 sentences of WikiText-2: "

_SENTENCE_BREAK = re.compile(r"(?<=[.!?])[\"'”’)\]]*\s+|\n+")


class Toxicity(Filter):
    """Probability that a text is toxic."""

    max_sentence_characters: int = 1_000
    """Longer sentences are scored up to here."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule("document_probability", "at_most", 0.5, SAMPLE + "80% and 0.3%"),
        Rule("sentence_probability_max", "at_most", 0.98, SAMPLE + "51% and 0.0%; long documents reach it more often"),
    )
    packages: ClassVar[tuple[str, ...]] = ("alt-profanity-check", "scikit-learn")

    def score(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        sentences = [self._sentences(text) for text in texts]
        ends = np.cumsum([len(part) for part in sentences], dtype=np.int64)
        flat = _probabilities([sentence for part in sentences for sentence in part])
        maxima = [part.max() if len(part) else np.nan for part in np.split(flat, ends[:-1])] if len(texts) else []
        documents = _probabilities(texts)
        documents[[not part for part in sentences]] = np.nan
        return {"document_probability": documents, "sentence_probability_max": np.array(maxima, dtype=np.float64)}

    def _sentences(self, text: str) -> list[str]:
        return [part[: self.max_sentence_characters] for part in _SENTENCE_BREAK.split(text) if part and not part.isspace()]


def _probabilities(texts: Sequence[str]) -> np.ndarray:
    """Return the probability of the toxic class, float64 of shape ``(len(texts),)``."""
    from profanity_check import profanity_check  # unpickles its vectorizer and model on import: 0.8 s, once a process

    if not len(texts):
        return np.zeros(0)
    return profanity_check.model.predict_proba(profanity_check.vectorizer.transform(texts))[:, 1]
