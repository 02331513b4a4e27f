"""`dagster dev` as the leader of its own process group, and what is asked of it through GraphQL."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import psutil

from pipelines.store import Store

ROOT = Path(__file__).parents[1]
REPOSITORY = {"repositoryLocationName": "gristmill", "repositoryName": "__repository__"}

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
    metadataEntries{label ... on IntMetadataEntry{intValue} ... on PathMetadataEntry{path} ... on UrlMetadataEntry{url}
      ... on TextMetadataEntry{text}}}}}}"""
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
RUNS = """query($partition: String!){runsOrError(filter: {tags: [{key: "dagster/partition", value: $partition}]}){
  ... on Runs{results{runId}}}}"""
CANCEL = """mutation($run: String!){terminateRun(runId: $run, terminatePolicy: SAFE_TERMINATE){__typename
  ... on TerminateRunFailure{message} ... on PythonError{message}}}"""
REEXECUTE = """mutation($run: String!){launchRunReexecution(reexecutionParams: {parentRunId: $run, strategy: FROM_FAILURE}){__typename
  ... on LaunchRunSuccess{run{runId}} ... on PythonError{message}}}"""
MESSAGES = """query($run: ID!){runOrError(runId: $run){... on Run{eventConnection{events{... on MessageEvent{message}
  ... on AssetCheckEvaluationEvent{evaluation{checkName success}}}}}}}"""
CANCEL_BACKFILL = """mutation($id: String!){cancelPartitionBackfill(backfillId: $id){__typename
  ... on CancelBackfillSuccess{backfillId} ... on PythonError{message}}}"""
RESUME_BACKFILL = """mutation($id: String!){
  reexecutePartitionBackfill(reexecutionParams: {parentRunId: $id, strategy: FROM_FAILURE}){__typename
  ... on LaunchBackfillSuccess{backfillId} ... on PythonError{message}}}"""
PARTITIONS_PAGE = """query($asset: AssetKeyInput!){assetNodeOrError(assetKey: $asset){... on AssetNode{id
  partitionKeysByDimension{name type partitionKeys}
  assetPartitionStatuses{... on MultiPartitionStatuses{primaryDimensionName ranges{primaryDimStartKey primaryDimEndKey
    secondaryDim{... on DefaultPartitionStatuses{materializedPartitions failedPartitions unmaterializedPartitions}
      ... on TimePartitionStatuses{ranges{status startKey endKey}}}}}}}}}"""
SCHEDULE_TICKS = """query($s: ScheduleSelector!){scheduleOrError(scheduleSelector: $s){... on Schedule{scheduleState{
  ticks(limit: 5){status runIds error{message}}}}}}"""
T = TypeVar("T")
OVER = ("SUCCESS", "FAILURE", "CANCELED")
RANGE = ("dagster/asset_partition_range_start", "dagster/asset_partition_range_end")


