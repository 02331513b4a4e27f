"""A function mapped over items by Ray (extra `ray`): on the cluster that RAY_ADDRESS names, else on one of this machine's own.

A cluster started here listens on 127.0.0.1 alone and ends with this process. The nodes of another see the project's and the home
directory at the same paths, as on a shared file system, and have the same packages installed.
"""

from __future__ import annotations

import atexit
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from itertools import islice
from typing import TYPE_CHECKING, TypeVar

from pipelines.errors import GristmillError

if TYPE_CHECKING:
    from ray import ObjectRef

Item = TypeVar("Item")
Result = TypeVar("Result")

QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
"""Ray reports nothing to its makers, and leaves the accelerators of tasks that ask for none as they are."""
ALONE = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Ray's switch for a cluster of one machine: every port of it is then bound to 127.0.0.1, else to all addresses."""


def map_with_ray(
    function: Callable[[Item], Result], items: Sequence[Item], *, workers: int, ahead: int, environment: Mapping[str, str]
) -> Iterator[Result]:
    """Yield ``function(item)`` for every item, in order, one core each.

    Args:
        workers: cores of the cluster that is started where there is none.
        ahead: start at most this many items before the result of the first is taken; 0 starts all.
        environment: set in every worker process before it loads anything.

    Raises:
        GristmillError: Ray is not installed, or the cluster does not answer.
        RuntimeError: a worker process was killed, and again in Ray's own attempts.
    """
    _connect(workers, environment)
    import ray

    call, sent = ray.remote(num_cpus=1)(_call), ray.put(function)
    waiting = iter(items)
    running: deque[ObjectRef] = deque()
    try:
        running.extend(call.remote(sent, item) for item in islice(waiting, ahead or len(items)))
        while running:
            result = ray.get(running[0])
            running.popleft()
            running.extend(call.remote(sent, item) for item in islice(waiting, 1))
            yield result
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError, ray.exceptions.NodeDiedError) as error:
        raise RuntimeError(
            "a Ray worker was killed, most often for lack of memory; give the tasks fewer cores (GRISTMILL_WORKERS) and run again"
        ) from error
    finally:
        for reference in running:
            ray.cancel(reference, force=True)


def _call(function: Callable[[Item], Result], item: Item) -> Result:
    return function(item)


def _connect(workers: int, environment: Mapping[str, str]) -> None:
    """Connect to a cluster once per process."""
    if find_spec("ray") is None:
        raise GristmillError("the engine 'ray' needs Ray, which is not installed: make setup EXTRAS=ray, or set GRISTMILL_ENGINE=processes")
    address = os.environ.get("RAY_ADDRESS")
    for name, value in (QUIET if address else QUIET | ALONE).items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        return
    settings = {"runtime_env": {"env_vars": dict(environment)}, "log_to_driver": False, "logging_level": "warning"}
    if not address:
        settings |= {"num_cpus": workers, "include_dashboard": False}
    try:
        ray.init(address or "local", **settings)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise GristmillError(
            f"the Ray cluster {address or 'of this machine'} does not answer ({error}); start it or correct RAY_ADDRESS, or set "
            "GRISTMILL_ENGINE=processes"
        ) from error
    atexit.register(ray.shutdown)
