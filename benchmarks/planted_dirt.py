"""What the filters do to dirt whose kind is known: recall by kind and domain, and the clean documents that are lost.

    python -m benchmarks.planted_dirt [--quick] [--corpus data/sample]

The sample's labels (`labels.parquet`: kind of noise, clean twin, planted strings) are read here and nowhere else. A
document counts as handled when it was dropped, or mended: no byte pair of UTF-8 read as cp1252 left (mojibake), every planted
string masked, HTML extracted. Of a duplicate and its twin one has to be dropped. `--quick` reads one snapshot.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from pipelines import cleaning, corpus, deduplication, filter_models, filtering
from pipelines.configuration import read_project, read_recipe
from pipelines.decisions import filter_corpus
from pipelines.documents import partition_file, read_batches
from pipelines.engine import Engine, map_shards
from pipelines.files import file_hashes
from pipelines.filters import FittedFilter
from pipelines.manifests import Manifest, Member
from pipelines.plugins import build
from pipelines.recipes import Project, Recipe, Stage
from pipelines.store import Build, Store

MOJIBAKE = re.compile(
    "[\u00c2-\u00c5\u00e2][\u0080-\u00bf\u20ac\u201a-\u201e\u2020-\u2026\u2030\u2039\u203a\u2013\u2014\u2018-\u201d\u02dc\u0152-\u0178\u2122]"
)
"""A lead byte of UTF-8 and its continuation, both shown as cp1252 or Latin-1 characters."""
TWINS = ("exact_duplicate", "near_duplicate")


@dataclass(frozen=True)
class Label:
    """What is known of a planted document."""

    noise: str
    origin: str | None
    planted: tuple[str, ...]


@dataclass(frozen=True)
class _Partition:
    """What one worker is asked to measure."""

    store: Store
    project: Project
    root: Path
    domain: str
    snapshot: str
    cleaned: Manifest | None = None
    models: dict[str, Manifest] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return f"{self.domain}|{self.snapshot}"


def main() -> None:
    """Measure, print the table, and end with one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, default=Path("data/sample"))
    parser.add_argument("--quick", action="store_true", help="one snapshot instead of all")
    arguments = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        result = measure(Store(Path(directory)), arguments.corpus, quick=arguments.quick)
    result["seconds"] = round(time.monotonic() - started, 1)
    _print(result)
    print(json.dumps({key: result[key] for key in ("recall", "clean_loss", "worst_clean_loss", "by_kind", "documents", "seconds")}))


def measure(store: Store, data: Path, *, quick: bool) -> dict[str, object]:
    """Run ingestion, cleaning, scores, filters and deduplication over every domain and compare with the labels."""
    root = Path.cwd()
    project = _with_corpus(read_project(root / "project.yaml"), data)
    recipe = _every_domain(read_recipe(root / "recipes" / "code-critical.yaml", project), project)
    snapshots = project.snapshots[:1] if quick else project.snapshots
    asked = [_Partition(store, project, root, domain, snapshot) for snapshot in snapshots for domain in recipe.domains]
    ingested = {m.item.key: _result(m) for m in map_shards(_ingest_partition, asked, Engine())}
    register = _cluster(store, project, ingested)
    models = _fit(store, project, root, ingested, register)
    asked = [replace(item, cleaned=ingested[item.key]["cleaned"], models=models) for item in asked]
    measured = {m.item.key: ingested[m.item.key] | _result(m) for m in map_shards(_score_partition, asked, Engine())}
    decisions = _decide(store, project, recipe, measured, register)
    return _compare(_labels(data), measured, decisions)


def _ingest_partition(asked: _Partition) -> dict[str, Manifest]:
    store, project, key = asked.store, asked.project, asked.key
    source, values = project.source_of(asked.domain)
    settings = corpus.corpus_settings(asked.domain, asked.snapshot, source, values, asked.root)
    raw = store.build(Build("raw_corpus", corpus.ingest, settings, key, plugins=(f"pipelines.sources.{source}",))).manifest
    cleaned = store.build(Build("cleaned_corpus", cleaning.clean_corpus, project.cleaning_of(asked.domain), key, {"raw": raw})).manifest
    signatures = Build("duplicate_signatures", deduplication.sign_documents, project.signatures, key, {"cleaned": cleaned})
    return {"cleaned": cleaned, "signatures": store.build(signatures).manifest}


def _cluster(store: Store, project: Project, ingested: dict[str, dict[str, Manifest]]) -> Manifest:
    signatures = tuple(manifests["signatures"] for manifests in ingested.values())
    settings = project.cluster_settings(ingested)
    return store.build(Build("duplicate_clusters", deduplication.cluster_documents, settings, inputs={"signatures": signatures})).manifest


