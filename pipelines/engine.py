"""One function maps a pure function over items: in this process, over a pool of processes, or over a Ray cluster.

The results come in the order of the items and do not depend on the number of workers. Children die with their parent
and use one thread each, so that the pool, not BLAS, spends the cores. A child that maps does so itself: pools do not nest.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import signal
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from multiprocessing import active_children, get_context
from multiprocessing.util import Finalize
from typing import Generic, Literal, TypeVar, get_args

from pipelines.errors import UnknownName
from pipelines.ray_shards import map_with_ray

Item = TypeVar("Item")
Result = TypeVar("Result")

PR_SET_PDEATHSIG = 1
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"), "1")
SHORT_SPIN = {"GOMP_SPINCOUNT": "10000"}
"""How long a thread spins before it sleeps. Two threads on two cores that something else uses too train at a thirtieth of
their speed with OpenMP's default, at half of it with this, and lose a tenth on idle cores."""


Kind = Literal["serial", "processes", "ray"]


def _chosen_kind() -> Kind:
    chosen = os.environ.get("GRISTMILL_ENGINE") or "processes"
    if chosen not in get_args(Kind):
        raise UnknownName("engine (GRISTMILL_ENGINE)", chosen, get_args(Kind))
    return chosen  # type: ignore[return-value]


@dataclass(frozen=True)
class Engine:
    """Where shards are mapped."""

    kind: Kind = field(default_factory=_chosen_kind)
    """GRISTMILL_ENGINE, or processes. The results are the same; `ray` needs the extra of that name."""
    workers: int = 0
    """Processes; 0 means GRISTMILL_WORKERS or, without it, one per core this process may use."""

    @property
    def num_workers(self) -> int:
        return self.workers or int(os.environ.get("GRISTMILL_WORKERS") or 0) or len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class Mapped(Generic[Item, Result]):
    """The result of one item, or the error it raised."""

    item: Item
    result: Result | None = None
    error: Exception | None = None


def map_shards(
    function: Callable[[Item], Result], items: Sequence[Item], engine: Engine | None = None, *, isolate: bool = False, ahead: int = 0
) -> Iterator[Mapped[Item, Result]]:
    """Yield ``function(item)`` for every item, in order; an item's error is yielded, not raised.

    Args:
        isolate: use fresh child processes, even for one item: their memory ends with them, and their threads are their own. They
            are of this machine, also where Ray maps the rest.
        ahead: start at most this many items before the result of the first is taken, so that results do not pile up; 0 starts all.

    Raises:
        RuntimeError: a worker process was killed (out of memory, most often).
    """
    engine = engine or Engine()
    if engine.kind == "ray" and items and not isolate and not _is_worker:
        yield from map_with_ray(partial(_attempt_on_node, function), items, workers=engine.num_workers, ahead=ahead, environment=ONE_THREAD)
        return
    alone = engine.num_workers == 1 or len(items) < 2 or _is_worker
    if not items or engine.kind == "serial" or (alone and not isolate):
        yield from (_attempt(function, item) for item in items)
        return
    pool = _new_pool(min(engine.num_workers, len(items))) if isolate else _shared_pool(engine.num_workers)
    waiting = iter(items)
    futures: deque[Future[Mapped[Item, Result]]] = deque()

    def start(number: int) -> None:
        with _environment(SHORT_SPIN if isolate else ONE_THREAD):
            futures.extend(pool.submit(attempt, function, item) for item in islice(waiting, number))

    try:
        start(ahead or len(items))
        while futures:
            mapped = futures[0].result()
            futures.popleft()
            start(1)
            yield mapped
    except BrokenProcessPool as error:
        _pools.clear()
        raise RuntimeError(
            "a worker process was killed, most often for lack of memory; set GRISTMILL_WORKERS lower and run again"
        ) from error
    except GeneratorExit:
        raise
    except BaseException:  # an interruption, as of a run that is cancelled: its work is not to go on
        _pools.clear()
        _end(pool)
        raise
    finally:
        for future in futures:
            future.cancel()
        if isolate:
            pool.shutdown(wait=False, cancel_futures=True)


def die_with_parent() -> None:
    """Ask Linux to end this process when its parent ends, however it ends; elsewhere do nothing."""
    if hasattr(ctypes, "CDLL") and os.uname().sysname == "Linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _attempt(function: Callable[[Item], Result], item: Item) -> Mapped[Item, Result]:
    try:
        return Mapped(item, result=function(item))
    except Exception as error:  # noqa: BLE001 - handed to the caller with its item, who decides
        return Mapped(item, error=error)


def attempt(function: Callable[[Item], Result], item: Item) -> Mapped[Item, Result]:
    """Return ``function(item)``, or the error it raised as one that can be pickled."""
    mapped = _attempt(function, item)
    return Mapped(item, error=_portable(mapped.error)) if mapped.error else mapped


def _attempt_on_node(function: Callable[[Item], Result], item: Item) -> Mapped[Item, Result]:
    """As in a worker of a pool; Ray ends its own with their node."""
    global _is_worker
    _is_worker = True
    return attempt(function, item)


def _portable(error: Exception) -> Exception:
    """Return `error`, or its words where it cannot be pickled: one that cannot be read back would break the pool."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001  # whatever the error's own constructor raises
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


_pools: dict[int, ProcessPoolExecutor] = {}


def _shared_pool(workers: int) -> ProcessPoolExecutor:
    """Return the process pool of this size, started once: imports in the children are paid once."""
    if workers not in _pools or not _is_usable(_pools[workers]):
        _pools[workers] = _new_pool(workers)
        # not atexit: a process that multiprocessing started, as a run's is, waits for its children before that
        Finalize(_pools[workers], _end, (_pools[workers],), exitpriority=10)
    return _pools[workers]


def _end(pool: ProcessPoolExecutor) -> None:
    """End `pool` at once, with what it still does: nobody waits for it."""
    pool.shutdown(wait=False, cancel_futures=True)
    for child in active_children():
        child.terminate()


def _is_usable(pool: ProcessPoolExecutor) -> bool:
    """Return whether `pool` takes work: not after one of its processes was killed between two calls."""
    try:
        pool.submit(os.getpid)
    except BrokenProcessPool:
        return False
    return True


def _new_pool(workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_start_worker)


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set `values`, where they are not set, for processes started meanwhile; libraries read them when they load."""
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


_is_worker = False
"""Whether this process is a worker of a pool."""


def _start_worker() -> None:
    global _is_worker
    _is_worker = True
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a parent started in the background may hand on that it is ignored
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent()
