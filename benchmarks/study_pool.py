"""Documents for studies of data decisions, by the project's own steps and thresholds: scored once, then parted in any way.

Documents are cleaned, near-duplicates are dropped and some are held out first; filters decide over what is left. So the parts that a
filter keeps and drops make up the whole, in training as in what is held out, and all variants are measured on the same windows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal, cast

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from benchmarks.selection_pool import HELD_OUT, LENGTH, SNAPSHOT, keep_everything, selection_table
from pipelines import cleaning, deduplication, filter_models, filtering, plugins, tokenization
from pipelines.age_splits import PERIODS_FILE, YEAR, AgeSplitSettings, split_by_age
from pipelines.configuration import read_project, read_recipe
from pipelines.decisions import FilterSettings, Threshold, filter_corpus
from pipelines.deduplication import DEDUPLICATED_SCHEMA
from pipelines.documents import DOCUMENT_SCHEMA, TableWriter, document_id, partition_file, stable_fraction, write_table
from pipelines.encoders import special_tokens
from pipelines.files import file_hashes
from pipelines.filters import FittedFilter
from pipelines.manifests import Json, Manifest, Member, Outcome
from pipelines.plugins import Settings
from pipelines.recipes import Project, Recipe, Stage, is_off, resolve_thresholds
from pipelines.shards import HeldOutDocuments, held_out_documents, windows_of
from pipelines.store import Build, Store

LABELS_ALONE = ("topics",)
"""Filters that decide nothing and that no study reads."""
Mode = Literal["keep", "off", "inverse"]


class RowsSettings(Settings):
    """The rows that are a domain."""

    paths: tuple[Path, ...]
    """Parquet files with columns `text` and `domain`; of the others those of a document are read."""
    domain: str
    share: float
    """Of the texts, by a hash of the text."""


class PartSettings(Settings):
    """Which of the documents are a part."""

    domains: tuple[str, ...] | None = None
    """These alone; None for all."""
    side: Literal["listed", "unlisted"] = "listed"
    """Documents that the list keeps, or the others."""


@dataclass(frozen=True)
class Thresholds:
    """The thresholds of the project file and of a recipe, for domains that need not be the project's."""

    project: Project
    toxicity: Recipe
    """Its `toxicity` is laid over the project's."""
    like: Mapping[str, str] = field(default_factory=dict)
    """Domain to the domain of the project whose thresholds and cleaning it takes; where absent its own, else what holds for all."""

    @classmethod
    def read(cls, project: Path, toxicity: Path, like: Mapping[str, str]) -> Thresholds:
        """Read both files.

        Raises:
            GristmillError: one line per problem.
        """
        found = read_project(project)
        for name in like.values():
            found.domain(name)
        return cls(found, read_recipe(toxicity, found), like)

    def of(self, stage: Stage, domains: Sequence[str]) -> dict[str, dict[str, Threshold]]:
        """Return the thresholds of `stage`, by domain."""
        return {domain: resolve_thresholds(self._layers(stage, self.like.get(domain, domain))) for domain in domains}

    def cleaning_of(self, domain: str) -> cleaning.CleaningSettings:
        """Return how text of `domain` is cleaned."""
        name = self.like.get(domain, domain)
        if name in self.project.domains:
            return self.project.cleaning_of(name)
        return plugins.validate(cleaning.CleaningSettings, self.project.cleaning, where=f"cleaning of {domain}")

    def fitted(self, domains: Sequence[str]) -> dict[str, filter_models.FitSettings]:
        """Return the settings of each fitted filter, the domains that it learns from being those of `domains` that are like them.

        A filter that would have none is left out.
        """
        found = {}
        for settings in self.project.fitted():
            values = {key: self._here(value, domains) for key, value in settings.settings.items()}
            plugin = cast(FittedFilter, plugins.build("filters", settings.filter, values))
            if plugin.domains():
                found[settings.filter] = settings.model_copy(update={"settings": values})
        return found

    def _here(self, value: Json, domains: Sequence[str]) -> Json:
        named = isinstance(value, list) and value and {*map(str, value)} <= set(self.project.domains)
        return [domain for domain in domains if self.like.get(domain, domain) in value] if named else value  # type: ignore[operator]

    def _layers(self, stage: Stage, name: str) -> list[dict]:
        own = getattr(self.project.domain(name), stage) if name in self.project.domains else {}
        if stage == "quality":
            return [self.project.quality, own]
        asked = {key: value for key, value in self.toxicity.toxicity.filters.items() if not is_off(own.get(key))}  # url, other languages
        return [self.project.toxicity, own, asked, self.toxicity.toxicity.domains.get(name, {})]


