"""Files that a URL names (s3://, gs://, abfs://, ... through fsspec): what goes wrong said plainly, and local copies to read.

Sources read local files: what a URL in `paths` names is copied under ``<home>/sources`` once for each version of it. Credentials
and the endpoint come from the environment, as the client of each kind of storage reads them.
"""

from __future__ import annotations

import errno
import fcntl
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import quote, unquote

from pipelines.errors import GristmillError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

Result = TypeVar("Result")

WAITS_SECONDS = (0.2, 0.8, 3.0)
"""Before each further attempt at what failed in passing; the clients have retries of their own below these."""
OF_THIS_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
OPTIONS: dict[str, dict[str, object]] = {
    "s3": {"config_kwargs": {"connect_timeout": 10, "read_timeout": 60, "retries": {"max_attempts": 2}}},
    "file": {"auto_mkdir": True},
}
EXTRAS = {"s3": "s3", "s3a": "s3"}
CLIENT_ERRORS = (("botocore.exceptions", "BotoCoreError"), ("botocore.exceptions", "ClientError"), ("aiohttp", "ClientError"))
"""Errors of the storage clients that are no OSError."""
VERSION_KEYS = ("ETag", "etag", "generation", "content_md5", "size", "LastModified", "last_modified", "mtime", "updated")


def is_url(name: str) -> bool:
    """Return whether `name` is a URL and no path."""
    return "://" in name


def file_system(url: str) -> tuple[AbstractFileSystem, str]:
    """Return the file system that `url` names, and the path in it.

    Raises:
        GristmillError: the kind of storage is unknown, or its package is not installed.
    """
    from fsspec.core import url_to_fs

    protocol = url.partition("://")[0]
    try:
        return url_to_fs(url, use_listings_cache=False, **OPTIONS.get(protocol, {}))
    except ImportError as error:
        remedy = f"make setup EXTRAS={EXTRAS[protocol]}" if protocol in EXTRAS else "install it"
        raise GristmillError(f"{url}: storage of kind {protocol!r} needs a package that is not installed ({error}); {remedy}") from error
    except ValueError as error:
        raise GristmillError(f"{url}: {error}; a URL begins with a kind of storage that fsspec knows, as in s3://bucket/folder") from error


def attempt(url: str, action: Callable[[], Result]) -> Result:
    """Return what `action` gives; what fails in passing is tried again.

    Raises:
        FileNotFoundError: what it asks for is not there.
        OSError: this machine's disk is full.
        GristmillError: no credentials, no access, or no answer.
    """
    for wait in (*WAITS_SECONDS, None):
        try:
            return action()
        except FileNotFoundError:
            raise
        except PermissionError as error:
            raise GristmillError(
                f"{url}: access refused ({error}); the credentials in the environment have to list, read and write there: correct them, "
                "or what the bucket allows"
            ) from error
        except (OSError, *_client_errors()) as error:
            if getattr(error, "errno", None) in OF_THIS_DISK:
                raise
            if "Credentials" in type(error).__name__:
                raise GristmillError(
                    f"{url}: no credentials ({error}); they come from the environment, for s3 as AWS_ACCESS_KEY_ID and "
                    "AWS_SECRET_ACCESS_KEY: set them and run again"
                ) from error
            if wait is None:
                raise GristmillError(
                    f"{url}: no answer in {len(WAITS_SECONDS) + 1} attempts ({error}); check that the storage runs and is reached, for "
                    "another than Amazon's at AWS_ENDPOINT_URL, and run again: what is finished is kept"
                ) from error
            time.sleep(wait)
    raise AssertionError("unreachable: the last attempt returns or raises")


def _client_errors() -> tuple[type[Exception], ...]:
    return tuple(getattr(sys.modules[module], name) for module, name in CLIENT_ERRORS if module in sys.modules)


def local_copies(pattern: str, root: Path) -> list[Path]:
    """Return local copies of the files that the URL `pattern` names (globs allowed), copied where they are new or changed.

    Raises:
        GristmillError: it names none, or the storage does not give them.
    """
    system, path = file_system(pattern)
    try:
        found = attempt(pattern, lambda: system.glob(path, detail=True))
    except FileNotFoundError:
        found = {}
    files = {name: info for name, info in sorted(found.items()) if info["type"] == "file"}
    if not files:
        raise GristmillError(f"no file matches {pattern!r}; put the file there or correct the URL")
    return [_local_copy(system, pattern, name, info, copies_directory(root)) for name, info in files.items()]


def copies_directory(root: Path) -> Path:
    """Return where local copies of the sources of the project at `root` lie."""
    return Path(os.environ.get("GRISTMILL_HOME") or root / ".gristmill").absolute() / "sources"


def url_of(copy: Path, root: Path) -> str | None:
    """Return the URL that `copy` was made from, or None where it is no copy."""
    directory = copies_directory(root) / "files"
    if not copy.is_relative_to(directory):
        return None
    protocol, *parts = copy.relative_to(directory).parts
    return f"{protocol}://{'/'.join(unquote(part) for part in parts)}"


def _local_copy(system: AbstractFileSystem, pattern: str, name: str, info: Mapping[str, object], directory: Path) -> Path:
    parts = [quote(part, safe=" ,;=@+()[]") for part in name.strip("/").split("/")]
    if {"", ".", ".."} & set(parts):
        raise GristmillError(f"{name!r} of {pattern!r} has a part that no local path can have; rename it there")
    copy = directory.joinpath("files", pattern.partition("://")[0], *parts)
    version = directory.joinpath("versions", copy.relative_to(directory / "files"))
    wanted = "\n".join(f"{key} {info[key]}" for key in VERSION_KEYS if key in info)
    for path in (copy, version):
        path.parent.mkdir(parents=True, exist_ok=True)
    with version.open("a+") as record:
        fcntl.flock(record, fcntl.LOCK_EX)
        record.seek(0)
        if record.read() == wanted and copy.exists():
            return copy
        beside = version.with_name(f"{version.name}.part")
        attempt(pattern, lambda: system.get_file(name, str(beside)))
        beside.rename(copy)
        record.truncate(0)
        record.write(wanted)
    return copy
