"""Cleaning: the only step that changes text. HTML extraction, encoding repair, control characters, masking of personal data.

Every change is counted per document.
Order: HTML, encoding, line breaks, control characters, personal data, length.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BeforeValidator

from pipelines.documents import DOCUMENT_SCHEMA, TableWriter, repeated_ids, row_count, table_writer
from pipelines.manifests import Check, Manifest, Outcome
from pipelines.personal_data import KINDS, PersonalData, mask, pseudonym_key
from pipelines.plugins import Settings
from pipelines.row_groups import RowGroup, map_row_groups

CLEANING_PACKAGES = ("ftfy", "resiliparse")
CHANGES_SCHEMA = pa.schema([("id", pa.string()), ("change", pa.string()), ("count", pa.int32())])
DROPPED_SCHEMA = pa.schema([("id", pa.string()), ("reason", pa.string())])
CHANGES = (
    "html_extracted",
    "encoding_repaired_lines",
    "newlines_normalised",
    "control_characters_removed",
    *(f"{kind}s_{done}" for done in ("masked", "counted") for kind in KINDS),
)


def _all_kinds(value: object) -> object:
    """Return what is done with every kind where one word says it; YAML reads the word off as false."""
    value = "off" if value is False else value
    return dict.fromkeys(KINDS, value) if isinstance(value, str) else value


class CleaningSettings(Settings):
    """What is changed in a text."""

    repair_encoding: bool = True
    """Undo UTF-8 read as another encoding (ftfy), line by line; quotes, ligatures and widths stay as they are."""
    html: Literal["keep", "extract"] = "keep"
    """``extract``: of a text that is an HTML document, keep the main text (resiliparse), formatted by line breaks."""
    normalise_newlines: bool = True
    """Make every line break one line feed."""
    remove_control_characters: bool = True
    """Remove U+0000 to U+001F but tab, line feed and carriage return."""
    personal_data: Annotated[PersonalData, BeforeValidator(_all_kinds)] = PersonalData()
    """What is done with each kind of personal data; one word, ``off`` say, holds for all."""
    min_characters: int = 1
    """A text with fewer characters, white space at its ends aside, is dropped."""


def clean_corpus(settings: CleaningSettings, out: Path, *, raw: Manifest) -> Outcome:
    """Write ``documents.parquet`` (order kept), ``changes.parquet`` (id, change, count) and ``dropped.parquet`` (id, reason)."""
    counts = dict.fromkeys(("documents_in", "kept", "dropped", "quarantined", "characters", "bytes", *CHANGES), 0)
    key = pseudonym_key(settings.personal_data)
    with ExitStack() as stack:
        documents = stack.enter_context(table_writer(out / "documents.parquet", DOCUMENT_SCHEMA))
        changes = stack.enter_context(TableWriter(out / "changes.parquet", CHANGES_SCHEMA))
        dropped = stack.enter_context(TableWriter(out / "dropped.parquet", DROPPED_SCHEMA))
        for group in map_row_groups(partial(_clean_group, settings=settings, key=key), raw.file("documents.parquet")):
            counts = {key: value + group.counts.get(key, 0) for key, value in counts.items()}
            for row in group.changes:
                changes.write(row)
            for row in group.dropped:
                dropped.write(row)
            if group.documents.num_rows:
                documents.write_table(group.documents, row_group_size=group.documents.num_rows)
    return Outcome(counts=counts)


@dataclass
class _Cleaned:
    """One row group, cleaned."""

    documents: pa.Table
    changes: list[dict[str, str | int]]
    dropped: list[dict[str, str]]
    counts: Counter[str]


def _clean_group(group: RowGroup, *, settings: CleaningSettings, key: bytes) -> _Cleaned:
    changes, dropped, counts, tables = [], [], Counter[str](), []
    for batch in group.batches():
        rows, texts = [], []
        for row, (name, raw) in enumerate(zip(batch["id"].to_pylist(), batch["text"].to_pylist(), strict=True)):
            text, found = clean(raw or "", settings, key)
            counts.update({"documents_in": 1, **found})
            changes += [{"id": name, "change": change, "count": count} for change, count in found.items()]
            if len(text.strip()) < settings.min_characters:
                dropped.append({"id": name, "reason": f"fewer than {settings.min_characters} characters"})
                continue
            rows.append(row)
            texts.append(text)
            counts.update(kept=1, characters=len(text))
        cleaned = pa.array(texts, pa.string())
        counts["bytes"] += int(pc.sum(pc.binary_length(cleaned)).as_py() or 0)
        others = batch.drop_columns(["text"]).take(pa.array(rows, pa.int64()))  # the text would be copied
        tables.append(
            pa.Table.from_batches([others.add_column(batch.schema.get_field_index("text"), DOCUMENT_SCHEMA.field("text"), cleaned)])
        )
    counts["dropped"] = len(dropped)
    return _Cleaned(pa.concat_tables(tables) if tables else DOCUMENT_SCHEMA.empty_table(), changes, dropped, counts)


PIECE_CHARACTERS = 4 * 1024 * 1024
"""A longer text is cleaned in pieces of about this length, cut at line ends, so that what cleaning needs beside the text stays small."""


def clean(text: str, settings: CleaningSettings, key: bytes = b"") -> tuple[str, dict[str, int]]:
    """Return the cleaned `text`, and how often each kind of change was made, zeros left out; `key` is that of pseudonyms."""
    found: Counter[str] = Counter()
    if settings.html == "extract":
        text, changes = extract_html(text)
        found.update(changes)
    stages: list[tuple[bool, Callable[[str], tuple[str, dict[str, int]]]]] = [
        (settings.repair_encoding, repair_encoding),
        (settings.normalise_newlines, _normalise_newlines),
        (settings.remove_control_characters, _remove_control_characters),
        (set(settings.personal_data.ways.values()) != {"off"}, partial(mask, settings=settings.personal_data, key=key)),
    ]
    cleaned = []
    for piece in line_pieces(text, PIECE_CHARACTERS):
        for wanted, stage in stages:
            if wanted:
                piece, changes = stage(piece)
                found.update(changes)
        cleaned.append(piece)
    return "".join(cleaned), {change: count for change, count in found.items() if count}


def line_pieces(text: str, characters: int) -> Iterator[str]:
    """Yield `text` in consecutive pieces of at most `characters`, cut after the last line feed, else the last space, else anywhere."""
    start = 0
    while len(text) - start > characters:
        stop = start + characters
        cut = next((place for mark in ("\n", " ") if (place := text.rfind(mark, start, stop)) >= 0), stop - 1)
        yield text[start : cut + 1]
        start = cut + 1
    yield text[start:] if start else text


_HTML_START = re.compile(r"<!doctype\s+html|<html[\s>]|<body[\s>]", re.IGNORECASE)
HTML_START_CHARACTERS = 1_000


def extract_html(text: str) -> tuple[str, dict[str, int]]:
    """Return the main text of an HTML document: one that begins with ``<`` and names html or body near its start.

    Where the main text is less than a tenth of all visible text, the heuristic has taken a part for the whole, and all
    visible text is returned.
    """
    if not text.lstrip().startswith("<") or not _HTML_START.search(text, 0, HTML_START_CHARACTERS):
        return text, {}
    from resiliparse.extract.html2text import extract_plain_text

    main = extract_plain_text(text, main_content=True, alt_texts=False)
    visible = extract_plain_text(text, main_content=False, alt_texts=False)
    return (main if len(main) * 10 >= len(visible) else visible), {"html_extracted": 1}


def repair_encoding(text: str) -> tuple[str, dict[str, int]]:
    """Return `text` with mojibake undone in each line on its own, so that one line's characters cannot block another's repair."""
    if text.isascii():
        return text, {}
    from ftfy import fix_encoding

    lines = text.split("\n")
    repaired = [line if line.isascii() else fix_encoding(line) for line in lines]
    changed = sum(old != new for old, new in zip(lines, repaired, strict=True))
    return "\n".join(repaired), {"encoding_repaired_lines": changed}


_CARRIAGE_RETURN = re.compile(r"\r\n?")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]")


def _normalise_newlines(text: str) -> tuple[str, dict[str, int]]:
    text, count = _CARRIAGE_RETURN.subn("\n", text)
    return text, {"newlines_normalised": count}


def _remove_control_characters(text: str) -> tuple[str, dict[str, int]]:
    text, count = _CONTROL.subn("", text)
    return text, {"control_characters_removed": count}


def documents_conserved(draft: Manifest) -> Check:
    """Documents read = documents kept + dropped + quarantined, by the rows of the files."""
    kept, dropped = (row_count(draft.directory / name) for name in ("documents.parquet", "dropped.parquet"))
    read, quarantined = draft.counts["documents_in"], draft.counts["quarantined"]
    return Check(
        name="documents_conserved",
        passed=read == kept + dropped + quarantined,
        description=f"{read} read, {kept} kept, {dropped} dropped, {quarantined} quarantined",
        metadata={"documents_in": read, "kept": kept, "dropped": dropped, "quarantined": quarantined},
    )


def ids_unique(draft: Manifest) -> Check:
    """Every document has an id of its own."""
    path = draft.directory / "documents.parquet"
    repeated, null = repeated_ids(path)
    return Check(
        name="ids_unique",
        passed=not repeated and not null,
        description=f"{repeated} repeated, {null} null",
        metadata={"documents": row_count(path), "repeated": repeated, "null": null},
    )


CLEANING_AUDITS = (documents_conserved, ids_unique)
