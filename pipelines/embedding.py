"""Embedding: documents to integer vectors, one per passage.

An embedder is fitted once on a sample of training documents; every partition is then embedded with that state, so that all
vectors lie in one space. Vectors are unit vectors scaled to norm 4,000 and rounded, which makes their dot products exact.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, model_validator

from pipelines import plugins
from pipelines.documents import TableWriter, partition_file, passages, read_batches, row_count, stable_fraction
from pipelines.embedders import Embedder
from pipelines.embedders._grid import NORM, to_integer_rows
from pipelines.errors import EmptyInput, GristmillError
from pipelines.files import file_hashes
from pipelines.manifests import Check, Manifest, Member, Outcome
from pipelines.plugins import Settings
from pipelines.store import advisory

PASSAGE_SCHEMA = pa.schema(
    [("id", pa.string()), ("passage", pa.int32()), ("start", pa.int64()), ("end", pa.int64()), ("bytes", pa.int64())]
)
"""`start` and `end` are character offsets into the document's cleaned text; `bytes` is the length of the passage in UTF-8."""

EMBEDDER_FILE = "embedder.json"
BATCH = 1_000
LARGEST_ZERO_SHARE = 0.01
NORM_TOLERANCE = 20
"""Rounding d components moves a row's norm by sqrt(d)/2 at most: 20 covers d = 1,600."""


class EmbedderSettings(Settings):
    """Which embedder is fitted, and on how much."""

    embedder: str = "static_words"
    """Module of `embedders/`."""
    settings: dict[str, int | float | str | bool | None] = Field(default_factory=dict)
    """Settings of the embedder."""
    max_characters: int = Field(default=1_500, ge=1)
    """Characters of a passage at most."""
    sample_passages: int = Field(default=20_000, ge=1)
    """Passages of training documents that the embedder is fitted on, at most."""
    files: dict[str, str] = Field(default_factory=dict)
    """File -> SHA-256 of every local file that changes the vectors; `located` fills it in."""
    root: Path = Field(default=Path(), exclude=True)
    """Where relative paths start; the same project elsewhere makes the same vectors."""

    @model_validator(mode="after")
    def _known_embedder(self) -> EmbedderSettings:
        plugins.build("embedders", self.embedder, self.settings)
        return self


class EmbeddingSettings(Settings):
    """How documents are cut before they are embedded."""

    max_characters: int = Field(default=1_500, ge=1)
    """Characters of a passage at most; tokenized shards must be cut alike for selection to count tokens."""
    root: Path = Field(default=Path(), exclude=True)
    """Where relative paths of the embedder start."""


def located(settings: EmbedderSettings, root: Path) -> EmbedderSettings:
    """Return `settings` with `root`, and with the hashes of the files that the embedder reads.

    Raises:
        GristmillError: one of them does not exist.
    """
    files = file_hashes(_embedder(settings.embedder, settings.settings, root).files(), root)
    return settings.model_copy(update={"files": files, "root": root})


def _embedder(name: str, settings: Mapping[str, object], root: Path) -> Embedder:
    return cast(Embedder, plugins.build("embedders", name, settings)).at(root)