class DagsterDev:
    """`dagster dev` as the leader of its own process group."""

    def __init__(self, directory: Path, *, modules: Path | None = None, seconds: float = 60) -> None:
        """Start `dagster dev` in `directory`; `modules` is where further modules of its code location lie.

        A question waits `seconds` for its answer.
        """
        self.directory = directory
        self.log = directory / "dagster_dev.log"
        self._path = os.pathsep.join(str(path) for path in (ROOT, modules) if path)
        self._seconds = seconds
        self.start()

    def start(self) -> None:
        """Start it, again where it was stopped."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("GRISTMILL_", "DAGSTER_", "MLFLOW_"))}
        environment |= {"PYTHONPATH": self._path, "DAGSTER_HOME": str(self.directory), "GRISTMILL_WORKERS": "1"}
        command = [sys.executable, "-m", "dagster", "dev", "-h", "127.0.0.1", "-p", str(self.port)]
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what it starts in the background
        with self.log.open("ab") as file:
            self.process = subprocess.Popen(
                command,
                cwd=self.directory,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_until_loaded(self) -> None:
        """Wait until the code location is loaded."""
        self.wait_for("code location", 180, self.loaded)

    @property
    def store(self) -> Store:
        return Store(self.directory / ".gristmill")

    def ask(self, query: str, **variables: object) -> Any:  # noqa: ANN401 - JSON
        """Return the one field that `query` asks for."""
        body = json.dumps({"query": query, "variables": variables}).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/graphql", body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=self._seconds) as response:
                answer = json.load(response)
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{error.read().decode()[:2000]}\n{self.tail()}") from error
        assert not answer.get("errors"), f"{answer['errors']}\n{self.tail()}"
        (field,) = answer["data"].values()
        return field

    def wait_for(self, what: str, seconds: float, found: Callable[[], T]) -> T:
        """Return the first true value of `found`."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            assert self.process.poll() is None, f"dagster dev ended with {self.process.returncode}\n{self.tail()}"
            if value := found():
                return value
            time.sleep(0.5)
        raise AssertionError(f"no {what} within {seconds:.0f} s\n{self.tail()}")

    def tail(self) -> str:
        """Return the end of its log."""
        return self.log.read_text(errors="replace")[-6000:]

    def loaded(self) -> bool:
        """Return whether the code location is loaded."""
        try:
            return bool(self.ask(LOADED).get("nodes"))
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False

    def launch(self, assets: Sequence[str], first: str, last: str | None = None) -> str:
        """Launch a run of `assets` for one partition, or for a range of them, and return its id."""
        selector = {**REPOSITORY, "jobName": "__ASSET_JOB", "assetSelection": [{"path": [asset]} for asset in assets]}
        wanted = dict(zip(RANGE, (first, last), strict=True)) if last else {"dagster/partition": first}
        metadata = {"tags": [{"key": key, "value": value} for key, value in wanted.items()]}
        launched = self.ask(LAUNCH, p={"selector": selector, "mode": "default", "executionMetadata": metadata})
        assert launched["__typename"] == "LaunchRunSuccess", launched
        return launched["run"]["runId"]

    def backfill(self, partitions: Mapping[str, Sequence[str]]) -> str:
        """Launch a backfill of the partitions of each asset and return its id."""
        wanted = [
            {"assetKey": {"path": [asset]}, "partitions": {"ranges": [{"start": key, "end": key} for key in keys]}}
            for asset, keys in partitions.items()
        ]
        launched = self.ask(BACKFILL, p={"partitionsByAssets": wanted, "title": "a test", "tags": []})
        assert launched["__typename"] == "LaunchBackfillSuccess", launched
        return launched["backfillId"]

    def resume(self, backfill: str) -> str:
        """Launch what a backfill that is over did not materialize, and return the new one's id."""
        launched = self.ask(RESUME_BACKFILL, id=backfill)
        assert launched["__typename"] == "LaunchBackfillSuccess", launched
        return launched["backfillId"]

    def ended_backfill(self, backfill: str, seconds: float = 180) -> str:
        """Wait until `backfill` is over and return its status."""

        def over() -> str | None:
            status = self.ask(BACKFILL_STATUS, id=backfill)["status"]
            return status if status.startswith(("COMPLETED", "FAIL", "CANCELED")) else None

        return self.wait_for("end of the backfill", seconds, over)

    def ended_run(self, run: str, seconds: float = 120) -> dict[str, Any]:
        """Wait until `run` is over and return its status, its tags and what its failures say."""

        def over() -> dict[str, Any] | None:
            state = self.ask(RUN, run=run)
            return state if state["status"] in OVER else None

        state = self.wait_for(f"end of run {run}", seconds, over)
        failures = json.dumps([event for event in state["eventConnection"]["events"] if event])
        return {"status": state["status"], "tags": tags(state), "failures": failures}

    def finished_run(self, run: str, seconds: float = 120) -> dict[str, Any]:
        """Wait until `run` has succeeded; a failure is shown with its messages."""
        state = self.ended_run(run, seconds)
        assert state["status"] == "SUCCESS", f"{state['failures']}\n{self.tail()}"
        return state

    def events(self, run: str) -> list[dict[str, Any]]:
        """Return the events of `run`: messages and results of checks."""
        return [event for event in self.ask(MESSAGES, run=run)["eventConnection"]["events"] if event]

    def worker_of(self, run: str) -> int:
        """Return the id of the process that runs `run`."""
        found = (re.search(r"Started process for run \(pid: (\d+)\)", event["message"]) for event in self.events(run))
        return next(int(one[1]) for one in found if one)

    def latest(self, asset: str, partition: str) -> dict[str, Any]:
        """Return the last materialization of `partition` of `asset`."""
        node = self.ask(MATERIALIZED, asset={"path": [asset]}, partitions=[partition])
        (event,) = node["assetMaterializations"]
        metadata = {entry.pop("label"): next(iter(entry.values()), None) for entry in event["metadataEntries"]}
        return {"run": event["runId"], "tags": tags(event), "metadata": metadata}

    def ticks(self, sensor: Mapping[str, str]) -> list[dict[str, Any]]:
        """Return the ticks of a sensor that are over, the newest first."""
        ticks = self.ask(SENSOR_STATE, s=sensor)["sensorState"]["ticks"]
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
    """Return the tags of a run, a run request or a materialization."""
    return {tag["key"]: tag["value"] for tag in node["tags"]}
