"""The store: artifacts addressed by content, written beside, audited, then published by rename.

    <root>/artifacts/<asset>/<fingerprint>/     files and manifest.json; never changed once there
    <root>/current/<asset>/<partition>.json     which fingerprint a partition stands at
    <root>/staging/<asset>-<fingerprint>/       being written, or left by a killed process
    <root>/rejected/<asset>-<fingerprint>/      the last attempt that failed its audit
    <root>/locks/                               one writer per artifact

Asking again for what is published is a hit and costs one small read.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import resource
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from urllib.parse import quote, unquote

from pipelines.code_version import code_version, installed_version
from pipelines.errors import GristmillError, MissingArtifact, OutOfSpace
from pipelines.files import is_out_of_space, locked, sync
from pipelines.manifests import (
    MANIFEST_NAME,
    Check,
    FileEntry,
    InputReference,
    Json,
    Manifest,
    Outcome,
    fingerprint,
    read_manifest,
    sha256_file,
)
from pipelines.plugins import Settings

Input = "Manifest | Member | Build"
"""A published artifact, one file of it, or a request that is built first."""
Step = Callable[..., Outcome]
Audit = Callable[[Manifest], Check]

RESUME = "resume"
"""Where a resumable step puts what it goes on from; the rest of what it wrote it can do without."""


class AuditFailed(GristmillError):
    """A blocking audit failed; nothing was published."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        failed = [f"{c.name}: {c.description}" for c in manifest.checks if c.blocking and not c.passed]
        super().__init__(f"{manifest.label} failed its audit and was not published: {'; '.join(failed)}")

    def __reduce__(self) -> tuple[type, tuple[Manifest]]:
        return (type(self), (self.manifest,))


