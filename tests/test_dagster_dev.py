"""A real `dagster dev` in a project of its own, driven through GraphQL: a run, a backfill, the schedule and the sensor."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import pytest
from small_world import sample_texts

from pipelines.store import Store

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
DOMAINS = ("code", "techdoc", "wiki")  # those of recipes/tiny.yaml
MONTHS = ("2026-01-01", "2026-02-01", "2026-03-01")
DOCUMENTS = 20
"""Per domain and month."""
BACKFILLED = tuple(f"techdoc|{month}" for month in MONTHS)
LAUNCHED = "wiki|2026-01-01"
CHANGED = "code|2026-02-01"
LATE = "def late(text):\n    return f'{text} came after the first tick of the sensor'\n" * 4
REPOSITORY = {"repositoryLocationName": "gristmill", "repositoryName": "__repository__"}
SCHEDULE = {**REPOSITORY, "scheduleName": "monthly_snapshot"}
SENSOR = {**REPOSITORY, "sensorName": "new_source_files"}

PROJECT = """\
name: small
first_snapshot: "2026-01-01"
snapshots: ["2026-01-01", "2026-02-01", "2026-03-01"]
fit_on: ["2026-01-01"]
source: jsonl
source_settings: {paths: ["texts/{domain}/{snapshot}.jsonl"]}
quality: {gopher_quality: {num_words: 10}}
toxicity: {toxic_words: {}}
tokenizer: {vocabulary_size: 512}
domains: {code: {}, techdoc: {}, wiki: {}}
"""

LOADED = "{repositoriesOrError{... on RepositoryConnection{nodes{name}}}}"
LAUNCH = """mutation($p: ExecutionParams!){launchRun(executionParams: $p){__typename
  ... on LaunchRunSuccess{run{runId}} ... on PythonError{message}}}"""
RUN = """query($run: ID!){runOrError(runId: $run){... on Run{status tags{key value}
  eventConnection{events{... on ExecutionStepFailureEvent{error{message causes{message}}} ... on RunFailureEvent{message}}}}}}"""
BACKFILL = """mutation($p: LaunchBackfillParams!){launchPartitionBackfill(backfillParams: $p){__typename
  ... on LaunchBackfillSuccess{backfillId} ... on PythonError{message}}}"""
BACKFILL_STATUS = "query($id: String!){partitionBackfillOrError(backfillId: $id){... on PartitionBackfill{status error{message}}}}"
MATERIALIZED = """query($asset: AssetKeyInput!, $partitions: [String!]){assetNodeOrError(assetKey: $asset){... on AssetNode{
  assetMaterializations(partitions: $partitions, limit: 1){runId tags{key value}
    metadataEntries{label ... on IntMetadataEntry{intValue} ... on PathMetadataEntry{path} ... on UrlMetadataEntry{url}}}
  assetChecksOrError{... on AssetChecks{checks{name executionForLatestMaterialization{status runId}}}}}}}"""
START_SCHEDULE = """mutation($s: ScheduleSelector!){startSchedule(scheduleSelector: $s){
  ... on ScheduleStateResult{scheduleState{id status}} ... on PythonError{message}}}"""
STOP_SCHEDULE = """mutation($id: String!){stopRunningSchedule(id: $id){
  ... on ScheduleStateResult{scheduleState{status}} ... on PythonError{message}}}"""
TRY_SCHEDULE = """mutation($s: ScheduleSelector!, $t: Float!){scheduleDryRun(selectorData: $s, timestamp: $t){__typename
  ... on PythonError{message}
  ... on DryRunInstigationTick{timestamp evaluationResult{runRequests{jobName tags{key value}} error{message}}}}}"""
START_SENSOR = """mutation($s: SensorSelector!){startSensor(sensorSelector: $s){
  ... on Sensor{sensorState{id status}} ... on PythonError{message}}}"""
STOP_SENSOR = """mutation($id: String!){stopSensor(id: $id){
  ... on StopSensorMutationResult{instigationState{status}} ... on PythonError{message}}}"""
TRY_SENSOR = """mutation($s: SensorSelector!, $c: String){sensorDryRun(selectorData: $s, cursor: $c){__typename
  ... on PythonError{message}
  ... on DryRunInstigationTick{evaluationResult{skipReason runRequests{tags{key value}} error{message}}}}}"""
SENSOR_STATE = """query($s: SensorSelector!){sensorOrError(sensorSelector: $s){... on Sensor{sensorState{
  typeSpecificData{... on SensorData{lastCursor}} ticks(limit: 20){status runIds skipReason error{message}}}}}}"""


class DagsterDev:
    """`dagster dev` as the leader of its own process group."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.log = directory / "dagster_dev.log"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("GRISTMILL_", "DAGSTER_", "MLFLOW_"))}
        environment |= {"PYTHONPATH": str(ROOT), "DAGSTER_HOME": str(directory), "GRISTMILL_WORKERS": "1"}
        command = [sys.executable, "-m", "dagster", "dev", "-h", "127.0.0.1", "-p", str(self.port)]
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background has it ignored, and its children would too
        with self.log.open("wb") as file:
            self.process = subprocess.Popen(
                command,
                cwd=directory,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def store(self) -> Store:
        return Store(self.directory / ".gristmill")

    def ask(self, query: str, **variables: object) -> Any:
        """Return the one field that `query` asks for."""
        body = json.dumps({"query": query, "variables": variables}).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/graphql", body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                answer = json.load(response)
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{error.read().decode()[:2000]}\n{self.tail()}") from error
        assert not answer.get("errors"), f"{answer['errors']}\n{self.tail()}"
        (field,) = answer["data"].values()
        return field

    def wait_for(self, what: str, seconds: float, found: Callable[[], Any]) -> Any:
        """Return the first true value of `found`."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            assert self.process.poll() is None, f"dagster dev ended with {self.process.returncode}\n{self.tail()}"
            if value := found():
                return value
            time.sleep(0.5)
        raise AssertionError(f"no {what} within {seconds:.0f} s\n{self.tail()}")

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-6000:]

    def loaded(self) -> bool:
        try:
            return bool(self.ask(LOADED).get("nodes"))
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False

    def finished_run(self, run: str, seconds: float = 120) -> dict[str, Any]:
        """Wait until `run` is over and return its status and tags; a failure is shown with its messages."""

        def over() -> dict[str, Any] | None:
            state = self.ask(RUN, run=run)
            return state if state["status"] in ("SUCCESS", "FAILURE", "CANCELED") else None

        state = self.wait_for(f"end of run {run}", seconds, over)
        assert state["status"] == "SUCCESS", f"{[e for e in state['eventConnection']['events'] if e]}\n{self.tail()}"
        return {"status": state["status"], "tags": tags(state)}

    def latest(self, asset: str, partition: str) -> dict[str, Any]:
        """Return the last materialization of `partition` and the checks of `asset`."""
        node = self.ask(MATERIALIZED, asset={"path": [asset]}, partitions=[partition])
        (event,) = node["assetMaterializations"]
        metadata = {entry.pop("label"): next(iter(entry.values()), None) for entry in event["metadataEntries"]}
        return {"run": event["runId"], "tags": tags(event), "metadata": metadata, "checks": node["assetChecksOrError"]["checks"]}

    def ticks(self) -> list[dict[str, Any]]:
        """Return the ticks of the sensor that are over, the newest first."""
        ticks = self.ask(SENSOR_STATE, s=SENSOR)["sensorState"]["ticks"]
        failed = [tick["error"]["message"] for tick in ticks if tick["error"]]
        assert not failed, failed
        return [tick for tick in ticks if tick["status"] != "STARTED"]

    def stop(self) -> list[int]:
        """Interrupt the process group as a terminal does, and return the processes that it left."""
        os.killpg(self.process.pid, signal.SIGINT)
        deadline = time.monotonic() + 180  # a loaded machine lets its processes wait
        while (left := self.processes()) and time.monotonic() < deadline:
            self.process.poll()
            time.sleep(0.2)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        self.process.wait(10)
        return left

    def processes(self) -> list[int]:
        """Return the processes that run in this project's directory."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.status() != psutil.STATUS_ZOMBIE and process.cwd() == str(self.directory):
                    found.append(process.pid)
            except psutil.Error:
                continue
        return found


def tags(node: dict[str, Any]) -> dict[str, str]:
    return {tag["key"]: tag["value"] for tag in node["tags"]}


def source_file(directory: Path, partition: str) -> Path:
    return directory / "texts" / f"{partition.replace('|', '/')}.jsonl"


def write_project(directory: Path) -> None:
    """Write three domains of real text over three months, one file for each."""
    directory.mkdir()
    for name in ("dagster.yaml", "workspace.yaml"):
        shutil.copy(ROOT / name, directory)
    (directory / "recipes").mkdir()
    shutil.copy(ROOT / "recipes" / "tiny.yaml", directory / "recipes")
    (directory / "project.yaml").write_text(PROJECT)
    for domain in DOMAINS:
        texts = sample_texts(domain, DOCUMENTS * len(MONTHS), 600)
        for number, month in enumerate(MONTHS):
            chosen = texts[number * DOCUMENTS : (number + 1) * DOCUMENTS]
            path = source_file(directory, f"{domain}|{month}")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps({"id": f"{month}-{n}", "text": text}) + "\n" for n, text in enumerate(chosen)))


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DagsterDev]:
    """A running `dagster dev`; its sensor is on and has a baseline, after which one source file was given a document.

    A sensor ticks once a minute: its next tick comes while the other tests wait for theirs.
    """
    directory = tmp_path_factory.mktemp("dagster_dev").resolve() / "project"
    write_project(directory)
    dev = DagsterDev(directory)
    left: list[int] = []
    try:
        dev.wait_for("code location", 180, dev.loaded)
        dev.sensor_id = dev.ask(START_SENSOR, s=SENSOR)["sensorState"]["id"]  # type: ignore[attr-defined]
        dev.wait_for("first tick of the sensor", 90, dev.ticks)
        with source_file(directory, CHANGED).open("a") as file:
            file.write(
                json.dumps({"id": "late", "text": "def late():\n    return 'a document that came after the first tick'\n" * 8}) + "\n"
            )
        yield dev
    finally:
        left = dev.stop()
    assert not left, f"processes outlived dagster dev: {left}\n{dev.tail()}"


