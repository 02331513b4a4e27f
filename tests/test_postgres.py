"""Dagster and MLflow on a real PostgreSQL: a run read back from both databases, first use by several machines, connections cut."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from servers import postgres_cluster
from small_world import sample_texts

from benchmarks.postgres_server import Postgres
from pipelines import corpus
from pipelines.errors import GristmillError
from pipelines.files import locked
from pipelines.store import Build, Store
from pipelines.tracking import Tracker, tracking_uri

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
KEYS = ("wiki|2026-01-01", "wiki|2026-02-01")
PROJECT = """\
name: small
first_snapshot: "2026-01-01"
snapshots: ["2026-01-01", "2026-02-01"]
fit_on: ["2026-01-01"]
source: jsonl
source_settings: {paths: ["texts/{domain}/{snapshot}.jsonl"]}
quality: {gopher_quality: {num_words: 10}}
toxicity: {toxic_words: {}}
domains: {code: {}, techdoc: {}, wiki: {}}
"""
RUN = """
import sys
import dagster as dg
from assets_defs.definitions import defs
from assets_defs.driver import QUIET
from assets_defs.reaping import reap
with dg.DagsterInstance.get() as instance:
    reap(instance)
    result = defs.resolve_job_def("ingest").execute_in_process(
        instance=instance, partition_key=sys.argv[1], run_config=QUIET,
        asset_selection=[dg.AssetKey("raw_corpus")], raise_on_error=False)
sys.exit(0 if result.success else 1)
"""
FIRST_USE = """
import sys
from pathlib import Path
import dagster as dg
from test_tracking import artifact, logged
from pipelines.tracking import Tracker
home = Path(sys.argv[1])
home.mkdir()
tracker = Tracker(home, "gristmill")
with dg.DagsterInstance.get() as instance:
    print(logged(tracker, artifact(home / "artifact"), parent="ingestion"), instance.get_runs_count())
"""
DAGSTER_RUNS = """
select r.status from runs r join run_tags t on t.run_id = r.run_id where t.key = 'dagster/partition' and t.value = '{key}' order by r.id
"""
MLFLOW_RUNS = """
select q.value as fingerprint, r.status from runs r join tags p on p.run_uuid = r.run_uuid
join tags q on q.run_uuid = r.run_uuid where p.key = 'dagster.asset' and p.value = 'raw_corpus' and q.key = 'gristmill.fingerprint'
"""


@dataclass
class Site:
    """A small project whose Dagster and MLflow write to one cluster."""

    server: Postgres
    directory: Path
    environment: dict[str, str]

    @property
    def store(self) -> Store:
        return Store(self.directory / ".gristmill")

    def request(self, key: str) -> Build:
        """Return the request that the asset raw_corpus makes for `key`."""
        domain, snapshot = key.split("|")
        paths = {"paths": ["texts/{domain}/{snapshot}.jsonl"]}
        settings = corpus.corpus_settings(domain, snapshot, "jsonl", paths, self.directory)
        return Build("raw_corpus", corpus.ingest, settings, key, audits=corpus.CORPUS_AUDITS, plugins=corpus.source_plugins(settings))

    def start(self, code: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        command, pipe = [sys.executable, "-c", code, *arguments], subprocess.PIPE
        return subprocess.Popen(command, cwd=self.directory, env=self.environment | environment, stdout=pipe, stderr=pipe, text=True)

    def run_statuses(self, key: str) -> list[str]:
        return [status for (status,) in self.server.ask("dagster", DAGSTER_RUNS.format(key=key))]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A project of one domain with documents in two months, on fresh databases."""
    directory = tmp_path_factory.mktemp("postgres").resolve()
    (directory / "recipes").mkdir()
    shutil.copy(ROOT / "recipes" / "tiny.yaml", directory / "recipes")
    (directory / "project.yaml").write_text(PROJECT)
    (directory / "texts" / "wiki").mkdir(parents=True)
    for number, key in enumerate(KEYS):
        lines = [json.dumps({"text": text}) for text in sample_texts("wiki", 40, 600)[20 * number :][:20]]
        (directory / "texts" / "wiki" / f"{key.split('|')[1]}.jsonl").write_text("\n".join(lines))
    with postgres_cluster() as server:
        yield Site(server, directory, _environment(server, server.create("mlflow")))


def _environment(server: Postgres, tracking: str) -> dict[str, str]:
    server.create("dagster")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("GRISTMILL_", "DAGSTER_", "MLFLOW_"))}
    database = {"HOST": "127.0.0.1", "PORT": str(server.port), "DB": "dagster", "USER": server.user, "PASSWORD": "none"}
    return kept | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]),
        "DAGSTER_HOME": str(ROOT / "deploy" / "postgres"),
        "MLFLOW_TRACKING_URI": tracking.replace("+psycopg2", ""),  # as people write it
        "MLFLOW_DISABLE_TELEMETRY": "true",
        **{f"DAGSTER_POSTGRES_{name}": value for name, value in database.items()},
    }


