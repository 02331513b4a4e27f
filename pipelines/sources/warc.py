"""WARC archives of web crawls (ISO 28500), plain or gzip, read with the warcio package.

A document is the payload of a response record with HTML or plain text, decoded by its declared character set and
otherwise as it came: cleaning extracts the text of HTML. A record cut short, by the file's end or by the crawler, is
quarantined; after damage that loses the record boundaries, so is the rest of its file.
"""

from __future__ import annotations

import codecs
import io
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pipelines.documents import Document, Quarantined
from pipelines.files import shown_path
from pipelines.sources._rows import FileSource, excerpt
from pipelines.sources._streams import (
    CHUNK_BYTES,
    MAX_PIECE_BYTES,
    StreamCutError,
    chunks,
    gunzip,
)

if TYPE_CHECKING:
    from warcio.recordloader import ArcWarcRecord

HTTP_VERSIONS = ["HTTP/1.0", "HTTP/1.1", "HTTP/2", "HTTP/2.0"]

WEB_CHARSETS = {
    "iso-8859-1": "cp1252",
    "latin1": "cp1252",
    "us-ascii": "cp1252",
    "ascii": "cp1252",
    "gb2312": "gb18030",
    "gbk": "gb18030",
    "shift_jis": "cp932",
    "euc-kr": "cp949",
}
"""What web pages mean by a label (WHATWG Encoding Standard, section 4.2), where Python means a smaller set."""

HEADER_CHARSET = re.compile(r"""charset\s*=\s*["']?\s*([A-Za-z0-9_:.-]+)""", re.IGNORECASE)
META_CHARSET = re.compile(rb"""<meta[^>]{0,200}?charset\s*=\s*["']?\s*([A-Za-z0-9_:.-]+)""", re.IGNORECASE)
META_SEARCH_BYTES = 1024
"""A page's charset stands in its first 1024 bytes (HTML Standard, section 4.2.5.4)."""


class Warc(FileSource):
    """The locator is the record's id, or ``file:n`` for the n-th record where it has none."""

    content_types: tuple[str, ...] = ("text/html", "application/xhtml+xml", "text/plain")
    """Payloads read; other records are not documents."""
    statuses: tuple[int, ...] = (200,)
    """HTTP statuses read; a page that tells of an error is not a document."""
    record_types: tuple[Literal["response", "resource", "conversion"], ...] = ("response",)
    """`conversion` reads the extracted text of WET files."""

    def read(self, domain: str, snapshot: str, *, root: Path) -> Iterator[Document | Quarantined]:
        for path in self.files(domain, snapshot, root=root):
            yield from self._documents(path, shown_path(path, root), self.filled(domain, snapshot))

    def _documents(self, path: Path, name: str, values: dict[str, str]) -> Iterator[Document | Quarantined]:
        from warcio.archiveiterator import ArchiveIterator
        from warcio.exceptions import ArchiveLoadFailed

        number = 0
        try:
            for number, record in enumerate(ArchiveIterator(_Reader(chunks(path)), no_record_parse=True), start=1):
                if record.rec_type is None or record.length is None:  # ISO 28500, section 5: both are mandatory
                    yield Quarantined(f"{name}:{number}", "record header ends early or lacks its type or length")
                elif record.rec_type in self.record_types and (found := self._document(record, f"{name}:{number}", values)):
                    yield found
        except (StreamCutError, ArchiveLoadFailed) as error:
            yield Quarantined(f"{name}:{number + 1}", "archive damaged from here to its end", excerpt(str(error).strip()))

    def _document(self, record: ArcWarcRecord, place: str, values: dict[str, str]) -> Document | Quarantined | None:
        """Return the document of `record`, or None where its type or status says that it is not one."""
        header = record.rec_headers.get_header
        locator = (header("WARC-Record-ID") or place).strip("<>")
        body, cut = _body(record)
        if cut:  # whatever its type: the headers that tell it may be cut as well
            return Quarantined(locator, cut, excerpt(body))
        content = _http_content(body) if record.rec_type == "response" else _Content(200, header("Content-Type") or "", body)
        if content is None:
            return Quarantined(locator, "HTTP response cannot be read", excerpt(body))
        media_type = content.type.partition(";")[0].strip().lower()
        if content.status not in self.statuses or media_type not in self.content_types:
            return None
        if truncated := header("WARC-Truncated"):
            return Quarantined(locator, f"record truncated by the crawler ({truncated})", excerpt(content.payload))
        if len(body) > MAX_PIECE_BYTES:
            return Quarantined(locator, f"record longer than {MAX_PIECE_BYTES} bytes", excerpt(content.payload))
        try:
            text = decode_page(content.payload, content.type)
        except (LookupError, UnicodeError):
            return Quarantined(locator, "payload is not in its declared character set", excerpt(content.payload))
        fields = {"url": header("WARC-Target-URI"), "date": header("WARC-Date"), "metadata": json.dumps({"content_type": media_type})}
        return Document(text=text, locator=locator, **{**values, **{field: value for field, value in fields.items() if value}})


