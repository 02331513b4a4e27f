"""Real servers that tests start and stop: PostgreSQL from Debian's package."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

APT = {"DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
"""No questions, and no service started: the tests start a cluster of their own."""


def free_port() -> int:
    """Return a port of 127.0.0.1 that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def in_ci() -> bool:
    return os.environ.get("CI") == "true"


def postgres_programs() -> Path:
    """Return the directory of PostgreSQL's server programs, installed first where this is CI; skip the test where there are none."""
    if not (found := _postgres_programs()) and in_ci() and os.geteuid() == 0 and shutil.which("apt-get"):
        for command in (["update"], ["install", "-y", "--no-install-recommends", "postgresql"]):
            subprocess.run(["apt-get", "-qq", *command], env={**os.environ, **APT}, check=True, timeout=300)
        found = _postgres_programs()
    if not found and in_ci():
        raise RuntimeError("CI has no PostgreSQL and cannot install it: it is Debian's package `postgresql`")
    if not found:
        pytest.skip("needs PostgreSQL's server programs: apt-get install postgresql")
    return found


def _postgres_programs() -> Path | None:
    on_path = shutil.which("initdb")
    directories = [Path(on_path).resolve().parent] if on_path else sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((path for path in directories if (path / "initdb").exists() and (path / "pg_ctl").exists()), None)


@dataclass
class Postgres:
    """A cluster of one user and no password, on a port of 127.0.0.1."""

    programs: Path
    directory: Path
    port: int
    user: str
    """Who owns the server process: never root, which PostgreSQL refuses."""

    def url(self, database: str) -> str:
        return f"postgresql+psycopg2://{self.user}@127.0.0.1:{self.port}/{database}"

    def start(self) -> None:
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories= -c fsync=off"
        self._run("pg_ctl", "start", "-w", "-D", "data", "-l", "log", "-o", options)

    def stop(self, mode: str = "immediate") -> None:
        """Stop the server; `immediate` cuts every connection, as a crash does."""
        self._run("pg_ctl", "stop", "-w", "-D", "data", "-m", mode)

    def create(self, database: str) -> str:
        """Make an empty database and return its URL."""
        self.ask("postgres", f'CREATE DATABASE "{database}"')
        return self.url(database)

    def ask(self, database: str, query: str) -> list[tuple]:
        """Return the rows that `query` gives, none where it gives no table."""
        import psycopg2

        connection = psycopg2.connect(host="127.0.0.1", port=self.port, user=self.user, dbname=database)
        connection.autocommit = True
        with contextlib.closing(connection), connection.cursor() as cursor:
            cursor.execute(query)
            return cursor.fetchall() if cursor.description else []

    def _run(self, program: str, *arguments: str) -> None:
        command: Sequence[str] = [str(self.programs / program), *arguments]
        who = {} if os.geteuid() else {"user": self.user, "group": pwd.getpwnam(self.user).pw_gid, "extra_groups": []}
        with (self.directory / f"{program}.out").open("ab") as out:  # a pipe would be held open by the server
            done = subprocess.run(command, cwd=self.directory, stdout=out, stderr=out, check=False, timeout=60, **who)
        assert done.returncode == 0, (self.directory / f"{program}.out").read_text() + (self.directory / "log").read_text()


@contextlib.contextmanager
def postgres_cluster() -> Iterator[Postgres]:
    """Make a cluster, start it, and remove it at the end.

    Its directory is not under pytest's: that one lets nobody else in, and PostgreSQL does not run as root.
    """
    pytest.importorskip("dagster_postgres", reason="needs the extra `postgres`")
    programs = postgres_programs()
    user = pwd.getpwuid(os.geteuid()).pw_name if os.geteuid() else "postgres"
    with tempfile.TemporaryDirectory(prefix="gristmill-postgres-") as name:
        directory = Path(name)
        (directory / "log").touch()
        if os.geteuid() == 0:
            for path in (directory, directory / "log"):
                shutil.chown(path, user, pwd.getpwnam(user).pw_gid)
        server = Postgres(programs, directory, free_port(), user)
        server._run("initdb", "-D", "data", "-U", user, "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync")
        server.start()
        try:
            yield server
        finally:
            server.stop()
