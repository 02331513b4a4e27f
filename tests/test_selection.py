"""The selection step: who may be selected, budgets as prefixes, scores, target sets, snapshots that extend, and what is checked."""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import corpus
from hypothesis import given, settings
from hypothesis import strategies as st
from test_embedding import embedded, fitted

from pipelines import plugins, report_sections
from pipelines.candidates import Candidates, Sources
from pipelines.documents import stable_fraction, write_table
from pipelines.embedders._grid import UNIT, to_integer_rows
from pipelines.errors import EmptyInput, GristmillError, MissingArtifact, UnknownName
from pipelines.manifests import Check, Manifest, Outcome
from pipelines.pages import code, percent
from pipelines.plugins import Settings
from pipelines.report_artifacts import Artifacts
from pipelines.selection import SELECTION_SCHEMA, Chosen, SelectionSettings, choose, count, in_step, measure, ranked, select_subset
from pipelines.selection_audits import SELECTION_AUDITS, tokens_by_domain
from pipelines.set_functions import Order, Points
from pipelines.set_functions._neighbors import nearest_pick
from pipelines.set_functions.facility_location import FacilityLocation
from pipelines.store import Build, Store

JANUARY, FEBRUARY, MARCH = "2026-01-01", "2026-02-01", "2026-03-01"
PASSAGES = 3
"""Passages of each document."""
RULE = "perplexity.log_perplexity"


class SourceSettings(Settings):
    """Numbers from which the artifacts of one source partition are written."""

    domain: str
    documents: int = 40
    seed: int = 0
    snapshot: str = JANUARY
    passages_in_shards: int = PASSAGES
    """Passages of each document in the shards; the embeddings always hold `PASSAGES`."""


def document_names(source: SourceSettings) -> list[str]:
    return [f"{source.domain}-{source.snapshot[5:7]}-{number:03d}" for number in range(source.documents)]


