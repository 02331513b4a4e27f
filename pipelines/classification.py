"""Classification after pretraining: does a checkpoint help to tell labelled texts apart, and how much of that is its pretraining?

The question of Tiny Language Models (2507.14871): the same architecture, fine-tuned from the checkpoint and from fresh weights, each
seed with one validation part, one order and one head for both, so that their difference is paired over seeds and test texts. Beside
them a linear probe on the frozen checkpoint, and a linear SVM on TF-IDF, which knows nothing of pretraining. Runs on the CPU.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from pipelines.classifiers import (
    Encodings,
    FineTuneSettings,
    LossNotANumber,
    Parts,
    Start,
    Tuned,
    fine_tuned,
    frozen_features,
    linear_probe,
    parts_of,
    tfidf_svm,
)
from pipelines.crossed_means import macro_f1_parts, mean_interval
from pipelines.documents import write_table
from pipelines.errors import GristmillError
from pipelines.labelled_sets import LabelledSet, LabelledTexts, labelled_hashes, read_labelled
from pipelines.manifests import Check, Json, Manifest, Outcome
from pipelines.models import denormals_flushed, set_up_torch
from pipelines.plots import new_figure, save_figure
from pipelines.plugins import Settings
from pipelines.progress import Progress
from pipelines.store import advisory

CLASSIFICATION_PACKAGES = ("torch", "transformers", "scikit-learn")

Method = Literal["fine_tune", "scratch", "linear_probe", "tfidf_svm"]
METHODS: tuple[Method, ...] = ("fine_tune", "scratch", "linear_probe", "tfidf_svm")
SCORES = pa.schema(
    [
        ("set", pa.string()),
        ("method", pa.string()),
        ("seed", pa.int32()),
        ("item", pa.int64()),
        ("label", pa.string()),
        ("predicted", pa.string()),
        ("correct", pa.bool_()),
    ]
)
"""Columns of ``scores.parquet``; an item is a row of the set's file, from 0."""

KEYS = ("mean", "low", "high")
"""Of an interval."""


class ClassificationChoices(Settings):
    """How much is spent on the labelled sets."""

    methods: tuple[Method, ...] = METHODS
    """What classifies."""
    seeds: int = Field(default=5, ge=1)
    """Repetitions; a seed draws the validation part, the order, the head and, from scratch, the weights."""
    max_documents: int = Field(default=600, ge=4)
    """Training texts of a set, those for validation among them; of a larger set so many are drawn, stratified by class."""
    max_test_documents: int = Field(default=1000, ge=2)
    """Test texts of a set, drawn likewise."""
    max_length: int = Field(default=64, ge=2)
    """Tokens of a text that the model reads, an end of text before it counted; fewer where the model has fewer positions."""
    validation: float = Field(default=0.15, gt=0, lt=1)
    """Share of the training texts that chooses epochs and regularisation, and is not trained on."""
    epochs: int = Field(default=6, ge=1)
    """Passes of fine-tuning at most; the weights of the one with the best validation accuracy are taken."""
    batch_size: int = Field(default=16, ge=1)
    """Texts of a step."""
    learning_rates: tuple[Annotated[float, Field(gt=0)], ...] = Field(default=(1e-3, 3e-3, 9e-3), min_length=1)
    """Peak rates of AdamW, with a warmup over a tenth of the steps and linear decay. Each start tries all of them with the first seed, and
    takes the one with the best validation accuracy for every seed: pretrained weights are larger than fresh ones, and one rate would
    serve one of the two. These are for models of some million parameters; 100 million want some hundredths of them."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Of AdamW."""
    seed: int = Field(default=0, ge=0)
    """Of which texts are drawn; the same for all seeds."""


class ClassificationSettings(ClassificationChoices):
    """Labelled sets, and how they are classified."""

    sets: tuple[LabelledSet, ...] = ()
    """What is classified; without a set there is nothing to do, and the result is empty."""
    threads: int = Field(default=1, ge=1)
    """Torch threads. Part of the identity: sums are ordered by it."""
    files: dict[str, str] = Field(default_factory=dict)
    """File -> SHA-256 of the labelled sets; `located_sets` fills it in."""
    root: Path = Field(default=Path(), exclude=True)
    """Where relative paths start. Not part of the identity."""

    def fine_tuning(self, learning_rate: float) -> FineTuneSettings:
        """Return how a model with a head is trained at a rate."""
        return FineTuneSettings(epochs=self.epochs, batch_size=self.batch_size, learning_rate=learning_rate, weight_decay=self.weight_decay)


