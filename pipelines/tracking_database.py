"""The database behind the tracking: which driver its URL names, and a lock that every machine on it shares.

A file lock keeps the processes of one machine apart. Where several machines track on one PostgreSQL, an advisory lock of that
server does: four processes that make MLflow's tables at the same time leave one of them alive.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from pipelines.errors import GristmillError
from pipelines.files import locked

DRIVER = "psycopg2"
"""Of the extra `postgres`. SQLAlchemy 2.1 takes a URL without a driver for psycopg 3, which dagster-postgres does not use."""


def with_driver(uri: str) -> str:
    """Return `uri` with the driver of the extra `postgres`, where it names PostgreSQL and no driver."""
    scheme, colon, rest = uri.partition("://")
    return f"postgresql+{DRIVER}://{rest}" if colon and scheme in ("postgres", "postgresql") else uri


@contextlib.contextmanager
def database_lock(uri: str, path: Path) -> Iterator[None]:
    """Hold the lock file `path`, and where `uri` names PostgreSQL an advisory lock of that server named like the file.

    Both are let go when the process ends, however it ends. Not for use inside itself.

    Raises:
        GristmillError: the driver is not installed, or the server does not answer.
    """
    with locked(path), _advisory_lock(uri, path.name) if uri.startswith("postgresql") else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def _advisory_lock(uri: str, name: str) -> Iterator[None]:
    import sqlalchemy as sa

    if uri.startswith(f"postgresql+{DRIVER}:") and find_spec(DRIVER) is None:
        raise GristmillError(
            f"the tracking database {_shown(uri)} needs {DRIVER}, which is not installed; install the extra `postgres`: "
            "make setup EXTRAS=postgres"
        )
    engine = sa.create_engine(uri, isolation_level="AUTOCOMMIT", poolclass=sa.pool.NullPool)
    try:
        connection = engine.connect()
    except sa.exc.OperationalError as error:
        said = " ".join(str(error.orig).split())
        raise GristmillError(
            f"the tracking database {_shown(uri)} does not answer ({said}); start it, or correct MLFLOW_TRACKING_URI, and run again"
        ) from error
    with connection:  # the lock ends with its connection
        key = int.from_bytes(hashlib.sha256(f"gristmill {name}".encode()).digest()[:8], "big", signed=True)
        connection.execute(sa.text("SELECT pg_advisory_lock(:key)"), {"key": key})
        yield


def _shown(uri: str) -> str:
    """Return `uri` without its password."""
    from sqlalchemy import make_url

    return make_url(uri).render_as_string(hide_password=True)
