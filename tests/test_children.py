"""Long training inside Dagster: a child that is killed, cancelled, asked for twice, or lost with all of `dagster dev`."""

from __future__ import annotations

import os
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient
from training_location import request, world_in

from benchmarks.dagster_server import DagsterServer
from pipelines.manifests import Manifest
from pipelines.store import Store
from pipelines.tracking import Tracker

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
STEPS = "1000"


class Trainings(DagsterServer):
    """A server of the code location `training_location`."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        shutil.copy(ROOT / "dagster.yaml", directory)
        (directory / "recipes").mkdir()
        shutil.copy(ROOT / "recipes" / "tiny.yaml", directory / "recipes")
        (directory / "project.yaml").write_text((ROOT / "project.yaml").read_text().replace("name: gristmill", "name: small", 1))
        variables = {"TRAINING_STEPS": STEPS, "GRISTMILL_STREAM_SECONDS": "0.5", "OMP_NUM_THREADS": "1"}
        super().__init__(directory, module="training_location", path=(ROOT / "tests",), **variables)
        self.store = Store(directory / ".gristmill")

    def train(self, partition: str) -> str:
        return self.launch(["general_checkpoint"], partition)

    def points(self, partition: str) -> list[int]:
        """Return the steps of the resume points of `partition`."""
        build = request(world_in(self.store.root), partition)
        found = self.store.staging(build.asset, build.fingerprint()).glob("resume/step-*")
        return sorted(int(path.name.partition("-")[2]) for path in found)

    def wait_for_point(self, partition: str, step: int) -> None:
        self.wait_for(f"resume point of {partition}", 90, lambda: max(self.points(partition), default=0) >= step, pause=0.05)

    def mlflow_runs(self) -> dict[str, list[str]]:
        """Return the ids of the MLflow runs by partition."""
        client = self.mlflow()
        found: dict[str, list[str]] = {}
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        for run in client.search_runs(experiments):
            found.setdefault(run.data.tags.get("dagster.partition", ""), []).append(run.info.run_id)
        return found

    def mlflow(self) -> MlflowClient:
        return MlflowClient(tracking_uri=f"sqlite:///{self.store.root / 'mlflow.db'}")

    def is_idle(self) -> bool:
        return not self.children() and not self.held_slots()


def is_asked_to_end(process: psutil.Process) -> bool:
    """Return whether SIGTERM waits for a suspended process."""
    pending = re.search(r"^ShdPnd:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text(), re.MULTILINE)
    return bool(int(pending.group(1), 16) >> (signal.SIGTERM - 1) & 1)


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainings]:
    dev = Trainings(tmp_path_factory.mktemp("children").resolve() / "project")
    os.environ["TRAINING_STEPS"] = STEPS
    world_in(dev.store.root)
    Tracker(dev.store.root, "small").parent_run("ingestion")  # the database takes seconds to make
    try:
        dev.start()
        yield dev
    finally:
        left = dev.stop()
        os.environ.pop("TRAINING_STEPS")
    assert not left, f"processes outlived dagster dev: {left}\n{dev.tail()}"


@pytest.fixture(scope="module")
def undisturbed(dev: Trainings, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """The checkpoint `killed`, trained in this process without Dagster."""
    return Store(tmp_path_factory.mktemp("undisturbed")).build(request(world_in(dev.store.root), "killed")).manifest


def test_a_killed_child_is_retried_to_the_same_bytes_and_the_same_mlflow_run(dev: Trainings, undisturbed: Manifest) -> None:
    run = dev.train("killed")
    dev.wait_for_point("killed", 100)
    (child,) = dev.children()
    child.suspend()  # a quick machine would be done before it can be looked at
    dev.wait_for("link to MLflow", 60, lambda: any("in MLflow: http" in message for message in dev.messages(run)))
    (shown,) = dev.mlflow_runs()["killed"]
    dev.wait_for("loss in MLflow", 60, lambda: dev.mlflow().get_metric_history(shown, "train_loss"))
    assert dev.mlflow().get_run(shown).info.status == "RUNNING"
    child.kill()
    assert dev.over(run) == "SUCCESS"
    made = dev.store.current("general_checkpoint", "killed")
    assert made.fingerprint == undisturbed.fingerprint
    assert made.content_sha256 == undisturbed.content_sha256
    messages = "\n".join(dev.messages(run))
    assert "was killed by SIGKILL" in messages and "requested a retry" in messages
    assert "tokens/s" in messages and "loss" in messages, "lines of progress come while it trains"
    assert dev.mlflow_runs()["killed"] == [shown], "the retry goes on in the run that showed the first attempt"
    history = [metric.step for metric in dev.mlflow().get_metric_history(shown, "train_loss")]
    assert sorted(history) == sorted(set(history)) and len(history) == int(STEPS) // 10
    assert dev.mlflow().get_run(shown).info.status == "FINISHED"
    assert not list((dev.store.root / "children").iterdir())


def test_a_cancelled_training_leaves_a_resume_point_and_nothing_else(dev: Trainings) -> None:
    run = dev.train("cancelled")
    dev.wait_for_point("cancelled", 50)
    (child,) = dev.children()
    child.suspend()
    before = max(dev.points("cancelled"))
    dev.terminate(run)
    dev.wait_for("signal to the child", 60, lambda: is_asked_to_end(child))
    child.resume()
    assert dev.over(run) == "CANCELED"
    dev.wait_for("end of the child", 20, dev.is_idle)
    after = max(dev.points("cancelled"))
    assert after >= before and "a resume point is written" in "\n".join(dev.messages(run)) + dev.tail()
    again = dev.train("cancelled")
    assert dev.over(again) == "SUCCESS"
    assert dev.store.current("general_checkpoint", "cancelled").counts["steps"] == int(STEPS)


def test_two_requests_for_one_checkpoint_train_it_once(dev: Trainings) -> None:
    runs = [dev.train("twice"), dev.train("twice")]
    most = 0

    def all_over() -> bool:
        nonlocal most
        most = max(most, len(dev.children()))
        states = dev.runs()
        return all(states[run]["status"] in ("SUCCESS", "FAILURE") for run in runs)

    dev.wait_for("end of both runs", 120, all_over, pause=0.1)
    assert most == 1 and [dev.runs()[run]["status"] for run in runs] == ["SUCCESS", "SUCCESS"]
    assert len(dev.mlflow_runs()["twice"]) == 1


def test_a_training_goes_on_by_itself_after_everything_was_killed(dev: Trainings) -> None:
    run = dev.train("lost")
    dev.wait_for_point("lost", 100)
    dev.kill()
    dev.start()

    def retry() -> str | None:
        return next((name for name, one in dev.runs().items() if one["tags"].get("dagster/parent_run_id") == run), None)

    again = dev.wait_for("run that goes on", 120, retry)
    assert dev.runs()[run]["status"] == "FAILURE"
    assert dev.over(again) == "SUCCESS"
    assert len(dev.mlflow_runs()["lost"]) == 1
    dev.wait_for("free pool", 20, dev.is_idle)
