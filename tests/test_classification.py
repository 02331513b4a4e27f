"""Classification: toy sets with a known answer, intervals against simulations, and what two starts have in common."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_world import World

from benchmarks.classification import unlabelled
from pipelines.batch import SpecialTokens
from pipelines.classification import (
    CLASSIFICATION_AUDITS,
    ClassificationSettings,
    classify,
    correct_of,
    located_sets,
    pretraining_pays,
    scores_complete,
)
from pipelines.classification import test_texts_unseen as texts_unseen
from pipelines.classifiers import Body, Encodings, FineTuneSettings, LossNotANumber, Start, fine_tuned, parts_of
from pipelines.crossed_means import macro_f1_parts, mean_interval
from pipelines.encoders import load_tokenizer, special_tokens
from pipelines.errors import GristmillError
from pipelines.labelled_sets import LabelledSet, drawn, labelled_hashes, read_labelled
from pipelines.manifests import Manifest
from pipelines.models import ModelSettings, load_checkpoint, new_model, sees_both_sides
from pipelines.store import Build

pytestmark = pytest.mark.usefixtures("one_thread")

DATA = Path(__file__).parents[1] / "data"
WORDS = {
    "sea": ["ship", "sail", "harbour", "wave", "captain", "anchor", "whale", "tide"],
    "law": ["court", "clause", "party", "notice", "contract", "claim", "judge", "term"],
    "sky": ["cloud", "star", "moon", "wind", "storm", "comet", "planet", "dawn"],
}
TUNING = FineTuneSettings(epochs=2, batch_size=8, learning_rate=3e-3, weight_decay=0.1)
QUICK = {"seeds": 2, "epochs": 4, "learning_rates": (1e-2,), "batch_size": 8, "max_length": 16}


def toy(path: Path, *, rows: int = 150, random: bool = False, split: bool = True) -> Path:
    """Write a set whose classes differ by their words, or have nothing to do with them."""
    generator = np.random.Generator(np.random.Philox(key=5))
    found = []
    for number in range(rows):
        label = sorted(WORDS)[number % 3]
        text = " ".join(["it", "was", "the", *generator.choice(WORDS[label], 5)])
        shown = str(generator.choice(sorted(WORDS))) if random else label
        found.append({"text": f"{text} {number}", "label": shown, **({"split": "test" if number % 5 > 2 else "train"} if split else {})})
    pq.write_table(pa.Table.from_pylist(found), path)
    return path


def request(world: World, base: Manifest, path: Path, **changes: object) -> Build:
    one = LabelledSet(name=path.stem, path=path.name, split="split")
    settings = ClassificationSettings(**{"sets": (one,), **QUICK, **changes})
    inputs = {"checkpoint": base, "tokenizer": world.tokenizer}
    return Build("classification", classify, located_sets(settings, path.parent), "tiny", inputs, audits=CLASSIFICATION_AUDITS)


def facts(manifest: Manifest) -> list[dict]:
    return json.loads(manifest.file("classification.json").read_text())["sets"]


# What is learnt


def test_a_set_with_an_answer_is_learnt_by_every_method_and_random_labels_by_none(world: World, base: Manifest, tmp_path: Path) -> None:
    learnt = world.store.build(request(world, base, toy(tmp_path / "toy.parquet"))).manifest
    (row,) = facts(learnt)
    assert row["classes"] == sorted(WORDS) and row["train_documents"] == 90 and row["test_documents"] == 60
    least = {"fine_tune": 0.95, "scratch": 0.95, "linear_probe": 0.7, "tfidf_svm": 0.95}
    assert row["methods"].keys() == least.keys()
    for method, values in row["methods"].items():
        assert values["accuracy"]["mean"] > least[method], method
    noise = world.store.build(request(world, base, toy(tmp_path / "noise.parquet", random=True), seeds=3)).manifest
    for values in facts(noise)[0]["methods"].values():
        assert values["accuracy"]["low"] < 1 / 3 and values["accuracy"]["mean"] < 0.5
    assert not any(check.passed for check in noise.checks if check.name == "pretraining_pays")


def test_scores_and_figures_agree_with_a_count_by_hand(world: World, base: Manifest, tmp_path: Path) -> None:
    path = toy(tmp_path / "noise.parquet", random=True)
    manifest = world.store.build(request(world, base, path, seeds=3)).manifest
    scores, (row,) = pq.read_table(manifest.file("scores.parquet")), facts(manifest)
    source = pq.read_table(path).to_pylist()
    assert all(source[one["item"]]["label"] == one["label"] and source[one["item"]]["split"] == "test" for one in scores.to_pylist())
    assert all(one["correct"] == (one["label"] == one["predicted"]) for one in scores.to_pylist())
    right = {method: correct_of(scores, "noise", method) for method in row["methods"]}
    for method, values in row["methods"].items():
        own = [one for one in scores.to_pylist() if one["method"] == method]
        by_seed = [np.mean([one["correct"] for one in own if one["seed"] == seed]) for seed in range(3)]
        assert values["accuracy_by_seed"] == pytest.approx(by_seed, abs=1e-5)
        assert values["accuracy"]["mean"] == pytest.approx(np.mean(by_seed), abs=1e-5)
        assert right[method].shape == (3, row["test_documents"])
    gap = mean_interval(right["fine_tune"].astype(float) - right["scratch"])
    assert [row["pretrained_minus_scratch"]["accuracy"][key] for key in ("mean", "low", "high")] == pytest.approx(gap, abs=1e-5)
    assert row["majority"] == pytest.approx(
        max(np.bincount([sorted(WORDS).index(s["label"]) for s in source if s["split"] == "test"])) / 60, abs=1e-5
    )
    with pytest.raises(GristmillError, match="no knn of labelled set 'noise'"):
        correct_of(scores, "noise", "knn")


def test_the_same_request_gives_the_same_bytes(world: World, base: Manifest, tmp_path: Path) -> None:
    built = request(world, base, toy(tmp_path / "noise.parquet", random=True, rows=90), epochs=2)
    files = []
    for name in ("one", "other"):
        (out := tmp_path / name).mkdir()
        classify(built.settings, out, **built.inputs)
        files.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert files[0] == files[1] and set(files[0]) == {"scores.parquet", "classification.json", "classification.png"}


def test_scratch_and_pretrained_share_everything_but_the_weights(world: World, base: Manifest, tmp_path: Path) -> None:
    """A checkpoint that holds just the weights that scratch draws must come out the same, bit by bit."""
    texts = read_labelled(
        LabelledSet(name="t", path=str(toy(tmp_path / "t.parquet", random=True))), Path(), max_train=60, max_test=30, seed=0
    )
    encodings = Encodings.of(texts.texts, world.tokenizer.directory, 16)
    parts = parts_of(texts, 0.2, seed=1)
    scratch = Start(base.directory, fresh=True)
    model = load_checkpoint(base.directory)
    model.base_model.load_state_dict(scratch.body(seed=1).model.state_dict())
    model.save_pretrained(tmp_path / "drawn")
    of_scratch = fine_tuned(scratch, encodings, texts, parts, TUNING, 1)
    of_drawn = fine_tuned(Start(tmp_path / "drawn"), encodings, texts, parts, TUNING, 1)
    assert of_scratch.score == of_drawn.score and of_scratch.epoch == of_drawn.epoch
    assert np.array_equal(of_scratch.predicted, of_drawn.predicted)
    assert fine_tuned(Start(base.directory), encodings, texts, parts, TUNING, 1).score != of_scratch.score
    other = scratch.body(seed=2).model.state_dict()
    drawn_weights = scratch.body(seed=1).model.state_dict()
    assert not torch.equal(other["embed_tokens.weight"], drawn_weights["embed_tokens.weight"])
    assert drawn_weights["embed_tokens.weight"].std() == pytest.approx(0.02, rel=0.05)


def test_a_rate_that_leaves_the_numbers_is_not_taken(world: World, base: Manifest, tmp_path: Path) -> None:
    path = toy(tmp_path / "toy.parquet", rows=60)
    changes = {"methods": ("fine_tune",), "epochs": 1, "seeds": 1}
    (row,) = facts(world.store.build(request(world, base, path, **changes, learning_rates=(1e-2, 1e38))).manifest)
    assert row["methods"]["fine_tune"]["learning_rate"] == 1e-2
    with pytest.raises(LossNotANumber, match="at the rate 1e\\+38; lower it"):
        world.store.build(request(world, base, path, **changes, learning_rates=(1e38,)))


def test_without_sets_the_result_is_empty_and_valid(world: World, base: Manifest, tmp_path: Path) -> None:
    manifest = world.store.build(replace(request(world, base, toy(tmp_path / "t.parquet")), settings=ClassificationSettings())).manifest
    assert pq.read_table(manifest.file("scores.parquet")).num_rows == 0 and facts(manifest) == []
    assert manifest.outcome.plots == () and all(check.passed for check in manifest.checks)
    assert any("no labelled set" in check.description for check in manifest.checks)


def test_audits_notice_what_is_missing_and_what_was_seen(world: World, base: Manifest, tmp_path: Path) -> None:
    path = toy(tmp_path / "toy.parquet", rows=60)
    table = pq.read_table(path).to_pylist()
    table[3]["text"] = table[0]["text"]
    pq.write_table(pa.Table.from_pylist(table), path)
    manifest = world.store.build(request(world, base, path, methods=("tfidf_svm",))).manifest
    assert not texts_unseen(manifest).passed and "toy: 1 test text" in texts_unseen(manifest).description
    assert scores_complete(manifest).passed and pretraining_pays(manifest).passed
    scores = pq.read_table(manifest.file("scores.parquet"))
    draft = manifest.at(tmp_path)
    (tmp_path / "classification.json").write_bytes(manifest.file("classification.json").read_bytes())
    pq.write_table(scores.slice(1), tmp_path / "scores.parquet")
    assert not scores_complete(draft).passed
    pq.write_table(pa.concat_tables([scores.slice(1), scores.slice(1, 1)]), tmp_path / "scores.parquet")
    assert not scores_complete(draft).passed


# Texts as a model reads them


def test_texts_are_encoded_behind_an_end_of_text_and_cut(world: World) -> None:
    texts = ["The parties agree to the terms of this licence, as they stand.", "", "whale"]
    found = Encodings.of(texts, world.tokenizer.directory, 6)
    tokenizer = load_tokenizer(world.tokenizer.directory)
    end = special_tokens(world.tokenizer.directory).end_of_text
    for text, ids in zip(texts, found.ids, strict=True):
        assert ids.tolist() == [end, *tokenizer.encode(text, add_special_tokens=False).ids][:6]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert", "modernbert"])
def test_a_text_is_read_alike_alone_and_beside_longer_ones(architecture: str) -> None:
    torch.manual_seed(0)
    sizes = ModelSettings(architecture=architecture, hidden_size=32, num_layers=2, num_heads=2, intermediate_size=48)
    model = new_model(sizes, SpecialTokens(end_of_text=0, mask=1, vocabulary_size=80), 16).eval()
    body = Body(model.base_model, sees_both_sides(model))
    generator = np.random.Generator(np.random.Philox(key=0))
    encodings = Encodings(tuple(np.concatenate([[0], generator.integers(2, 80, size)]) for size in (3, 0, 11, 6)))
    with torch.no_grad():
        together = body.pooled(*encodings.batch(np.arange(4)))
        for number, ids in enumerate(encodings.ids):
            alone = model.base_model(input_ids=torch.from_numpy(ids)[None]).last_hidden_state[0].mean(dim=0)
            torch.testing.assert_close(together[number], alone, rtol=1e-4, atol=1e-5)


# Intervals


@pytest.mark.parametrize(("seeds", "items"), [(5, 400), (3, 200)])
def test_the_paired_interval_covers_the_true_difference(seeds: int, items: int) -> None:
    """Two classifiers of crossed random seeds and texts, right or wrong: 95 % intervals hold the true difference in 93 to 97 %."""
    generator = np.random.Generator(np.random.Philox(key=11))
    true = NormalDist(sigma=np.sqrt(0.1**2 + 0.5**2 + 1 + 0.7**2)).cdf(0.4) - 0.5
    held, rounds = 0, 2000
    for _ in range(rounds):
        hardness = generator.standard_normal(items)
        one, other = (_right(generator, seeds, items, shift, hardness) for shift in (0.4, 0.0))
        mean, low, high = mean_interval(one - other)
        assert low <= mean <= high
        held += low <= true <= high
    assert 0.93 <= held / rounds <= 0.97


def _right(generator: np.random.Generator, seeds: int, items: int, shift: float, hardness: np.ndarray) -> np.ndarray:
    """Return whether a classifier is right: its skill, a seed's luck, a text's hardness, what it makes of the text, and chance."""
    luck, own = 0.1 * generator.standard_normal((seeds, 1)), 0.5 * generator.standard_normal(items)
    return (shift + luck + own + hardness + 0.7 * generator.standard_normal((seeds, items)) > 0).astype(float)


def test_the_interval_of_one_seed_is_that_of_a_mean_and_nothing_that_varies_has_none() -> None:
    from scipy import stats

    values = np.random.Generator(np.random.Philox(key=2)).random((1, 50))
    expected = stats.t.interval(0.95, 49, loc=values.mean(), scale=stats.sem(values[0]))
    assert mean_interval(values)[1:] == pytest.approx(expected)
    assert mean_interval(np.full((5, 30), 0.3)) == pytest.approx((0.3, 0.3, 0.3))
    of_seeds = np.repeat([[0.1], [0.2], [0.4]], 40, axis=1)
    expected = stats.t.interval(0.95, 2, loc=of_seeds.mean(), scale=stats.sem(of_seeds[:, 0]))
    assert mean_interval(of_seeds)[1:] == pytest.approx(expected)


def test_parts_of_macro_f1_add_up_to_it_and_vary_as_it_does() -> None:
    """Against scikit-learn, and against the deviation over resampled texts."""
    from sklearn.metrics import f1_score

    generator = np.random.Generator(np.random.Philox(key=3))
    labels = generator.choice(4, 400, p=[0.5, 0.3, 0.15, 0.05])
    predicted = np.stack([np.where(generator.random(400) < share, labels, generator.integers(0, 4, 400)) for share in (0.5, 0.8)])
    parts = macro_f1_parts(labels, predicted, 5)
    for own, ids in zip(parts, predicted, strict=True):
        assert own.mean() == pytest.approx(f1_score(labels, ids, labels=range(5), average="macro", zero_division=0))
    draws = []
    for _ in range(1000):
        taken = generator.integers(0, 400, 400)
        draws.append(f1_score(labels[taken], predicted[0][taken], labels=range(5), average="macro", zero_division=0))
    assert parts[0].std() / np.sqrt(400) == pytest.approx(np.std(draws), rel=0.1)


# Labelled sets


@given(counts=st.lists(st.integers(1, 12), min_size=1, max_size=6), share=st.floats(0, 1), seed=st.integers(0, 5))
def test_what_is_laid_aside_is_stratified(counts: list[int], share: float, seed: int) -> None:
    labels = np.repeat(np.arange(len(counts)), counts)
    size = round(share * len(labels))
    aside = drawn(labels, size, np.random.Generator(np.random.Philox(key=seed)))
    taken = np.bincount(labels[aside], minlength=len(counts))
    assert len(set(aside.tolist())) == len(aside) == min(size, sum(count - 1 for count in counts))
    assert (taken < counts).all()
    assert all(abs(own - share * count) <= len(counts) + 1 for own, count in zip(taken, counts, strict=True))


def test_a_set_without_a_split_gets_one_and_a_large_one_is_cut_by_class(tmp_path: Path) -> None:
    path = toy(tmp_path / "t.parquet", split=False)
    one = LabelledSet(name="t", path="t.parquet")
    texts = read_labelled(one, tmp_path, max_train=1000, max_test=1000, seed=3)
    assert len(texts.test) == 45 and len(texts.train) == 105 and not set(texts.test.tolist()) & set(texts.train.tolist())
    assert np.bincount(texts.labels_N[texts.test]).tolist() == [15, 15, 15]
    again = read_labelled(one, tmp_path, max_train=30, max_test=9, seed=3)
    assert np.bincount(again.labels_N[again.train]).tolist() == [10] * 3 and np.bincount(again.labels_N[again.test]).tolist() == [3] * 3
    assert set(again.rows_N[again.test].tolist()) <= set(texts.rows_N[texts.test].tolist())
    source = pq.read_table(path)["text"].to_pylist()
    assert [source[row] for row in again.rows_N] == list(again.texts)
    assert not np.array_equal(read_labelled(one, tmp_path, max_train=30, max_test=9, seed=4).rows_N, again.rows_N)


def _without(row: dict, name: str) -> dict:
    return {key: value for key, value in row.items() if key != name}


WRONG: dict[str, tuple[Callable[[list[dict]], list[dict]], str]] = {
    "no text": (lambda rows: [_without(row, "text") for row in rows], "unknown column of labelled set t 'text'"),
    "no label": (lambda rows: [_without(row, "label") | {"lable": "x"} for row in rows], "did you mean 'lable'"),
    "no split": (lambda rows: [_without(row, "split") for row in rows], "column of labelled set t 'split'"),
    "one class": (lambda rows: [row | {"label": "law"} for row in rows], "the one class 'law'; a classifier needs two"),
    "a class for the test alone": (
        lambda rows: [row | ({"label": "new"} if row["split"] == "test" else {}) for row in rows],
        "the test part has the class 'new'",
    ),
    "an unknown split": (lambda rows: [rows[0] | {"split": "holdout"}, *rows[1:]], "split 'holdout' is none of train, validation, test"),
    "no test": (lambda rows: [row | {"split": "train"} for row in rows], "no row is for testing"),
    "no training": (lambda rows: [row | {"split": "test"} for row in rows], "the training part has no row"),
    "a null": (lambda rows: [rows[0] | {"text": None}, *rows[1:]], "1 rows have no text"),
    "numbers": (lambda rows: [row | {"label": 0.5} for row in rows], "column 'label' holds double"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_set_that_cannot_be_used_is_refused(fault: str, tmp_path: Path) -> None:
    change, message = WRONG[fault]
    rows = pq.read_table(toy(tmp_path / "t.parquet", rows=30)).to_pylist()
    pq.write_table(pa.Table.from_pylist(change(rows)), tmp_path / "t.parquet")
    with pytest.raises(GristmillError, match=message):
        read_labelled(LabelledSet(name="t", path="t.parquet", split="split"), tmp_path, max_train=99, max_test=99, seed=0)


def test_files_are_of_the_project_or_named_in_full_and_their_bytes_count(world: World, base: Manifest, tmp_path: Path) -> None:
    (project := tmp_path / "project").mkdir()
    outside = toy(tmp_path / "outside.parquet", rows=30)
    inside = toy(project / "inside.parquet", rows=30)
    (project / "link.parquet").symlink_to(outside)
    for path, message in (
        ("../outside.parquet", "leaves the project"),
        ("link.parquet", "a link out of the project"),
        ("no.parquet", "no file"),
    ):
        with pytest.raises(GristmillError, match=message):
            labelled_hashes([LabelledSet(name="t", path=path)], project)
    assert labelled_hashes([LabelledSet(name="t", path=str(outside))], project).keys() == {str(outside)}
    with pytest.raises(GristmillError, match="two labelled sets are called 't'"):
        labelled_hashes([LabelledSet(name="t", path="inside.parquet")] * 2, project)
    before = request(world, base, inside)
    (inside.parent / "words.txt").write_text("not parquet")
    with pytest.raises(GristmillError, match="no Parquet file"):
        read_labelled(LabelledSet(name="t", path="words.txt"), project, max_train=9, max_test=9, seed=0)
    toy(inside, rows=60)
    assert request(world, base, inside).fingerprint() != before.fingerprint()
    with pytest.raises(GristmillError, match="was changed since its file was hashed"):
        world.store.build(before)


# What is shipped


def test_the_shipped_set_is_what_its_script_makes_of_the_sample() -> None:
    spec = importlib.util.spec_from_file_location("build_labelled", DATA / "build_labelled.py")
    assert spec and spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    rows = pq.read_table(DATA / "eval" / "works.parquet").to_pylist()
    columns = ["id", "text", "source", "license"]
    documents = {row["id"]: row for row in pq.read_table(DATA / "sample" / "corpus.parquet", columns=columns).to_pylist()}
    for label, source in script.WORKS.items():
        own = [document for document in documents.values() if document["source"].startswith(source)]
        assert script.of_work(label, own) == [row for row in rows if row["label"] == label]
    sides = {split: {row["document"] for row in rows if row["split"] == split} for split in ("train", "test")}
    assert sides["train"] and sides["test"] and not sides["train"] & sides["test"]
    assert all(row["text"] in " ".join(documents[row["document"]]["text"].split()) for row in rows)
    assert not any("verbatim" in row["license"] for row in rows)


def test_documents_that_hold_a_labelled_text_are_left_out_of_pretraining(tmp_path: Path) -> None:
    passage = "one two three four five six seven eight nine ten eleven twelve thirteen"
    texts = [f"Before. {passage.title()}, and after.", passage.replace("thirteen", "of another"), "short", ""]
    pq.write_table(pa.table({"text": texts, "domain": ["book", "book", "wiki", "wiki"]}), tmp_path / "corpus.parquet")
    pq.write_table(pa.table({"text": [passage, "short"], "label": ["a", "b"]}), tmp_path / "set.parquet")
    path, dropped = unlabelled([tmp_path / "corpus.parquet"], [tmp_path / "set.parquet"], tmp_path / "out")
    assert dropped == 1 and pq.read_table(path).to_pylist() == [
        {"text": texts[1], "domain": "book"},
        {"text": "short", "domain": "wiki"},
    ]
    pq.write_table(pa.table({"text": ["short"], "label": ["a"]}), tmp_path / "set.parquet")
    other, dropped = unlabelled([tmp_path / "corpus.parquet"], [tmp_path / "set.parquet"], tmp_path / "out")
    assert dropped == 0 and other != path