def fit_embedder(settings: EmbedderSettings, out: Path, *, sample: tuple[Manifest, ...], splits: tuple[Member, ...]) -> Outcome:
    """Fit the embedder on a stable sample of the training documents' passages; write its state and `EMBEDDER_FILE`.

    Args:
        sample: cleaned_corpus artifacts, each with ``documents.parquet``.
        splits: files ``splits/<domain>@<snapshot>.parquet`` of duplicate_clusters, one per artifact of `sample`.

    Raises:
        EmptyInput: no training document among `sample` holds text.
        GristmillError: a partition has no split file.
    """
    by_file = {Path(member.name).name: member for member in splits}
    heap: list[tuple[float, str, int, str]] = []
    documents = 0
    for corpus in sample:
        train = _train_ids(corpus, by_file)
        documents += len(train)
        for entry in _entries(corpus, train, settings.max_characters):
            # Largest fractions leave first: what stays does not depend on the order of the corpora.
            (heapq.heappush if len(heap) < settings.sample_passages else heapq.heappushpop)(heap, entry)
    if not heap:
        labels = ", ".join(corpus.label for corpus in sample) or "no corpus"
        raise EmptyInput(f"embedder {settings.embedder!r}: no training text in {labels}; check that the split leaves documents in train")
    texts = [text for _, _, _, text in sorted(heap, reverse=True)]
    embedder = _embedder(settings.embedder, settings.settings, settings.root)
    metrics = embedder.fit(texts, out)
    record = {"name": settings.embedder, "settings": embedder.model_dump(mode="json")}
    (out / EMBEDDER_FILE).write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    counts = {"train_documents": documents, "sample_passages": len(texts), "sample_characters": sum(map(len, texts))}
    return Outcome(counts=counts, metrics=metrics)


def _train_ids(corpus: Manifest, splits: dict[str, Member]) -> set[str]:
    name = partition_file(corpus.partition or "")
    if name not in splits:
        raise GristmillError(
            f"{corpus.label} has no split file {name!r} among the inputs; materialize duplicate_clusters with this partition"
        )
    table = pq.read_table(splits[name].path, columns=["id", "split"])
    return {name for name, split in zip(table["id"].to_pylist(), table["split"].to_pylist(), strict=True) if split == "train"}


def _entries(corpus: Manifest, train: set[str], max_characters: int) -> Iterator[tuple[float, str, int, str]]:
    """Yield ``(-fraction, id, passage, text)`` of every passage of the documents in `train`."""
    for name, text in _texts(corpus):
        if name in train:
            for number, (start, end) in enumerate(passages(text, max_characters)):
                yield -stable_fraction("embedder", name, str(number)), name, number, text[start:end]


def _texts(corpus: Manifest) -> Iterator[tuple[str, str]]:
    for batch in read_batches(corpus.file("documents.parquet"), ["id", "text"]):
        yield from zip(batch["id"].to_pylist(), batch["text"].to_pylist(), strict=True)


def embed_documents(settings: EmbeddingSettings, out: Path, *, cleaned: Manifest, embedder: Manifest) -> Outcome:
    """Cut the documents of `cleaned` into passages and embed each; write ``passages.parquet`` and ``embeddings.npy``.

    Memory is bounded by one batch of passages. A document without text has no passage and is counted.
    """
    record = json.loads(embedder.file(EMBEDDER_FILE).read_text(encoding="utf-8"))
    plugin = _embedder(record["name"], record["settings"], settings.root)
    documents = without_text = characters = 0
    with TableWriter(out / "passages.parquet", PASSAGE_SCHEMA) as writer:
        for name, text in _texts(cleaned):
            cuts = passages(text, settings.max_characters)
            documents, without_text, characters = documents + 1, without_text + (not cuts), characters + len(text)
            for number, (start, end) in enumerate(cuts):
                size = len(text[start:end].encode())
                writer.write({"id": name, "passage": number, "start": start, "end": end, "bytes": size})
    zeros = 0
    dimensions = plugin.embed([""], embedder.directory).shape[1]
    pieces = (text[start:end] for _, text in _texts(cleaned) for start, end in passages(text, settings.max_characters))
    with (out / "embeddings.npy").open("wb") as file:  # appended, not mapped: a full disk is then an error and not a signal
        header = {"descr": "<i2", "fortran_order": False, "shape": (writer.rows, dimensions)}
        np.lib.format.write_array_header_1_0(file, header)
        while batch := list(islice(pieces, BATCH)):
            rows = to_integer_rows(plugin.embed(batch, embedder.directory))
            zeros += int((~rows.any(axis=1)).sum())
            file.write(rows.astype("<i2").tobytes())
    counts = {
        "documents": documents,
        "documents_without_text": without_text,
        "passages": writer.rows,
        "zero_vectors": zeros,
        "characters": characters,
        "dimensions": dimensions,
    }
    return Outcome(counts=counts, metrics={"share_zero_vectors": zeros / max(1, writer.rows)})


