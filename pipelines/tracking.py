"""MLflow: a run for every artifact that was computed, nested under its recipe's run or the ingestion's.

This module alone knows MLflow. Everything of an artifact is written in a few batches after it was published, from its
manifest, so that tracking costs little and can be repeated. The database is made once, under a lock: two processes
that create it at the same time would corrupt it.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.errors import GristmillError
from pipelines.files import locked
from pipelines.manifests import Json, Manifest

if TYPE_CHECKING:
    from mlflow import MlflowClient

PARENT_TAG = "mlflow.parentRunId"
MAX_PARAMETER_CHARACTERS = 500
METRICS_PER_BATCH = 1000
CHAMPION = "champion"
"""The alias of the version of the registered model that passed its gate last."""
GATE = "not_worse_than_baseline"
"""The check of a comparison that a checkpoint is promoted by."""


@dataclass(frozen=True)
class RunTags:
    """Where an artifact was computed, as tags of its MLflow run."""

    dagster_run_id: str
    asset: str
    partition: str | None
    fingerprint: str

    def tags(self) -> dict[str, str]:
        return {
            "dagster.run_id": self.dagster_run_id,
            "dagster.asset": self.asset,
            "dagster.partition": self.partition or "",
            "gristmill.fingerprint": self.fingerprint,
        }


class Tracker:
    """Writes runs to the tracking server that MLFLOW_TRACKING_URI names, or to SQLite under `home`."""

    def __init__(self, home: Path, experiment: str) -> None:
        self._home = home
        self._experiment = experiment
        self._uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home / 'mlflow.db'}"
        self._ui = os.environ.get("GRISTMILL_MLFLOW_UI") or (self._uri if self._uri.startswith("http") else "http://127.0.0.1:5000")

    def url(self, run_id: str) -> str:
        """Return where the MLflow UI shows the run."""
        return f"{self._ui}/#/experiments/{self._known_experiment()}/runs/{run_id}?workflowType=machine_learning"

    def recorded(self, manifest: Manifest) -> str | None:
        """Return the id of the run that holds `manifest`, or None where none was finished on this tracking server."""
        record = self._record(manifest)
        return record.read_text() if record.exists() else None

    def start(self, manifest: Manifest, *, parent: str, tags: RunTags) -> str:
        """Open a run for `manifest` under the run named `parent`; return its id."""
        name = f"{manifest.asset} {manifest.partition or ''}".strip()
        run = self._client.create_run(
            self.experiment_id,
            start_time=_milliseconds(manifest.provenance.get("started")),
            run_name=name,
            tags={PARENT_TAG: self.parent_run(parent), **tags.tags()},
        )
        return run.info.run_id

    def finish(self, run_id: str, manifest: Manifest) -> str:
        """Write everything that `manifest` says into run `run_id` and close it; return the id."""
        from mlflow.entities import Metric, Param, RunStatus, RunTag

        started = _milliseconds(manifest.provenance.get("started"))
        seconds = float(manifest.provenance.get("seconds") or 0.0)
        values = {**manifest.outcome.metrics, **{k: float(v) for k, v in manifest.counts.items()}, "seconds": seconds}
        values["peak_memory_bytes"] = float(manifest.provenance.get("peak_memory_bytes") or 0)
        metrics = [Metric(_key(key), value, started, 0) for key, value in values.items()] + list(_curves(manifest, started))
        params = [Param(_key(k), v) for k, v in _flat(manifest.settings).items()][:100]
        self._client.log_batch(run_id, metrics[:METRICS_PER_BATCH], params, [RunTag("gristmill.path", str(manifest.directory))])
        for first in range(METRICS_PER_BATCH, len(metrics), METRICS_PER_BATCH):
            self._client.log_batch(run_id, metrics[first : first + METRICS_PER_BATCH])
        self._log_datasets(run_id, manifest)
        for plot in manifest.outcome.plots:
            self._client.log_artifact(run_id, str(manifest.directory / plot))
        if (manifest.directory / "config.json").exists():
            self._log_model(run_id, manifest)
        self._client.set_terminated(run_id, RunStatus.to_string(RunStatus.FINISHED), end_time=started + int(seconds * 1000))
        record = self._record(manifest)
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(run_id)
        return run_id

    def promote(self, checkpoint: Manifest, comparison: Manifest) -> str:
        """Make `checkpoint` the champion of the registered model that is named like the experiment; return its version.

        The version comes from the run of the checkpoint and names its directory. Repeated, it is the same version.

        Raises:
            GristmillError: `comparison` is of another checkpoint, its gate did not pass, or the checkpoint has no run.
        """
        if comparison.outcome.details.get("checkpoint") != checkpoint.fingerprint:
            raise GristmillError(
                f"{comparison.label} does not compare {checkpoint.label} as it stands; materialize evaluation and comparison"
            )
        gate = next((check for check in comparison.checks if check.name == GATE), None)
        if gate is None or not gate.passed:
            found = gate.description if gate else f"{comparison.label} has no check {GATE}"
            raise GristmillError(f"{checkpoint.label} is not promoted: {found}; train it anew, or allow more under `evaluation.guards`")
        run_id = self.recorded(checkpoint)
        if run_id is None:
            raise GristmillError(
                f"{checkpoint.label} has no run on {self._uri}; materialize it in Dagster, which leaves one, and promote it then"
            )
        version = self._version(checkpoint, run_id)
        self._client.set_model_version_tag(self._experiment, version, "gristmill.comparison", comparison.fingerprint)
        self._client.set_registered_model_alias(self._experiment, CHAMPION, version)
        return version

    def _version(self, checkpoint: Manifest, run_id: str) -> str:
        """Return the version of the registered model that `checkpoint` is, made where there is none."""
        model_id = self._logged_model(run_id)  # before the lock, which finding the experiment takes too
        with locked(self._home / "locks" / "mlflow"):
            if not self._client.search_registered_models(f"name = '{self._experiment}'"):
                self._client.create_registered_model(self._experiment)
            for version in self._client.search_model_versions(f"run_id = '{run_id}'"):
                if version.name == self._experiment:
                    return str(version.version)
            served = self._uri.startswith("http") and model_id is not None  # a server takes no path of another machine
            made = self._client.create_model_version(
                self._experiment,
                f"models:/{model_id}" if served else checkpoint.directory.as_uri(),
                run_id,
                tags={
                    "gristmill.fingerprint": checkpoint.fingerprint,
                    "gristmill.path": str(checkpoint.directory),
                    "recipe": checkpoint.partition or "",
                },
                model_id=model_id,
            )
        return str(made.version)

    def _logged_model(self, run_id: str) -> str | None:
        found = self._client.search_logged_models([self.experiment_id], filter_string=f"source_run_id = '{run_id}'")
        return found[0].model_id if found else None

    def _known_experiment(self) -> str:
        """Return the experiment's id, as it was found once: MLflow takes seconds to import, and hits need nothing else of it."""
        found = self._records / f"{self._experiment}.experiment"
        if not found.exists():
            found.parent.mkdir(parents=True, exist_ok=True)
            beside = found.with_suffix(f".{os.getpid()}")
            beside.write_text(self.experiment_id)
            beside.rename(found)
        return found.read_text()

    @property
    def _records(self) -> Path:
        return self._home / "tracked" / hashlib.sha256(self._uri.encode()).hexdigest()[:12]

    def _record(self, manifest: Manifest) -> Path:
        return self._records / manifest.asset / manifest.fingerprint

    @cached_property
    def experiment_id(self) -> str:
        """The id of the project's experiment, made if it is not there."""
        with locked(self._home / "locks" / "mlflow"):
            found = self._client.get_experiment_by_name(self._experiment)
            if found:
                return found.experiment_id
            location = None if self._uri.startswith("http") else (self._home / "mlartifacts").as_uri()
            return self._client.create_experiment(self._experiment, artifact_location=location)

    def parent_run(self, name: str) -> str:
        """Return the id of the run that groups a recipe's or the ingestion's runs, made if it is not there."""
        if name not in self._parents:
            self.experiment_id  # noqa: B018  # found before: it takes the same lock, which no process can take twice
            with locked(self._home / "locks" / "mlflow"):
                self._parents[name] = self._find_parent(name) or self._create_parent(name)
        return self._parents[name]

    @cached_property
    def _parents(self) -> dict[str, str]:
        return {}

    def _find_parent(self, name: str) -> str | None:
        found = self._client.search_runs([self.experiment_id], filter_string=f"tags.`gristmill.group` = '{name}'", max_results=1)
        return found[0].info.run_id if found else None

    def _create_parent(self, name: str) -> str:
        run = self._client.create_run(self.experiment_id, run_name=name, tags={"gristmill.group": name})
        self._client.set_terminated(run.info.run_id)
        return run.info.run_id

    @cached_property
    def _client(self) -> MlflowClient:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient

        self._home.mkdir(parents=True, exist_ok=True)
        with locked(self._home / "locks" / "mlflow-database"):
            client = MlflowClient(tracking_uri=self._uri)
            client.search_experiments(max_results=1)  # makes the database where there is none
        return client

    def _log_datasets(self, run_id: str, manifest: Manifest) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        seen: dict[tuple[str, str], DatasetInput] = {}
        for role, references in manifest.inputs.items():
            for reference in references:
                name = f"{reference.asset}[{reference.partition}]" if reference.partition else reference.asset
                digest = (reference.sha256 or reference.fingerprint)[:32]
                source = json.dumps({"asset": reference.asset, "partition": reference.partition, "member": reference.member})
                dataset = Dataset(name=name, digest=digest, source_type="local", source=source)
                seen[(name, digest)] = DatasetInput(
                    dataset, tags=[InputTag("mlflow.data.context", role), InputTag("asset", reference.asset)]
                )
        if seen:
            self._client.log_inputs(run_id, datasets=list(seen.values()))

    def _log_model(self, run_id: str, manifest: Manifest) -> None:
        """Register the checkpoint's directory as a logged model of the run, at the token it was trained to."""
        from mlflow.entities import LoggedModelOutput, LoggedModelStatus

        model = self._client.create_logged_model(
            experiment_id=self.experiment_id,
            name=manifest.asset,
            source_run_id=run_id,
            model_type="transformers-checkpoint",
            tags={
                "gristmill.path": str(manifest.directory),
                "gristmill.fingerprint": manifest.fingerprint,
                "gristmill.content": manifest.content_sha256,
            },
        )
        self._client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
        self._client.log_outputs(run_id, [LoggedModelOutput(model.model_id, manifest.counts.get("tokens", 0))])


