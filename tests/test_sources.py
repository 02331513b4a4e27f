"""Sources: what each format yields from small files, what it keeps aside, and what it says about files it cannot use."""

from __future__ import annotations

import gzip
import io
import json
import random
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import plugins
from pipelines.documents import Document, Quarantined
from pipelines.errors import GristmillError
from pipelines.sources._rows import expand
from pipelines.sources._streams import StreamCutError, chunks, pieces

SNAPSHOT = "2026-02-01"
TEXTS = [
    "The otter swims upstream.",
    "Ein Fluss, der nach Norden fließt.",
    "川は海に注ぐ。",
    "A mill grinds grain into flour of a known grade.",
]


def read(root: Path, name: str, *, domain: str = "river", **values: object) -> list[Document | Quarantined]:
    """Read everything that source `name` with settings `values` yields."""
    return list(plugins.build("sources", name, values).read(domain, SNAPSHOT, root=root))


def documents(items: Sequence[Document | Quarantined]) -> list[Document]:
    return [item for item in items if isinstance(item, Document)]


def quarantined(items: Sequence[Document | Quarantined]) -> list[tuple[str, str]]:
    return [(item.locator, item.reason) for item in items if isinstance(item, Quarantined)]


def rows(texts: Sequence[str] = TEXTS, domain: str = "river", month: str = SNAPSHOT) -> list[dict[str, str | None]]:
    return [{"id": f"{domain}-{n}", "text": t, "domain": domain, "collected": month, "title": f"T{n}"} for n, t in enumerate(texts)]


# placeholders and paths


def test_placeholders_stand_for_the_partition():
    assert expand("{domain}/{snapshot:%Y-%m}/{snapshot}.jsonl", "wiki", "2026-03-01") == "wiki/2026-03/2026-03-01.jsonl"


@pytest.mark.parametrize("template", ["{month}/x", "{}/x", "{domain", "{domain.nothing}"])
def test_a_wrong_placeholder_is_refused_when_settings_are_built(template: str):
    with pytest.raises(GristmillError, match=r"placeholders are \{domain\}"):
        plugins.build("sources", "jsonl", {"paths": [template]})


@pytest.mark.parametrize("name", ["parquet", "jsonl", "text", "warc"])
def test_a_missing_file_is_one_error_with_path_and_remedy(tmp_path: Path, name: str):
    source = plugins.build("sources", name, {"paths": ["data/{domain}-*.x"]})
    with pytest.raises(GristmillError, match=r"no file matches 'data/river-\*\.x'.*correct the path"):
        source.files("river", SNAPSHOT, root=tmp_path)


def test_a_directory_in_place_of_files_gets_a_hint(tmp_path: Path):
    (tmp_path / "data").mkdir()
    with pytest.raises(GristmillError, match=r"name the directory.s files, as in data/\*"):
        read(tmp_path, "text", paths=["data/"])


def test_relative_paths_stay_inside_and_absolute_paths_may_lie_anywhere(tmp_path: Path):
    inside, outside = tmp_path / "project", tmp_path / "note.txt"
    inside.mkdir()
    outside.write_text(TEXTS[0])
    with pytest.raises(GristmillError, match="absolute path"):
        read(inside, "text", paths=["../note.txt"])
    assert documents(read(inside, "text", paths=[str(outside)]))[0].locator == outside.as_posix()


def test_files_come_sorted_and_once(tmp_path: Path):
    for name in ("b/2.txt", "b/1.txt", "a/3.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "odd[1].txt").write_text("brackets")
    found = documents(read(tmp_path, "text", paths=["b/*.txt", "**/*.txt", "odd[1].txt"]))
    assert [d.locator for d in found] == ["a/3.txt", "b/1.txt", "b/2.txt", "odd[1].txt"]


# Parquet


def test_parquet_reads_one_domain_and_month(tmp_path: Path):
    table = rows(domain="hill") + rows() + rows(month="2026-01-01", texts=["an older text"])
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "corpus.parquet", row_group_size=3)
    found = read(tmp_path, "parquet", paths=["corpus.parquet"], where={"domain": "{domain}", "collected": "{snapshot}"})
    assert [(d.id, d.text, d.title, d.locator) for d in found] == [
        (f"river-{n}", text, f"T{n}", f"corpus.parquet:{n + 5}") for n, text in enumerate(TEXTS)
    ]