def vectors(source: SourceSettings) -> np.ndarray:
    """Return integer rows around the six centres of the domain, which all its snapshots share; some rows are repeated."""
    count = PASSAGES * source.documents
    centres = np.random.default_rng(len(source.domain)).normal(size=(6, 8))
    random = np.random.default_rng([source.seed, int(source.snapshot[5:7])])
    rows = to_integer_rows(centres[random.integers(6, size=count)] + 0.4 * random.normal(size=(count, 8)))
    rows[count // 2 : count // 2 + count // 10] = rows[: count // 10]
    return rows


def write_embeddings(source: SourceSettings, out: Path, *, embedder: Manifest | None = None) -> Outcome:
    """Write `PASSAGES` passages per document, of 100 to 499 bytes."""
    ids, numbers = [name for name in document_names(source) for _ in range(PASSAGES)], list(range(PASSAGES)) * source.documents
    zeros = pa.array([0] * len(ids), pa.int64())
    sizes = np.random.default_rng(source.seed + 2).integers(100, 500, size=len(ids))
    columns = {"id": ids, "passage": pa.array(numbers, pa.int32()), "start": zeros, "end": zeros, "bytes": sizes}
    write_table(out / "passages.parquet", pa.table(columns))
    np.save(out / "embeddings.npy", vectors(source))
    return Outcome()


def write_shard(source: SourceSettings, out: Path) -> Outcome:
    """Write token counts between 20 and 119."""
    each = source.passages_in_shards
    ids = [name for name in document_names(source) for _ in range(each)]
    lengths = np.random.default_rng(source.seed + 1).integers(20, 120, size=len(ids))
    table = {"id": ids, "passage": pa.array(list(range(each)) * source.documents, pa.int32()), "offset": np.cumsum(lengths) - lengths}
    write_table(out / "passages.parquet", pa.table(table | {"length": lengths}))
    return Outcome()


def document_scores(source: SourceSettings) -> dict[str, float]:
    """Return a score per document; every ninth is NaN, every eleventh is absent."""
    values = np.random.default_rng(source.seed + 3).normal(size=source.documents)
    values[4::9] = np.nan
    return {name: float(value) for number, (name, value) in enumerate(zip(document_names(source), values, strict=True)) if number % 11 != 5}


def write_scores(source: SourceSettings, out: Path) -> Outcome:
    """Write one rule and one label, documents in reverse."""
    scores = dict(reversed(document_scores(source).items()))
    keys = {"id": list(scores), "domain": [source.domain] * len(scores), "characters": [10] * len(scores)}
    write_table(out / "scores.parquet", pa.table(keys | {RULE: list(scores.values()), "perplexity.bucket": ["head"] * len(scores)}))
    return Outcome()


class DecisionSettings(Settings):
    """Rows of `decisions.parquet`."""

    rows: tuple[tuple[str, str, str, bool, str], ...]
    """id, domain, snapshot, kept, split."""


def write_decisions(decided: DecisionSettings, out: Path) -> Outcome:
    """Write the columns that selection reads."""
    columns = zip(*decided.rows, strict=True)
    write_table(out / "decisions.parquet", pa.table(dict(zip(("id", "domain", "snapshot", "kept", "split"), columns, strict=True))))
    return Outcome()


def is_train(number: int) -> bool:
    """Return whether a document is a candidate: of each ten the fourth is dropped and the seventh is held out."""
    return number % 10 not in (3, 6)


def inputs(store: Store, *sources: SourceSettings) -> dict[str, Manifest | tuple[Manifest, ...]]:
    """Publish sources and decisions."""
    steps = {"document_embeddings": write_embeddings, "tokenized_shards": write_shard, "quality_scores": write_scores}
    found, rows = {asset: [] for asset in steps}, []
    for source in sources:
        for asset, step in steps.items():
            partition = f"{source.domain}|{source.snapshot}"
            found[asset].append(store.build(Build(asset=asset, partition=partition, step=step, settings=source)).manifest)
        for number, name in enumerate(document_names(source)):
            split = "held_out" if number % 10 == 6 else "train"
            rows.append((name, source.domain, source.snapshot, number % 10 != 3, split))
    request = Build(asset="deduplicated_corpus", partition="r", step=write_decisions, settings=DecisionSettings(rows=tuple(rows)))
    embeddings, shards, scores = (tuple(manifests) for manifests in found.values())
    return {"decisions": store.build(request).manifest, "embeddings": embeddings, "shards": shards, "scores": scores}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """One store for all tests: what several ask for is made once."""
    return Store(tmp_path_factory.mktemp("selection"))


WIKI, BOOK, CODE = (SourceSettings(domain=domain, seed=seed) for seed, domain in enumerate(("wiki", "book", "code")))
ROLES = {"wiki": "general", "book": "general", "code": "target"}


def selection_settings(*, general: dict | None = None, **changes: object) -> SelectionSettings:
    """Return settings; `general` is the budget of that role, `changes` override the rest."""
    values = {"roles": ROLES, "budget": {"general": general or {"fraction": 0.25}, "target": {"tokens": 1_000}}} | changes
    return plugins.validate(SelectionSettings, values, where="selection")


def subset(store: Store, given_inputs: dict, *, general: dict | None = None, **changes: object) -> Manifest:
    """Publish a selection."""
    wanted = selection_settings(general=general, **changes)
    request = Build(
        asset="selected_subset", partition="r", step=select_subset, settings=wanted, inputs=given_inputs, audits=SELECTION_AUDITS
    )
    return store.build(request).manifest


def sources_of(given_inputs: dict, score: str | None = None) -> Sources:
    by_partition = [{manifest.partition: manifest for manifest in given_inputs[name]} for name in ("embeddings", "shards", "scores")]
    return Sources(given_inputs["decisions"], *by_partition, score)


def chosen_of(given_inputs: dict, *, role: str = "general", general: dict | None = None, **changes: object) -> Chosen:
    """Choose for one role, as the step does, without writing or drawing."""
    wanted = selection_settings(general=general, **changes)
    return choose(wanted, role, sources_of(given_inputs, wanted.score))  # type: ignore[arg-type]


def selection_table(manifest: Manifest) -> pa.Table:
    return pa.concat_tables(pq.read_table(manifest.file(f"{role}.parquet")) for role in ("general", "target"))


def general_rows(manifest: Manifest) -> list[dict]:
    return pq.read_table(manifest.file("general.parquet")).to_pylist()


def keys(rows: list[dict]) -> list[tuple[str, int]]:
    return [(row["id"], row["passage"]) for row in rows]


def vector_of(given_inputs: dict) -> dict[tuple[str, int], np.ndarray]:
    """Return the integer vector of each passage."""
    found = {}
    for manifest in given_inputs["embeddings"]:
        rows = pq.read_table(manifest.file("passages.parquet"), columns=["id", "passage"]).to_pylist()
        found |= dict(zip(keys(rows), np.load(manifest.file("embeddings.npy")), strict=True))
    return found


# Who may be selected, and in what order


def test_selection_is_a_prefix_within_the_budget(store: Store) -> None:
    manifest = subset(store, inputs(store, WIKI, BOOK, CODE), shares="free")
    table = selection_table(manifest)
    assert table.schema.equals(SELECTION_SCHEMA)
    rows = table.to_pylist()
    for role, share_limit in (("general", 0.25), ("target", None)):
        mine = [row for row in rows if row["role"] == role]
        assert [row["rank"] for row in mine] == list(range(len(mine)))
        chosen = [row for row in mine if row["selected"]]
        assert mine[: len(chosen)] == chosen
        budget = int(share_limit * sum(row["tokens"] for row in mine)) if share_limit else 1_000
        spent = sum(row["tokens"] for row in chosen)
        assert spent <= budget < spent + mine[len(chosen)]["tokens"]
        assert manifest.counts[f"{role}_selected_tokens"] == spent
        picked = set(keys(chosen))
        assert all((row["representative_id"], row["representative_passage"]) in picked for row in mine if row["similarity"] > 0)
        assert all(row["gain"] / row["tokens"] >= later["gain"] / later["tokens"] for row, later in itertools.pairwise(mine))
    assert all(check.passed for check in manifest.checks)


def test_candidates_are_the_kept_training_documents(store: Store) -> None:
    manifest = subset(store, inputs(store, WIKI, BOOK, CODE))
    table = selection_table(manifest)
    expected = {name for source in (WIKI, BOOK, CODE) for number, name in enumerate(document_names(source)) if is_train(number)}
    assert set(table["id"].to_pylist()) == expected
    assert table.num_rows == PASSAGES * len(expected)
    counts = manifest.counts
    assert counts["documents_in"] == counts["kept"] + counts["dropped"] == len(expected)
    assert counts["held_out_documents"] == 12 and counts["selected_outside_train"] == 0


def test_tokens_bytes_and_vectors_belong_to_their_passage(store: Store) -> None:
    given_inputs = inputs(store, WIKI, BOOK, CODE)
    rows = selection_table(subset(store, given_inputs)).to_pylist()
    lengths, sizes, vector = {}, {}, vector_of(given_inputs)
    for shard, embeddings in zip(given_inputs["shards"], given_inputs["embeddings"], strict=True):
        lengths |= {(row["id"], row["passage"]): row["length"] for row in pq.read_table(shard.file("passages.parquet")).to_pylist()}
        sizes |= {(row["id"], row["passage"]): row["bytes"] for row in pq.read_table(embeddings.file("passages.parquet")).to_pylist()}
    for row in rows:
        key, representative = (row["id"], row["passage"]), (row["representative_id"], row["representative_passage"])
        assert (row["tokens"], row["bytes"]) == (lengths[key], sizes[key])
        if row["similarity"] > 0:
            both = vector[key].astype(float), vector[representative].astype(float)
            assert row["similarity"] == pytest.approx(both[0] @ both[1] / np.linalg.norm(both[0]) / np.linalg.norm(both[1]), abs=1e-5)


def test_zero_gain_is_never_filled_in(store: Store) -> None:
    chosen = chosen_of(inputs(store, WIKI, BOOK, CODE), general={"fraction": 1.0})
    rows, counts = ranked(chosen).to_pylist(), count(chosen)
    assert all(row["selected"] == (row["gain"] > 0) for row in rows)
    assert counts["zero_gain_passages"] == sum(row["gain"] == 0 for row in rows) > 0
    assert counts["unfilled_tokens"] == counts["budget_tokens"] - counts["selected_tokens"] > 0


def test_bytes_do_not_depend_on_the_order_of_the_inputs(store: Store) -> None:
    given_inputs = inputs(store, WIKI, BOOK, CODE)
    backward = given_inputs | {name: given_inputs[name][::-1] for name in ("embeddings", "shards", "scores")}
    first, second = subset(store, given_inputs), subset(store, backward)
    assert first.fingerprint != second.fingerprint
    assert first.content_sha256 == second.content_sha256
    assert first.outcome == second.outcome


def test_recorded_hash_is_that_of_the_ordered_passages(store: Store) -> None:
    manifest = subset(store, inputs(store, WIKI, BOOK, CODE))
    ordered = [row for row in general_rows(manifest) if row["gain"] > 0]
    lines = "".join(f"{row['id']}\t{row['passage']}\n" for row in ordered)
    assert manifest.outcome.details["general_order_sha256"] == hashlib.sha256(lines.encode()).hexdigest()


# Budgets


BUDGETS = ({"fraction": 0.3}, {"tokens": 2_000}, {"documents": 20}, {"bytes": 9_000})


@pytest.mark.parametrize("budget", BUDGETS, ids=lambda budget: next(iter(budget)))
def test_a_budget_is_filled_in_its_unit(store: Store, budget: dict) -> None:
    chosen = chosen_of(inputs(store, WIKI, BOOK, CODE), general=budget)
    rows, counts = ranked(chosen).to_pylist(), count(chosen)
    ((unit, limit),) = budget.items()
    unit, limit = ("tokens", int(limit * sum(row["tokens"] for row in rows))) if unit == "fraction" else (unit, limit)

    def spent(num_rows: int) -> int:
        taken = rows[:num_rows]
        return len({row["id"] for row in taken}) if unit == "documents" else sum(row[unit] for row in taken)

    num_selected = sum(row["selected"] for row in rows)
    assert all(row["selected"] for row in rows[:num_selected])
    assert spent(num_selected) <= limit < spent(num_selected + 1)
    assert counts[f"budget_{unit}"] == limit
    for name in ("tokens", "bytes"):
        assert counts[f"selected_{name}"] == sum(row[name] for row in rows[:num_selected])
        assert counts[name] == sum(row[name] for row in rows)
    assert counts["selected_documents"] == len({row["id"] for row in rows[:num_selected]})
    assert counts["documents"] == len({row["id"] for row in rows})


def test_budgets_of_documents_and_bytes_pass_the_checks(store: Store) -> None:
    budget = {"general": {"documents": 20}, "target": {"bytes": 9_000}}
    manifest = subset(store, inputs(store, WIKI, BOOK, CODE), budget=budget)
    assert all(check.passed for check in manifest.checks)
    assert manifest.counts["general_selected_documents"] == manifest.counts["general_budget_documents"] == 20
    found = next(check for check in manifest.checks if check.name == "within_budget").metadata
    assert found["target_bytes"] == manifest.counts["target_selected_bytes"] <= found["target_budget"] == 9_000


def test_every_budget_is_a_prefix_of_one_order(store: Store) -> None:
    given_inputs = inputs(store, WIKI, BOOK, CODE)
    found = [ranked(chosen_of(given_inputs, general=budget)).to_pylist() for budget in (*BUDGETS, {"fraction": 1.0})]
    assert len({tuple(keys(rows)) for rows in found}) == 1
    assert len({sum(row["selected"] for row in rows) for rows in found}) == len(found)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.randoms(use_true_random=False))