def wait_until(condition: Callable[[], bool], *, seconds: float = 90) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "waited in vain"
        time.sleep(0.05)


def wait_until_it_waits(process: subprocess.Popen[str]) -> None:
    """Return when `process` waits for a lock on a file: its step has begun, and it writes to no database."""

    def waits() -> bool:
        assert process.poll() is None, process.communicate()
        return any(f" {process.pid} " in line and "->" in line for line in Path("/proc/locks").read_text().splitlines())

    wait_until(waits)


def finish(process: subprocess.Popen[str], *, code: int = 0) -> str:
    out, errors = process.communicate(timeout=120)
    assert process.returncode == code, errors[-4000:]
    return out


def test_machines_that_use_fresh_databases_at_once_all_come_through(site: Site) -> None:
    """Each has a home, and so file locks, of its own: what keeps them apart is the server's lock."""
    homes = [site.directory / f"machine-{number}" for number in range(3)]
    started = []
    for home in homes:
        temporary = home.with_suffix(".tmp")  # MLflow keeps a lock file there
        temporary.mkdir()
        started.append(site.start(FIRST_USE, str(home), TMPDIR=str(temporary)))
    ids = [finish(process).split()[0] for process in started]
    found = site.server.ask("mlflow", "select run_uuid, value from tags where key = 'mlflow.parentRunId'")
    assert sorted(run for run, _ in found) == sorted(ids) and len(set(ids)) == 3
    assert len({parent for _, parent in found}) == 1
    assert site.server.ask("mlflow", "select name from experiments order by name") == [("Default",), ("gristmill",)]


def test_a_server_that_restarts_while_a_step_computes_costs_the_run_nothing(site: Site) -> None:
    address = site.request(KEYS[0]).fingerprint()
    with locked(site.store.root / "locks" / f"raw_corpus-{address}"):
        process = site.start(RUN, KEYS[0])
        wait_until_it_waits(process)
        site.server.stop()
        site.server.start()
    finish(process)
    assert site.run_statuses(KEYS[0]) == ["SUCCESS"]
    events = site.server.ask("dagster", "select partition, event from event_logs where dagster_event_type = 'ASSET_MATERIALIZATION'")
    assert [partition for partition, _ in events] == [KEYS[0]] and address in events[0][1]
    assert site.server.ask("mlflow", MLFLOW_RUNS) == [(address, "FINISHED")]
    assert site.store.current("raw_corpus", KEYS[0]).counts["kept"] == 20


def test_a_run_whose_database_is_gone_is_made_up_for(site: Site) -> None:
    """The artifact was published before its events were lost: the re-execution is a hit and records what was missing."""
    address = site.request(KEYS[1]).fingerprint()
    with locked(site.store.root / "locks" / f"raw_corpus-{address}"):
        process = site.start(RUN, KEYS[1])
        wait_until_it_waits(process)
        site.server.stop()
    wait_until(lambda: site.store.is_current("raw_corpus", KEYS[1]))
    process.kill()  # or it gives up by itself, after retries of half a minute
    finish(process, code=-signal.SIGKILL)
    published = site.store.current("raw_corpus", KEYS[1])
    assert published.fingerprint == address and site.store.verify(published) == []
    site.server.start()
    assert site.run_statuses(KEYS[1]) == ["STARTED"]
    finish(site.start(RUN, KEYS[1]))
    assert site.run_statuses(KEYS[1]) == ["FAILURE", "SUCCESS"]
    assert (address, "FINISHED") in site.server.ask("mlflow", MLFLOW_RUNS)
    assert site.store.current("raw_corpus", KEYS[1]).content_sha256 == published.content_sha256


def test_a_database_that_does_not_answer_is_named_without_its_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("psycopg2")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://miller:secret@127.0.0.1:1/mlflow")
    with pytest.raises(GristmillError, match=r"miller:\*\*\*@127.0.0.1:1/mlflow does not answer .*MLFLOW_TRACKING_URI") as caught:
        _ = Tracker(tmp_path, "x").experiment_id
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ("postgresql://a@b/c", "postgresql+psycopg2://a@b/c"),
        ("postgresql+psycopg://a@b/c", "postgresql+psycopg://a@b/c"),
        ("http://127.0.0.1:5000", "http://127.0.0.1:5000"),
        ("", "sqlite:///home/mlflow.db"),
    ],
)
def test_the_driver_of_the_extra_is_named(given: str, used: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", given)
    assert tracking_uri(Path("home")) == used


def test_the_two_instance_files_differ_in_their_storage_alone() -> None:
    here, there = (yaml.safe_load((ROOT / name).read_text()) for name in ("dagster.yaml", "deploy/postgres/dagster.yaml"))
    assert here.pop("storage") != there.pop("storage")
    assert here == there
