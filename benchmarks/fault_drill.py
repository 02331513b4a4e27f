"""The whole graph of one recipe under a real `dagster dev`, killed again and again: it ends in the bytes of an undisturbed run.

    python -m benchmarks.fault_drill [--kills 30] [--quick] [--recipe tiny] [--seed 0] [--postgres] [--keep DIRECTORY]

The undisturbed run is `gristmill run` in a project directory of its own, with the domains of the recipe alone. The other
one is launched stage by stage through GraphQL, and SIGKILL comes at random (seeded) moments to

    child       the process that trains, or measures a checkpoint
    server      the process that forked it
    pool        a process that maps shards for a step
    worker      the process of the run, in which its steps run
    everything  `dagster dev`, its daemon, its code server and all of the above, as the end of power does
    database    with `--postgres`, the server of PostgreSQL that Dagster and MLflow write to; it is started again at once

What Dagster does by itself is waited for: the step's retry, the daemon's retry of the run, and after `everything` a new
`dagster dev`, whose sensor `lost_runs` ends what was lost. Only where all of these are used up is the run executed again,
as the button of the UI does. The kills are spread over the stages; where a stage ends before its share of them, an artifact
of it is removed and it is launched again.

What is compared in the end is the SHA-256 of every file of every current artifact; of the reports, which print times and memory,
the fingerprint. What is looked for: runs that are not
over, slots of pools that are held, processes that outlived it, locks that are held, and what lies in the staging area, among
the messages of children, and in the directory for temporary files. `--quick` kills six times.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import yaml
from rich.console import Console
from rich.table import Table

from benchmarks.dagster_server import OVER, ROOT, DagsterServer, is_child
from benchmarks.postgres_server import Postgres, postgres_cluster, postgres_programs
from pipelines.files import is_locked
from pipelines.manifests import MANIFEST_NAME
from pipelines.store import Store

KILLS, QUICK_KILLS = 30, 6
SHARES = {"ingest": 3, "fit": 4, "measure": 4, "decide": 8, "probe": 5, "train": 6, "compare": 0}
"""Kills of each stage, of 30."""
WEIGHTS = {"child": 5, "server": 1, "pool": 3, "worker": 4, "everything": 2, "database": 2}
"""How often each kind is drawn, of 17 times."""
MATCHES = {
    "child": is_child,
    "server": lambda process: not is_child(process) and "assets_defs.fork_server" in process.cmdline(),
    "pool": lambda process: any("spawn_main" in word for word in process.cmdline()),
}
"""Whether a descendant of a run's process is of a kind."""
MAX_DELAY = 8.0
"""Seconds from the beginning of a run, or from the last kill's end, to the kill, at most."""
PATIENCE = 600.0
MEASURED = ("report", "recipes_report")
"""They print seconds, speeds and memory of steps: their fingerprints are compared, their bytes cannot be equal."""
RANGE = ("dagster/asset_partition_range_start", "dagster/asset_partition_range_end")


@dataclass
class Kill:
    """A process that was killed, and what came of it."""

    stage: str
    run: str
    kind: str
    seconds: float
    """From the beginning of the run's process."""
    doing: str = ""
    """The step it was in."""
    then: str = ""
    after: float = 0.0
    """Seconds until work went on."""