def test_documents_are_counted_once_along_the_order(documents: list[int], random: object) -> None:
    picks = list(range(len(documents)))
    random.shuffle(picks)  # type: ignore[attr-defined]
    table = pa.table({"id": [f"d{number}" for number in documents], "tokens": [1] * len(documents)})
    candidates = Candidates(table, np.zeros((len(documents), 1), np.int16), None, (("wiki", JANUARY, len(documents)),))
    counted = np.cumsum(candidates.amounts(np.array(picks), "documents"))
    assert counted.tolist() == [len({documents[pick] for pick in picks[: end + 1]}) for end in range(len(picks))]


def test_bytes_of_a_passage_are_those_of_its_text(store: Store) -> None:
    texts = ["é" * 90 + "\n\n漢字" * 50, "plain words only " * 20, "𝄞 and ünïcödé " * 30]
    cleaned = corpus(store, "wiki", texts)
    made = embedded(store, cleaned, fitted(store, cleaned, max_characters=100), max_characters=100)
    text_of = dict(zip(*pq.read_table(cleaned.file("documents.parquet"), columns=["id", "text"]).to_pydict().values(), strict=True))
    rows = pq.read_table(made.file("passages.parquet")).to_pylist()
    assert len(rows) > len(texts)
    assert all(row["bytes"] == len(text_of[row["id"]][row["start"] : row["end"]].encode("utf-8")) for row in rows)
    assert sum(row["bytes"] for row in rows) == sum(len(text.encode("utf-8")) for text in texts)


