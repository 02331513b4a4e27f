"""A pool of passages by domain for benchmarks: texts cleaned, deduplicated, tokenized and embedded by the project's own steps, and chosen.

A near-duplicate of a held-out document is held out or dropped with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines import cleaning, deduplication, embedding, plugins, tokenization
from pipelines.documents import DECISION_SCHEMA, DOCUMENT_SCHEMA, TableWriter, document_id, partition_file, stable_fraction, write_table
from pipelines.embedders._grid import UNIT
from pipelines.encoders import special_tokens
from pipelines.manifests import Manifest, Member, Outcome
from pipelines.plugins import Settings
from pipelines.selection import SELECTION_SCHEMA
from pipelines.set_functions import Points
from pipelines.set_functions._neighbors import coverage_along, nearest_candidates
from pipelines.shards import held_out_documents, windows_of
from pipelines.store import Build, Store

SNAPSHOT = "2026-01-01"
HELD_OUT = 0.15
"""Share of the clusters of near-duplicates that is held out, of every domain."""
WINDOWS = 100
"""Held-out windows of a domain, at most."""
LENGTH = 128
"""Positions of a window."""
NEAR = 0.95
"""Cosine from which two selected passages count as near-duplicates."""
Shares = Literal["fixed", "natural"]
Duplicates = Literal["near", "exact", "off"]


class TextSettings(Settings):
    """The texts that are a domain."""

    path: Path
    """A Parquet file with a column `text`."""
    domain: str
    column: bool
    """Whether the file's column `domain` says which rows are taken; all are otherwise."""
    share: float
    """Of the texts, by a hash of the text."""


class PoolSettings(Settings):
    """What the perplexity model is fitted on."""

    max_characters: int = 20_000_000


class ChoiceSettings(Settings):
    """What a strategy takes."""

    function: str
    settings: dict[str, bool | int | str]
    budget: float
    shares: Shares


@dataclass(frozen=True)
class Pool:
    """What all strategies choose from and are measured on."""

    store: Store
    tokenizer: Manifest
    shards: tuple[Manifest, ...]
    passages: Manifest
    held_out: Path
    """An .npz with windows by domain, int64 ``(n, LENGTH + 1)``."""

    @property
    def tokens_by_domain(self) -> dict[str, int]:
        """Tokens of the pool, by domain."""
        return dict(self.passages.outcome.details["tokens"])  # type: ignore[arg-type]

    def figures(self) -> dict[str, object]:
        """Return the pool's size, and the held-out windows by domain."""
        with np.load(self.held_out) as windows:
            held = {domain: len(windows[domain]) for domain in windows.files}
        return {"passages": self.passages.counts["passages"], "tokens_by_domain": self.tokens_by_domain, "held_out_windows": held}

    def chosen(self, settings: ChoiceSettings) -> Manifest:
        """Return the selection that `settings` describes."""
        modules = (f"pipelines.set_functions.{settings.function}",)
        return self.store.build(Build("selected_subset", choose, settings, inputs={"pool": self.passages}, plugins=modules)).manifest


def domains_of(paths: Sequence[Path]) -> dict[str, tuple[Path, bool]]:
    """Return the file of each domain, and whether its column `domain` picks the rows: so in a single file, else a file is a domain."""
    if len(paths) > 1:
        return {path.stem: (path, False) for path in sorted(paths)}
    rows = duckdb.sql("select distinct domain from read_parquet($path) order by 1", params={"path": str(paths[0])}).fetchall()
    return {name: (paths[0], True) for (name,) in rows}


@dataclass(frozen=True)
class Documents:
    """The cleaned documents of every domain, their splits, and which of them are kept."""

    cleaned: tuple[Manifest, ...]
    splits: tuple[Member, ...]
    decisions: Manifest