@dataclass
class Drill:
    """The disturbed run."""

    server: DagsterServer
    draw: random.Random
    recipe: str
    database: Postgres | None = None
    kills: list[Kill] = field(default_factory=list)
    by_hand: int = 0
    """Runs that were executed again because nothing did so by itself."""

    @property
    def store(self) -> Store:
        """Where its artifacts are."""
        return Store(self.server.directory / ".gristmill")

    def stage(self, name: str, assets: tuple[str, ...], first: str | None, last: str | None, kills: int) -> None:
        """Run stage `name` to its end, with `kills` kills on the way.

        Raises:
            RuntimeError: it does not come to an end.
        """
        tags = dict(zip(RANGE, (first, last), strict=True)) if first != last and first and last else {}
        left = kills
        while True:
            run = self.server.launch((), first if first == last else None, job=name, **tags)
            left = self._disturb(name, run, left)
            if not left:
                return
            self._forget(assets)

    def _disturb(self, stage: str, run: str, kills: int) -> int:
        """Kill `run` and its successors, `kills` times or until one succeeds; return how many kills are left."""
        while True:
            run, process = self._at_work(run)
            if process is None:
                return kills
            if not kills:
                time.sleep(0.5)
                continue
            seconds = self.draw.uniform(0.0, MAX_DELAY)
            kinds = {kind: weight for kind, weight in WEIGHTS.items() if self.database or kind != "database"}
            kind = self.draw.choices(list(kinds), list(kinds.values()))[0]
            killed = self._kill(stage, run, process, kind, seconds)
            kills -= killed

    def _at_work(self, run: str) -> tuple[str, psutil.Process | None]:
        """Return the run that goes on with `run` and its process, once there is one; no process where it has succeeded.

        Raises:
            RuntimeError: nothing goes on.
        """
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            runs = self.server.runs()
            run = next((name for name, one in runs.items() if one["tags"].get("dagster/parent_run_id") == run), run)
            status = runs[run]["status"]
            if status == "SUCCESS":
                return run, None
            if status in OVER and runs[run]["tags"].get("dagster/will_retry", "false" if status != "FAILURE" else None) == "false":
                again = self.server.reexecute(run)
                self._note("executed again by hand" if again else "every step was done")
                if again is None:
                    return run, None
                self.by_hand += 1
                run = again
            elif status == "STARTED" and (process := self._process(run)):
                self._note(self._went_on(run))
                return run, process
            time.sleep(0.3)
        raise RuntimeError(f"run {run} does not go on: {self.server.runs()[run]}\n{self.server.tail()}")

    def _went_on(self, run: str) -> str:
        if not self.kills or self.kills[-1].run != run:
            return "run retried by the daemon"
        return "the run went on" if self.kills[-1].kind == "database" else "step retried in its run"

    def _note(self, words: str) -> None:
        """Note what came of the last kill, once."""
        if self.kills and not self.kills[-1].then:
            self.kills[-1].then, self.kills[-1].after = words, time.monotonic() - self.kills[-1].after
            print(f"  {words} after {self.kills[-1].after:.0f} s", file=sys.stderr, flush=True)

    def _process(self, run: str) -> psutil.Process | None:
        """Return the living process of `run`."""
        found = [re.search(r"Started process for run \(pid: (\d+)\)", message) for message in self.server.messages(run)]
        pids = [int(match.group(1)) for match in found if match]
        try:
            process = psutil.Process(pids[-1]) if pids else None
            return process if process and process.status() != psutil.STATUS_ZOMBIE else None
        except psutil.NoSuchProcess:
            return None

    def _kill(self, stage: str, run: str, process: psutil.Process, kind: str, seconds: float) -> int:
        """Kill what `kind` says after `seconds`; return 1, or 0 where the run was over before."""
        time.sleep(seconds)
        doing = self._doing(run)
        victims = list(self._victims(process, kind))
        if not victims and kind not in ("everything", "database"):  # also where the step at hand has no children
            kind, victims = "worker", [process]
        try:
            age = time.time() - process.create_time()
            if victims:
                victim = self.draw.choice(victims)
                victim.kill()
        except psutil.NoSuchProcess:
            return 0
        kill = Kill(stage, run, kind, age, doing, after=time.monotonic())
        self.kills.append(kill)
        print(f"kill {len(self.kills)}: {kind} of {stage} after {age:.1f} s, in {doing or 'no step'}", file=sys.stderr, flush=True)
        if kind == "everything":
            self.server.kill()
            self.server.start()
        elif self.database and kind == "database":
            self.database.stop()
            self.database.start()
            self.server.wait_for("answers after the database came back", 60, self._answers)
        elif victim != process:
            self._wait_for_retry(process, victim)
        else:
            psutil.wait_procs([process], timeout=30)
        return 1

    def _answers(self) -> bool:
        with contextlib.suppress(RuntimeError):  # that a connection was cut is noticed by the request that uses it
            runs = self.server.runs()
            return bool(runs and self.server.messages(next(iter(runs))))
        return False

    def _wait_for_retry(self, process: psutil.Process, victim: psutil.Process) -> None:
        """Wait until the run's process has children again, or is over."""
        psutil.wait_procs([victim], timeout=30)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            if list(self._victims(process, "child")) or list(self._victims(process, "pool")):
                return
            time.sleep(0.1)

    @staticmethod
    def _victims(process: psutil.Process, kind: str) -> Iterator[psutil.Process]:
        matches = MATCHES.get(kind, lambda _: False)
        try:
            for child in process.children(recursive=True):
                if child.status() != psutil.STATUS_ZOMBIE and matches(child):
                    yield child
        except psutil.Error:
            return

    def _doing(self, run: str) -> str:
        started = [
            match.group(1) for message in self.server.messages(run) if (match := re.match(r'Started execution of step "(\w+)"', message))
        ]
        return started[-1] if started else ""

    def _forget(self, assets: tuple[str, ...]) -> None:
        """Remove a current artifact of `assets`, so that it is computed again."""
        found = [(asset, key) for asset in assets for key in self.store.partitions(asset) or [None] if self.store.is_current(asset, key)]
        asset, key = self.draw.choice(found)
        shutil.rmtree(self.store.current(asset, key).directory)
        print(f"  removed {asset} {key or ''}", file=sys.stderr, flush=True)


