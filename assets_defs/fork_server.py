"""A process that has imported what a child needs, and forks one for each artifact: PyTorch and transformers are imported once a run.

    python -m assets_defs.fork_server FILE_DESCRIPTOR MODULE

is that process, started with the first child of a step or of a run and ended with the process that started it. A `Forked` has the
methods of `subprocess.Popen` that a step uses of its child, and is what a child started by itself would be: in a session of its own,
with the environment, the directory, the output and the search path of the step, and it ends with its parent. CUDA does not survive a
fork, so nothing here asks for a device, and where there is one children are started by themselves (`is_of_use`).
"""

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import os
import select
import selectors
import signal
import socket
import subprocess
import sys
import warnings
from collections.abc import Mapping
from multiprocessing.util import Finalize
from pathlib import Path

from assets_defs import child
from pipelines.engine import die_with_parent
from pipelines.interruption import EXIT_CODE

PRELOADED = (
    "pipelines.evaluation",
    "pipelines.probing",
    "pipelines.task_evaluation",
    "pipelines.trainer",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
)
"""What most children import, and all that takes them seconds."""
UNREAD = ("DAGSTER_", "MLFLOW_", "KMP_DUPLICATE_LIB_OK", child.PARENT)
"""Beginnings of the variables that no import of a child reads, and that steps and libraries set: a child is told of them when it is
forked. Another value of any other variable needs another server."""
OUTPUT = (1, 2)
PR_SET_NAME = 15
NAME = "gristmill-child"
"""Of the children, where the system lists processes: their command is that of the server."""
KILLED = -signal.SIGKILL
DEVICES = (Path("/dev/nvidiactl"), Path("/dev/kfd"), Path("/dev/dxg"))
"""Of NVIDIA's driver, of AMD's, and of Windows' under WSL."""


def is_of_use() -> bool:
    """Return whether children can be forked here: on Linux 5.3 or later, and where there is no accelerator."""
    if sys.platform != "linux" or any(path.exists() for path in DEVICES):
        return False
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (AttributeError, OSError):
        return False
    return True


class Forked:
    """A child of the server.

    Args:
        connection: to the server, which says how the child ended, and to the child, which waits there for its request.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._lines = connection.makefile("rw", encoding="utf-8")
        first = self._lines.readline()
        if not first:
            raise ConnectionResetError("the process that forks children has ended")
        self.pid = int(first)
        """Leads a session of its own."""
        self.returncode: int | None = None
        self._end = _end_of(self.pid)

    def begin(self, request: Mapping[str, object]) -> None:
        """Have the child begin."""
        self._lines.write(json.dumps(request) + "\n")
        self._lines.flush()

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal, or None while the process lives."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0.0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait until the process has ended and return its exit code.

        Raises:
            subprocess.TimeoutExpired: it has not within `timeout` seconds.
        """
        if self.returncode is None:
            with selectors.DefaultSelector() as looking:
                if self._end is not None:
                    looking.register(self._end, selectors.EVENT_READ)
                    if not looking.select(timeout):
                        raise subprocess.TimeoutExpired("a forked child", timeout or 0.0)
                    os.close(self._end)
            with self._connection, self._lines:
                self.returncode = int(self._lines.readline() or KILLED)  # no word where the server was killed too
        return self.returncode

    def terminate(self) -> None:
        """Ask the process to end."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGTERM)


class ForkServer:
    """The server process of this one, for children in `environment` that call `main` of `module`."""

    def __init__(self, environment: Mapping[str, str], module: str = child.__name__) -> None:
        self.environment = shared(environment)
        self.owner = os.getpid()
        self._connection, far = socket.socketpair()
        with far:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "assets_defs.fork_server", str(far.fileno()), module],
                env=self.environment,
                pass_fds=[far.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        self.end = Finalize(self, _close, (self._connection, self.process), exitpriority=10)
        """Ends the server, and with it the children that it still has; at the latest when this process ends."""

    def fork(self, environment: Mapping[str, str]) -> Forked:
        """Return a new child in `environment`.

        Raises:
            OSError: the server has ended.
        """
        near, far = socket.socketpair()
        with far:
            socket.send_fds(self._connection, [b"f"], [far.fileno(), *OUTPUT])
        forked = Forked(near)
        forked.begin({"environment": dict(environment), "directory": str(Path.cwd()), "path": sys.path})
        return forked


def _close(connection: socket.socket, process: subprocess.Popen[bytes]) -> None:
    connection.close()
    process.terminate()
    process.wait()


_server: ForkServer | None = None


def prepare_server(environment: Mapping[str, str]) -> ForkServer:
    """Return this process's server for children in `environment`, started where there is none."""
    global _server
    if _server and _server.owner == os.getpid():
        if _server.process.poll() is None and _server.environment == shared(environment):
            return _server
        _server.end()
    _server = ForkServer(environment)
    return _server


