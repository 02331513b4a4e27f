"""Plain text files: a file is a document, or several with a separator between them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pydantic import model_validator

from pipelines.documents import Document, Quarantined
from pipelines.errors import GristmillError
from pipelines.files import shown_path
from pipelines.sources._rows import FileSource, excerpt
from pipelines.sources._streams import MAX_PIECE_BYTES, StreamCutError, chunks, pieces


class Text(FileSource):
    """The locator is the file, or ``file:n`` for the n-th document of a file with separators. ``.gz`` and ``.zst`` are read too."""

    separator: str | None = None
    """What stands between two documents of a file; null: the file is one document. Blank documents are skipped."""
    encoding: str = "utf-8"
    """A codec of Python; bytes that it does not decode put their document in quarantine."""

    @model_validator(mode="after")
    def _codec_known(self) -> Text:
        try:
            plain = "\n".encode(self.encoding) == b"\n"
        except (LookupError, UnicodeError):
            raise GristmillError(f"encoding {self.encoding!r} is not a text codec of Python; 'utf-8' is one, 'cp1252' another") from None
        if self.separator == "" or (self.separator and not plain):
            rule = "a separator is not empty, and its encoding contains ASCII (not UTF-16 or UTF-32)"
            remedy = "set separator: null for one document a file"
            raise GristmillError(f"separator {self.separator!r} with encoding {self.encoding!r}: {rule}; {remedy}")
        return self

    def read(self, domain: str, snapshot: str, *, root: Path) -> Iterator[Document | Quarantined]:
        for path in self.files(domain, snapshot, root=root):
            name = shown_path(path, root)
            read = self._one(path, name) if self.separator is None else self._several(path, name, self.separator.encode(self.encoding))
            for raw, locator in read:
                yield raw if isinstance(raw, Quarantined) else self._document(raw, locator, self.filled(domain, snapshot))

    def _one(self, path: Path, name: str) -> Iterator[tuple[bytes | Quarantined, str]]:
        raw = bytearray()
        try:
            for chunk in chunks(path):
                raw += chunk
                if len(raw) > MAX_PIECE_BYTES:
                    break
        except StreamCutError as cut:
            yield Quarantined(name, cut.reason, excerpt(bytes(raw))), name
            return
        yield bytes(raw), name

    def _several(self, path: Path, name: str, separator: bytes) -> Iterator[tuple[bytes | Quarantined, str]]:
        number = 0
        try:
            for number, raw in enumerate(pieces(chunks(path), separator), start=1):
                if raw.strip():
                    yield raw, f"{name}:{number}"
        except StreamCutError as cut:
            yield Quarantined(f"{name}:{number + 1}", cut.reason, excerpt(cut.rest)), name

    def _document(self, raw: bytes, locator: str, values: dict[str, str]) -> Document | Quarantined:
        if len(raw) > MAX_PIECE_BYTES:
            return Quarantined(locator, f"document longer than {MAX_PIECE_BYTES} bytes", excerpt(raw))
        try:
            text = raw.decode(self.encoding)
        except UnicodeDecodeError:
            return Quarantined(locator, f"text is not {self.encoding}", excerpt(raw))
        return Document(text=text.removeprefix("\ufeff"), locator=locator, **values)
