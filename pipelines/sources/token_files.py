"""Files of token ids that other trainers read: documents decoded to text, to be filtered and tokenized like any others.

The ids are decoded by the tokenizer that made them. A byte-level tokenizer gives the bytes back exactly; a document whose bytes
are not UTF-8, as where one was cut inside a character, is quarantined.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from pydantic import field_validator

from pipelines import plugins
from pipelines.documents import Document, Quarantined
from pipelines.errors import GristmillError, UnknownName
from pipelines.files import matching_files, shown_path
from pipelines.sources._rows import EXCERPT_CHARACTERS, FileSource, Template, excerpt, expand
from pipelines.sources._streams import MAX_PIECE_BYTES
from pipelines.token_bytes import byte_characters
from pipelines.token_formats import TokenFormat, Vocabulary

if TYPE_CHECKING:
    from tokenizers import Tokenizer

DECODED = 1 << 20
"""Ids that are decoded at a time."""
MAX_IDS = MAX_PIECE_BYTES // 4
"""A document with more is not held in memory: the end of text was not found, most likely."""
REPLACEMENT = "\ufffd"


class TokenFiles(FileSource):
    """The locator is ``file:n`` for the n-th document of a file. `paths` names the token files; their indexes stand beside them."""

    format: str
    """A plugin of `token_formats/`."""
    tokenizer: Template
    """The ``tokenizer.json`` that the ids came from. Placeholders allowed."""
    end_of_text: str = "<|endoftext|>"
    """The token between documents."""

    @field_validator("format")
    @classmethod
    def _format_known(cls, name: str) -> str:
        plugins.load("token_formats", name)
        return name

    def read(self, domain: str, snapshot: str, *, root: Path) -> Iterator[Document | Quarantined]:
        tokenizer = _load(self._tokenizer_file(domain, snapshot, root))
        end_of_text = tokenizer.token_to_id(self.end_of_text)
        if end_of_text is None:
            special = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
            raise UnknownName(f"special token in {self.tokenizer}", self.end_of_text, special)
        known = np.zeros(max(tokenizer.get_vocab().values()) + 1, dtype=bool)
        known[list(tokenizer.get_vocab().values())] = True
        decode = _decoder(tokenizer)
        values = self.filled(domain, snapshot)
        files = self._token_files(domain, snapshot, root)
        for path, number, ids in self._format.read(files, vocabulary=Vocabulary(tokenizer.get_vocab_size(), end_of_text)):
            locator = f"{shown_path(path, root)}:{number}"
            if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= len(known) or not known[ids].all()):
                rule = f"ids from {int(ids.min())} to {int(ids.max())} are not all among the {known.sum()} of {self.tokenizer}"
                raise GristmillError(f"{locator}: {rule}; name the tokenizer that they came from, and the right `format`")
            yield _document(decode, ids, locator, values)

    def files(self, domain: str, snapshot: str, *, root: Path) -> list[Path]:
        tokens = self._token_files(domain, snapshot, root)
        read_too = {beside for path in tokens for beside in self._format.companions(path)}
        return sorted({*tokens, *read_too, self._tokenizer_file(domain, snapshot, root)}, key=lambda file: file.as_posix())

    def modules(self) -> tuple[str, ...]:
        return (f"pipelines.token_formats.{self.format}",)

    @property
    def _format(self) -> TokenFormat:
        return plugins.build("token_formats", self.format)  # type: ignore[return-value]

    def _token_files(self, domain: str, snapshot: str, root: Path) -> list[Path]:
        return super().files(domain, snapshot, root=root)

    def _tokenizer_file(self, domain: str, snapshot: str, root: Path) -> Path:
        found = matching_files(expand(self.tokenizer, domain, snapshot), root)
        if len(found) != 1:
            raise GristmillError(f"tokenizer {self.tokenizer!r} names {len(found)} files; name one tokenizer.json")
        return found[0]


def _document(decode: Callable[[np.ndarray], bytes], ids: np.ndarray, locator: str, values: dict[str, str]) -> Document | Quarantined:
    if len(ids) > MAX_IDS:
        return Quarantined(locator, f"document longer than {MAX_IDS} ids", excerpt(decode(ids[:EXCERPT_CHARACTERS])))
    raw = decode(ids)
    try:
        return Document(text=raw.decode(), locator=locator, **values)
    except UnicodeDecodeError:
        return Quarantined(locator, "text is not UTF-8", excerpt(raw))


def _load(path: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    try:
        whole = "model" in json.loads(path.read_bytes())
    except (ValueError, TypeError):
        whole = False
    if not whole:
        raise GristmillError(f"{path} is not the tokenizer.json of a Hugging Face tokenizer; name the one that the ids came from")
    return Tokenizer.from_file(str(path))


def _decoder(tokenizer: Tokenizer) -> Callable[[np.ndarray], bytes]:
    """Return what turns ids into bytes: exactly where the tokenizer is byte-level, else as far as its own decoder goes."""
    kind = json.loads(tokenizer.to_str()).get("decoder") or {}
    if kind.get("type") != "ByteLevel":
        return lambda ids: _marked(tokenizer.decode(ids.tolist(), skip_special_tokens=False))
    byte_of = byte_characters()
    table = {number: token.content.encode() for number, token in tokenizer.get_added_tokens_decoder().items()}
    for token, number in tokenizer.get_vocab(with_added_tokens=False).items():
        if number not in table:
            table[number] = bytes(byte_of[c] for c in token) if byte_of.keys() >= set(token) else token.encode()

    def exact(ids: np.ndarray) -> bytes:
        blocks = (ids[first : first + DECODED].tolist() for first in range(0, len(ids), DECODED))
        return b"".join(b"".join(map(table.__getitem__, block)) for block in blocks)

    return exact


def _marked(text: str) -> bytes:
    """Return `text` as bytes; what its tokenizer could not decode becomes a byte that is not UTF-8."""
    return text.encode().replace(REPLACEMENT.encode(), b"\xff")
