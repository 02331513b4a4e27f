"""Cleaning: every change by hand count, nothing lost, and clean text untouched."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import corpus
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.cleaning import CLEANING_AUDITS, CLEANING_PACKAGES, CleaningSettings, clean, clean_corpus
from pipelines.manifests import Manifest
from pipelines.store import Build, Store

SAMPLE = Path(__file__).parent.parent / "data" / "sample"
EXTRACT = CleaningSettings(html="extract")
PAGE = """<!DOCTYPE html>
<html><head><title>On mills</title><script>var tracker = 1;</script><style>p { color: red }</style></head>
<body><nav><a href="/">Home</a> <a href="/login">Login</a></nav>
<article><h1>Mills</h1><p>A mill grinds grain into flour. The stones turn slowly.</p><p>Water drives the wheel.</p></article>
<footer>Copyright</footer></body></html>"""


def build(store: Store, raw: Manifest, **values: object) -> Manifest:
    request = Build(
        asset="cleaned_corpus",
        partition=raw.partition,
        step=clean_corpus,
        settings=CleaningSettings.model_validate(values),
        inputs={"raw": raw},
        audits=CLEANING_AUDITS,
        packages=CLEANING_PACKAGES,
    )
    return store.build(request).manifest


def rows(manifest: Manifest, name: str) -> list[dict[str, object]]:
    return pq.read_table(manifest.file(name)).to_pylist()


def test_each_change_is_counted_by_document(store: Store) -> None:
    texts = ["plain text", "a\r\nb\rc", "nul\x00 and \x1b escape\tkept", "write to ann@example.com, bob@example.org", " \n "]
    raw = corpus(store, "wiki", texts, ids=("a", "b", "c", "d", "e"), asset="raw_corpus")
    cleaned = build(store, raw)
    assert [row["text"] for row in rows(cleaned, "documents.parquet")] == [
        "plain text",
        "a\nb\nc",
        "nul and  escape\tkept",
        "write to <EMAIL>, <EMAIL>",
    ]
    assert rows(cleaned, "changes.parquet") == [
        {"id": "b", "change": "newlines_normalised", "count": 2},
        {"id": "c", "change": "control_characters_removed", "count": 2},
        {"id": "d", "change": "emails_masked", "count": 2},
    ]
    assert rows(cleaned, "dropped.parquet") == [{"id": "e", "reason": "fewer than 1 characters"}]
    counts = cleaned.counts
    assert (counts["documents_in"], counts["kept"], counts["dropped"], counts["quarantined"]) == (5, 4, 1, 0)
    assert counts["emails_masked"] == 2
    assert counts["characters"] == counts["bytes"] == sum(len(str(row["text"])) for row in rows(cleaned, "documents.parquet"))


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("call +1 (555) 016-5837 now", "call <PHONE> now"),
        ("call (312) 555-0143.", "call <PHONE>."),
        ("call 617-542-5942, or +49 30 901820", "call <PHONE>, or <PHONE>"),
        ("card 4111 1111 1111 1111.", "card <CARD>."),
        ("card 4111-1111-1111-1111 and 378282246310005", "card <CARD> and <CARD>"),
        ("number 954-75-8691;", "number <NATIONAL_ID>;"),
        ("seen at 192.0.2.62.", "seen at <IP>."),
        ("ping 8.8.8.8 and host 10.0.0.1", "ping <IP> and host <IP>"),
        ("first.last+tag@mail.example.co.uk", "<EMAIL>"),
    ],
)
def test_personal_data_is_masked(text: str, masked: str) -> None:
    assert clean(text, CleaningSettings())[0] == masked


@pytest.mark.parametrize(
    "text",
    [
        "Python 3.11.2.1 and SQLite 3.7.16.1",
        "version 192.168.10.1 of the driver",
        "see section 5.1.2.3",
        "4111 1111 1111 1112 has a wrong check digit",
        "the form +000000120 and 2024-05-20 03:56:59",
        "bind to 127.0.0.1 or 0.0.0.0 with mask 255.255.255.0",
        "300.1.2.3 and 1.2.3.4.5",
        "@property def f(self): return self @ other",
        "6807.4\t6.5\t21465.5\t77.9\t207180.9",
        "pages 110-12-19991 and ISBN 0-306-40615-2",
    ],
)
def test_what_is_no_personal_data_stays(text: str) -> None:
    assert clean(text, CleaningSettings()) == (text, {})


def test_masks_can_be_off() -> None:
    text = "ann@example.com\r\n"
    assert clean(text, CleaningSettings(personal_data="off", normalise_newlines=False)) == (text, {})


def test_mojibake_is_undone_line_by_line_and_quotes_stay() -> None:
    text = "Verses 9â€“14 → “quoted” ﬁ\nÅukasz GÃ³mez\n日本語 and naïve"
    cleaned, found = clean(text, CleaningSettings())
    assert cleaned.split("\n")[0] == "Verses 9–14 → “quoted” ﬁ"
    assert "Gómez" in cleaned
    assert cleaned.split("\n")[2] == "日本語 and naïve"
    assert found == {"encoding_repaired_lines": 2}


def test_html_gives_its_main_text() -> None:
    text, found = clean(PAGE, EXTRACT)
    assert found == {"html_extracted": 1}
    assert "A mill grinds grain into flour." in text and "Water drives the wheel." in text
    assert not any(word in text for word in ("<p>", "tracker", "color", "Login"))
    assert clean(PAGE, CleaningSettings()) == (PAGE, {})


def test_text_about_html_is_no_html() -> None:
    text = "The <html> element holds <body>.\n<!doctype html> comes first."
    assert clean(text, EXTRACT) == (text, {})


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=200))
def test_cleaning_again_changes_nothing_but_encoding(text: str) -> None:
    once, _ = clean(text, CleaningSettings(repair_encoding=False))
    assert clean(once, CleaningSettings(repair_encoding=False)) == (once, {})


def test_the_same_text_gives_the_same_bytes(tmp_path: Path) -> None:
    contents = []
    for name in ("one", "two"):
        store = Store(tmp_path / name)
        contents.append(build(store, corpus(store, "wiki", [PAGE, "ann@example.com"], asset="raw_corpus")).content_sha256)
    assert contents[0] == contents[1]


@pytest.mark.skipif(not SAMPLE.exists(), reason="needs the embedded sample")
def test_planted_personal_data_is_all_masked() -> None:
    labels = {row["id"]: row for row in pq.read_table(SAMPLE / "labels.parquet").to_pylist() if row["noise"] == "pii"}
    documents = [row for row in pq.read_table(SAMPLE / "dirty.parquet", columns=["id", "text"]).to_pylist() if row["id"] in labels]
    assert len(documents) > 100
    for row in documents:
        cleaned, _ = clean(row["text"], CleaningSettings())
        planted = labels[row["id"]]["planted"].strip("[]").replace('"', "").split(", ")
        assert [value for value in planted if value in cleaned] == []