def located_sets(settings: ClassificationSettings, root: Path) -> ClassificationSettings:
    """Return `settings` with `root`, and with the hashes of the files of the labelled sets.

    Raises:
        GristmillError: a file does not exist, or leaves `root`; or two sets have one name.
    """
    return settings.model_copy(update={"files": labelled_hashes(settings.sets, root), "root": root})


@denormals_flushed()
def classify(settings: ClassificationSettings, out: Path, *, checkpoint: Manifest, tokenizer: Manifest) -> Outcome:
    """Classify each labelled set by each method with each seed; write ``scores.parquet`` and ``classification.json``.

    Without a labelled set both are empty, and neither model nor tokenizer is opened.

    Raises:
        GristmillError: a set cannot be used (`read_labelled`), or was changed since its file was hashed.
    """
    started = time.process_time()
    if settings.files and labelled_hashes(settings.sets, settings.root) != settings.files:
        raise GristmillError("a labelled set was changed since its file was hashed; materialize classification again")
    set_up_torch(settings.threads)
    fits = len(settings.sets) * len(settings.methods) * settings.seeds
    progress, done = Progress("classification", max(1, fits), "fits"), 0
    tables, rows = [SCORES.empty_table()], []
    for one in settings.sets:
        sizes = {"max_train": settings.max_documents, "max_test": settings.max_test_documents}
        texts = read_labelled(one, settings.root, **sizes, seed=settings.seed)
        found = {}
        for method, result in _results(settings, texts, checkpoint, tokenizer):
            found[method] = result
            done += settings.seeds
            progress.update(done, f"{texts.name}: {method}")
            tables.append(_score_table(texts, method, result.predicted_SI))
        rows.append(_figures(settings, texts, found))
    write_table(out / "scores.parquet", pa.concat_tables(tables))
    (out / "classification.json").write_text(json.dumps({"sets": rows}, indent=1, sort_keys=True) + "\n")
    if rows:
        _plot(out / "classification.png", rows)
    return Outcome(
        counts={"sets": len(rows), "fits": fits, "test_documents": sum(row["test_documents"] for row in rows)},
        metrics={**_metrics(rows), "cpu_seconds": round(time.process_time() - started, 2)},
        tables={"classification": _method_rows(rows), "pretrained_minus_scratch": _gap_rows(rows)} if rows else {},
        plots=("classification.png",) if rows else (),
    )


@dataclass(frozen=True)
class _Result:
    """What a method predicts with each seed, and what the validation parts chose."""

    predicted_SI: np.ndarray
    chosen: dict[str, Json]


def _results(
    settings: ClassificationSettings, texts: LabelledTexts, checkpoint: Manifest, tokenizer: Manifest
) -> Iterator[tuple[Method, _Result]]:
    every = [parts_of(texts, settings.validation, seed) for seed in range(settings.seeds)]
    encodings = Encodings.of(texts.texts, tokenizer.directory, min(settings.max_length, _positions(checkpoint)))
    for method in settings.methods:
        start = Start(checkpoint.directory, fresh=method == "scratch")
        if method in ("fine_tune", "scratch"):
            yield method, _tuned(settings, start, encodings, texts, every)
        else:
            features_ND = frozen_features(start, encodings) if method == "linear_probe" else None
            yield method, _linear(features_ND, texts, every)


def _tuned(settings: ClassificationSettings, start: Start, encodings: Encodings, texts: LabelledTexts, every: Sequence[Parts]) -> _Result:
    tried: dict[float, Tuned] = {}
    for rate in settings.learning_rates:
        try:
            tried[rate] = fine_tuned(start, encodings, texts, every[0], settings.fine_tuning(rate), 0)
        except LossNotANumber:
            if rate == settings.learning_rates[-1] and not tried:
                raise
    best = max(tried, key=lambda rate: tried[rate].score)
    tuning = settings.fine_tuning(best)
    others = [fine_tuned(start, encodings, texts, parts, tuning, seed) for seed, parts in enumerate(every[1:], start=1)]
    found = [tried[best], *others]
    return _Result(np.stack([one.predicted for one in found]), {"learning_rate": best, "epochs": [one.epoch for one in found]})


