"""Classifiers of labelled texts: a model that is trained with a head, a head on its frozen features, and TF-IDF with a linear SVM.

All of them fit on the same training part of a seed and choose by its validation part: the first its number of epochs, the others the
strength of their regularisation. Shapes: B texts of a batch, T positions, D hidden size, K classes, N texts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipelines import plugins
from pipelines.encoders import load_tokenizer, reference_ids, special_tokens
from pipelines.errors import GristmillError
from pipelines.labelled_sets import LabelledTexts, drawn
from pipelines.models import load_checkpoint, sees_both_sides
from pipelines.optimizers import Optimizer
from pipelines.plugins import Settings

if TYPE_CHECKING:
    import torch
    from sklearn.base import ClassifierMixin
    from transformers import PreTrainedModel

CHARACTERS_PER_TOKEN = 40
"""A text is encoded by its first so many characters for each token that is read of it: what stands behind them is never reached."""
TEXTS_AT_A_TIME = 128
STRENGTHS = (0.01, 0.1, 1.0, 10.0, 100.0)
"""Inverse regularisation C that the logistic regression is tried with; the SVM with the middle three."""
WARMUP = 0.1
"""Share of the steps in which the rate rises."""


class LossNotANumber(GristmillError):
    """Training left the numbers."""


class FineTuneSettings(Settings):
    """How a model with a head is trained."""

    epochs: int
    """Passes over the training part, at most: the weights of the epoch with the best validation accuracy are taken."""
    batch_size: int
    """Texts of a step."""
    learning_rate: float
    """Peak of a linear warmup and decay."""
    weight_decay: float
    """AdamW's, on matrices only."""


@dataclass(frozen=True)
class Parts:
    """What a seed fits on and chooses by."""

    fit: np.ndarray
    """int64: texts that are fitted."""
    validation: np.ndarray
    """int64: texts that choose."""


def parts_of(texts: LabelledTexts, share: float, seed: int) -> Parts:
    """Return the training texts of `texts`, `share` of each class laid aside for validation."""
    generator = np.random.Generator(np.random.Philox(key=[seed, 0]))
    aside = drawn(texts.labels_N[texts.train], round(share * len(texts.train)), generator)
    if not len(aside):
        raise GristmillError(
            f"labelled set {texts.name}: {len(texts.train)} training texts leave none for validation (a share of {share:g}); raise "
            "max_documents or validation"
        )
    return Parts(np.delete(texts.train, aside), texts.train[aside])


