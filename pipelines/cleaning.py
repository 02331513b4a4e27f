"""Cleaning: the only step that changes text. HTML extraction, encoding repair, control characters, masking of personal data.

Every change is counted per document. The masks are patterns: they find the common written forms, not every one.
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
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.documents import DOCUMENT_SCHEMA, TableWriter, repeated_ids, row_count
from pipelines.manifests import Check, Manifest, Outcome
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
    "emails_masked",
    "cards_masked",
    "national_ids_masked",
    "phones_masked",
    "ips_masked",
)


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
    mask_personal_data: bool = True
    """Put <EMAIL>, <PHONE>, <IP>, <CARD> and <NATIONAL_ID> in the place of what has the form of one."""
    min_characters: int = 1
    """A text with fewer characters, white space at its ends aside, is dropped."""


def clean_corpus(settings: CleaningSettings, out: Path, *, raw: Manifest) -> Outcome:
    """Write ``documents.parquet`` (order kept), ``changes.parquet`` (id, change, count) and ``dropped.parquet`` (id, reason)."""
    counts = dict.fromkeys(("documents_in", "kept", "dropped", "quarantined", "characters", "bytes", *CHANGES), 0)
    with ExitStack() as stack:
        documents = stack.enter_context(pq.ParquetWriter(out / "documents.parquet", DOCUMENT_SCHEMA, compression="zstd"))
        changes = stack.enter_context(TableWriter(out / "changes.parquet", CHANGES_SCHEMA))
        dropped = stack.enter_context(TableWriter(out / "dropped.parquet", DROPPED_SCHEMA))
        for group in map_row_groups(partial(_clean_group, settings=settings), raw.file("documents.parquet")):
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


def _clean_group(group: RowGroup, *, settings: CleaningSettings) -> _Cleaned:
    changes, dropped, counts, tables = [], [], Counter[str](), []
    for batch in group.batches():
        rows, texts = [], []
        for row, (name, raw) in enumerate(zip(batch["id"].to_pylist(), batch["text"].to_pylist(), strict=True)):
            text, found = clean(raw or "", settings)
            counts.update({"documents_in": 1, **found})
            changes += [{"id": name, "change": change, "count": count} for change, count in found.items()]
            if len(text.strip()) < settings.min_characters:
                dropped.append({"id": name, "reason": f"fewer than {settings.min_characters} characters"})
                continue
            rows.append(row)
            texts.append(text)
            counts.update(kept=1, characters=len(text))
        kept = batch.take(pa.array(rows, pa.int64()))
        cleaned = pa.array(texts, pa.string())
        counts["bytes"] += int(pc.sum(pc.binary_length(cleaned)).as_py() or 0)
        tables.append(
            pa.Table.from_batches([kept.set_column(batch.schema.get_field_index("text"), DOCUMENT_SCHEMA.field("text"), cleaned)])
        )
    counts["dropped"] = len(dropped)
    return _Cleaned(pa.concat_tables(tables) if tables else DOCUMENT_SCHEMA.empty_table(), changes, dropped, counts)


PIECE_CHARACTERS = 4 * 1024 * 1024
"""A longer text is cleaned in pieces of about this length, cut at line ends, so that what cleaning needs beside the text stays small."""


def clean(text: str, settings: CleaningSettings) -> tuple[str, dict[str, int]]:
    """Return the cleaned `text`, and how often each kind of change was made, zeros left out."""
    found: Counter[str] = Counter()
    if settings.html == "extract":
        text, changes = extract_html(text)
        found.update(changes)
    stages: list[tuple[bool, Callable[[str], tuple[str, dict[str, int]]]]] = [
        (settings.repair_encoding, repair_encoding),
        (settings.normalise_newlines, _normalise_newlines),
        (settings.remove_control_characters, _remove_control_characters),
        (settings.mask_personal_data, mask_personal_data),
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


_EMAIL = re.compile(r"(?<![\w.%+-])[A-Za-z0-9][\w.%+-]{0,63}@[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63}){0,8}\.[A-Za-z]{2,24}\b", re.ASCII)
_NUMBER = re.compile(
    r"""(?<![\w.+-])(?:
        (?P<card>\d{4}([ -])\d{4}\2\d{4}\2\d{4} | 3[47]\d\d([ -])\d{6}\3\d{5} | \d{13,16}) (?!\w|[.,-]\d)
      | (?P<national_id>\d{3}-\d\d-\d{4}) (?![\w-])
      | (?P<phone>\+[1-9]\d{0,2}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{1,4}(?:[ .-]?\d{2,4}){1,5}
          | (?:1[ .-])?\(\d{3}\)[ ]?\d{3}[ .-]\d{4} | (?:1-)?\d{3}-\d{3}-\d{4} | (?:1\.)?\d{3}\.\d{3}\.\d{4}) (?![\w-]|\.\d)
      | (?P<ip>\d{1,3}(?:\.\d{1,3}){3}) (?!\w|\.\d|-\w)
    )""",
    re.VERBOSE | re.ASCII,
)
_ISSUER = re.compile(r"4(?:\d{12}|\d{15})|5[1-5]\d{14}|2[2-7]\d{14}|3[47]\d{13}|6(?:011|5\d\d)\d{12}")
"""First digits and lengths of Visa, Mastercard, American Express and Discover (ISO/IEC 7812)."""
_VERSION_BEFORE = re.compile(
    r"(?:\b(?:versions?|ver\.?|release|v|sections?|sec\.|chapter|clause|paragraph)|§)\s*$",
    re.IGNORECASE,
)
_ADDRESS_BEFORE = re.compile(r"(?:\bip|\baddress|\bhost|\bserver|\bfrom|\bping|\bdns|\bsubnet|\bgateway)\b.{0,12}$|//$|@$", re.IGNORECASE)


def mask_personal_data(text: str) -> tuple[str, dict[str, int]]:
    """Return `text` with e-mail addresses, card numbers, US social security numbers, phone numbers and IPv4 addresses replaced.

    Cards need an issuer's digits and a valid check digit. Four numbers that could be a version or a section (each below
    100, or after "version", "section" and the like) are taken for an address only where the words before them say so.
    Loopback, unspecified and netmask addresses stay: they point at nobody.
    """
    counts = dict.fromkeys(("emails_masked", "cards_masked", "national_ids_masked", "phones_masked", "ips_masked"), 0)
    if "@" in text:
        text, counts["emails_masked"] = _EMAIL.subn("<EMAIL>", text)

    def replace(match: re.Match[str]) -> str:
        kind = match.lastgroup or ""
        if not _is_personal(kind, match):
            return match[0]
        counts[f"{kind}s_masked"] += 1
        return f"<{kind.upper()}>"

    return _NUMBER.sub(replace, text), counts


def _is_personal(kind: str, match: re.Match[str]) -> bool:
    digits = re.sub(r"\D", "", match[0])
    if kind == "card":
        return _ISSUER.fullmatch(digits) is not None and _has_check_digit(digits)
    if kind == "phone":
        return 8 <= len(digits) <= 15  # E.164 allows 15
    if kind == "ip":
        return _is_address(match)
    return True


def _has_check_digit(digits: str) -> bool:
    """Return whether `digits` end in their Luhn check digit (ISO/IEC 7812-1, annex B)."""
    doubled = [int(digit) * (1 + place % 2) for place, digit in enumerate(reversed(digits))]
    return sum(number - 9 if number > 9 else number for number in doubled) % 10 == 0


def _is_address(match: re.Match[str]) -> bool:
    octets = [int(part) for part in match[0].split(".")]
    if max(octets) > 255 or octets[0] in (0, 127, 255):
        return False
    before = match.string[max(0, match.start() - 30) : match.start()]
    if _VERSION_BEFORE.search(before):
        return False
    return max(octets) >= 100 or _ADDRESS_BEFORE.search(before) is not None


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
