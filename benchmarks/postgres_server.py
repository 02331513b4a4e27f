"""A PostgreSQL cluster of its own, of one user and no password: what tests of services and the fault drill start, cut and stop."""

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


def free_port() -> int:
    """Return a port of 127.0.0.1 that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def postgres_programs() -> Path | None:
    """Return the directory of PostgreSQL's server programs, None where there are none."""
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
        if done.returncode:
            words = (self.directory / f"{program}.out").read_text() + (self.directory / "log").read_text()
            raise RuntimeError(f"{program} ended with exit code {done.returncode}: {words[-2000:]}")


@contextlib.contextmanager
def postgres_cluster(programs: Path) -> Iterator[Postgres]:
    """Make a cluster, start it, and remove it at the end.

    Its directory is one that others may enter: PostgreSQL does not run as root.
    """
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