# Scores


def test_scores_reach_the_set_function_by_document(store: Store) -> None:
    given_inputs = inputs(store, WIKI, BOOK, CODE)
    chosen = chosen_of(given_inputs, function="by_score", settings={"within_groups": False}, score=RULE, shares="free")
    scores = document_scores(WIKI) | document_scores(BOOK)
    found = [scores.get(name, np.nan) for name in ranked(chosen)["id"].to_pylist()]
    scored = [score for score in found if not np.isnan(score)]
    assert scored == sorted(scored)
    assert all(np.isnan(score) for score in found[len(scored) :])
    assert count(chosen)["passages_without_score"] == len(found) - len(scored) > 0
    means = {"score_mean": np.mean(scored), "score_mean_selected": np.mean(scored[: chosen.num_selected])}
    assert measure(chosen, 0) == pytest.approx(means)


def test_a_score_that_is_not_there_is_an_error_that_names_what_is(store: Store) -> None:
    given_inputs = inputs(store, WIKI, BOOK, CODE)
    with pytest.raises(
        UnknownName, match=r"unknown rule of quality_scores\[book.*'perplexity.order_gain'.*known: perplexity.log_perplexity$"
    ):
        subset(store, given_inputs, function="by_score", score="perplexity.order_gain")
    with pytest.raises(MissingArtifact, match=r"materialize quality_scores\[book\|2026-01-01\]"):
        subset(store, given_inputs | {"scores": given_inputs["scores"][:1]}, function="by_score", score=RULE)


# Target sets


