"""Artifacts in object storage: a store's directory is then a cache in front of what a URL names.

    <url>/artifacts/<asset>/<fingerprint>/<content>/     the files; `content` is the start of the hash over all of them
    <url>/artifacts/<asset>/<fingerprint>/manifest.json  written last: without it the artifact does not exist
    <url>/current/<asset>/<partition>.json               which fingerprint a partition stands at

Whoever asks for what another machine has published gets its bytes, checked against the manifest's hashes. Two machines that computed
the same artifact write the same objects; where their bytes differ they write to different folders, and one manifest wins, whole.
An upload that was killed is gone on with: what arrived is not sent again. A bucket keeps the parts of a large object whose upload
was killed until a rule of its own removes them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import quote, unquote

from pipelines.errors import GristmillError
from pipelines.manifests import MANIFEST_NAME, FileEntry, Manifest, seal_holds, sha256_file
from pipelines.remote_files import attempt, file_system, is_url

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

Result = TypeVar("Result")

TRANSFERS = 4
"""Files sent or received at a time."""
CONTENT_DIGITS = 16


def pointer_name(asset: str, partition: str | None) -> str:
    """Return where the pointer of `partition` lies, relative to a store's root."""
    return f"current/{asset}/{quote(partition, safe='') if partition else '_'}.json"


def pointer_content(partition: str | None, address: str) -> str:
    """Return what a pointer says."""
    return json.dumps({"partition": partition, "fingerprint": address})


def pointed_at(content: str | bytes) -> str:
    """Return the fingerprint in a pointer; one that a power failure cut short stands for an artifact that is gone."""
    try:
        return json.loads(content)["fingerprint"]
    except ValueError:
        return "damaged"


