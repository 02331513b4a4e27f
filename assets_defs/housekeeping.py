"""`gristmill verify`, `gc` and `pin`: which artifacts are meant, and what is printed of them."""

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from assets_defs.resources import Mill
from pipelines.errors import GristmillError, UnknownName
from pipelines.housekeeping import Item, Keeper, Survey
from pipelines.leases import Address
from pipelines.pins import Pin, pin, pinned, unpin
from pipelines.progress import Progress, short
from pipelines.verification import Fault, Verified, verify

MAX_NAMED = 8
"""Things of one kind that are named on the terminal; JSON has them all."""


def named(mill: Mill, name: str, partition: str | None = None) -> list[Address]:
    """Return the artifacts that a name stands for: all that its partitions stand at where it is an asset with partitions.

    Raises:
        UnknownName: it stands for none.
        GristmillError: it begins several fingerprints, or its partition does not stand at an artifact.
    """
    lineage = mill.lineage
    if partition is None and name in lineage.assets and (keys := [key for key in lineage.partitions(name) if key]):
        return list(dict.fromkeys(lineage.resolve(name, key) for key in keys))  # type: ignore[arg-type]
    found = lineage.resolve(name, partition)
    if found is None:
        raise UnknownName("artifact", name, lineage.assets)
    return [found]


def one(mill: Mill, name: str, partition: str | None = None) -> Address:
    """Return the one artifact that a name stands for.

    Raises:
        GristmillError: it stands for none, or for several.
    """
    found = mill.lineage.resolve(name, partition)
    if found is None:
        raise UnknownName("artifact", name, mill.lineage.assets)
    return found


def verify_artifacts(mill: Mill, addresses: Sequence[Address], *, ancestors: bool) -> Verified:
    """Re-hash artifacts, and all that they were made from where asked."""
    lineage = mill.lineage
    found = list(addresses)
    if ancestors:
        found = sorted(lineage.reached(found), key=lambda address: (address not in addresses, address))
    os.environ.setdefault("GRISTMILL_PROGRESS", "1")
    progress: list[Progress] = []

    def told(done: int, total: int) -> None:
        progress[:] = progress or [Progress("verifying", total, "bytes")]
        progress[0].update(done)

    # What is not here is a fault of its readers, or in object storage, where its bytes are checked whenever they are fetched.
    there = [lineage.directory(address) for address in found if address in addresses or lineage.directory(address).exists()]
    remote = mill.store.remote
    elsewhere = (lambda asset, fingerprint: remote.find(asset, fingerprint) is not None) if remote else (lambda asset, fingerprint: False)
    return verify(there, progress=told, elsewhere=elsewhere)


def everything(mill: Mill) -> tuple[list[Address], list[Fault]]:
    """Return every artifact of the store, and a fault for each partition that stands at none."""
    lineage = mill.lineage
    published = lineage.addresses()
    there = set(published)
    faults = [
        Fault(f"{asset}[{key}]" if key else asset, address.fingerprint, None, f"stands at {address.fingerprint}, which is gone")
        for (asset, key), address in lineage.pointers.items()
        if address not in there
    ]
    return published, faults


def show_verified(found: Verified, console: Console) -> None:
    """Print every fault, and one line of what was looked at."""
    for fault in found.faults:
        console.print(str(fault), markup=False, highlight=False, soft_wrap=True)
    unsealed = (
        f"; {found.unsealed} manifests have no seal: of their own bytes only what enters the fingerprint is checked"
        if found.unsealed
        else ""
    )
    words = f"{found.artifacts} artifacts, {found.files:,} files, {short(found.bytes)}B, {len(found.faults)} faults{unsealed}"
    console.print(words, markup=False, highlight=False, soft_wrap=True)


