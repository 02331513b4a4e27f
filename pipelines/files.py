"""Files: what has to reach the disk before a rename, locks between processes, files by pattern and by hash of their content; full disks."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import os
import re
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path

from pipelines.errors import GristmillError
from pipelines.manifests import sha256_file
from pipelines.remote_files import is_url, local_copies, url_of

OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
OUT_OF_SPACE_WORDS = re.compile("|".join([*map(os.strerror, OUT_OF_SPACE), r"\d+ requested and \d+ written"]))


def sync(path: Path) -> None:
    """Wait until the content of file or directory `path` is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_out_of_space(error: BaseException | None) -> bool:
    """Return whether `error`, or what it was raised from, says that the disk is full.

    By number, or by words: tokenizers, safetensors, DuckDB and numpy raise errors without one.
    """
    while error:
        if getattr(error, "errno", None) in OUT_OF_SPACE or OUT_OF_SPACE_WORDS.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def locked(path: Path, *, shared: bool = False, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold the lock file `path` (flock); it is let go when the process ends, however it ends.

    Args:
        shared: hold it together with others that do so, too.
        waiting: called once where another process has to be waited for.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    with path.open("w") as file:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(file, kind)
        yield


def is_locked(path: Path) -> bool:
    """Return whether another process holds the lock file `path`."""
    if not path.exists():
        return False
    with path.open("r") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def matching_files(pattern: str, root: Path) -> list[Path]:
    """Return the files that `pattern` names, relative to `root` unless absolute; local copies of what a URL names.

    Raises:
        GristmillError: it names none, or leaves `root` by ``..``.
    """
    if is_url(pattern):
        return local_copies(pattern, root)
    if not Path(pattern).is_absolute() and ".." in Path(pattern).parts:
        raise GristmillError(f"path {pattern!r} leaves the project's directory by '..'; give an absolute path for files outside it")
    if (root / pattern).is_file():
        return [root / pattern]
    names = glob.glob(pattern, root_dir=root, recursive=True)  # noqa: PTH207  Path.glob refuses absolute patterns
    found = [root / name for name in names if (root / name).is_file()]
    if not found:
        directory = (root / pattern).is_dir()
        hint = f"name the directory's files, as in {pattern.rstrip('/')}/*" if directory else "put the file there or correct the path"
        raise GristmillError(f"no file matches {pattern!r} (relative paths start at {root}); {hint}")
    return found


def shown_path(path: Path, root: Path) -> str:
    """Return `path` relative to `root` where it lies in it, and a copy's URL, so that it reads the same on every machine."""
    if url := url_of(path, root):
        return url
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()


def file_hashes(paths: Iterable[Path], root: Path) -> dict[str, str]:
    """Return the SHA-256 of each of `paths`, by its `shown_path`."""
    return {shown_path(path, root): _hash(path, path.stat().st_size, path.stat().st_mtime_ns) for path in paths}


@lru_cache(maxsize=4096)
def _hash(path: Path, size: int, modified: int) -> str:
    """Hash `path` once per process for each size and time of modification: one file often holds many partitions."""
    return sha256_file(path)
