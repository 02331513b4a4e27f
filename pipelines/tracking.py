"""MLflow: a run for every artifact that was computed, nested under its recipe's run or the ingestion's.

This module alone knows MLflow. Everything of an artifact is written in a few batches after it was published, from its
manifest, so that tracking costs little and can be repeated; the curves of a long training before that, while it lasts
(`LiveRun`), into the run that every attempt goes on with. The database is made once, under a lock: two processes
that create it at the same time would corrupt it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipelines.errors import GristmillError
from pipelines.growing_records import GrowingRecords
from pipelines.manifests import Json, Manifest
from pipelines.progress import warn
from pipelines.tracking_database import database_lock, with_driver
from pipelines.tracking_values import allowed, flattened, milliseconds

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

PARENT_TAG = "mlflow.parentRunId"
METRICS_PER_BATCH = 1000
PAGES = (".html", ".md")
"""Endings of the files that MLflow shows as they are."""
CURVES = {"metrics.jsonl": "train", "validation.jsonl": "validation"}
"""Files of records, and what the names of their metrics begin with."""
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


def tracking_uri(home: Path) -> str:
    """Return where runs are tracked: MLFLOW_TRACKING_URI, or SQLite under `home`."""
    return with_driver(os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home / 'mlflow.db'}")


class Tracker:
    """Writes runs to the tracking server that MLFLOW_TRACKING_URI names, or to SQLite under `home`."""

    def __init__(self, home: Path, experiment: str) -> None:
        self._home = home
        self._experiment = experiment
        self._uri = tracking_uri(home)
        self._ui = os.environ.get("GRISTMILL_MLFLOW_UI") or (self._uri if self._uri.startswith("http") else "http://127.0.0.1:5000")

    def prepare(self) -> None:
        """Import MLflow, which takes seconds, and open its database beside other work; what is wrong with it is said where it is used."""
        with contextlib.suppress(Exception):
            self.experiment_id  # noqa: B018

    def url(self, run_id: str) -> str:
        """Return where the MLflow UI shows the run."""
        return f"{self._ui}/#/experiments/{self._known_experiment()}/runs/{run_id}?workflowType=machine_learning"

    def recorded(self, manifest: Manifest) -> str | None:
        """Return the id of the run that holds `manifest`, or None where none was finished on this tracking server."""
        record = self._record(manifest)
        return record.read_text() if record.exists() else None

    def start(self, manifest: Manifest, *, parent: str, tags: RunTags) -> str:
        """Return the id of a run for `manifest` under the run named `parent`: the one that showed it live, or a new one."""
        return self._shown(tags) or self._create(tags, parent, milliseconds(manifest.provenance.get("started")))

    def show(self, tags: RunTags, *, parent: str) -> str:
        """Return the id of the run of an artifact that is being computed: that of an attempt before this one, or a new one."""
        run_id = self._shown(tags)
        if run_id is None:
            run_id = self._create(tags, parent, milliseconds(None))
            self._note(tags).parent.mkdir(parents=True, exist_ok=True)
            self._note(tags).write_text(run_id)
            return run_id
        self._client.update_run(run_id, status="RUNNING")
        self._client.set_tag(run_id, "dagster.run_id", tags.dagster_run_id)
        return run_id

    def _create(self, tags: RunTags, parent: str, started: int) -> str:
        name = f"{tags.asset} {tags.partition or ''}".strip()
        group = {PARENT_TAG: self.parent_run(parent), **tags.tags()}
        return self._client.create_run(self.experiment_id, start_time=started, run_name=name, tags=group).info.run_id

    def _shown(self, tags: RunTags) -> str | None:
        """Return the id of the run that showed the artifact while it was computed, if this server still has it."""
        note = self._note(tags)
        if not note.exists():
            return None
        from mlflow.exceptions import MlflowException

        try:
            return self._client.get_run(note.read_text()).info.run_id
        except MlflowException:  # deleted there, or the note was cut short by a power failure
            return None

    def _note(self, artifact: Manifest | RunTags) -> Path:
        return self._record(artifact).with_suffix(".live")

    def held(self, run_id: str, key: str) -> set[tuple[int, float]]:
        """Return the tokens and values of metric `key` in run `run_id`."""
        return {(metric.step, metric.value) for metric in self._client.get_metric_history(run_id, key)}

    def log(self, run_id: str, metrics: Sequence[Metric]) -> None:
        """Add `metrics` to run `run_id`."""
        for first in range(0, len(metrics), METRICS_PER_BATCH):
            self._client.log_batch(run_id, metrics[first : first + METRICS_PER_BATCH])

    def leave(self, run_id: str, status: Literal["KILLED", "FAILED"]) -> None:
        """Say in run `run_id` that an attempt ended without an artifact."""
        self._client.set_terminated(run_id, status)

    def finish(self, run_id: str, manifest: Manifest) -> str:
        """Write everything that `manifest` says into run `run_id` and close it; return the id."""
        from mlflow.entities import Metric, Param, RunStatus, RunTag

        started = milliseconds(manifest.provenance.get("started"))
        seconds = float(manifest.provenance.get("seconds") or 0.0)
        values = {**manifest.outcome.metrics, **{k: float(v) for k, v in manifest.counts.items()}, "seconds": seconds}
        values["peak_memory_bytes"] = float(manifest.provenance.get("peak_memory_bytes") or 0)
        metrics = [Metric(allowed(key), value, started, 0) for key, value in values.items()]
        params = [Param(allowed(k), v) for k, v in flattened(manifest.settings).items()][:100]
        self._client.log_batch(run_id, metrics, params, [RunTag("gristmill.path", str(manifest.directory))])
        curves = [*recorded_curves(manifest.directory, started), *_selection_curves(manifest, started)]
        held = {key: self.held(run_id, key) for key in {metric.key for metric in curves}} if self._note(manifest).exists() else {}
        self.log(run_id, [metric for metric in curves if (metric.step, metric.value) not in held.get(metric.key, ())])
        self._log_datasets(run_id, manifest)
        for name in (*manifest.outcome.plots, *(entry.path for entry in manifest.files if entry.path.endswith(PAGES))):
            self._client.log_artifact(run_id, str(manifest.directory / name))
        if (manifest.directory / "config.json").exists():
            self._log_model(run_id, manifest)
        self._client.set_terminated(run_id, RunStatus.to_string(RunStatus.FINISHED), end_time=started + int(seconds * 1000))
        record = self._record(manifest)
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(run_id)
        self._note(manifest).unlink(missing_ok=True)
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

    def promoted(self) -> dict[str, str]:
        """Return the fingerprints of the artifacts that are versions of a registered model, and what the registry calls them.

        Raises:
            GristmillError: the tracking server does not say.
        """
        local = self._home / "mlflow.db"
        if self._uri == f"sqlite:///{local}" and not local.exists():
            return {}
        from mlflow.exceptions import MlflowException

        found: dict[str, str] = {}
        try:
            for fingerprint, name in self._promoted():
                found[fingerprint] = "; ".join(filter(None, [found.get(fingerprint), name]))
            return found
        except MlflowException as error:
            raise GristmillError(
                f"the model registry at {self._uri} does not say which models were promoted ({error}); start it, or set MLFLOW_TRACKING_URI"
            ) from error

    def _promoted(self) -> Iterator[tuple[str, str]]:
        for model in _pages(self._client.search_registered_models):
            aliases: dict[str, list[str]] = {}
            for alias, version in model.aliases.items():
                aliases.setdefault(str(version), []).append(alias)
            for version in _pages(partial(self._client.search_model_versions, f"name = '{model.name}'")):
                if fingerprint := version.tags.get("gristmill.fingerprint"):
                    yield fingerprint, ", ".join([f"version {version.version} of {model.name}", *aliases.get(str(version.version), ())])

    def _version(self, checkpoint: Manifest, run_id: str) -> str:
        """Return the version of the registered model that `checkpoint` is, made where there is none."""
        model_id = self._logged_model(run_id)  # before the lock, which finding the experiment takes too
        with self._locked("mlflow"):
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

    def _record(self, artifact: Manifest | RunTags) -> Path:
        return self._records / artifact.asset / artifact.fingerprint

    @cached_property
    def experiment_id(self) -> str:
        """The id of the project's experiment, made if it is not there."""
        with self._locked("mlflow"):
            found = self._client.get_experiment_by_name(self._experiment)
            if found:
                return found.experiment_id
            location = None if self._uri.startswith("http") else (self._home / "mlartifacts").as_uri()
            return self._client.create_experiment(self._experiment, artifact_location=location)

    def parent_run(self, name: str) -> str:
        """Return the id of the run that groups a recipe's or the ingestion's runs, made if it is not there."""
        if name not in self._parents:
            self.experiment_id  # noqa: B018  # found before: it takes the same lock, which no process can take twice
            with self._locked("mlflow"):
                self._parents[name] = self._find_parent(name) or self._create_parent(name)
        return self._parents[name]

    @cached_property
    def _parents(self) -> dict[str, str]:
        return {}

    def _locked(self, name: str) -> contextlib.AbstractContextManager[None]:
        return database_lock(self._uri, self._home / "locks" / name)

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
        with self._locked("mlflow-database"):
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


