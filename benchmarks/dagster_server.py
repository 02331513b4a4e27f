"""A real `dagster dev` in a directory of its own, driven through GraphQL: what the fault drill and tests of whole runs start."""

from __future__ import annotations

import json
import os
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

from assets_defs.fork_server import NAME

ROOT = Path(__file__).parents[1]
OVER = ("SUCCESS", "FAILURE", "CANCELED")
LOADED = "{repositoriesOrError{... on RepositoryConnection{nodes{name}}}}"
LAUNCH = """mutation($p: ExecutionParams!){launchRun(executionParams: $p){__typename
  ... on LaunchRunSuccess{run{runId}} ... on RunConfigValidationInvalid{errors{message}} ... on PythonError{message}}}"""
REEXECUTE = """mutation($p: ReexecutionParams!){launchRunReexecution(reexecutionParams: $p){__typename
  ... on LaunchRunSuccess{run{runId}} ... on PythonError{message}}}"""
TERMINATE = """mutation($run: String!){terminateRun(runId: $run){__typename ... on TerminateRunFailure{message}
  ... on PythonError{message}}}"""
RUNS = "{runsOrError(limit: 500){... on Runs{results{runId status rootRunId tags{key value}}}}}"
POOLS = "{instance{concurrencyLimits{concurrencyKey claimedSlots{runId stepKey} pendingSteps{runId}}}}"
EVENTS = """query($run: ID!){logsForRun(runId: $run){... on EventConnection{events{__typename
  ... on MessageEvent{message stepKey timestamp}}}}}"""
Found = TypeVar("Found")


def is_child(process: psutil.Process) -> bool:
    """Return whether `process` computes an artifact for a step, forked or started by itself."""
    try:
        return process.name() == NAME or process.cmdline()[1:3] == ["-m", "assets_defs.child"]
    except psutil.Error:
        return False