def forked_child(environment: Mapping[str, str]) -> Forked:
    """Return a new child in `environment`."""
    server = prepare_server(environment)
    try:
        return server.fork(environment)
    except OSError:  # it was killed: a new one takes its place
        server.end()
    return prepare_server(environment).fork(environment)


def shared(environment: Mapping[str, str]) -> dict[str, str]:
    """Return what of `environment` all children of one server have."""
    return {name: value for name, value in environment.items() if not name.startswith(UNREAD)}


def _end_of(pid: int) -> int | None:
    """Return a file descriptor that is readable once process `pid` has ended, or None where it was gone before."""
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None


def main() -> int:
    """Fork a child for each request until the other side is gone; return the exit code of what this process has become."""
    die_with_parent()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)  # a parent started in the background may hand on that they are ignored
    atexit.register(_leave)  # before any other, so that it is called last
    connection = socket.socket(fileno=int(sys.argv[1]))
    for name in PRELOADED:
        with contextlib.suppress(ImportError):  # a child that needs it says so
            importlib.import_module(name)
    gc.freeze()  # no collection of a child, nor its end, goes through what was imported, which also stays in shared memory
    children: dict[int, tuple[int, socket.socket]] = {}
    """Process and connection of each child, by what is readable once it has ended."""
    while True:
        ready, _, _ = select.select([connection.fileno(), *children], [], [])
        for end in children.keys() & set(ready):
            _say(*children.pop(end))
            os.close(end)
        if connection.fileno() not in ready:
            continue
        word, received, _, _ = socket.recv_fds(connection, 1, 1 + len(OUTPUT))
        if not word:
            os._exit(0)  # what still lives of the children ends with this process
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # the threads are of BLAS and jemalloc, which know of forks
            pid = os.fork()
        if not pid:
            connection.close()
            for end, (_, other) in children.items():
                os.close(end)
                other.close()
            return _become_child(received)
        for output in received[1:]:
            os.close(output)
        far = socket.socket(fileno=received[0])
        children[os.pidfd_open(pid)] = (pid, far)
        with contextlib.suppress(OSError):  # it was interrupted, and the child finds nobody too
            far.sendall(f"{pid}\n".encode())


def _say(pid: int, connection: socket.socket) -> None:
    """Say how process `pid`, which has ended, did."""
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with connection, contextlib.suppress(OSError):
        connection.sendall(f"{code}\n".encode())


def _become_child(received: list[int]) -> int:
    """Do in this process, which was forked, what a child does; return its exit code."""
    os.setsid()
    ctypes.CDLL(None).prctl(PR_SET_NAME, NAME.encode())
    for descriptor, output in zip(OUTPUT, received[1:], strict=True):
        os.dup2(output, descriptor)
        os.close(output)
    with socket.socket(fileno=received[0]) as connection, connection.makefile(encoding="utf-8") as lines:
        line = lines.readline()
    if not line:
        return EXIT_CODE
    request = json.loads(line)
    os.chdir(request["directory"])
    os.environ.clear()
    os.environ.update(request["environment"] | {child.PARENT: str(os.getppid())})
    sys.path[:] = request["path"]
    return importlib.import_module(sys.argv[2]).main()


_exit_code = 1
"""Of an error, until `main` returns another."""


def _leave() -> None:
    """End this process here: to take apart all that was imported would take it half a second."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(_exit_code)


if __name__ == "__main__":
    _exit_code = main()
