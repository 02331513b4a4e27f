"""Classifiers of package transformers, against direct use of a tiny BERT with random weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from small_world import sample_texts

from pipelines import plugins
from pipelines.errors import GristmillError, UnknownName
from pipelines.filters import Filter

TEXTS = [*sample_texts("wiki", 12, 900), *sample_texts("code", 6, 300), "one", " \n", "word " * 300]
LABELS = {0: "bad", 1: "good", 2: "unsure"}


def build_model(folder: Path, labels: dict[int, str]) -> Path:
    """Write a BERT of two layers with random weights, and its tokenizer."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer.train_from_iterator(TEXTS, trainers.WordPieceTrainer(vocab_size=400, special_tokens=special, show_progress=False))
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=128, **names).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=128,
        id2label=labels,
        label2id={name: number for number, name in labels.items()},
        initializer_range=0.5,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    build_model(root / "labels", LABELS)
    build_model(root / "regression", {0: "LABEL_0"})
    return root


def classifier(root: Path, **values: object) -> Filter:
    plugin = plugins.build("filters", "hf_classifier", {"max_tokens": 64, **values})
    assert isinstance(plugin, Filter)
    return plugin.at(root)


def directly(folder: Path, text: str) -> torch.Tensor:
    """Return the logits of one text by the model as transformers loads it."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    with torch.inference_mode():
        return model(**tokenizer(text, return_tensors="pt", truncation=True, max_length=64)).logits[0]


@pytest.mark.parametrize(("name", "label"), [("labels", "good"), ("labels", "unsure"), ("regression", None)])
def test_scores_are_those_of_the_model(models: Path, name: str, label: str | None) -> None:
    found = classifier(models, model=name, label=label).score(TEXTS)["score"]
    expected = []
    for text in TEXTS:
        logits = directly(models / name, text)
        value = logits[0] if label is None else torch.softmax(logits, 0)[list(LABELS.values()).index(label)]
        expected.append(float(value) if text.strip() else np.nan)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.nanstd(found) > 1e-3


def test_scores_do_not_depend_on_the_batch(models: Path) -> None:
    together = classifier(models, model="regression").score(TEXTS)["score"]
    for size in (1, 5):
        again = classifier(models, model="regression", batch_size=size).score(TEXTS[::-1])["score"][::-1]
        np.testing.assert_allclose(again, together, atol=1e-4)
    assert classifier(models, model="regression").score([])["score"].shape == (0,)


def test_what_lies_beyond_the_last_token_is_not_read(models: Path) -> None:
    found = classifier(models, model="regression", max_tokens=16).score(["word " * 14, "word " * 14 + "other", "other " + "word " * 14])[
        "score"
    ]
    assert found[0] == found[1] != found[2]


def test_the_threads_of_torch_are_as_before(models: Path) -> None:
    before = torch.get_num_threads()
    classifier(models, model="regression").score(["a text"])
    assert torch.get_num_threads() == before


def test_every_file_of_the_folder_is_named(models: Path) -> None:
    names = {path.name for path in classifier(models, model="labels").files()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not classifier(models, model="owner/name", revision="0" * 40).files()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": "labels"}, "tells 3 labels apart; name one as `label`: bad, good, unsure"),
        ({"model": "labels", "label": "god"}, "did you mean 'good'"),
        ({"model": "nowhere"}, "no model 'nowhere'"),
        ({"model": "../labels"}, "leaves the project's directory"),
        ({"model": "empty"}, "no sequence classifier"),
        ({"model": "labels", "revision": "main"}, "full commit hash"),
    ],
)
def test_a_model_that_cannot_be_used_is_refused(models: Path, values: dict[str, str], message: str) -> None:
    (models / "empty").mkdir(exist_ok=True)
    with pytest.raises((GristmillError, UnknownName), match=message):
        classifier(models, **values).score(["a text"])


def test_weights_are_read_from_safetensors_alone(models: Path, tmp_path: Path) -> None:
    folder = build_model(tmp_path / "pickled", LABELS)
    from safetensors.torch import load_file

    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(GristmillError, match="no sequence classifier with safetensors"):
        classifier(tmp_path, model="pickled", label="good").score(["a text"])