def test_parquet_does_not_read_row_groups_that_statistics_exclude(tmp_path: Path):
    path = tmp_path / "corpus.parquet"
    texts = [random.Random(n).randbytes(3000).hex() for n in range(40)]
    table = pa.Table.from_pylist(rows(texts, domain="hill") + rows())
    pq.write_table(table, path, row_group_size=40, compression="none", use_dictionary=False)
    column = pq.read_metadata(path).row_group(0).column(1)
    damaged = bytearray(path.read_bytes())
    damaged[column.data_page_offset : column.data_page_offset + column.total_compressed_size] = bytes(column.total_compressed_size)
    path.write_bytes(damaged)
    assert len(read(tmp_path, "parquet", paths=["corpus.parquet"], where={"domain": "{domain}"})) == len(TEXTS)
    with pytest.raises(GristmillError, match=r"corpus\.parquet is not a whole Parquet file"):
        read(tmp_path, "parquet", paths=["corpus.parquet"])


@pytest.mark.parametrize("dictionary", [True, False])
@pytest.mark.parametrize("group", [2, 1000])
def test_parquet_filter_equals_a_filter_by_hand(tmp_path: Path, dictionary: bool, group: int):
    choice = random.Random(7)
    table = [{"text": f"text {n}", "domain": choice.choice(["a", "b", None]), "year": choice.choice([1, 2])} for n in range(700)]
    arrow = pa.Table.from_pylist(table)
    if dictionary:
        arrow = arrow.set_column(1, "domain", arrow["domain"].dictionary_encode())
    pq.write_table(arrow, tmp_path / "t.parquet", row_group_size=group)
    found = read(tmp_path, "parquet", domain="a", paths=["t.parquet"], where={"domain": "{domain}", "year": "2"})
    expected = [(row["text"], f"t.parquet:{n}") for n, row in enumerate(table, start=1) if row["domain"] == "a" and row["year"] == 2]
    assert [(d.text, d.locator) for d in found] == expected


def test_parquet_maps_columns_and_converts_types(tmp_path: Path):
    import datetime

    table = pa.table(
        {
            "content": ["x y z"],
            "key": [17],
            "date": [datetime.date(2001, 2, 3)],
            "metadata": [{"b": 1, "a": "é"}],
            "lang": ["xx"],
            "url": [""],
        }
    )
    pq.write_table(table, tmp_path / "t.parquet")
    columns = {"text": "content", "id": "key", "lang": None}
    (found,) = read(tmp_path, "parquet", paths=["t.parquet"], columns=columns, values={"license": "CC0-1.0", "url": "u/{domain}"})
    assert found == Document(
        text="x y z", locator="t.parquet:1", id="17", date="2001-02-03", metadata='{"a": "é", "b": 1}', license="CC0-1.0", url="u/river"
    )