@dataclass(frozen=True)
class Build:
    """A request for one artifact: a step, its settings and its inputs. Picklable, so that a pool can run it."""

    asset: str
    step: Step
    settings: Settings
    partition: str | None = None
    inputs: Mapping[str, Input | tuple[Input, ...]] = field(default_factory=dict)
    audits: tuple[Audit, ...] = ()
    plugins: tuple[str, ...] = ()
    """Modules of the plugins that `settings` names: part of the code version."""
    packages: tuple[str, ...] = ()
    """Packages whose version is part of the identity."""
    resumable: bool = False
    """The step continues from what a killed attempt left in its directory; after a full disk, from its folder `resume` alone."""
    overrides: Mapping[str, Json] = field(default_factory=dict)
    """What of `settings` a run overrode, by dotted key: recorded in the artifact that it makes; no part of the identity but through
    `settings`."""

    @property
    def label(self) -> str:
        return f"{self.asset}[{self.partition}]" if self.partition else self.asset

    def references(self) -> dict[str, tuple[InputReference, ...]]:
        """Return the inputs by reference."""
        return {name: tuple(i.reference() for i in _many(value)) for name, value in self.inputs.items()}

    def reference(self) -> InputReference:
        """Return the reference to what this request asks for, without building it."""
        return InputReference(asset=self.asset, partition=self.partition, fingerprint=self.fingerprint())

    def code_version(self) -> str:
        return code_version((self.step.__module__, *self.plugins), self.packages)

    def fingerprint(self) -> str:
        """Return the address of the artifact this request asks for."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        """Computed once: where each of a chain of requests names all before it, the work would double with every link."""
        return fingerprint(self.asset, self.code_version(), self.settings.model_dump(mode="json"), self.references())


@dataclass(frozen=True)
class Built:
    """An artifact, and whether it was there already."""

    manifest: Manifest
    hit: bool
    seconds: float


class Store:
    """Artifacts under one root directory on a local or mounted file system."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root).absolute()

    def directory(self, asset: str, address: str) -> Path:
        """Return where the artifact with fingerprint `address` lies or would lie."""
        return self.root / "artifacts" / asset / address

    def find(self, asset: str, address: str) -> Manifest | None:
        """Return the published artifact, or None."""
        directory = self.directory(asset, address)
        return read_manifest(directory) if (directory / MANIFEST_NAME).exists() else None

    def current(self, asset: str, partition: str | None = None) -> Manifest:
        """Return the artifact that `partition` of `asset` stands at.

        Raises:
            MissingArtifact: it has not been materialized.
        """
        pointer = self._pointer(asset, partition)
        label = f"{asset}[{partition}]" if partition else asset
        if not pointer.exists():
            raise MissingArtifact(f"{label} has not been materialized; materialize it first (`gristmill run`, or in the UI)")
        found = self.find(asset, _pointed_at(pointer))
        if found is None:
            raise MissingArtifact(f"{label}: its artifact is gone from {self.root}; materialize it again")
        return found.for_partition(partition)

    def is_current(self, asset: str, partition: str | None = None) -> bool:
        """Return whether `partition` of `asset` stands at an artifact."""
        return self._pointer(asset, partition).exists()

    def partitions(self, asset: str) -> list[str]:
        """Return the partitions of `asset` that stand at an artifact, sorted."""
        return sorted(unquote(path.stem) for path in (self.root / "current" / asset).glob("*.json") if path.stem != "_")

    def build(self, request: Build) -> Built:
        """Return the artifact that `request` asks for, computing it if it is not there.

        Raises:
            AuditFailed: a blocking audit failed; the attempt lies under ``rejected/``.
            OutOfSpace: the disk is full; nothing is published and what was written is removed, but for resume points.
        """
        started = time.perf_counter()
        address = request.fingerprint()
        if self.find(request.asset, address) is None:
            request = replace(request, inputs={name: self._built(value) for name, value in request.inputs.items()})
        with self._room(request), locked(self.root / "locks" / f"{request.asset}-{address}"):
            found = self.find(request.asset, address)
            manifest = found or self._compute(request, address)
            manifest = manifest.for_partition(request.partition)
            self._point(request.asset, request.partition, address)
        return Built(manifest, hit=found is not None, seconds=time.perf_counter() - started)

    def _built(self, value: Input | tuple[Input, ...]) -> Input | tuple[Input, ...]:
        if isinstance(value, tuple):
            return tuple(self._built(item) for item in value)  # type: ignore[misc]
        return self.build(value).manifest if isinstance(value, Build) else value

    def verify(self, manifest: Manifest) -> list[str]:
        """Re-hash every file of `manifest`; return one line per file that is missing or differs."""
        faults = []
        for entry in manifest.files:
            path = manifest.directory / entry.path
            if not path.exists():
                faults.append(f"{manifest.label}: {entry.path} is missing")
            elif sha256_file(path) != entry.sha256:
                faults.append(f"{manifest.label}: {entry.path} differs from its recorded SHA-256")
        return faults

    def _compute(self, request: Build, address: str) -> Manifest:
        staging = self.root / "staging" / f"{request.asset}-{address}"
        if not request.resumable:
            shutil.rmtree(staging, ignore_errors=True)
        try:
            staging.mkdir(parents=True, exist_ok=True)
            started, clock = datetime.now(UTC), time.perf_counter()
            outcome = request.step(request.settings, staging, **request.inputs)
            manifest = self._draft(request, address, staging, outcome, started, time.perf_counter() - clock)
            manifest = manifest.model_copy(update={"checks": tuple(_audited(audit, manifest) for audit in request.audits)}).at(staging)
            if any(check.blocking and not check.passed for check in manifest.checks):
                raise AuditFailed(self._reject(manifest, staging, address))
            return self._publish(manifest, staging, address)
        except Exception as error:
            if is_out_of_space(error):
                _clear(staging, kept=RESUME if request.resumable else None)
            raise

    def _draft(self, request: Build, address: str, staging: Path, outcome: Outcome, started: datetime, seconds: float) -> Manifest:
        files = tuple(
            FileEntry(path=path.relative_to(staging).as_posix(), bytes=path.stat().st_size, sha256=sha256_file(path))
            for path in sorted(p for p in staging.rglob("*") if p.is_file() and p != staging / MANIFEST_NAME)
        )
        return Manifest(
            asset=request.asset,
            partition=request.partition,
            fingerprint=address,
            code_version=request.code_version(),
            settings=request.settings.model_dump(mode="json"),
            inputs=request.references(),
            files=files,
            outcome=outcome,
            provenance=_provenance(started, seconds, request.packages) | _overridden(request),
        ).at(staging)

    def _publish(self, manifest: Manifest, staging: Path, address: str) -> Manifest:
        (staging / MANIFEST_NAME).write_text(manifest.model_dump_json(indent=1), encoding="utf-8")
        for path in staging.rglob("*"):
            sync(path)
        sync(staging)
        final = self.directory(manifest.asset, address)
        final.parent.mkdir(parents=True, exist_ok=True)
        if final.exists():  # no manifest in it, else it had been found: left by a half-removed artifact
            shutil.rmtree(final)
        staging.rename(final)
        sync(final.parent)
        return manifest.at(final)

    def _reject(self, manifest: Manifest, staging: Path, address: str) -> Manifest:
        rejected = self.root / "rejected" / f"{manifest.asset}-{address}"
        shutil.rmtree(rejected, ignore_errors=True)
        rejected.parent.mkdir(parents=True, exist_ok=True)
        staging.rename(rejected)
        return manifest.at(rejected)

    def _pointer(self, asset: str, partition: str | None) -> Path:
        return self.root / "current" / asset / f"{quote(partition, safe='') if partition else '_'}.json"

    def _point(self, asset: str, partition: str | None, address: str) -> None:
        pointer = self._pointer(asset, partition)
        content = json.dumps({"partition": partition, "fingerprint": address})
        if pointer.exists() and pointer.read_text() == content:
            return
        pointer.parent.mkdir(parents=True, exist_ok=True)
        beside = pointer.with_suffix(f".{os.getpid()}.tmp")
        beside.write_text(content)
        beside.rename(pointer)

    @contextlib.contextmanager
    def _room(self, request: Build) -> Iterator[None]:
        """Turn what is raised on a full disk into one message."""
        try:
            yield
        except Exception as error:
            if not is_out_of_space(error):
                raise
            free = shutil.disk_usage(self.root).free / 1e6
            raise OutOfSpace(
                f"{request.label}: no room left under {self.root} ({free:.0f} MB free); the build did not finish. "
                "Free space there, or point GRISTMILL_HOME at a larger disk, and run again"
            ) from error