def test_queries_are_the_training_passages_with_the_lowest_hash(store: Store) -> None:
    given_inputs = inputs(store, WIKI, BOOK, CODE)
    train = [(name, passage) for number, name in enumerate(document_names(CODE)) if is_train(number) for passage in range(PASSAGES)]
    wanted = set(sorted(train, key=lambda key: stable_fraction("query", key[0], str(key[1])))[:20])
    vector = vector_of(given_inputs)
    queries = sources_of(given_inputs).queries("general", ["code"], 20)
    assert queries.tolist() == [vector[key].tolist() for key in train if key in wanted]
    assert len(sources_of(given_inputs).queries("general", ["code", "book"], 10_000)) == 2 * len(train)


def test_a_selection_towards_a_domain_is_nearer_to_it(store: Store) -> None:
    given_inputs = inputs(store, WIKI, BOOK, CODE)
    near, plain = (subset(store, given_inputs, **changes) for changes in ({"towards": {"general": ["code"]}}, {}))
    metrics = near.outcome.metrics
    assert metrics["general_query_coverage"] > metrics["general_query_coverage_random"]
    assert near.counts["general_queries"] == PASSAGES * sum(map(is_train, range(CODE.documents)))
    assert "target_query_coverage" not in metrics and "general_query_coverage" not in plain.outcome.metrics
    vector, queries = vector_of(given_inputs), sources_of(given_inputs).queries("general", ["code"], 4_000)
    covered = []
    for manifest in (near, plain):
        picks = np.stack([vector[key] for key in keys([row for row in general_rows(manifest) if row["selected"]])])
        covered.append(float(nearest_pick(queries, picks)[1].mean()) / UNIT)
    assert covered[0] == pytest.approx(metrics["general_query_coverage"])
    assert covered[0] > covered[1]
    assert near.outcome.metrics["general_coverage"] < plain.outcome.metrics["general_coverage"]


# Snapshots


def monthly(*snapshots: str) -> list[SourceSettings]:
    return [SourceSettings(domain=domain, seed=7, snapshot=snapshot) for snapshot in snapshots for domain in ("wiki", "code")]


BY_SNAPSHOT = {
    "roles": {"wiki": "general", "code": "target"},
    "budget": {"general": {"fraction": 0.2}, "target": {"fraction": 0.5}},
    "arrival": "by_snapshot",
}


def test_a_new_snapshot_extends_the_selection(store: Store) -> None:
    earlier, later = inputs(store, *monthly(JANUARY, FEBRUARY)), inputs(store, *monthly(JANUARY, FEBRUARY, MARCH))
    after = subset(store, later, **BY_SNAPSHOT)
    for role in ("general", "target"):
        before = [row for row in ranked(chosen_of(earlier, role=role, **BY_SNAPSHOT)).to_pylist() if row["selected"]]
        rows = pq.read_table(after.file(f"{role}.parquet")).to_pylist()
        chosen = [row for row in rows if row["selected"]]
        assert keys(chosen[: len(before)]) == keys(before)
        assert {row["snapshot"] for row in chosen[len(before) :]} == {MARCH}
        assert [row["snapshot"] for row in chosen] == sorted(row["snapshot"] for row in chosen)
        assert [row["rank"] for row in rows] == list(range(len(rows)))
    assert all(check.passed for check in after.checks)
    for row in after.outcome.tables["by_snapshot"]:
        fraction = BY_SNAPSHOT["budget"][row["role"]]["fraction"]
        assert 0 < row["selected_tokens"] <= int(fraction * row["tokens"])


def test_a_snapshot_given_the_earlier_ones_covers_more_than_each_alone(store: Store) -> None:
    given_inputs = inputs(store, *monthly(JANUARY, FEBRUARY, MARCH))
    conditional, joint = (chosen_of(given_inputs, **BY_SNAPSHOT | {"arrival": arrival}) for arrival in ("by_snapshot", "joint"))
    candidates, alone = conditional.candidates, []
    for _, rows in candidates.snapshots():
        tokens = candidates.tokens[rows]
        picks = FacilityLocation().order(Points(candidates.embeddings[rows])).picks
        alone.append(rows.start + picks[np.cumsum(tokens[picks]) <= int(0.2 * tokens.sum())])
    coverage = [coverage_of(candidates, picks) for picks in (np.concatenate(alone), conditional.picks, joint.picks)]
    assert coverage == sorted(coverage)
    assert coverage[0] < coverage[1]


def coverage_of(candidates: Candidates, picks: np.ndarray) -> float:
    return float(nearest_pick(candidates.embeddings, candidates.embeddings[picks])[1].mean()) / UNIT


def test_one_snapshot_is_selected_as_if_there_were_no_others(store: Store) -> None:
    given_inputs = inputs(store, *monthly(JANUARY))
    joint, by_snapshot = (chosen_of(given_inputs, **BY_SNAPSHOT | {"arrival": arrival}) for arrival in ("joint", "by_snapshot"))
    assert ranked(joint).equals(ranked(by_snapshot))


