"""The engine: order, independence of the number of workers, errors with their items, workers that are killed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.engine import Engine, map_shards
from pipelines.errors import MissingArtifact, UnknownName

ROOT = Path(__file__).parents[1]
TWO = Engine(workers=2)


class CarriedError(Exception):
    """Needs two arguments and gives pickle one, as errors of some HTTP clients do."""

    def __init__(self, words: str, response: object) -> None:
        super().__init__(words)
        self.response = response


def square(number: int) -> int:
    return number * number


def square_late(number: int) -> int:
    """Finish the later the smaller."""
    time.sleep(0.05 * (6 - number))
    return square(number)


def fail_on_odd(number: int) -> int:
    if number % 2:
        raise ERRORS[number]()
    return square(number)


ERRORS = {
    1: lambda: MissingArtifact("no corpus"),
    3: lambda: UnknownName("filter", "gopher", ["gopher_quality"]),
    5: lambda: CarriedError("no answer", object()),
}


def kill_on_two(number: int) -> int:
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return square(number)


def process_id(number: int) -> int:
    time.sleep(0.1)
    return os.getpid()


def threads(number: int) -> str | None:
    return os.environ.get("OMP_NUM_THREADS")


def wait_with_id(directory: str) -> None:
    (Path(directory) / f"{os.getpid()}.worker").touch()
    time.sleep(120)


@given(st.lists(st.integers(-1000, 1000), max_size=8), st.integers(1, 3))
def test_serial_results_are_those_of_map(numbers: list[int], workers: int) -> None:
    mapped = list(map_shards(square, numbers, Engine(kind="serial", workers=workers)))
    assert [(m.item, m.result, m.error) for m in mapped] == [(n, n * n, None) for n in numbers]


@pytest.mark.parametrize("engine", [Engine(kind="serial"), Engine(workers=1), TWO, Engine(workers=3)])
@pytest.mark.parametrize("isolate", [False, True])
def test_results_come_in_order_whatever_the_number_of_workers(engine: Engine, isolate: bool) -> None:
    assert [m.result for m in map_shards(square_late, range(6), engine, isolate=isolate)] == [0, 1, 4, 9, 16, 25]


@pytest.mark.parametrize("isolate", [False, True])
def test_no_items_give_no_results(isolate: bool) -> None:
    assert list(map_shards(square, [], TWO, isolate=isolate)) == []


@pytest.mark.parametrize("engine", [Engine(kind="serial"), TWO])
def test_an_error_is_yielded_with_its_item(engine: Engine) -> None:
    mapped = list(map_shards(fail_on_odd, range(6), engine))
    assert [m.item for m in mapped] == list(range(6))
    assert [m.result for m in mapped] == [0, None, 4, None, 16, None]
    assert type(mapped[1].error) is MissingArtifact and str(mapped[1].error) == "no corpus"
    assert type(mapped[3].error) is UnknownName and "did you mean 'gopher_quality'" in str(mapped[3].error)
    assert "no answer" in str(mapped[5].error)  # its words survive where the error itself cannot be carried


def test_one_item_stays_in_this_process_unless_isolated() -> None:
    here, there = (next(map_shards(process_id, [1], TWO, isolate=isolate)).result for isolate in (False, True))
    assert here == os.getpid() != there


def test_workers_of_a_shared_pool_use_one_thread_and_leave_ours_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert {m.result for m in map_shards(threads, range(4), Engine(workers=4))} == {"1"}
    assert "OMP_NUM_THREADS" not in os.environ


def test_a_killed_worker_ends_in_a_message_and_the_next_call_works() -> None:
    with pytest.raises(RuntimeError, match=r"a worker process was killed, most often for lack of memory; set GRISTMILL_WORKERS lower"):
        list(map_shards(kill_on_two, range(4), TWO))
    assert [m.result for m in map_shards(square, range(4), TWO)] == [0, 1, 4, 9]


def test_a_worker_that_is_killed_between_two_calls_costs_nothing() -> None:
    workers = {m.result for m in map_shards(process_id, range(4), TWO)}
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
    wait_until(lambda: not any(is_alive(worker) for worker in workers))
    time.sleep(0.2)  # the pool notices in a thread of its own
    assert [m.result for m in map_shards(square, range(4), TWO)] == [0, 1, 4, 9]


def test_a_pool_that_a_thread_has_started_outlives_it() -> None:
    """Linux takes the end of the thread that started a worker for the end of its parent."""
    found: list[int | None] = []
    for _ in range(2):
        thread = threading.Thread(target=lambda: found.extend(m.result for m in map_shards(square, range(3), Engine(workers=3))))
        thread.start()
        thread.join(60)
        time.sleep(0.3)
    assert found == [0, 1, 4] * 2


@pytest.mark.parametrize("isolate", [False, True])
def test_workers_die_with_their_parent(tmp_path: Path, isolate: bool) -> None:
    code = (
        "import sys\nfrom test_engine import *\n"
        f"if __name__ == '__main__':\n    list(map_shards(wait_with_id, [{str(tmp_path)!r}] * 2, TWO, isolate={isolate}))\n"
    )
    script = tmp_path / "parent.py"
    script.write_text(code)
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    parent = subprocess.Popen([sys.executable, str(script)], env={**os.environ, "PYTHONPATH": path})
    wait_until(lambda: len(list(tmp_path.glob("*.worker"))) == 2)
    parent.kill()
    parent.wait(10)
    workers = [int(path.stem) for path in tmp_path.glob("*.worker")]
    wait_until(lambda: not any(is_alive(worker) for worker in workers))


def test_an_interrupted_parent_ends_at_once_and_its_workers_with_it(tmp_path: Path):
    code = (
        "from pipelines.engine import map_shards\nfrom test_engine import TWO, wait_with_id\n"
        f"if __name__ == '__main__':\n    list(map_shards(wait_with_id, [{str(tmp_path)!r}] * 2, TWO))\n"
    )
    script = tmp_path / "parent.py"
    script.write_text(code)
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    parent = subprocess.Popen([sys.executable, str(script)], env={**os.environ, "PYTHONPATH": path}, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: len(list(tmp_path.glob("*.worker"))) == 2)
    parent.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in parent.communicate(timeout=20)[1]
    assert not any(is_alive(int(path.stem)) for path in tmp_path.glob("*.worker"))


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # gone before, or while it was read
        return False


def wait_until(condition: Callable[[], bool], *, seconds: float = 30) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "waited in vain"
        time.sleep(0.05)


def nested(number: int) -> list[int]:
    """Map inside a worker: it has no children of its own."""
    before = os.getpid()
    found = [mapped.result for mapped in map_shards(with_process, [number, number + 1], TWO)]
    assert {process for _, process in found} == {before}
    return [result for result, _ in found]


def with_process(number: int) -> tuple[int, int]:
    return square(number), os.getpid()


def test_a_worker_that_maps_does_so_itself():
    assert [mapped.result for mapped in map_shards(nested, [1, 5], TWO)] == [[1, 4], [25, 36]]


@pytest.mark.parametrize("ahead", [1, 2, 5, 100])
def test_results_come_in_order_however_many_are_started_ahead(ahead: int):
    assert [mapped.result for mapped in map_shards(square_late, range(7), TWO, ahead=ahead)] == [n * n for n in range(7)]


def test_no_more_items_are_started_than_asked(tmp_path: Path):
    started = map_shards(touch, [tmp_path / str(n) for n in range(9)], TWO, ahead=3)
    next(started)
    time.sleep(0.5)
    assert len(list(tmp_path.iterdir())) == 4
    started.close()


def touch(path: Path) -> None:
    path.touch()


def test_workers_come_from_the_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GRISTMILL_WORKERS", "7")
    assert Engine().num_workers == 7 and Engine(workers=2).num_workers == 2
    monkeypatch.setenv("GRISTMILL_WORKERS", "")
    assert Engine().num_workers == len(os.sched_getaffinity(0))


def map_and_return() -> None:
    assert [mapped.result for mapped in map_shards(square, range(4), TWO)] == [0, 1, 4, 9]


def map_until_interrupted() -> None:
    threading.Timer(3.0, os.kill, (os.getpid(), signal.SIGINT)).start()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):
        list(map_shards(sleep_long, range(4), TWO))


def sleep_long(number: int) -> None:
    time.sleep(300)


@pytest.mark.parametrize("target", [map_and_return, map_until_interrupted])
def test_a_process_that_multiprocessing_started_ends_although_it_has_a_pool(target: Callable[[], None]) -> None:
    """A run's process is one: it waits for its children before the pool is told to end."""
    process = get_context("spawn").Process(target=target)
    process.start()
    process.join(60)
    ended = process.exitcode
    process.kill()
    assert ended == 0