def test_parquet_says_which_column_is_missing(tmp_path: Path):
    pq.write_table(pa.table({"content": ["x"], "domain": ["river"]}), tmp_path / "t.parquet")
    with pytest.raises(GristmillError, match=r"columns: \{text: NAME\}. known: content, domain"):
        read(tmp_path, "parquet", paths=["t.parquet"])
    with pytest.raises(GristmillError, match="did you mean 'content'"):
        read(tmp_path, "parquet", paths=["t.parquet"], columns={"text": "contents"})
    with pytest.raises(GristmillError, match="did you mean 'domain'"):
        read(tmp_path, "parquet", paths=["t.parquet"], columns={"text": "content"}, where={"domains": "x"})


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_cut_parquet_file_is_one_error(tmp_path: Path, share: float):
    pq.write_table(pa.Table.from_pylist(rows()), tmp_path / "whole.parquet")
    content = (tmp_path / "whole.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(content[: int(len(content) * share)])
    with pytest.raises(GristmillError, match=r"cut\.parquet is not a whole Parquet file.*copy or download it again"):
        read(tmp_path, "parquet", paths=["cut.parquet"], where={"domain": "{domain}"})


def test_parquet_quarantines_null_text_and_bytes_that_are_not_utf8(tmp_path: Path):
    text = pa.array([b"good", b"\xff\xfe bad", None, "grün".encode()]).view(pa.string())
    title = pa.array([b"A", b"B", b"C", b"\xe9t\xe9"]).view(pa.string())
    pq.write_table(pa.table({"text": text, "title": title, "payload": [b"bytes", b"\xff", b"x", b"y"]}), tmp_path / "t.parquet")
    found = read(tmp_path, "parquet", paths=["t.parquet"])
    assert [d.text for d in documents(found)] == ["good"]
    assert quarantined(found) == [("t.parquet:2", "text is not UTF-8"), ("t.parquet:3", "no text"), ("t.parquet:4", "title is not UTF-8")]
    assert found[1].excerpt == r"\xff\xfe bad"
    binary = read(tmp_path, "parquet", paths=["t.parquet"], columns={"text": "payload", "title": None})
    assert [d.text for d in documents(binary)] == ["bytes", "x", "y"]
    assert quarantined(binary) == [("t.parquet:2", "text is not UTF-8")]


def test_parquet_without_rows(tmp_path: Path):
    pq.write_table(pa.table({"text": pa.array([], pa.string()), "domain": pa.array([], pa.string())}), tmp_path / "t.parquet")
    assert read(tmp_path, "parquet", paths=["t.parquet"], where={"domain": "{domain}"}) == []


# JSON Lines


def packed(content: bytes, suffix: str) -> bytes:
    if suffix == ".gz":
        return gzip.compress(content, mtime=0)
    return zstandard.compress(content) if suffix == ".zst" else content


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_jsonl_reads_plain_and_compressed_files_of_several_members(tmp_path: Path, suffix: str):
    lines = [(json.dumps(row, ensure_ascii=False) + "\n").encode() for row in rows() + rows(domain="hill")]
    content = packed(b"".join(lines[:3]), suffix) + packed(b"".join(lines[3:]), suffix)
    (tmp_path / f"t.jsonl{suffix}").write_bytes(content)
    found = read(tmp_path, "jsonl", paths=[f"t.jsonl{suffix}"], where={"domain": "{domain}", "collected": "{snapshot}"})
    assert [(d.id, d.text, d.locator) for d in found] == [(f"river-{n}", t, f"t.jsonl{suffix}:{n + 1}") for n, t in enumerate(TEXTS)]


def test_jsonl_keeps_malformed_lines_aside(tmp_path: Path):
    lines = [
        b'\xef\xbb\xbf{"text": "first", "id": 3, "metadata": {"k": [1]}, "date": null}',
        b'{"text": "cut',
        b"[1, 2]",
        b'{"title": "no text here"}',
        b'{"text": 12}',
        b'{"text": "\xff"}',
        b"   ",
        b'{"text": "' + b"x" * 10 + b'", "n": ' + b"9" * 5000 + b"}",
        b"[" * 100_000,
        b'{"text": "last"}',
    ]
    (tmp_path / "t.jsonl").write_bytes(b"\r\n".join(lines))
    found = read(tmp_path, "jsonl", paths=["t.jsonl"])
    assert documents(found) == [
        Document(text="first", locator="t.jsonl:1", id="3", metadata='{"k": [1]}'),
        Document(text="last", locator="t.jsonl:10"),
    ]
    assert quarantined(found) == [
        ("t.jsonl:2", "not JSON: Invalid control character at"),
        ("t.jsonl:3", "line is list, not an object"),
        ("t.jsonl:4", "no text"),
        ("t.jsonl:5", "text is int, not a string"),
        ("t.jsonl:6", "line is not UTF-8"),
        ("t.jsonl:8", "not readable as JSON: ValueError"),
        ("t.jsonl:9", "not readable as JSON: RecursionError"),
    ]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("damage", ["cut", "overwritten"])
def test_jsonl_keeps_the_lines_before_the_damage(tmp_path: Path, suffix: str, damage: str):
    choice = random.Random(3)
    lines = [json.dumps({"text": choice.randbytes(200).hex()}).encode() + b"\n" for _ in range(3000)]
    content = packed(b"".join(lines), suffix)
    middle = len(content) // 2
    broken = content[:middle] if damage == "cut" else content[:middle] + b"\xff" * 500 + content[middle + 500 :]
    (tmp_path / f"t.jsonl{suffix}").write_bytes(broken)
    found = read(tmp_path, "jsonl", paths=[f"t.jsonl{suffix}"])
    kept = next(n for n, item in enumerate(found) if isinstance(item, Quarantined))
    assert kept > 300
    assert [item.text for item in documents(found[:kept])] == [json.loads(line)["text"] for line in lines[:kept]]
    assert quarantined(found)[0][0] == f"t.jsonl{suffix}:{kept + 1}"
    assert ("ends early" if damage == "cut" else "damaged") in quarantined(found)[-1][1]


def test_jsonl_bounds_the_length_of_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for module in ("_streams", "jsonl"):
        monkeypatch.setattr(f"pipelines.sources.{module}.MAX_PIECE_BYTES", 100_000)
    long = json.dumps({"text": "y" * 300_000})
    (tmp_path / "t.jsonl").write_text(f'{{"text": "a"}}\n{long}\n{{"text": "b"}}\n')
    found = read(tmp_path, "jsonl", paths=["t.jsonl"])
    assert [d.text for d in documents(found)] == ["a", "b"]
    assert quarantined(found) == [("t.jsonl:2", "line longer than 100000 bytes")]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.binary(max_size=6)), st.sampled_from([b"\n", b"ab", b"\x00\x00\x00"]))