# What is reported


def test_certificate_orders_random_selection_and_bound(store: Store) -> None:
    given_inputs = inputs(store, WIKI, BOOK, CODE)
    manifest = subset(store, given_inputs)
    metrics = manifest.outcome.metrics
    assert metrics["general_coverage_random"] < metrics["general_coverage"] <= metrics["general_upper_bound"] <= 1.001
    baseline = chosen_of(given_inputs, function="random_order", settings={"seed": 3}).certificate(0)
    assert baseline.coverage < metrics["general_coverage"]
    rows = {row.pop("role"): row for row in manifest.outcome.tables["certificate"]}
    assert {f"{role}_{name}": value for role, row in rows.items() for name, value in row.items()} == pytest.approx(metrics, abs=1e-6)


def test_table_by_domain_adds_up(store: Store) -> None:
    manifest = subset(store, inputs(store, WIKI, BOOK, CODE))
    table = tokens_by_domain(manifest.directory, ROLES | {"legal": "general"})
    assert manifest.outcome.tables["by_domain"] == [row for row in table if row["domain"] != "legal"]
    assert [row["domain"] for row in table] == ["book", "legal", "wiki", "code"]
    assert table[1]["passages"] == table[1]["share_after"] == 0
    assert sum(row["share_after"] for row in table if row["role"] == "general") == pytest.approx(1, abs=1e-5)
    assert sum(row["selected_tokens"] for row in table) == sum(manifest.counts[f"{role}_selected_tokens"] for role in ("general", "target"))


def test_pictures_are_small_files(store: Store) -> None:
    manifest = subset(store, inputs(store, WIKI, BOOK, CODE))
    assert "coverage.png" in manifest.outcome.plots
    for name in manifest.outcome.plots:
        content = manifest.file(name).read_bytes()
        assert content.startswith(b"\x89PNG") and len(content) < 200_000


def test_most_absorbed_are_the_passages_that_represent_most_others(store: Store) -> None:
    manifest = subset(store, inputs(store, WIKI, BOOK, CODE))
    represented: dict[tuple[str, int], list[dict]] = {}
    for row in general_rows(manifest):
        if not row["selected"] and row["representative_id"]:
            represented.setdefault((row["representative_id"], row["representative_passage"]), []).append(row)
    found = [row for row in manifest.outcome.tables["most_absorbed"] if row["role"] == "general"]
    assert [row["represented"] for row in found] == sorted(map(len, represented.values()), reverse=True)[: len(found)]
    for row in found:
        others = represented[row["id"], row["passage"]]
        assert row["represented"] == len(others)
        nearest = max(other["similarity"] for other in others)
        (shown,) = [o for o in others if (o["id"], o["passage"]) == (row["absorbed_id"], row["absorbed_passage"])]
        assert shown["domain"] == row["absorbed_domain"]
        assert shown["similarity"] == pytest.approx(nearest, abs=1e-3) == pytest.approx(row["absorbed_similarity"], abs=1e-3)


def test_near_duplicates_are_the_passages_nearest_to_what_stands_for_them(store: Store) -> None:
    manifest = subset(store, inputs(store, WIKI, BOOK, CODE))
    nearest: dict[tuple[str, int], float] = {}
    for row in general_rows(manifest):
        if not row["selected"] and row["representative_id"]:
            key = (row["representative_id"], row["representative_passage"])
            nearest[key] = max(nearest.get(key, 0.0), row["similarity"])
    found = [row for row in manifest.outcome.tables["near_duplicates"] if row["role"] == "general"]
    assert [row["absorbed_similarity"] for row in found] == pytest.approx(sorted(nearest.values(), reverse=True)[: len(found)], abs=1e-3)
    assert {(row["id"], row["passage"]) for row in found} <= nearest.keys()
    assert found[0]["absorbed_similarity"] == 1.0  # of the repeated rows


def test_the_report_shows_certificate_pictures_and_near_duplicates(store: Store) -> None:
    manifest = subset(store, inputs(store, WIKI, BOOK, CODE))
    names = ("quality", "toxicity", "deduplicated", "selection", "general", "ratio", "mixture", "checkpoint", "evaluation")
    html = report_sections.selection(Artifacts(raw=(), cleaned=(), probes=(), **dict.fromkeys(names, manifest)))
    metrics, counts = manifest.outcome.metrics, manifest.counts
    for role in ("general", "target"):
        share, same, gap = (
            percent(metrics[f"{role}_{name}"]) for name in ("selected_share", "random_share_for_same_coverage", "gap_share_at_least")
        )
        said = f"With {share} of the {role} tokens the selection covers as much as {same} drawn at random would: {gap} of the way from"
        assert said in html
        assert percent(metrics[f"{role}_certified_ratio"]) in html and percent(metrics[f"{role}_neighbor_recall"]) in html
    zero_gain = "".join(f'<td class="n">{counts[f"{role}_zero_gain_passages"]}</td>' for role in ("general", "target"))
    assert f"Passages that add nothing, and are never selected</td>{zero_gain}" in html
    assert html.count("<img") == len(manifest.outcome.plots) > 0
    for row in manifest.outcome.tables["most_absorbed"] + manifest.outcome.tables["near_duplicates"]:
        assert code(row["absorbed_id"]) in html