def main() -> None:
    """Run undisturbed and disturbed, print the table of kills, and end with one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, help="how often something is killed")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_KILLS} kills instead of {KILLS}")
    parser.add_argument("--recipe", default="tiny", help="a file in recipes/, without .yaml")
    parser.add_argument("--seed", type=int, default=0, help="of the kinds and the moments")
    parser.add_argument("--workers", type=int, default=2, help="processes per step: with one, no shards are mapped over processes")
    parser.add_argument("--postgres", action="store_true", help="Dagster and MLflow on a PostgreSQL of its own, which is killed too")
    parser.add_argument("--keep", type=Path, help="work in this directory, which must not exist, and leave it")
    parser.add_argument("--against", type=Path, help="the project of an undisturbed run, as `--keep` leaves in whole/")
    arguments = parser.parse_args()
    kills = arguments.kills or (QUICK_KILLS if arguments.quick else KILLS)
    with tempfile.TemporaryDirectory(prefix="gristmill-drill-") as name:
        directory = (arguments.keep or Path(name)).resolve()
        with cluster() if arguments.postgres else contextlib.nullcontext() as database:
            result = drill(directory, arguments.recipe, kills, arguments.seed, arguments.workers, arguments.against, database)
    print(json.dumps(result))


def cluster() -> contextlib.AbstractContextManager[Postgres]:
    """Return a PostgreSQL to be started.

    Raises:
        SystemExit: it is not installed.
    """
    programs = postgres_programs()
    if programs is None:
        raise SystemExit("--postgres needs PostgreSQL's server programs (Debian: apt-get install postgresql) and the extra `postgres`")
    return postgres_cluster(programs)


def drill(
    directory: Path, recipe: str, kills: int, seed: int, workers: int, against: Path | None, database: Postgres | None
) -> dict[str, object]:
    """Run both in `directory` and compare them."""
    started = time.monotonic()
    whole = Store(against / ".gristmill") if against else undisturbed(project(directory / "whole", recipe), recipe, workers)
    seconds = time.monotonic() - started
    print(f"undisturbed: {seconds:.0f} s", file=sys.stderr, flush=True)
    place, temporary = project(directory / "killed", recipe), directory / "temporary"
    temporary.mkdir()
    variables = {"GRISTMILL_WORKERS": str(workers), "TMPDIR": str(temporary), "MLFLOW_DISABLE_TELEMETRY": "true"}
    if database:
        shutil.copy(ROOT / "deploy" / "postgres" / "dagster.yaml", place)
        variables |= databases(database)
    server = DagsterServer(place, **variables)
    found = Drill(server, random.Random(seed), recipe, database)
    server.start()
    try:
        for name, assets, first, last, share in stages(place, recipe, kills):
            print(f"{name}: {share} kills", file=sys.stderr, flush=True)
            found.stage(name, assets, first, last, share)
        settled(server)
        left = left_over(server)
    finally:
        outlived = server.stop()
    left |= {"processes": [str(pid) for pid in outlived], **in_the_store(found.store)}
    left["temporary"] = sorted(path.name for path in temporary.iterdir())
    show(found.kills)
    differing = compare(whole, found.store)
    faults = [fault for asset, key in currents(found.store) for fault in found.store.verify(found.store.current(asset, key))]
    return {
        "recipe": recipe,
        "kills": len(found.kills),
        **{kind: sum(kill.kind == kind for kill in found.kills) for kind in WEIGHTS},
        "by_hand": found.by_hand,
        "artifacts": len(list(currents(whole))),
        "identical": not differing,
        "differing": differing[:10],
        "faults": faults[:10],
        "left_over": {name: names[:5] for name, names in left.items() if names},
        "undisturbed_seconds": round(seconds, 1),
        "seconds": round(time.monotonic() - started, 1),
    }


def databases(server: Postgres) -> dict[str, str]:
    """Return the environment variables of a database for Dagster and one for MLflow, made on `server`."""
    tracking = server.create("mlflow")
    server.create("dagster")
    found = {"HOST": "127.0.0.1", "PORT": str(server.port), "DB": "dagster", "USER": server.user, "PASSWORD": "none"}
    return {"MLFLOW_TRACKING_URI": tracking} | {f"DAGSTER_POSTGRES_{name}": value for name, value in found.items()}


def project(directory: Path, recipe: str) -> Path:
    """Return `directory` with a project of `recipe` alone in it: its domains, and the snapshots that are fitted on."""
    directory.mkdir(parents=True)
    (directory / "recipes").mkdir()
    shutil.copy(ROOT / "dagster.yaml", directory)
    shutil.copy(ROOT / "recipes" / f"{recipe}.yaml", directory / "recipes")
    (directory / "data").symlink_to(ROOT / "data")
    wanted = yaml.safe_load((directory / "recipes" / f"{recipe}.yaml").read_text(encoding="utf-8"))
    domains = {domain for role in wanted["roles"].values() for domain in role}
    found = yaml.safe_load((ROOT / "project.yaml").read_text(encoding="utf-8"))
    found["domains"] = {name: settings for name, settings in found["domains"].items() if name in domains}
    found["snapshots"] = found["fit_on"]
    found["evaluation_sets"] = {name: one for name, one in found["evaluation_sets"].items() if one.get("domain", "wiki") in domains}
    perplexity = found["quality"]["perplexity"]
    perplexity["good"] = [name for name in perplexity["good"] if name in domains]
    (directory / "project.yaml").write_text(yaml.safe_dump(found, sort_keys=False), encoding="utf-8")
    return directory


def undisturbed(directory: Path, recipe: str, workers: int) -> Store:
    """Return the store of `gristmill run` in `directory`.

    Raises:
        RuntimeError: it failed.
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("GRISTMILL_", "DAGSTER_", "MLFLOW_"))}
    environment |= {"PYTHONPATH": str(ROOT), "GRISTMILL_WORKERS": str(workers)}
    command = [sys.executable, "-m", "assets_defs.cli", "run", "--recipe", recipe]
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the undisturbed run failed: {done.stderr[-2000:]}")
    return Store(directory / ".gristmill")


