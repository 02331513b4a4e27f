"""A small project of real text for tests of the later steps: corpora, tokenizer, shards, decisions and a selection of everything."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
from conftest import corpus

from pipelines import probing, training
from pipelines.manifests import Json, Manifest, Member, Outcome
from pipelines.models import ModelSettings
from pipelines.plan import TrainingSettings, training_plugins
from pipelines.plugins import Settings
from pipelines.run_limits import BudgetReached
from pipelines.store import Build, Store
from pipelines.tokenization import PassageSettings, TokenizerSettings, tokenize_documents, train_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SAMPLE = Path(__file__).parents[1] / "data" / "sample" / "corpus.parquet"
ROLES = {"wiki": "general", "book": "general", "legal": "target"}
SEQUENCE_LENGTH = 32
BATCH = 4
MODEL = ModelSettings(hidden_size=32, num_layers=2, num_heads=2, intermediate_size=64)


class FilesSettings(Settings):
    """Parquet files by name, as rows, for a test to publish."""

    files: dict[str, tuple[dict[str, Json], ...]]


def write_files(settings: FilesSettings, out: Path) -> Outcome:
    """Write each file of `settings`."""
    for name, rows in settings.files.items():
        pq.write_table(pa.Table.from_pylist(list(rows)), out / name)
    return Outcome()


def publish(store: Store, asset: str, files: Mapping[str, Sequence[Mapping[str, Json]]], *, partition: str | None = None) -> Manifest:
    """Publish rows as the Parquet files of an artifact."""
    settings = FilesSettings(files={name: tuple(dict(row) for row in rows) for name, rows in files.items()})
    return store.build(Build(asset=asset, partition=partition, step=write_files, settings=settings)).manifest


def sample_texts(domain: str, count: int, characters: int) -> list[str]:
    """Return the first `count` texts of `domain` in the sample that are long enough, cut to `characters`."""
    rows = duckdb.sql(
        "select text from read_parquet($path) where domain = $domain and length(text) > 300 order by id limit $count",
        params={"path": str(SAMPLE), "domain": domain, "count": count},
    ).fetchall()
    return [text[:characters] for (text,) in rows]


@dataclass(frozen=True)
class World:
    """Artifacts up to the selection."""

    store: Store
    corpora: dict[str, Manifest]
    splits: tuple[Member, ...]
    tokenizer: Manifest
    shards: tuple[Manifest, ...]
    decisions: Manifest
    selection: tuple[Member, ...]

    def training_inputs(self) -> dict[str, object]:
        return {"selection": self.selection, "shards": self.shards, "tokenizer": self.tokenizer}

    def general(self, settings: training.GeneralSettings | None = None) -> Build:
        """Return the request for the general checkpoint."""
        settings = settings or training.GeneralSettings(model=MODEL, **run())
        return Build(
            asset="general_checkpoint",
            step=training.train_general,
            settings=settings,
            inputs={**self.training_inputs(), "selection": self.selection[:1]},
            audits=training.CHECKPOINT_AUDITS,
            plugins=training_plugins(settings),
            resumable=True,
        )

    def windows(self, base: Manifest, **changes: object) -> Build:
        """Return the request for the held-out windows."""
        settings = probing.WindowSettings(**{"windows": {"general": 24, "target": 12}, **run(), **changes})
        return Build(
            asset="probe_windows",
            step=probing.measure_base,
            settings=settings,
            inputs={**self.training_inputs(), "base": base, "decisions": self.decisions},
            audits=probing.PROBE_AUDITS,
            plugins=training_plugins(settings),
        )

    def probe(self, base: Manifest, ratio: float | None, **changes: object) -> Build:
        """Return the request for a probe."""
        settings = probing.ProbeSettings(ratio=ratio, **{**run(tokens=20 * BATCH * SEQUENCE_LENGTH), **changes})
        windows = self.store.build(self.windows(base)).manifest
        return Build(
            asset="mixture_probe",
            step=probing.train_probe,
            settings=settings,
            inputs={**self.training_inputs(), "base": base, "windows": windows},
            audits=probing.PROBE_AUDITS,
            plugins=training_plugins(settings),
        )

    def mixture(self, base: Manifest, mixture: Manifest, **changes: object) -> Build:
        """Return the request for the pretrained checkpoint."""
        settings = TrainingSettings(**{**run(tokens=20 * BATCH * SEQUENCE_LENGTH), **changes})
        return replace(
            self.general(),
            asset="pretrained_checkpoint",
            step=training.train_mixture,
            settings=settings,
            inputs={**self.training_inputs(), "base": base, "mixture": mixture},
        )


def run(*, tokens: int = 60 * BATCH * SEQUENCE_LENGTH, learning_rate: float = 3e-3) -> dict[str, object]:
    """Return the settings of a run of a few seconds."""
    phases = ({"tokens": tokens, "learning_rate": learning_rate},)
    return {"phases": phases, "sequence_length": SEQUENCE_LENGTH, "batch_sequences": BATCH, "checkpoint_seconds": 1e9}


def build_world(store: Store, *, documents: int = 40, characters: int = 1200, vocabulary_size: int = 512) -> World:
    """Publish two general domains and a target domain of real text; one document in four is held out."""
    corpora = {domain: corpus(store, domain, sample_texts(domain, documents, characters)) for domain in ROLES}
    rows = []
    for domain, manifest in corpora.items():
        ids = pq.read_table(manifest.file("documents.parquet"), columns=["id"])["id"].to_pylist()
        rows += [{"id": name, "domain": domain, "kept": True, "split": "held_out" if n % 4 == 3 else "train"} for n, name in enumerate(ids)]
    decisions = publish(store, "deduplicated_corpus", {"decisions.parquet": rows})
    clusters = publish(store, "duplicate_clusters", {f"{d}.parquet": [r for r in rows if r["domain"] == d] for d in ROLES})
    splits = tuple(Member(manifest=clusters, name=f"{domain}.parquet") for domain in ROLES)
    tokenizer = store.build(fit(tuple(corpora.values()), splits, vocabulary_size=vocabulary_size)).manifest
    shards = tuple(store.build(shard(manifest, tokenizer)).manifest for manifest in corpora.values())
    train = {row["id"] for row in rows if row["split"] == "train"}
    return World(store, corpora, splits, tokenizer, shards, decisions, select_all(store, shards, train))


def fit(sample: tuple[Manifest, ...], splits: tuple[Member, ...], **settings: int) -> Build:
    """Return the request for a tokenizer."""
    return Build(
        asset="tokenizer", step=train_tokenizer, settings=TokenizerSettings(**settings), inputs={"sample": sample, "splits": splits}
    )


def shard(cleaned: Manifest, tokenizer: Manifest, *, max_characters: int = 400, audits: tuple = ()) -> Build:
    """Return the request for the token shard of a corpus."""
    return Build(
        asset="tokenized_shards",
        partition=cleaned.partition,
        step=tokenize_documents,
        settings=PassageSettings(max_characters=max_characters),
        inputs={"cleaned": cleaned, "tokenizer": tokenizer},
        audits=audits,
    )


class MixtureShares(Settings):
    """The shares of a mixture that a test publishes."""

    shares: dict[str, float]


def mixture_of(world: World, shares: Mapping[str, float]) -> Manifest:
    """Publish a domain mixture of `shares`."""
    return world.store.build(Build(asset="domain_mixture", step=write_mixture, settings=MixtureShares(shares=dict(shares)))).manifest


def write_mixture(settings: MixtureShares, out: Path) -> Outcome:
    """Write the shares as training reads them."""
    (out / "mixture.json").write_text(json.dumps({"shares": settings.shares}))
    return Outcome()


def select_all(store: Store, shards: Sequence[Manifest], train: set[str]) -> tuple[Member, ...]:
    """Publish a selection of every passage of the documents in `train`; one file per role."""
    files: dict[str, list[dict[str, Json]]] = {"general.parquet": [], "target.parquet": []}
    for manifest in shards:
        domain = str(manifest.partition).partition("|")[0]
        for row in pq.read_table(manifest.file("passages.parquet")).to_pylist():
            if row["id"] in train:
                chosen = {"id": row["id"], "passage": row["passage"], "domain": domain, "role": ROLES[domain], "tokens": row["length"]}
                files[f"{ROLES[domain]}.parquet"].append({**chosen, "selected": True})
    subset = publish(store, "selected_subset", files)
    return (Member(manifest=subset, name="general.parquet"), Member(manifest=subset, name="target.parquet"))


def byte_tokenizer() -> Tokenizer:
    """Return a byte-level tokenizer without merges: id 0 ends a document, id 1 + b is byte b."""
    from tokenizers import Tokenizer, decoders, models
    from transformers.convert_slow_tokenizer import bytes_to_unicode  # the table of GPT-2, by another hand

    tokenizer = Tokenizer(models.BPE({"<|endoftext|>": 0, **{c: 1 + byte for byte, c in bytes_to_unicode().items()}}, []))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer


def in_pieces(request: Build, store: Store, *, seconds: float) -> tuple[Manifest, int]:
    """Build `request` with a budget that ends again and again; return the artifact and the number of times it was asked for."""
    piecewise = replace(request, settings=request.settings.model_copy(update={"max_seconds": seconds}))
    for number in range(1, 200):
        try:
            return store.build(piecewise).manifest, number
        except BudgetReached:
            continue
    raise AssertionError("never finished")
