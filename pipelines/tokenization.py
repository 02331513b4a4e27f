"""Tokenization: train one byte-level BPE on a pinned sample, then write each source partition as memory-mapped token ids.

A document is encoded whole and followed by the end-of-text token. `passages.parquet` maps each passage (a stretch of
characters, see `pipelines.documents.passages`) to its tokens, so that selection ranks passages and training reads them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.documents import TableWriter, passages, read_batches, row_count, stable_fraction
from pipelines.errors import EmptyInput
from pipelines.manifests import Check, Manifest, Member, Outcome
from pipelines.plugins import Settings
from pipelines.shards import DOCUMENTS, PASSAGES, TOKENS, TokenShard, token_dtype

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END_OF_TEXT = "<|endoftext|>"
"""Ends every document; also the padding and beginning token of the tokenizer's directory."""

TOKENIZATION_PACKAGES = ("tokenizers",)
DOCUMENTS_PER_BATCH = 200


class TokenizerSettings(Settings):
    """A byte-level BPE (Radford et al. 2019, section 2.2: byte-level BPE with GPT-2's pre-tokenizer)."""

    vocabulary_size: int = 4096
    """Number of tokens, the 256 bytes and the end-of-text token included."""
    sample_bytes: int = 8_000_000
    """Bytes of training-split text that are read, an equal part per domain; the last document of a domain is read whole."""


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
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(out / "tokenizer.json"))
    _write_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": END_OF_TEXT,
            "eos_token": END_OF_TEXT,
            "pad_token": END_OF_TEXT,
            "clean_up_tokenization_spaces": False,
        },
    )
    num_bytes = sum(len(text.encode()) for text in texts)
    return Outcome(counts={"documents": len(texts), "sample_bytes": num_bytes, "vocabulary_size": tokenizer.get_vocab_size()})


def tokenize_documents(settings: PassageSettings, out: Path, *, cleaned: Manifest, tokenizer: Manifest) -> Outcome:
    """Encode every document of `cleaned`; write token ids, the document index and the passage index.

    Token ids are uint16 where the vocabulary allows it, else uint32, little-endian. A token belongs to the passage in
    which its first character stands.
    """
    encoder = load_tokenizer(tokenizer.directory)
    encoder.encode_special_tokens = True  # text that spells the end-of-text token must not end a document
    end_of_text = encoder.token_to_id(END_OF_TEXT)
    dtype = token_dtype(encoder.get_vocab_size())
    position = num_bytes = num_characters = 0
    with (
        (out / TOKENS).open("wb") as tokens,
        TableWriter(out / DOCUMENTS, DOCUMENT_INDEX) as documents,
        TableWriter(out / PASSAGES, PASSAGE_INDEX) as index,
    ):
        for ids, texts in _batches(cleaned.file("documents.parquet")):
            for name, text, encoding in zip(ids, texts, encoder.encode_batch(texts, add_special_tokens=False), strict=True):
                tokens.write(np.asarray([*encoding.ids, end_of_text], dtype=dtype).tobytes())
                length = len(encoding.ids) + 1
                size = len(text.encode())
                documents.write({"id": name, "offset": position, "length": length, "bytes": size})
                for number, first, count in passage_tokens(text, encoding.offsets, settings.max_characters):
                    index.write({"id": name, "passage": number, "offset": position + first, "length": count})
                position += length
                num_bytes += size
                num_characters += len(text)
        num_documents, num_passages = documents.rows, index.rows
    content = position - num_documents
    return Outcome(
        counts={"documents": num_documents, "passages": num_passages, "tokens": position, "bytes": num_bytes, "characters": num_characters},
        metrics={"bytes_per_token": num_bytes / content if content else 0.0},
        details={"dtype": dtype.str, "vocabulary_size": encoder.get_vocab_size()},
    )


DOCUMENT_INDEX = pa.schema([("id", pa.string()), ("offset", pa.int64()), ("length", pa.int64()), ("bytes", pa.int64())])
PASSAGE_INDEX = pa.schema([("id", pa.string()), ("passage", pa.int32()), ("offset", pa.int64()), ("length", pa.int64())])


def passage_tokens(text: str, offsets: Sequence[tuple[int, int]], max_characters: int) -> Iterator[tuple[int, int, int]]:
    """Yield ``(passage, first token, number of tokens)`` for each passage of `text`.

    Args:
        offsets: the ``(start, end)`` characters of each token, in order.
    """
    starts = np.fromiter((start for start, _ in offsets), dtype=np.int64, count=len(offsets))
    for number, (start, end) in enumerate(passages(text, max_characters)):
        first, last = np.searchsorted(starts, [start, end])
        yield number, int(first), int(last - first)


def load_tokenizer(directory: Path) -> Tokenizer:
    """Load the tokenizer in `directory`."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(directory / "tokenizer.json"))


def _batches(path: Path) -> Iterator[tuple[list[str], list[str]]]:
    for batch in read_batches(path, ["id", "text"], rows=DOCUMENTS_PER_BATCH):
        yield batch.column("id").to_pylist(), batch.column("text").to_pylist()


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


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")


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
    """The audit that a shard's ids decode to the cleaned text, byte for byte, for evenly spaced documents."""

    cleaned: Manifest
    tokenizer: Manifest
    documents: int = 50
    check_name = "decodes_back"

    def __call__(self, draft: Manifest) -> Check:
        shard, decoder = TokenShard(draft), load_tokenizer(self.tokenizer.directory)
        path = self.cleaned.file("documents.parquet")
        step = max(1, row_count(path) // self.documents)
        tried = wrong = 0
        for number, (_, text) in enumerate(pair for ids, texts in _batches(path) for pair in zip(ids, texts, strict=True)):
            if number % step == 0:
                tried += 1
                wrong += decoder.decode(shard.document_tokens(number)[:-1].tolist(), skip_special_tokens=False) != text
        found = f"{tried - wrong} of {tried} documents decode to their text"
        return Check(name="decodes_back", passed=wrong == 0, description=found, metadata={"tried": tried})
