"""The sweep against brute force: what is kept when one threshold moves is what filter_corpus keeps with that threshold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_chain import PROSE, REPEATED, SNAPSHOT, mill
from small_world import publish

from pipelines.decisions import filter_corpus
from pipelines.errors import EmptyInput, GristmillError
from pipelines.manifests import Manifest
from pipelines.store import Build, Store
from pipelines.sweeping import SWEEP, SWEEP_AUDITS, Bound, Scored, Stage, SweepSettings, read_domain, sweep, sweep_thresholds

RULES = {"quality": ("encoding.mojibake_fraction", "markup.whitespace_fraction"), "toxicity": ("toxic_words.listed_word_fraction",)}
SIDES = {"markup.whitespace_fraction": "at_least"}
VALUES = st.one_of(st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.just(float("nan")))


@st.composite
def worlds(draw: st.DrawFn) -> tuple[Scored, dict[str, Stage]]:
    documents = draw(st.integers(1, 12))
    scores = {
        stage: {rule: np.array(draw(st.lists(VALUES, min_size=documents, max_size=documents))) for rule in rules}
        for stage, rules in RULES.items()
    }
    stages = {}
    for stage, rules in RULES.items():
        on = [rule for rule in rules if draw(st.booleans())]
        bounds = {rule: Bound(SIDES.get(rule, "at_most"), draw(st.sampled_from([0.0, 0.25, 0.6]))) for rule in on}
        stages[stage] = Stage(draw(st.sampled_from(["keep", "off", "inverse"])), bounds)
    characters = np.array(draw(st.lists(st.integers(0, 9), min_size=documents, max_size=documents)), dtype=np.int64)
    return Scored("wiki", scores, characters, characters * 2), stages


def kept(scored: Scored, stages: dict[str, Stage], changed: str, bound: Bound | None) -> np.ndarray:
    """Return what is kept when rule `changed` has `bound`, document by document."""
    found = []
    for row in range(len(scored.characters)):
        verdict = True
        for name, stage in stages.items():
            bounds = dict(stage.active)
            if changed in scored.scores[name]:
                bounds.pop(changed, None)
                bounds |= {changed: bound} if bound else {}
            fails = any(value_fails(scored.scores[name][rule][row], b) for rule, b in bounds.items())
            if bounds:
                verdict &= fails if stage.mode == "inverse" else not fails
        found.append(verdict)
    return np.array(found, dtype=bool)


def value_fails(value: float, bound: Bound) -> bool:
    if np.isnan(value):
        return False
    return value < bound.value if bound.keep == "at_least" else value > bound.value


@settings(max_examples=150, deadline=None)
@given(worlds())
def test_every_point_of_every_curve_matches_brute_force(world: tuple[Scored, dict[str, Stage]]) -> None:
    scored, stages = world
    rows = sweep(scored, stages, (0.0, 0.3, 0.5, 1.0))
    assert {row["rule"] for row in rows} == {rule for rules in RULES.values() for rule in rules}
    for row in rows:
        bound = None if row["threshold"] is None else Bound(str(row["keep"]), float(row["threshold"]))
        expected = kept(scored, stages, str(row["rule"]), bound)
        found = (row["kept_documents"], row["kept_characters"], row["kept_tokens"])
        assert found == (expected.sum(), scored.characters[expected].sum(), scored.tokens[expected].sum()), row
    used = {(row["rule"], row["threshold"]) for row in rows if row["in_use"]}
    assert used == {(rule, bound.value) for stage in stages.values() for rule, bound in stage.active.items()}


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Manifest]:
    """The sweep over a small chain, with the tokens of its documents."""
    root = tmp_path_factory.mktemp("sweep")
    texts = [PROSE.format(n, "oak") * (1 + n % 3) for n in range(12)] + [REPEATED, "x = {y};" * 40, f"You asshole. {PROSE}"]
    lines = [{"id": f"d{n}", "text": text} for n, text in enumerate(texts)]
    store = Store(root / "store")
    chain = mill(store, root, lines)
    ids = pq.read_table(chain.quality_scores.file("scores.parquet"))["id"].to_pylist()
    lengths = [{"id": name, "length": 10 + n} for n, name in reversed(list(enumerate(ids)))]
    publish(store, "tokenized_shards", {"documents.parquet": lengths}, partition=f"wiki|{SNAPSHOT}")
    return store, store.build(request(store)).manifest


def request(store: Store, *, tokens: bool = True) -> Build:
    key = f"wiki|{SNAPSHOT}"
    decided = {stage: store.current(f"{stage}_filtered_corpus", "tiny") for stage in RULES}
    scores = {f"{stage}_scores": (store.current(f"{stage}_scores", key),) for stage in RULES}
    shards = {"shards": (store.current("tokenized_shards", key),) if tokens else ()}
    return Build("threshold_sweep", sweep_thresholds, SweepSettings(), "tiny", {**decided, **scores, **shards}, SWEEP_AUDITS)


def test_the_recipes_threshold_keeps_what_the_recipe_keeps(swept: tuple[Store, Manifest]) -> None:
    store, manifest = swept
    rows = pq.read_table(manifest.file(SWEEP)).to_pylist()
    expected = store.current("toxicity_filtered_corpus", "tiny").counts["kept"]
    assert {row["kept_documents"] for row in rows if row["in_use"]} == {expected}
    assert all(check.passed for check in manifest.checks) and len(manifest.checks) == 2
    ids = pq.read_table(store.current("quality_scores", f"wiki|{SNAPSHOT}").file("scores.parquet"))["id"].to_pylist()
    stays = pq.read_table(store.current("toxicity_filtered_corpus", "tiny").file("decisions.parquet"), filters=[("kept", "=", True)])
    assert {row["kept_tokens"] for row in rows if row["in_use"]} == {sum(10 + ids.index(name) for name in stays["id"].to_pylist())}


def test_a_swept_threshold_keeps_what_a_recipe_with_it_would(swept: tuple[Store, Manifest], tmp_path: Path) -> None:
    store, manifest = swept
    from pipelines.decisions import FilterSettings

    rows = [row for row in pq.read_table(manifest.file(SWEEP)).to_pylist() if row["stage"] == "toxicity"]
    assert len(rows) > 3
    for number, row in enumerate(rows):
        bounds = {} if row["threshold"] is None else {row["rule"]: {"keep": row["keep"], "value": row["threshold"]}}
        (tmp_path / str(number)).mkdir()
        settings = FilterSettings.model_validate({"thresholds": {"wiki": bounds}})
        inputs = {"scores": (store.current("toxicity_scores", f"wiki|{SNAPSHOT}"),)}
        previous = store.current("quality_filtered_corpus", "tiny")
        assert filter_corpus(settings, tmp_path / str(number), **inputs, previous=previous).counts["kept"] == row["kept_documents"]


def test_what_a_rule_costs_is_what_it_alone_drops(swept: tuple[Store, Manifest]) -> None:
    costs = {row["rule"]: row for row in swept[1].outcome.tables["costs"]}
    assert costs["toxic_words.listed_word_fraction"]["lost_documents"] == 1
    assert costs["encoding.mojibake_fraction"]["lost_documents"] == 0
    assert costs["markup.code_punctuation_fraction"]["lost_documents"] in (0, 1)


def test_without_tokens_characters_are_counted_and_it_is_said(swept: tuple[Store, Manifest]) -> None:
    manifest = swept[0].build(request(swept[0], tokens=False)).manifest
    assert manifest.outcome.details["counted"] == "characters"
    assert pq.read_table(manifest.file(SWEEP))["kept_tokens"].null_count == manifest.counts["thresholds"]


def test_the_same_scores_give_the_same_bytes(swept: tuple[Store, Manifest], tmp_path: Path) -> None:
    build = request(swept[0])
    again = build.step(build.settings, tmp_path, **build.inputs)
    assert (tmp_path / SWEEP).read_bytes() == swept[1].file(SWEEP).read_bytes()
    assert (tmp_path / "threshold_sweep.png").read_bytes() == swept[1].file("threshold_sweep.png").read_bytes()
    assert again.counts == swept[1].counts


def test_scores_of_different_documents_are_refused(tmp_path: Path, store: Store) -> None:
    row = {"domain": "wiki", "snapshot": SNAPSHOT, "characters": 3, "markup.digit_fraction": 0.5}
    one = publish(store, "quality_scores", {"scores.parquet": [{"id": "a", **row}]}, partition=f"wiki|{SNAPSHOT}")
    other = publish(store, "toxicity_scores", {"scores.parquet": [{"id": "b", **row}]}, partition=f"wiki|{SNAPSHOT}")
    with pytest.raises(GristmillError, match="score different documents; materialize both again"):
        read_domain("wiki", {"quality": (one,), "toxicity": (other,)})
    with pytest.raises(EmptyInput, match="at least one source partition"):
        sweep_thresholds(SweepSettings(), tmp_path, quality=one, toxicity=other, quality_scores=(), toxicity_scores=())