def keep_house(mill: Mill, *, delete: bool, older_than: float | None, checkpoints: bool) -> Survey:
    """Say what nothing in the store needs, or remove it."""
    keeper = Keeper(mill.store.root, mill.tracker.promoted(), older_than, checkpoints, waiting=_say_that_it_waits)
    return keeper.clean() if delete else keeper.survey()


def _say_that_it_waits() -> None:
    sys.stderr.write("waiting for a process that is looking up artifacts\n")


def show_survey(found: Survey, console: Console) -> None:
    """Print what goes, what stays although nothing reaches it, what is pinned, and the bytes."""
    rows = Table(box=None, pad_edge=False, padding=(0, 2))
    for column in ("", "number", "bytes", "which"):
        rows.add_column(column, justify="right" if column in ("number", "bytes") else "left", overflow="fold")
    for kind in dict.fromkeys(item.kind for item in found.going):
        rows.add_row(kind, *_summed([item for item in found.going if item.kind == kind]))
    staying = [item for item in found.items if item.kept]
    for why in dict.fromkeys(f"{item.kind}, {item.kept}" for item in staying):
        rows.add_row(f"stays: {why}", *_summed([item for item in staying if f"{item.kind}, {item.kept}" == why]), style="dim")
    if rows.row_count:
        console.print(rows)
    for address, reasons in found.roots.items():
        for reason in (one for one in reasons if one.startswith(("pinned", "version", "in use"))):
            console.print(f"keeps {address.asset} {address.fingerprint[:12]}: {reason}", markup=False)
    verb = "removed" if found.removed else "would be removed; --delete removes them"
    console.print(f"{found.kept:,} artifacts are needed; {len(found.going):,} things with {short(found.bytes)}B {verb}", markup=False)


def _summed(items: Sequence[Item]) -> tuple[str, str, str]:
    names = ", ".join(item.name for item in items[:MAX_NAMED])
    more = f" and {len(items) - MAX_NAMED} more" if len(items) > MAX_NAMED else ""
    return str(len(items)), f"{short(sum(item.bytes for item in items))}B", f"{names}{more}".replace("[", r"\[")


def survey_json(found: Survey) -> dict[str, Any]:
    """Return a survey as one JSON object."""
    return {
        "removed": found.removed,
        "bytes": found.bytes,
        "artifacts_kept": found.kept,
        "items": [{**asdict(item), "path": str(item.path)} for item in found.items],
        "roots": [{**address._asdict(), "why": list(why)} for address, why in found.roots.items()],
    }


def pin_artifact(mill: Mill, name: str, why: str, *, remove: bool) -> str:
    """Pin what a name stands for, or take its pin away; return a line that says so."""
    root = mill.store.root
    with mill.store.leases.looking():  # so that it is not removed meanwhile
        address = _pinned_as(mill, name) if remove else one(mill, name)
        if remove:
            unpin(root, address)
            return f"{address.asset} {address.fingerprint} is not pinned any more"
        made = pin(root, address, label=mill.lineage.label(address), name=why)
    return f"{made.label} {address.fingerprint} is pinned: housekeeping keeps it and all that it was made from"


def _pinned_as(mill: Mill, name: str) -> Address:
    """Return the pinned artifact that `name` is the fingerprint, the label or the reason of; else what it stands for now."""
    pins = pinned(mill.store.root)
    found = [
        address
        for address, one in pins.items()
        if name in (one.label, one.name) or (len(name) >= 6 and address.fingerprint.startswith(name))
    ]
    if len(found) == 1:
        return found[0]
    if found:
        shown = ", ".join(f"{pins[address].label} {address.fingerprint}" for address in found)
        raise GristmillError(f"{name!r} is what several pins are called: {shown}; give the fingerprint")
    address = mill.lineage.resolve(name)
    if address is None:
        raise UnknownName("pin", name, [one.label for one in pins.values()])
    return address


def pins(mill: Mill) -> list[Pin]:
    """Return all pins, the oldest first."""
    return sorted(pinned(mill.store.root).values(), key=lambda one: one.when)