def stages(directory: Path, recipe: str, kills: int) -> Iterator[tuple[str, tuple[str, ...], str | None, str | None, int]]:
    """Yield the stages of `recipe` in the project `directory`: name, assets, first and last partition, and kills."""
    os.environ["GRISTMILL_PROJECT"] = str(directory)
    from assets_defs.automation import STAGES
    from assets_defs.driver import source_range
    from assets_defs.partitions import PROBES
    from assets_defs.resources import load_recipes

    source = source_range(load_recipes()[recipe])
    probes = (PROBES[recipe][0], PROBES[recipe][-1])
    ranges = {"ingest": source, "measure": source, "fit": (None, None), "probe": probes, "compare": (None, None)}
    total, done, shares = sum(SHARES.values()), 0, 0
    for name, assets in STAGES:
        shares += SHARES[name]
        share = round(kills * shares / total) - done
        done += share
        first, last = ranges.get(name, (recipe, recipe))
        yield name, assets, first, last, share


def settled(server: DagsterServer) -> None:
    """Wait until no run is under way and the daemons had the time to free what is held."""
    server.wait_for("end of all runs", PATIENCE, lambda: all(run["status"] in OVER for run in server.runs().values()))
    deadline = time.monotonic() + 60
    while server.held_slots() and time.monotonic() < deadline:
        time.sleep(1)


