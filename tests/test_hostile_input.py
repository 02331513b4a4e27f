"""What no one wants in a corpus: every source and every step takes it, counts it and loses nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_chain import PROSE, SNAPSHOT, Chain, decide, mill
from small_world import byte_tokenizer, sample_texts

from pipelines import cleaning, corpus, plugins
from pipelines.configuration import read_project
from pipelines.filtering import COLLECT_AUDITS, SCORE_AUDITS, CollectSettings, ScoreSettings, collect_scores, score_documents
from pipelines.manifests import Manifest
from pipelines.sources import _streams
from pipelines.store import Build, Store
from pipelines.token_formats import Vocabulary

ROOT = Path(__file__).parents[1]
LONG = 4_000_000
KEY = f"wiki|{SNAPSHOT}"
TEXTS = {
    "long": ("\n\n".join(sample_texts("wiki", 400, 4_000)) * 40)[:LONG],
    "no spaces": "abcdefghij" * 100_000,
    "one character a line": "a\n" * 200_000,
    "marks": "<" * 300_000 + "{" * 300_000,
    "nul": f"\x00{PROSE}\x00\x07",
    "wide": "日本語の文章です。" * 20_000,
    "plain": PROSE,
}
LOST = {"empty": b"", "blank": b" \n\t ", "not utf-8": b"caf\xe9 \xff\xfe " * 10}
"""What cannot be a document: it is quarantined."""


def write_jsonl(root: Path) -> dict[str, object]:
    lines = [json.dumps({"text": text}).encode() for text in TEXTS.values()] + [b'{"text": "%s"}' % raw for raw in LOST.values()]
    (root / "a.jsonl").write_bytes(b"\n".join(line.replace(b"\n\t", b"") for line in lines))
    return {"paths": ["a.jsonl"]}


def write_text(root: Path) -> dict[str, object]:
    for number, raw in enumerate([*(text.encode() for text in TEXTS.values()), *LOST.values()]):
        (root / f"{number}.txt").write_bytes(raw)
    return {"paths": ["*.txt"]}


def write_parquet(root: Path) -> dict[str, object]:
    values = pa.array([*(text.encode() for text in TEXTS.values()), *LOST.values()], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": values}), root / "a.parquet")
    return {"paths": ["a.parquet"]}


def write_hub(root: Path) -> dict[str, object]:
    (root / "folder").mkdir()
    write_parquet(root / "folder")
    return {"path": "folder"}


def write_warc(root: Path) -> dict[str, object]:
    records = b""
    for raw in [*(text.encode() for text in TEXTS.values()), *LOST.values()]:
        body = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain; charset=utf-8\r\n\r\n" + raw
        records += b"WARC/1.0\r\nWARC-Type: response\r\nContent-Length: %d\r\n\r\n%s\r\n\r\n" % (len(body), body)
    (root / "a.warc").write_bytes(records)
    return {"paths": ["a.warc"]}


def write_token_files(root: Path) -> dict[str, object]:
    """Ids of single bytes, so that what is not UTF-8 can be written too."""
    byte_tokenizer().save(str(root / "tokenizer.json"))
    documents = [np.frombuffer(raw, np.uint8).astype(np.uint32) + 1 for raw in [*(t.encode() for t in TEXTS.values()), *LOST.values()]]
    plugins.build("token_formats", "megatron").write(documents, root / "a", vocabulary=Vocabulary(257, 0))
    return {"paths": ["a.bin"], "format": "megatron", "tokenizer": "tokenizer.json"}


WRITERS: dict[str, Callable[[Path], dict[str, object]]] = {
    "jsonl": write_jsonl,
    "text": write_text,
    "parquet": write_parquet,
    "hub": write_hub,
    "warc": write_warc,
    "token_files": write_token_files,
}


def ingested(store: Store, root: Path, source: str) -> Manifest:
    made = corpus.corpus_settings("wiki", SNAPSHOT, source, WRITERS[source](root), root)
    return store.build(Build("raw_corpus", corpus.ingest, made, KEY, audits=corpus.CORPUS_AUDITS)).manifest


def test_every_source_is_tried() -> None:
    assert set(WRITERS) == set(plugins.names("sources"))


@pytest.mark.parametrize("source", WRITERS)
def test_every_source_keeps_what_has_text_and_counts_the_rest(store: Store, tmp_path: Path, source: str) -> None:
    raw = ingested(store, tmp_path, source)
    assert raw.counts["documents_in"] == len(TEXTS) + len(LOST)
    assert (raw.counts["kept"], raw.counts["quarantined"]) == (len(TEXTS), len(LOST))
    assert sorted(pq.read_table(raw.file("documents.parquet"))["text"].to_pylist()) == sorted(TEXTS.values())
    assert pq.read_table(raw.file("quarantine.parquet"))["reason"].null_count == 0


@pytest.mark.parametrize("source", ["jsonl", "text", "warc"])
def test_a_document_too_long_for_a_stream_is_quarantined(
    store: Store, tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (_streams, *(plugins.load("sources", name) for name in ("jsonl", "text", "warc"))):
        name = module.__module__ if isinstance(module, type) else module.__name__
        monkeypatch.setattr(f"{name}.MAX_PIECE_BYTES", 2_000_000)
    raw = ingested(store, tmp_path, source)
    assert (raw.counts["kept"], raw.counts["quarantined"]) == (len(TEXTS) - 1, len(LOST) + 1)
    assert any("longer than 2000000 bytes" in row["reason"] for row in pq.read_table(raw.file("quarantine.parquet")).to_pylist())


def test_a_text_beyond_the_limit_is_quarantined(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "MAX_TEXT_BYTES", 2_000_000)
    raw = ingested(store, tmp_path, "parquet")
    assert (raw.counts["kept"], raw.counts["quarantined"]) == (len(TEXTS) - 1, len(LOST) + 1)


@pytest.fixture(scope="module")
def cleaned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Manifest]:
    root = tmp_path_factory.mktemp("hostile")
    store = Store(root / "store")
    raw = {"raw": ingested(store, root, "parquet")}
    request = Build("cleaned_corpus", cleaning.clean_corpus, cleaning.CleaningSettings(), KEY, raw, cleaning.CLEANING_AUDITS)
    return store, store.build(request).manifest


def test_cleaning_conserves(cleaned: tuple[Store, Manifest]) -> None:
    counts = cleaned[1].counts
    assert counts["documents_in"] == len(TEXTS) == counts["kept"] + counts["dropped"]
    assert counts["control_characters_removed"] == 3
    texts = pq.read_table(cleaned[1].file("documents.parquet"))["text"].to_pylist()
    assert PROSE in texts and TEXTS["no spaces"] in texts and texts.count(PROSE) == 2


def project_filters() -> list[ScoreSettings]:
    """Return what the project scores, but for the filters that are fitted first."""
    project = read_project(ROOT / "project.yaml")
    fitted = {settings.filter for settings in project.fitted()}
    return [s for stage in ("quality", "toxicity") for s in project.score_settings(stage) if s.filter not in fitted]  # type: ignore[arg-type]


def test_every_filter_scores_every_document(cleaned: tuple[Store, Manifest]) -> None:
    store, documents = cleaned
    families = []
    for settings in project_filters():
        request = Build(f"scores.{settings.filter}", score_documents, settings, KEY, {"cleaned": documents}, SCORE_AUDITS)
        families.append(store.build(request).manifest)
    inputs = {"cleaned": documents, "families": tuple(families)}
    request = Build("scores", collect_scores, CollectSettings(domain="wiki", snapshot=SNAPSHOT), KEY, inputs, COLLECT_AUDITS)
    table = pq.read_table(store.build(request).manifest.file("scores.parquet"))
    assert table.num_rows == documents.counts["kept"]
    texts = pq.read_table(documents.file("documents.parquet"))["text"].to_pylist()
    assert table["characters"].to_pylist() == list(map(len, texts))
    twins = [row for row, text in enumerate(texts) if text == PROSE]
    for name in table.column_names[4:]:
        if pa.types.is_float64(table[name].type):  # the same text has the same scores, whatever stands beside it
            np.testing.assert_equal(table[name].to_numpy()[twins[0]], table[name].to_numpy()[twins[1]])


def test_the_chain_conserves(cleaned: tuple[Store, Manifest]) -> None:
    store, documents = cleaned
    assert_conserved(decide(store, store.current("raw_corpus", KEY), KEY))
    assert documents.counts["kept"] == len(TEXTS)


def assert_conserved(chain: Chain) -> None:
    incoming = chain.raw.counts["kept"]
    for step in (chain.cleaned, chain.quality, chain.toxicity, chain.deduplicated):
        counts = step.counts
        assert counts["documents_in"] == incoming == counts["kept"] + counts["dropped"] + counts["quarantined"], step.label
        incoming = counts["kept"]


@pytest.mark.parametrize("lines", [[], [{"text": ""}], ["{broken"], [{"text": "\x00"}]], ids=["nothing", "blank", "broken", "nul"])
def test_a_partition_without_documents_goes_through(store: Store, tmp_path: Path, lines: list) -> None:
    chain = mill(store, tmp_path, lines)
    assert_conserved(chain)
    assert chain.deduplicated.counts["documents_in"] == 0
    assert chain.raw.counts["quarantined"] + chain.cleaned.counts["dropped"] == len(lines)