# What is checked


def audited(manifest: Manifest, directory: Path) -> dict[str, Check]:
    return {check.name: check for check in (audit(manifest.at(directory)) for audit in SELECTION_AUDITS)}


def damaged(manifest: Manifest, directory: Path, **columns: pa.Array) -> Path:
    """Return a directory with the selection's files, in which `columns` of the general ones are replaced."""
    directory.mkdir()
    for role in ("general", "target"):
        table = pq.read_table(manifest.file(f"{role}.parquet"))
        for name, values in columns.items() if role == "general" else ():
            table = table.set_column(table.column_names.index(name), name, values)
        pq.write_table(table, directory / f"{role}.parquet")
    return directory


def test_audits_find_what_is_wrong_with_the_files(store: Store, tmp_path: Path) -> None:
    manifest = subset(store, inputs(store, WIKI, BOOK, CODE))
    assert all(check.passed for check in audited(manifest, damaged(manifest, tmp_path / "same")).values())
    rows = general_rows(manifest)
    swapped = [row["rank"] for row in rows]
    swapped[:2] = swapped[1::-1]
    cases = {
        "within_budget": {"selected": pa.array([True] * len(rows))},
        "selected_is_prefix": {"selected": pa.array([row["selected"] for row in rows][::-1])},
        "passages_unique": {"passage": pa.array([0] * len(rows), pa.int32())},
        "order_is_recorded": {"rank": pa.array(swapped)},
    }
    for name, columns in cases.items():
        assert not audited(manifest, damaged(manifest, tmp_path / name, **columns))[name].passed


def test_audits_find_what_is_wrong_with_the_numbers(store: Store, tmp_path: Path) -> None:
    manifest = subset(store, inputs(store, WIKI, BOOK, CODE))
    outcome, directory = manifest.outcome, manifest.directory

    def changed(**numbers: float) -> Manifest:
        counts = {name: int(numbers.get(name, value)) for name, value in outcome.counts.items()}
        metrics = {name: numbers.get(name, value) for name, value in outcome.metrics.items()}
        return manifest.model_copy(update={"outcome": outcome.model_copy(update={"counts": counts, "metrics": metrics})})

    cases = {
        "candidates_conserved": {"general_passages": 3},
        "nothing_held_out": {"selected_outside_train": 1},
        "covers_more_than_random": {"general_coverage_random": 1.0},
        "certificate_is_tight": {"target_certified_ratio": 0.9},
        "within_budget": {"general_budget_tokens": 10},
    }
    for name, numbers in cases.items():
        failed = [check.name for check in audited(changed(**numbers), directory).values() if not check.passed]
        assert failed == [name]


def test_a_loose_certificate_warns_and_the_selection_is_published(store: Store) -> None:
    manifest = subset(store, inputs(store, WIKI, BOOK, CODE), general={"tokens": 300}, settings={"neighbors": 2})
    assert manifest.outcome.metrics["general_certified_ratio"] < 0.95
    check = next(check for check in manifest.checks if check.name == "certificate_is_tight")
    assert not check.passed and not check.blocking


def test_other_aims_are_not_held_to_plain_coverage(store: Store) -> None:
    given_inputs = inputs(store, WIKI, BOOK, CODE)
    by_score = subset(store, given_inputs, function="by_score", score=RULE, general={"tokens": 800})
    towards = subset(store, given_inputs, towards={"general": ["code"]})
    for manifest in (by_score, towards):
        checks = {check.name: check for check in manifest.checks}
        assert all(checks[name].description.startswith("measured only") for name in ("covers_more_than_random", "certificate_is_tight"))
    assert by_score.outcome.metrics["general_certified_ratio"] < 0.95


# What is refused