def _linear(features_ND: np.ndarray | None, texts: LabelledTexts, every: Sequence[Parts]) -> _Result:
    """Return what linear classifiers predict: of frozen features, or of TF-IDF where there are none."""
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1, user_api="blas"):  # the last bits of its sums depend on how many there are
        found = [linear_probe(features_ND, texts, parts) if features_ND is not None else tfidf_svm(texts, parts) for parts in every]
    return _Result(np.stack([predicted for predicted, _ in found]), {"C": [strength for _, strength in found]})


def _positions(checkpoint: Manifest) -> int:
    """Return how many positions the model has; many where its configuration sets no limit."""
    config = json.loads((checkpoint.directory / "config.json").read_text(encoding="utf-8"))
    return int(config.get("max_position_embeddings") or config.get("n_positions") or 2**20)


def _score_table(texts: LabelledTexts, method: str, predicted_SI: np.ndarray) -> pa.Table:
    labels_I, classes, (seeds, items) = texts.labels_N[texts.test], np.asarray(texts.classes), predicted_SI.shape
    columns = {
        "set": [texts.name] * predicted_SI.size,
        "method": [method] * predicted_SI.size,
        "seed": np.repeat(np.arange(seeds), items),
        "item": np.tile(texts.rows_N[texts.test], seeds),
        "label": np.tile(classes[labels_I], seeds).tolist(),
        "predicted": classes[predicted_SI.ravel()].tolist(),
        "correct": (predicted_SI == labels_I).ravel(),
    }
    return pa.table({name: pa.array(columns[name], SCORES.field(name).type) for name in SCORES.names})


def correct_of(scores: pa.Table, name: str, method: str) -> np.ndarray:
    """Return which test texts of set `name` the seeds of `method` got right: bool of shape (seeds, texts), sorted by seed and item.

    Two such arrays of one set, of whatever methods and checkpoints, differ text by text: their difference is paired.

    Raises:
        GristmillError: `scores` has no such set or method.
    """
    own = scores.filter((pa.compute.field("set") == name) & (pa.compute.field("method") == method))
    if not own.num_rows:
        raise GristmillError(f"scores hold no {method} of labelled set {name!r}; add them to `methods` and `sets`")
    own = own.sort_by([("seed", "ascending"), ("item", "ascending")])
    seeds = len(pa.compute.unique(own["seed"]))
    return own["correct"].to_numpy(zero_copy_only=False).reshape(seeds, -1)


def interval(values_SI: np.ndarray, *, within: tuple[float, float] = (-1.0, 1.0)) -> dict[str, float]:
    """Return mean, low and high of `mean_interval`, cut at the ends of `within` and rounded to a hundred-thousandth."""
    return {key: round(min(max(value, within[0]), within[1]), 5) for key, value in zip(KEYS, mean_interval(values_SI), strict=True)}


def _figures(settings: ClassificationSettings, texts: LabelledTexts, found: Mapping[Method, _Result]) -> dict[str, Json]:
    """Return what is said of a set."""
    labels_I = texts.labels_N[texts.test]
    values = {
        method: {
            "accuracy": (result.predicted_SI == labels_I).astype(float),
            "macro_f1": macro_f1_parts(labels_I, result.predicted_SI, len(texts.classes)),
        }
        for method, result in found.items()
    }
    methods = {
        method: {name: interval(each_SI, within=(0.0, 1.0)) for name, each_SI in values[method].items()}
        | {"accuracy_by_seed": values[method]["accuracy"].mean(axis=1).round(5).tolist(), **result.chosen}
        for method, result in found.items()
    }
    row: dict[str, Json] = {
        "name": texts.name,
        "classes": list(texts.classes),
        "seeds": settings.seeds,
        "train_documents": len(texts.train),
        "test_documents": len(texts.test),
        "test_documents_in_training": texts.num_shared,
        "majority": round(float(np.bincount(labels_I).max() / len(labels_I)), 5),
        "methods": methods,
    }
    if {"fine_tune", "scratch"} <= found.keys():
        pairs = ((name, values["fine_tune"][name] - values["scratch"][name]) for name in ("accuracy", "macro_f1"))
        row["pretrained_minus_scratch"] = {name: interval(difference_SI) for name, difference_SI in pairs}
    return row


def _method_rows(rows: Sequence[Mapping[str, Json]]) -> list[dict[str, Json]]:
    """Return a row for each set and method, for people."""
    found = []
    for row in rows:
        sizes = {name: row[name] for name in ("train_documents", "test_documents", "majority")}
        for method, values in row["methods"].items():
            found.append({"set": row["name"], "method": method, **_flat("accuracy", values), **_flat("macro_f1", values), **sizes})
    return found


