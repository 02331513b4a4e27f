"""Whether artifacts are what their manifests say: every byte of every file, the manifest's own included, and where they came from.

A file that is missing, one too many, or of other bytes; a manifest that was changed (its seal, and the fingerprint over its
settings, inputs and code version); an input that is gone or of other bytes than those that were read.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pipelines.errors import GristmillError
from pipelines.manifests import MANIFEST_NAME, FileEntry, InputReference, Manifest, fingerprint, read_manifest, seal_holds, sha256_file

MAX_THREADS = 8
"""Hashing lets other threads run; a disk has little use for more readers."""


@dataclass(frozen=True)
class Fault:
    """One thing that is not as recorded."""

    artifact: str
    """Label of the artifact."""
    fingerprint: str
    file: str | None
    """None where it is not about one file."""
    what: str

    def __str__(self) -> str:
        return f"{self.artifact}: {f'{self.file} ' if self.file else ''}{self.what}"


@dataclass(frozen=True)
class Verified:
    """What was looked at, and what was found."""

    artifacts: int
    files: int
    bytes: int
    unsealed: int
    """Manifests without a seal: only what enters the fingerprint of these is known to be unchanged."""
    faults: tuple[Fault, ...]


def faults_of(directory: Path, *, label: str | None = None) -> list[Fault]:
    """Return the faults of the artifact in `directory`, in the order of its files, then those of the manifest."""
    return list(verify([directory], labels={directory: label} if label else None).faults)


def verify(
    directories: Iterable[Path],
    *,
    labels: dict[Path, str] | None = None,
    threads: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    elsewhere: Callable[[str, str], bool] = lambda asset, fingerprint: False,
) -> Verified:
    """Re-hash every file of the artifacts in `directories`.

    Args:
        labels: what artifacts are called, where not by their manifests.
        threads: files hashed at once; one a core, at most `MAX_THREADS`, where absent.
        progress: told the bytes hashed so far and in all.
        elsewhere: asked whether an input that is not beside its reader lies in object storage.
    """
    found = [_Artifact.read(directory, (labels or {}).get(directory)) for directory in directories]
    due = [(artifact, entry) for artifact in found for entry in artifact.present]
    total, done, hashed = sum(entry.bytes for _, entry in due), 0, {}
    with ThreadPoolExecutor(threads or min(os.cpu_count() or 1, MAX_THREADS)) as pool:
        for (artifact, entry), sha256 in zip(due, pool.map(lambda one: _hash(one[0].directory / one[1].path), due), strict=True):
            hashed[artifact.directory, entry.path] = sha256
            done += entry.bytes
            progress(done, total)
    return Verified(
        artifacts=len(found),
        files=sum(len(artifact.entries) + 1 for artifact in found),
        bytes=total,
        unsealed=sum(artifact.manifest is not None and not artifact.manifest.seal for artifact in found),
        faults=tuple(fault for artifact in found for fault in artifact.faults(hashed, elsewhere)),
    )


def _hash(path: Path) -> str:
    """Return the SHA-256 of `path`; what cannot be read has none."""
    try:
        return sha256_file(path)
    except OSError as error:
        return f"cannot be read: {error.strerror}"


@dataclass(frozen=True)
class _Artifact:
    directory: Path
    content: bytes
    manifest: Manifest | None
    label: str
    problem: str = ""
    """Why there is no manifest."""

    @classmethod
    def read(cls, directory: Path, label: str | None) -> _Artifact:
        name = label or f"{directory.parent.name}-{directory.name}"
        try:
            content = (directory / MANIFEST_NAME).read_bytes()
            manifest = read_manifest(directory)
        except OSError:
            return cls(directory, b"", None, name, "is missing")
        except GristmillError as error:
            return cls(directory, content, None, name, f"is not a manifest ({str(error).splitlines()[0]})")
        return cls(directory, content, manifest, label or manifest.label)

    @property
    def entries(self) -> tuple[FileEntry, ...]:
        return self.manifest.files if self.manifest else ()

    @property
    def present(self) -> list[FileEntry]:
        """The files that are there and have the size they should have."""
        return [entry for entry in self.entries if self._size(entry) == entry.bytes]

    def _size(self, entry: FileEntry) -> int | None:
        path = self.directory / entry.path
        return path.stat().st_size if path.is_file() and not path.is_symlink() else None

    def faults(self, hashed: dict[tuple[Path, str], str], elsewhere: Callable[[str, str], bool]) -> Iterator[Fault]:
        """Yield what is wrong, given the hashes of the files that are present."""
        if self.manifest is None:
            yield self._fault(MANIFEST_NAME, self.problem)
            return
        for entry in self.entries:
            if (sha256 := hashed.get((self.directory, entry.path))) is not None:
                problem = "" if sha256 == entry.sha256 else "differs from its recorded SHA-256" if len(sha256) == 64 else sha256
            else:
                problem = "is missing" if (size := self._size(entry)) is None else f"has {size:,} bytes, {entry.bytes:,} are recorded"
            if problem:
                yield self._fault(entry.path, problem)
        known = {entry.path for entry in self.entries} | {MANIFEST_NAME}
        there = (
            path.relative_to(self.directory).as_posix() for path in self.directory.rglob("*") if path.is_symlink() or not path.is_dir()
        )
        yield from (self._fault(name, "is not in the manifest") for name in sorted(set(there) - known))
        yield from (self._fault(MANIFEST_NAME, what) for what in self._changed(self.manifest))
        yield from (
            self._fault(None, what) for refs in self.manifest.inputs.values() for one in refs if (what := self._lost(one, elsewhere))
        )

    def _changed(self, manifest: Manifest) -> Iterator[str]:
        if manifest.seal and not seal_holds(self.content):
            yield "was changed since it was published: its bytes differ from its seal"
        made_from = fingerprint(manifest.asset, manifest.code_version, manifest.settings, manifest.inputs)
        if made_from != manifest.fingerprint:
            yield f"says fingerprint {manifest.fingerprint}, but its settings, inputs and code version give {made_from}"
        if (manifest.asset, manifest.fingerprint) != (self.directory.parent.name, self.directory.name):
            yield f"is of {manifest.asset} {manifest.fingerprint}, and lies at {self.directory.parent.name}/{self.directory.name}"

    def _lost(self, reference: InputReference, elsewhere: Callable[[str, str], bool]) -> str | None:
        """Return what is wrong with an input, or None."""
        directory = self.directory.parents[1] / reference.asset / reference.fingerprint
        label = f"{reference.asset}[{reference.partition}]" if reference.partition else reference.asset
        if not (directory / MANIFEST_NAME).is_file() and elsewhere(reference.asset, reference.fingerprint):
            return None
        if not (directory / MANIFEST_NAME).is_file():
            return f"was made from {label}, whose artifact {reference.fingerprint} is gone"
        if not reference.member:
            return None
        try:
            recorded = {entry.path: entry.sha256 for entry in read_manifest(directory).files}
        except GristmillError:
            return None  # a fault of the input, not of its reader
        if recorded.get(reference.member) == reference.sha256:
            return None
        return f"was made from {reference.member} of {label} as it was with other bytes"

    def _fault(self, file: str | None, what: str) -> Fault:
        return Fault(self.label, self.directory.name, file, what)
