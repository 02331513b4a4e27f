"""What is known of held-out documents, and the groups and the shared text of an evaluation, against hand counts."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_world import ROLES, World, publish, select_all

from pipelines.evaluation import EVALUATION_AUDITS, EvaluationSettings, evaluate
from pipelines.held_out_facts import add_facts, newest_snapshot, years_of_age
from pipelines.manifests import Manifest, Member
from pipelines.shards import HeldOutDocuments, TokenShard, held_out_documents
from pipelines.store import Build, Store

SPAN = 32


@pytest.mark.parametrize(
    ("date", "snapshot", "months"),
    [
        ("2026-01-17", "2026-02-01", 2),  # the newest snapshot trained on is 2026-03-01
        ("2025-12", "2026-02-01", 3),
        ("2024", "2026-02-01", 20),  # counted from July
        ("2026-05-01T10:00:00Z", "2026-02-01", -2),
        (None, "2026-02-01", 1),
        ("unknown", "2026-02-01", None),
        (None, None, None),
    ],
)
def test_age_counts_from_the_date_else_from_the_snapshot(store: Store, date: str | None, snapshot: str | None, months: int | None) -> None:
    row = {"id": "a", "domain": "wiki", "kept": True, "split": "held_out", "snapshot": snapshot, "lang": None}
    decisions = publish(store, "deduplicated_corpus", {"decisions.parquet": [row, {**row, "kept": False, "snapshot": "2020-01-01"}]})
    cleaned = publish(
        store, "cleaned_corpus", {"documents.parquet": [{"id": "a", "lang": "cs", "date": date}, {"id": "b", "lang": "", "date": ""}]}
    )
    chosen = {"id": "b", "passage": 0, "domain": "wiki", "snapshot": "2026-03-01", "selected": True}
    newer = {**chosen, "snapshot": "2026-09-01", "selected": False}
    subset = publish(store, "selected_subset", {"general.parquet": [chosen, newer]})
    selection = (Member(manifest=subset, name="general.parquet"),)
    assert newest_snapshot(selection) == "2026-03-01"
    held = {"wiki": HeldOutDocuments(["a"], [np.arange(50)], np.asarray([200]))}
    table = pa.table({"id": ["a"]})
    (found,) = add_facts(table, held, decisions=decisions, cleaned=(cleaned,), selection=selection).to_pylist()
    assert found == {"id": "a", "snapshot": snapshot, "language": "cs", "date": date, "age_months": months, "shared_tokens": 0}
    (found,) = add_facts(table, held, decisions=decisions, cleaned=(cleaned,)).to_pylist()
    assert found["age_months"] is found["shared_tokens"] is None  # nothing is known of what was trained on


def test_the_language_that_a_filter_found_goes_before_the_sources(store: Store) -> None:
    rows = [
        {"id": name, "domain": "wiki", "kept": True, "split": "held_out", "snapshot": "2026-01-01", "lang": lang}
        for name, lang in (("a", "de"), ("b", None), ("c", None))
    ]
    decisions = publish(store, "deduplicated_corpus", {"decisions.parquet": rows})
    cleaned = publish(store, "cleaned_corpus", {"documents.parquet": [{"id": "a", "lang": "en"}, {"id": "b", "lang": "en"}]})
    table = pa.table({"id": ["c", "b", "a"]})
    assert add_facts(table, {}, decisions=decisions, cleaned=(cleaned,))["language"].to_pylist() == [None, "en", "de"]


@pytest.mark.parametrize(
    ("months", "name"),
    [
        (None, None),
        (-1, "newer"),
        (0, "0 years"),
        (11, "0 years"),
        (12, "1 year"),
        (24, "2-4 years"),
        (59, "2-4 years"),
        (60, "5-9 years"),
        (239, "10-19 years"),
        (240, "20 years or more"),
    ],
)
def test_ages_are_grouped_by_whole_years(months: int | None, name: str | None) -> None:
    assert years_of_age(months) == name


# The step


@pytest.fixture(scope="module")
def evaluation(world: World, base: Manifest) -> Manifest:
    """Of documents in two snapshots and two languages, where two held-out legal documents were trained on."""
    rows = pq.read_table(world.decisions.file("decisions.parquet")).to_pylist()
    facts = [
        {"snapshot": "2025-11-01" if n % 8 == 3 else "2026-01-01", "lang": "en" if row["domain"] == "wiki" else None}
        for n, row in enumerate(rows)
    ]
    decided = [{**row, **fact} for row, fact in zip(rows, facts, strict=True)]
    decisions = publish(world.store, "deduplicated_corpus", {"decisions.parquet": decided})
    leaked = sorted(row["id"] for row in rows if row["split"] == "held_out" and row["domain"] == "legal")[:2]
    train = {row["id"] for row in rows if row["split"] == "train"}
    selection = tuple(with_snapshot(world, member) for member in select_all(world.store, world.shards, train | set(leaked)))
    inputs = {"base": base, "checkpoint": base, "decisions": decisions, "shards": world.shards, "tokenizer": world.tokenizer}
    inputs |= {"selection": selection, "cleaned": tuple(world.corpora.values())}
    settings = EvaluationSettings(roles=ROLES, threads=1, draws=300)
    return world.store.build(Build(asset="evaluation", step=evaluate, settings=settings, inputs=inputs, audits=EVALUATION_AUDITS)).manifest


def with_snapshot(world: World, member: Member) -> Member:
    rows = [{**row, "snapshot": "2026-01-01"} for row in pq.read_table(member.path).to_pylist()]
    return Member(manifest=publish(world.store, "selected_subset", {member.name: rows}), name=member.name)


def record(evaluation: Manifest) -> dict[str, list[dict]]:
    return json.loads(evaluation.file("evaluation.json").read_text())


def test_groups_hold_the_documents_of_their_role(evaluation: Manifest) -> None:
    table = pq.read_table(evaluation.file("documents.parquet")).to_pylist()
    for fact, name in (("snapshot", "snapshots"), ("language", "languages")):
        rows = record(evaluation)[name]
        assert {(row["role"], row[fact]) for row in rows} == {(ROLES[d["domain"]], d[fact]) for d in table if d[fact]}
        for row in rows:
            mine = [d for d in table if ROLES[d["domain"]] == row["role"] and d[fact] == row[fact]]
            assert (row["documents"], row["tokens"]) == (len(mine), sum(d["tokens"] for d in mine))
            assert row["loss_before"] == pytest.approx(sum(d["nll_before"] for d in mine) / row["tokens"])
            assert row["loss_change"] == row["loss_change_low"] == row["loss_change_high"] == 0.0
    assert {d["language"] for d in table if d["domain"] == "wiki"} == {"en"} and {d["age_months"] for d in table} == {0, 2}
    assert {row["age"] for row in record(evaluation)["ages"]} == {"0 years"}


def test_documents_that_were_trained_on_are_found_and_left_out(world: World, evaluation: Manifest) -> None:
    """Against a search for each span of 32 tokens by hand; the text of a passage is not read beyond its ends."""
    table = {row["id"]: row for row in pq.read_table(evaluation.file("documents.parquet")).to_pylist()}
    trained = set()
    for member in evaluation_selection(world, evaluation):
        for row in member:
            trained |= {tuple(row[place : place + SPAN]) for place in range(len(row) - SPAN + 1)}
    for documents in held_out_documents(world.decisions, world.shards).values():
        for name, tokens in zip(documents.ids, documents.tokens, strict=True):
            covered = set()
            for place in range(len(tokens) - SPAN + 1):
                if tuple(tokens[place : place + SPAN].tolist()) in trained:
                    covered |= set(range(place, place + SPAN))
            assert table[name]["shared_tokens"] == len(covered)
    rows = {row["domain"]: row for row in record(evaluation)["contamination"]}
    assert rows["legal"]["contaminated"] >= 2 and rows["legal"]["share_tokens"] > 0.05
    for domain, row in rows.items():
        mine = [d for d in table.values() if d["domain"] == domain]
        assert row["contaminated"] == sum(d["shared_tokens"] > 0 for d in mine)
        assert row["share_tokens"] == pytest.approx(sum(d["shared_tokens"] for d in mine) / sum(d["tokens"] for d in mine))
    clean = {row["domain"]: row for row in record(evaluation)["clean"]}
    assert clean["legal"]["documents"] == rows["legal"]["documents"] - rows["legal"]["contaminated"]
    check = next(check for check in evaluation.checks if check.name == "held_out_not_in_training")
    assert not check.passed and not check.blocking and "legal" in check.description


def evaluation_selection(world: World, evaluation: Manifest) -> list[list[list[int]]]:
    """Return the tokens of each selected passage, by file."""
    places = {}
    for manifest in world.shards:
        shard = TokenShard(manifest)
        for row in shard.passages.to_pylist():
            places[row["id"], row["passage"]] = shard.tokens[row["offset"] : row["offset"] + row["length"]].tolist()
    found = []
    for reference in evaluation.inputs["selection"]:
        manifest = world.store.find("selected_subset", reference.fingerprint)
        assert manifest is not None
        rows = pq.read_table(manifest.file(str(reference.member))).to_pylist()
        found.append([places[row["id"], row["passage"]] for row in rows if row["selected"]])
    return found


def test_without_the_selection_nothing_is_said_of_shared_text(world: World, base: Manifest, evaluation: Manifest) -> None:
    settings = EvaluationSettings(roles=ROLES, threads=1, draws=100)
    inputs = {"base": base, "checkpoint": base, "decisions": world.decisions, "shards": world.shards, "tokenizer": world.tokenizer}
    request = Build(asset="evaluation", step=evaluate, settings=settings, inputs=inputs, audits=EVALUATION_AUDITS)
    bare = world.store.build(request).manifest
    assert record(bare)["contamination"] == record(bare)["clean"] == record(bare)["ages"] == []
    assert not next(check for check in bare.checks if check.name == "held_out_not_in_training").passed
    assert "contaminated" not in bare.counts and evaluation.counts["contaminated"] >= 2
