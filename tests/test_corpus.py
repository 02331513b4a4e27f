"""The raw corpus: nothing is lost, ids are stable, the address is the content, and what is exported reads back."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import corpus
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.corpus import (
    CORPUS_AUDITS,
    CorpusSettings,
    SeenIds,
    corpus_settings,
    documents_conserved,
    export_corpus,
    ids_unique,
    ingest,
    text_present,
)
from pipelines.documents import BYTES_PER_GROUP, DOCUMENT_SCHEMA, QUARANTINE_SCHEMA, TableWriter, document_id
from pipelines.errors import GristmillError
from pipelines.manifests import Manifest, Outcome
from pipelines.store import Build, Store

SNAPSHOT = "2026-02-01"
MONTH = "@" + SNAPSHOT[:7]
"""What every id ends with."""
SAMPLE = Path(__file__).parent.parent / "data" / "sample" / "corpus.parquet"
PARTITION = {"domain": "{domain}", "collected": "{snapshot}"}


def write_lines(path: Path, *lines: object) -> None:
    """Write JSON Lines; a string is written as it is."""
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines), encoding="utf-8")


def raw(
    root: Path, *, domain: str = "wiki", source: str = "jsonl", max_documents: int | None = None, **source_settings: object
) -> Manifest:
    """Materialize one raw corpus of the project in `root`."""
    values = source_settings or {"paths": ["*.jsonl"]}
    made = corpus_settings(domain, SNAPSHOT, source, values, root, max_documents=max_documents)
    request = Build(asset="raw_corpus", partition=f"{domain}|{SNAPSHOT}", step=ingest, settings=made, audits=CORPUS_AUDITS)
    return Store(root / "store").build(request).manifest


def documents(manifest: Manifest) -> list[dict[str, str | None]]:
    return pq.read_table(manifest.file("documents.parquet")).to_pylist()


def reasons(manifest: Manifest) -> list[tuple[str, str]]:
    return [(row["locator"], row["reason"]) for row in pq.read_table(manifest.file("quarantine.parquet")).to_pylist()]


def test_tables_have_their_schemas_and_every_line_is_accounted_for(tmp_path: Path):
    write_lines(
        tmp_path / "a.jsonl",
        {"id": "one", "text": "grüße", "title": "T", "lang": "de", "license": "CC0", "source": "pypi:x", "url": "u", "date": "2001"},
        {"text": "nul \x00 stays"},
        {"text": "lone \ud800 surrogate"},
        {"text": "fine", "title": "\udfff"},
        {"text": "   \n"},
        {"text": None},
        "{broken",
    )
    made = raw(tmp_path)
    assert pq.read_schema(made.file("documents.parquet")).equals(DOCUMENT_SCHEMA)
    assert pq.read_schema(made.file("quarantine.parquet")).equals(QUARANTINE_SCHEMA)
    assert documents(made) == [
        {
            "id": "wiki-one" + MONTH,
            "text": "grüße",
            "domain": "wiki",
            "source": "pypi:x",
            "license": "CC0",
            "date": "2001",
            "url": "u",
            "lang": "de",
            "title": "T",
            "metadata": None,
        },
        dict.fromkeys(DOCUMENT_SCHEMA.names)
        | {
            "id": document_id("wiki", "jsonl", "a.jsonl:2") + MONTH,
            "text": "nul \x00 stays",
            "domain": "wiki",
            "source": "jsonl:a.jsonl:2",
        },
    ]
    assert reasons(made) == [
        ("a.jsonl:3", "undecodable"),
        ("a.jsonl:4", "undecodable title"),
        ("a.jsonl:5", "empty text"),
        ("a.jsonl:6", "no text"),
        ("a.jsonl:7", "not JSON: Expecting property name enclosed in double quotes"),
    ]
    assert pq.read_table(made.file("quarantine.parquet"))["excerpt"].to_pylist()[0] == r"lone \ud800 surrogate"
    assert made.counts == {
        "documents_in": 7,
        "kept": 2,
        "dropped": 0,
        "quarantined": 5,
        "characters": 5 + 11,
        "bytes": 7 + 11,
        "ids_replaced": 0,
    }
    assert sum(row["documents"] for row in made.outcome.tables["quarantine"]) == 5
    assert [row["id"] for row in made.outcome.tables["sample"]] == [row["id"] for row in documents(made)]
    assert all(check.passed for check in made.checks) and len(made.checks) == 4


LINES = st.one_of(
    st.fixed_dictionaries({"text": st.text(max_size=8)}, optional={"id": st.sampled_from(["a", "b", "", "x" * 300, "a\n", None])}),
    st.sampled_from(["{", "[]", '"text"', '{"text": 3}', '{"text": "\\udc00"}']),
)


@settings(max_examples=40, deadline=None)
@given(st.lists(LINES, max_size=12))
def test_whatever_the_lines_documents_are_conserved_and_ids_unique(tmp_path_factory: pytest.TempPathFactory, lines: list[object]):
    root = tmp_path_factory.mktemp("project")
    write_lines(root / "a.jsonl", *lines)
    made = raw(root)
    assert made.counts["documents_in"] == len(lines) == made.counts["kept"] + made.counts["quarantined"]
    ids = [row["id"] for row in documents(made)]
    assert len(set(ids)) == len(ids)
    given_ids = [line.get("id") for line in lines if isinstance(line, dict) and line["text"].strip()]
    expected = len([i for i in given_ids if i]) - len({i for i in given_ids if i in ("a", "b")})
    assert made.counts["ids_replaced"] == expected


def test_ids_are_stable_when_the_file_grows_and_when_the_project_moves(tmp_path: Path):
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    write_lines(first / "a.jsonl", {"text": "x"}, {"text": "y", "id": "k"}, {"text": "z", "id": "k"})
    before = raw(first)
    shutil.copytree(first, second, ignore=shutil.ignore_patterns("store"))
    moved = raw(second)
    assert (moved.fingerprint, moved.content_sha256) == (before.fingerprint, before.content_sha256)
    write_lines(first / "a.jsonl", {"text": "x"}, {"text": "y", "id": "k"}, {"text": "z", "id": "k"}, {"text": "new"})
    after = raw(first)
    assert after.fingerprint != before.fingerprint
    assert [row["id"] for row in documents(after)][:3] == [row["id"] for row in documents(before)]
    assert [row["id"] for row in documents(before)][1:] == ["wiki-k" + MONTH, document_id("wiki", "k", "a.jsonl:3") + MONTH]


def test_the_root_is_not_part_of_the_identity_and_default_settings_are(tmp_path: Path):
    write_lines(tmp_path / "a.jsonl", {"text": "x"})
    made = corpus_settings("wiki", SNAPSHOT, "jsonl", {"paths": ["a.jsonl"]}, tmp_path)
    assert "root" not in made.model_dump(mode="json")
    spelled = corpus_settings("wiki", SNAPSHOT, "jsonl", {"paths": ["a.jsonl"], "where": {}, "columns": {}, "values": {}}, tmp_path)
    assert spelled == made
    assert list(made.files) == ["a.jsonl"]


def test_an_empty_partition_is_published_with_a_note(tmp_path: Path):
    write_lines(tmp_path / "a.jsonl", {"text": "x", "domain": "wiki", "collected": "2026-01-01"})
    made = raw(tmp_path, paths=["a.jsonl"], where=PARTITION)
    assert made.outcome.details == {"note": "no documents for wiki in 2026-02-01"}
    assert made.counts["documents_in"] == 0
    assert documents(made) == []


def test_max_documents_stops_the_source(tmp_path: Path):
    write_lines(tmp_path / "a.jsonl", *({"text": str(n)} for n in range(9)), "{")
    made = raw(tmp_path, paths=["a.jsonl"], max_documents=4)
    assert [row["text"] for row in documents(made)] == ["0", "1", "2", "3"]
    assert made.counts["documents_in"] == 4


def test_a_file_that_changes_after_it_was_hashed_is_told(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    write_lines(path, {"text": "x"})
    made = corpus_settings("wiki", SNAPSHOT, "jsonl", {"paths": ["*.jsonl"]}, tmp_path)
    write_lines(path, {"text": "x"}, {"text": "y"})
    (tmp_path / "out").mkdir()
    with pytest.raises(GristmillError, match=r"changed while it was read: a\.jsonl"):
        ingest(made, tmp_path / "out")


def test_a_file_touched_but_equal_is_the_same_corpus(tmp_path: Path):
    write_lines(tmp_path / "a.jsonl", {"text": "x"})
    before = raw(tmp_path)
    os.utime(tmp_path / "a.jsonl", (1, 1))
    assert raw(tmp_path).fingerprint == before.fingerprint


def test_wrong_settings_are_told_with_their_rule(tmp_path: Path):
    write_lines(tmp_path / "a.jsonl", {"text": "x"})
    with pytest.raises(GristmillError, match="did you mean 'jsonl'"):
        corpus_settings("wiki", SNAPSHOT, "json", {}, tmp_path)
    with pytest.raises(GristmillError, match="did you mean 'paths'"):
        corpus_settings("wiki", SNAPSHOT, "jsonl", {"path": ["a.jsonl"]}, tmp_path)
    for snapshot in ("2026-02", "2026-02-03", "February"):
        with pytest.raises(GristmillError, match="YYYY-MM-01"):
            corpus_settings("wiki", snapshot, "jsonl", {"paths": ["a.jsonl"]}, tmp_path)
    with pytest.raises(GristmillError, match="domain"):
        corpus_settings("wi|ki", SNAPSHOT, "jsonl", {"paths": ["a.jsonl"]}, tmp_path)


def test_audits_fail_on_tables_that_do_not_hold_what_was_counted(store: Store):
    good = corpus(store, "wiki", ["a", "b"])
    assert not documents_conserved(good).passed  # has no quarantine table
    assert ids_unique(good).passed and text_present(good).passed
    twice = corpus(store, "wiki", ["a", ""], ids=["k", "k"])
    assert not ids_unique(twice).passed
    assert not text_present(twice).passed
    lost = good.model_copy(update={"outcome": Outcome(counts={"documents_in": 3, "kept": 2, "dropped": 0, "quarantined": 0})})
    assert not documents_conserved(lost.at(good.directory)).passed


def test_long_documents_are_flushed_by_size(tmp_path: Path):
    text = "x" * (BYTES_PER_GROUP // 2)
    with TableWriter(tmp_path / "t.parquet", DOCUMENT_SCHEMA) as writer:
        for number in range(5):
            writer.write({"id": str(number), "text": text})
    metadata = pq.read_metadata(tmp_path / "t.parquet")
    assert [metadata.row_group(n).num_rows for n in range(metadata.num_row_groups)] == [2, 2, 1]


# export


@pytest.mark.parametrize("keep", [None, {"wiki-1", "book-0", "absent"}, set()])
def test_an_exported_corpus_reads_back(store: Store, tmp_path: Path, keep: set[str] | None):
    import datasets

    corpora = [
        corpus(store, domain, [f"{domain} text {n}" for n in range(1200)], ids=[f"{domain}-{n}" for n in range(1200)])
        for domain in ("wiki", "book")
    ]
    export_corpus(corpora, tmp_path / "exports" / "corpus", keep=keep)
    dataset = datasets.load_from_disk(str(tmp_path / "exports" / "corpus"))
    expected = [row for one in corpora for row in documents(one) if keep is None or row["id"] in keep]
    assert dataset.to_list() == expected
    assert dataset.column_names == DOCUMENT_SCHEMA.names
    assert [path.name for path in (tmp_path / "exports").iterdir()] == ["corpus"]
    with pytest.raises(GristmillError, match="exists"):
        export_corpus(corpora[0], tmp_path / "exports" / "corpus")


def test_an_exported_corpus_is_a_source(store: Store, tmp_path: Path):
    export_corpus(corpus(store, "wiki", ["one", "two"], ids=["wiki-1@2025-12", "wiki-2@2026-01"]), tmp_path / "exported")
    made = raw(tmp_path, source="hub", path="exported", where={"domain": "{domain}"})
    assert documents(made) == documents(store.current("cleaned_corpus", "wiki|2026-01-01"))


@pytest.mark.skipif(not SAMPLE.exists(), reason="the sample is not in this checkout")
def test_the_sample_gives_its_rows_of_one_partition(tmp_path: Path):
    made = raw(tmp_path, domain="legal", source="parquet", paths=[str(SAMPLE)], where=PARTITION)
    filters = [("domain", "==", "legal"), ("collected", "==", SNAPSHOT)]
    expected = pq.read_table(SAMPLE, filters=filters, columns=["id", "text", "source", "license", "date", "url", "lang", "title"])
    assert expected.num_rows > 0
    found = pq.read_table(made.file("documents.parquet")).select(expected.column_names)
    given = [row | {"id": row["id"] + MONTH} for row in expected.to_pylist()]
    assert found.to_pylist() == given
    assert made.counts["quarantined"] == 0


def test_settings_travel_to_a_worker_process(tmp_path: Path):
    import pickle

    write_lines(tmp_path / "a.jsonl", {"text": "x"})
    made = corpus_settings("wiki", SNAPSHOT, "jsonl", {"paths": ["a.jsonl"]}, tmp_path)
    restored = pickle.loads(pickle.dumps(made))
    assert isinstance(restored, CorpusSettings)
    assert restored.root == tmp_path


def test_a_cut_file_among_others_is_counted_and_warned_of(tmp_path: Path):
    whole = SAMPLE.parent / "corpus.parquet"
    (tmp_path / "b.parquet").write_bytes(whole.read_bytes())
    (tmp_path / "a.parquet").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    made = raw(tmp_path, domain="book", source="parquet", paths=["*.parquet"], where={"domain": "{domain}", "collected": "{snapshot}"})
    assert reasons(made) == [("a.parquet", "not a whole Parquet file: damaged from here to its end")]
    assert made.counts["kept"] > 50 and made.counts["quarantined"] == 1
    check = next(check for check in made.checks if check.name == "input_whole")
    assert not check.passed and not check.blocking and "copy these files again" in check.description


def test_whole_input_gives_no_warning(tmp_path: Path):
    write_lines(tmp_path / "a.jsonl", {"text": "fine"}, "{broken")
    assert all(check.passed for check in raw(tmp_path).checks)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 40).map(str), max_size=120), st.integers(1, 9))
def test_ids_are_seen_once_however_few_are_held_apart(names: list[str], recent: int):
    seen = SeenIds(recent)
    assert [seen.add(name) for name in names] == [name not in names[:place] for place, name in enumerate(names)]