def prepare(paths: Sequence[Path], directory: Path, *, max_bytes: int, duplicates: Duplicates) -> Pool:
    """Build everything that the strategies share in a store at `directory`, of about `max_bytes` of text."""
    store = Store(directory / "store")
    documents = split_documents(store, paths, max_bytes, duplicates)
    sample = {"sample": documents.cleaned, "splits": documents.splits}
    tokenizer = store.build(Build("tokenizer", tokenization.train_tokenizer, tokenization.TokenizerSettings(), inputs=sample)).manifest
    embedder = store.build(Build("embedder", embedding.fit_embedder, embedding.EmbedderSettings(), inputs=sample)).manifest
    shards, embeddings = [], []
    for corpus in documents.cleaned:
        cut, vectors = {"cleaned": corpus, "tokenizer": tokenizer}, {"cleaned": corpus, "embedder": embedder}
        encoding = Build("tokenized_shards", tokenization.tokenize_documents, tokenization.PassageSettings(), corpus.partition, cut)
        shards.append(store.build(encoding).manifest)
        embedded = Build("document_embeddings", embedding.embed_documents, embedding.EmbeddingSettings(), corpus.partition, vectors)
        embeddings.append(store.build(embedded).manifest)
    inputs = {"decisions": documents.decisions, "cleaned": documents.cleaned, "shards": tuple(shards), "embeddings": tuple(embeddings)}
    gathering = Build("pool", gather, PoolSettings(), inputs=inputs, plugins=("pipelines.filters.perplexity",))
    held = write_held_out(directory / "held_out.npz", documents.decisions, tuple(shards), tokenizer)
    return Pool(store, tokenizer, tuple(shards), store.build(gathering).manifest, held)


def split_documents(store: Store, paths: Sequence[Path], max_bytes: int, duplicates: Duplicates) -> Documents:
    """Clean the documents of every domain, hold some out, and drop duplicates."""
    files, cleaned, signatures = domains_of(paths), [], []
    query = "select sum(strlen(text)) from read_parquet($paths)"
    total = duckdb.sql(query, params={"paths": list(map(str, paths))}).fetchall()[0][0]
    for domain, (path, column) in files.items():
        key, texts = f"{domain}|{SNAPSHOT}", TextSettings(path=path, domain=domain, column=column, share=min(1.0, max_bytes / int(total)))
        raw = store.build(Build("raw_corpus", write_texts, texts, key)).manifest
        html = cleaning.CleaningSettings(html="extract")
        cleaned.append(store.build(Build("cleaned_corpus", cleaning.clean_corpus, html, key, {"raw": raw})).manifest)
        signing, given = deduplication.SignatureSettings(), {"cleaned": cleaned[-1]}
        signatures.append(store.build(Build("duplicate_signatures", deduplication.sign_documents, signing, key, given)).manifest)
    order = tuple(f"{domain}|{SNAPSHOT}" for domain in files)
    clustering = deduplication.ClusterSettings(order=order, held_out=dict.fromkeys(files, HELD_OUT))
    signed = {"signatures": tuple(signatures)}
    clusters = store.build(Build("duplicate_clusters", deduplication.cluster_documents, clustering, inputs=signed)).manifest
    splits = tuple(Member(manifest=clusters, name=f"splits/{partition_file(key)}") for key in order)
    everything = store.build(Build("decisions", keep_everything, Settings(), inputs={"cleaned": tuple(cleaned)})).manifest
    inputs = {"decisions": everything, "clusters": splits, **signed}
    dropping = deduplication.DeduplicationSettings(mode=duplicates)
    decisions = store.build(Build("deduplicated_corpus", deduplication.deduplicate, dropping, inputs=inputs)).manifest
    return Documents(tuple(cleaned), splits, decisions)


def write_texts(settings: TextSettings, out: Path) -> Outcome:
    """Write the distinct texts of a domain as documents, in the order of a hash of the text."""
    where = "where domain = $domain" if settings.column else ""
    query = f"select distinct text from read_parquet($path) {where}"
    found = duckdb.sql(query, params={"path": str(settings.path), **({"domain": settings.domain} if settings.column else {})}).fetchall()
    ranked = sorted((stable_fraction("benchmark", text), text) for (text,) in found if text)
    with TableWriter(out / "documents.parquet", DOCUMENT_SCHEMA) as writer:
        for fraction, text in ranked:
            if fraction < settings.share:
                writer.write({"id": document_id(settings.domain, text), "text": text, "domain": settings.domain, "source": "benchmark"})
    return Outcome(counts={"documents_in": writer.rows, "kept": writer.rows, "dropped": 0, "quarantined": 0})


