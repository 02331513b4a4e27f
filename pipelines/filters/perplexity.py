"""Perplexity under an n-gram language model of text that the user calls good, in the manner of CCNet (1911.00359, section 4.2).

CCNet trains a 5-gram Kneser-Ney model on Wikipedia and cuts a crawl into head, middle and tail by perplexity; here the model is
`_ngram_model`, over hashed words. Perplexity asks two things at once, whether the words are usual and whether their order
is. `order_gain` asks the second alone: how much better the n-grams predict the words than the unigrams do. A document
is scored by a model that has not seen it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import Field

from pipelines.errors import EmptyInput
from pipelines.filters import FittedFilter, Rule, Sample, Scores
from pipelines.manifests import Json, Outcome

if TYPE_CHECKING:
    from pipelines.filters._ngram_model import NgramModel

STATE, PLOT = "perplexity.json", "perplexity_by_origin.png"
BUCKETS = ("head", "middle", "tail")
QUANTILES = (0.005, 0.01, 0.5, 0.99, 0.995)
SAMPLE = "embedded sample, fitted on eight domains: 99.6% of other languages and 2 of 20,135 clean English documents are above"
ORDER = "the n-grams say no more than the unigrams: embedded sample, 87% of shuffled and 0.23% of clean documents of wiki are below"


class Perplexity(FittedFilter):
    """Log perplexity per word, what word order contributes to it, and its third."""

    good: tuple[str, ...] = ()
    """Domains of the project whose text the model learns."""
    good_files: tuple[str, ...] = ()
    """Parquet or JSON Lines files with a column ``text``; globs allowed, relative to the project's directory or absolute."""
    order: int = Field(default=3, ge=2, le=6)
    """Longest n-gram."""
    prune: bool = False
    """Forget n-grams of order 3 and more that were seen once: half the memory or less."""
    folds: int = Field(default=2, ge=2, le=10)
    """Models, each fitted without the documents that it scores."""
    min_words: int = Field(default=20, ge=1)
    """A document with fewer words is not scored."""
    max_characters: int = Field(default=20_000_000, ge=1)
    """Above it a stable share of the documents is taken. The fit takes about 40 bytes of memory each."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule("log_perplexity", "at_most", 9.5, SAMPLE),
        Rule("order_gain", "at_least", 0.0, ORDER),
    )
    labels: ClassVar[tuple[str, ...]] = ("bucket",)
    packages: ClassVar[tuple[str, ...]] = ("numba",)

    def domains(self) -> tuple[str, ...]:
        return self.good

    def files(self) -> Sequence[Path]:
        from pipelines.filters._training_text import named_files

        return named_files(self.good_files, self.root)

    def fit(self, sample: Sample, state: Path) -> Outcome:
        """Fit a model for each fold on the other documents; cut the thirds by the perplexity of the documents themselves.

        Raises:
            EmptyInput: there is no text, or not enough for every fold.
        """
        from safetensors.numpy import save_file

        from pipelines.filters._ngram_model import fit

        words, origins, folds = self._words(sample)
        lengths = np.array([len(part) for part in words])
        models = []
        for fold in range(self.folds):
            seen = np.flatnonzero(folds != fold)
            if lengths[seen].sum() < self.min_words:
                raise EmptyInput(f"perplexity: {len(words)} documents are too few to fit {self.folds} folds; name more, or longer ones")
            models.append(fit(*_joined(words, seen), order=self.order, prune=self.prune))
            save_file({name: values for name, values in vars(models[-1]).items() if name != "unknown"}, state / _file(fold))
        scores = np.full((2, len(words)), np.nan)
        for fold, model in enumerate(models):
            mine = np.flatnonzero((folds == fold) & (lengths >= self.min_words))
            scores[:, mine] = self._scored(*_joined(words, mine), model)
        log_perplexity, gain = scores[:, ~np.isnan(scores[0])]
        bounds = [round(float(value), 6) for value in np.quantile(log_perplexity, [1 / 3, 2 / 3])] if len(log_perplexity) else [0.0, 0.0]
        record = {"unknown": [model.unknown for model in models], "bounds": bounds}
        (state / STATE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        scored = origins[~np.isnan(scores[0])]
        _plot(log_perplexity, scored, state / PLOT)
        entries = sum(int(np.count_nonzero(model.ngram_keys)) for model in models)
        return Outcome(
            counts={"documents": len(words), "words": int(lengths.sum()), "ngrams": entries},
            metrics={
                "unseen_log_perplexity": round(float(np.median(log_perplexity)), 6) if len(log_perplexity) else 0.0,
                "unseen_order_gain": round(float(np.median(gain)), 6) if len(gain) else 0.0,
                "head_below": bounds[0],
                "tail_above": bounds[1],
            },
            tables={"by_origin": _by_origin(scored, log_perplexity, gain)},
            plots=(PLOT,),
        )

    def score(self, texts: Sequence[str], *, state: Path) -> Scores:
        """Return the scores of each text by the model of its fold; NaN, and no bucket, where it has fewer than `min_words` words."""
        from pipelines.filters._hashed_words import hash_words
        from pipelines.filters._training_text import fold_of

        record = json.loads((state / STATE).read_text(encoding="utf-8"))
        folds = np.array([fold_of(text, self.folds) for text in texts], dtype=np.int64)
        found = np.full((2, len(texts)), np.nan)
        for fold in range(self.folds):
            mine = np.flatnonzero(folds == fold)
            if len(mine):
                hashes, offsets = hash_words([texts[row] for row in mine])
                scores = self._scored(hashes, offsets, _load(state / _file(fold), record["unknown"][fold]))
                found[:, mine] = np.where(np.diff(offsets) >= self.min_words, scores, np.nan)
        third = np.searchsorted(record["bounds"], found[0])
        bucket = [None if np.isnan(value) else BUCKETS[number] for value, number in zip(found[0], third, strict=True)]
        return {"log_perplexity": found[0], "order_gain": found[1], "bucket": bucket}

    def _scored(self, hashes: np.ndarray, offsets: np.ndarray, model: NgramModel) -> np.ndarray:
        """Return log perplexity per word and order gain, both in nats, shape ``(2, documents)``."""
        from pipelines.filters._ngram_model import log_probabilities

        whole, single = log_probabilities(hashes, offsets, model, order=self.order)
        words = np.maximum(np.diff(offsets), 1)
        return np.stack([-whole / words, (whole - single) / words])

    def _words(self, sample: Sample) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
        """Return the hashed words of each document, its origin and its fold."""
        from pipelines.filters._hashed_words import hash_words
        from pipelines.filters._training_text import fold_of, named_files, training_texts

        words, origins, folds = [], [], []
        files = named_files(self.good_files, self.root)
        for origin, text in training_texts(sample, self.good, files, max_characters=self.max_characters, what="perplexity"):
            words.append(hash_words([text])[0])
            origins.append(origin)
            folds.append(fold_of(text, self.folds))
        return words, np.array(origins), np.array(folds)


def _file(fold: int) -> str:
    return f"perplexity-{fold}.safetensors"


def _joined(words: Sequence[np.ndarray], rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    chosen = [words[row] for row in rows]
    return np.concatenate([np.zeros(0, np.uint64), *chosen]), np.cumsum([0, *map(len, chosen)], dtype=np.int64)


def _load(path: Path, unknown: float) -> NgramModel:
    """Read a fold's model; kept while its file stays the same, since every batch of documents asks for it."""
    found = path.stat()
    return _read(path, found.st_size, found.st_mtime_ns, unknown)


