"""Lineage: the graph of a store's artifacts, from the inputs that their manifests list.

Artifacts that several partitions share are one node; a node knows which partitions stand at it. Manifests never change, so a
process reads each of them once. Of an artifact that lies in object storage alone, the manifest is read there; its files are not fetched.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from urllib.parse import unquote

from pipelines.errors import GristmillError, MissingArtifact, UnknownName
from pipelines.leases import Address
from pipelines.manifests import MANIFEST_NAME, Json
from pipelines.remote_store import RemoteStore

CHECKPOINTS = ("general_checkpoint", "pretrained_checkpoint")
"""The assets that are models."""
MIN_PREFIX = 6
"""Hexadecimal digits from which on a name is taken for the beginning of a fingerprint."""
_LABELLED = re.compile(r"(?P<asset>[^\[\]/]+)\[(?P<partition>.+)\]")
_ASSET = re.compile(r"\w+(\.\w+)*")
_HEX = re.compile(rf"[0-9a-f]{{{MIN_PREFIX},32}}")


@dataclass(frozen=True)
class Read:
    """An input as an artifact read it."""

    role: str
    """The name that the step gives it."""
    address: Address
    partition: str | None
    member: str | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class Node:
    """What the graph knows of an artifact: its manifest but for what was found in it."""

    address: Address
    partition: str | None
    """For which it was made first."""
    code_version: str
    started: str
    seconds: float
    bytes: int
    inputs: tuple[Read, ...]
    files: tuple[tuple[str, str], ...]
    """Path and SHA-256."""

    @property
    def label(self) -> str:
        """``asset[partition]`` or ``asset``."""
        return f"{self.address.asset}[{self.partition}]" if self.partition else self.address.asset


@dataclass(frozen=True)
class Ancestor:
    """A node of an ancestry, or a gap in it."""

    address: Address
    depth: int
    """Steps from the artifact that was asked about, the fewest."""
    role: str
    """What its nearest reader calls it."""
    reader: Address | None
    """That reader; None of the artifact that was asked about."""
    node: Node | None
    """None where the artifact is gone."""


class Lineage:
    """The artifacts of the store at `root`, and of the object storage behind it, and what they were made from."""

    def __init__(self, root: Path, remote: RemoteStore | None = None) -> None:
        self.root = Path(root).absolute()
        self.remote = remote

    def directory(self, address: Address) -> Path:
        """Return where the artifact lies."""
        return self.root / "artifacts" / address.asset / address.fingerprint

    def node(self, address: Address) -> Node | None:
        """Return the artifact, or None where it is not there.

        Raises:
            GristmillError: its manifest is damaged.
        """
        found = _node(self.directory(address))
        return _remote_node(self.remote, address) if found is None and self.remote else found

    def is_here(self, address: Address) -> bool:
        """Return whether the files of the artifact lie in this store, and not in object storage alone."""
        return (self.directory(address) / MANIFEST_NAME).is_file()

    def addresses(self) -> list[Address]:
        """Return the artifacts that are published here, sorted."""
        return sorted(Address(path.parent.parent.name, path.parent.name) for path in self.root.glob(f"artifacts/*/*/{MANIFEST_NAME}"))

    @cached_property
    def pointers(self) -> dict[tuple[str, str | None], Address]:
        """Which artifact each partition of each asset stands at, read once.

        Raises:
            GristmillError: a pointer is damaged.
        """
        return dict(_pointer(path) for path in sorted(self.root.glob("current/*/*.json")))

    @cached_property
    def standing(self) -> dict[Address, list[str | None]]:
        """The partitions that stand at each artifact."""
        found: dict[Address, list[str | None]] = {}
        for (_, partition), address in self.pointers.items():
            found.setdefault(address, []).append(partition)
        return found

    def label(self, address: Address) -> str:
        """Return what the artifact is called: by the partition that it was made for, with the number of others that stand at it."""
        node = self.node(address)
        if node is None:
            return f"{address.asset} {address.fingerprint[:12]}"
        others = len([partition for partition in self.standing.get(address, ()) if partition != node.partition])
        return f"{node.label}{f' and {others} more' if others else ''}"

    def ancestors(self, address: Address) -> list[Ancestor]:
        """Return the artifact and all that it was made from, each once, the nearest first."""
        found: dict[Address, Ancestor] = {address: Ancestor(address, 0, "", None, self.node(address))}
        pending = deque(found.values())
        while pending:
            one = pending.popleft()
            for read in one.node.inputs if one.node else ():
                if read.address not in found:
                    found[read.address] = Ancestor(read.address, one.depth + 1, read.role, one.address, self.node(read.address))
                    pending.append(found[read.address])
        return list(found.values())

    def reached(self, roots: Iterable[Address]) -> set[Address]:
        """Return `roots` and all that they were made from, there or not."""
        pending, found = list(roots), set()
        while pending:
            address = pending.pop()
            if address not in found:
                found.add(address)
                node = self.node(address)
                pending += [read.address for read in node.inputs] if node else []
        return found

    def descendants(self, address: Address) -> list[Node]:
        """Return all that was made from the artifact, each once, the nearest first; a reader of one file counts for each artifact that
        holds this file with these bytes, since any of them would have been the same to it."""
        found: dict[Address, Node] = {}
        pending = deque([address])
        while pending:
            for reader in self.readers(pending.popleft()):
                if reader.address not in found and reader.address != address:
                    found[reader.address] = reader
                    pending.append(reader.address)
        return list(found.values())

    def readers(self, address: Address) -> list[Node]:
        """Return what read the artifact, or a file with the bytes of one of its files."""
        node = self.node(address)
        keys: list[tuple] = [tuple(address), *((address.asset, *file) for file in (node.files if node else ()))]
        return list({reader.address: reader for key in keys for reader in self._readers.get(key, ())}.values())

    @cached_property
    def _readers(self) -> dict[tuple, list[Node]]:
        """Readers by address, and those of one file by asset, file and hash."""
        found: dict[tuple, list[Node]] = {}
        for node in filter(None, map(self.node, self.addresses())):
            for read in node.inputs:
                found.setdefault(tuple(read.address), []).append(node)
                if read.member:
                    found.setdefault((read.address.asset, read.member, read.sha256), []).append(node)
        return found

    def resolve(self, name: str, partition: str | None = None) -> Address | None:
        """Return the artifact that `name` stands for, or None where it has the form of none.

        Args:
            name: ``ASSET[PARTITION]``, an asset (with `partition`, or one that has none), a fingerprint or the beginning of one, or
                a directory of this store.

        Raises:
            GristmillError: it has the form of one, and is none or several.
        """
        if partition is None and (found := _LABELLED.fullmatch(name)):
            return self._standing_at(found["asset"], found["partition"])
        if name in self.assets or partition is not None:
            return self._standing_at(name, partition)
        if "/" in name or name == ".":
            return self._in_directory(Path(name))
        return self._beginning(name) if _HEX.fullmatch(name) else None

    @cached_property
    def assets(self) -> list[str]:
        """The assets of which there are artifacts."""
        return sorted({path.name for folder in ("artifacts", "current") for path in self.root.glob(f"{folder}/*") if path.is_dir()})

    def partitions(self, asset: str) -> list[str | None]:
        """Return the partitions of `asset` that stand at an artifact; None stands for an asset without partitions."""
        return sorted((key for name, key in self.pointers if name == asset), key=lambda key: key or "")

    def _standing_at(self, asset: str, partition: str | None) -> Address:
        address = self._pointed_at(asset, partition) if _ASSET.fullmatch(asset) else None
        if address is None and asset not in self.assets:
            raise UnknownName("asset", asset, self.assets)
        known = self.partitions(asset)
        if address is None and partition is None and known:
            shown = ", ".join(f"{asset}[{key}]" for key in known[:3])
            raise GristmillError(f"{asset} has {len(known)} partitions; name one: {shown}{', ...' if len(known) > 3 else ''}")
        label = f"{asset}[{partition}]" if partition else asset
        if address is None:
            raise MissingArtifact(f"{label} has not been materialized; materialize it first (`gristmill run`, or in the UI)")
        if self.node(address) is None:
            raise MissingArtifact(f"{label}: its artifact is gone from {self.root}; materialize it again")
        return address

    def _pointed_at(self, asset: str, partition: str | None) -> Address | None:
        fingerprint = self.remote.current(asset, partition) if self.remote else None
        return Address(asset, fingerprint) if fingerprint else self.pointers.get((asset, partition))

    def _in_directory(self, path: Path) -> Address | None:
        inside = path.resolve()
        home = (self.root / "artifacts").resolve()
        if not inside.is_dir():
            return None
        if inside.parent.parent != home or not (inside / MANIFEST_NAME).is_file():
            raise GristmillError(f"{path} is no artifact of {self.root}; its artifacts are artifacts/ASSET/FINGERPRINT")
        return Address(inside.parent.name, inside.name)

    def _beginning(self, prefix: str) -> Address | None:
        found = [address for address in self.addresses() if address.fingerprint.startswith(prefix)]
        if len(found) > 1:
            raise GristmillError(f"{prefix!r} begins {len(found)} fingerprints: {', '.join(map(self.label, found[:5]))}; give more of it")
        return found[0] if found else None


def by_asset(ancestors: Iterable[Ancestor]) -> list[dict[str, Json]]:
    """Return a row for each asset of an ancestry, the nearest first: how many artifacts, which, by which code, when, and for whom."""
    groups: dict[str, list[Ancestor]] = {}
    for one in ancestors:
        groups.setdefault(one.address.asset, []).append(one)
    return [_summed(asset, found) for asset, found in groups.items()]


def _summed(asset: str, found: list[Ancestor]) -> dict[str, Json]:
    nodes = [one.node for one in found if one.node]
    digest = hashlib.sha256("".join(sorted(one.address.fingerprint for one in found)).encode()).hexdigest()[:12]
    return {
        "asset": asset,
        "artifacts": len(found),
        "fingerprint": found[0].address.fingerprint if len(found) == 1 else f"{digest} over {len(found)}",
        "code_version": ", ".join(sorted({node.code_version for node in nodes})),
        "first_computed": min((node.started for node in nodes), default=""),
        "seconds": round(sum(node.seconds for node in nodes), 1),
        "read_by": ", ".join(dict.fromkeys(one.reader.asset for one in found if one.reader)),
        "not_here": len(found) - len(nodes),
    }


def _pointer(path: Path) -> tuple[tuple[str, str | None], Address]:
    asset, name = path.parent.name, unquote(path.stem)
    try:
        fingerprint = str(json.loads(path.read_bytes())["fingerprint"])
    except (ValueError, KeyError, TypeError) as error:
        raise GristmillError(f"{path} is damaged ({error}); materialize {asset} again, which mends it, or remove the file") from error
    return (asset, None if path.stem == "_" else name), Address(asset, fingerprint)


def _node(directory: Path) -> Node | None:
    path = directory / MANIFEST_NAME
    try:
        return _read(directory, path.stat().st_mtime_ns)
    except FileNotFoundError:
        return None


@lru_cache(maxsize=200_000)
def _remote_node(remote: RemoteStore, address: Address) -> Node | None:
    found = remote.find(*address)
    return _as_node(address, found.model_dump(mode="json")) if found else None


@lru_cache(maxsize=200_000)
def _read(directory: Path, modified: int) -> Node:
    """Read a manifest as far as the graph needs it: three times as fast as all of it."""
    path = directory / MANIFEST_NAME
    try:
        return _as_node(Address(directory.parent.name, directory.name), json.loads(path.read_bytes()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise GristmillError(f"{path} is not a manifest ({error!r}); remove {directory} and materialize again") from error


def _as_node(address: Address, found: dict) -> Node:
    return Node(
        address=address,
        partition=found["partition"],
        code_version=found["code_version"],
        started=str(found["provenance"].get("started", "")),
        seconds=float(found["provenance"].get("seconds") or 0.0),
        bytes=sum(entry["bytes"] for entry in found["files"]),
        inputs=tuple(_reads(found["inputs"])),
        files=tuple((entry["path"], entry["sha256"]) for entry in found["files"]),
    )


def _reads(inputs: dict[str, list[dict]]) -> Iterator[Read]:
    for role, references in inputs.items():
        for one in references:
            yield Read(role, Address(one["asset"], one["fingerprint"]), one["partition"], one["member"], one["sha256"])