def _milliseconds(started: Json) -> int:
    from datetime import datetime

    return int((datetime.fromisoformat(str(started)).timestamp() if started else time.time()) * 1000)


def _curves(manifest: Manifest, timestamp: int) -> Iterator[object]:
    """Yield the metrics of a training run over tokens: losses, in all, by domain and on documents set aside, and its selections."""
    from mlflow.entities import Metric

    for prefix, name in (("train", "metrics.jsonl"), ("validation", "validation.jsonl")):
        path = manifest.directory / name
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            record = json.loads(line)
            values = {key: record[key] for key in ("loss", "learning_rate", "gradient_norm") if key in record}
            values |= {f"loss/{domain}": loss for domain, loss in record.get("domains", {}).items()}
            for key, value in values.items():
                yield Metric(_key(f"{prefix}_{key}"), value, timestamp, record["tokens"])
    for row in manifest.outcome.tables.get("rounds", ()):
        for key in sorted(set(row) - {"round", "domain", "tokens"}):
            if isinstance(row[key], int | float):
                yield Metric(_key(f"selection_{key}/{row['domain']}"), row[key], timestamp, row["tokens"])


def _flat(values: Mapping[str, Json], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{name}.")
        else:
            flat[name] = json.dumps(value)[:MAX_PARAMETER_CHARACTERS]
    return flat


def _key(name: str) -> str:
    """Return `name` with the characters that MLflow allows in a key."""
    return "".join(c if c.isalnum() or c in "_-. /" else "_" for c in name)[:250]
