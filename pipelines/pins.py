"""Pins: artifacts that housekeeping keeps because a person said so.

<root>/pins/<asset>-<fingerprint>.json      what is pinned, for which partition, why and when
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pipelines.errors import GristmillError
from pipelines.leases import Address


@dataclass(frozen=True)
class Pin:
    """One pinned artifact."""

    address: Address
    label: str
    """What the artifact was called when it was pinned."""
    name: str
    """Why."""
    when: str
    """ISO 8601, UTC."""


def pinned(root: Path) -> dict[Address, Pin]:
    """Return the pins of the store at `root`.

    Raises:
        GristmillError: one of them is damaged: what it keeps is not known.
    """
    return {pin.address: pin for pin in map(_read, sorted((root / "pins").glob("*.json")))}


def pin(root: Path, address: Address, *, label: str, name: str) -> Pin:
    """Pin an artifact, or give a pinned one another name; its partition may move on."""
    made = Pin(address, label, name, datetime.now(UTC).isoformat(timespec="seconds"))
    path = _path(root, address)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(f".{os.getpid()}.tmp")
    beside.write_text(json.dumps({**address._asdict(), "label": label, "name": name, "when": made.when}), encoding="utf-8")
    beside.rename(path)
    return made


def unpin(root: Path, address: Address) -> None:
    """Take a pin away.

    Raises:
        GristmillError: there is none.
    """
    try:
        _path(root, address).unlink()
    except FileNotFoundError:
        known = ", ".join(f"{pin.label} ({pin.address.fingerprint[:12]})" for pin in pinned(root).values()) or "nothing"
        raise GristmillError(f"{address.asset} {address.fingerprint} is not pinned; pinned: {known}") from None


def _path(root: Path, address: Address) -> Path:
    return root / "pins" / f"{address.name}.json"


def _read(path: Path) -> Pin:
    try:
        found = json.loads(path.read_bytes())
        return Pin(Address(found["asset"], found["fingerprint"]), found["label"], found["name"], found["when"])
    except (ValueError, KeyError, TypeError) as error:
        raise GristmillError(f"{path} is damaged ({error!r}); pin the artifact again, or remove the file") from error
