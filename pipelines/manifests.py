"""The manifest: what an artifact is made of, from what, by which code, and what was found on the way.

A directory without its manifest does not exist. The fingerprint is a hash of asset name, settings, code version and
inputs; it is the directory's name and the Dagster data version. What is not identity (time, host, duration) stands
under `provenance` and never enters the fingerprint.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr

from pipelines.errors import GristmillError

MANIFEST_NAME = "manifest.json"

Json = None | bool | int | float | str | list | dict


class Frozen(BaseModel):
    """Base of the records in a manifest: never changed, and an unknown key is an error."""

    # NaN is written as NaN: as null, a measured value that is not a number would make the manifest unreadable.
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, ser_json_inf_nan="constants")


class FileEntry(Frozen):
    """A file of the artifact."""

    path: str
    """Relative to the artifact's directory, with forward slashes."""
    bytes: int
    sha256: str


class InputReference(Frozen):
    """An artifact that was read, or one file of it."""

    asset: str
    partition: str | None
    fingerprint: str
    member: str | None = None
    """Set when one file was read: then the identity is that file's `sha256`, not the artifact's fingerprint."""
    sha256: str | None = None

    @property
    def identity(self) -> str:
        """What enters the fingerprint of the artifact that reads this input."""
        return f"{self.asset}:{self.member}:{self.sha256}" if self.member else f"{self.asset}:{self.fingerprint}"


class Check(Frozen):
    """The result of an audit; a failed blocking check keeps the artifact from being published."""

    name: str
    passed: bool
    description: str = ""
    blocking: bool = True
    metadata: dict[str, int | float | str] = Field(default_factory=dict)


class Outcome(Frozen):
    """What a step found while it wrote its files."""

    counts: dict[str, int] = Field(default_factory=dict)
    """Whole numbers: `documents_in`, `kept`, `dropped`, `quarantined`, `tokens`, ..."""
    metrics: dict[str, float] = Field(default_factory=dict)
    """Measured values with their unit in the name."""
    tables: dict[str, list[dict[str, Json]]] = Field(default_factory=dict)
    """Small tables to be read by people: a list of rows each."""
    plots: tuple[str, ...] = ()
    """PNG files written beside the data, relative to the artifact's directory."""
    details: dict[str, Json] = Field(default_factory=dict)
    """Anything else a later step needs to know without opening the files."""


class Manifest(Frozen):
    """The record of one published artifact."""

    format: Literal[1] = 1
    asset: str
    partition: str | None
    fingerprint: str
    code_version: str
    settings: dict[str, Json]
    inputs: dict[str, tuple[InputReference, ...]]
    files: tuple[FileEntry, ...] = ()
    outcome: Outcome = Outcome()
    checks: tuple[Check, ...] = ()
    provenance: dict[str, Json] = Field(default_factory=dict)
    seal: str = ""
    """SHA-256 of the manifest's own bytes, taken with this value empty; `sealed` fills it in, and it stands last. Empty until published."""
    _directory: Path | None = PrivateAttr(default=None)

    @property
    def directory(self) -> Path:
        """Where the files lie."""
        if self._directory is None:
            raise GristmillError(f"manifest of {self.label} was not read from a directory")
        return self._directory

    @property
    def is_stored(self) -> bool:
        """Whether the artifact is there, and not only planned."""
        return self._directory is not None

    @property
    def label(self) -> str:
        """``asset[partition]`` or ``asset``."""
        return f"{self.asset}[{self.partition}]" if self.partition else self.asset

    @property
    def counts(self) -> Mapping[str, int]:
        return self.outcome.counts

    @property
    def bytes(self) -> int:
        return sum(entry.bytes for entry in self.files)

    @property
    def content_sha256(self) -> str:
        """One hash over all files: equal for byte-identical artifacts."""
        lines = "".join(f"{entry.sha256}  {entry.path}\n" for entry in self.files)
        return hashlib.sha256(lines.encode()).hexdigest()

    def file(self, name: str) -> Path:
        """Return the path of file `name`.

        Raises:
            GristmillError: the artifact has no such file.
        """
        if name not in {entry.path for entry in self.files}:
            raise GristmillError(f"{self.label} has no file {name!r}; it has: {', '.join(e.path for e in self.files)}")
        return self.directory / name

    def reference(self, member: str | None = None) -> InputReference:
        """Return a reference to this artifact, or to file `member` of it."""
        sha256 = None
        if member:
            self.file(member)
            sha256 = next(entry.sha256 for entry in self.files if entry.path == member)
        return InputReference(asset=self.asset, partition=self.partition, fingerprint=self.fingerprint, member=member, sha256=sha256)

    def at(self, directory: Path) -> Manifest:
        """Return a copy that knows it lies in `directory`."""
        copy = self.model_copy()
        copy._directory = directory
        return copy

    def for_partition(self, partition: str | None) -> Manifest:
        """Return a copy that answers for `partition`: recipes that ask for the same thing share one artifact."""
        copy = self.model_copy(update={"partition": partition})
        copy._directory = self._directory
        return copy


class Member(Frozen):
    """One file of an artifact as an input: only that file's bytes enter the reader's identity."""

    manifest: Manifest
    name: str

    @property
    def path(self) -> Path:
        return self.manifest.file(self.name)

    def reference(self) -> InputReference:
        return self.manifest.reference(self.name)


def fingerprint(asset: str, code_version: str, settings: Mapping[str, Json], inputs: Mapping[str, tuple[InputReference, ...]]) -> str:
    """Return the 32-digit hexadecimal fingerprint (SHA-256, truncated) of what an artifact is made from."""
    identity = {
        "asset": asset,
        "code_version": code_version,
        "settings": settings,
        "inputs": {name: [reference.identity for reference in references] for name, references in inputs.items()},
    }
    return _hash(identity)[:32]


def settings_fingerprint(settings: Mapping[str, Json]) -> str:
    """Return 12 hexadecimal digits (SHA-256, truncated) of `settings`, whatever the order of their keys."""
    return _hash(settings)[:12]


def _hash(values: object) -> str:
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def read_manifest(directory: Path) -> Manifest:
    """Read the manifest in `directory`.

    Raises:
        GristmillError: the manifest cannot be read as one.
    """
    path = directory / MANIFEST_NAME
    try:
        return Manifest.model_validate_json(path.read_bytes()).at(directory)
    except ValueError as error:
        raise GristmillError(f"{path} is not a manifest ({error}); remove {directory} and materialize again") from error


_OPEN = '\n "seal": ""\n}'
_SEALED = re.compile(rb'\n "seal": "([0-9a-f]{64})"\n\}\Z')


def sealed(manifest: Manifest) -> tuple[Manifest, bytes]:
    """Return `manifest` with its seal, and the bytes that are written of it."""
    written = manifest.model_copy(update={"seal": ""}).model_dump_json(indent=1)
    seal = hashlib.sha256(written.encode()).hexdigest()
    content = written.removesuffix(_OPEN) + _OPEN.replace('""', json.dumps(seal))
    return manifest.model_copy(update={"seal": seal}).at(manifest.directory), content.encode()


def seal_holds(content: bytes) -> bool:
    """Return whether the bytes of a manifest are those that were sealed: every one of them counts."""
    found = _SEALED.search(content)
    return found is not None and hashlib.sha256(content[: found.start()] + _OPEN.encode()).hexdigest() == found[1].decode()


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of the bytes of `path`."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
