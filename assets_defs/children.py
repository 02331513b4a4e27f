"""Artifacts computed in processes of their own, one each, while the step waits: what `training` and `isolate` of an asset mean.

A child holds the lock of its artifact, dies with its parent, and speaks Dagster Pipes: lines of progress become rows of the
run's log while it works. It is the leader of its own session, so that Ctrl-C in a terminal reaches its parent alone, which
asks it to end. A step that is interrupted, as when a run is cancelled in the UI, does the same: a training writes a resume
point and its memory, its GPU and its lock are free before the run is over.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import dagster as dg
import psutil
from dagster import AssetExecutionContext

from assets_defs.child import COMPUTING, PARENT, ChildEnded, decoded, encoded, stream_seconds
from assets_defs.fork_server import Forked, forked_child, is_of_use, prepare_server
from assets_defs.ray_jobs import RayJob, is_chosen
from pipelines.engine import SHORT_SPIN, Mapped
from pipelines.housekeeping import CHILD_MESSAGES
from pipelines.interruption import grace_seconds
from pipelines.store import RESUME, Build, Built, Store
from pipelines.tracking import LiveRun

warnings.filterwarnings("ignore", message=".*expected_writer_count.* is currently in preview")  # which a session of Pipes calls itself

SECONDS_BETWEEN_LOOKS = 0.05
SECONDS_AFTER_GRACE = 5.0
GPUS = Path("/proc/driver/nvidia/gpus")


@dataclass
class Child:
    """A process that computes `build`, and the session it reports to."""

    build: Build
    session: dg.PipesSession
    process: subprocess.Popen[bytes] | Forked | RayJob
    closing: contextlib.ExitStack
    live: LiveRun
    staging: Path
    found: str
    """The newest resume point when it began."""
    gpu: str | None
    """The one GPU that it sees; None where it sees all, or there is none."""
    shown: Future[str | None] | None = None
    told: bool = False
    next_look: float = field(default_factory=lambda: time.monotonic() + stream_seconds())

    def is_over(self) -> bool:
        """Return whether the process has ended."""
        return self.process.poll() is not None

    def show(self, context: AssetExecutionContext, pool: ThreadPoolExecutor) -> None:
        """Have MLflow shown what was recorded, now and then, once the child computes; never wait for it."""
        if self.shown and not self.shown.done():
            return
        if self.shown and not self.told and (url := self.shown.result()):
            self.told = True
            context.log.info(f"{self.build.label} in MLflow: {url}")
        if time.monotonic() < self.next_look:
            return
        self.next_look = time.monotonic() + stream_seconds()
        if COMPUTING in self.session.get_custom_messages():
            self.shown = pool.submit(self.live.update)

    def result(self) -> Mapped[Build, Built]:
        """Return what became of the artifact, once the process has ended."""
        self.closing.close()  # reads the last messages
        if self.shown:
            self.shown.result()
        for message in self.session.get_custom_messages():
            if isinstance(message, dict) and "result" in message:
                mapped = decoded(message["result"])
                if mapped.error:
                    self.live.leave("FAILED")
                return self._ended(mapped.error) if isinstance(mapped.error, ChildEnded) else mapped
        self.live.leave("FAILED")
        return self._ended(ChildEnded(f"{self.build.label}: {_last_words(self.process.returncode)}"))

    def _ended(self, error: ChildEnded) -> Mapped[Build, Built]:
        error.went_on = newest_point(self.staging) > self.found
        return Mapped(self.build, error=error)

    def end(self) -> None:
        """Ask the process to end, wait until it has, and end what is left of it."""
        if not self.is_over():
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(grace_seconds() + SECONDS_AFTER_GRACE)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        if self.shown:
            self.shown.result()
        self.live.leave("KILLED")
        self.closing.close()


def build_in_children(
    context: AssetExecutionContext,
    store: Store,
    builds: Sequence[Build],
    num_children: int,
    *,
    live: Callable[[Build], LiveRun],
    pool: ThreadPoolExecutor,
) -> Iterator[Mapped[Build, Built]]:
    """Yield what became of each of `builds`, in order, computed by at most `num_children` processes at once.

    What is in the store already is found in this process. An interruption ends the children before it goes on.

    Args:
        live: makes what shows a build in MLflow while it is computed.
        pool: where MLflow is written to.
    """
    waiting, children = deque(builds), deque[Child | Build]()
    gpus = gpus_of_one(builds)
    num_children = min(num_children, len(gpus))
    sweep(store)
    try:
        while waiting or children:
            running = [one for one in children if isinstance(one, Child) and not one.is_over()]
            while waiting and len(running) < num_children:
                build = waiting.popleft()
                found = store.find(build.asset, build.fingerprint())
                free = next(gpu for gpu in gpus if gpu is None or gpu not in {one.gpu for one in running})
                children.append(build if found else _start(context, store, build, live(build), free))
                running += [one for one in [children[-1]] if isinstance(one, Child)]
            first = children[0]
            if isinstance(first, Build):
                yield Mapped(children.popleft(), result=store.build(first))
            elif first.is_over():
                yield first.result()
                children.popleft()
            else:
                for one in running:
                    one.show(context, pool)
                time.sleep(SECONDS_BETWEEN_LOOKS)
    finally:
        for one in children:
            if isinstance(one, Child):
                one.end()


def gpus_of_one(builds: Sequence[Build]) -> list[str | None]:
    """Return the GPU that each of the processes which may run at once is to see; None stands for what this process sees.

    A pool holds one step at a time, and a step may hold many trainings: they take one GPU each, in turn, unless they share all.
    """
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = named.split(",") if named is not None else [str(number) for number in range(len(list(GPUS.glob("*"))))]
    gpus = [name for name in gpus if name.strip()]
    on_cpu = all(getattr(build.settings, "device", "auto") == "cpu" for build in builds)
    if not gpus or on_cpu:
        return [None] * max(1, len(builds))
    shared = any(getattr(build.settings, "processes", 1) > 1 for build in builds)
    return [None] if shared else list(gpus)


def _start(context: AssetExecutionContext, store: Store, build: Build, live: LiveRun, gpu: str | None) -> Child:
    with contextlib.ExitStack() as opened:
        place = opened.enter_context(_place(store, build))
        session = opened.enter_context(
            dg.open_pipes_session(
                context=context,
                context_injector=dg.PipesFileContextInjector(str(place / "context.json")),
                message_reader=dg.PipesFileMessageReader(str(place / "messages")),
                extras={"request": encoded((store, build))},
            )
        )
        environment = {**_environment(), **session.get_bootstrap_env_vars()}
        if gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = gpu
        process = _process(environment)
        staging = store.staging(build.asset, build.fingerprint())
        return Child(build, session, process, opened.pop_all(), live, staging, newest_point(staging), gpu)


def prepare() -> None:
    """Begin to import, in a process of its own, what the children to come import."""
    if is_of_use() and not is_chosen():
        prepare_server(_environment())


def _environment() -> dict[str, str]:
    """Return the environment of a child, but for what is its own."""
    return {**SHORT_SPIN, **os.environ, "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path)}


def _process(environment: Mapping[str, str]) -> subprocess.Popen[bytes] | Forked | RayJob:
    if is_chosen():
        return RayJob(environment)
    if is_of_use():
        return forked_child(environment)
    command = [sys.executable, "-m", "assets_defs.child"]
    own = {**environment, PARENT: str(os.getpid())}
    return subprocess.Popen(command, env=own, stdin=subprocess.DEVNULL, start_new_session=True)


def newest_point(staging: Path) -> str:
    """Return the name of the newest resume point of the artifact that is written in `staging`; they sort by their step."""
    return max((path.name for path in (staging / RESUME).glob("step-*")), default="")


@contextlib.contextmanager
def _place(store: Store, build: Build) -> Iterator[Path]:
    """Yield a directory that this user alone may enter, named by what is built and by this process."""
    place = store.root / CHILD_MESSAGES / f"{build.asset}-{build.fingerprint()}.{os.getpid()}"
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(mode=0o700)
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def sweep(store: Store) -> None:
    """Remove what processes that were killed have left of their messages."""
    for place in (store.root / CHILD_MESSAGES).glob("*"):
        if not psutil.pid_exists(int(place.suffix.removeprefix("."))):
            shutil.rmtree(place, ignore_errors=True)


def _last_words(code: int) -> str:
    if code < 0:
        return f"its process was killed by {signal.Signals(-code).name} (by the system for lack of memory, or by hand)"
    return f"its process ended with exit code {code}; its own words stand in the run's stderr"