@dataclass(frozen=True)
class Period:
    """The documents of a stretch of time."""

    name: str
    """Its first and its last year, with fractions where they are one year."""
    documents: Manifest
    year: float
    """Mean over its documents."""


@dataclass(frozen=True)
class StudyPool:
    """What all studies part: documents without near-duplicates, their scores, tokens and dates."""

    store: Store
    thresholds: Thresholds
    cleaned: tuple[Manifest, ...]
    splits: tuple[Member, ...]
    documents: Manifest
    """Decisions with splits: what is kept is the whole."""
    tokenizer: Manifest
    shards: tuple[Manifest, ...]

    @property
    def domains(self) -> tuple[str, ...]:
        """All domains, sorted."""
        return tuple(str(corpus.partition).partition("|")[0] for corpus in self.cleaned)

    def scores(self, stage: Stage) -> tuple[Manifest, ...]:
        """Return the scores of every filter of `stage`, a manifest a domain; they are made where they are not there."""
        models = self._models if stage == "quality" else {}
        return tuple(self._scored(stage, corpus, models) for corpus in self.cleaned)

    def filtered(self, stage: Stage, mode: Mode, whole: Manifest) -> Manifest:
        """Return the part of `whole` that the rules of `stage` leave in `mode`."""
        scored = {settings.filter for settings in self._wanted(stage)}
        thresholds = self.thresholds.of(stage, self.domains)
        decided = {name: {r: rule for r, rule in rules.items() if r.partition(".")[0] in scored} for name, rules in thresholds.items()}
        settings = FilterSettings(mode=mode, thresholds=decided)
        inputs = {"scores": self.scores(stage), "previous": whole}
        decided = self.store.build(Build(f"{stage}_filtered_corpus", filter_corpus, settings, mode, inputs)).manifest
        return self.part(whole, Member(manifest=decided, name="decisions.parquet"))

    def part(self, whole: Manifest, listed: Member, settings: PartSettings | None = None) -> Manifest:
        """Return a part of `whole`."""
        inputs = {"whole": whole, "listed": listed}
        return self.store.build(Build("part", part_of, settings or PartSettings(), inputs=inputs)).manifest

    def without(self, whole: Manifest, part: Manifest) -> Manifest:
        """Return what of `whole` is not in `part`."""
        return self.part(whole, decisions_of(part), PartSettings(side="unlisted"))

    def of_domains(self, whole: Manifest, domains: Sequence[str]) -> Manifest:
        """Return the documents of `domains`."""
        return self.part(whole, decisions_of(whole), PartSettings(domains=tuple(domains)))

    def dates(self) -> dict[str, int]:
        """Return how many different dates the documents of each domain have."""
        paths = [str(scores.file("scores.parquet")) for scores in self.scores("quality")]
        query = f'select domain, count(distinct "{YEAR}") filter (not isnan("{YEAR}")) from read_parquet($paths) group by domain'
        return dict(duckdb.sql(query, params={"paths": paths}).fetchall())

    def by_age(self, whole: Manifest, periods: int) -> list[Period]:
        """Return periods with about equally many documents of `whole`, in time order; what is undated is in none."""

        settings, inputs = AgeSplitSettings(periods=periods), {"decisions": whole, "scores": self.scores("quality")}
        split = self.store.build(Build("split_by_age", split_by_age, settings, inputs=inputs)).manifest
        record = json.loads(split.file(PERIODS_FILE).read_text(encoding="utf-8"))["periods"]
        return [self._period(whole, Member(manifest=split, name=f"periods/{row['period']}.parquet"), row) for row in record]

    def _period(self, whole: Manifest, listed: Member, bounds: Mapping[str, float]) -> Period:
        years = pq.read_table(listed.path, columns=["year"])["year"].to_numpy()
        first, last = float(bounds["from"]), float(years.max())
        name = f"{int(first)}-{int(last)}" if int(first) < int(last) else f"{first:.2f}-{last:.2f}"
        return Period(name, self.part(whole, listed), float(years.mean()))

    def selection(self, part: Manifest) -> Manifest:
        """Return the selection of everything in the training split of `part`; `details` has its tokens by domain."""
        inputs = {"passages": self._passages, "part": part}
        return self.store.build(Build("selected_subset", select_part, Settings(), inputs=inputs)).manifest

    def held_out(self, part: Manifest) -> dict[str, HeldOutDocuments]:
        """Return the held-out documents of `part`, by domain."""
        return held_out_documents(part, self.shards)

    def windows(self, documents: Sequence[HeldOutDocuments], count: int) -> np.ndarray:
        """Return at most `count` windows of `documents`, evenly spaced, int64 of shape ``(n, LENGTH + 1)``."""
        tokens = [one for found in documents for one in found.tokens]
        joined = HeldOutDocuments([name for found in documents for name in found.ids], tokens, np.zeros(len(tokens), np.int64))
        return windows_of(joined, LENGTH, count, special_tokens(self.tokenizer.directory).end_of_text)

    @cached_property
    def _passages(self) -> Manifest:
        inputs = {"whole": self.documents, "shards": self.shards}
        return self.store.build(Build("pool", gather_passages, Settings(), inputs=inputs)).manifest

    @cached_property
    def _models(self) -> dict[str, Manifest]:
        """The model of each fitted filter that has text to learn from: the training split of its domains."""
        found = {}
        for name, settings in self.thresholds.fitted(self.domains).items():
            plugin = cast(FittedFilter, plugins.build("filters", name, settings.settings))
            wanted = [number for number, domain in enumerate(self.domains) if domain in plugin.domains()]
            inputs = {"sample": tuple(self.cleaned[n] for n in wanted), "splits": tuple(self.splits[n] for n in wanted)}
            settings = settings.model_copy(update={"files": file_hashes(plugin.files(), settings.root)})
            module = (f"pipelines.filters.{name}",)
            request = Build(f"filter_models.{name}", filter_models.fit_filter, settings, inputs=inputs, plugins=module)
            found[name] = self.store.build(request).manifest
        return found

    def _wanted(self, stage: Stage) -> list[filtering.ScoreSettings]:
        """Return the filters of `stage` that are scored: not those that decide nothing, nor those that nothing here can be fitted on."""
        fitted = self.thresholds.fitted(self.domains)
        left = {*LABELS_ALONE, *(settings.filter for settings in self.thresholds.project.fitted() if settings.filter not in fitted)}
        found = [settings for settings in self.thresholds.project.score_settings(stage) if settings.filter not in left]
        return [s.model_copy(update={"settings": fitted[s.filter].settings}) if s.filter in fitted else s for s in found]

    def _scored(self, stage: Stage, corpus: Manifest, models: Mapping[str, Manifest]) -> Manifest:
        families = []
        for settings in self._wanted(stage):
            model = {"model": models[settings.filter]} if settings.filter in models else {}
            plugin = (f"pipelines.filters.{settings.filter}",)
            packages = plugins.load("filters", settings.filter).packages  # type: ignore[attr-defined]
            located, inputs = filtering.located(settings, Path()), {"cleaned": corpus, **model}
            asset = f"{stage}_scores.{settings.filter}"
            scoring = Build(asset, filtering.score_documents, located, corpus.partition, inputs, plugins=plugin, packages=packages)
            families.append(self.store.build(scoring).manifest)
        settings = filtering.CollectSettings(domain=str(corpus.partition).partition("|")[0], snapshot=SNAPSHOT)
        inputs = {"cleaned": corpus, "families": tuple(families)}
        return self.store.build(Build(f"{stage}_scores", filtering.collect_scores, settings, corpus.partition, inputs)).manifest