class DagsterServer:
    """`dagster dev` as the leader of its own process group."""

    def __init__(self, directory: Path, *, module: str = "assets_defs.definitions", path: Sequence[Path] = (), **variables: str) -> None:
        """Prepare to run it in `directory`, which holds dagster.yaml and workspace.yaml, or give a `module` of definitions.

        Args:
            path: what is searched for modules besides this project.
            variables: environment variables.
        """
        self.directory, self.log = directory, directory / "dagster_dev.log"
        self.location = module
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("GRISTMILL_", "DAGSTER_", "MLFLOW_"))}
        self._environment = {
            **environment,
            "PYTHONPATH": os.pathsep.join(map(str, (ROOT, *path))),
            "DAGSTER_HOME": str(directory),
            "GRISTMILL_WORKERS": "1",
            **variables,
        }
        self.port = 0
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *, seconds: float = 180) -> None:
        """Start it and wait until its code location is loaded."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [sys.executable, "-m", "dagster", "dev", "-h", "127.0.0.1", "-p", str(self.port), "-m", self.location]
        with self.log.open("ab") as file:
            self.process = subprocess.Popen(
                command,
                cwd=self.directory,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.wait_for("code location", seconds, self._loaded)

    def _loaded(self) -> bool:
        try:
            return bool(self.ask(LOADED).get("nodes"))
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False

    def ask(self, query: str, **variables: object) -> Any:  # noqa: ANN401  whatever the query asks for
        """Return the one field that `query` asks for.

        Raises:
            RuntimeError: the answer is an error.
        """
        body = json.dumps({"query": query, "variables": variables}).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/graphql", body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                answer = json.load(response)
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"{error.read().decode()[:2000]}\n{self.tail()}") from error
        if answer.get("errors"):
            raise RuntimeError(f"{answer['errors']}\n{self.tail()}")
        (field,) = answer["data"].values()
        return field

    def wait_for(self, what: str, seconds: float, found: Callable[[], Found], *, pause: float = 0.3) -> Found:
        """Return the first true value of `found`.

        Raises:
            RuntimeError: there is none within `seconds`, or the server ended.
        """
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.process is None or self.process.poll() is not None:
                raise RuntimeError(f"dagster dev is not running\n{self.tail()}")
            if value := found():
                return value
            time.sleep(pause)
        raise RuntimeError(f"no {what} within {seconds:.0f} s\n{self.tail()}")

    def tail(self) -> str:
        """Return the end of the log."""
        return self.log.read_text(errors="replace")[-6000:]

    def launch(self, assets: Sequence[str], partition: str | None = None, *, job: str = "__ASSET_JOB", **tags: str) -> str:
        """Launch a run of `assets`; return its id."""
        repository = {"repositoryLocationName": self.location, "repositoryName": "__repository__"}
        selector: dict[str, object] = {**repository, "jobName": job}
        if assets:
            selector["assetSelection"] = [{"path": [name]} for name in assets]
        given = {**({"dagster/partition": partition} if partition else {}), **{name.replace("__", "/"): v for name, v in tags.items()}}
        metadata = {"tags": [{"key": key, "value": value} for key, value in given.items()]}
        return self._launched(self.ask(LAUNCH, p={"selector": selector, "mode": "default", "executionMetadata": metadata}))

    def reexecute(self, run: str) -> str | None:
        """Run what `run` did not finish again; return the new run's id, None where it had finished every step when it was killed."""
        try:
            return self._launched(self.ask(REEXECUTE, p={"parentRunId": run, "strategy": "FROM_FAILURE"}))
        except RuntimeError as error:
            if "No steps needed to be retried" in str(error):
                return None
            raise

    @staticmethod
    def _launched(answer: Mapping[str, Any]) -> str:
        if answer["__typename"] != "LaunchRunSuccess":
            raise RuntimeError(f"not launched: {answer}")
        return answer["run"]["runId"]

    def terminate(self, run: str) -> None:
        """Cancel `run` as the UI does."""
        answer = self.ask(TERMINATE, run=run)
        if answer["__typename"] != "TerminateRunSuccess":
            raise RuntimeError(f"not terminated: {answer}")

    def runs(self) -> dict[str, dict[str, Any]]:
        """Return the runs by id, the newest first: status, root and tags."""
        found = self.ask(RUNS)["results"]
        return {run["runId"]: {**run, "tags": {tag["key"]: tag["value"] for tag in run["tags"]}} for run in found}

    def over(self, run: str, seconds: float = 120) -> str:
        """Wait until `run` is over; return its status."""
        return self.wait_for(f"end of run {run}", seconds, lambda: self._status_if_over(run))

    def _status_if_over(self, run: str) -> str | None:
        status = self.runs()[run]["status"]
        return status if status in OVER else None

    def messages(self, run: str) -> list[str]:
        """Return the messages of the run's log."""
        return [event.get("message") or "" for event in self.ask(EVENTS, run=run)["events"]]

    def held_slots(self) -> list[str]:
        """Return the runs that hold or wait for a slot of a pool."""
        limits = self.ask(POOLS)["concurrencyLimits"]
        return [row["runId"] for pool in limits for row in (*pool["claimedSlots"], *pool["pendingSteps"])]

    def processes(self, *words: str) -> list[psutil.Process]:
        """Return the living processes that run in this directory and have all `words` in their command."""
        found = []
        for process in psutil.process_iter():
            try:
                here = process.status() != psutil.STATUS_ZOMBIE and process.cwd() == str(self.directory)
                command = " ".join(process.cmdline()) if here and words else ""
            except psutil.Error:
                continue
            if here and all(word in command for word in words):
                found.append(process)
        return found

    def children(self) -> list[psutil.Process]:
        """Return the processes that compute an artifact for a step."""
        return [process for process in self.processes("-m assets_defs.") if is_child(process)]

    def kill(self) -> None:
        """Kill the server, its daemon and all that runs in their process group, as the end of power does."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(30)
            self.process = None

    def stop(self, *, seconds: float = 180) -> list[int]:
        """Interrupt the process group as a terminal does, and return the processes that it left, which are killed."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGINT)
        deadline = time.monotonic() + seconds
        while (left := self.processes()) and time.monotonic() < deadline:
            if self.process is not None:
                self.process.poll()
            time.sleep(0.2)
        for process in left:
            process.kill()
        return [process.pid for process in left]
