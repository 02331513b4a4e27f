"""Files: what has to reach the disk before a rename, locks between processes, and the content of files by hash."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

from pipelines.manifests import sha256_file


def sync(path: Path) -> None:
    """Wait until the content of file or directory `path` is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path` (flock, exclusive); it is let go when the process ends, however it ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def file_hashes(paths: Iterable[Path], root: Path) -> dict[str, str]:
    """Return the SHA-256 of each of `paths`, by its path relative to `root` where it lies there."""
    return {
        path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix(): _hash(
            path, path.stat().st_size, path.stat().st_mtime_ns
        )
        for path in paths
    }


@lru_cache(maxsize=4096)
def _hash(path: Path, size: int, modified: int) -> str:
    """Hash `path` once per process for each size and time of modification: one file often serves many partitions."""
    return sha256_file(path)
