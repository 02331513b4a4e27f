"""A small trainable corpus for benchmarks: texts of a Parquet file as tokenizer, shards and selection, by the project's own steps."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.documents import DOCUMENT_SCHEMA, TableWriter, document_id, stable_fraction
from pipelines.manifests import Manifest, Member, Outcome, read_manifest
from pipelines.plugins import Settings
from pipelines.store import Build, Store
from pipelines.tokenization import PassageSettings, TokenizerSettings, tokenize_documents, train_tokenizer

DOMAIN = "text"
HELD_OUT = 0.05


class TextSettings(Settings):
    """The files whose texts are a corpus."""

    paths: tuple[str, ...]
    """Parquet files with a column `text`."""
    max_bytes: int
    """About as much is taken, by a stable hash of the text."""


@dataclass(frozen=True)
class TokenCorpus:
    """What training reads."""

    store: Store
    tokenizer: Manifest
    shards: tuple[Manifest, ...]
    selection: tuple[Member, ...]
    decisions: Manifest

    def save(self, path: Path) -> None:
        """Write where everything lies, for another process."""
        members = [(str(member.manifest.directory), member.name) for member in self.selection]
        shards = [str(manifest.directory) for manifest in self.shards]
        places = {"store": str(self.store.root), "tokenizer": str(self.tokenizer.directory), "decisions": str(self.decisions.directory)}
        path.write_text(json.dumps({**places, "shards": shards, "selection": members}), encoding="utf-8")


def reopened(path: Path) -> TokenCorpus:
    """Return the corpus that `save` wrote to `path`."""
    found = json.loads(path.read_text(encoding="utf-8"))
    return TokenCorpus(
        Store(Path(found["store"])),
        read_manifest(Path(found["tokenizer"])),
        tuple(read_manifest(Path(shard)) for shard in found["shards"]),
        tuple(Member(manifest=read_manifest(Path(directory)), name=name) for directory, name in found["selection"]),
        read_manifest(Path(found["decisions"])),
    )


def token_corpus(paths: list[Path], directory: Path, *, vocabulary_size: int, max_bytes: int) -> TokenCorpus:
    """Tokenize texts of `paths` in a store at `directory`; every twentieth document is held out."""
    store = Store(directory)
    texts = TextSettings(paths=tuple(map(str, paths)), max_bytes=max_bytes)
    corpus = store.build(Build(asset="cleaned_corpus", partition=f"{DOMAIN}|2026-01-01", step=write_texts, settings=texts)).manifest
    splits = store.build(Build(asset="duplicate_clusters", step=split_documents, settings=Settings(), inputs={"corpus": corpus})).manifest
    tokenizer = store.build(
        Build(
            asset="tokenizer",
            step=train_tokenizer,
            settings=TokenizerSettings(vocabulary_size=vocabulary_size, sample_bytes=max_bytes),
            inputs={"sample": (corpus,), "splits": (Member(manifest=splits, name="documents.parquet"),)},
        )
    ).manifest
    shard = store.build(
        Build(
            asset="tokenized_shards",
            partition=corpus.partition,
            step=tokenize_documents,
            settings=PassageSettings(),
            inputs={"cleaned": corpus, "tokenizer": tokenizer},
        )
    ).manifest
    inputs = {"shard": shard, "splits": splits}
    chosen = store.build(Build(asset="selected_subset", step=select_everything, settings=Settings(), inputs=inputs)).manifest
    return TokenCorpus(store, tokenizer, (shard,), (Member(manifest=chosen, name="general.parquet"),), splits)


def write_texts(settings: TextSettings, out: Path) -> Outcome:
    """Write texts as documents, in the order of a hash of the text, until there are enough."""
    rows = duckdb.sql("select distinct text from read_parquet($paths)", params={"paths": list(settings.paths)}).fetchall()
    taken = 0
    with TableWriter(out / "documents.parquet", DOCUMENT_SCHEMA) as writer:
        for number, (text,) in enumerate(sorted(rows, key=lambda row: (stable_fraction("benchmark", row[0]), row[0]))):
            if taken >= settings.max_bytes:
                break
            taken += len(text.encode())
            writer.write({"id": document_id(DOMAIN, str(number), text), "text": text, "domain": DOMAIN, "source": "benchmark"})
        count = writer.rows
    return Outcome(counts={"documents_in": count, "kept": count, "dropped": 0, "quarantined": 0})


def split_documents(settings: Settings, out: Path, *, corpus: Manifest) -> Outcome:
    """Write the split of every document."""
    names = pq.read_table(corpus.file("documents.parquet"), columns=["id"])["id"].to_pylist()
    split = ["held_out" if stable_fraction("benchmark split", name) < HELD_OUT else "train" for name in names]
    table = pa.table({"id": names, "domain": [DOMAIN] * len(names), "kept": [True] * len(names), "split": split})
    for name in ("documents.parquet", "decisions.parquet"):
        pq.write_table(table, out / name)
    return Outcome(counts={"documents": len(names)})


def select_everything(settings: Settings, out: Path, *, shard: Manifest, splits: Manifest) -> Outcome:
    """Write a selection of every passage of the training split."""
    rows = duckdb.sql(
        "select p.id, p.passage, $domain as domain, 'general' as role, p.length as tokens, true as selected "
        "from read_parquet($passages) p join read_parquet($splits) s using (id) where s.split = 'train' order by p.\"offset\"",
        params={
            "domain": DOMAIN,
            "passages": str(shard.file("passages.parquet")),
            "splits": str(splits.file("documents.parquet")),
        },
    )
    rows.write_parquet(str(out / "general.parquet"))
    return Outcome()