@dataclass(frozen=True)
class Encodings:
    """The token ids of N texts, each behind an end of text, as in the stream that models are pretrained on."""

    ids: tuple[np.ndarray, ...]
    """int64, at least one each."""

    @classmethod
    def of(cls, texts: Sequence[str], tokenizer: Path, max_length: int) -> Encodings:
        """Encode `texts` and cut them at `max_length` tokens, the end of text among them."""
        loaded = load_tokenizer(tokenizer)
        end = special_tokens(tokenizer, loaded).end_of_text
        ids, bounds = reference_ids(loaded)([text[: CHARACTERS_PER_TOKEN * max_length] for text in texts])
        rows = (ids[first : min(last, first + max_length - 1)] for first, last in pairwise(bounds))
        return cls(tuple(np.concatenate([[end], row]).astype(np.int64) for row in rows))

    def batch(self, numbers: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the ids of the texts `numbers`, int64 of shape (B, T) filled up on the right, and their lengths (B)."""
        import torch

        rows = [self.ids[number] for number in numbers]
        lengths = np.asarray([len(row) for row in rows])
        inputs = np.full((len(rows), lengths.max()), rows[0][0], dtype=np.int64)
        for place, row in enumerate(rows):
            inputs[place, : len(row)] = row
        return torch.from_numpy(inputs), torch.from_numpy(lengths)

    def by_length(self, numbers: np.ndarray) -> Iterator[np.ndarray]:
        """Yield places in `numbers` in batches of texts of like length, so that little is filled up."""
        order = np.argsort([len(self.ids[number]) for number in numbers], kind="stable")
        yield from (order[first : first + TEXTS_AT_A_TIME] for first in range(0, len(order), TEXTS_AT_A_TIME))


@dataclass(frozen=True)
class Body:
    """A model without its language head."""

    model: PreTrainedModel
    sees_both_sides: bool
    """Whether a position attends to later ones, and so to what a row is filled up with, unless that is masked."""

    def pooled(self, inputs_BT: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        """Return the mean of the last hidden states over each text's tokens, shape (B, D)."""
        import torch

        own_BT = torch.arange(inputs_BT.shape[1]) < lengths_B[:, None]
        mask = {"attention_mask": own_BT.long()} if self.sees_both_sides else {}
        states_BTD = self.model(input_ids=inputs_BT, **mask).last_hidden_state
        return (states_BTD * own_BT[:, :, None]).sum(dim=1) / lengths_B[:, None]


@dataclass(frozen=True)
class Start:
    """Where fine-tuning starts: the checkpoint in a directory, with its weights or with fresh ones."""

    checkpoint: Path
    fresh: bool = False
    """Whether the weights are drawn anew, as the model's configuration says they are initialised."""

    def body(self, seed: int) -> Body:
        """Return the model, in float32."""
        import torch

        model = load_checkpoint(self.checkpoint)
        if self.fresh:
            torch.manual_seed(_torch_seed(seed, 1))
            model = type(model)(model.config)
        model.config.use_cache = False
        return Body(model.float().base_model, sees_both_sides(model))


@dataclass(frozen=True)
class _Classifier:
    """A body with a head."""

    body: Body
    module: torch.nn.Module
    encodings: Encodings

    def logits(self, numbers: np.ndarray) -> torch.Tensor:
        """Return the logits of the texts `numbers`, shape (B, K)."""
        return self.module["head"](self.body.pooled(*self.encodings.batch(numbers)))  # type: ignore[index]

    def measured(self, numbers: np.ndarray) -> torch.Tensor:
        """Return the logits of any number of texts, without gradient and without dropout."""
        import torch

        self.module.eval()
        with torch.no_grad():
            places = list(self.encodings.by_length(numbers))
            found = torch.cat([self.logits(numbers[place]) for place in places])
        return found[torch.from_numpy(np.argsort(np.concatenate(places)))]


@dataclass(frozen=True)
class Tuned:
    """What a fine-tuned model predicts, and why it was taken."""

    predicted: np.ndarray
    """int64: the class of each test text."""
    epoch: int
    """From 1: whose weights were taken."""
    score: tuple[float, float]
    """Accuracy and negative loss on the validation part."""


def fine_tuned(start: Start, encodings: Encodings, texts: LabelledTexts, parts: Parts, settings: FineTuneSettings, seed: int) -> Tuned:
    """Train body and head.

    Of two starts with one seed all but the weights of the body is the same: head, order and dropout.

    Raises:
        LossNotANumber: no epoch ended with a loss that is a number.
    """
    import torch

    body = start.body(seed)
    torch.manual_seed(_torch_seed(seed, 2))
    module = torch.nn.ModuleDict({"body": body.model, "head": _new_head(int(body.model.config.hidden_size), len(texts.classes))})
    classifier, labels_N = _Classifier(body, module, encodings), torch.from_numpy(texts.labels_N)
    optimizer, step = _optimizer(module, settings), 0
    order = np.random.Generator(np.random.Philox(key=[seed, 1]))
    steps = settings.epochs * -(-len(parts.fit) // settings.batch_size)
    best, taken, weights = (-1.0, 0.0), 0, {}
    for epoch in range(1, settings.epochs + 1):
        module.train()
        shuffled = order.permutation(parts.fit)
        for first in range(0, len(shuffled), settings.batch_size):
            numbers = shuffled[first : first + settings.batch_size]
            _set_rate(optimizer, step, steps)
            torch.nn.functional.cross_entropy(classifier.logits(numbers), labels_N[numbers]).backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
        score = _score(classifier.measured(parts.validation), labels_N[parts.validation])
        if score > best:
            best, taken = score, epoch
            weights = {name: value.clone() for name, value in module.state_dict().items()}
    if not weights:
        raise LossNotANumber(
            f"labelled set {texts.name}: seed {seed} has no loss that is a number at the rate {settings.learning_rate:g}; lower it"
        )
    module.load_state_dict(weights)
    return Tuned(classifier.measured(texts.test).argmax(dim=1).numpy(), taken, best)


def _score(logits_BK: torch.Tensor, labels_B: torch.Tensor) -> tuple[float, float]:
    """Return accuracy and negative loss: of two epochs with one accuracy the surer one is better; a loss that is no number never is."""
    import torch

    loss = torch.nn.functional.cross_entropy(logits_BK, labels_B).item()
    accuracy = (logits_BK.argmax(dim=1) == labels_B).double().mean().item()
    return (accuracy, -loss) if np.isfinite(loss) else (-1.0, -np.inf)


def _new_head(width: int, classes: int) -> torch.nn.Linear:
    """Return a head that gives every class nearly the same logit, drawn as BERT's is (Devlin et al. 2019: a deviation of 0.02)."""
    import torch

    head = torch.nn.Linear(width, classes)
    torch.nn.init.normal_(head.weight, std=0.02)
    torch.nn.init.zeros_(head.bias)
    return head


def _optimizer(module: torch.nn.Module, settings: FineTuneSettings) -> torch.optim.Optimizer:
    plugin: Optimizer = plugins.build("optimizers", "adamw", {"weight_decay": settings.weight_decay})  # type: ignore[assignment]
    return plugin.build(module, settings.learning_rate)


def _set_rate(optimizer: torch.optim.Optimizer, step: int, steps: int) -> None:
    rise = max(1, round(WARMUP * steps))
    factor = min((step + 1) / rise, (steps - step) / max(1, steps - rise))
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


def _torch_seed(seed: int, purpose: int) -> int:
    return int(np.random.SeedSequence([seed, purpose]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def frozen_features(start: Start, encodings: Encodings) -> np.ndarray:
    """Return the pooled states of every text under the model as it stands, float32 of shape (N, D)."""
    import torch

    body, numbers = start.body(seed=0), np.arange(len(encodings.ids))
    body.model.eval()
    with torch.no_grad():
        places = list(encodings.by_length(numbers))
        found = torch.cat([body.pooled(*encodings.batch(place)) for place in places]).numpy()
    return found[np.argsort(np.concatenate(places))]


def linear_probe(features_ND: np.ndarray, texts: LabelledTexts, parts: Parts) -> tuple[np.ndarray, float]:
    """Return the class that a multinomial logistic regression predicts for each test text (int64), and its C.

    Features are scaled to mean 0 and deviation 1 over the texts that are fitted.
    """
    from sklearn.linear_model import LogisticRegression

    mean, deviation = features_ND[parts.fit].mean(axis=0), features_ND[parts.fit].std(axis=0)
    scaled_ND = (features_ND - mean) / np.maximum(deviation, 1e-6)
    return _best(lambda strength: LogisticRegression(C=strength, max_iter=1000, tol=1e-3), STRENGTHS, scaled_ND, texts, parts)


def tfidf_svm(texts: LabelledTexts, parts: Parts) -> tuple[np.ndarray, float]:
    """Return the class that a linear SVM on TF-IDF of words and pairs of words predicts for each test text (int64), and its C.

    It reads whole texts, and its words and their weights are those of the texts that are fitted.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.svm import LinearSVC

    vectorizer = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), token_pattern=r"(?u)\w+|[^\w\s]")
    vectorizer.fit([texts.texts[number] for number in parts.fit])
    features_NF = vectorizer.transform(texts.texts)
    return _best(lambda strength: LinearSVC(C=strength, random_state=0, max_iter=5000), STRENGTHS[1:-1], features_NF, texts, parts)


def _best(
    make: Callable[[float], ClassifierMixin], strengths: Sequence[float], features_NF: np.ndarray, texts: LabelledTexts, parts: Parts
) -> tuple[np.ndarray, float]:
    """Return the predictions of the classifier with the best validation accuracy, and its C; of equal ones that with the smallest C."""
    best, taken, predicted = -1.0, 0.0, np.empty(0)
    for strength in strengths:
        fitted = make(strength).fit(features_NF[parts.fit], texts.labels_N[parts.fit])
        accuracy = float((fitted.predict(features_NF[parts.validation]) == texts.labels_N[parts.validation]).mean())
        if accuracy > best:
            best, taken, predicted = accuracy, strength, fitted.predict(features_NF[texts.test])
    return predicted.astype(np.int64), taken
