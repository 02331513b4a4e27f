"""Peak memory of each step that streams, from 100 MB to 2 GB of text: it should not grow with the corpus.

    python -m benchmarks.memory [--quick] [--corpus data/sample/corpus.parquet] [--sizes 100 500 2000] [--filters markup ...] [--workers N]
    python -m benchmarks.memory --document 200    one document of 200 MB, through every filter of the project

The input is the sample repeated, two in a hundred words of each copy replaced (seeded), so that no two documents are equal. Every
step runs in a process of its own with its audits; its memory is the sum over it and its workers of the proportional set size (PSS,
pages that several share counted once), read ten times a second. `--quick` takes 20 and 100 MB.

Scored by default are `DEFAULT_FILTERS`: scoring streams in one way whatever the filter, and all filters take long for 2 GB.
A document is held whole by every step: what it needs is given as a multiple of the document's size, too.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from pipelines import cleaning, corpus, decisions, deduplication, filtering
from pipelines.configuration import read_project
from pipelines.documents import DOCUMENT_SCHEMA, TableWriter
from pipelines.manifests import Manifest
from pipelines.plugins import load
from pipelines.store import Build, Store

SIZES = (100, 500, 2_000)
QUICK_SIZES = (20, 100)
DEFAULT_FILTERS = ("markup", "gopher_quality", "gopher_repetition")
SNAPSHOT, DOMAIN = "2026-01-01", "wiki"
KEY = f"{DOMAIN}|{SNAPSHOT}"
EDITED = 0.02
"""Share of the words of a copy that are replaced."""
SAMPLE_SECONDS = 0.1
AUDITS = tuple(audit for audit in decisions.FILTER_AUDITS if audit is not decisions.something_left)
"""One document may well be dropped."""


def main() -> None:
    """Measure every step at every size, print the table, and end with one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, default=Path("data/sample/corpus.parquet"), help="a Parquet file with a column text")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_SIZES} MB instead of {SIZES}")
    parser.add_argument("--sizes", type=int, nargs="+", help="megabytes of text")
    parser.add_argument("--document", type=int, help="megabytes of one document, instead of a corpus")
    parser.add_argument("--filters", nargs="+", help="filters that are scored")
    parser.add_argument("--workers", type=int, default=0, help="processes per step; 0 is one per core")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        print(json.dumps(run(arguments.step, arguments.directory, arguments.filters)))
        return
    arguments.filters = arguments.filters or (project_filters() if arguments.document else list(DEFAULT_FILTERS))
    steps = ("ingest", "clean", *(f"score {name}" for name in arguments.filters), "collect", "sign", "decide")
    sizes = sorted(arguments.sizes or (QUICK_SIZES if arguments.quick else SIZES))
    sizes = [1, arguments.document] if arguments.document else sizes
    started = time.monotonic()
    measured = {size: measure(size, steps, arguments) for size in sizes}
    show(measured, one=bool(arguments.document))
    peak = {step: {str(size): round(found[step]["peak_mb"]) for size, found in measured.items()} for step in steps}
    ratio = {step: round(values[str(sizes[-1])] / values[str(sizes[0])], 2) for step, values in peak.items()}
    rates = {step: round(sizes[-1] / measured[sizes[-1]][step]["seconds"], 1) for step in steps}
    seconds = round(time.monotonic() - started, 1)
    result = {"peak_mb": peak, "ratio": max(ratio.values()), "ratio_by_step": ratio, "mb_per_second": rates, "seconds": seconds}
    if arguments.document:
        grown = {step: values[str(sizes[-1])] - values[str(sizes[0])] for step, values in peak.items()}
        result |= {"times_the_document": {step: round(size / arguments.document, 1) for step, size in grown.items()}}
    print(json.dumps(result))


def project_filters() -> list[str]:
    """Return the filters that the project scores, but for those that are fitted first."""
    project = read_project(Path("project.yaml"))
    fitted = {settings.filter for settings in project.fitted()}
    return [name for stage in ("quality", "toxicity") for name in project.scored(stage) if name not in fitted]  # type: ignore[arg-type]


