"""A quality classifier trained on what the user calls good and bad, in the manner of PaLM's and GLaM's.

A Pretrainer's Guide (2305.13169, section 3) filters by the classifier of PaLM and GLaM (2112.06905, section 4): a linear model
over hashed features that tells curated text from web pages; 1 is good here. Documents are scored by a model that has not
seen them, and the score is a calibrated probability: of documents with score 0.8, drawn from as many good as bad ones, 80 % are good.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from pipelines.documents import passages, stable_fraction
from pipelines.errors import EmptyInput, GristmillError
from pipelines.filters import FittedFilter, Rule, Sample
from pipelines.manifests import Json, Outcome

WEIGHTS, STATE, PLOT = "quality_classifier.safetensors", "quality_classifier.json", "reliability.png"
EVALUATED = 0.2
"""Share of the examples that no model is trained or calibrated on."""
LEAST_EXAMPLES = 20
"""Of either class in each part; fewer say nothing of a probability."""
BATCH = 1_000
GOOD = "half of an equal number of good and bad documents; choose from the retention at each threshold"


class QualityClassifier(FittedFilter):
    """Probability that a document is of the good kind."""

    good: tuple[str, ...] = ()
    """Domains of the project whose documents are good."""
    bad: tuple[str, ...] = ()
    """Domains whose documents are bad."""
    good_files: tuple[str, ...] = ()
    """Parquet or JSON Lines files with a column ``text``; globs allowed, relative to the project's directory or absolute."""
    bad_files: tuple[str, ...] = ()
    """As `good_files`."""
    ngrams: int = Field(default=2, ge=1, le=5)
    """Features are runs of 1 to this many words."""
    bits: int = Field(default=18, ge=10, le=26)
    """Features are hashed to this many bits: 1 MB of weights for 18, for each fold."""
    epochs: int = Field(default=5, ge=1)
    """How often each example is stepped on."""
    rate: float = Field(default=0.1, gt=0)
    """Step of AdaGrad."""
    penalty: float = Field(default=1e-4, ge=0)
    """Of squared weights."""
    calibration: Literal["platt", "isotonic"] = "platt"
    """``isotonic`` follows any rising curve, and needs more examples."""
    folds: int = Field(default=2, ge=2, le=10)
    """Models, each fitted without the documents that it scores."""
    max_characters: int = Field(default=20_000_000, ge=1)
    """Of either class; above it a stable share of the documents is taken. The fit takes about 20 bytes of memory each."""
    example_characters: int = Field(default=2_000, ge=100)
    """Longer documents are cut into examples of at most this length, so that length says nothing of the class."""

    rules: ClassVar[tuple[Rule, ...]] = (Rule("good_probability", "at_least", 0.5, GOOD),)
    packages: ClassVar[tuple[str, ...]] = ("numba",)

    def domains(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys([*self.good, *self.bad]))

    def files(self) -> Sequence[Path]:
        from pipelines.filters._training_text import named_files

        both = sorted(set(self.good) & set(self.bad))
        if both:
            raise GristmillError(f"quality_classifier: {both[0]} is called good and bad; give it one class")
        return named_files([*self.good_files, *self.bad_files], self.root)

    def fit(self, sample: Sample, state: Path) -> Outcome:
        """Train a model for each fold, calibrate it on that fold, and measure both on the examples that neither has seen.

        Raises:
            EmptyInput: a class has no text, or too little for all parts.
        """
        from safetensors.numpy import save_file

        from pipelines.filters._calibration import calibrate, plot_reliability, probabilities, quality, reliability
        from pipelines.filters._linear import predict, train

        indices, offsets, table = self._examples(sample)
        classes, folds, held = table["class"].astype(np.float64), table["fold"], table["evaluated"]
        _enough(classes, folds, held, self.folds)
        weights, biases, calibrations = [], [], []
        found = np.full(len(classes), np.nan)
        for fold in range(self.folds):
            seen = np.flatnonzero((folds != fold) & ~held)
            order = np.concatenate([np.random.default_rng(epoch).permutation(seen) for epoch in range(self.epochs)])
            weight, bias = train(indices, offsets, classes, order, bits=self.bits, rate=self.rate, penalty=self.penalty)
            scores = predict(indices, offsets, weight, bias)
            mine = (folds == fold) & ~np.isnan(scores)
            calibration = calibrate(scores[mine & ~held], classes[mine & ~held], self.calibration)
            found[mine] = probabilities(scores[mine], calibration, self.calibration)
            weights.append(weight)
            biases.append(bias)
            calibrations.append(calibration)
        save_file({"weights": np.stack(weights)}, state / WEIGHTS)
        record = {"biases": biases, "calibrations": calibrations}
        (state / STATE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        measured = held & ~np.isnan(found)
        rows = reliability(found[measured], classes[measured])
        plot_reliability(rows, state / PLOT)
        return Outcome(
            counts={
                "good_examples": int(classes.sum()),
                "bad_examples": int((1 - classes).sum()),
                "held_out_examples": int(measured.sum()),
            },
            metrics={f"held_out_{name}": value for name, value in quality(found[measured], classes[measured]).items()},
            tables={"calibration": rows, "by_origin": _by_origin(table["origin"][measured], classes[measured], found[measured])},
            plots=(PLOT,),
        )

    def score(self, texts: Sequence[str], *, state: Path) -> dict[str, np.ndarray]:
        """Return the probability of each text by the model of its fold; NaN for a text without words."""
        from safetensors.numpy import load_file

        from pipelines.filters._calibration import probabilities
        from pipelines.filters._linear import logits
        from pipelines.filters._training_text import fold_of

        weights = load_file(state / WEIGHTS)["weights"]
        record = json.loads((state / STATE).read_text(encoding="utf-8"))
        folds = np.array([fold_of(text, self.folds) for text in texts], dtype=np.int64)
        found = np.full(len(texts), np.nan)
        for fold in range(self.folds):
            mine = np.flatnonzero(folds == fold)
            scores = logits([texts[row] for row in mine], weights[fold], record["biases"][fold], ngrams=self.ngrams)
            found[mine] = probabilities(scores, record["calibrations"][fold], self.calibration)
        return {"good_probability": found}

    def _examples(self, sample: Sample) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        """Return the hashed n-grams of all examples, their offsets, and what is known of each example."""
        from pipelines.filters._linear import features

        parts, table, batch = [], [], []
        for text, row in self._texts(sample):
            batch.append(text)
            table.append(row)
            if len(batch) == BATCH:
                parts.append(features(batch, ngrams=self.ngrams, bits=self.bits))
                batch = []
        parts.append(features(batch, ngrams=self.ngrams, bits=self.bits))
        indices = np.concatenate([part for part, _ in parts])
        offsets = np.cumsum(np.concatenate([[0], *(np.diff(ends) for _, ends in parts)]), dtype=np.int64)
        return indices, offsets, {name: np.array([row[name] for row in table]) for name in ("origin", "class", "fold", "evaluated")}

    def _texts(self, sample: Sample) -> Iterator[tuple[str, dict[str, object]]]:
        from pipelines.filters._training_text import fold_of, named_files, training_texts

        for value, domains, patterns in ((1, self.good, self.good_files), (0, self.bad, self.bad_files)):
            what = f"quality_classifier: {'good' if value else 'bad'}"
            files = named_files(patterns, self.root)
            for origin, text in training_texts(sample, domains, files, max_characters=self.max_characters, what=what):
                known = {
                    "origin": origin,
                    "class": value,
                    "fold": fold_of(text, self.folds),
                    "evaluated": stable_fraction("evaluated", text) < EVALUATED,
                }
                yield from ((text[start:end], known) for start, end in passages(text, self.example_characters))


def _enough(classes: np.ndarray, folds: np.ndarray, held: np.ndarray, num_folds: int) -> None:
    for value, name in ((1, "good"), (0, "bad")):
        parts = [int(((classes == value) & (folds == fold) & ~held).sum()) for fold in range(num_folds)]
        least = min([*parts, int(((classes == value) & held).sum())])
        if least < LEAST_EXAMPLES:
            raise EmptyInput(
                f"quality_classifier: {name} has {int((classes == value).sum())} examples, {least} of them in its smallest part; "
                f"each of {num_folds} folds and the held-out part needs {LEAST_EXAMPLES}: name more {name} documents"
            )


def _by_origin(origins: np.ndarray, classes: np.ndarray, found: np.ndarray) -> list[dict[str, Json]]:
    rows: list[dict[str, Json]] = []
    for origin in sorted(set(origins.tolist())):
        here = origins == origin
        rows.append(
            {
                "origin": origin,
                "class": "good" if classes[here][0] else "bad",
                "held_out_examples": int(here.sum()),
                "mean_probability": round(float(found[here].mean()), 6),
                "share_at_least_half": round(float((found[here] >= 0.5).mean()), 6),
            }
        )
    return rows
