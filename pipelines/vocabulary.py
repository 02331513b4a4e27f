"""Vocabulary: what a tokenizer makes of text, counted while it is encoded, and compared by domain.

Fertility is tokens per word; a word is what stands between ASCII white space, so it says little of scripts without spaces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.documents import split_partition, write_table
from pipelines.manifests import Json, Manifest

VOCABULARY = "vocabulary.parquet"
"""The ids that a shard uses, the ends of its documents left out, and how often."""
IDS_AT_A_TIME = 1_000_000


@dataclass
class Usage:
    """Counts over a shard, made as it is written."""

    used: np.ndarray
    """int64, shape (vocabulary,): how often each id is used."""
    documents: int = 0
    passages: int = 0
    bytes: int = 0
    characters: int = 0
    words: int = 0

    @classmethod
    def of_vocabulary(cls, size: int) -> Usage:
        """Return counts of nothing, for ids below `size`."""
        return cls(np.zeros(size, dtype=np.int64))

    def add(self, texts: pa.Array, ids: np.ndarray, *, passages: int) -> None:
        """Count `texts`, whose ids are `ids`."""
        self.documents += len(texts)
        self.passages += passages
        self.bytes += pc.sum(pc.binary_length(texts)).as_py() or 0
        self.characters += pc.sum(pc.utf8_length(texts)).as_py() or 0
        self.words += num_words(texts)
        for first in range(0, len(ids), IDS_AT_A_TIME):
            self.used += np.bincount(ids[first : first + IDS_AT_A_TIME], minlength=len(self.used))

    def write(self, path: Path) -> None:
        """Write the ids that are used and how often, in their order."""
        ids = np.flatnonzero(self.used)
        write_table(path, pa.table({"token": pa.array(ids.astype(np.int32)), "count": pa.array(self.used[ids])}))

    @property
    def totals(self) -> dict[str, int]:
        """Counts for the outcome; `tokens` include an end of text per document, `used_tokens` are distinct and do not."""
        return {
            "documents": self.documents,
            "passages": self.passages,
            "tokens": int(self.used.sum()) + self.documents,
            "bytes": self.bytes,
            "characters": self.characters,
            "words": self.words,
            "used_tokens": int(np.count_nonzero(self.used)),
        }

    @property
    def rates(self) -> dict[str, float]:
        """Bytes per token and tokens per word, the ends of documents left out; 0 of nothing."""
        tokens = int(self.used.sum())
        return {"bytes_per_token": self.bytes / tokens if tokens else 0.0, "tokens_per_word": tokens / self.words if self.words else 0.0}


def num_words(texts: pa.Array) -> int:
    """Return how many stretches without ASCII white space the strings of `texts` hold."""
    texts = texts.cast(pa.large_string())
    offsets = np.frombuffer(texts.buffers()[1], np.int64)[texts.offset : texts.offset + len(texts) + 1]
    if not len(texts) or offsets[-1] == offsets[0]:
        return 0
    content = np.frombuffer(texts.buffers()[2], np.uint8)[offsets[0] : offsets[-1]]
    white = (content - np.uint8(9)) <= 4  # tab to carriage return
    white |= content == 32
    begins = np.empty(len(white), dtype=bool)
    begins[1:] = white[:-1]
    begins[(offsets[:-1] - offsets[0])[np.diff(offsets) > 0]] = True
    return int(np.count_nonzero(begins > white))


def by_domain(shards: Sequence[Manifest]) -> list[dict[str, Json]]:
    """Return a row per domain of tokenized_shards artifacts that share a tokenizer: fertility and the part of the vocabulary it uses."""
    counts: dict[str, dict[str, int]] = {}
    used: dict[str, np.ndarray] = {}
    size = max((int(manifest.outcome.details["vocabulary_size"]) for manifest in shards), default=0)  # type: ignore[arg-type]
    for manifest in shards:
        domain, _ = split_partition(manifest.partition or "")
        held = counts.setdefault(domain, {})
        for key, value in manifest.counts.items():
            held[key] = held.get(key, 0) + value
        mask = used.setdefault(domain, np.zeros(size, dtype=bool))
        mask[pq.read_table(manifest.file(VOCABULARY), columns=["token"])["token"].to_numpy()] = True
    domains_of = sum((mask.astype(np.int64) for mask in used.values()), start=np.int64(0))
    rows: list[dict[str, Json]] = []
    for domain, held in sorted(counts.items()):
        tokens, mask = held["tokens"] - held["documents"], used[domain]
        rows.append(
            {
                "domain": domain,
                "tokens": tokens,
                "bytes_per_token": held["bytes"] / tokens if tokens else None,
                "tokens_per_word": tokens / held["words"] if held["words"] else None,
                "vocabulary_share": float(mask.mean()) if len(mask) else None,
                "own_tokens": int(np.count_nonzero(mask & (domains_of == 1))),
            }
        )
    return rows
