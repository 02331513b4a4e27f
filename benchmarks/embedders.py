"""Which embedder puts together what belongs together, and what it costs: the default is the better of those that need no model.

    python -m benchmarks.embedders [--quick] [--corpus data/sample/corpus.parquet] [--labelled FILE ...] [--model FOLDER ...]

Three questions, all answered by the one nearest neighbour (cosine of integer rows, ties to the first):
same document: of two passages of a document, drawn by a seed, the one finds the other among those of all documents;
domain: the nearest passage of another document has the same domain (at most 300 documents a domain, each by one passage; the mean
over domains);
labelled: the nearest other text of FILE, Parquet with columns text and label, has the same label.
The domains' space is fitted on passages of the whole corpus, that of a labelled file on its own texts; no label is seen. Pages of HTML
are read as their main text. Each embedder runs in a process of its own: seconds are of CPU, peak memory is of that process, the texts
and the libraries included. `--model` adds `hf_encoder` with that folder. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import cast

import numpy as np
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from pipelines import plugins
from pipelines.cleaning import extract_html
from pipelines.documents import passages, stable_fraction
from pipelines.embedders import Embedder
from pipelines.embedders._grid import to_integer_rows

COMPARED = ("static_words", "hashed_tfidf")
"""Embedders that need no model of the user's."""
CHARACTERS = 1_500
FITTED_ON, PER_DOMAIN, LABELLED_ROWS = 20_000, 300, 10_000
QUICK_FITTED_ON, QUICK_PER_DOMAIN, QUICK_DOCUMENTS, QUICK_ROWS = 5_000, 60, 500, 1_500
WARM_UP = 100
"""Texts of a first run, which loads libraries and models, and is not counted."""
BATCH = 1_000
"""Texts embedded together, as the step does."""


@dataclass(frozen=True)
class Document:
    """A document of the corpus, cut into passages."""

    number: int
    domain: str
    pieces: list[str]

    def drawn(self, count: int) -> list[str]:
        """Return `count` different passages, drawn by the document's number."""
        random = np.random.default_rng(self.number)
        return [self.pieces[place] for place in random.choice(len(self.pieces), count, replace=False)]


class Meter:
    """Counts the bytes that an embedder reads, and its CPU seconds."""

    def __init__(self, embedder: Embedder, state: Path) -> None:
        self.embedder, self.state = embedder, state
        self.num_bytes, self.seconds = 0, 0.0

    def rows(self, texts: Sequence[str]) -> np.ndarray:
        """Return the integer rows of `texts`, embedded a batch at a time."""
        started, parts, remaining = time.process_time(), [], iter(texts)
        while batch := list(islice(remaining, BATCH)):
            parts.append(to_integer_rows(self.embedder.embed(batch, self.state)))
        self.seconds += time.process_time() - started
        self.num_bytes += sum(len(text.encode()) for text in texts)
        return np.concatenate(parts)


def main() -> None:
    """Measure each embedder, print the table, and end with one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, default=Path("data/sample/corpus.parquet"), help="Parquet with columns text and domain")
    parser.add_argument("--labelled", type=Path, nargs="+", default=[], help="Parquet files with columns text and label")
    parser.add_argument("--model", nargs="+", default=[], help="folders of models for hf_encoder")
    parser.add_argument("--quick", action="store_true", help="a part of the texts")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(work(json.loads(arguments.worker))))
        return
    asked: list[tuple[str, str, dict[str, object]]] = [(name, name, {}) for name in COMPARED]
    asked += [(f"hf_encoder {Path(model).name}", "hf_encoder", {"model": model}) for model in arguments.model]
    shared = {"corpus": str(arguments.corpus), "labelled": [str(path) for path in arguments.labelled], "quick": arguments.quick}
    found = {shown: measured({"embedder": name, "settings": settings, **shared}) for shown, name, settings in asked}
    default = max(COMPARED, key=lambda name: found[name]["mean_accuracy"])
    Console(width=None if sys.stdout.isatty() else 140).print(_table(found))
    print(json.dumps({"default": default, "embedders": found}))


def measured(job: Mapping[str, object]) -> dict:
    """Run `job` in a process of its own, with one thread."""
    one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"), "1")
    command = [sys.executable, "-m", "benchmarks.embedders", "--worker", json.dumps(job)]
    ended = subprocess.run(command, env=os.environ | one | {"HF_HUB_OFFLINE": "1"}, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(ended.stdout.splitlines()[-1])


def work(job: Mapping) -> dict[str, object]:
    """Return the accuracies and the cost of one embedder."""
    documents = read_documents(Path(job["corpus"]))
    embedder = cast(Embedder, plugins.build("embedders", job["embedder"], job["settings"]))
    quick = job["quick"]
    with tempfile.TemporaryDirectory() as name:
        texts = sample_passages(documents, QUICK_FITTED_ON if quick else FITTED_ON)
        embedder.fit(texts[:WARM_UP], Path(name))
        embedder.embed(texts[:WARM_UP], Path(name))
        started = time.process_time()
        fitted = embedder.fit(texts, Path(name))
        fit_seconds = time.process_time() - started
        meter = Meter(embedder, Path(name))
        accuracies = same_document(meter, documents, QUICK_DOCUMENTS if quick else len(documents))
        accuracies |= same_domain(meter, documents, QUICK_PER_DOMAIN if quick else PER_DOMAIN)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    for path in map(Path, job["labelled"]):
        accuracies |= same_label(embedder, path, QUICK_ROWS if quick else LABELLED_ROWS)
    return {
        "mean_accuracy": round(float(np.mean([row["accuracy"] for row in accuracies.values()])), 4),
        "accuracies": accuracies,
        "mb_per_cpu_second": round(meter.num_bytes / meter.seconds / 1e6, 3),
        "mb_embedded": round(meter.num_bytes / 1e6, 2),
        "fit_cpu_seconds": round(fit_seconds, 2),
        "fitted_on": len(texts),
        "peak_memory_mb": round(peak),
        "dimensions": int(fitted["dimensions"]),
    }


def read_documents(path: Path) -> list[Document]:
    """Return the documents of `path` in an order that their texts decide; of equal texts one."""
    table = pq.read_table(path, columns=["domain", "text"]).to_pydict()
    distinct = {extract_html(text)[0]: domain for domain, text in zip(table["domain"], table["text"], strict=True)}
    ordered = sorted(distinct, key=lambda text: stable_fraction("benchmark", text))
    cut = ([text[start:end] for start, end in passages(text, CHARACTERS)] for text in ordered)
    return [Document(number, distinct[text], pieces) for number, (text, pieces) in enumerate(zip(ordered, cut, strict=True)) if pieces]


def sample_passages(documents: Sequence[Document], count: int) -> list[str]:
    """Return at most `count` passages, by a stable hash of each."""
    every = [piece for document in documents for piece in document.pieces]
    return sorted(every, key=lambda piece: stable_fraction("fit", piece))[:count]


def same_document(meter: Meter, documents: Sequence[Document], count: int) -> dict[str, dict[str, float]]:
    """Return how often a passage's nearest among one passage of each of `count` documents is that of its own."""
    pairs = [document.drawn(2) for document in documents if len(document.pieces) > 1][:count]
    queries, candidates = (meter.rows([pair[side] for pair in pairs]) for side in (0, 1))
    right = nearest(queries, candidates) == np.arange(len(pairs))
    return {"same document": {"accuracy": round(float(right.mean()), 4), "candidates": len(pairs)}}