def test_a_launched_asset_has_metadata_and_check_results(dev: DagsterDev) -> None:
    selector = {**REPOSITORY, "jobName": "__ASSET_JOB", "assetSelection": [{"path": ["raw_corpus"]}]}
    metadata = {"tags": [{"key": "dagster/partition", "value": LAUNCHED}]}
    launched = dev.ask(LAUNCH, p={"selector": selector, "mode": "default", "executionMetadata": metadata})
    assert launched["__typename"] == "LaunchRunSuccess", launched
    run = launched["run"]["runId"]
    dev.finished_run(run)
    found, manifest = dev.latest("raw_corpus", LAUNCHED), dev.store.current("raw_corpus", LAUNCHED)
    assert found["run"] == run
    assert found["metadata"]["documents_in"] == found["metadata"]["kept"] == DOCUMENTS == manifest.counts["kept"]
    assert found["metadata"]["path"] == str(manifest.directory)
    assert "/runs/" in found["metadata"]["mlflow_run"]
    assert found["tags"]["dagster/data_version"] == manifest.fingerprint
    results = {check["name"]: check["executionForLatestMaterialization"] for check in found["checks"]}
    assert set(results) == {"documents_conserved", "ids_unique", "text_present", "input_whole"}
    assert all(result["status"] == "SUCCEEDED" and result["runId"] == run for result in results.values()), results