@dataclass(frozen=True)
class RemoteStore:
    """The artifacts under `url`. Picklable; the file system is opened where it is used."""

    url: str

    def __post_init__(self) -> None:
        if not is_url(self.url):
            raise GristmillError(f"{self.url!r} is no URL; object storage is named as in s3://bucket/folder (GRISTMILL_REMOTE)")
        object.__setattr__(self, "url", self.url.rstrip("/"))

    def __getstate__(self) -> dict[str, str]:
        return {"url": self.url}

    def find(self, asset: str, address: str) -> Manifest | None:
        """Return the manifest of a published artifact, without its files; None where there is none.

        Raises:
            GristmillError: the storage does not answer, or what lies there is no manifest.
        """
        name = f"{_folder(asset, address)}/{MANIFEST_NAME}"
        content = self._read(name)
        if content is None:
            return None
        try:
            found = Manifest.model_validate_json(content)
        except ValueError as error:
            raise GristmillError(f"{self.url}/{name} is not a manifest ({error}); remove it and materialize again") from error
        if not seal_holds(content):
            raise GristmillError(f"{self.url}/{name} is not as it was written: its seal is broken; remove it and materialize again")
        return found

    def download(self, manifest: Manifest, directory: Path) -> None:
        """Put the files of `manifest` into `directory`; what lies there whole already is kept.

        Raises:
            GristmillError: a file is missing, or differs from its recorded SHA-256.
        """
        folder = _content_folder(manifest)
        self._each(manifest, lambda entry: self._get(f"{folder}/{entry.path}", directory / entry.path, entry))

    def publish(self, manifest: Manifest) -> None:
        """Send what is not there yet of `manifest`, its manifest last, and let its partition stand at it."""
        folder = _folder(manifest.asset, manifest.fingerprint)
        if not self._exists(f"{folder}/{MANIFEST_NAME}"):
            self._upload(manifest)
            self._write(f"{folder}/{MANIFEST_NAME}", (manifest.directory / MANIFEST_NAME).read_bytes())
        name, content = pointer_name(manifest.asset, manifest.partition), pointer_content(manifest.partition, manifest.fingerprint)
        if self._read(name) != content.encode():
            self._write(name, content.encode())

    def current(self, asset: str, partition: str | None) -> str | None:
        """Return the fingerprint that `partition` of `asset` stands at, or None."""
        content = self._read(pointer_name(asset, partition))
        return None if content is None else pointed_at(content)

    def partitions(self, asset: str) -> set[str]:
        """Return the partitions of `asset` that stand at an artifact."""
        names = (Path(name) for name in self._list(f"current/{asset}"))
        return {unquote(name.stem) for name in names if name.suffix == ".json" and name.stem != "_"}

    def _upload(self, manifest: Manifest) -> None:
        folder = _content_folder(manifest)
        there = self._list(folder)

        def put(entry: FileEntry) -> None:
            name = f"{folder}/{entry.path}"
            if there.get(name) != entry.bytes:
                self._attempt(name, lambda: self._system.put_file(str(manifest.directory / entry.path), self._path(name)))

        self._each(manifest, put)

    def _each(self, manifest: Manifest, action: Callable[[FileEntry], None]) -> None:
        with ThreadPoolExecutor(TRANSFERS) as pool:
            for _ in pool.map(action, manifest.files):
                pass

    def _get(self, name: str, path: Path, entry: FileEntry) -> None:
        if Path(entry.path).is_absolute() or ".." in Path(entry.path).parts:
            raise GristmillError(f"{self.url}/{name}: its manifest names {entry.path!r}, which leaves the artifact; remove that manifest")
        if path.exists() and path.stat().st_size == entry.bytes and sha256_file(path) == entry.sha256:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._attempt(name, lambda: self._system.get_file(self._path(name), str(path)))
        except FileNotFoundError as error:
            raise self._damaged(name, "is missing") from error
        if sha256_file(path) != entry.sha256:
            path.unlink()
            raise self._damaged(name, "differs from its recorded SHA-256")

    def _damaged(self, name: str, how: str) -> GristmillError:
        folder = "/".join(name.split("/")[:3])
        return GristmillError(
            f"{self.url}/{name} {how}; remove {self.url}/{folder}: a machine that holds the artifact sends it anew when it is asked for "
            "it, any other computes it"
        )

    def _read(self, name: str) -> bytes | None:
        try:
            return self._attempt(name, lambda: self._system.cat_file(self._path(name)))
        except FileNotFoundError:
            return None

    def _write(self, name: str, content: bytes) -> None:
        if self._is_directory:  # an object appears whole, a file does not
            self._attempt(name, lambda: self._system.pipe_file(self._path(f"{name}.part"), content))
            self._attempt(name, lambda: self._system.mv(self._path(f"{name}.part"), self._path(name)))
        else:
            self._attempt(name, lambda: self._system.pipe_file(self._path(name), content))

    def _exists(self, name: str) -> bool:
        try:
            self._attempt(name, lambda: self._system.info(self._path(name)))
        except FileNotFoundError:
            return False
        return True

    def _list(self, folder: str) -> dict[str, int]:
        """Return the names under `folder`, relative to the URL, with their size in bytes."""
        try:
            found = self._attempt(folder, lambda: self._system.find(self._path(folder), detail=True))
        except FileNotFoundError:
            return {}
        start = len(self._opened[1]) + 1
        return {name[start:]: info["size"] for name, info in found.items()}

    def _attempt(self, name: str, action: Callable[[], Result]) -> Result:
        return attempt(f"{self.url}/{name}", action)

    def _path(self, name: str) -> str:
        return f"{self._opened[1]}/{name}"

    @property
    def _is_directory(self) -> bool:
        return self.url.startswith("file://")

    @property
    def _system(self) -> AbstractFileSystem:
        return self._opened[0]

    @cached_property
    def _opened(self) -> tuple[AbstractFileSystem, str]:
        """The file system and the root's path in it, of a bucket that is known to be there: a missing one would read as empty."""
        system, root = file_system(self.url)
        if self._is_directory:
            return system, root
        bucket = root.partition("/")[0]
        try:
            attempt(self.url, lambda: system.info(bucket))  # not `exists`, to which no answer is a no
        except FileNotFoundError as error:
            raise GristmillError(f"{self.url}: there is no bucket {bucket!r}; make it, or correct GRISTMILL_REMOTE") from error
        return system, root


def _folder(asset: str, address: str) -> str:
    return f"artifacts/{asset}/{address}"


def _content_folder(manifest: Manifest) -> str:
    return f"{_folder(manifest.asset, manifest.fingerprint)}/{manifest.content_sha256[:CONTENT_DIGITS]}"