def left_over(server: DagsterServer) -> dict[str, list[str]]:
    """Return what is left while the server still runs: runs that are not over, slots that are held, children."""
    return {
        "runs": [run for run, one in server.runs().items() if one["status"] not in OVER],
        "slots": server.held_slots(),
        "children": [str(process.pid) for process in server.children()],
    }


def in_the_store(store: Store) -> dict[str, list[str]]:
    """Return what is left in the store besides artifacts."""
    root = store.root
    halves = [path for path in root.glob("artifacts/*/*") if not (path / MANIFEST_NAME).exists()]
    return {
        "staging": sorted(path.name for path in root.glob("staging/*")),
        "messages": sorted(path.name for path in root.glob("children/*")),
        "half_artifacts": sorted(path.name for path in halves),
        "half_pointers": sorted(path.name for path in root.glob("current/*/*.tmp")),
        "held_locks": sorted(path.name for path in root.glob("locks/*") if is_locked(path)),
    }


def currents(store: Store) -> Iterator[tuple[str, str | None]]:
    """Yield every asset and partition that stands at an artifact."""
    for path in sorted(store.root.glob("current/*")):
        for key in store.partitions(path.name) or [None]:
            yield path.name, key


def compare(whole: Store, killed: Store) -> list[str]:
    """Return the labels of the artifacts that differ, by fingerprint or by the hashes of their files, or are missing on one side."""
    sides = [
        {
            one: (manifest.fingerprint, manifest.content_sha256 if one[0] not in MEASURED else "")
            for one in currents(store)
            for manifest in [store.current(*one)]
        }
        for store in (whole, killed)
    ]
    return [
        f"{asset}[{key or ''}]"
        for asset, key in sorted(sides[0].keys() | sides[1].keys(), key=str)
        if sides[0].get((asset, key)) != sides[1].get((asset, key))
    ]


def show(kills: list[Kill]) -> None:
    """Print what was killed, when, and what happened."""
    table = Table(title="kills", title_justify="left")
    for column in ("kill", "stage", "killed", "seconds into the run", "in", "then", "seconds until then"):
        table.add_column(column, justify="right" if "seconds" in column or column == "kill" else "left")
    for number, kill in enumerate(kills, start=1):
        table.add_row(str(number), kill.stage, kill.kind, f"{kill.seconds:.1f}", kill.doing, kill.then, f"{kill.after:.1f}")
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
