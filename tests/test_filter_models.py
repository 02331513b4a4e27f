"""Fitted filters: what they may learn from, the same bytes again, honest measures, and the language model against its definition."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import corpus
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sklearn.metrics import brier_score_loss, roc_auc_score
from small_world import publish, sample_texts

from assets_defs import filtering as assets
from assets_defs.resources import Mill
from pipelines import filter_models, plugins
from pipelines.configuration import read_project
from pipelines.documents import partition_file, stable_fraction
from pipelines.engine import Engine
from pipelines.errors import EmptyInput, GristmillError
from pipelines.files import file_hashes
from pipelines.filter_models import COLLECT_AUDITS, MODEL_AUDITS, FitSettings, ModelsSettings, TrainingSample
from pipelines.filtering import SCORE_AUDITS, CollectSettings, ScoreSettings, collect_scores, located, score_documents
from pipelines.filters import FittedFilter
from pipelines.filters._calibration import auc, balanced, calibrate, probabilities, quality
from pipelines.filters._hashed_words import hash_words
from pipelines.filters._ngram_model import fit, log_probabilities
from pipelines.filters._training_text import fold_of, training_texts
from pipelines.filters.quality_classifier import EVALUATED
from pipelines.manifests import Manifest, Member, Outcome
from pipelines.recipes import Project
from pipelines.store import Build, Store

TEXTS = {"wiki": sample_texts("wiki", 400, 1200), "code": sample_texts("code", 120, 6000)}
CLASSIFIER = {"good": ["wiki"], "bad": ["code"], "bits": 14}
PERPLEXITY = {"good": ["wiki", "code"]}
HELD_OUT = 4
"""Every fourth document is held out."""


class Texts:
    """A sample in memory."""

    def __init__(self, **texts: Sequence[str]) -> None:
        self.texts = texts

    def documents(self, domain: str):
        yield from ((f"{domain}-{number}", text) for number, text in enumerate(self.texts[domain]))


def request(store: Store, name: str, values: dict[str, object], texts: dict[str, list[str]] = TEXTS, root: Path = Path()) -> Build:
    """Return the request for a model fitted on `texts`."""
    corpora = tuple(corpus(store, domain, found) for domain, found in texts.items())
    plugin = plugins.build("filters", name, values).at(root)  # type: ignore[attr-defined]
    return Build(
        asset=f"filter_models.{name}",
        step=filter_models.fit_filter,
        settings=FitSettings(filter=name, settings=values, files=file_hashes(plugin.files(), root), root=root),
        inputs={"sample": corpora, "splits": tuple(published_split(store, manifest) for manifest in corpora)},
        audits=MODEL_AUDITS,
        plugins=(f"pipelines.filters.{name}",),
    )


def published_split(store: Store, cleaned: Manifest) -> Member:
    ids = pq.read_table(cleaned.file("documents.parquet"), columns=["id"])["id"].to_pylist()
    rows = [{"id": name, "split": "held_out" if number % HELD_OUT == 3 else "train"} for number, name in enumerate(ids)]
    file = partition_file(str(cleaned.partition))
    return Member(manifest=publish(store, "duplicate_clusters", {file: rows}), name=file)


def fitted(name: str, values: dict[str, object], texts: dict[str, list[str]], state: Path, root: Path = Path()) -> FittedFilter:
    """Fit a filter on `texts` into `state`, without a store."""
    state.mkdir(parents=True)
    plugin = plugins.build("filters", name, values).at(root)  # type: ignore[attr-defined]
    assert isinstance(plugin, FittedFilter)
    plugin.fit(Texts(**texts), state)
    return plugin


# What is learned from


def test_nothing_held_out_is_learned_from(store: Store) -> None:
    cleaned = corpus(store, "wiki", [f"document {number}" for number in range(40)])
    sample = TrainingSample((cleaned,), (published_split(store, cleaned),))
    found = [text for _, text in sample.documents("wiki")]
    assert found == [f"document {number}" for number in range(40) if number % HELD_OUT != 3]
    assert found == [text for _, text in sample.documents("wiki")], "a sample can be read again"
    assert not list(sample.documents("code"))


def test_a_partition_without_a_split_is_refused(store: Store) -> None:
    cleaned = corpus(store, "wiki", ["a text"])
    with pytest.raises(GristmillError, match="has no split file"):
        list(TrainingSample((cleaned,), ()).documents("wiki"))


def test_of_too_much_text_a_stable_share_is_taken() -> None:
    sample = Texts(wiki=TEXTS["wiki"], code=TEXTS["code"])
    total = sum(len(text) for texts in TEXTS.values() for text in texts)
    some = list(training_texts(sample, ("wiki", "code"), (), max_characters=total // 4, what="test"))
    assert 0.15 < sum(len(text) for _, text in some) / total < 0.35
    assert some == list(training_texts(sample, ("wiki", "code"), (), max_characters=total // 4, what="test"))
    assert {origin for origin, _ in some} == {"wiki", "code"}


def test_files_are_read_beside_domains(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["one", "two"], "other": [1, 2]}), tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_text('{"text": "three"}\n\n{"text": "four", "other": 1}\n')
    files = [tmp_path / "a.parquet", tmp_path / "b.jsonl"]
    found = list(training_texts(Texts(), (), files, max_characters=10**6, what="test"))
    assert found == [("a.parquet", "one"), ("a.parquet", "two"), ("b.jsonl", "three"), ("b.jsonl", ""), ("b.jsonl", "four")]


@pytest.mark.parametrize(
    ("content", "message"),
    [("not json\n", "line 1 is not JSON"), ('{"txt": "a"}\n', "row 1 holds no string under 'text'"), ("[1]\n", "row 1 holds no string")],
)
def test_a_file_that_holds_no_text_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(GristmillError, match=message):
        list(training_texts(Texts(), (), [tmp_path / "a.jsonl"], max_characters=100, what="test"))


def test_the_content_of_files_is_part_of_the_models_identity(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS["code"]))
    values: dict[str, object] = {"good": ["wiki"], "bad_files": ["*.jsonl"], "bits": 14}
    texts = {"wiki": TEXTS["wiki"]}
    first = request(store, "quality_classifier", values, texts, tmp_path)
    model = store.build(first).manifest
    assert model.settings["files"].keys() == {"bad.jsonl"}  # type: ignore[union-attr]
    assert {row["origin"] for row in model.outcome.tables["by_origin"]} == {"wiki", "bad.jsonl"}
    path.write_text(path.read_text() + '{"text": "one more"}\n')
    assert request(store, "quality_classifier", values, texts, tmp_path).fingerprint() != first.fingerprint()
    with pytest.raises(GristmillError, match="changed since they were hashed"):
        filter_models.fit_filter(first.settings, tmp_path, sample=(), splits=())  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "values"), [("quality_classifier", CLASSIFIER), ("perplexity", PERPLEXITY)])
def test_the_same_sample_gives_the_same_bytes(name: str, values: dict[str, object], tmp_path: Path) -> None:
    first, second = (Store(tmp_path / number) for number in ("one", "two"))
    models = [store.build(request(store, name, values)).manifest for store in (first, second)]
    assert models[0].content_sha256 == models[1].content_sha256
    assert models[0].outcome == models[1].outcome
    assert all(check.passed for check in models[0].checks)
    assert {Path(entry.path).suffix for entry in models[0].files} == {".safetensors", ".json", ".png"}


@pytest.mark.parametrize(("name", "values"), [("quality_classifier", CLASSIFIER), ("perplexity", PERPLEXITY)])
def test_scores_do_not_depend_on_the_batch(name: str, values: dict[str, object], tmp_path: Path) -> None:
    plugin = fitted(name, values, TEXTS, tmp_path / "state")
    texts = ["", " \n ", "one word", *TEXTS["wiki"][:20], TEXTS["code"][0], "日本語の文章です。" * 30]
    together = plugin.score(texts, state=tmp_path / "state")
    alone = [plugin.score([text], state=tmp_path / "state") for text in texts]
    for rule in plugin.rules:
        np.testing.assert_array_equal(together[rule.name], np.concatenate([found[rule.name] for found in alone]))
    for label in plugin.labels:
        assert list(together[label]) == [found[label][0] for found in alone]
    assert all(len(found) == 0 for found in plugin.score([], state=tmp_path / "state").values())


# Models in the graph


def test_models_are_collected_and_scores_follow_them(store: Store) -> None:
    requests = (request(store, "quality_classifier", CLASSIFIER), request(store, "perplexity", PERPLEXITY))
    names = ModelsSettings(filters=("quality_classifier", "perplexity"))
    build = Build("filter_models", filter_models.collect_models, names, inputs={"models": requests}, audits=COLLECT_AUDITS)
    composite = store.build(build).manifest
    assert set(composite.outcome.plots) == {"quality_classifier.reliability.png", "perplexity.perplexity_by_origin.png"}
    assert composite.outcome.metrics["quality_classifier.held_out_auc"] > 0.95
    models = {r.asset.partition(".")[2]: store.find(r.asset, r.fingerprint) for r in composite.inputs["models"]}
    cleaned = corpus(store, "wiki", TEXTS["wiki"])
    families = tuple(scored(store, cleaned, name, values, models[name]) for name, values in asked().items())
    wide = Build(
        "quality_scores",
        collect_scores,
        CollectSettings(domain="wiki", snapshot="2026-01-01"),
        cleaned.partition,
        {"cleaned": cleaned, "families": families},
        audits=SCORE_AUDITS,
    )
    table = pq.read_table(store.build(wide).manifest.file("scores.parquet"))
    assert table.column_names[4:] == [
        "quality_classifier.good_probability",
        "perplexity.log_perplexity",
        "perplexity.order_gain",
        "perplexity.bucket",
    ]
    assert set(table["perplexity.bucket"].to_pylist()) <= {"head", "middle", "tail", None}
    changed = store.build(request(store, "perplexity", {**PERPLEXITY, "order": 2})).manifest
    again = {name: scored(store, cleaned, name, values, models[name]).fingerprint() for name, values in asked().items()}
    other = scored(store, cleaned, "perplexity", {**PERPLEXITY, "order": 2}, changed).fingerprint()
    assert again == {family.settings.filter: family.fingerprint() for family in families}  # type: ignore[attr-defined]
    assert other not in again.values()


def asked() -> dict[str, dict[str, object]]:
    return {"quality_classifier": CLASSIFIER, "perplexity": PERPLEXITY}


def scored(store: Store, cleaned: Manifest, name: str, values: dict[str, object], model: Manifest | None) -> Build:
    settings = located(ScoreSettings(filter=name, settings=values), Path())
    inputs = {"cleaned": cleaned, **({"model": model} if model else {})}
    return Build(f"quality_scores.{name}", score_documents, settings, cleaned.partition, inputs)


def test_a_project_without_fitted_filters_has_an_empty_model(store: Store) -> None:
    build = Build("filter_models", filter_models.collect_models, ModelsSettings(), inputs={"models": ()}, audits=COLLECT_AUDITS)
    manifest = store.build(build).manifest
    assert manifest.counts["models"] == 0 and json.loads(manifest.file("models.json").read_text()) == {}


def test_a_fitted_filter_does_not_score_without_its_model(store: Store) -> None:
    with pytest.raises(GristmillError, match="fitted before it scores; materialize filter_models"):
        store.build(scored(store, corpus(store, "wiki", ["a text"]), "perplexity", PERPLEXITY, None))


class SmallMill(Mill):
    """A mill over a project that a test gives."""

    def __init__(self, store: Store, text: str) -> None:
        super().__init__(store.root, Engine(kind="serial"))
        path = store.root / "project.yaml"
        path.write_text(text, encoding="utf-8")
        self._project = read_project(path)

    @property
    def project(self) -> Project:
        return self._project


PROJECT = """
name: small
first_snapshot: "2026-01-01"
snapshots: ["2026-01-01"]
fit_on: ["2026-01-01"]
source: text
source_settings: {{paths: [none.txt]}}
quality: {{encoding: {{}}, perplexity: {{good: [wiki], order: {order}}}}}
toxicity: {{toxic_words: {{}}}}
domains: {{wiki: {{}}, code: {{}}}}
"""


def write_splits(settings: ModelsSettings, out: Path, *, corpora: tuple[Manifest, ...]) -> Outcome:
    """Write the split of each corpus as duplicate_clusters does."""
    (out / "splits").mkdir()
    for cleaned in corpora:
        ids = pq.read_table(cleaned.file("documents.parquet"), columns=["id"])["id"]
        table = pa.table({"id": ids, "split": ["held_out" if n % HELD_OUT == 3 else "train" for n in range(len(ids))]})
        pq.write_table(table, out / "splits" / partition_file(str(cleaned.partition)))
    return Outcome()


def test_a_model_is_fitted_once_and_a_changed_one_scores_its_filter_alone(store: Store) -> None:
    corpora = tuple(corpus(store, domain, texts) for domain, texts in TEXTS.items())
    store.build(Build("duplicate_clusters", write_splits, ModelsSettings(), inputs={"corpora": corpora}))
    mill = SmallMill(store, PROJECT.format(order=3))
    with pytest.raises(GristmillError, match="filter_models has not been materialized"):
        assets._scores(mill, "quality", "wiki|2026-01-01")
    composite = Build("filter_models", filter_models.collect_models, ModelsSettings(filters=("perplexity",)))
    models = tuple(assets._model(mill, wanted) for wanted in mill.project.fitted())
    assert [member.name for member in models[0].inputs["splits"]] == ["splits/wiki@2026-01-01.parquet"], "domains that it names alone"
    store.build(replace(composite, inputs={"models": models}))
    first = assets._scores(mill, "quality", "wiki|2026-01-01")
    assert store.build(first).manifest.counts["documents"] == len(TEXTS["wiki"])
    other = SmallMill(store, PROJECT.format(order=2))
    with pytest.raises(GristmillError, match="no perplexity fitted with these settings; materialize filter_models"):
        assets._scores(other, "quality", "wiki|2026-01-01")
    store.build(replace(composite, inputs={"models": tuple(assets._model(other, wanted) for wanted in other.project.fitted())}))
    families = [
        [f.fingerprint() for f in build.inputs["families"]] for build in (first, assets._scores(other, "quality", "wiki|2026-01-01"))
    ]
    assert [one == two for one, two in zip(*families, strict=True)] == [True, False]


def test_a_domain_to_fit_on_that_is_none_names_the_nearest(store: Store) -> None:
    store.root.mkdir(parents=True)
    with pytest.raises(GristmillError, match="perplexity: unknown domain 'wikki'.*did you mean 'wiki'"):
        SmallMill(store, PROJECT.format(order=3).replace("good: [wiki]", "good: [wikki]"))


# quality_classifier


def test_the_classifier_tells_prose_from_code_it_has_not_seen(store: Store) -> None:
    model = store.build(request(store, "quality_classifier", CLASSIFIER)).manifest
    plugin = plugins.build("filters", "quality_classifier", CLASSIFIER)
    assert isinstance(plugin, FittedFilter)
    unseen = {domain: texts[3::HELD_OUT] for domain, texts in TEXTS.items()}
    found = {domain: np.asarray(plugin.score(texts, state=model.directory)["good_probability"]) for domain, texts in unseen.items()}
    classes = np.repeat([1.0, 0.0], [len(found["wiki"]), len(found["code"])])
    assert roc_auc_score(classes, np.concatenate([found["wiki"], found["code"]])) > 0.98
    assert model.outcome.metrics["held_out_auc"] > 0.98
    assert model.outcome.metrics["held_out_expected_calibration_error"] < 0.1
    assert sum(row["examples"] for row in model.outcome.tables["calibration"]) == model.counts["held_out_examples"]


def test_what_a_document_teaches_does_not_reach_its_own_score(tmp_path: Path) -> None:
    """But for the calibration, which is of the fold: the logit is that of a model without the document."""
    extra = next(text for number in range(50) if stable_fraction("evaluated", text := "zyx wvu tsr " * 200 + str(number)) >= EVALUATED)
    values = {**CLASSIFIER, "calibration": "platt"}
    with_it = fitted("quality_classifier", values, {**TEXTS, "code": [*TEXTS["code"], *[extra] * 30]}, tmp_path / "with")
    probability = float(np.asarray(with_it.score([extra], state=tmp_path / "with")["good_probability"])[0])
    other = next(text for number in range(50) if fold_of(text := f"{extra}{number}", 2) != fold_of(extra, 2))
    learned = float(np.asarray(with_it.score([other], state=tmp_path / "with")["good_probability"])[0])
    assert learned < 0.1 < probability


@pytest.mark.parametrize(
    ("values", "texts", "message"),
    [
        ({"good": ["wiki"]}, TEXTS, "bad: no training text in no domain and no file"),
        ({"good": ["wiki"], "bad": ["code"]}, {**TEXTS, "code": TEXTS["code"][:5]}, "bad has .* name more bad documents"),
        ({"good": ["wiki"], "bad": ["code"]}, {**TEXTS, "code": ["", ""]}, "no training text in code"),
    ],
)
def test_too_little_to_learn_from_is_refused(values: dict[str, object], texts: dict[str, list[str]], message: str, tmp_path: Path) -> None:
    with pytest.raises(EmptyInput, match=message):
        fitted("quality_classifier", values, texts, tmp_path / "state")


def test_a_domain_is_not_good_and_bad() -> None:
    with pytest.raises(GristmillError, match="wiki is called good and bad"):
        plugins.build("filters", "quality_classifier", {"good": ["wiki"], "bad": ["wiki"]}).files()  # type: ignore[attr-defined]


SCORES = st.lists(st.tuples(st.floats(-5, 5), st.booleans()), min_size=10, max_size=80).filter(lambda rows: len({c for _, c in rows}) == 2)


@settings(max_examples=60, deadline=None)
@given(SCORES, st.sampled_from(["platt", "isotonic"]))
def test_calibration_keeps_the_order_of_scores(rows: list[tuple[float, bool]], method: str) -> None:
    scores, classes = np.array([s for s, _ in rows]), np.array([float(c) for _, c in rows])
    found = probabilities(np.sort(scores), calibrate(scores, classes, method), method)  # type: ignore[arg-type]
    assert ((found >= 0) & (found <= 1)).all()
    steps = np.diff(found)
    assert (steps >= -1e-9).all() or (method == "platt" and (steps <= 1e-9).all())


@settings(max_examples=60, deadline=None)
@given(SCORES)
def test_measures_are_those_of_scikit_learn(rows: list[tuple[float, bool]]) -> None:
    found, classes = np.array([1 / (1 + math.exp(-s)) for s, _ in rows]), np.array([float(c) for _, c in rows])
    weights = balanced(classes)
    assert auc(found, classes) == pytest.approx(roc_auc_score(classes, found), abs=1e-6)
    assert quality(found, classes)["brier"] == pytest.approx(brier_score_loss(classes, found, sample_weight=weights), abs=1e-6)


def test_isotonic_calibration_is_the_observed_share() -> None:
    scores, classes = np.repeat([0.0, 1.0, 2.0], 4), np.array([0, 0, 0, 1, 0, 1, 0, 1, 1, 1, 1, 0.0])
    found = probabilities(np.array([0.0, 1.0, 2.0, -9.0, np.nan]), calibrate(scores, classes, "isotonic"), "isotonic")
    np.testing.assert_allclose(found, [0.25, 0.5, 0.75, 0.25, np.nan])


# perplexity

WORDS = st.lists(st.sampled_from(["a", "b", "c", "d", "e"]), min_size=1, max_size=30)


@settings(max_examples=60, deadline=None)
@given(st.lists(WORDS, min_size=1, max_size=6), WORDS, st.integers(2, 4), st.booleans())
@example([["a"], ["a"]], ["a"], 4, True)  # a context of which all is pruned, before one of which nothing is
def test_the_language_model_is_its_definition(documents: list[list[str]], unseen: list[str], order: int, prune: bool) -> None:
    model = fit(*hash_words([" ".join(words) for words in documents]), order=order, prune=prune)
    reference = KneserNey(documents, order, prune)
    texts = [*documents, unseen, ["z", *unseen, "z"]]
    found, single = log_probabilities(*hash_words([" ".join(words) for words in texts]), model, order=order)
    for number, words in enumerate(texts):
        padded = ["<s>"] * (order - 1) + words
        pairs = [(tuple(padded[place - order + 1 : place]), padded[place]) for place in range(order - 1, len(padded))]
        assert found[number] == pytest.approx(sum(math.log(reference.probability(*pair)) for pair in pairs), rel=1e-4)
        assert single[number] == pytest.approx(sum(math.log(reference.probability((), word)) for _, word in pairs), rel=1e-4)
    for context in [(), ("a",), ("b", "a"), ("z",), ("<s>",)]:
        total = sum(reference.probability(context, word) for word in [*reference.vocabulary, "unknown"])
        assert total == pytest.approx(1), "probabilities after a context sum to 1"


class KneserNey:
    """Interpolated modified Kneser-Ney by dictionaries, from the formulas of Chen and Goodman 1999, section 3."""

    def __init__(self, documents: list[list[str]], order: int, prune: bool) -> None:
        self.order = order
        self.vocabulary = {word for words in documents for word in words}
        padded = [["<s>"] * (order - 1) + words for words in documents]
        grams = [tuple(words[p - order + 1 : p + 1]) for words in padded for p in range(order - 1, len(words))]
        self.counts = {order: Counter(grams)}
        for n in range(order - 1, 0, -1):
            self.counts[n] = Counter(gram[1:] for gram in self.counts[n + 1])
        self.values: dict[tuple, float] = {}
        self.left: dict[tuple, float] = {}
        for n, counts in self.counts.items():
            discounts = self._discounts(counts)
            totals: dict[tuple, int] = defaultdict(int)
            for gram, count in counts.items():
                totals[gram[:-1]] += count
            for gram, count in counts.items():
                if not (prune and n > 2 and count < 2):
                    self.values[gram] = (count - discounts[min(count, 3)]) / totals[gram[:-1]]
            for context in totals:
                self.left[context] = 1 - sum(value for gram, value in self.values.items() if len(gram) == n and gram[:-1] == context)

    def _discounts(self, counts: Counter) -> list[float]:
        n = [sum(1 for count in counts.values() if count == number) for number in (1, 2, 3, 4)]
        if all(n):
            y = n[0] / (n[0] + 2 * n[1])
            found = [0.0, 1 - 2 * y * n[1] / n[0], 2 - 3 * y * n[2] / n[1], 3 - 4 * y * n[3] / n[2]]
            if all(0 < value < number for number, value in enumerate(found) if number):
                return found
        return [0.0, 0.5, 1.0, 1.5]

    def probability(self, context: tuple[str, ...], word: str) -> float:
        if not context:
            return self.values.get((word,), 0.0) + self.left[()] / (len(self.vocabulary) + 1)
        lower = self.probability(context[1:], word)
        if context not in self.left:
            return lower
        return self.values.get((*context, word), 0.0) + self.left[context] * lower


def test_word_order_is_told_apart_from_vocabulary(tmp_path: Path) -> None:
    plugin = fitted("perplexity", {"good": ["wiki"]}, TEXTS, tmp_path / "state")
    rng = np.random.default_rng(0)
    texts = [text for text in TEXTS["wiki"] if len(text) > 500][:60]
    shuffled = [" ".join(rng.permutation(text.split())) for text in texts]
    clean, mixed = (plugin.score(found, state=tmp_path / "state") for found in (texts, shuffled))
    gains = np.concatenate([clean["order_gain"], mixed["order_gain"]])
    classes = np.repeat([1.0, 0.0], len(texts))
    assert roc_auc_score(classes, gains) > 0.92
    assert np.mean(np.asarray(mixed["log_perplexity"]) > np.asarray(clean["log_perplexity"])) > 0.85
    code = plugin.score(TEXTS["code"], state=tmp_path / "state")
    assert np.median(code["log_perplexity"]) > np.median(clean["log_perplexity"])


def test_a_documents_own_text_does_not_reach_its_perplexity(tmp_path: Path) -> None:
    text = "colourless green ideas sleep furiously in the garden of forking paths , and so on " * 4
    without = fitted("perplexity", {"good": ["wiki"]}, TEXTS, tmp_path / "without")
    with_it = fitted("perplexity", {"good": ["wiki"]}, {"wiki": [*TEXTS["wiki"], text]}, tmp_path / "with")
    scores = [plugin.score([text], state=tmp_path / name) for plugin, name in ((without, "without"), (with_it, "with"))]
    assert scores[0]["log_perplexity"] == scores[1]["log_perplexity"]
    assert scores[0]["order_gain"] == scores[1]["order_gain"]


def test_thirds_are_of_the_text_it_was_fitted_on(tmp_path: Path) -> None:
    plugin = fitted("perplexity", {"good": ["wiki"]}, TEXTS, tmp_path / "state")
    buckets = Counter(plugin.score(TEXTS["wiki"], state=tmp_path / "state")["bucket"])
    counted = [buckets[name] for name in ("head", "middle", "tail")]
    assert max(counted) - min(counted) <= 1
    short = plugin.score(["too short"], state=tmp_path / "state")
    assert short["bucket"] == [None] and np.isnan(short["log_perplexity"][0])
