"""Housekeeping: what nothing needs any more in a store, and its removal.

An artifact stays where a root reaches it through the inputs of manifests. Roots are what partitions stand at, pins, promoted
models, checkpoints, and what the leases of living processes name. All else under ``artifacts/`` may go, and so may what killed or
failed builds left: in ``staging/`` and ``rejected/``, pointers half written, locks, leases, and artifacts half removed.

Roots are read, and what goes is renamed away, while the gate of `pipelines.leases` is held alone. So no process can have found an
artifact that goes: it would have a lease on it, which is a root. Removed it is after the gate was opened again.

Object storage behind the store is left alone. What no partition of this machine stands at goes from here, and is fetched again where
another machine's partition needs it.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from pipelines.errors import GristmillError
from pipelines.leases import Address, Leases, is_free
from pipelines.lineage import CHECKPOINTS, Lineage
from pipelines.manifests import MANIFEST_NAME
from pipelines.pins import pinned
from pipelines.store import RESUME

Kind = Literal[
    "artifact", "half-removed artifact", "staging", "resume point", "rejected", "lock", "lease", "temporary file", "messages", "trash"
]
TRASH = "trash"
SECONDS_PER_DAY = 86_400.0
DAYS_KEPT = 7.0
"""Resume points and failed attempts are worth something for a while: hours of training, and the reason of a failure."""
CHILD_MESSAGES = "children"
"""Where steps and their child processes leave each other messages, in a folder that ends in the number of the step's process."""
WORTH_A_WHILE = ("resume point", "rejected")
_NAMED = re.compile(r"(?P<asset>.+)-(?P<fingerprint>[0-9a-f]{32})(\.(fetch|[0-9a-f]{8}))?")
"""Of locks and of what is being written; with an ending where an artifact is fetched from object storage."""


@dataclass(frozen=True)
class Item:
    """One thing that no root reaches, or that a process left behind."""

    kind: Kind
    name: str
    path: Path
    bytes: int
    days: float
    """Days since it was last written to."""
    kept: str = ""
    """Why it stays after all; empty where it goes."""


@dataclass(frozen=True)
class Survey:
    """What stands in a store."""

    roots: Mapping[Address, tuple[str, ...]]
    """What is kept for its own sake, and why."""
    kept: int
    """Artifacts that roots reach."""
    items: tuple[Item, ...]
    removed: bool = False

    @property
    def going(self) -> tuple[Item, ...]:
        """The items that go."""
        return tuple(item for item in self.items if not item.kept)

    @property
    def bytes(self) -> int:
        """Bytes of the items that go."""
        return sum(item.bytes for item in self.going)