def test_a_backfill_materializes_each_of_its_partitions(dev: DagsterDev) -> None:
    launched = dev.ask(BACKFILL, p={"assetSelection": [{"path": ["raw_corpus"]}], "partitionNames": list(BACKFILLED), "title": "techdoc"})
    assert launched["__typename"] == "LaunchBackfillSuccess", launched

    def over() -> dict[str, Any] | None:
        state = dev.ask(BACKFILL_STATUS, id=launched["backfillId"])
        return state if state["status"].startswith(("COMPLETED", "FAIL", "CANCELED")) else None

    state = dev.wait_for("end of the backfill", 180, over)
    assert state["status"] == "COMPLETED_SUCCESS", f"{state}\n{dev.tail()}"
    runs = set()
    for partition in BACKFILLED:
        found, manifest = dev.latest("raw_corpus", partition), dev.store.current("raw_corpus", partition)
        assert found["metadata"]["kept"] == DOCUMENTS
        assert found["metadata"]["path"] == str(manifest.directory)
        assert found["tags"]["dagster/data_version"] == manifest.fingerprint
        assert found["tags"]["dagster/partition/snapshot"] == partition.partition("|")[2]
        runs.add(found["run"])
    assert len(runs) == 1, "one run holds the whole backfill"


def test_the_monthly_schedule_starts_and_asks_for_the_newest_snapshot_of_every_domain(dev: DagsterDev) -> None:
    started = dev.ask(START_SCHEDULE, s=SCHEDULE)["scheduleState"]
    assert started["status"] == "RUNNING"
    assert dev.ask(STOP_SCHEDULE, id=started["id"])["scheduleState"]["status"] == "STOPPED"
    tick = dev.ask(TRY_SCHEDULE, s=SCHEDULE, t=datetime(2026, 4, 1, tzinfo=UTC).timestamp())
    assert not tick["evaluationResult"]["error"], tick
    requests = tick["evaluationResult"]["runRequests"]
    assert sorted(tags(request)["dagster/partition"] for request in requests) == [f"{domain}|2026-03-01" for domain in DOMAINS]


