"""Row groups as parallel work: the same results and bytes whatever the number of processes, and batches that are bounded by bytes."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import corpus
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import documents, row_groups
from pipelines.cleaning import CleaningSettings, clean, clean_corpus, line_pieces
from pipelines.documents import bounded, read_batches
from pipelines.engine import Engine
from pipelines.errors import GristmillError
from pipelines.filtering import CollectSettings, ScoreSettings, collect_scores, score_documents
from pipelines.manifests import Manifest
from pipelines.row_groups import RowGroup, map_row_groups
from pipelines.store import Build, Store

TWO = Engine(workers=2)


def ids(group: RowGroup) -> list[str]:
    return [name for batch in group.batches(["id"]) for name in batch["id"].to_pylist()]


def fail_on_two(group: RowGroup) -> int:
    if group.number == 2:
        raise KeyError("two")
    return group.number


@pytest.fixture
def parallel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file is large enough for the pool."""
    monkeypatch.setattr(row_groups, "PARALLEL_BYTES", 0)


def large(store: Store, *, documents: int = 4_500) -> Manifest:
    """Publish a raw corpus of several row groups; some documents are to be cleaned or dropped."""
    texts = [f"Line {n}\r\nwrite to user{n}@example.org" * (n % 5) + "\x01" * (n % 2) for n in range(documents)]
    return corpus(store, "wiki", texts, asset="raw_corpus")


def test_groups_are_mapped_in_order(store: Store, parallel: None) -> None:
    path = large(store).file("documents.parquet")
    expected = [name for batch in read_batches(path, ["id"]) for name in batch["id"].to_pylist()]
    for engine in (Engine(kind="serial"), TWO):
        assert [name for found in map_row_groups(ids, path, engine) for name in found] == expected
    with pytest.raises(KeyError, match="two"):
        list(map_row_groups(fail_on_two, path, TWO))


def test_cleaning_and_scores_have_the_same_bytes_whatever_the_number_of_workers(
    store: Store, parallel: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw, found = large(store), []
    for workers in (1, 2):
        monkeypatch.setenv("GRISTMILL_WORKERS", str(workers))
        out = tmp_path / str(workers)
        out.mkdir()
        outcome = clean_corpus(CleaningSettings(), out, raw=raw)
        score_documents(ScoreSettings(filter="markup"), out, cleaned=raw)
        found.append((outcome, {path.name: path.read_bytes() for path in out.iterdir()}))
    assert found[0] == found[1]
    assert sorted(found[0][1]) == ["changes.parquet", "documents.parquet", "dropped.parquet", "scores.parquet"]
    assert found[0][0].counts["documents_in"] == 4_500 == found[0][0].counts["kept"] + found[0][0].counts["dropped"]


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.one_of(st.none(), st.integers(0, 40)), max_size=30), limit=st.integers(1, 60))
def test_batches_are_bounded_by_bytes(lengths: list[int | None], limit: int) -> None:
    texts = [None if length is None else "é" * length for length in lengths]
    batch = pa.record_batch({"text": pa.array(texts, pa.string()), "n": pa.array(range(len(texts)), pa.int64())})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "BYTES_PER_BATCH", limit)
        pieces = list(bounded(batch))
    assert [row for piece in pieces for row in piece.to_pylist()] == batch.to_pylist()
    for piece in pieces:
        assert piece.num_rows == 1 or sum(len((text or "").encode()) for text in piece["text"].to_pylist()) <= limit


def test_long_rows_are_read_a_few_at_a_time(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": [f"{n}" * 3_000_000 for n in range(8)]}), tmp_path / "t.parquet", use_dictionary=False)
    sizes = [batch.num_rows for batch in read_batches(tmp_path / "t.parquet")]
    assert sum(sizes) == 8 and max(sizes) <= 2
    pq.write_table(pa.table({"text": ["x" * 900_000] * 20}), tmp_path / "t.parquet")  # as a dictionary, much smaller than its rows
    sizes = [batch.num_rows for batch in read_batches(tmp_path / "t.parquet")]
    assert sum(sizes) == 20 and max(sizes) <= 9


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="ab \n\r@", max_size=60), st.integers(2, 12))
def test_line_pieces_cover_the_text_and_cut_no_line_that_fits(text: str, characters: int) -> None:
    pieces = list(line_pieces(text, characters))
    assert "".join(pieces) == text
    assert all(len(piece) <= characters for piece in pieces)
    assert all(piece.endswith("\n") for piece in pieces[:-1]) or any(len(line) >= characters for line in text.split("\n"))


def test_a_long_text_is_cleaned_as_its_lines_are(monkeypatch: pytest.MonkeyPatch) -> None:
    line = "Call 555-010-4477 or write ann@example.com.\r\nVerses 9â€“14, nul \x00 here.\n"
    whole = clean(line * 50, CleaningSettings())
    monkeypatch.setattr("pipelines.cleaning.PIECE_CHARACTERS", 200)
    assert clean(line * 50, CleaningSettings()) == whole
    assert whole[1] == {
        "encoding_repaired_lines": 50,
        "newlines_normalised": 50,
        "control_characters_removed": 50,
        "emails_masked": 50,
        "phones_masked": 50,
    }


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(st.none(), st.sampled_from(["a", "b", "c", "dd", "ee"])), max_size=12))
def test_repeated_ids_are_counted(tmp_path_factory: pytest.TempPathFactory, names: list[str | None]) -> None:
    path = tmp_path_factory.mktemp("ids") / "t.parquet"
    pq.write_table(pa.table({"id": pa.array(names, pa.string())}), path, row_group_size=5)
    given_names = [name for name in names if name is not None]
    assert documents.repeated_ids(path) == (len(given_names) - len(set(given_names)), names.count(None))


def test_scores_of_other_documents_are_not_collected(store: Store, tmp_path: Path) -> None:
    cleaned, other = corpus(store, "wiki", ["one", "two"], ids=("a", "b")), corpus(store, "wiki", ["one", "two"], ids=("b", "a"))
    request = Build("quality_scores.markup", score_documents, ScoreSettings(filter="markup"), inputs={"cleaned": other})
    scores = store.build(request).manifest
    with pytest.raises(GristmillError, match=r"scores of other documents; materialize the scores of its filter again"):
        collect_scores(CollectSettings(domain="wiki", snapshot="2026-01-01"), tmp_path, cleaned=cleaned, families=(scores,))
