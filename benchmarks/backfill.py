"""A backfill of 500 partitions through `dagster dev`: memory, time, what is lost and what is done twice; 5,000 registered partitions.

    python -m benchmarks.backfill [--partitions 500] [--quick]

The project is made for it: real texts of the sample, cut short, one file for each of the partitions (20 domains, as many months as are
needed) of the 5,000 that it registers (50 domains x 100 months). One partition in fifty has no file at first. The backfill is of
raw_corpus, cleaned_corpus and duplicate_signatures. It fails for the partitions without a file and keeps the others; the files are put
there, it is resumed, cancelled in the middle, and resumed again. Then nothing may be lost (a partition of an asset that the store
lacks, or that Dagster does not record as materialized) and nothing done twice (an artifact computed again).

Printed are the seconds of each part, the resident memory of daemon, code server and run worker over time, the CPU-seconds that the code
location takes to load and the seconds of the query behind the page of an asset's partitions. `--quick` backfills 40 partitions.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import duckdb
import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.dagster_dev import CANCEL_BACKFILL, PARTITIONS_PAGE, ROOT, DagsterDev

ASSETS = ("raw_corpus", "cleaned_corpus", "duplicate_signatures")
REGISTERED_DOMAINS, REGISTERED_MONTHS = 50, 100
DOMAINS = 20
"""Of the partitions that are backfilled."""
MISSING_ONE_IN = 50
DOCUMENTS, CHARACTERS = 3, 400
ROLES = {
    "daemon": "dagster._daemon",
    "code server": "dagster api grpc",
    "webserver": "dagster_webserver",
    "run worker": "multiprocessing.spawn",
}
PATIENCE = 3_600


def main() -> None:
    """Run the parts, print the tables, and end with one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--partitions", type=int, help="how many are backfilled, in whole months of 20 domains")
    parser.add_argument("--quick", action="store_true", help="40 partitions instead of 500")
    arguments = parser.parse_args()
    partitions = arguments.partitions or (40 if arguments.quick else 500)
    with tempfile.TemporaryDirectory(prefix="gristmill-backfill-") as name:
        directory = Path(name).resolve() / "project"
        keys, missing = write_project(directory, partitions)
        found: dict[str, object] = {"partitions": len(keys), "registered": REGISTERED_DOMAINS * REGISTERED_MONTHS}
        found["load_cpu_seconds"] = load_seconds(directory)
        dev = DagsterDev(directory, seconds=300)
        watch = Watch(dev)
        try:
            dev.wait_until_loaded()
            watch.start()
            found |= drive(dev, watch, keys, missing)
        finally:
            watch.stop()
            left = dev.stop()
        found["processes_left"] = len(left)
    show(found, watch)


