"""Leases: which artifacts live processes read or write, so that housekeeping never takes one away from them.

    <root>/locks/gate         held in common by who looks artifacts up; held alone by who removes some
    <root>/leases/<name>.json the artifacts that one process needs; locked as long as it lives

Whoever needs artifacts finds them and writes the lease while it holds the gate in common; whoever removes artifacts holds the
gate alone, and takes what a locked lease names as needed. So an artifact that a process found is named by its lease, or was
not yet to be removed: there is no moment between. A lease that nobody holds is of a process that was killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

from pipelines.files import locked

Found = TypeVar("Found")


class Address(NamedTuple):
    """Where an artifact lies in a store."""

    asset: str
    fingerprint: str

    @property
    def name(self) -> str:
        """The name of its folder under ``staging`` and ``rejected``, and of its lock."""
        return f"{self.asset}-{self.fingerprint}"


class Leases:
    """The leases of the store at `root`."""

    def __init__(self, root: Path) -> None:
        self.directory = root / "leases"
        self._gate = root / "locks" / "gate"

    @contextlib.contextmanager
    def looking(self) -> Iterator[None]:
        """Keep everything where it is inside: for what is short, and for commands that only read."""
        with locked(self._gate, shared=True):
            yield

    @contextlib.contextmanager
    def taken(self, find: Callable[[], Found], named: Callable[[Found], Iterable[Address]]) -> Iterator[Found]:
        """Yield what `find` returns, and keep inside the artifacts that `named` says of it, be they published yet or not."""
        with contextlib.ExitStack() as held:
            with self.looking():
                found = find()
                held.enter_context(self._written(named(found)))
            yield found

    @contextlib.contextmanager
    def _written(self, addresses: Iterable[Address]) -> Iterator[None]:
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / f"{os.getpid()}-{uuid.uuid4().hex}.json"
        try:
            with path.open("w", encoding="utf-8") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                json.dump(sorted(set(addresses)), file)
                file.flush()
                yield
        finally:
            path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def alone(self, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Let nobody look up an artifact inside; `waiting` is called where somebody has to be waited for."""
        with locked(self._gate, waiting=waiting):
            yield

    def live(self) -> set[Address]:
        """Return what the leases of living processes name. Asked inside `alone`, nothing else is in use."""
        return {address for path in self._paths() if not is_free(path) for address in _read(path)}

    def stale(self) -> list[Path]:
        """Return the leases of processes that are gone."""
        return [path for path in self._paths() if is_free(path)]

    def _paths(self) -> list[Path]:
        return sorted(self.directory.glob("*.json"))


def is_free(path: Path) -> bool:
    """Return whether no process holds the lock on the file `path`; a file that is not there is free."""
    try:
        with path.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return True
    except BlockingIOError:
        return False
    return True


def _read(path: Path) -> list[Address]:
    try:
        return [Address(*pair) for pair in json.loads(path.read_bytes())]
    except FileNotFoundError:  # let go since it was found
        return []
