"""The server that forks children: what a child sees, how its end is told, and that nothing of it outlives its parent."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from assets_defs import fork_server
from assets_defs.fork_server import NAME, Forked, ForkServer, prepare_server

ROOT = Path(__file__).parents[1]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "pidfd_open") or sys.platform != "linux", reason="children are forked on Linux alone"),
]
PARENT = """
import os, sys, time
from assets_defs.fork_server import ForkServer
server = ForkServer(dict(os.environ), "forked_child")
forked = server.fork({**os.environ, "WAIT": "1"})
print(server.process.pid, forked.pid, flush=True)
time.sleep(60)
"""
DEVICES = """
import importlib, torch
asked = []
for name in ("is_available", "device_count", "_lazy_init"):
    setattr(torch.cuda, name, lambda *_, name=name: asked.append(name) or 0)
from assets_defs.fork_server import PRELOADED
for name in PRELOADED:
    importlib.import_module(name)
assert not asked and not torch.cuda.is_initialized(), asked
"""


def wait_until(condition: Callable[[], bool], *, seconds: float = 30) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "waited in vain"
        time.sleep(0.05)


def is_gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def environment(**variables: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), **variables}


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    server = ForkServer(environment(), "forked_child")
    yield server
    server.end()
    assert server.process.poll() is not None


def children(server: ForkServer) -> list[psutil.Process]:
    return [child for child in psutil.Process(server.process.pid).children() if child.status() != psutil.STATUS_ZOMBIE]


def test_a_child_sees_what_it_would_see_if_it_were_started_by_itself(
    server: ForkServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    forked = server.fork(environment(SEEN="today"))
    assert forked.wait(60) == 7 and forked.poll() == 7 and forked.returncode == 7
    seen = json.loads(capfd.readouterr().out)
    assert seen.pop("path") == sys.path
    assert seen == {"variable": "today", "directory": str(tmp_path), "leads": True, "name": NAME, "parent": True, "torch": True}


def test_children_live_side_by_side_and_each_end_is_told(server: ForkServer) -> None:
    first, second, third = (server.fork(environment(WAIT="1")) for _ in range(3))
    with pytest.raises(subprocess.TimeoutExpired):
        first.wait(0.1)
    assert first.poll() is second.poll() is third.poll() is None and len(children(server)) == 3
    os.kill(second.pid, signal.SIGKILL)
    assert second.wait(10) == -signal.SIGKILL
    first.terminate()
    assert first.wait(10) == -signal.SIGTERM
    first.terminate()  # of one that is over it asks nothing
    assert third.poll() is None
    third.terminate()
    third.wait(10)
    wait_until(lambda: not children(server))


def test_a_child_whose_request_never_comes_ends(server: ForkServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(forked: Forked, request: object) -> None:
        forked._lines.close()
        forked._connection.close()
        raise KeyboardInterrupt

    monkeypatch.setattr(Forked, "begin", interrupted)
    with pytest.raises(KeyboardInterrupt):
        server.fork(environment(WAIT="1"))
    wait_until(lambda: not children(server))
    monkeypatch.undo()
    assert server.fork(environment()).wait(60) == 7, "the server goes on"


def test_a_server_that_is_killed_takes_its_children_with_it() -> None:
    server = ForkServer(environment(), "forked_child")
    forked = server.fork(environment(WAIT="1"))
    wait_until(lambda: psutil.Process(forked.pid).name() == NAME)
    time.sleep(0.5)  # until the child has asked to end with it
    server.process.kill()
    assert forked.wait(10) == -signal.SIGKILL
    with pytest.raises((BrokenPipeError, ConnectionResetError)):
        server.fork(environment())
    server.end()


def test_a_new_server_takes_the_place_of_one_that_was_killed_and_of_one_for_another_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fork_server, "PRELOADED", ())
    monkeypatch.setattr(fork_server, "_server", None)
    first = prepare_server(environment())
    assert prepare_server(environment(DAGSTER_PIPES_CONTEXT="x", MLFLOW_TRACKING_URI="y")) is first
    second = prepare_server(environment(OMP_NUM_THREADS="1"))
    assert second is not first and first.process.poll() is not None
    second.process.kill()
    second.process.wait()
    third = prepare_server(environment(OMP_NUM_THREADS="1"))
    assert third is not second and third.process.poll() is None
    third.end()


def test_nothing_outlives_a_parent_that_is_killed() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pids = [int(word) for word in parent.stdout.readline().split()]
    parent.kill()
    parent.wait()
    wait_until(lambda: all(is_gone(pid) for pid in pids))


def test_where_there_is_an_accelerator_nothing_is_forked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fork_server, "DEVICES", (tmp_path / "nvidiactl",))
    assert fork_server.is_of_use()
    (tmp_path / "nvidiactl").touch()
    assert not fork_server.is_of_use()


def test_nothing_that_is_preloaded_asks_for_a_device() -> None:
    subprocess.run([sys.executable, "-c", DEVICES], cwd=ROOT, env=environment(), check=True)
