"""What the filters that learn, or bring a model, can do on the embedded sample.

    python -m benchmarks.trained_filters [--quick]

Perplexity and word order: area under the ROC curve of planted documents against clean ones of their own domain, by kind and
domain. The classifier: its held-out measures, for prose against web pages and lists of links. Language: accuracy on
documents whose language is labelled, and the clean English documents below FineWeb's threshold, by domain. And the speed of each, in
process time of one core. All are fitted on the training split of the first snapshot. `--quick` reads one snapshot.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import planted_dirt
from pipelines.configuration import read_project
from pipelines.documents import partition_file, read_batches
from pipelines.engine import Engine, map_shards
from pipelines.filter_models import TrainingSample
from pipelines.filters import Filter, FittedFilter, Scores
from pipelines.filters._calibration import auc
from pipelines.manifests import Manifest, Member
from pipelines.plugins import build
from pipelines.store import Store

CLASSIFIER = {"good": ["wiki", "book", "speech", "techdoc"], "bad": ["web", "url"]}
LABELLED = "nonenglish"
BATCH = 500


@dataclass(frozen=True)
class Documents:
    """Cleaned documents, and what is known of each."""

    texts: list[str]
    domains: np.ndarray
    kinds: np.ndarray
    languages: np.ndarray

    def of(self, kind: str, domain: str) -> np.ndarray:
        return np.flatnonzero((self.kinds == kind) & (self.domains == domain))

    @property
    def megabytes(self) -> float:
        return sum(len(text.encode()) for text in self.texts) / 1e6


def main() -> None:
    """Measure, print the tables, and end with one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one snapshot instead of all")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        print(json.dumps(measure(Path(directory), quick=arguments.quick)))


def measure(directory: Path, *, quick: bool) -> dict[str, object]:
    """Return what was measured, after printing it."""
    documents, sample = _ingest(Store(directory), quick=quick)
    project = read_project(Path("project.yaml"))
    perplexity = next(settings for settings in project.fitted() if settings.filter == "perplexity")
    console, speeds = Console(width=140), {}
    plugin, fitting = _fitted("perplexity", perplexity.settings, sample, directory)
    found, speeds["perplexity"] = _timed(lambda batch: plugin.score(batch, state=directory / "perplexity"), documents)
    by_kind = _areas(documents, found, console)
    classifier, outcome = _fitted("quality_classifier", CLASSIFIER, sample, directory)
    _, speeds["quality_classifier"] = _timed(lambda batch: classifier.score(batch, state=directory / "quality_classifier"), documents)
    _print_rows(console, "quality_classifier: unseen examples by origin", outcome.tables["by_origin"])
    _print_rows(console, "quality_classifier: calibration on unseen examples", outcome.tables["calibration"])
    language = cast(Filter, build("filters", "language"))
    named, speeds["language"] = _timed(language.score, documents)
    accuracy, low = _languages(documents, named, console)
    return {
        "documents": len(documents.texts),
        "megabytes": round(documents.megabytes, 1),
        "fit_seconds": {"perplexity": fitting.metrics["seconds"], "quality_classifier": outcome.metrics["seconds"]},
        "megabytes_per_second": speeds,
        "perplexity_auc": by_kind,
        "classifier": {name: value for name, value in outcome.metrics.items() if name.startswith("held_out")},
        "language_accuracy": accuracy,
        "clean_english_below_0.65": low,
    }


def _ingest(store: Store, *, quick: bool) -> tuple[Documents, TrainingSample]:
    root = Path.cwd()
    project = read_project(root / "project.yaml")
    snapshots = project.snapshots[:1] if quick else project.snapshots
    asked = [planted_dirt._Partition(store, project, root, domain, snapshot) for snapshot in snapshots for domain in project.domains]
    ingested = {m.item.key: planted_dirt._result(m) for m in map_shards(planted_dirt._ingest_partition, asked, Engine())}
    register = planted_dirt._cluster(store, project, ingested)
    labels = planted_dirt._labels(Path("data/sample"))
    rows = [row for manifests in ingested.values() for row in _rows(manifests["cleaned"], labels)]
    keys = [key for key in ingested if key.partition("|")[2] in project.fit_on]
    splits = tuple(Member(manifest=register, name=f"splits/{partition_file(key)}") for key in keys)
    columns = zip(*rows, strict=True)
    texts, domains, kinds, languages = list(next(columns)), *map(np.array, columns)
    return Documents(texts, domains, kinds, languages), TrainingSample(tuple(ingested[key]["cleaned"] for key in keys), splits)


