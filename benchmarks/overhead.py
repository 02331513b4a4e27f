"""What orchestration costs: the share of a run that is no step's compute, the time to load the code location, the price of a cache hit.

    python -m benchmarks.overhead [--recipe tiny] [--quick]

`gristmill run` drives the whole graph in a directory of its own, then three times more, when everything is a hit. The share of the first
run that is no compute is its wall time without the seconds that the manifests of its artifacts give for their steps (partitions of a step
run side by side: there the span from the first one's start to the last one's end counts, with what lies between them).

The price of a hit is the time of its step, from Dagster's events, without the time of a step that Dagster runs for nothing: an asset of
as many partitions, checks and dependencies that records as many events and does no work. Both are the best of three. `--quick` ingests
and does no more.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path

import dagster as dg
from rich.console import Console
from rich.table import Table

from pipelines.engine import die_with_parent
from pipelines.manifests import read_manifest

ROOT = Path(__file__).parents[1]
QUICK = ("ingest",)
REPEATS = 3
LOAD = "import time; from assets_defs.definitions import defs; defs.get_repository_def(); print(time.process_time())"
DRIVE = """
import os, sys
from assets_defs import driver
wanted = sys.argv[2].split(",")
driver.STAGES = tuple(stage for stage in driver.STAGES if stage[0] in wanted)
driver._print_results = lambda *_: None
driver.drive(sys.argv[1])
"""


def main() -> None:
    """Run twice, time the twins, print the table, and end with one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="tiny", help="a file in recipes/, without .yaml")
    parser.add_argument("--quick", action="store_true", help="`ingest` alone")
    arguments = parser.parse_args()
    from assets_defs.automation import STAGES

    stages = QUICK if arguments.quick else tuple(name for name, _ in STAGES)
    with tempfile.TemporaryDirectory(prefix="gristmill-overhead-") as name:
        home = Path(name).resolve()
        environment = {**os.environ, "GRISTMILL_PROJECT": str(ROOT), "GRISTMILL_HOME": str(home / "mill"), "DAGSTER_HOME": str(home)}
        environment |= {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)  # with it every process compiles what it imports
        (home / "dagster.yaml").write_text((ROOT / "dagster.yaml").read_text().replace(".dagster/", f"{home}/.dagster/"))
        walls = [drive(arguments.recipe, stages, environment) for _ in range(1 + REPEATS)]
        computed = compute_seconds(home / "mill")
        os.environ["DAGSTER_HOME"] = str(home)
        with dg.DagsterInstance.get() as instance:
            prices = hit_prices(instance, REPEATS * len(stages))
    loads = [
        float(subprocess.run([sys.executable, "-c", LOAD], cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout)
        for _ in range(3)
    ]
    found = {
        "first_run_seconds": round(walls[0], 1),
        "in_steps_seconds": round(computed, 1),
        "share_not_in_steps": round(1 - computed / walls[0], 3),
        "second_run_seconds": round(min(walls[1:]), 1),
        "load_cpu_seconds": round(min(loads), 2),
        "hit_milliseconds_median": round(1000 * statistics.median(price for *_, price in prices), 1),
        "hit_milliseconds_most": round(1000 * max(price for *_, price in prices), 1),
    }
    show(found, prices)


def drive(recipe: str, stages: Sequence[str], environment: dict[str, str]) -> float:
    """Run the stages as `gristmill run` does; return the seconds of the whole process."""
    started = time.monotonic()
    command = [sys.executable, "-c", DRIVE, recipe, ",".join(stages)]
    silent = subprocess.DEVNULL
    subprocess.run(command, cwd=ROOT, env=environment, stdout=silent, stderr=silent, check=True, preexec_fn=die_with_parent)
    return time.monotonic() - started


def compute_seconds(mill: Path) -> float:
    """Return the length of the union of the times in which a step computed."""
    spans = sorted(_spans(mill))
    total, end = 0.0, 0.0
    for first, last in spans:
        total += max(0.0, last - max(first, end))
        end = max(end, last)
    return total


def _spans(mill: Path) -> Iterator[tuple[float, float]]:
    """Yield when each artifact's step began and ended; what is made of nothing but others is among them."""
    for path in mill.glob("artifacts/*/*/manifest.json"):
        provenance = read_manifest(path.parent).provenance
        began = datetime.fromisoformat(str(provenance["started"])).timestamp()
        yield began, began + float(provenance["seconds"])  # type: ignore[arg-type]


def hit_prices(instance: dg.DagsterInstance, runs: int) -> list[tuple[str, int, float, float]]:
    """Return asset, partitions, the best seconds of its step in the last `runs` runs, and of those per partition what is not Dagster's."""
    from assets_defs.definitions import defs

    graph = defs.resolve_asset_graph()
    best: dict[tuple[str, int, int], float] = {}
    for run in instance.get_runs(limit=runs):
        events = instance.all_logs(run.run_id)
        for step in sorted({event.step_key for event in events if event.step_key}):
            own = [event for event in events if event.step_key == step and event.dagster_event]
            times = {event.dagster_event.event_type_value: event.timestamp for event in own}
            described = [e for e in own if e.asset_materialization and "cache" in e.asset_materialization.metadata]
            checks = sum(event.dagster_event.event_type_value == "ASSET_CHECK_EVALUATION" for event in own)
            key = (step, len(described), checks)
            best[key] = min(best.get(key, float("inf")), times["STEP_SUCCESS"] - times["STEP_START"])
    twins: dict[tuple[int, int, int], float] = {}
    found = []
    for (step, partitions, checks), seconds in best.items():
        shape = (partitions, checks, len(graph.get(dg.AssetKey(step)).parent_keys))
        if shape not in twins:
            twins[shape] = twin_seconds(instance, *shape)
        found.append((step, partitions, seconds, (seconds - twins[shape]) / max(1, partitions)))
    return found


def twin_seconds(instance: dg.DagsterInstance, partitions: int, checks: int, dependencies: int) -> float:
    """Return the seconds, the best of three, of a step that records as many events and does nothing."""
    keys = [f"k{number:04}" for number in range(partitions)]
    definition = dg.StaticPartitionsDefinition(keys) if partitions > 1 else None

    @dg.asset(
        deps=[f"upstream_{number}" for number in range(dependencies)],
        partitions_def=definition,
        backfill_policy=dg.BackfillPolicy.single_run(),
        check_specs=[dg.AssetCheckSpec(f"check_{number}", asset="twin") for number in range(checks)],
        output_required=False,
        dagster_type=dg.Nothing,
    )
    def twin():  # noqa: ANN202 - Dagster reads the annotation, which is text in this module
        yield dg.Output(None)
        for key in keys if partitions > 1 else ():
            yield dg.AssetMaterialization("twin", partition=key, metadata={"kept": 1})
        for number in range(checks):
            yield dg.AssetCheckResult(check_name=f"check_{number}", passed=True)

    tags = {"dagster/asset_partition_range_start": keys[0], "dagster/asset_partition_range_end": keys[-1]} if partitions > 1 else {}
    config = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}
    taken = []
    for _ in range(REPEATS):
        result = dg.materialize([twin], instance=instance, tags=tags, run_config=config)
        times = {e.dagster_event.event_type_value: e.timestamp for e in instance.all_logs(result.run_id) if e.step_key and e.dagster_event}
        taken.append(times["STEP_SUCCESS"] - times["STEP_START"])
    return min(taken)


def show(found: dict[str, float], prices: Sequence[tuple[str, int, float, float]]) -> None:
    """Print the tables and the JSON object."""
    console = Console(width=120)
    table = Table(title="second run: everything is a hit", title_justify="left")
    for number, name in enumerate(("asset", "partitions", "seconds of the step", "ms per partition beyond Dagster's own")):
        table.add_column(name, justify="left" if number == 0 else "right")
    for asset, partitions, seconds, price in prices:
        table.add_row(asset, str(partitions), f"{seconds:.2f}", f"{1000 * price:.1f}")
    console.print(table)
    for name, value in found.items():
        console.print(f"{name}: {value}", highlight=False)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