def test_pieces_are_what_split_gives_however_the_stream_is_chunked(parts: list[bytes], separator: bytes):
    whole = b"".join(parts).split(separator)
    assert list(pieces(iter(parts), separator)) == (whole if whole[-1] else whole[:-1])


@settings(max_examples=100, deadline=None)
@given(st.binary(min_size=1, max_size=2000), st.sampled_from([".gz", ".zst"]), st.data())
def test_a_stream_cut_anywhere_is_told_and_gives_a_prefix(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, suffix: str, data: st.DataObject
):
    path = tmp_path_factory.mktemp("cut") / f"t{suffix}"
    whole = packed(content, suffix)
    path.write_bytes(whole[: data.draw(st.integers(1, len(whole) - 1))])
    read_before = []
    with pytest.raises(StreamCutError):
        read_before.extend(chunks(path))
    assert content.startswith(b"".join(read_before))


# text


def test_text_is_a_document_a_file_or_several(tmp_path: Path):
    (tmp_path / "one.txt").write_bytes(b"\xef\xbb\xbf" + TEXTS[1].encode())
    (tmp_path / "many.txt").write_text("first\n%%\n\n%%\nthird\n%%\n")
    assert documents(read(tmp_path, "text", paths=["one.txt"])) == [Document(text=TEXTS[1], locator="one.txt")]
    assert [(d.text, d.locator) for d in read(tmp_path, "text", paths=["many.txt"], separator="\n%%\n", values={"lang": "en"})] == [
        ("first", "many.txt:1"),
        ("third", "many.txt:3"),
    ]


def test_text_in_another_encoding(tmp_path: Path):
    (tmp_path / "t.txt").write_bytes("über\x00".encode("cp1252"))
    assert documents(read(tmp_path, "text", paths=["t.txt"], encoding="cp1252"))[0].text == "über\x00"
    assert quarantined(read(tmp_path, "text", paths=["t.txt"])) == [("t.txt", "text is not utf-8")]
    with pytest.raises(GristmillError, match="'utf-9' is not a text codec"):
        read(tmp_path, "text", paths=["t.txt"], encoding="utf-9")
    with pytest.raises(GristmillError, match="contains ASCII"):
        read(tmp_path, "text", paths=["t.txt"], encoding="utf-16", separator="x")


def test_a_cut_compressed_text_is_kept_aside(tmp_path: Path):
    (tmp_path / "t.txt.gz").write_bytes(gzip.compress(TEXTS[0].encode())[:-4])
    assert quarantined(read(tmp_path, "text", paths=["*.gz"])) == [("t.txt.gz", "compressed stream ends early")]
    assert quarantined(read(tmp_path, "text", paths=["*.gz"], separator="\n\n")) == [("t.txt.gz:1", "compressed stream ends early")]


# WARC


def archive(pages: Sequence[tuple[str, bytes]], *, compressed: bool, headers: Sequence[dict[str, str]] = ()) -> bytes:
    """Return a WARC of `pages` (HTTP header lines, payload), written by warcio."""
    from warcio.statusandheaders import StatusAndHeaders
    from warcio.warcwriter import WARCWriter

    out = io.BytesIO()
    writer = WARCWriter(out, gzip=compressed)
    writer.write_record(writer.create_warcinfo_record("t.warc", {"software": "test"}))
    for number, (head, payload) in enumerate(pages):
        status, *lines = head.split("\n")
        http = StatusAndHeaders(status, [tuple(line.split(": ", 1)) for line in lines], protocol="HTTP/1.1")
        extra = {"WARC-Record-ID": f"<urn:uuid:{number}>", "WARC-Date": "2026-02-03T04:05:06Z", **(headers[number] if headers else {})}
        uri = f"http://example.com/{number}"
        record = writer.create_warc_record(uri, "response", payload=io.BytesIO(payload), http_headers=http, warc_headers_dict=extra)
        writer.write_record(record)
    return out.getvalue()


