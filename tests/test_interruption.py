"""A request to end: at once, deferred to a resume point, handed on to processes, forced in the end. In processes of their own."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from small_world import World, run

from pipelines.interruption import EXIT_CODE
from pipelines.run_records import METRICS, SECONDS_UNSHOWN, Records
from pipelines.store import Build, Store
from pipelines.training import GeneralSettings

ROOT = Path(__file__).parents[1]
BUILD = """
import pickle, sys
from pipelines import interruption
interruption.install()
request, store = pickle.load(open(sys.argv[1], 'rb'))
print(store.build(request).manifest.content_sha256)
"""
BUSY = """
import sys, time
from pipelines import interruption
interruption.install()
with interruption.deferred():
    print("busy", flush=True)
    while {condition}:
        time.sleep(0.01)
print("left the loop")
time.sleep(0.2)
"""


def python(code: str, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": path, **variables}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_until(condition: Callable[[], bool], *, seconds: float = 120) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "waited in vain"
        time.sleep(0.02)


@pytest.mark.parametrize("asked", [signal.SIGTERM, signal.SIGINT])
def test_what_is_deferred_ends_by_itself(asked: signal.Signals) -> None:
    child = python(BUSY.format(condition="not interruption.requested()"))
    assert child.stdout is not None and child.stdout.readline() == "busy\n"
    child.send_signal(asked)
    output, errors = child.communicate(timeout=30)
    assert output == "left the loop\n" and child.returncode == 0 and not errors


def test_what_is_not_deferred_ends_at_once() -> None:
    code = BUSY.replace("with interruption.deferred():", "if True:").format(condition="True")
    child = python(code)
    assert child.stdout is not None and child.stdout.readline() == "busy\n"
    child.terminate()
    output, errors = child.communicate(timeout=30)
    assert "left the loop" not in output and "Interrupted: asked to end by SIGTERM" in errors and child.returncode == 1


def test_a_process_that_does_not_end_is_ended() -> None:
    child = python(BUSY.format(condition="True"), GRISTMILL_GRACE_SECONDS="0.3")
    assert child.stdout is not None and child.stdout.readline() == "busy\n"
    child.terminate()
    output, errors = child.communicate(timeout=30)
    assert child.returncode == EXIT_CODE and "still busy" in errors and not output


def interrupted(request: Build, store: Store, place: Path, *, after: Callable[[], bool]) -> str:
    """Build `request` in a process that is asked to end once `after` holds; return what it said."""
    place.write_bytes(pickle.dumps((request, store)))
    child = python(BUILD, str(place), OMP_NUM_THREADS="1")
    wait_until(lambda: after() or child.poll() is not None)
    child.terminate()
    _, errors = child.communicate(timeout=120)
    assert child.returncode == 1, errors
    return errors


def steps_of(directory: Path) -> list[int]:
    return sorted(int(path.name.partition("-")[2]) for path in directory.glob("resume/step-*"))


@pytest.mark.slow
def test_an_interrupted_training_writes_a_resume_point_and_goes_on_to_the_same_bytes(world: World, tmp_path: Path) -> None:
    """The only point is that of the interruption: none is due by the clock."""
    request = world.general(GeneralSettings(model=world.general().settings.model, **run(tokens=128 * 600)))
    store = Store(tmp_path / "interrupted")
    staging = store.staging(request.asset, request.fingerprint())
    errors = interrupted(request, store, tmp_path / "request", after=lambda: (staging / METRICS).exists())
    (step,) = steps_of(staging)
    assert f"Interrupted: asked to end at step {step} of 600; a resume point is written" in errors
    whole = Store(tmp_path / "whole").build(request).manifest
    assert store.build(request).manifest.content_sha256 == whole.content_sha256


@pytest.mark.slow
def test_an_interrupted_run_of_two_processes_leaves_a_resume_point(world: World, tmp_path: Path) -> None:
    settings = GeneralSettings(model=world.general().settings.model, processes=2, **run(tokens=128 * 4000))
    request = world.general(settings)
    store = Store(tmp_path / "interrupted")
    staging = store.staging(request.asset, request.fingerprint())
    errors = interrupted(request, store, tmp_path / "request", after=lambda: (staging / METRICS).exists())
    assert "the processes of the run have ended" in errors
    (step,) = steps_of(staging)
    assert 0 < step < 4000 and step % 10 == 0


def test_records_are_shown_now_and_then_and_whole(tmp_path: Path) -> None:
    with Records(tmp_path) as records:
        records.metrics.append({"step": 1})
        records.show()
        assert (tmp_path / METRICS).read_text() == ""
        time.sleep(SECONDS_UNSHOWN + 0.1)
        records.show()
        assert (tmp_path / METRICS).read_text() == '{"step": 1}\n'
        records.metrics.append({"step": 2})
    assert (tmp_path / METRICS).read_text() == '{"step": 1}\n{"step": 2}\n'
