"""A training as a Ray job: the bytes of a local one, stopped with a resume point, and what is said where there is no cluster."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from small_world import World
from test_engine import wait_until

from assets_defs.child import PARENT, decoded, encoded
from assets_defs.ray_jobs import ADDRESS, RayJob, is_chosen
from pipelines.errors import GristmillError, UnknownName
from pipelines.store import RESUME, Build, Store

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
START = """
import sys, ray
print(ray.init("local", num_cpus=2, include_dashboard=True, dashboard_port=0).dashboard_url, flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """A cluster that takes jobs, for the life of a process of its own; its address."""
    if find_spec("ray") is None:
        pytest.skip("needs the extra `ray`")
    environment = {**os.environ, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", START], env=environment, stdin=pipe, stdout=pipe, text=True) as process:
        os.environ[ADDRESS] = f"http://{process.stdout.readline().strip()}"
        yield os.environ[ADDRESS]
        del os.environ[ADDRESS]
        process.stdin.close()


def asked_for(store: Store, build: Build, place: Path, *, stop_at: int | None = None) -> tuple[int, Any]:
    """Have a Ray job compute `build`, as a step does; return its exit code and the result that it sent."""
    place.mkdir(parents=True)
    found: dict[str, Any] = {}

    @dg.asset
    def checkpoint(context):
        with dg.open_pipes_session(
            context=context,
            context_injector=dg.PipesFileContextInjector(str(place / "context.json")),
            message_reader=dg.PipesFileMessageReader(str(place / "messages")),
            extras={"request": encoded((store, build))},
        ) as session:
            path = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])}
            job = RayJob({**os.environ, **session.get_bootstrap_env_vars(), **path, PARENT: str(os.getpid())})
            if stop_at is not None:
                points = store.staging(build.asset, build.fingerprint()) / RESUME
                wait_until(lambda: any(int(path.name.partition("-")[2]) >= stop_at for path in points.glob("step-*")), seconds=120)
                job.terminate()
            found["code"] = job.wait(240)
        found["messages"] = session.get_custom_messages()
        yield from session.get_results()

    assert dg.materialize([checkpoint], raise_on_error=True).success
    results = [decoded(message["result"]) for message in found["messages"] if isinstance(message, dict) and "result" in message]
    return found["code"], results[0] if results else None


@pytest.fixture(scope="module")
def wanted(world: World) -> Iterator[Build]:
    from training_location import request

    os.environ["TRAINING_STEPS"] = "300"
    yield request(world, "cancelled")
    del os.environ["TRAINING_STEPS"]


def test_a_training_as_a_ray_job_has_the_bytes_of_a_local_one_also_after_it_was_stopped(
    cluster: str, wanted: Build, tmp_path: Path
) -> None:
    here, there = Store(tmp_path / "here"), Store(tmp_path / "there")
    code, mapped = asked_for(there, wanted, tmp_path / "first", stop_at=50)
    assert code in (0, -signal.SIGTERM) and there.find(wanted.asset, wanted.fingerprint()) is None
    assert any((there.staging(wanted.asset, wanted.fingerprint()) / RESUME).iterdir())
    code, mapped = asked_for(there, wanted, tmp_path / "second")
    assert code == 0 and mapped.error is None and not mapped.result.hit
    local = here.build(wanted).manifest
    assert mapped.result.manifest.fingerprint == local.fingerprint
    assert there.find(wanted.asset, wanted.fingerprint()).content_sha256 == local.content_sha256


def test_an_asset_whose_training_is_a_ray_job_publishes_the_bytes_of_a_local_one(
    cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from training_location import general_checkpoint, request, world_in

    from assets_defs.resources import MillResource

    monkeypatch.setenv("GRISTMILL_TRAINING", "ray")
    monkeypatch.setenv("TRAINING_STEPS", "300")
    store = Store(tmp_path / "mill")
    resources = {"mill": MillResource(home=str(store.root))}
    assert dg.materialize([general_checkpoint], partition_key="cancelled", resources=resources).success
    made = store.current("general_checkpoint", "cancelled")
    local = Store(tmp_path / "here").build(request(world_in(store.root), "cancelled")).manifest
    assert (made.fingerprint, made.content_sha256) == (local.fingerprint, local.content_sha256)


def test_without_a_cluster_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    if find_spec("ray") is None:
        pytest.skip("needs the extra `ray`")
    monkeypatch.setenv(ADDRESS, "http://127.0.0.1:1")
    with pytest.raises(GristmillError, match="no Ray cluster takes jobs at http://127.0.0.1:1 .*`ray start --head`.*=local"):
        RayJob({})


def test_the_place_is_chosen_by_one_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRISTMILL_TRAINING", raising=False)
    assert not is_chosen()
    monkeypatch.setenv("GRISTMILL_TRAINING", "ray")
    assert is_chosen()
    monkeypatch.setenv("GRISTMILL_TRAINING", "rya")
    with pytest.raises(UnknownName, match="did you mean 'ray'"):
        is_chosen()