HTML = "200 OK\nContent-Type: text/html; charset=utf-8"


@pytest.mark.parametrize("compressed", [True, False])
def test_warc_reads_pages_in_their_character_set(tmp_path: Path, compressed: bool):
    meta = '<html><head><meta charset="windows-1251"><p>река'.encode("cp1251")
    pages = [
        (HTML, "<p>Grüße</p>".encode()),
        ("200 OK\nContent-Type: text/html; charset=ISO-8859-1", "<p>“quoted”</p>".encode("cp1252")),
        ("200 OK\nContent-Type: text/html", meta),
        ("200 OK\nContent-Type: text/plain; charset=UTF-8", b"\xff\xfe" + "plain".encode("utf-16-le")),
        ("200 OK\nContent-Type: image/png", b"\x89PNG"),
        ("404 Not Found\nContent-Type: text/html", b"<p>gone</p>"),
        (HTML, b"<p>\xff</p>"),
        ("200 OK\nContent-Type: text/html; charset=klingon", b"<p>x</p>"),
        (HTML + "\nContent-Encoding: gzip", gzip.compress(b"<p>zipped</p>")),
        (HTML + "\nContent-Encoding: gzip", b"<p>the header lies</p>"),
        (HTML + "\nTransfer-Encoding: chunked", b"8\r\n<p>chunk\r\n6\r\ned</p>\r\n0\r\n\r\n"),
        (HTML + "\nContent-Encoding: br", b"?"),
    ]
    name = f"t.warc{'.gz' if compressed else ''}"
    (tmp_path / name).write_bytes(archive(pages, compressed=compressed))
    found = read(tmp_path, "warc", paths=["*.warc*"], values={"license": "unknown"})
    assert [(d.locator, d.text) for d in documents(found)] == [
        ("urn:uuid:0", "<p>Grüße</p>"),
        ("urn:uuid:1", "<p>“quoted”</p>"),
        ("urn:uuid:2", meta.decode("cp1251")),
        ("urn:uuid:3", "plain"),
        ("urn:uuid:8", "<p>zipped</p>"),
        ("urn:uuid:9", "<p>the header lies</p>"),
        ("urn:uuid:10", "<p>chunked</p>"),
    ]
    assert [locator for locator, _ in quarantined(found)] == ["urn:uuid:6", "urn:uuid:7", "urn:uuid:11"]
    first = documents(found)[0]
    assert (first.url, first.date, first.license) == ("http://example.com/0", "2026-02-03T04:05:06Z", "unknown")
    assert json.loads(first.metadata or "") == {"content_type": "text/html"}