def test_the_sensor_launches_the_changed_file_and_nothing_else_once(dev: DagsterDev) -> None:
    (tick,) = dev.wait_for("tick that launches", 120, lambda: [tick for tick in dev.ticks() if tick["runIds"]])
    assert len(tick["runIds"]) == 1, tick
    run = dev.finished_run(tick["runIds"][0], 180)
    assert run["tags"]["dagster/partition"] == CHANGED
    corpus = dev.store.current("raw_corpus", CHANGED)
    assert corpus.counts["kept"] == DOCUMENTS + 1
    for asset in ("cleaned_corpus", "duplicate_signatures"):
        assert dev.store.partitions(asset) == [CHANGED]
        assert dev.latest(asset, CHANGED)["run"] == tick["runIds"][0]

    cursor = dev.ask(SENSOR_STATE, s=SENSOR)["sensorState"]["typeSpecificData"]["lastCursor"]
    again = dev.ask(TRY_SENSOR, s=SENSOR, c=cursor)["evaluationResult"]
    assert not again["error"] and not again["runRequests"] and "no new or changed" in again["skipReason"], again
    path = source_file(dev.directory, CHANGED)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:DOCUMENTS]))
    reverted = dev.ask(TRY_SENSOR, s=SENSOR, c=cursor)["evaluationResult"]
    assert [tags(request)["dagster/partition"] for request in reverted["runRequests"]] == [CHANGED], "back to its first content: a change"
    assert dev.ask(STOP_SENSOR, id=dev.sensor_id)["instigationState"]["status"] == "STOPPED"  # type: ignore[attr-defined]
    assert len([tick for tick in dev.ticks() if tick["runIds"]]) == 1