def measure(size: int, steps: Sequence[str], arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Build an input of `size` MB and return, for each step, its peak in MB, its seconds and its documents."""
    found = {}
    with tempfile.TemporaryDirectory(prefix="gristmill-memory-") as name:
        directory = Path(name)
        documents = build_input(arguments.corpus, directory / "input.parquet", size * 1_000_000, one=bool(arguments.document))
        report(f"{size} MB: {documents:,} documents")
        for step in steps:
            command = [sys.executable, "-m", "benchmarks.memory", "--step", step, "--directory", name, "--filters", *arguments.filters]
            found[step] = watch(command, {"GRISTMILL_WORKERS": str(arguments.workers or "")})
            report(f"  {step:24} {found[step]['peak_mb']:7.0f} MB  {found[step]['seconds']:7.1f} s")
    return found


def report(line: str) -> None:
    """Say on stderr how far it is."""
    print(line, file=sys.stderr, flush=True)


def build_input(source: Path, path: Path, size: int, *, one: bool) -> int:
    """Write documents with `size` bytes of text: copies of those of `source`, with words replaced; return how many.

    Args:
        one: join them to one document, and write a few of the others after it.
    """
    rows = pq.read_table(source, columns=["text"])["text"].to_pylist()
    words = sorted({word for text in rows[:2_000] for word in text.split(" ") if word.isalpha()})
    texts = copies(rows, words)
    with TableWriter(path, DOCUMENT_SCHEMA) as writer:
        if one:
            writer.write({"id": "long", "text": "\n\n".join(taken(texts, size)), "source": "copy"})
            size = 100_000
        for number, text in enumerate(taken(texts, size)):
            writer.write({"id": f"d{number}", "text": text, "source": "copy"})
        return writer.rows


def taken(texts: Iterator[str], size: int) -> Iterator[str]:
    """Yield texts until they have `size` bytes."""
    while size > 0:
        text = next(texts)
        size -= len(text.encode())
        yield text


def copies(rows: list[str], words: list[str]) -> Iterator[str]:
    """Yield the texts again and again, every time with other words replaced."""
    draw = random.Random(0)
    while True:
        for text in rows:
            parts = text.split(" ")
            for _ in range(max(1, int(EDITED * len(parts)))):
                parts[draw.randrange(len(parts))] = draw.choice(words)
            yield " ".join(parts)


def watch(command: list[str], environment: dict[str, str]) -> dict[str, float]:
    """Run `command`; return the peak of the memory of it and its children, and its seconds.

    Raises:
        RuntimeError: it failed.
    """
    started, peak = time.monotonic(), 0.0
    child = subprocess.Popen(command, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True)
    while child.poll() is None:
        peak = max(peak, sum(map(proportional_mb, tree(child.pid))))
        time.sleep(SAMPLE_SECONDS)
    if child.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {child.returncode}")
    own = json.loads((child.stdout.read() if child.stdout else "").splitlines()[-1])
    return {"peak_mb": max(peak, own["peak_mb"]), "seconds": time.monotonic() - started, "documents": own["documents"]}


def tree(process: int) -> list[int]:
    """Return `process` and its descendants."""
    found = [process]
    for number in found:
        for path in Path(f"/proc/{number}/task").glob("*/children"):
            try:
                found += map(int, path.read_text().split())
            except OSError:  # it ended meanwhile
                continue
    return found


def proportional_mb(process: int) -> float:
    """Return the proportional set size of `process` in MB; 0 where it has ended."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1000 for line in lines if line.startswith("Pss:")), 0.0)


def run(step: str, directory: Path, filters: list[str]) -> dict[str, float]:
    """Run one step over the artifacts in `directory`, and return its own peak (without workers) and its documents."""
    store = Store(directory / "store")
    for request in requests(step, store, directory, filters):
        made = store.build(request).manifest
    counts = made.counts
    own = int(next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))) / 1000
    return {"peak_mb": own, "documents": counts.get("documents_in", counts.get("documents", 0))}


def requests(step: str, store: Store, directory: Path, filters: list[str]) -> Iterator[Build]:
    """Yield the requests of one step; a step after the first takes what stands in the store."""
    if step == "ingest":
        settings = corpus.corpus_settings(DOMAIN, SNAPSHOT, "parquet", {"paths": ["input.parquet"]}, directory)
        yield Build("raw_corpus", corpus.ingest, settings, KEY, audits=corpus.CORPUS_AUDITS)
        return
    if step == "clean":
        raw = {"raw": store.current("raw_corpus", KEY)}
        yield Build("cleaned_corpus", cleaning.clean_corpus, cleaning.CleaningSettings(), KEY, raw, cleaning.CLEANING_AUDITS)
        return
    cleaned = store.current("cleaned_corpus", KEY)
    if step.startswith("score "):
        yield score(step.partition(" ")[2], cleaned)
    if step == "collect":
        inputs = {"cleaned": cleaned, "families": tuple(store.current(f"quality_scores.{name}", KEY) for name in filters)}
        settings = filtering.CollectSettings(domain=DOMAIN, snapshot=SNAPSHOT)
        yield Build("quality_scores", filtering.collect_scores, settings, KEY, inputs, filtering.COLLECT_AUDITS)
    if step == "sign":
        settings = deduplication.SignatureSettings()
        yield Build("duplicate_signatures", deduplication.sign_documents, settings, KEY, {"cleaned": cleaned})
    if step == "decide":
        thresholds = {rule: bound for name in filters for rule, bound in decisions.default_thresholds(name).items()}
        settings = decisions.FilterSettings(thresholds={DOMAIN: thresholds})
        inputs = {"scores": (store.current("quality_scores", KEY),)}
        yield Build("quality_filtered_corpus", decisions.filter_corpus, settings, "memory", inputs, AUDITS)


def score(name: str, cleaned: Manifest) -> Build:
    """Return the request for the scores of filter `name`."""
    packages = load("filters", name).packages  # type: ignore[attr-defined]
    settings = filtering.ScoreSettings(filter=name)
    build = Build(f"quality_scores.{name}", filtering.score_documents, settings, KEY, {"cleaned": cleaned}, filtering.SCORE_AUDITS)
    return Build(**{**build.__dict__, "plugins": (f"pipelines.filters.{name}",), "packages": packages})


def show(measured: dict[int, dict[str, dict[str, float]]], *, one: bool) -> None:
    """Print the peaks, and how fast the largest input went through."""
    table = Table(title="peak memory, MB (PSS of the step and its workers)", title_justify="left")
    sizes = list(measured)
    for column in (
        "step",
        *(f"{size:,} MB {'document' if one else 'of text'}" for size in sizes),
        "largest / smallest",
        "MB/s",
        "documents",
    ):
        table.add_column(column, justify="left" if column == "step" else "right")
    for step in measured[sizes[0]]:
        peaks = [measured[size][step]["peak_mb"] for size in sizes]
        largest = measured[sizes[-1]][step]
        rate = f"{sizes[-1] / largest['seconds']:.1f}"
        table.add_row(step, *(f"{peak:,.0f}" for peak in peaks), f"{peaks[-1] / peaks[0]:.2f}", rate, f"{largest['documents']:,.0f}")
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