def study_pool(paths: Sequence[Path], directory: Path, thresholds: Thresholds, *, max_bytes: int) -> StudyPool:
    """Build what the studies share in a store at `directory`, of about `max_bytes` of text; what is there already is taken."""
    store, located = Store(directory), [str(path) for path in paths]
    query = "select domain, sum(strlen(text)) from read_parquet($paths, union_by_name = true) group by domain order by domain"
    sizes = {name: int(size) for name, size in duckdb.sql(query, params={"paths": located}).fetchall()}
    share = min(1.0, max_bytes / sum(sizes.values()))
    keys = tuple(f"{domain}|{SNAPSHOT}" for domain in sizes)
    cleaned, signatures = [], []
    for domain, key in zip(sizes, keys, strict=True):
        rows = RowsSettings(paths=tuple(paths), domain=domain, share=share)
        raw = store.build(Build("raw_corpus", write_rows, rows, key)).manifest
        cleaned.append(
            store.build(Build("cleaned_corpus", cleaning.clean_corpus, thresholds.cleaning_of(domain), key, {"raw": raw})).manifest
        )
        signing = Build("duplicate_signatures", deduplication.sign_documents, thresholds.project.signatures, key, {"cleaned": cleaned[-1]})
        signatures.append(store.build(signing).manifest)
    splits, documents = _without_duplicates(store, tuple(cleaned), tuple(signatures), keys)
    sample = {"sample": tuple(cleaned), "splits": splits}
    tokenizer = store.build(Build("tokenizer", tokenization.train_tokenizer, thresholds.project.tokenizer, inputs=sample)).manifest
    shards = []
    for corpus in cleaned:
        cut = {"cleaned": corpus, "tokenizer": tokenizer}
        encoding = Build("tokenized_shards", tokenization.tokenize_documents, thresholds.project.passages, corpus.partition, cut)
        shards.append(store.build(encoding).manifest)
    return StudyPool(store, thresholds, tuple(cleaned), splits, documents, tokenizer, tuple(shards))


