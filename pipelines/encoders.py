"""Encoders: text to token ids, exactly those that `tokenizers` gives, by the fastest backend that proves to give them.

`tokenizer.json` and `tokenizers` define the ids. A backend of `BACKENDS` is an accelerator that may be absent: before its use it
encodes odd strings and a sample of the text, and one text in `VERIFIED_EVERY` while it runs, as `tokenizers` does too. Whatever
it does otherwise (a difference, an exception, no package) leads back to `tokenizers`, so that ids never depend on the backend.

Measured on 156 MB of text that no cache had seen, with 8k and 32k tokens, in megabytes per CPU second: fastokens 0.3.5 132 and
144, gigatoken 0.10.0 154 and 150, tokenizers 0.23.3 2.3. gigatoken is left out: of 180,000 odd texts it cuts 5 elsewhere (beside
unassigned characters of planes 2 and up; fastokens none), too few for a sample to show, and its cache grows without bound
(2.8 GB after 480 MB of random words; fastokens stays at 387 MB).
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from pipelines.batch import SpecialTokens
from pipelines.errors import GristmillError
from pipelines.manifests import Json
from pipelines.odd_texts import odd_texts
from pipelines.token_bytes import TokenBytes, composes, steps, token_bytes

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
REFERENCE = "tokenizers"
"""The backend that defines the ids."""
VERIFIED_EVERY = 200
ODD_TEXTS = 1_000
LONGEST_VERIFIED = 2_000
"""Characters: of a longer text as many are encoded once more, by both."""
FOLDED_TO_ASCII = "\u017f\u212a"
"""Long s and the Kelvin sign, which patterns without case (that of o200k) hold for s and k: fastokens 0.3.5 cuts words beside them
elsewhere, so texts with one of them are left to `tokenizers`."""
VERIFIED_STEPS = ("ByteLevel", "Digits")
VERIFIED_PATTERNS = frozenset(
    (
        # Llama 3
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        # Qwen 2
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        # o200k
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
        r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    )
)
"""Patterns that fastokens 0.3.5 reads as `tokenizers` does, as it does its own `VERIFIED_STEPS`: no difference in 120,000 odd texts
each. Of any other it may take U+180E for white space: one odd text in 600 differed with GPT-2's pattern written out."""
CHARACTERS_AT_A_TIME = 500_000
"""Of text that `tokenizers` encodes at once: it holds some 200 bytes per token."""

Result = TypeVar("Result")
Encode = Callable[[Sequence[str]], tuple[np.ndarray, np.ndarray]]
"""Texts to their ids, joined (uint32), and to the bounds of each (int64, one more than texts)."""


class BackendFailed(GristmillError):
    """A backend has not given the ids that `tokenizers` gives."""


@dataclass(frozen=True)
class Encoded:
    """A batch of encoded texts."""

    ids: np.ndarray
    """uint32, shape (n,): the ids of all texts."""
    bounds: np.ndarray
    """int64, shape (texts + 1,): where the ids of each text begin and end."""
    starts: np.ndarray
    """uint32, or int64 from 4 GB on, shape (n,), never falling: the byte of the joined text at which each token begins."""