@pytest.mark.parametrize("compressed", [True, False])
def test_warc_keeps_cut_records_aside_and_reads_what_stands_before(tmp_path: Path, compressed: bool):
    choice = random.Random(5)
    pages = [(HTML, choice.randbytes(3000).hex().encode()) for _ in range(4)]
    whole = archive(pages, compressed=compressed)
    name = f"t.warc{'.gz' if compressed else ''}"
    for end in range(len(whole) // 2, len(whole), 97):
        (tmp_path / name).write_bytes(whole[:end])
        found = read(tmp_path, "warc", paths=[name])
        texts = [d.text for d in documents(found)]
        assert texts == [page.decode() for _, page in pages[: len(texts)]]
        assert len(texts) >= 1
        assert len(quarantined(found)) <= 2
        assert len(texts) == 4 or quarantined(found) or (not compressed and whole[:end].rstrip().endswith(texts[-1].encode()))


def test_warc_quarantines_what_the_crawler_truncated(tmp_path: Path):
    content = archive([(HTML, b"<p>a"), (HTML, b"<p>b")], compressed=True, headers=[{"WARC-Truncated": "length"}, {}])
    (tmp_path / "t.warc.gz").write_bytes(content)
    found = read(tmp_path, "warc", paths=["t.warc.gz"])
    assert quarantined(found) == [("urn:uuid:0", "record truncated by the crawler (length)")]
    assert [d.text for d in documents(found)] == ["<p>b"]


def test_warc_reads_extracted_text_and_leaves_large_records_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pipelines.sources.warc.MAX_PIECE_BYTES", 1000)
    records = []
    for number, text in enumerate(["река", "y" * 100_000, "end"]):
        body = text.encode()
        head = f"WARC/1.0\r\nWARC-Type: conversion\r\nWARC-Record-ID: <urn:uuid:{number}>\r\nContent-Type: text/plain\r\n"
        records.append(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body + b"\r\n\r\n")
    (tmp_path / "t.warc.wet.gz").write_bytes(b"".join(gzip.compress(record) for record in records))
    found = read(tmp_path, "warc", paths=["*.gz"], record_types=["conversion"])
    assert [d.text for d in documents(found)] == ["река", "end"]
    assert quarantined(found) == [("urn:uuid:1", "record longer than 1000 bytes")]
    assert read(tmp_path, "warc", paths=["*.gz"]) == []


def test_a_file_that_is_no_warc_is_kept_aside(tmp_path: Path):
    (tmp_path / "t.warc").write_text("This is a letter.\nNot an archive.\n")
    assert quarantined(read(tmp_path, "warc", paths=["t.warc"])) == [("t.warc:1", "archive damaged from here to its end")]


# hub


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A project with a saved dataset, a saved dataset of splits, and a folder of Parquet files."""
    import datasets

    dataset = datasets.Dataset.from_list(rows(domain="hill") + rows())
    dataset.save_to_disk(tmp_path / "plain")
    datasets.DatasetDict({"train": dataset, "test": dataset.select([0])}).save_to_disk(tmp_path / "splits")
    (tmp_path / "folder").mkdir()
    dataset.select(range(3)).to_parquet(tmp_path / "folder" / "train-00000-of-00002.parquet")
    dataset.select(range(3, 8)).to_parquet(tmp_path / "folder" / "train-00001-of-00002.parquet")
    return tmp_path


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("path", ["plain", "splits", "folder"])
def test_hub_reads_local_folders(saved: Path, path: str, streaming: bool):
    import datasets

    cache = Path(datasets.config.HF_DATASETS_CACHE)
    before = sorted(cache.rglob("*"))
    found = read(saved, "hub", path=path, streaming=streaming, where={"domain": "{domain}"}, columns={"title": None}, values={"lang": "en"})
    assert found == [Document(text=text, id=f"river-{n}", locator=f"{path}/train:{n + 5}", lang="en") for n, text in enumerate(TEXTS)]
    assert sorted(cache.rglob("*")) == before


def test_hub_names_the_files_of_a_folder(saved: Path):
    source = plugins.build("sources", "hub", {"path": "folder"})
    files = source.files("river", SNAPSHOT, root=saved)
    assert [f.name for f in files] == ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]
    assert source.revision("river", SNAPSHOT, root=saved) == ""


@pytest.mark.parametrize("streaming", [True, False])
def test_hub_reads_named_data_files(saved: Path, streaming: bool):
    (saved / "json").mkdir()
    (saved / "json" / "river-2026-02.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    (saved / "json" / "river-2026-01.jsonl").write_text('{"text": "older"}\n')
    found = read(saved, "hub", path="json", data_files=["{domain}-{snapshot:%Y-%m}.jsonl"], streaming=streaming)
    assert [d.text for d in found] == TEXTS


@pytest.mark.parametrize("streaming", [True, False])
def test_hub_says_what_is_wrong(saved: Path, streaming: bool):
    with pytest.raises(GristmillError, match="no split 'validation'; it has: test, train"):
        read(saved, "hub", path="splits", split="validation", streaming=streaming)
    with pytest.raises(GristmillError, match=r"no dataset folder '\./nothing'"):
        read(saved, "hub", path="./nothing", streaming=streaming)
    with pytest.raises(GristmillError, match=r"'folder'.*split 'validation'"):
        read(saved, "hub", path="folder", split="validation", streaming=streaming)
    with pytest.raises(GristmillError, match="did you mean 'domain'"):
        read(saved, "hub", path="folder", where={"domian": "x"}, streaming=streaming)
    cut = saved / "folder" / "train-00001-of-00002.parquet"
    cut.write_bytes(cut.read_bytes()[:500])
    with pytest.raises(GristmillError, match=r"'folder'.*cannot be read"):
        read(saved, "hub", path="folder", streaming=streaming)


def test_hub_takes_a_full_commit_hash_without_asking(tmp_path: Path):
    source = plugins.build("sources", "hub", {"path": "owner/name", "git_revision": "0" * 40})
    assert source.files("river", SNAPSHOT, root=tmp_path) == []
    assert source.revision("river", SNAPSHOT, root=tmp_path) == "0" * 40