@dataclass(frozen=True)
class _Content:
    status: int
    type: str
    payload: bytes


class _Reader:
    """The file object that warcio reads from: it passes `StreamCutError` on, where warcio's own gzip reader ends silently."""

    def __init__(self, stream: Iterator[bytes]) -> None:
        self._stream = (chunk for chunk in stream if chunk)

    def read(self, size: int = -1) -> bytes:
        return next(self._stream, b"")


def _body(record: ArcWarcRecord) -> tuple[bytes, str]:
    """Return the bytes of `record`, no more than a chunk beyond `MAX_PIECE_BYTES`, and, where the file lacks some, why."""
    body = bytearray()
    try:
        while len(body) <= MAX_PIECE_BYTES and (chunk := record.raw_stream.read(CHUNK_BYTES)):
            body += chunk
    except StreamCutError as cut:
        return bytes(body), f"record ends early: {cut.reason}"
    short = len(body) < min(record.length, MAX_PIECE_BYTES)
    return bytes(body), "record ends early" if short else ""


def _http_content(body: bytes) -> _Content | None:
    """Return what the HTTP response `body` carries, without its transfer and content encodings, or None if it is not one."""
    from warcio.bufferedreaders import ChunkedDataReader
    from warcio.statusandheaders import (
        StatusAndHeadersParser,
        StatusAndHeadersParserException,
    )

    stream = io.BytesIO(body)
    try:
        headers = StatusAndHeadersParser(HTTP_VERSIONS).parse(stream)
        status = int(headers.get_statuscode())
    except (StatusAndHeadersParserException, EOFError, ValueError):
        return None
    payload = stream.read()
    if (headers.get_header("Transfer-Encoding") or "").lower() == "chunked":
        payload = ChunkedDataReader(io.BytesIO(payload)).read()
    decoded = _without_encoding(payload, (headers.get_header("Content-Encoding") or "").strip().lower())
    return None if decoded is None else _Content(status, headers.get_header("Content-Type") or "", decoded)


def _without_encoding(payload: bytes, encoding: str) -> bytes | None:
    """Undo content encoding `encoding`, or return None; crawlers that undo it themselves often leave the header there."""
    try:
        if encoding in ("gzip", "x-gzip") and payload.startswith(b"\x1f\x8b"):
            return b"".join(gunzip([payload]))
        if encoding == "deflate":
            return zlib.decompress(payload, wbits=15 if payload[:1] == b"\x78" else -15)
    except (StreamCutError, zlib.error):
        return None
    return payload if encoding in ("", "identity", "gzip", "x-gzip") else None


def decode_page(payload: bytes, content_type: str) -> str:
    """Decode a page: by its byte order mark, else the charset of `content_type`, else its ``<meta>``, else UTF-8.

    Raises:
        LookupError: an unknown charset.
        UnicodeError: bytes that are not in it.
    """
    for mark, charset in ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16")):
        if payload.startswith(mark):
            return payload.decode(charset)
    declared = HEADER_CHARSET.search(content_type)
    meta = META_CHARSET.search(payload[:META_SEARCH_BYTES])
    label = (declared.group(1) if declared else meta.group(1).decode("ascii") if meta else "utf-8").lower()
    return payload.decode(WEB_CHARSETS.get(label, label))