def _without_duplicates(
    store: Store, cleaned: tuple[Manifest, ...], signatures: tuple[Manifest, ...], keys: tuple[str, ...]
) -> tuple[tuple[Member, ...], Manifest]:
    """Return the splits, and the decisions that keep one document of each cluster."""
    held = dict.fromkeys((key.partition("|")[0] for key in keys), HELD_OUT)
    clustering = deduplication.ClusterSettings(order=keys, held_out=held)
    signed = {"signatures": signatures}
    clusters = store.build(Build("duplicate_clusters", deduplication.cluster_documents, clustering, inputs=signed)).manifest
    splits = tuple(Member(manifest=clusters, name=f"splits/{partition_file(key)}") for key in keys)
    everything = store.build(Build("decisions", keep_everything, Settings(), inputs={"cleaned": cleaned})).manifest
    inputs = {"decisions": everything, "clusters": splits, **signed}
    dropping = Build("deduplicated_corpus", deduplication.deduplicate, deduplication.DeduplicationSettings(), inputs=inputs)
    return splits, store.build(dropping).manifest


# Steps


def write_rows(settings: RowsSettings, out: Path) -> Outcome:
    """Write the distinct texts of a domain as documents, in the order of a hash of the text, with what is known of them."""
    source = "read_parquet($paths, union_by_name = true)"
    paths = {"paths": [str(path) for path in settings.paths]}
    there = {str(name) for name, *_ in duckdb.sql(f"describe select * from {source}", params=paths).fetchall()}
    names = [name for name in DOCUMENT_SCHEMA.names if name in there - {"id", "domain"}]
    query = f"select {', '.join(names)} from {source} where domain = $domain and text <> '' order by all"
    rows = duckdb.sql(query, params={**paths, "domain": settings.domain}).to_arrow_table().to_pylist()
    by_text = {row["text"]: row for row in reversed(rows)}
    ranked = sorted((stable_fraction("benchmark", text), text) for text in by_text)
    with TableWriter(out / "documents.parquet", DOCUMENT_SCHEMA) as writer:
        for fraction, text in ranked:
            if fraction < settings.share:
                writer.write({**by_text[text], "id": document_id(settings.domain, text), "domain": settings.domain})
    return Outcome(counts={"documents_in": writer.rows, "kept": writer.rows, "dropped": 0, "quarantined": 0})


