"""Toxicity as a probability, by the linear model that alt-profanity-check brings (TF-IDF of words, calibrated linear SVM).

It takes the place of Perspective, which A Pretrainer's Guide (2305.13169) uses and which ends on 2026-12-31. Trained on
comments and tweets: it sees insults, not stance. Its scores are computed here, bit for bit those of scikit-learn, documents and
sentences in one pass: about 40 MB/s on one core, where scikit-learn takes both at 3.4.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from pipelines.filters import Filter, Rule

if TYPE_CHECKING:
    from pipelines.filters._linear_words import LinearWords

SAMPLE = "more in these shares of 993 toxic prompts (RealToxicityPrompts) and of as many WikiText-2 sentences of their lengths: "

GROUP_CHARACTERS = 1_000_000
"""Characters taken at a time: bounds the memory of the arrays."""


class Toxicity(Filter):
    """Probability that a text is toxic."""

    max_sentence_characters: int = 1_000
    """Longer sentences are scored up to here."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule("document_probability", "at_most", 0.5, SAMPLE + "80.5% and 0.6%"),
        Rule("sentence_probability_max", "at_most", 0.98, SAMPLE + "50.9% and 0.0%; long documents reach it more often"),
    )
    packages: ClassVar[tuple[str, ...]] = ("alt-profanity-check", "scikit-learn", "scipy")

    def score(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        parts = [self._score(group) for group in _groups(texts)]
        return {rule.name: np.concatenate([np.zeros(0), *(part[number] for part in parts)]) for number, rule in enumerate(self.rules)}

    def _score(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return the probabilities of the documents and of their worst sentences; NaN where there is no sentence."""
        words, _ = _model()
        documents, sentences, counts = words.decide(texts, self.max_sentence_characters)
        found = counts > 0
        whole, worst = _probabilities(documents), np.full(len(texts), np.nan)
        whole[~found] = np.nan
        if found.any():
            worst[found] = np.maximum.reduceat(_probabilities(sentences), (np.cumsum(counts) - counts)[found])
        return whole, worst


def _probabilities(values: np.ndarray) -> np.ndarray:
    """Return the probability of the toxic class from the decision values of the calibrated models, shape ``(texts, models)``."""
    from scipy.special import expit

    _, calibrations = _model()
    return sum((expit(-(a * values[:, model] + b)) for model, (a, b) in enumerate(calibrations)), np.zeros(len(values))) / len(calibrations)


@cache
def _model() -> tuple[LinearWords, tuple[tuple[float, float], ...]]:
    """Return the linear models and each one's sigmoid."""
    from profanity_check import profanity_check  # unpickles its vectorizer and model on import: 0.8 s, once a process

    from pipelines.filters._linear_words import LinearWords

    vectorizer, models = profanity_check.vectorizer, profanity_check.model.calibrated_classifiers_
    weights, intercepts = (np.array([getattr(model.estimator, name)[0] for model in models]) for name in ("coef_", "intercept_"))
    calibrations = tuple((model.calibrators[0].a_, model.calibrators[0].b_) for model in models)
    return LinearWords.of(vectorizer.vocabulary_, vectorizer.idf_, weights, intercepts), calibrations


def _groups(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """Yield `texts` in groups of about `GROUP_CHARACTERS`."""
    start = size = 0
    for number, text in enumerate(texts):
        size += len(text)
        if size >= GROUP_CHARACTERS:
            yield texts[start : number + 1]
            start, size = number + 1, 0
    if start < len(texts):
        yield texts[start:]
