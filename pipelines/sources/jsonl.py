"""JSON Lines: one JSON object a line, UTF-8; plain, ``.gz`` or ``.zst``.

A line that is not a document is quarantined with its line number. So is what a cut or damaged compressed file still
holds after its last whole line; the lines before it are kept. Blank lines are skipped.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from pydantic import Field

from pipelines.documents import Document, Quarantined
from pipelines.files import shown_path
from pipelines.sources._rows import (
    FIELDS,
    DocumentField,
    FileSource,
    Template,
    as_text,
    document,
    excerpt,
    expand,
)
from pipelines.sources._streams import MAX_PIECE_BYTES, StreamCutError, chunks, pieces

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class JsonLines(FileSource):
    """Documents are lines; the locator is ``file:line``, lines counted from 1.

    A line that cannot be read belongs to no partition in particular and is quarantined in each that reads its file.
    """

    where: dict[str, Template] = Field(default_factory=dict)
    """Key -> value that an object must have to belong to the partition; placeholders allowed."""
    columns: dict[DocumentField, str | None] = Field(default_factory=dict)
    """Document field -> key; null leaves the field empty. Fields not named here take the key of their own name."""

    def read(self, domain: str, snapshot: str, *, root: Path) -> Iterator[Document | Quarantined]:
        where = {key: expand(value, domain, snapshot) for key, value in self.where.items()}
        for path in self.files(domain, snapshot, root=root):
            yield from self._documents(path, shown_path(path, root), where, self.filled(domain, snapshot))

    def _documents(self, path: Path, name: str, where: Mapping[str, str], values: Mapping[str, str]) -> Iterator[Document | Quarantined]:
        number = 0
        try:
            for number, line in enumerate(pieces(chunks(path), b"\n"), start=1):
                found = self._document(line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line, f"{name}:{number}", where, values)
                if found:
                    yield found
        except StreamCutError as cut:
            yield Quarantined(f"{name}:{number + 1}", cut.reason, excerpt(cut.rest))

    def _document(self, line: bytes, locator: str, where: Mapping[str, str], values: Mapping[str, str]) -> Document | Quarantined | None:
        """Return what `line` holds, or None where it is blank or belongs to another partition."""
        if not line.strip():
            return None
        if len(line) > MAX_PIECE_BYTES:
            return Quarantined(locator, f"line longer than {MAX_PIECE_BYTES} bytes", excerpt(line))
        try:
            row = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError:
            return Quarantined(locator, "line is not UTF-8", excerpt(line))
        except json.JSONDecodeError as error:
            return Quarantined(locator, f"not JSON: {error.msg}", excerpt(line))
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, or thousands of open brackets
            return Quarantined(locator, f"not readable as JSON: {type(error).__name__}", excerpt(line))
        if not isinstance(row, dict):
            return Quarantined(locator, f"line is {type(row).__name__}, not an object", excerpt(line))
        if any(as_text(row.get(key)) != value for key, value in where.items()):
            return None
        keys = {field: self.columns.get(field, field) for field in FIELDS}
        return document({field: row.get(key) for field, key in keys.items() if key is not None}, locator, values)