@dataclass
class Encoder:
    """A tokenizer with the backend that runs it; `open_encoder` makes one."""

    tokenizer: Tokenizer
    """The definition."""
    encode_ids: Encode
    backend: str
    reason: str | None = None
    """Why no faster backend runs, None where one does."""
    bytes_of: TokenBytes | None = None
    """The bytes of each token, where the tokenizer is byte-level."""
    composes: bool = False
    """Whether the tokenizer brings texts into composed form (NFC) first; most are."""
    verified: int = 0
    """Texts that were encoded by `tokenizers` too."""
    _seen: int = field(default=0, repr=False)

    def encode(self, texts: Sequence[str], num_bytes: np.ndarray | None = None) -> Encoded:
        """Return the ids of `texts`, without special tokens; text that spells one is text.

        Args:
            num_bytes: int64, the UTF-8 bytes of each text, where they are known.

        Raises:
            BackendFailed: the backend fails or gives other ids than `tokenizers`; a `reference` encoder goes on.
        """
        sizes = np.fromiter((len(text.encode()) for text in texts), np.int64, len(texts)) if num_bytes is None else num_bytes
        if self.bytes_of is None:
            return self._with_offsets(texts, sizes)
        alone = np.fromiter((self._stands_alone(text) for text in texts), bool, len(texts))
        if not alone.any():
            return self._by_lengths(texts, sizes)
        parts = {
            kind: chosen(_taken(texts, np.flatnonzero(mask)), sizes[mask])
            for kind, mask, chosen in ((True, alone, self._with_offsets), (False, ~alone, self._by_lengths))
        }
        return _merged(parts[True], parts[False], alone, sizes)

    def _stands_alone(self, text: str) -> bool:
        """Return whether `text` is left to `tokenizers`: the fast path may read its characters in another way, or not know their place."""
        if text.isascii():
            return False
        folds = any([character in text for character in FOLDED_TO_ASCII])  # noqa: C419  a generator takes three times as long
        return folds or (self.composes and not unicodedata.is_normalized("NFC", text))

    def _by_lengths(self, texts: Sequence[str], sizes: np.ndarray) -> Encoded:
        """Encode by the backend; where a token begins follows from the bytes of those before it."""
        ids, bounds = _attempt(self.backend, lambda: self.encode_ids(texts))
        if self.backend != REFERENCE:
            first, self._seen = self._seen, self._seen + len(texts)
            self.verify(texts, ids, bounds, range(-(first + 1) % VERIFIED_EVERY, len(texts), VERIFIED_EVERY))
        return Encoded(ids, bounds, self._starts(texts, ids, bounds, sizes))

    def verify(self, texts: Sequence[str], ids: np.ndarray, bounds: np.ndarray, numbers: Sequence[int]) -> None:
        """Encode the texts `numbers` by `tokenizers`, and compare with their `ids`.

        Raises:
            BackendFailed: they are others.
        """
        if not numbers:
            return
        clipped = [texts[number][:LONGEST_VERIFIED] for number in numbers]
        wanted, ends = reference_ids(self.tokenizer)(clipped)
        given = [ids[bounds[number] : bounds[number + 1]] for number in numbers]
        for place, number in enumerate(numbers):
            if len(clipped[place]) < len(texts[number]):
                given[place] = _attempt(self.backend, lambda place=place: self.encode_ids([clipped[place]]))[0]
            if not np.array_equal(given[place], wanted[ends[place] : ends[place + 1]]):
                raise BackendFailed(f"{self.backend} gives other ids than tokenizers for a text that begins {clipped[place][:40]!r}")
        self.verified += len(numbers)

    def _starts(self, texts: Sequence[str], ids: np.ndarray, bounds: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """Return where tokens begin by the bytes of those before; texts to whose bytes those do not add up go by offsets."""
        assert self.bytes_of is not None
        starts = np.zeros(len(ids) + 1, dtype=_type_of_starts(sizes))
        np.cumsum(self.bytes_of.lengths_of(ids), out=starts[1:])
        held = np.diff(starts[bounds].astype(np.int64))
        wrong = np.flatnonzero(held != sizes)
        if not len(wrong):
            return starts[:-1]
        shift = np.cumsum(sizes) - sizes - (np.cumsum(held) - held)
        starts = starts[:-1] + np.repeat(shift, np.diff(bounds))
        for number in wrong:
            own = self._with_offsets([texts[number]], sizes[number : number + 1])
            if not np.array_equal(own.ids, ids[bounds[number] : bounds[number + 1]]):
                raise BackendFailed(f"{self.backend} gives other ids than tokenizers for a text that begins {texts[number][:40]!r}")
            starts[bounds[number] : bounds[number + 1]] = own.starts + sizes[:number].sum()
        return starts

    def _with_offsets(self, texts: Sequence[str], sizes: np.ndarray) -> Encoded:
        """Encode by `tokenizers`, which knows the characters of each token."""
        ids: list[np.ndarray] = []
        starts: list[np.ndarray] = []
        before = np.cumsum(sizes) - sizes
        for chunk in _chunks(texts):
            for encoding in self.tokenizer.encode_batch([texts[number] for number in chunk], add_special_tokens=False):
                number = len(ids)
                ids.append(np.asarray(encoding.ids, dtype=np.uint32))
                characters = np.fromiter((start for start, _ in encoding.offsets), np.int64, len(encoding.ids))
                starts.append(before[number] + np.maximum.accumulate(_byte_positions(texts[number])[characters]))
        bounds = np.cumsum([0, *map(len, ids)], dtype=np.int64)
        return Encoded(_joined(ids, np.uint32), bounds, _joined(starts, _type_of_starts(sizes)))

    def reference(self, reason: str) -> Encoder:
        """Return the encoder that `tokenizers` runs, with the reason for it."""
        return replace(self, encode_ids=reference_ids(self.tokenizer), backend=REFERENCE, reason=reason, verified=0)


def open_encoder(directory: Path, sample: Sequence[str] = (), *, backends: Sequence[str] | None = None) -> Encoder:
    """Open the tokenizer in `directory` with the first of `backends` that gives the ids of `tokenizers` for `sample` and odd strings.

    Args:
        backends: names in `BACKENDS`, all of them where None.
    """
    definition = _definition(directory)
    source = json.dumps(definition)
    tokenizer = _loaded(source, directory)
    encoder = Encoder(tokenizer, reference_ids(tokenizer), REFERENCE, bytes_of=token_bytes(definition), composes=composes(definition))
    if encoder.bytes_of is None:
        return encoder.reference("it is no byte-level BPE, and the place of a token is known to tokenizers alone")
    if not _is_read_alike(definition):
        return encoder.reference("it cuts text by a pattern that no faster backend was found to read alike")
    added = [str(token["content"]) for token in definition.get("added_tokens") or []]
    texts = [text[:LONGEST_VERIFIED] for text in (*odd_texts(added, count=ODD_TEXTS), *sample) if not encoder._stands_alone(text)]
    reasons = []
    for name in BACKENDS if backends is None else backends:
        try:
            encode = _attempt(name, lambda name=name: BACKENDS[name](source))
            candidate = replace(encoder, encode_ids=encode, backend=name)
            candidate.verify(texts, *_attempt(name, lambda encode=encode: encode(texts)), range(len(texts)))
        except BackendFailed as error:
            reasons.append(str(error))
        else:
            return candidate
    return encoder.reference("; ".join(reasons) or "no other was asked for")


def load_tokenizer(directory: Path) -> Tokenizer:
    """Load the tokenizer in `directory`: whole texts, nothing random, and text that spells a special token is text.

    Raises:
        GristmillError: there is none.
    """
    return _loaded(json.dumps(_definition(directory)), directory)


def _loaded(source: str, directory: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(source)
    except Exception as error:  # tokenizers raises no other class
        raise GristmillError(f"{directory / TOKENIZER} cannot be read by tokenizers ({error}); write it with an older version") from error
    tokenizer.encode_special_tokens = True
    return tokenizer


def special_tokens(directory: Path, tokenizer: Tokenizer | None = None) -> SpecialTokens:
    """Return the special tokens of the tokenizer in `directory`: end of text is its `eos_token`, else its `sep_token`.

    Args:
        tokenizer: the tokenizer, where it is loaded.

    Raises:
        GristmillError: it names neither, or a token that its vocabulary does not hold.
    """
    names = special_names(directory)
    tokenizer = tokenizer or load_tokenizer(directory)

    def number(name: str) -> int:
        found = tokenizer.token_to_id(name)
        if found is None:
            raise GristmillError(f"{directory / TOKENIZER_CONFIG} names the token {name!r}, which the tokenizer does not have; correct it")
        return int(found)

    mask = names.get("mask_token")
    return SpecialTokens(number(end_of_text(names, directory)), number(mask) if mask else None, vocabulary_size(tokenizer))


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """Return one more than the largest id: a vocabulary may have holes."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1


def special_names(directory: Path) -> dict[str, str]:
    """Return what the files beside the tokenizer call its special tokens: ``eos_token`` and so on."""
    names: dict[str, str] = {}
    for file in ("special_tokens_map.json", TOKENIZER_CONFIG):
        content = _read_json(directory / file) if (directory / file).is_file() else {}
        for key, value in content.items():
            text = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and isinstance(text, str):
                names[key] = text
    return names


def end_of_text(names: Mapping[str, str], directory: Path) -> str:
    """Return the token that ends a document, among the `special_names` of the tokenizer in `directory`.

    Raises:
        GristmillError: there is none.
    """
    for key in ("eos_token", "sep_token"):
        if key in names:
            return names[key]
    raise GristmillError(f"the tokenizer in {directory} has no token to end a document; name an eos_token in its {TOKENIZER_CONFIG}")


def reference_ids(tokenizer: Tokenizer) -> Encode:
    """Return the encoding of `tokenizers` itself."""

    def encode(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        ids = []
        for chunk in _chunks(texts):
            found = tokenizer.encode_batch_fast([texts[number] for number in chunk], add_special_tokens=False)
            ids += [np.asarray(encoding.ids, dtype=np.uint32) for encoding in found]
        return _joined(ids, np.uint32), np.cumsum([0, *map(len, ids)], dtype=np.int64)

    return encode


def _fastokens(source: str) -> Encode:
    from fastokens import Tokenizer

    tokenizer = Tokenizer.from_json_str(source)

    def encode(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        ids, bounds = tokenizer.encode_batch_flat(list(texts), split_special_tokens=True)
        return np.frombuffer(ids, "<u4"), np.frombuffer(bounds, "<u8").astype(np.int64)

    return encode


BACKENDS: dict[str, Callable[[str], Encode]] = {"fastokens": _fastokens}
"""Accelerators in the order in which they are tried, each made from a tokenizer.json."""


def _attempt(backend: str, call: Callable[[], Result]) -> Result:
    """Return what `call` returns.

    Raises:
        BackendFailed: it raised: an accelerator may not know a tokenizer, and native code that panics raises no Exception.
    """
    try:
        return call()
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except ImportError:
        raise BackendFailed(f"{backend} is not installed") from None
    except BaseException as error:
        if backend == REFERENCE:
            raise
        raise BackendFailed(f"{backend} failed ({type(error).__name__}: {str(error)[:200]})") from error


def _definition(directory: Path) -> dict[str, Json]:
    """Return the content of the tokenizer's file, without what cuts, pads or varies texts.

    Raises:
        GristmillError: there is no such file, or it holds no tokenizer.
    """
    path = directory / TOKENIZER
    if not path.is_file():
        raise GristmillError(
            f"{directory} holds no {TOKENIZER}; transformers writes one: AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    definition = _read_json(path)
    if not isinstance(definition.get("model"), dict):
        raise GristmillError(f"{path} describes no tokenizer: it has no model; give the directory of a Hugging Face tokenizer")
    definition |= {"truncation": None, "padding": None}
    if definition["model"].get("dropout"):
        definition["model"]["dropout"] = None
    return definition


def _is_read_alike(definition: Mapping[str, Json]) -> bool:
    """Return whether every step that cuts text is one of `VERIFIED_STEPS`, or cuts by one of `VERIFIED_PATTERNS`."""

    def known(step: Mapping[str, Json]) -> bool:
        pattern = step.get("pattern")
        cut = pattern.get("Regex") if isinstance(pattern, dict) else None
        whole = step.get("behavior") == "Isolated" and not step.get("invert")
        return step.get("type") in VERIFIED_STEPS or (step.get("type") == "Split" and whole and cut in VERIFIED_PATTERNS)

    return all(known(step) for step in steps(definition.get("pre_tokenizer")))


def _taken(texts: Sequence[str], numbers: np.ndarray) -> list[str]:
    return [texts[number] for number in numbers.tolist()]


def _merged(one: Encoded, other: Encoded, of_one: np.ndarray, sizes: np.ndarray) -> Encoded:
    """Return the batch whose texts are those of `one` where `of_one` holds and of `other` elsewhere, in order."""
    counts = np.empty(len(sizes), dtype=np.int64)
    counts[of_one], counts[~of_one] = np.diff(one.bounds), np.diff(other.bounds)
    bounds = np.concatenate([[0], np.cumsum(counts)])
    before = np.cumsum(sizes) - sizes
    ids, starts = np.empty(bounds[-1], np.uint32), np.empty(bounds[-1], _type_of_starts(sizes))
    for encoded, mask in ((one, of_one), (other, ~of_one)):
        places = np.repeat(mask, counts)
        own = np.cumsum(sizes[mask]) - sizes[mask]
        ids[places] = encoded.ids
        starts[places] = encoded.starts + np.repeat(before[mask] - own, counts[mask])
    return Encoded(ids, bounds, starts)


def _read_json(path: Path) -> dict[str, Json]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise GristmillError(f"{path} is not JSON ({error}); copy it anew") from error
    return content if isinstance(content, dict) else {}


def _chunks(texts: Sequence[str]) -> list[range]:
    """Return stretches of `texts` with at most `CHARACTERS_AT_A_TIME` each, but for a text that is longer."""
    chunks, first, held = [], 0, 0
    for number, text in enumerate(texts):
        if number > first and held + len(text) > CHARACTERS_AT_A_TIME:
            chunks.append(range(first, number))
            first, held = number, 0
        held += len(text)
    return [*chunks, range(first, len(texts))] if first < len(texts) else chunks


def _byte_positions(text: str) -> np.ndarray:
    """Return the byte at which each character of `text` begins, and that of its end; int64."""
    if text.isascii():
        return np.arange(len(text) + 1)
    content = np.frombuffer(text.encode(), np.uint8)
    return np.append(np.flatnonzero((content & 0xC0) != 0x80), len(content))


def _type_of_starts(sizes: np.ndarray) -> type[np.generic]:
    return np.uint32 if sizes.sum() < 2**32 else np.int64


def _joined(parts: Sequence[np.ndarray], dtype: type[np.generic]) -> np.ndarray:
    return np.concatenate(parts).astype(dtype, copy=False) if parts else np.empty(0, dtype)