def keep_everything(settings: Settings, out: Path, *, cleaned: tuple[Manifest, ...]) -> Outcome:
    """Write decisions that keep every document."""
    rows = []
    for corpus in cleaned:
        names = pq.read_table(corpus.file("documents.parquet"), columns=["id", "domain"]).to_pylist()
        rows += [{**name, "snapshot": SNAPSHOT, "kept": True, "reasons": []} for name in names]
    write_table(out / "decisions.parquet", pa.Table.from_pylist(rows, schema=DECISION_SCHEMA))
    return Outcome(counts={"documents": len(rows)})


POOL = """
with train as (select id from read_parquet($decisions) where kept and split = 'train'),
embedded as (select * from read_parquet($passages, file_row_number = true) semi join train using (id))
select e.file_row_number as row, id, e.passage, e.start, e."end", t.length as tokens, d.text[e.start + 1:e."end"] as text
from embedded e join read_parquet($shard) t using (id, passage) join read_parquet($documents) d using (id)
where t.length > 0 order by row
"""


def gather(
    settings: PoolSettings,
    out: Path,
    *,
    decisions: Manifest,
    cleaned: tuple[Manifest, ...],
    shards: tuple[Manifest, ...],
    embeddings: tuple[Manifest, ...],
) -> Outcome:
    """Write ``pool.parquet`` (id, passage, domain, tokens, score) and ``pool.npy``: the passages that may be selected, and their rows."""
    tables, rows = [], []
    for corpus, shard, embedded in zip(cleaned, shards, embeddings, strict=True):
        files = {"passages": embedded.file("passages.parquet"), "shard": shard.file("passages.parquet")}
        files |= {"decisions": decisions.file("decisions.parquet"), "documents": corpus.file("documents.parquet")}
        table = duckdb.sql(POOL, params={name: str(path) for name, path in files.items()}).to_arrow_table()
        rows.append(np.load(embedded.file("embeddings.npy"))[table["row"].to_numpy()])
        domain = pa.array([(corpus.partition or "").split("|")[0]] * table.num_rows, pa.string())
        tables.append(table.select(["id", "passage", "tokens", "text"]).append_column("domain", domain))
    table = pa.concat_tables(tables)
    scores = log_perplexity(Passages(table), settings.max_characters, out)
    write_table(out / "pool.parquet", table.drop_columns("text").append_column("score", pa.array(scores)))
    np.save(out / "pool.npy", np.concatenate(rows))
    tokens = {tables[n]["domain"][0].as_py(): int(tables[n]["tokens"].to_numpy().sum()) for n in range(len(tables)) if tables[n].num_rows}
    return Outcome(counts={"passages": table.num_rows, "unscored": int(np.isnan(scores).sum())}, details={"tokens": tokens})


@dataclass(frozen=True)
class Passages:
    """The pool as the sample of a fitted filter: a passage is a document of it."""

    table: pa.Table

    def documents(self, domain: str) -> Iterator[tuple[str, str]]:
        """Yield the passages of `domain`."""
        mine = self.table.filter(pc.equal(self.table["domain"], domain))
        for name, number, text in zip(mine["id"].to_pylist(), mine["passage"].to_pylist(), mine["text"].to_pylist(), strict=True):
            yield f"{name}/{number}", text


def log_perplexity(pool: Passages, max_characters: int, out: Path) -> np.ndarray:
    """Return the log perplexity of each passage under a model that has not seen it; NaN where it has fewer than 20 words."""
    good = sorted(set(pool.table["domain"].to_pylist()))
    plugin = plugins.build("filters", "perplexity", {"good": good, "max_characters": max_characters})
    plugin.fit(pool, out)
    return np.asarray(plugin.score(pool.table["text"].to_pylist(), state=out)["log_perplexity"])