def _pages(search: Callable[..., Any]) -> Iterator[Any]:
    """Yield what all pages of a search hold."""
    token = None
    while True:
        page = search(page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def recorded_curves(directory: Path, timestamp: int) -> Iterator[Metric]:
    """Yield what the training run in `directory` recorded, over tokens: losses, in all, by domain and on documents set aside."""
    for name in CURVES:
        path = directory / name
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            yield from _metrics_of(name, json.loads(line), timestamp)


def _metrics_of(file: str, record: Mapping[str, Json], timestamp: int) -> Iterator[Metric]:
    from mlflow.entities import Metric

    values = {key: record[key] for key in ("loss", "learning_rate", "gradient_norm") if key in record}
    values |= {f"loss/{domain}": loss for domain, loss in record.get("domains", {}).items()}
    for key, value in values.items():
        yield Metric(allowed(f"{CURVES[file]}_{key}"), value, timestamp, record["tokens"])


def _selection_curves(manifest: Manifest, timestamp: int) -> Iterator[Metric]:
    """Yield what the selections of a training run found, over tokens."""
    from mlflow.entities import Metric

    for row in manifest.outcome.tables.get("rounds", ()):
        for key in sorted(set(row) - {"round", "domain", "tokens"}):
            if isinstance(row[key], int | float):
                yield Metric(allowed(f"selection_{key}/{row['domain']}"), row[key], timestamp, row["tokens"])


class LiveRun:
    """The run of an artifact that is being computed: its curves grow as the records in its directory do.

    A tracking server that does not answer is named once, and never ends the computation; what it missed is added when it answers.
    """

    def __init__(self, tracker: Tracker, tags: RunTags, directory: Path, *, parent: str) -> None:
        self._tracker, self._tags, self._directory, self._parent = tracker, tags, directory, parent
        self._run_id: str | None = None
        self._files = {name: GrowingRecords(directory / name) for name in CURVES}
        self._tokens: dict[str, int] = {}
        """The newest tokens that the run holds, by file."""
        self._warned = False

    def update(self) -> str | None:
        """Add what was recorded since the last time; return the link to the run, None where there is none yet."""
        from mlflow.exceptions import MlflowException

        try:
            if self._run_id is None:
                self._open()
            for name, file in self._files.items():
                self._add(name, file)
        except MlflowException as error:
            self._warn(error)
        return self._tracker.url(self._run_id) if self._run_id else None

    def leave(self, status: Literal["KILLED", "FAILED"]) -> None:
        """Say that the attempt ended without an artifact; the next one goes on in the same run."""
        from mlflow.exceptions import MlflowException

        if self._run_id is None:
            return
        self.update()
        try:
            self._tracker.leave(self._run_id, status)
        except MlflowException as error:
            self._warn(error)

    def _open(self) -> None:
        run_id = self._tracker.show(self._tags, parent=self._parent)
        for name, prefix in CURVES.items():
            self._tokens[name] = max((tokens for tokens, _ in self._tracker.held(run_id, f"{prefix}_loss")), default=-1)
        self._run_id = run_id

    def _add(self, name: str, file: GrowingRecords) -> None:
        records, position = file.unread()
        fresh = [record for record in records if record["tokens"] > self._tokens[name]]
        if fresh:
            now = milliseconds(None)
            self._tracker.log(str(self._run_id), [metric for record in fresh for metric in _metrics_of(name, record, now)])
            self._tokens[name] = fresh[-1]["tokens"]
        file.position = position

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            warn(f"MLflow does not show {self._tags.asset} {self._tags.partition or ''} while it is computed: {error}")
        self._warned = True