@lru_cache(maxsize=4)
def _read(path: Path, size: int, modified: int, unknown: float) -> NgramModel:
    from safetensors.numpy import load_file

    from pipelines.filters._ngram_model import NgramModel

    return NgramModel(**load_file(path), unknown=unknown)


def _by_origin(origins: np.ndarray, log_perplexity: np.ndarray, gain: np.ndarray) -> list[dict[str, Json]]:
    """Return a row for each origin: what its documents score under a model that has not seen them, to choose thresholds by."""
    rows: list[dict[str, Json]] = []
    for origin in sorted(set(origins.tolist())):
        here = origins == origin
        row: dict[str, Json] = {"origin": origin, "documents": int(here.sum())}
        for name, values in (("log_perplexity", log_perplexity[here]), ("order_gain", gain[here])):
            row |= {f"{name}_{q:.1%}": round(float(value), 4) for q, value in zip(QUANTILES, np.quantile(values, QUANTILES), strict=True)}
        rows.append(row)
    return rows


def _plot(log_perplexity: np.ndarray, origins: np.ndarray, path: Path) -> None:
    from pipelines.plots import line_plot

    shares = np.linspace(0, 1, 101)
    names = sorted(set(origins.tolist()))
    series = {name: (np.quantile(log_perplexity[origins == name], shares).tolist(), shares.tolist()) for name in names}
    line_plot(path, series, x="log perplexity per word (nats), unseen documents", y="share below")