def advisory(audit: Audit) -> Audit:
    """Mark `audit` as one that warns: its failure does not keep the artifact from being published."""
    audit.blocking = False  # type: ignore[attr-defined]
    return audit


def is_blocking(audit: Audit) -> bool:
    """Return whether a failure of `audit` keeps the artifact from being published."""
    return getattr(audit, "blocking", True)


def audit_name(audit: Audit) -> str:
    """Return the name of the check that `audit` makes: the function's, or the `check_name` of a class."""
    return getattr(audit, "check_name", None) or audit.__name__


def _audited(audit: Audit, manifest: Manifest) -> Check:
    return audit(manifest).model_copy(update={"name": audit_name(audit), "blocking": is_blocking(audit)})


def _clear(staging: Path, *, kept: str | None) -> None:
    """Remove what is in `staging` but for the folder `kept`; where there is none, remove it whole."""
    for path in staging.iterdir() if staging.is_dir() else ():
        if path.name != kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    with contextlib.suppress(OSError):
        staging.rmdir()


def _many(value: Input | tuple[Input, ...]) -> Sequence[Input]:
    return value if isinstance(value, tuple) else (value,)


def _pointed_at(pointer: Path) -> str:
    """Return the fingerprint in `pointer`; one that a power failure cut short stands for an artifact that is gone."""
    try:
        return json.loads(pointer.read_text())["fingerprint"]
    except ValueError:
        return "damaged"


def _overridden(request: Build) -> dict[str, Json]:
    return {"overrides": dict(request.overrides)} if request.overrides else {}


def _provenance(started: datetime, seconds: float, packages: Sequence[str]) -> dict[str, Json]:
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return {
        "started": started.isoformat(timespec="seconds"),
        "seconds": round(seconds, 3),
        "peak_memory_bytes": max(item.ru_maxrss for item in usage) * 1024,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "packages": {name: installed_version(name) for name in packages},
    }
