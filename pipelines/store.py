"""The store: artifacts addressed by content, written beside, audited, then published by rename.

    <root>/artifacts/<asset>/<fingerprint>/     files and manifest.json; never changed once there
    <root>/current/<asset>/<partition>.json     which fingerprint a partition stands at
    <root>/staging/<asset>-<fingerprint>/       being written, or left by a killed process
    <root>/rejected/<asset>-<fingerprint>/      the last attempt that failed its audit
    <root>/refused/<asset>/<partition>.json     that the last attempt at a partition is one of those
    <root>/locks/                               one writer per artifact
    <root>/leases/                              what living processes read and write: `pipelines.leases`

Asking again for what is published is a hit and costs one small read. With a `RemoteStore` behind it the root is a cache: what is
not there is looked for and fetched from the remote, and what is published is sent there.
"""

from __future__ import annotations

import contextlib
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
from urllib.parse import unquote

from pipelines import refusals
from pipelines.code_version import code_version, installed_version
from pipelines.errors import GristmillError, MissingArtifact, OutOfSpace
from pipelines.files import is_out_of_space, locked, sync
from pipelines.leases import Address, Leases
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
    sealed,
    sha256_file,
)
from pipelines.plugins import Settings
from pipelines.refusals import Refusal
from pipelines.remote_store import RemoteStore, pointed_at, pointer_content, pointer_name
from pipelines.spending import Meter
from pipelines.verification import faults_of

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
        self.failed = tuple(f"{c.name}: {c.description}" for c in manifest.checks if c.blocking and not c.passed)
        super().__init__(f"{manifest.label} failed its audit and was not published: {'; '.join(self.failed)}")

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
    """Artifacts under one root directory on a local or mounted file system, with or without object storage behind it."""

    def __init__(self, root: Path, remote: RemoteStore | None = None) -> None:
        self.root = Path(root).absolute()
        self.leases = Leases(self.root)
        self.remote = remote

    def directory(self, asset: str, address: str) -> Path:
        """Return where the artifact with fingerprint `address` lies or would lie."""
        return self.root / "artifacts" / asset / address

    def staging(self, asset: str, address: str) -> Path:
        """Return where the artifact with fingerprint `address` is written before it is published."""
        return self.root / "staging" / f"{asset}-{address}"

    def lock(self, asset: str, address: str) -> Path:
        """Return the lock file that the one writer of the artifact with fingerprint `address` holds."""
        return self.root / "locks" / Address(asset, address).name

    def find(self, asset: str, address: str) -> Manifest | None:
        """Return the published artifact, or None; one that the remote holds is fetched."""
        directory = self.directory(asset, address)
        if (directory / MANIFEST_NAME).exists():
            return read_manifest(directory)
        return self._fetch(asset, address) if self.remote else None

    def current(self, asset: str, partition: str | None = None) -> Manifest:
        """Return the artifact that `partition` of `asset` stands at.

        Raises:
            MissingArtifact: it has not been materialized.
        """
        if found := self.standing(asset, partition):
            return found
        label = f"{asset}[{partition}]" if partition else asset
        if self.is_current(asset, partition):
            raise MissingArtifact(f"{label}: its artifact is gone from {self.root}; materialize it again")
        raise MissingArtifact(f"{label} has not been materialized; materialize it first (`gristmill run`, or in the UI)")

    def standing(self, asset: str, partition: str | None = None) -> Manifest | None:
        """Return the artifact that `partition` stands at, or None: also where its files are gone, so that it can be made anew."""
        address = self._standing(asset, partition)
        found = self.find(asset, address) if address else None
        return found.for_partition(partition) if found else None

    def is_current(self, asset: str, partition: str | None = None) -> bool:
        """Return whether `partition` of `asset` stands at an artifact."""
        return self._pointer(asset, partition).exists() or self._standing(asset, partition) is not None

    def partitions(self, asset: str) -> list[str]:
        """Return the partitions of `asset` that stand at an artifact, sorted."""
        here = {unquote(path.stem) for path in (self.root / "current" / asset).glob("*.json") if path.stem != "_"}
        return sorted(here | self.remote.partitions(asset) if self.remote else here)

    def build(self, request: Build) -> Built:
        """Return the artifact that `request` asks for, computing it if it is not there.

        Raises:
            AuditFailed: a blocking audit failed; the attempt lies under ``rejected/``.
            OutOfSpace: the disk is full; nothing is published and what was written is removed, but for resume points.
        """
        started = time.perf_counter()
        with contextlib.ExitStack() as held:
            if self.remote:
                with self._room(request):
                    held.enter_context(self.leases.taken(lambda: [request], needed))
            try:
                manifest, hit = self._hit(request) or self._found_or_computed(request, request.fingerprint())
            except AuditFailed as error:
                self._refuse(request, error)
                raise
            manifest = manifest.for_partition(request.partition)
            if self.remote:
                with self._room(request), locked(self.lock(request.asset, request.fingerprint())):
                    self.remote.publish(manifest)
        return Built(manifest, hit=hit, seconds=time.perf_counter() - started)

    def _hit(self, request: Build) -> tuple[Manifest, bool] | None:
        """Return what is asked for where it is there, and have its partition stand at it; housekeeping waits meanwhile."""
        with self._room(request), self.leases.looking():
            found = self.find(request.asset, request.fingerprint())
            if found:
                self._point(request.asset, request.partition, request.fingerprint())
        return (found, True) if found else None

    def _found_or_computed(self, request: Build, address: str) -> tuple[Manifest, bool]:
        with contextlib.ExitStack() as held:
            with self._room(request):
                held.enter_context(self.leases.taken(lambda: [request], needed))
            if self.find(request.asset, address) is None:
                request = replace(request, inputs={name: self._built(value) for name, value in request.inputs.items()})
            with self._room(request), locked(self.lock(request.asset, request.fingerprint())):
                found = self.find(request.asset, address)
                manifest = found or self._compute(request, address)
                with self.leases.looking():  # with the gate held alone, no pointer is half written
                    self._point(request.asset, request.partition, address)
        return manifest, found is not None

    def _refuse(self, request: Build, error: AuditFailed) -> None:
        """Remember that the last attempt at this partition failed an audit, its own or that of what it is made of."""
        pointer = self._pointer(request.asset, request.partition)
        standing = pointed_at(pointer.read_bytes()) if pointer.exists() else None
        refused = Refusal(
            asset=request.asset, partition=request.partition, fingerprint=request.fingerprint(), standing=standing, failed=error.failed
        )
        with self.leases.looking():
            refusals.record(self.root, refused)

    def _built(self, value: Input | tuple[Input, ...]) -> Input | tuple[Input, ...]:
        if isinstance(value, tuple):
            return tuple(self._built(item) for item in value)  # type: ignore[misc]
        return self.build(value).manifest if isinstance(value, Build) else value

    def verify(self, manifest: Manifest) -> list[str]:
        """Re-hash every file of `manifest`; return one line per fault, as `pipelines.verification` finds them."""
        return [str(fault) for fault in faults_of(manifest.directory, label=manifest.label)]

    def _compute(self, request: Build, address: str) -> Manifest:
        staging = self.staging(request.asset, address)
        if not request.resumable:
            shutil.rmtree(staging, ignore_errors=True)
        try:
            staging.mkdir(parents=True, exist_ok=True)
            started, meter = datetime.now(UTC), Meter()
            outcome = request.step(request.settings, staging, **request.inputs)
            manifest = self._draft(request, address, staging, outcome, started, meter.spent())
            manifest = manifest.model_copy(update={"checks": tuple(_audited(audit, manifest) for audit in request.audits)}).at(staging)
            if any(check.blocking and not check.passed for check in manifest.checks):
                raise AuditFailed(self._reject(manifest, staging, address))
            return self._publish(manifest, staging, address)
        except Exception as error:
            if is_out_of_space(error):
                _clear(staging, kept=RESUME if request.resumable else None)
            raise
        except BaseException:  # cancelled; what a killed process leaves is removed by the next attempt
            if not request.resumable:
                shutil.rmtree(staging, ignore_errors=True)
            raise

    def _draft(
        self, request: Build, address: str, staging: Path, outcome: Outcome, started: datetime, spent: Mapping[str, float]
    ) -> Manifest:
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
            provenance=_provenance(started, spent, request.packages) | _overridden(request),
        ).at(staging)

    def _publish(self, manifest: Manifest, staging: Path, address: str) -> Manifest:
        manifest, content = sealed(manifest)
        (staging / MANIFEST_NAME).write_bytes(content)
        for path in staging.rglob("*"):
            sync(path)
        sync(staging)
        final = self.directory(manifest.asset, address)
        final.parent.mkdir(parents=True, exist_ok=True)
        if (final / MANIFEST_NAME).exists():  # fetched meanwhile: another machine was faster
            shutil.rmtree(staging)
            return read_manifest(final)
        if final.exists():  # no manifest in it, else it had been found: left by a half-removed artifact
            shutil.rmtree(final)
        staging.rename(final)
        sync(final.parent)
        return manifest.at(final)

    def _fetch(self, asset: str, address: str) -> Manifest | None:
        """Bring an artifact from the remote and publish it here; None where the remote has none."""
        found = self.remote.find(asset, address) if self.remote else None
        if found is None:
            return None
        with locked(self.root / "locks" / f"{asset}-{address}.fetch"):
            if not (self.directory(asset, address) / MANIFEST_NAME).exists():
                staging = self.root / "staging" / f"{asset}-{address}.{found.content_sha256[:8]}"
                staging.mkdir(parents=True, exist_ok=True)
                self.remote.download(found, staging)
                self._publish(found.at(staging), staging, address)
        return read_manifest(self.directory(asset, address))

    def _standing(self, asset: str, partition: str | None) -> str | None:
        """Return the fingerprint that `partition` stands at: for all machines where there is a remote, else here."""
        address = self.remote.current(asset, partition) if self.remote else None
        pointer = self._pointer(asset, partition)
        return address or (pointed_at(pointer.read_bytes()) if pointer.exists() else None)

    def _reject(self, manifest: Manifest, staging: Path, address: str) -> Manifest:
        rejected = self.root / "rejected" / f"{manifest.asset}-{address}"
        shutil.rmtree(rejected, ignore_errors=True)
        rejected.parent.mkdir(parents=True, exist_ok=True)
        staging.rename(rejected)
        return manifest.at(rejected)

    def _pointer(self, asset: str, partition: str | None) -> Path:
        return self.root / pointer_name(asset, partition)

    def _point(self, asset: str, partition: str | None, address: str) -> None:
        refusals.clear(self.root, asset, partition)
        pointer = self._pointer(asset, partition)
        content = pointer_content(partition, address)
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


def needed(builds: Sequence[Build]) -> set[Address]:
    """Return every artifact that `builds` name: what they ask for, their inputs, and those of inputs that are requests themselves."""
    found: set[Address] = set()
    pending = list(builds)
    while pending:
        build = pending.pop()
        own = Address(build.asset, build.fingerprint())
        if own in found:
            continue
        inputs = [value for many in build.inputs.values() for value in _many(many)]
        found |= {own, *(Address(r.asset, r.fingerprint) for r in (value.reference() for value in inputs if not isinstance(value, Build)))}
        pending += [value for value in inputs if isinstance(value, Build)]
    return found


def _many(value: Input | tuple[Input, ...]) -> Sequence[Input]:
    return value if isinstance(value, tuple) else (value,)


def _overridden(request: Build) -> dict[str, Json]:
    return {"overrides": dict(request.overrides)} if request.overrides else {}


def _provenance(started: datetime, spent: Mapping[str, float], packages: Sequence[str]) -> dict[str, Json]:
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return {
        "started": started.isoformat(timespec="milliseconds"),
        **spent,
        "peak_memory_bytes": max(item.ru_maxrss for item in usage) * 1024,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "packages": {name: installed_version(name) for name in packages},
    }