def decisions_of(manifest: Manifest) -> Member:
    """Return the file of decisions."""
    return Member(manifest=manifest, name="decisions.parquet")


def part_of(settings: PartSettings, out: Path, *, whole: Manifest, listed: Member) -> Outcome:
    """Write ``decisions.parquet``: of the documents that `whole` keeps, those of a part are kept; their splits stay.

    Args:
        listed: a file with the column `id`; rows that its column `kept` says no of, if there is one, are not on the list.
    """
    table = pq.read_table(whole.file("decisions.parquet"))
    table = table.filter(table["kept"])
    names = pq.read_table(listed.path, columns=[name for name in ("id", "kept") if name in pq.read_schema(listed.path).names])
    names = names.filter(names["kept"]) if "kept" in names.column_names else names
    kept = pc.is_in(table["id"], value_set=names["id"].combine_chunks())
    kept = kept if settings.side == "listed" else pc.invert(kept)
    if settings.domains is not None:
        kept = pc.and_(kept, pc.is_in(table["domain"], value_set=pa.array(settings.domains, pa.string())))
    table = table.set_column(table.schema.get_field_index("kept"), "kept", kept).cast(DEDUPLICATED_SCHEMA)
    write_table(out / "decisions.parquet", table)
    stays = int(pc.sum(kept).as_py() or 0)
    return Outcome(counts={"documents_in": table.num_rows, "kept": stays, "dropped": table.num_rows - stays, "quarantined": 0})


PASSAGES = """
select t.id, t.passage, d.domain, t.length as tokens
from read_parquet($shards) t join read_parquet($whole) d using (id) where d.kept and d.split = 'train' and t.length > 0
order by d.domain, t.id, t.passage
"""


def gather_passages(settings: Settings, out: Path, *, whole: Manifest, shards: tuple[Manifest, ...]) -> Outcome:
    """Write ``pool.parquet`` (id, passage, domain, tokens): the passages that may be trained on."""
    files = {"shards": [str(shard.file("passages.parquet")) for shard in shards], "whole": str(whole.file("decisions.parquet"))}
    table = duckdb.sql(PASSAGES, params=files).to_arrow_table()
    write_table(out / "pool.parquet", table)
    return Outcome(counts={"passages": table.num_rows})


def select_part(settings: Settings, out: Path, *, passages: Manifest, part: Manifest) -> Outcome:
    """Write ``general.parquet``: all passages of the documents of `part`."""
    table, decided = pq.read_table(passages.file("pool.parquet")), pq.read_table(part.file("decisions.parquet"), columns=["id", "kept"])
    wanted = decided.filter(decided["kept"])["id"].combine_chunks()
    (chosen,) = np.nonzero(pc.is_in(table["id"], value_set=wanted).to_numpy())
    selected = selection_table(table, chosen, np.zeros(len(chosen)))
    write_table(out / "general.parquet", selected)
    rows = selected.group_by("domain").aggregate([("tokens", "sum")]).sort_by("domain").to_pylist()
    tokens: dict[str, Json] = {row["domain"]: int(row["tokens_sum"]) for row in rows}
    documents = len(pc.unique(selected["id"]))
    return Outcome(counts={"passages": selected.num_rows, "documents": documents}, details={"tokens": tokens})