def _rows(cleaned: Manifest, labels: dict[str, planted_dirt.Label]) -> Iterator[tuple[str, str, str, str]]:
    for batch in read_batches(cleaned.file("documents.parquet"), ("id", "text", "domain", "lang")):
        for row in batch.to_pylist():
            label = labels.get(planted_dirt._own(row["id"]))
            yield row["text"], row["domain"], label.noise if label else "clean", row["lang"] or ""


def _fitted(name: str, values: dict, sample: TrainingSample, directory: Path):  # noqa: ANN202 - the filter and its outcome
    plugin = cast(FittedFilter, build("filters", name, values))
    (directory / name).mkdir()
    started = time.process_time()
    outcome = plugin.fit(sample, directory / name)
    seconds = round(time.process_time() - started, 2)
    return plugin, outcome.model_copy(update={"metrics": {**outcome.metrics, "seconds": seconds}})


def _timed(score: Callable[[Sequence[str]], Scores], documents: Documents) -> tuple[dict[str, np.ndarray], float]:
    """Return the scores of all documents, and the megabytes of text a second; the first batch, which compiles, is not counted."""
    score(documents.texts[:5])
    started = time.process_time()
    parts = [score(documents.texts[start : start + BATCH]) for start in range(0, len(documents.texts), BATCH)]
    seconds = time.process_time() - started
    return {name: np.concatenate([np.asarray(part[name]) for part in parts]) for name in parts[0]}, round(documents.megabytes / seconds, 1)


def _areas(documents: Documents, found: dict[str, np.ndarray], console: Console) -> dict[str, dict[str, float]]:
    """Return by kind the area under the curve of each rule, averaged over domains by their planted documents."""
    table = Table(title="perplexity: AUC of planted above clean documents of their domain (log perplexity / less order gain)")
    domains = sorted(set(documents.domains[documents.kinds != "clean"].tolist()))
    result: dict[str, dict[str, float]] = {}
    table.add_column("kind", no_wrap=True)
    for domain in domains:
        table.add_column(domain, justify="right", no_wrap=True)
    for kind in sorted(set(documents.kinds.tolist()) - {"clean"}):
        cells, sums, count = [], np.zeros(2), 0
        for domain in domains:
            planted, clean = (
                rows[~np.isnan(found["order_gain"][rows])] for rows in (documents.of(kind, domain), documents.of("clean", domain))
            )
            if not len(planted):
                cells.append("")
                continue
            classes = np.repeat([1.0, 0.0], [len(planted), len(clean)])
            both = np.concatenate([planted, clean])
            areas = np.array([auc(found["log_perplexity"][both], classes), auc(-found["order_gain"][both], classes)])
            cells.append(f"{areas[0]:.2f}/{areas[1]:.2f}")
            sums, count = sums + len(planted) * areas, count + len(planted)
        table.add_row(kind, *cells)
        if count:
            result[kind] = {"log_perplexity": round(sums[0] / count, 3), "order_gain": round(sums[1] / count, 3), "documents": count}
    console.print(table)
    return result


def _languages(documents: Documents, found: dict[str, np.ndarray], console: Console) -> tuple[float, dict[str, float]]:
    labelled = documents.of("clean", LABELLED)
    right = found["language"][labelled] == documents.languages[labelled]
    rows, low = [], {}
    for domain in sorted(set(documents.domains.tolist()) - {LABELLED}):
        clean = documents.of("clean", domain)
        low[domain] = round(float((found["expected_probability"][clean] < 0.65).mean()), 4)
        others = [name for name in found["language"][clean] if name != "en"]
        rows.append({"domain": domain, "documents": len(clean), "below 0.65": f"{low[domain]:.2%}", "not called English": len(others)})
    _print_rows(console, f"language: {right.sum()} of {len(labelled)} labelled documents; clean English by domain", rows)
    return round(float(right.mean()), 4), low


def _print_rows(console: Console, title: str, rows: Sequence[dict]) -> None:
    table = Table(title=title, title_justify="left")
    for name in rows[0]:
        table.add_column(name.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*map(str, row.values()))
    console.print(table)


if __name__ == "__main__":
    main()