def write_project(directory: Path, partitions: int) -> tuple[list[str], list[str]]:
    """Write the project; return the partitions to backfill, and those of them whose file is kept aside."""
    domains = ["code", "techdoc", "wiki", *(f"domain{number:02}" for number in range(REGISTERED_DOMAINS - 3))]
    months = last_months(REGISTERED_MONTHS)
    (directory / "recipes").mkdir(parents=True)
    for name in ("dagster.yaml", "workspace.yaml"):
        shutil.copy(ROOT / name, directory)
    recipe = (ROOT / "recipes" / "tiny.yaml").read_text().replace("2026-01-01", months[-1])
    (directory / "recipes" / "tiny.yaml").write_text(recipe)
    project = {
        "name": "backfill",
        "first_snapshot": months[0],
        "snapshots": [months[-1]],
        "fit_on": [months[-1]],
        "source": "jsonl",
        "source_settings": {"paths": ["texts/{domain}/{snapshot}.jsonl"]},
        "quality": {"gopher_quality": {}},
        "toxicity": {"toxic_words": {}},
        "domains": {name: {} for name in domains},
    }
    (directory / "project.yaml").write_text(json.dumps(project))
    keys = [f"{domain}|{month}" for month in months[-max(1, partitions // DOMAINS) :] for domain in domains[:DOMAINS]]
    texts = sample(DOCUMENTS * len(keys))
    for number, key in enumerate(keys):
        path = source_file(directory, key)
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = ({"text": text} for text in texts[number * DOCUMENTS : (number + 1) * DOCUMENTS])
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    missing = keys[7::MISSING_ONE_IN]
    for key in missing:
        source_file(directory, key).rename(source_file(directory, key).with_suffix(".aside"))
    return keys, missing


def last_months(count: int) -> list[str]:
    """Return the last `count` months that are over, as snapshots, the oldest first."""
    now = datetime.now(UTC)
    numbers = range(now.year * 12 + now.month - 1 - count, now.year * 12 + now.month - 1)
    return [f"{number // 12}-{number % 12 + 1:02}-01" for number in numbers]


def source_file(directory: Path, key: str) -> Path:
    """Return the source file of a partition."""
    return directory / "texts" / f"{key.replace('|', '/')}.jsonl"


def sample(count: int) -> list[str]:
    """Return `count` short texts of the sample, from its beginning again where it has fewer."""
    query = "select text[:$characters] from read_parquet($path) where length(text) > 300 order by id limit $count"
    path = str(ROOT / "data" / "sample" / "corpus.parquet")
    texts = [text for (text,) in duckdb.sql(query, params={"characters": CHARACTERS, "path": path, "count": count}).fetchall()]
    return [texts[number % len(texts)] for number in range(count)]


def load_seconds(directory: Path, *, times: int = 3) -> float:
    """Return the CPU-seconds, the best of a few, of a process that loads the code location of the project."""
    code = "import time; from assets_defs.definitions import defs; defs.get_repository_def(); print(time.process_time())"
    command = [sys.executable, "-W", "ignore", "-c", code]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "HOME": str(directory)}
    runs = (subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=True) for _ in range(times))
    return round(min(float(run.stdout) for run in runs), 2)


def drive(dev: DagsterDev, watch: Watch, keys: list[str], missing: list[str]) -> dict[str, object]:
    """Backfill, mend, resume, cancel, resume; return what was found."""
    seconds: dict[str, float] = {"page_empty": page_seconds(dev)}
    started = watch.part("backfill, some without a file")
    first = dev.backfill(dict.fromkeys(ASSETS, keys))
    failed = dev.ended_backfill(first, PATIENCE)
    seconds["backfill"] = time.monotonic() - started
    kept = computed(dev)

    for key in missing:
        source_file(dev.directory, key).with_suffix(".aside").rename(source_file(dev.directory, key))
    started = watch.part("resumed, to be cancelled")
    second = dev.resume(first)
    half = len(keys) // 2
    dev.wait_for("half of a step", PATIENCE, lambda: len(dev.store.partitions(ASSETS[1])) >= half)
    assert dev.ask(CANCEL_BACKFILL, id=second)["__typename"] == "CancelBackfillSuccess"
    cancelled = dev.ended_backfill(second, PATIENCE)
    seconds["until_cancelled"] = time.monotonic() - started
    before = computed(dev)

    started = watch.part("resumed")
    ended = dev.ended_backfill(dev.resume(second), PATIENCE)
    seconds["resumed"] = time.monotonic() - started
    after = computed(dev)
    watch.part("over")
    seconds["page_full"] = page_seconds(dev)
    total = seconds["backfill"] + seconds["until_cancelled"] + seconds["resumed"]
    return {
        "statuses": [failed, cancelled, ended],
        "missing_at_first": len(missing),
        "kept_of_first": len([one for one in kept if one[0] == ASSETS[0]]),
        "done_when_cancelled": len(before),
        "lost": sum(len(set(keys) - set(dev.store.partitions(asset))) + len(set(keys) - recorded(dev, asset)) for asset in ASSETS),
        "computed_again": sum(after.get(one) != when for earlier in (kept, before) for one, when in earlier.items()),
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "seconds_per_partition_and_asset": round(total / len(keys) / len(ASSETS), 3),
    }


def computed(dev: DagsterDev) -> dict[tuple[str, str], object]:
    """Return when and for how long each artifact was computed, by asset and partition."""
    return {
        (asset, key): json.dumps(dev.store.current(asset, key).provenance, sort_keys=True)
        for asset in ASSETS
        for key in dev.store.partitions(asset)
    }


def recorded(dev: DagsterDev, asset: str) -> set[str]:
    """Return the partitions of `asset` that Dagster records as materialized."""
    found = page(dev, asset)["assetPartitionStatuses"]
    months = {d["name"]: d["partitionKeys"] for d in page(dev, asset)["partitionKeysByDimension"]}["snapshot"]
    keys: set[str] = set()
    for primary in found["ranges"]:
        assert primary["primaryDimStartKey"] == primary["primaryDimEndKey"] or found["primaryDimensionName"] == "snapshot"
        if found["primaryDimensionName"] == "snapshot":
            span = months[months.index(primary["primaryDimStartKey"]) : months.index(primary["primaryDimEndKey"]) + 1]
            keys |= {f"{domain}|{month}" for domain in primary["secondaryDim"]["materializedPartitions"] for month in span}
            continue
        for one in primary["secondaryDim"]["ranges"]:
            span = months[months.index(one["startKey"]) : months.index(one["endKey"]) + 1]
            keys |= {f"{primary['primaryDimStartKey']}|{month}" for month in span if one["status"] == "MATERIALIZED"}
    return keys


def page(dev: DagsterDev, asset: str) -> dict:
    """Return what the page of an asset's partitions asks for."""
    return dev.ask(PARTITIONS_PAGE, asset={"path": [asset]})


def page_seconds(dev: DagsterDev, *, times: int = 3) -> float:
    """Return the median seconds of the query behind the page of raw_corpus' partitions."""
    taken = []
    for _ in range(times):
        started = time.perf_counter()
        page(dev, ASSETS[0])
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


class Watch:
    """Resident memory of the processes of `dagster dev`, by role, once a second."""

    def __init__(self, dev: DagsterDev) -> None:
        self._root = dev.process.pid
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._part = "start"
        self.seen: list[tuple[str, dict[str, int]]] = []
        """The part of the benchmark, and megabytes by role."""

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def stop(self) -> None:
        """Look no more."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join(10)

    def part(self, name: str) -> float:
        """Say which part begins; return the time."""
        self._part = name
        return time.monotonic()

    def _look(self) -> None:
        while not self._over.wait(1.0):
            megabytes: dict[str, int] = {}
            for process in psutil.Process(self._root).children(recursive=True):
                try:
                    command, size = " ".join(process.cmdline()), process.memory_info().rss // 1_000_000
                except psutil.Error:
                    continue
                role = next((role for role, word in ROLES.items() if word in command), None)
                if role:
                    megabytes[role] = megabytes.get(role, 0) + size
            self.seen.append((self._part, megabytes))


def show(found: dict[str, object], watch: Watch) -> None:
    """Print the tables and the JSON object."""
    console = Console(width=120)
    parts = list(dict.fromkeys(part for part, _ in watch.seen))
    table = Table(title="resident memory, MB: at the start of a part, in its middle, at its end, at most", title_justify="left")
    table.add_column("part")
    for role in ROLES:
        table.add_column(role, justify="right")
    peaks: dict[str, int] = {}
    for part in parts:
        cells = []
        for role in ROLES:
            sizes = [seen[role] for name, seen in watch.seen if name == part and role in seen]
            cells.append(f"{sizes[0]}, {sizes[len(sizes) // 2]}, {sizes[-1]}, {max(sizes)}" if sizes else "")
            peaks[role] = max([peaks.get(role, 0), *sizes])
        table.add_row(part, *cells)
    console.print(table)
    for name, value in found.items():
        console.print(f"{name}: {value}", highlight=False)
    print(json.dumps(found | {"peak_megabytes": peaks}))


if __name__ == "__main__":
    main()