def test_errors_name_the_value_and_the_remedy(store: Store) -> None:
    given_inputs = inputs(store, WIKI, CODE)
    with pytest.raises(EmptyInput, match="role 'target': no kept training passage in legal"):
        subset(store, given_inputs, roles={"wiki": "general", "legal": "target"})
    with pytest.raises(EmptyInput, match="a budget of 1 tokens holds not one ranked passage; raise budget.general"):
        subset(store, given_inputs, general={"tokens": 1})
    with pytest.raises(EmptyInput, match="a budget of 9 bytes holds not one ranked passage"):
        subset(store, given_inputs, general={"bytes": 9})
    with pytest.raises(EmptyInput, match="selection.towards.general: no kept training passage in legal"):
        subset(store, given_inputs, towards={"general": ["legal"]})
    with pytest.raises(MissingArtifact, match=r"materialize tokenized_shards\[wiki\|2026-01-01\]"):
        subset(store, given_inputs | {"shards": given_inputs["shards"][1:]})
    cut_differently = inputs(store, WIKI, SourceSettings(domain="code", seed=2, passages_in_shards=4))
    with pytest.raises(GristmillError, match="same max_characters"):
        subset(store, cut_differently)


def test_vectors_of_different_embedders_are_not_compared(store: Store) -> None:
    given_inputs = inputs(store, WIKI, BOOK, CODE)
    mixed = []
    for number, source in enumerate((WIKI, BOOK, CODE)):
        embedder = store.build(Build(asset="embedder", step=write_shard, settings=SourceSettings(domain="e", seed=number // 2))).manifest
        request = Build(
            asset="document_embeddings",
            partition=f"{source.domain}|{JANUARY}",
            step=write_embeddings,
            settings=source,
            inputs={"embedder": embedder},
        )
        mixed.append(store.build(request).manifest)
    a_space_for_each_role = given_inputs | {"embeddings": tuple(mixed)}
    assert len(chosen_of(a_space_for_each_role).candidates) == len(chosen_of(given_inputs).candidates)
    with pytest.raises(GristmillError, match=r"book\|2026-01-01 and code\|2026-01-01 come from different embedders"):
        chosen_of(a_space_for_each_role, roles={"wiki": "target", "book": "general", "code": "general"})


def test_settings_are_checked_where_they_are_built() -> None:
    for values, message in (
        ({"budget": {"general": {"fraction": 0.2}}}, "need exactly one budget each"),
        ({"budget": {"general": {}, "target": {"tokens": 5}}}, "one of fraction, tokens, documents, bytes; given: none"),
        ({"budget": {"general": {"fraction": 0.2, "bytes": 3}, "target": {"tokens": 5}}}, "given: fraction, bytes"),
        ({"function": "facility_locatoin"}, "did you mean 'facility_location'"),
        ({"settings": {"neighbours": 3}}, "did you mean 'neighbors'"),
        ({"score": "perplexty.log_perplexity"}, "unknown filter 'perplexty'; did you mean 'perplexity'"),
        ({"score": "perplexity.log_perplexty"}, "did you mean 'perplexity.log_perplexity'"),
        ({"score": "perplexity.bucket"}, "unknown rule 'perplexity.bucket'"),
        ({"towards": {"general": []}}, "at least 1 item"),
        ({"arrival": "by_snapshot"}, "needs budgets as a fraction, not target: tokens; give fractions, or set arrival to joint"),
    ):
        base = {"roles": ROLES, "budget": {"general": {"fraction": 0.2}, "target": {"tokens": 5}}}
        with pytest.raises(GristmillError, match=message):
            plugins.validate(SelectionSettings, base | values, where="selection")
    one_role = {"roles": {"wiki": "general"}, "budget": {"general": {"fraction": 0.2}}, "towards": {"target": ["wiki"]}}
    with pytest.raises(GristmillError, match="towards names role 'target', to which no domain belongs; roles: general"):
        plugins.validate(SelectionSettings, one_role, where="selection")


def test_domains_keep_their_shares_in_every_prefix() -> None:
    random = np.random.default_rng(0)
    groups, costs = random.integers(3, size=600), random.integers(1, 50, size=600)
    order = Order(picks=random.permutation(600), gains=np.arange(600.0))
    merged = in_step(order, groups, costs)
    assert sorted(merged.picks.tolist()) == list(range(600))
    for group in range(3):
        assert merged.picks[groups[merged.picks] == group].tolist() == order.picks[groups[order.picks] == group].tolist()
    for size in (100, 300, 500):
        taken = np.bincount(groups[merged.picks[:size]], weights=costs[merged.picks[:size]]) / np.bincount(groups, weights=costs)
        assert taken.max() - taken.min() < 0.02
    assert dict(zip(merged.picks.tolist(), merged.gains.tolist(), strict=True)) == dict(
        zip(order.picks.tolist(), order.gains.tolist(), strict=True)
    )


def test_shares_of_the_domains_after_selection(store: Store) -> None:
    given_inputs = inputs(store, WIKI, BOOK, CODE)
    kept = {row["domain"]: row for row in subset(store, given_inputs, general={"fraction": 0.5}).outcome.tables["by_domain"]}
    for domain in ("wiki", "book"):
        assert kept[domain]["share_after"] == pytest.approx(kept[domain]["share_before"], abs=0.05)