def _fit(store: Store, project: Project, root: Path, ingested: dict[str, dict[str, Manifest]], register: Manifest) -> dict[str, Manifest]:
    """Return the model of each fitted filter, fitted on the training split of the pinned sample."""
    found = {}
    for settings in project.fitted():
        plugin = cast(FittedFilter, build("filters", settings.filter, settings.settings)).at(root)
        keys = [key for key in ingested if key.partition("|")[0] in plugin.domains() and key.partition("|")[2] in project.fit_on]
        inputs = {
            "sample": tuple(ingested[key]["cleaned"] for key in keys),
            "splits": tuple(Member(manifest=register, name=f"splits/{partition_file(key)}") for key in keys),
        }
        settings = settings.model_copy(update={"files": file_hashes(plugin.files(), root), "root": root})
        module = f"pipelines.filters.{settings.filter}"
        request = Build(f"filter_models.{settings.filter}", filter_models.fit_filter, settings, inputs=inputs, plugins=(module,))
        found[settings.filter] = store.build(request).manifest
    return found


def _score_partition(asked: _Partition) -> dict[str, Manifest]:
    found = {}
    for stage in ("quality", "toxicity"):
        families = tuple(_score(asked, stage, settings) for settings in asked.project.score_settings(stage))
        settings = filtering.CollectSettings(domain=asked.domain, snapshot=asked.snapshot)
        inputs = {"cleaned": asked.cleaned, "families": families}
        found[stage] = asked.store.build(Build(f"{stage}_scores", filtering.collect_scores, settings, asked.key, inputs)).manifest
    return found


def _score(asked: _Partition, stage: Stage, settings: filtering.ScoreSettings) -> Manifest:
    name, settings = f"{stage}_scores.{settings.filter}", filtering.located(settings, asked.root)
    model = {"model": asked.models[settings.filter]} if settings.filter in asked.models else {}
    inputs = {"cleaned": asked.cleaned, **model}
    module = f"pipelines.filters.{settings.filter}"
    return asked.store.build(Build(name, filtering.score_documents, settings, asked.key, inputs, plugins=(module,))).manifest


def _decide(
    store: Store, project: Project, recipe: Recipe, measured: dict[str, dict[str, Manifest]], register: Manifest
) -> dict[str, Manifest]:
    order = list(measured)
    signatures = tuple(measured[key]["signatures"] for key in order)
    clusters = tuple(Member(manifest=register, name=f"splits/{partition_file(key)}") for key in order)
    decisions: dict[str, Manifest] = {}
    previous: dict[str, Manifest] = {}
    for stage in ("quality", "toxicity"):
        inputs = {"scores": tuple(measured[key][stage] for key in order), **previous}
        settings = recipe.filter_settings(project, stage)
        decisions[stage] = store.build(Build(f"{stage}_filtered_corpus", filter_corpus, settings, inputs=inputs)).manifest
        previous = {"previous": decisions[stage]}
    inputs = {"decisions": decisions["toxicity"], "clusters": clusters, "signatures": signatures}
    decisions["deduplication"] = store.build(
        Build("deduplicated_corpus", deduplication.deduplicate, recipe.deduplication, inputs=inputs)
    ).manifest
    return decisions


def _compare(labels: dict[str, Label], measured: dict[str, dict[str, Manifest]], decisions: dict[str, Manifest]) -> dict[str, object]:
    dropped = {stage: _dropped(manifest) for stage, manifest in decisions.items()}
    gone = set().union(*dropped.values())
    changed, texts, domain_of = _cleaned(measured, labels)
    tally: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    clean: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for name, domain in domain_of.items():
        label = labels.get(name)
        if label:
            cell = tally[(label.noise, domain)]
            cell[0] += 1
            cell[1] += _handled(name, label, gone, changed, texts, domain_of)
            continue
        clean[domain]["documents"] += 1
        for stage, names in dropped.items():
            clean[domain][stage] += name in names
    kinds = sorted({kind for kind, _ in tally})
    by_kind = {kind: _share(tally, kind=kind) for kind in kinds}
    loss = {domain: (c["quality"] + c["toxicity"]) / c["documents"] for domain, c in sorted(clean.items()) if c["documents"]}
    total = sum(cell[0] for cell in tally.values())
    return {
        "recall": round(sum(cell[1] for cell in tally.values()) / total, 4),
        "clean_loss": round(sum(c["quality"] + c["toxicity"] for c in clean.values()) / sum(c["documents"] for c in clean.values()), 4),
        "worst_clean_loss": round(max(loss.values()), 4),
        "by_kind": {kind: round(share, 4) for kind, share in by_kind.items()},
        "documents": len(domain_of),
        "tally": tally,
        "clean": clean,
        "loss": loss,
    }


