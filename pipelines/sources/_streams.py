"""Byte streams of the file sources: plain, gzip and zstd files in chunks, and chunks cut into pieces, in bounded memory.

A compressed stream that ends early or is damaged raises `StreamCutError` after everything before the damage was given out.
Damage that still decompresses shows in the checksum at the end of its gzip member (or zstd frame, where it has one), so what
stands between it and that end may have been given out already.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Protocol

CHUNK_BYTES = 64 * 1024
"""Read at a time; gzip expands it to at most 66 MB (zlib technical details: 1032 to 1)."""

MAX_PIECE_BYTES = 64 * 1024 * 1024
"""A line or document longer than this is not held in memory."""

ZSTD_WINDOW_BYTES = 2**31
"""The window of ``zstd --long=31``, used by large published dumps."""


class StreamCutError(Exception):
    """A stream that ends early or is damaged; `rest` is what was read after the last separator."""

    def __init__(self, reason: str, rest: bytes = b"") -> None:
        super().__init__(reason)
        self.reason = reason
        self.rest = rest


class Decoder(Protocol):
    """What `zlib` and `zstandard` call a decompression object: one gzip member or zstd frame."""

    eof: bool
    unused_data: bytes

    def decompress(self, data: bytes, /) -> bytes: ...


def chunks(path: Path) -> Iterator[bytes]:
    """Yield the bytes of `path`, decompressed where its name ends in ``.gz`` or ``.zst``.

    Raises:
        StreamCutError: the compressed stream is cut or damaged.
    """
    with path.open("rb") as file:
        raw = iter(lambda: file.read(CHUNK_BYTES), b"")
        if path.suffix == ".gz":
            yield from gunzip(raw)
        elif path.suffix == ".zst":
            yield from _unzstd(raw)
        else:
            yield from raw


def gunzip(raw: Iterable[bytes]) -> Iterator[bytes]:
    """Yield what the gzip members in `raw` hold; checksums are verified.

    Raises:
        StreamCutError: the stream is cut or damaged.
    """
    yield from _decompressed(raw, lambda: zlib.decompressobj(wbits=31), (zlib.error,), padding=b"\x00")


def _unzstd(raw: Iterable[bytes]) -> Iterator[bytes]:
    import zstandard

    context = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_BYTES)
    yield from _decompressed(raw, context.decompressobj, (zstandard.ZstdError,))


def _decompressed(
    raw: Iterable[bytes], new: Callable[[], Decoder], errors: tuple[type[Exception], ...], *, padding: bytes = b""
) -> Iterator[bytes]:
    """Yield the content of a sequence of members, each read by a decoder of its own."""
    decoder: Decoder | None = None
    for chunk in raw:
        while chunk := (chunk if decoder else chunk.lstrip(padding)):
            decoder = decoder or new()
            try:
                yield decoder.decompress(chunk)
            except errors as error:
                raise StreamCutError(f"damaged compressed stream: {error}") from None
            chunk, decoder = (decoder.unused_data, None) if decoder.eof else (b"", decoder)
    if decoder:
        raise StreamCutError("compressed stream ends early")


def pieces(stream: Iterable[bytes], separator: bytes) -> Iterator[bytes]:
    """Yield the pieces of `stream` between occurrences of `separator`, and what follows the last one unless it is empty.

    A piece longer than `MAX_PIECE_BYTES` is cut, but stays longer than that, so that its length tells.

    Raises:
        StreamCutError: `stream` raised it; `rest` holds the piece that was being read.
    """
    pending = bytearray()
    seam = len(separator) - 1  # a separator may begin in one chunk and end in the next
    try:
        for chunk in stream:
            start = max(0, len(pending) - seam)
            pending += chunk
            while (end := pending.find(separator, start)) >= 0:
                yield bytes(pending[: min(end, MAX_PIECE_BYTES + 1)])
                del pending[: end + len(separator)]
                start = 0
            del pending[MAX_PIECE_BYTES + 1 : len(pending) - seam]
    except StreamCutError as cut:
        raise StreamCutError(cut.reason, bytes(pending)) from None
    if pending:
        yield bytes(pending)