def write_held_out(path: Path, decisions: Manifest, shards: tuple[Manifest, ...], tokenizer: Manifest) -> Path:
    """Write at most `WINDOWS` windows of every domain's held-out documents."""
    end = special_tokens(tokenizer.directory).end_of_text
    windows = {domain: windows_of(held, LENGTH, WINDOWS, end) for domain, held in held_out_documents(decisions, shards).items()}
    np.savez(path, **{domain: found for domain, found in windows.items() if len(found)})
    return path


# Choosing


def choose(settings: ChoiceSettings, out: Path, *, pool: Manifest) -> Outcome:
    """Write ``general.parquet``: the passages that the set function puts first, within the budget in tokens."""
    table, embeddings = pq.read_table(pool.file("pool.parquet")), np.load(pool.file("pool.npy"))
    tokens, scores = table["tokens"].to_numpy(), table["score"].to_numpy()
    names, groups = np.unique(table["domain"].to_numpy(zero_copy_only=False).astype(str), return_inverse=True)
    function = plugins.build("set_functions", settings.function, settings.settings)
    parts = [np.flatnonzero(groups == group) for group in range(len(names))] if settings.shares == "fixed" else [np.arange(len(tokens))]
    picks, gains, unfilled = [], [], 0
    for part in parts:
        points = Points(embeddings[part], costs=tokens[part], scores=scores[part], groups=groups[part])
        order = function.order(points)
        spent = np.cumsum(tokens[part][order.picks])
        budget = int(settings.budget * tokens[part].sum())
        count = int(np.searchsorted(spent, budget, side="right"))
        unfilled += max(0, budget - int(spent[-1])) if count == len(spent) else 0
        picks.append(part[order.picks[:count]])
        gains.append(order.gains[:count])
    chosen = np.concatenate(picks)
    write_table(out / "general.parquet", selection_table(table, chosen, np.concatenate(gains)))
    by_domain = np.bincount(groups[chosen], weights=tokens[chosen], minlength=len(names)).astype(int)
    details = {"tokens": {str(name): int(count) for name, count in zip(names, by_domain, strict=True) if count}}
    return Outcome(counts={"unfilled_tokens": unfilled}, metrics=qualities(embeddings, tokens, scores, chosen), details=details)


def selection_table(pool: pa.Table, chosen: np.ndarray, gains: np.ndarray) -> pa.Table:
    """Return the rows of the selection file; what training does not read of it is null."""
    rows = pool.select(["id", "passage", "domain", "tokens"]).take(pa.array(chosen))
    count = len(chosen)
    columns = {"snapshot": [SNAPSHOT] * count, "role": ["general"] * count, "rank": np.arange(count), "gain": gains}
    for name, values in {**columns, "selected": [True] * count}.items():
        rows = rows.append_column(name, pa.array(values))
    for name in set(SELECTION_SCHEMA.names) - set(rows.column_names):
        rows = rows.append_column(name, pa.nulls(count, SELECTION_SCHEMA.field(name).type))
    return rows.select(SELECTION_SCHEMA.names).cast(SELECTION_SCHEMA)


def qualities(embeddings: np.ndarray, tokens: np.ndarray, scores: np.ndarray, chosen: np.ndarray) -> dict[str, float]:
    """Return what a selection is like: coverage of the pool, near-duplicates, length and perplexity of its passages."""
    nearest = nearest_candidates(embeddings[chosen], embeddings[chosen], 2).similarities
    found = {
        "passages": len(chosen),
        "selected_tokens": tokens[chosen].sum(),
        "tokens_per_passage": tokens[chosen].mean(),
        "coverage": coverage_along(embeddings, chosen, np.array([len(chosen)]))[0],
        "near_duplicates": (nearest[:, 1] >= NEAR * UNIT).mean(),
        "log_perplexity": np.nanmean(scores[chosen]),
    }
    return {name: round(float(value), 5) for name, value in found.items()}
