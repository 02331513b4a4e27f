"""Tokenization: a byte-level BPE trained on a pinned sample, or a tokenizer that was brought; then each source partition as token ids.

train_tokenizer     the training split of a sample  -> a Hugging Face tokenizer directory
import_tokenizer    such a directory, or the hub    -> the same
tokenize_documents  cleaned documents               -> token ids, memory-mapped, with an index of documents and of passages

A document is encoded whole and followed by the end-of-text token. `passages.parquet` maps each passage (a stretch of
characters, see `pipelines.documents.passages`) to its tokens, so that selection ranks passages and training reads them.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field, model_validator

from pipelines import encoders
from pipelines.documents import batches_of, passages, read_batches, stable_fraction, table_writer
from pipelines.encoders import BackendFailed, Encoded, Encoder, open_encoder, special_tokens
from pipelines.errors import EmptyInput, GristmillError
from pipelines.files import file_hashes
from pipelines.manifests import Check, Manifest, Member, Outcome
from pipelines.model_files import Commit, downloaded, local_path
from pipelines.plugins import Settings
from pipelines.progress import warn
from pipelines.shards import DOCUMENTS, PASSAGES, TOKENS, TokenShard, token_dtype
from pipelines.vocabulary import VOCABULARY, Usage

END_OF_TEXT = "<|endoftext|>"
"""Ends every document; also the padding and beginning token of a trained tokenizer."""
MASK = "<|mask|>"
"""Stands for a hidden token; text never becomes it."""

TOKENIZATION_PACKAGES = ("tokenizers",)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
"""What is read of a tokenizer that was brought; all but the first may be missing."""
DOCUMENTS_PER_BATCH = 2_000
SAMPLED_DOCUMENTS, SAMPLED_BYTES, SAMPLED_GROUPS = 500, 1_000_000, 5
"""At most, of the sample that a backend is first tried on."""
SAMPLED_SHARE, FEWEST_SAMPLED_BYTES = 0.05, 50_000


class TokenizerSettings(Settings):
    """A byte-level BPE (Radford et al. 2019, section 2.2: GPT-2's pre-tokenizer) to be trained, or a tokenizer to be brought."""

    vocabulary_size: int = 4096
    """Number of tokens of one that is trained, the 256 bytes, the end-of-text and the mask token included."""
    sample_bytes: int = 8_000_000
    """Bytes of training-split text that it is trained on, an equal part per domain; the last document of a domain is read whole."""
    path: str | None = None
    """Instead of training: a directory with a tokenizer.json, relative to the project file."""
    hub: str | None = None
    """Instead of training: a repository on the Hugging Face hub, with `revision`."""
    revision: Commit | None = None
    """The commit of that repository."""
    files: dict[str, str] = Field(default_factory=dict)
    """File -> SHA-256 of the files in `path`; filled in where the project is read."""
    root: Path = Field(default=Path(), exclude=True)
    """Where relative paths start. Not part of the identity."""

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if self.path and self.hub:
            raise ValueError(f"path {self.path!r} and hub {self.hub!r} both name a tokenizer; give one")
        if bool(self.hub) != bool(self.revision):
            raise ValueError("hub and revision go together: give the repository and the full hash of a commit of it")
        trained = sorted({"vocabulary_size", "sample_bytes"} & self.model_fields_set)
        if self.brought and trained:
            raise ValueError(f"{' and '.join(trained)} belong to a tokenizer that is trained; leave them out, or leave out path and hub")
        return self

    @property
    def brought(self) -> bool:
        """Whether there is a tokenizer already."""
        return bool(self.path or self.hub)


class PassageSettings(Settings):
    """How documents are cut into passages."""

    max_characters: int = 1500
    """The longest passage, in characters."""


def train_tokenizer(settings: TokenizerSettings, out: Path, *, sample: tuple[Manifest, ...], splits: tuple[Member, ...]) -> Outcome:
    """Train on the training split of `sample` (cleaned corpora) and write a Hugging Face tokenizer directory.

    Every domain gives the same number of bytes at most; documents are taken in the order of a stable hash of their id.

    Raises:
        EmptyInput: the sample has no document in the training split.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    texts = _sample_texts(settings, sample, splits)
    if not texts:
        raise EmptyInput(
            "the tokenizer's sample has no training-split document; name snapshots that hold documents under `fit_on` in project.yaml"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocabulary_size,
        special_tokens=[END_OF_TEXT, MASK],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(out / "tokenizer.json"))
    _write_config(out, {**dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT), "mask_token": MASK})
    num_bytes = sum(len(text.encode()) for text in texts)
    return Outcome(counts={"documents": len(texts), "sample_bytes": num_bytes, "vocabulary_size": tokenizer.get_vocab_size()})


def located(settings: TokenizerSettings, root: Path) -> TokenizerSettings:
    """Return `settings` with the hashes of the files in `path`: what the tokenizer is belongs to its identity, not where it lies.

    Raises:
        GristmillError: there is no such directory, or it leaves `root`.
    """
    if not settings.path:
        return settings
    directory = local_path(settings.path, root, key="path")
    found = [directory / name for name in TOKENIZER_FILES if (directory / name).is_file()]
    return settings.model_copy(update={"files": file_hashes(found, root), "root": root})


def import_tokenizer(settings: TokenizerSettings, out: Path) -> Outcome:
    """Copy the tokenizer that `settings` names, and write what its special tokens are called.

    Text ends with its `eos_token`, else its `sep_token`; it is padded with its `pad_token`, else with that.

    Raises:
        GristmillError: it is no fast tokenizer, has no token to end a text, or is not the one that `settings` describes.
    """
    directory = _from_hub(settings) if settings.hub else local_path(str(settings.path), settings.root, key="path")
    for shown, sha256 in settings.files.items():
        if file_hashes([settings.root / shown], settings.root)[shown] != sha256:
            raise GristmillError(f"{shown} was changed while it was read; materialize the tokenizer again")
    encoders.load_tokenizer(directory)
    names = encoders.special_names(directory)
    ends = encoders.end_of_text(names, directory)
    shutil.copyfile(directory / TOKENIZER_FILES[0], out / TOKENIZER_FILES[0])
    _write_config(out, {"pad_token": ends, **names, "eos_token": ends})
    special = special_tokens(out)
    return Outcome(
        counts={"vocabulary_size": special.vocabulary_size},
        details={"end_of_text": ends, "end_of_text_id": special.end_of_text, "mask": names.get("mask_token"), "mask_id": special.mask},
    )


def _from_hub(settings: TokenizerSettings) -> Path:
    """Return the directory of the hub's cache that holds the tokenizer's files.

    Raises:
        GristmillError: the hub cannot be reached.
    """
    from huggingface_hub import snapshot_download

    patterns = list(TOKENIZER_FILES)
    return downloaded(
        lambda: snapshot_download(str(settings.hub), revision=settings.revision, allow_patterns=patterns), str(settings.hub), key="path"
    )


def tokenize_documents(settings: PassageSettings, out: Path, *, cleaned: Manifest, tokenizer: Manifest) -> Outcome:
    """Encode every document of `cleaned`; write token ids, the document index, the passage index and how often each id is used.

    Token ids are uint16 where the vocabulary allows it, else uint32, little-endian. A token belongs to the passage in
    which its first character stands. The bytes do not depend on the backend that encodes.
    """
    path = cleaned.file("documents.parquet")
    encoder = open_encoder(tokenizer.directory, backend_sample(path))
    end_of_text = special_tokens(tokenizer.directory, encoder.tokenizer).end_of_text
    usage, encoder = write_shard(path, out, encoder, end_of_text=end_of_text, max_characters=settings.max_characters)
    if encoder.reason:
        warn(f"{cleaned.label} is encoded by tokenizers, which is slower: {encoder.reason}")
    return Outcome(
        counts=usage.totals,
        metrics=usage.rates,
        details={
            "dtype": token_dtype(len(usage.used)).str,
            "vocabulary_size": len(usage.used),
            "backend": encoder.backend,
            "backend_reason": encoder.reason,
            "verified_texts": encoder.verified,
        },
    )


DOCUMENT_INDEX = pa.schema([("id", pa.string()), ("offset", pa.int64()), ("length", pa.int64()), ("bytes", pa.int64())])
PASSAGE_INDEX = pa.schema([("id", pa.string()), ("passage", pa.int32()), ("offset", pa.int64()), ("length", pa.int64())])


def backend_sample(path: Path) -> list[str]:
    """Return beginnings of documents spread over `path`, to try a backend on: a share of the text, within `SAMPLED_BYTES`."""
    metadata = pq.read_metadata(path)
    size = sum(metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups))
    budget = min(SAMPLED_BYTES, max(FEWEST_SAMPLED_BYTES, size * SAMPLED_SHARE))
    each = min(encoders.LONGEST_VERIFIED, max(1, size / max(1, metadata.num_rows)))
    found = _spread(path, min(SAMPLED_DOCUMENTS, math.ceil(budget / each)))
    return [text for _, texts in found for text in pc.utf8_slice_codeunits(texts, 0, encoders.LONGEST_VERIFIED).to_pylist()]


def _spread(path: Path, wanted: int) -> Iterator[tuple[list[int], pa.Array]]:
    """Yield at most `wanted` documents spread over `path`, as their rows and texts; `SAMPLED_GROUPS` row groups are read."""
    with pq.ParquetFile(path) as file:
        rows = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        groups = sorted({round(place) for place in np.linspace(0, len(rows) - 1, min(SAMPLED_GROUPS, len(rows)))})
        step, seen = max(1, math.ceil(sum(rows[group] for group in groups) / max(1, wanted))), 0
        for group in groups:
            first = sum(rows[:group])
            for batch in batches_of(file, ["text"], groups=[group], rows=DOCUMENTS_PER_BATCH):
                chosen = np.arange(-seen % step, batch.num_rows, step)
                yield (first + chosen).tolist(), batch.column("text").take(pa.array(chosen))
                seen, first = seen + batch.num_rows, first + batch.num_rows


def write_shard(path: Path, out: Path, encoder: Encoder, *, end_of_text: int, max_characters: int) -> tuple[Usage, Encoder]:
    """Write the documents of `path` as a shard; return what they use, and the encoder that has encoded them.

    Where a backend fails, or is found to give other ids, `tokenizers` encodes all of them anew.
    """
    try:
        return _write_shard(path, out, encoder, end_of_text, max_characters), encoder
    except BackendFailed as error:
        reference = encoder.reference(str(error))
        return _write_shard(path, out, reference, end_of_text, max_characters), reference


def _write_shard(path: Path, out: Path, encoder: Encoder, end_of_text: int, max_characters: int) -> Usage:
    usage = Usage.of_vocabulary(encoders.vocabulary_size(encoder.tokenizer))
    dtype, position = token_dtype(len(usage.used)), 0
    with ExitStack() as stack:
        tokens = stack.enter_context((out / TOKENS).open("wb"))
        documents = stack.enter_context(table_writer(out / DOCUMENTS, DOCUMENT_INDEX))
        index = stack.enter_context(table_writer(out / PASSAGES, PASSAGE_INDEX))
        for batch in read_batches(path, ["id", "text"], rows=DOCUMENTS_PER_BATCH):
            names, texts = batch.column("id"), batch.column("text").to_pylist()
            num_bytes = pc.binary_length(batch.column("text")).to_numpy(zero_copy_only=False).astype(np.int64)
            encoded = encoder.encode(texts, num_bytes)
            lengths = np.diff(encoded.bounds) + 1
            begin = position + np.cumsum(lengths) - lengths
            _ended(encoded, end_of_text, dtype).tofile(tokens)
            documents.write_table(pa.table([names, begin, lengths, num_bytes], schema=DOCUMENT_INDEX))
            owners, numbers, first, count = passage_tokens(texts, num_bytes, encoded, max_characters)
            offset = begin[owners] + first - encoded.bounds[owners]
            index.write_table(pa.table([names.take(pa.array(owners)), numbers, offset, count], schema=PASSAGE_INDEX))
            usage.add(batch.column("text"), encoded.ids, passages=len(owners))
            position += int(lengths.sum())
    usage.write(out / VOCABULARY)
    return usage


def _ended(encoded: Encoded, end_of_text: int, dtype: np.dtype) -> np.ndarray:
    """Return the ids of all texts, each followed by the end of text."""
    out = np.empty(len(encoded.ids) + len(encoded.bounds) - 1, dtype)
    ends = np.zeros(len(out), dtype=bool)
    ends[encoded.bounds[1:] + np.arange(len(encoded.bounds) - 1)] = True
    out[ends] = end_of_text
    out[~ends] = encoded.ids
    return out


def passage_tokens(
    texts: Sequence[str], num_bytes: np.ndarray, encoded: Encoded, max_characters: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return of each passage of `texts`: its text, its number there, the first of its tokens in `encoded` and their number; all int64.

    Args:
        num_bytes: int64, the UTF-8 bytes of each text.
    """
    owners, numbers, cuts = [], [], []
    for owner, (text, before) in enumerate(zip(texts, (np.cumsum(num_bytes) - num_bytes).tolist(), strict=True)):
        if 0 < len(text) <= max_characters:
            owners.append(owner)
            numbers.append(0)
            cuts.append(before)
            continue
        found = passages(text, max_characters)
        owners += [owner] * len(found)
        numbers += range(len(found))
        if text.isascii():
            cuts += [before + start for start, _ in found]
        else:
            cuts += (before + place for place in accumulate((len(text[s:e].encode()) for s, e in found[:-1]), initial=0))
    owner_of = np.asarray(owners, dtype=np.int64)
    low, high = encoded.bounds[owner_of], encoded.bounds[owner_of + 1]
    first = np.clip(np.searchsorted(encoded.starts, np.asarray(cuts, dtype=encoded.starts.dtype)), low, high)
    first = np.where(np.asarray(numbers, dtype=np.int64) == 0, low, first)
    following = np.append(first[1:], 0)
    last = np.where(np.append(owner_of[1:], -1) == owner_of, following, high)
    return owner_of, np.asarray(numbers, dtype=np.int64), first, last - first


def _sample_texts(settings: TokenizerSettings, sample: tuple[Manifest, ...], splits: tuple[Member, ...]) -> list[str]:
    train = {name for member in splits for name in _train_ids(member.path)}
    by_domain: dict[str, list[tuple[float, str, str]]] = {}
    for manifest in sample:
        for batch in read_batches(manifest.file("documents.parquet"), ["id", "text", "domain"]):
            for row in batch.to_pylist():
                if row["id"] in train:
                    by_domain.setdefault(row["domain"], []).append((stable_fraction("tokenizer", row["id"]), row["id"], row["text"]))
    texts: list[str] = []
    for domain in sorted(by_domain):
        budget = settings.sample_bytes // len(by_domain)
        for _, _, text in sorted(by_domain[domain]):
            if budget <= 0:
                break
            texts.append(text)
            budget -= len(text.encode())
    return texts


def _train_ids(path: Path) -> list[str]:
    table = pq.read_table(path, columns=["id", "split"])
    return table.filter(pa.compute.equal(table["split"], "train"))["id"].to_pylist()


def _write_config(out: Path, names: dict[str, str]) -> None:
    content = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **names}
    (out / "tokenizer_config.json").write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def documents_conserved(draft: Manifest) -> Check:
    """Every cleaned document is in the index, and the index covers the token file end to end."""
    shard = TokenShard(draft)
    lengths = int(shard.documents["length"].to_numpy().sum())
    passed = lengths == len(shard.tokens) == draft.counts["tokens"] and shard.documents.num_rows == draft.counts["documents"]
    return Check(
        name="documents_conserved",
        passed=passed,
        description=f"{shard.documents.num_rows} documents index {lengths} of {len(shard.tokens)} tokens",
        metadata={"documents": shard.documents.num_rows, "tokens": len(shard.tokens)},
    )


