"""The bytes of each token of a byte-level tokenizer: ids back to bytes, and the place of a token without offsets.

A byte-level tokenizer writes each byte as one printable character (Radford et al. 2019, section 2.2): the printable characters
of Latin-1 stand for themselves, the other 68 bytes are moved behind U+0100, in order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipelines.manifests import Json

IDS_AT_A_TIME = 1_000_000
IDS_IN_CACHE = 65_536


@dataclass(frozen=True)
class TokenBytes:
    """The bytes of every token of a vocabulary."""

    lengths: np.ndarray
    """Unsigned, as small as holds them, shape (vocabulary,): bytes of each token, 0 for an id that stands for none."""
    joined: np.ndarray
    """uint8: the bytes of all tokens in the order of their ids."""

    def lengths_of(self, ids: np.ndarray) -> np.ndarray:
        """Return the bytes of each of `ids`; in stretches that fit the cache, as numpy copies ids to index by them."""
        lengths = np.empty(len(ids), self.lengths.dtype)
        for first in range(0, len(ids), IDS_IN_CACHE):
            chosen = slice(first, first + IDS_IN_CACHE)
            self.lengths.take(ids[chosen], out=lengths[chosen], mode="clip")
        return lengths

    def decode(self, ids: np.ndarray) -> bytes:
        """Return the bytes that `ids` stand for; not every sequence of them is UTF-8."""
        return b"".join(self._decoded(ids[first : first + IDS_AT_A_TIME]) for first in range(0, len(ids), IDS_AT_A_TIME))

    def _decoded(self, ids: np.ndarray) -> bytes:
        lengths = self.lengths[ids].astype(np.int64)
        ends = np.cumsum(lengths)
        offsets = np.cumsum(self.lengths, dtype=np.int64)[ids] - lengths
        places = np.repeat(offsets - (ends - lengths), lengths) + np.arange(ends[-1] if len(ends) else 0)
        return self.joined[places].tobytes()


def byte_characters() -> dict[str, int]:
    """Return the byte that each of the 256 characters stands for."""
    printable = [byte for byte in range(256) if 0x21 <= byte <= 0x7E or (byte >= 0xA1 and byte != 0xAD)]
    moved = [byte for byte in range(256) if byte not in printable]
    return {**{chr(byte): byte for byte in printable}, **{chr(256 + place): byte for place, byte in enumerate(moved)}}


def token_bytes(definition: Mapping[str, Json]) -> TokenBytes | None:
    """Return the bytes of each token of the tokenizer that `definition` (the content of a tokenizer.json) describes.

    None where it is no byte-level BPE, or changes a text in composed form: bytes may then be others, or belong to no token.
    """
    if not _is_byte_level(definition):
        return None
    model: dict[str, Json] = definition["model"]  # type: ignore[assignment]
    added = {int(token["id"]): str(token["content"]) for token in definition.get("added_tokens") or []}  # type: ignore[union-attr]
    vocabulary = {int(number): token for token, number in model["vocab"].items()}  # type: ignore[union-attr]
    tokens = [vocabulary.get(number, "") for number in range(max([*vocabulary, *added], default=-1) + 1)]
    character_of = {byte: character for character, byte in byte_characters().items()}
    byte_of = np.full(0x110000, -1, dtype=np.int16)
    byte_of[[ord(character) for character in character_of.values()]] = list(character_of)

    def respell(numbers: Iterable[int]) -> None:
        """Spell in characters of bytes what is written as it is: added tokens, and those with other characters, which no text gives."""
        for number in numbers:
            tokens[number] = "".join(character_of[byte] for byte in added.get(number, tokens[number]).encode())

    respell(added)
    if (_looked_up(byte_of, tokens) < 0).any():
        respell(number for number, token in enumerate(tokens) if (_looked_up(byte_of, [token]) < 0).any())
    longest = max(map(len, tokens), default=0)
    lengths = np.fromiter(map(len, tokens), np.min_scalar_type(longest), len(tokens))
    return TokenBytes(lengths, _looked_up(byte_of, tokens).astype(np.uint8))


def _looked_up(byte_of: np.ndarray, tokens: Sequence[str]) -> np.ndarray:
    return byte_of[np.frombuffer("".join(tokens).encode("utf-32-le"), np.uint32)]


def _is_byte_level(definition: Mapping[str, Json]) -> bool:
    model = definition["model"]
    assert isinstance(model, dict)
    marks = ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    plain = model.get("type") == "BPE" and not any(model.get(key) for key in marks)
    as_it_is = composes(definition) or not definition.get("normalizer")
    found = list(steps(definition.get("pre_tokenizer")))
    return plain and as_it_is and any(s.get("type") == "ByteLevel" for s in found) and not any(s.get("add_prefix_space") for s in found)


def composes(definition: Mapping[str, Json]) -> bool:
    """Return whether the tokenizer's only change to text is to bring it into composed form (NFC)."""
    normalizer = definition.get("normalizer")
    return isinstance(normalizer, dict) and normalizer.get("type") == "NFC"


def steps(step: Json) -> Iterator[dict[str, Json]]:
    """Yield `step` of a pre-tokenizer, or the steps of a sequence."""
    inner: Sequence[Json] = step.get("pretokenizers") or [step] if isinstance(step, dict) else []
    yield from (found for found in inner if isinstance(found, dict))