def _handled(
    name: str, label: Label, gone: set[str], changed: dict[str, set[str]], texts: dict[str, str], domain_of: dict[str, str]
) -> bool:
    if name in gone:
        return True
    if label.noise in TWINS:
        return label.origin in gone or label.origin not in domain_of
    if label.noise == "mojibake":
        return not MOJIBAKE.search(texts[name])
    if label.noise == "raw_html":
        return "html_extracted" in changed.get(name, set())
    return label.noise == "pii" and not any(planted in texts[name] for planted in label.planted)


def _share(tally: dict[tuple[str, str], list[int]], *, kind: str) -> float:
    cells = [cell for (noise, _), cell in tally.items() if noise == kind]
    return sum(cell[1] for cell in cells) / sum(cell[0] for cell in cells)


def _cleaned(
    measured: dict[str, dict[str, Manifest]], labels: dict[str, Label]
) -> tuple[dict[str, set[str]], dict[str, str], dict[str, str]]:
    """Return the changes by document, the cleaned text that has to be looked at, and every document's domain."""
    wanted = {name for name, label in labels.items() if label.noise in ("pii", "mojibake")}
    changed: dict[str, set[str]] = defaultdict(set)
    texts: dict[str, str] = {}
    domains: dict[str, str] = {}
    for manifests in measured.values():
        for row in pq.read_table(manifests["cleaned"].file("changes.parquet"), columns=["id", "change"]).to_pylist():
            changed[_own(row["id"])].add(row["change"])
        for batch in read_batches(manifests["cleaned"].file("documents.parquet"), ["id", "domain", "text"]):
            for row in batch.to_pylist():
                name = _own(row["id"])
                domains[name] = row["domain"]
                if name in wanted:
                    texts[name] = row["text"]
    return changed, texts, domains


def _dropped(decisions: Manifest) -> set[str]:
    table = pq.read_table(decisions.file("decisions.parquet"), columns=["id", "kept"]).to_pylist()
    return {_own(row["id"]) for row in table if not row["kept"]}


def _labels(data: Path) -> dict[str, Label]:
    rows = pq.read_table(data / "labels.parquet").to_pylist()
    return {row["id"]: Label(row["noise"], row["origin"], tuple(json.loads(row["planted"] or "[]"))) for row in rows}


def _own(name: str) -> str:
    """Return the sample's id of a document: without the collection month that ingestion adds."""
    return name.rpartition("@")[0] or name


def _with_corpus(project: Project, data: Path) -> Project:
    paths = [str(data / name) for name in ("corpus.parquet", "dirty.parquet", "heldout.parquet")]
    return project.model_copy(update={"source_settings": {**project.source_settings, "paths": paths}})


def _every_domain(recipe: Recipe, project: Project) -> Recipe:
    general = tuple(name for name in project.domains if name not in recipe.roles.target)
    return recipe.model_copy(update={"roles": recipe.roles.model_copy(update={"general": general, "evaluation": ()})})


def _result(mapped: object) -> dict[str, Manifest]:
    if mapped.error:  # type: ignore[attr-defined]
        raise mapped.error  # type: ignore[attr-defined]
    return mapped.result  # type: ignore[attr-defined]


def _print(result: dict[str, object]) -> None:
    tally, clean, loss = result["tally"], result["clean"], result["loss"]
    domains = sorted({domain for _, domain in tally})
    table = Table(title="planted dirt: handled / planted", title_justify="left")
    for column in ("kind", *domains, "recall"):
        table.add_column(column, justify="left" if column == "kind" else "right")
    for kind, share in result["by_kind"].items():
        cells = [f"{tally[(kind, d)][1]}/{tally[(kind, d)][0]}" if (kind, d) in tally else "" for d in domains]
        table.add_row(kind, *cells, f"{share:.1%}")
    console = Console(width=140)
    console.print(table)
    lost = Table(title="clean documents lost", title_justify="left")
    for column in ("domain", "documents", "quality", "toxicity", "lost", "dropped as duplicates"):
        lost.add_column(column, justify="left" if column == "domain" else "right")
    for domain, share in loss.items():
        c = clean[domain]
        lost.add_row(domain, f"{c['documents']:,}", str(c["quality"]), str(c["toxicity"]), f"{share:.2%}", str(c["deduplication"]))
    console.print(lost)


if __name__ == "__main__":
    main()