def embedder_is_readable(draft: Manifest) -> Check:
    """The written state embeds a text to one finite vector, of norm 1 or 0."""
    record = json.loads((draft.directory / EMBEDDER_FILE).read_text(encoding="utf-8"))
    vectors = plugins.build("embedders", record["name"], record["settings"]).embed(["the first words of a text"], draft.directory)
    norm = float(np.linalg.norm(vectors))
    passed = len(vectors) == 1 and (norm == 0 or abs(norm - 1) < 1e-5)
    return Check(name="embedder_is_readable", passed=passed, description="the state on disk embeds a text", metadata={"norm": norm})


def one_row_per_passage(draft: Manifest) -> Check:
    """`embeddings.npy` has one row for every row of `passages.parquet`."""
    num_passages, rows = row_count(draft.directory / "passages.parquet"), len(_embeddings(draft))
    return Check(
        name="one_row_per_passage",
        passed=num_passages == rows == draft.counts["passages"],
        description="one vector for every passage",
        metadata={"passages": num_passages, "rows": rows},
    )


def passages_cover_documents(draft: Manifest) -> Check:
    """Passages are numbered from 0, follow one another without gap or overlap, and hold every character."""
    table = pq.read_table(draft.directory / "passages.parquet")
    number, start, end = (table[name].to_numpy() for name in ("passage", "start", "end"))
    first = number == 0
    continues = np.zeros(len(number), dtype=bool)
    continues[1:] = (np.diff(number) == 1) & (start[1:] == end[:-1])
    broken = int((~np.where(first, start == 0, continues)).sum()) + int((end <= start).sum())
    uncovered = draft.counts["characters"] - int((end - start).sum())
    missing = draft.counts["documents"] - draft.counts["documents_without_text"] - int(first.sum())
    return Check(
        name="passages_cover_documents",
        passed=broken == uncovered == missing == 0,
        description="the passages of a document follow one another and hold all of its text",
        metadata={"broken": broken, "characters_uncovered": uncovered, "documents_missing": missing},
    )


def vectors_on_grid(draft: Manifest) -> Check:
    """Every row has norm `NORM` up to rounding, or is zero."""
    off = sum(int((np.abs(norms[norms > 0] - NORM) > NORM_TOLERANCE).sum()) for norms in _norms(draft))
    return Check(name="vectors_on_grid", passed=off == 0, description=f"rows have norm {NORM} or 0", metadata={"off": off})


@advisory
def few_zero_vectors(draft: Manifest) -> Check:
    """At most 1% of the passages have no vector; more means that the embedder does not know this text."""
    zeros, total = sum(int((norms == 0).sum()) for norms in _norms(draft)), max(1, draft.counts["passages"])
    return Check(
        name="few_zero_vectors",
        passed=zeros <= LARGEST_ZERO_SHARE * total,
        description=f"at most {LARGEST_ZERO_SHARE:.0%} of the passages hold no known word",
        metadata={"zero_vectors": zeros, "share": zeros / total},
    )


def _embeddings(draft: Manifest) -> np.ndarray:
    return np.load(draft.directory / "embeddings.npy", mmap_mode="r" if draft.counts["passages"] else None)


def _norms(draft: Manifest) -> Iterator[np.ndarray]:
    rows = _embeddings(draft)
    for start in range(0, len(rows), 10_000):
        yield np.linalg.norm(rows[start : start + 10_000].astype(np.float64), axis=1)


EMBEDDER_AUDITS = (embedder_is_readable,)
EMBEDDING_AUDITS = (one_row_per_passage, passages_cover_documents, vectors_on_grid, few_zero_vectors)