def passages_within_documents(draft: Manifest) -> Check:
    """The passages hold every token except one end of text per document."""
    held = int(pq.read_table(draft.directory / PASSAGES, columns=["length"])["length"].to_numpy().sum())
    expected = draft.counts["tokens"] - draft.counts["documents"]
    return Check(name="passages_within_documents", passed=held == expected, description=f"passages hold {held} of {expected} tokens")


TOKENIZATION_AUDITS = (documents_conserved, passages_within_documents)


@dataclass(frozen=True)
class DecodesBack:
    """The audit that a shard's ids stand for the cleaned text, for documents spread over it.

    The ids of a byte-level tokenizer are decoded and compared byte for byte; those of any other, which may lose something of the
    text, are compared with the ids that `tokenizers` gives.
    """

    cleaned: Manifest
    tokenizer: Manifest
    documents: int = 50
    check_name = "decodes_back"

    def __call__(self, draft: Manifest) -> Check:
        shard, encoder = TokenShard(draft), open_encoder(self.tokenizer.directory, backends=())
        tried = wrong = 0
        for numbers, texts in _spread(self.cleaned.file("documents.parquet"), self.documents):
            for number, text in zip(numbers, texts, strict=True):
                tried += 1
                wrong += not _stands_for(shard.document_tokens(number)[:-1], text.as_py(), encoder)
        done = "decode to their text" if encoder.bytes_of else "have the ids of their text"
        found = f"{tried - wrong} of {tried} documents {done}"
        return Check(name="decodes_back", passed=wrong == 0, description=found, metadata={"tried": tried})


def _stands_for(ids: np.ndarray, text: str, encoder: Encoder) -> bool:
    if encoder.bytes_of is None or (len(ids) and ids.max() >= len(encoder.bytes_of.lengths)):
        return np.array_equal(ids, encoder.encode([text]).ids)
    return encoder.bytes_of.decode(ids) == text.encode()