@dataclass(frozen=True)
class Keeper:
    """Keeps the house of the store at `root`."""

    root: Path
    promoted: Mapping[str, str]
    """Fingerprints of models that a registry names, and what it calls them."""
    older_than: float | None = None
    """Days: what is younger stays. None for 0, and `DAYS_KEPT` of what is worth something for a while."""
    checkpoints: bool = True
    """Whether every checkpoint is a root, whether a partition stands at it or not."""
    waiting: Callable[[], None] = lambda: None
    """Called where the gate has to be waited for."""

    def survey(self) -> Survey:
        """Say what would go; nothing is touched."""
        return self._survey(remove=False)

    def clean(self) -> Survey:
        """Remove it, and say what it was."""
        return self._survey(remove=True)

    def _survey(self, *, remove: bool) -> Survey:
        leases = Leases(self.root)
        _read_manifests(Lineage(self.root))  # before anybody has to wait
        with leases.alone(self.waiting):
            found = self._found(leases)
            trash = self.root / TRASH / uuid.uuid4().hex
            if remove:
                self._put_away(found.going, trash)
        if not remove:
            return found
        for item in found.going:
            if item.kind == "trash":
                shutil.rmtree(item.path)
        shutil.rmtree(trash, ignore_errors=True)
        return Survey(found.roots, found.kept, found.items, removed=True)

    def _put_away(self, items: tuple[Item, ...], trash: Path) -> None:
        """Rename `items` into `trash`: from then on they are nowhere, however the process ends."""
        trash.mkdir(parents=True)
        for number, item in enumerate(items):
            if item.kind in ("lock", "lease", "temporary file"):
                item.path.unlink(missing_ok=True)
            elif item.kind != "trash":
                item.path.rename(trash / str(number))

    def _found(self, leases: Leases) -> Survey:
        lineage = Lineage(self.root)
        live = leases.live() | {address for path, address in self._locks() if not is_free(path)}
        roots = self._roots(lineage, live)
        kept = self._reached(lineage, roots)
        published = lineage.addresses()
        there = kept & set(published)
        items = [*self._artifacts(lineage, published, kept), *self._left(live), *self._small(leases, live, there)]
        return Survey({address: tuple(why) for address, why in sorted(roots.items())}, len(there), tuple(items))

    def _roots(self, lineage: Lineage, live: set[Address]) -> dict[Address, list[str]]:
        roots: dict[Address, list[str]] = {}
        for (_, partition), address in lineage.pointers.items():
            roots.setdefault(address, []).append(f"partition {partition}" if partition else "current")
        for address, pin in pinned(self.root).items():
            roots.setdefault(address, []).append(f"pinned{f': {pin.name}' if pin.name else ''}")
        for address in lineage.addresses():
            if address.fingerprint in self.promoted:
                roots.setdefault(address, []).append(self.promoted[address.fingerprint])
            if self.checkpoints and address.asset in CHECKPOINTS:
                roots.setdefault(address, []).append("a checkpoint")
            if self.older_than and _days(lineage.directory(address) / MANIFEST_NAME) < self.older_than:
                roots.setdefault(address, []).append(f"younger than {self.older_than:g} days")
        for address in live:
            roots.setdefault(address, []).append("in use")
        return roots

    def _reached(self, lineage: Lineage, roots: Mapping[Address, list[str]]) -> set[Address]:
        """Return what `roots` reach.

        Raises:
            GristmillError: a manifest on the way is damaged, so what lies behind it is not known.
        """
        try:
            return lineage.reached(roots)
        except GristmillError as error:
            raise GristmillError(f"nothing can be removed before this is mended: {error}") from error

    def _artifacts(self, lineage: Lineage, published: list[Address], kept: set[Address]) -> Iterator[Item]:
        for address in published:
            if address not in kept:
                yield _item("artifact", lineage.directory(address), _label(lineage, address))

    def _left(self, live: set[Address]) -> Iterator[Item]:
        """Yield what builds left that are not under way."""
        for path in sorted(self.root.glob("artifacts/*/*")):
            if not (path / MANIFEST_NAME).exists():
                used = Address(path.parent.name, path.name) in live
                yield _item("half-removed artifact", path, f"{path.parent.name}-{path.name}", kept="in use" if used else "")
        for path in sorted(self.root.glob("staging/*")):
            kind: Kind = "resume point" if (path / RESUME).is_dir() else "staging"
            yield _item(kind, path, path.name, kept="in use" if _address(path) in live else self._young(kind, path))
        for path in sorted(self.root.glob("rejected/*")):
            yield _item("rejected", path, path.name, kept="in use" if _address(path) in live else self._young("rejected", path))
        for path in sorted(self.root.glob(f"{TRASH}/*")):
            yield _item("trash", path, path.name)

    def _small(self, leases: Leases, live: set[Address], kept: set[Address]) -> Iterator[Item]:
        """Yield small files: locks of what is neither there nor built now, leases of processes that are gone, pointers half written.

        A lock is opened under a lease that names its artifact; so with the gate held, one without such a lease is nobody's.
        """
        for path, address in self._locks():
            if address not in live | kept:
                yield _item("lock", path, path.name)
        for path in leases.stale():
            yield _item("lease", path, path.name)
        for folder in ("current/*", "refused/*", "pins"):
            for path in sorted(self.root.glob(f"{folder}/*.tmp")):
                yield _item("temporary file", path, path.relative_to(self.root).as_posix())
        for path in sorted(self.root.glob(f"{CHILD_MESSAGES}/*")):
            if not psutil.pid_exists(int(path.suffix.removeprefix("."))):
                yield _item("messages", path, path.name)

    def _locks(self) -> list[tuple[Path, Address]]:
        """Return the locks of artifacts; others, such as the gate, are no concern of this."""
        found = ((path, _address(path)) for path in sorted(self.root.glob("locks/*")))
        return [(path, address) for path, address in found if address]

    def _young(self, kind: Kind, path: Path) -> str:
        wanted = self.older_than if self.older_than is not None else DAYS_KEPT if kind in WORTH_A_WHILE else 0.0
        return f"younger than {wanted:g} days" if _days(path) < wanted else ""


def _address(path: Path) -> Address | None:
    """Return the artifact that a lock or a folder is named after."""
    found = _NAMED.fullmatch(path.name)
    return Address(found["asset"], found["fingerprint"]) if found else None


def _item(kind: Kind, path: Path, name: str, *, kept: str = "") -> Item:
    found = _statuses(path)
    sizes = {(one.st_dev, one.st_ino): one.st_size for one in found if not stat.S_ISDIR(one.st_mode)}
    return Item(kind, name, path, sum(sizes.values()), _days(path), kept)


def _days(path: Path) -> float:
    """Return the days since something of `path` was last written; 0 where it is not there any more."""
    now = time.time()
    return max(0.0, (now - max((one.st_mtime for one in _statuses(path)), default=now)) / SECONDS_PER_DAY)


def _statuses(path: Path) -> list[os.stat_result]:
    """Return what is known of `path` and all below it; a build may take files away meanwhile, which is no matter."""
    inside = [os.path.join(folder, name) for folder, folders, files in os.walk(path) for name in (*folders, *files)]  # noqa: PTH118
    found = []
    for one in (path, *inside):
        with contextlib.suppress(FileNotFoundError):
            found.append(os.lstat(one))
    return found


def _read_manifests(lineage: Lineage) -> None:
    for address in lineage.addresses():
        with contextlib.suppress(GristmillError):  # told where it matters
            lineage.node(address)


def _label(lineage: Lineage, address: Address) -> str:
    try:
        return f"{lineage.label(address)} {address.fingerprint[:12]}"
    except GristmillError:  # a manifest that is damaged, and that nothing reaches
        return address.name