def same_domain(meter: Meter, documents: Sequence[Document], per_domain: int) -> dict[str, dict[str, float]]:
    """Return the mean over domains of how often the nearest other document is of the same domain."""
    by_domain: defaultdict[str, list[str]] = defaultdict(list)
    for document in documents:
        if len(by_domain[document.domain]) < per_domain:
            by_domain[document.domain] += document.drawn(1)
    labels = np.repeat(list(by_domain), list(map(len, by_domain.values())))
    right = label_found(meter.rows([text for texts in by_domain.values() for text in texts]), labels)
    accuracy = float(np.mean([right[labels == domain].mean() for domain in by_domain]))
    return {"domain": {"accuracy": round(accuracy, 4), "candidates": len(labels)}}


def same_label(embedder: Embedder, path: Path, count: int) -> dict[str, dict[str, float]]:
    """Return how often the nearest other text of `path` has the same label; the space is fitted on its texts."""
    table = pq.read_table(path, columns=["text", "label"]).to_pydict()
    distinct = dict(zip(table["text"], table["label"], strict=True))
    texts = sorted(distinct, key=lambda text: stable_fraction("benchmark", text))[:count]
    with tempfile.TemporaryDirectory() as name:
        embedder.fit(texts, Path(name))
        right = label_found(Meter(embedder, Path(name)).rows(texts), np.array([distinct[text] for text in texts]))
    return {path.stem: {"accuracy": round(float(right.mean()), 4), "candidates": len(texts)}}


def label_found(rows: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return for each row whether the nearest other one has its label."""
    return labels[nearest(rows, rows, others=True)] == labels


def nearest(queries: np.ndarray, candidates: np.ndarray, *, others: bool = False) -> np.ndarray:
    """Return the row of `candidates` that is nearest to each of `queries`, the first of equals; float32 holds the products exactly.

    Args:
        others: both are the same rows, and none is its own neighbour.
    """
    turned, found = candidates.astype(np.float32).T, []
    for start in range(0, len(queries), BATCH):
        products = queries[start : start + BATCH].astype(np.float32) @ turned
        if others:
            products[np.arange(len(products)), start + np.arange(len(products))] = -np.inf
        found.append(products.argmax(axis=1))
    return np.concatenate(found)


def _table(found: Mapping[str, dict]) -> Table:
    tasks = next(iter(found.values()))["accuracies"]
    heads = [f"{name}, of {row['candidates']:,}" for name, row in tasks.items()]
    table = Table(title="embedders: accuracy of the nearest neighbour, and cost", title_justify="left")
    for place, head in enumerate(["embedder", *heads, "mean", "MB / CPU-s", "fit, CPU-s", "peak MB", "dimensions"]):
        table.add_column(head, justify="right" if place else "left")
    for name, row in found.items():
        accuracies = [f"{task['accuracy']:.1%}" for task in row["accuracies"].values()]
        cost = [f"{row['mb_per_cpu_second']:.3g}", f"{row['fit_cpu_seconds']:.1f}", f"{row['peak_memory_mb']:,}", str(row["dimensions"])]
        table.add_row(name, *accuracies, f"{row['mean_accuracy']:.1%}", *cost)
    return table


if __name__ == "__main__":
    main()
