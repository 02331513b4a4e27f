"""The child process that computes one artifact for a step: `assets_defs.children` starts it and speaks Dagster Pipes with it.

    python -m assets_defs.child

What is asked for comes as the extra `request` of the Pipes context, and what became of it goes back as a custom message
`result`: both pickled, between two processes of this project. Dagster itself is not imported here. The process ends with its
parent, and is asked to end by SIGTERM or SIGINT: a training then writes a resume point first.
"""

import base64
import os
import pickle
import sys
from typing import Any

from dagster_pipes import PipesContext, open_dagster_pipes

from pipelines import progress
from pipelines.engine import Mapped, attempt, die_with_parent
from pipelines.files import is_locked
from pipelines.interruption import EXIT_CODE, Interrupted, install, requested
from pipelines.store import Build, Built, Store

PARENT = "GRISTMILL_PARENT"
"""Environment variable: the process that started this one."""
STREAM = "GRISTMILL_STREAM_SECONDS"
"""Environment variable: seconds between two lines of progress in Dagster, and between two batches of metrics in MLflow."""
COMPUTING = "computing"
"""Message: this process, and no other, computes the artifact."""


class ChildEnded(RuntimeError):
    """A child was asked to end, or ended without a word; a retry goes on from the newest resume point of its artifact."""

    went_on = False
    """It left a newer resume point than it found."""


def stream_seconds() -> float:
    """Return the seconds between two lines of progress in Dagster."""
    return float(os.environ.get(STREAM) or 20.0)


def main() -> int:
    """Compute the artifact that is asked for; return the exit code."""
    die_with_parent()
    if os.getppid() != int(os.environ[PARENT]):  # it ended before it could take this process with it
        return EXIT_CODE
    try:
        install()
        with open_dagster_pipes() as pipes:
            store, build = decoded(pipes.get_extra("request"))
            pipes.report_custom_message({"result": encoded(_built(pipes, store, build))})
    except Interrupted:
        return EXIT_CODE
    return 0


def _built(pipes: PipesContext, store: Store, build: Build) -> Mapped[Build, Built]:
    try:
        return _attempted(pipes, store, build)
    except Interrupted as request:
        progress.warn(f"{build.label}: {request}")
        return Mapped(build, error=ChildEnded(f"{build.label}: {request}"))


def _attempted(pipes: PipesContext, store: Store, build: Build) -> Mapped[Build, Built]:
    if is_locked(store.lock(build.asset, build.fingerprint())):
        pipes.log.info(f"{build.label} is being computed by another run; this one waits for what becomes of it")
    progress.listen(_Listener(pipes), every_seconds=stream_seconds())
    return attempt(store.build, build)


class _Listener:
    """Hands lines of progress to Dagster, and says with the first that this process computes: one that waits makes no progress."""

    def __init__(self, pipes: PipesContext) -> None:
        self._pipes, self._said = pipes, False

    def __call__(self, line: str) -> None:
        if requested():  # what is left of the time is for the resume point, and the parent may be gone
            return
        if not self._said:
            self._pipes.report_custom_message(COMPUTING)
            self._said = True
        self._pipes.log.info(line)


def encoded(value: object) -> str:
    """Return `value` as text for a message of Pipes."""
    return base64.b64encode(pickle.dumps(value)).decode()


def decoded(text: str) -> Any:  # noqa: ANN401  whatever was encoded
    """Return what `encoded` made `text` of."""
    return pickle.loads(base64.b64decode(text))


if __name__ == "__main__":
    from assets_defs import child  # by its name: what it sends back is read where this module is not the main one

    sys.exit(child.main())