def _gap_rows(rows: Sequence[Mapping[str, Json]]) -> list[dict[str, Json]]:
    gaps = ((row["name"], row["pretrained_minus_scratch"]) for row in rows if "pretrained_minus_scratch" in row)
    return [{"set": name, **_flat("accuracy", values), **_flat("macro_f1", values)} for name, values in gaps]


def _flat(name: str, values: Mapping[str, Mapping[str, float]]) -> dict[str, Json]:
    mean, low, high = (round(values[name][key], 4) for key in KEYS)
    return {name: mean, f"{name}_low": low, f"{name}_high": high}


def _metrics(rows: Sequence[Mapping[str, Json]]) -> dict[str, float]:
    found = {f"{row['name']}_{method}_accuracy": values["accuracy"]["mean"] for row in rows for method, values in row["methods"].items()}
    gaps = (row for row in rows if "pretrained_minus_scratch" in row)
    return found | {f"{row['name']}_pretrained_minus_scratch": row["pretrained_minus_scratch"]["accuracy"]["mean"] for row in gaps}


def _plot(path: Path, rows: Sequence[Mapping[str, Json]]) -> None:
    """Draw the accuracies with their intervals, and the share of the most frequent class."""
    names = list(dict.fromkeys(method for row in rows for method in row["methods"]))
    figure, axes = new_figure(height=1.0 + 0.25 * len(rows) * (len(names) + 1))
    for place, method in enumerate(names):
        values = [row["methods"][method]["accuracy"] for row in rows]
        mean, low, high = (np.asarray([value[key] for value in values]) for key in KEYS)
        heights = np.arange(len(rows)) * (len(names) + 1) + place
        axes.errorbar(mean, heights, xerr=[mean - low, high - mean], fmt="o", markersize=4, capsize=2, label=method.replace("_", " "))
    middles = np.arange(len(rows)) * (len(names) + 1) + (len(names) - 1) / 2
    axes.plot([row["majority"] for row in rows], middles, "|", color="grey", markersize=18, label="most frequent class")
    axes.set_yticks(middles, [str(row["name"]) for row in rows])
    axes.invert_yaxis()
    axes.set(xlabel="accuracy (95 % interval)")
    axes.legend(frameon=False, fontsize=7)
    save_figure(figure, path)


# Audits


def _sets(draft: Manifest) -> list[dict[str, Json]]:
    return json.loads((draft.directory / "classification.json").read_text(encoding="utf-8"))["sets"]


NOTHING = "the recipe names no labelled set"


def scores_complete(draft: Manifest) -> Check:
    """Each test text has one score of each method and seed."""
    scores, faults = pq.read_table(draft.directory / "scores.parquet"), []
    for row in _sets(draft):
        own = scores.filter(pa.compute.field("set") == row["name"])
        wanted = len(row["methods"]) * row["seeds"] * row["test_documents"]
        found = own.group_by(["method", "seed", "item"]).aggregate([]).num_rows
        if not wanted == found == own.num_rows:
            faults.append(f"{row['name']}: {own.num_rows} scores of {found} texts by seed and method, {wanted} expected")
    return Check(name="scores_complete", passed=not faults, description="; ".join(faults) or f"{scores.num_rows} scores")


@advisory
def pretraining_pays(draft: Manifest) -> Check:
    """Fine-tuning from the checkpoint is more accurate than from fresh weights, beyond its interval, on every labelled set."""
    gaps = {row["name"]: row["pretrained_minus_scratch"]["accuracy"] for row in _sets(draft) if "pretrained_minus_scratch" in row}
    words = [f"{name} {gap['mean']:+.3f} [{gap['low']:+.3f}, {gap['high']:+.3f}]" for name, gap in gaps.items()]
    passed = all(gap["low"] > 0 for gap in gaps.values())
    return Check(name="pretraining_pays", passed=passed, description="; ".join(words) or NOTHING)


@advisory
def test_texts_unseen(draft: Manifest) -> Check:
    """No test text stands among the training texts, letter for letter."""
    shared = {row["name"]: row["test_documents_in_training"] for row in _sets(draft) if row["test_documents_in_training"]}
    words = [f"{name}: {count} test texts are training texts too" for name, count in shared.items()]
    return Check(name="test_texts_unseen", passed=not shared, description="; ".join(words) or "none is")


CLASSIFICATION_AUDITS = (scores_complete, pretraining_pays, test_texts_unseen)
