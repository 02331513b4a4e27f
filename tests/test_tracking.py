"""Tracking: what MLflow shows of an artifact, read back from a real database."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from pipelines.manifests import InputReference, Manifest, Outcome
from pipelines.tracking import PARENT_TAG, RunTags, Tracker

ROOT = Path(__file__).parents[1]
PARTITION = "wiki|2026-01-01"
INPUTS = {
    "raw": (InputReference(asset="raw_corpus", partition=PARTITION, fingerprint="a" * 32),),
    "splits": (InputReference(asset="clusters", partition=None, fingerprint="b" * 32, member="splits/x", sha256="c" * 64),),
}
STEPS = 400


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def tracker(home: Path) -> Tracker:
    return Tracker(home, "gristmill-test")


@pytest.fixture(scope="module")
def client(home: Path) -> MlflowClient:
    return MlflowClient(tracking_uri=f"sqlite:///{home / 'mlflow.db'}")


def artifact(directory: Path, *, asset: str = "cleaned_corpus", partition: str | None = PARTITION, **values: object) -> Manifest:
    """Return the manifest of an artifact in `directory`, with a training curve and a plot where `values` are empty."""
    directory.mkdir()
    (directory / "plot.png").write_bytes(b"\x89PNG")
    outcome = Outcome(counts={"documents_in": 7, "kept": 5}, metrics={"loss (nats)": 1.5, "undefined": float("nan")}, plots=("plot.png",))
    provenance = {"started": "2026-01-02T03:04:05+00:00", "seconds": 2.5, "peak_memory_bytes": 1000}
    identity = {"asset": asset, "partition": partition, "fingerprint": "f" * 32, "code_version": "c"}
    settings = {"a": {"b": 1, "c": {}}, "d": "x"}
    found = {"settings": settings, "inputs": INPUTS, "outcome": outcome, "provenance": provenance}
    return Manifest(**identity | found | values).at(directory)


def logged(tracker: Tracker, manifest: Manifest, *, parent: str) -> str:
    tags = RunTags("dagster-run", manifest.asset, manifest.partition, manifest.fingerprint)
    return tracker.finish(tracker.start(manifest, parent=parent, tags=tags), manifest)


def python(code: str, *arguments: str) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.Popen([sys.executable, "-c", code, *arguments], env=environment, stdout=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def run(tracker: Tracker, client: MlflowClient, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return client.get_run(logged(tracker, artifact(tmp_path_factory.mktemp("a") / "artifact"), parent="ingestion"))


def test_a_run_lies_under_its_group(run: Run, client: MlflowClient, tracker: Tracker) -> None:
    parent = client.get_run(run.data.tags[PARENT_TAG])
    assert parent.info.run_name == "ingestion" and parent.data.tags["gristmill.group"] == "ingestion"
    assert parent.info.run_id == tracker.parent_run("ingestion") != tracker.parent_run("code-critical")
    assert run.info.run_name == f"cleaned_corpus {PARTITION}"
    assert client.get_experiment(run.info.experiment_id).name == "gristmill-test"
    page = f"/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}?workflowType=machine_learning"
    assert tracker.url(run.info.run_id).endswith(page)


def test_a_run_is_finished_at_the_time_of_the_work(run: Run) -> None:
    assert run.info.status == "FINISHED"
    assert run.info.end_time - run.info.start_time == 2500
    assert run.info.start_time == 1767323045000  # date -d 2026-01-02T03:04:05Z +%s, in milliseconds


def test_tags_say_where_the_artifact_came_from(run: Run) -> None:
    found = {key: value for key, value in run.data.tags.items() if key.startswith(("dagster", "gristmill"))}
    path = found.pop("gristmill.path")
    assert Path(path, "plot.png").exists()
    assert found == {
        "dagster.run_id": "dagster-run",
        "dagster.asset": "cleaned_corpus",
        "dagster.partition": PARTITION,
        "gristmill.fingerprint": "f" * 32,
    }


def test_counts_metrics_and_settings_are_shown(run: Run, client: MlflowClient) -> None:
    metrics = run.data.metrics
    assert (metrics["documents_in"], metrics["kept"], metrics["seconds"], metrics["peak_memory_bytes"]) == (7, 5, 2.5, 1000)
    assert metrics["loss _nats_"] == 1.5 and np.isnan(metrics["undefined"])
    assert run.data.params == {"a.b": "1", "a.c": "{}", "d": '"x"'}
    assert [item.path for item in client.list_artifacts(run.info.run_id)] == ["plot.png"]


def test_inputs_are_datasets_with_our_fingerprints_as_digests(run: Run) -> None:
    found = {}
    for item in run.inputs.dataset_inputs:
        role = next(tag.value for tag in item.tags if tag.key == "mlflow.data.context")
        found[role] = (item.dataset.name, item.dataset.digest, json.loads(item.dataset.source)["member"])
    assert found == {"raw": (f"raw_corpus[{PARTITION}]", "a" * 32, None), "splits": ("clusters", "c" * 32, "splits/x")}


def test_training_metrics_are_curves_over_tokens(tracker: Tracker, client: MlflowClient, tmp_path: Path) -> None:
    """3 x 400 values and 120 settings are more than one batch holds."""
    settings = {f"setting_{number:03d}": number for number in range(120)}
    manifest = artifact(tmp_path / "checkpoint", asset="general_checkpoint", partition="tiny", settings=settings)
    records = [{"tokens": 100 * n, "loss": 5 - n / 100, "learning_rate": 0.1, "gradient_norm": 1.0} for n in range(STEPS)]
    (manifest.directory / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (manifest.directory / "config.json").write_text("{}")
    run_id = logged(tracker, manifest, parent="tiny")
    for key in ("loss", "learning_rate", "gradient_norm"):
        curve = client.get_metric_history(run_id, f"train_{key}")
        assert sorted((point.step, point.value) for point in curve) == [(record["tokens"], record[key]) for record in records]
    models = client.search_logged_models([tracker.experiment_id])
    assert [(model.source_run_id, model.tags["gristmill.fingerprint"]) for model in models] == [(run_id, "f" * 32)]


def test_an_artifact_without_inputs_or_provenance_is_logged(tracker: Tracker, client: MlflowClient, tmp_path: Path) -> None:
    manifest = artifact(tmp_path / "bare", partition=None, inputs={}, outcome=Outcome(), provenance={}, settings={})
    run = client.get_run(logged(tracker, manifest, parent="ingestion"))
    assert run.info.status == "FINISHED" and run.info.run_name == "cleaned_corpus" and run.data.params == {}


def test_two_processes_can_start_on_a_fresh_database(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom test_tracking import *\n"
        f"home = Path({str(tmp_path)!r})\nmanifest = artifact(home / sys.argv[1])\ntracker = Tracker(home, 'x')\n"
        "tracker.parent_run('ingestion')\nprint(logged(tracker, manifest, parent='ingestion'))"
    )
    processes = [python(code, str(number)) for number in range(2)]
    ids = [process.communicate(timeout=100)[0].strip() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    parents = {client.get_run(run_id).data.tags[PARENT_TAG] for run_id in ids}
    assert len(set(ids)) == 2 and len(parents) == 1
    assert sorted(e.name for e in client.search_experiments()) == ["Default", "x"]


def test_a_named_tracking_server_is_used(run: Run, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copyfile(home / "mlflow.db", tmp_path / "elsewhere.db")  # to make one takes seconds
    elsewhere = f"sqlite:///{tmp_path / 'elsewhere.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", elsewhere)
    run_id = logged(Tracker(tmp_path / "home", "x"), artifact(tmp_path / "artifact"), parent="ingestion")
    found = MlflowClient(tracking_uri=elsewhere).get_run(run_id)
    assert found.info.status == "FINISHED" and found.info.run_id != run.info.run_id
    assert not (tmp_path / "home" / "mlflow.db").exists()


def test_the_link_leads_to_the_ui_that_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tracker: Tracker) -> None:
    monkeypatch.setenv("GRISTMILL_MLFLOW_UI", "http://mlflow.example:80")
    named = Tracker(tracker._home, "gristmill-test")
    assert named.url("r").startswith("http://mlflow.example:80/#/experiments/")
    assert tracker.url("r").startswith("http://127.0.0.1:5000/#/experiments/")
