"""The child process of a step as a job of a Ray cluster (extra `ray`), where GRISTMILL_TRAINING is ``ray``.

    python -m assets_defs.ray_jobs

is what the job runs: the child of `assets_defs.child`, word for word, so that the bytes are those of a local one. It speaks Dagster
Pipes with the step through the files of its session, which the nodes see at the same path, as they see the home directory. A job
outlives a step that was killed; it then holds the artifact's lock, and the step's retry waits for it and finds what it published.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from pipelines.errors import GristmillError, UnknownName
from pipelines.interruption import grace_seconds

CHOICE = "GRISTMILL_TRAINING"
"""Environment variable: where children run, ``local`` or ``ray``."""
GPUS = "GRISTMILL_RAY_GPUS"
"""Environment variable: the GPUs that a job is given; none without it."""
ADDRESS = "RAY_API_SERVER_ADDRESS"
"""Environment variable of Ray: where it takes jobs."""
DEFAULT_ADDRESS = "http://127.0.0.1:8265"
CARRIED = ("AWS_", "CUBLAS_", "DAGSTER_PIPES_", "GOMP_", "GRISTMILL_", "HF_", "MKL_", "MLFLOW_", "OMP_", "PYTHONPATH", "TOKENIZERS_")
"""Beginnings of the variables that a job gets from the step; the rest are those of its node."""
SECONDS_BETWEEN_QUESTIONS = 1.0


def is_chosen() -> bool:
    """Return whether children are to run as Ray jobs.

    Raises:
        UnknownName: GRISTMILL_TRAINING names something else.
    """
    chosen = os.environ.get(CHOICE) or "local"
    if chosen not in ("local", "ray"):
        raise UnknownName(f"place for training ({CHOICE})", chosen, ("local", "ray"))
    return chosen == "ray"


class RayJob:
    """A job with those methods of `subprocess.Popen` that a step uses of its child.

    Args:
        environment: what a local child would get; `CARRIED` says what of it goes along.

    Raises:
        GristmillError: Ray is not installed, or no cluster takes jobs at the address.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        if find_spec("ray") is None:
            raise GristmillError(f"{CHOICE}=ray needs Ray, which is not installed: make setup EXTRAS=ray, or set {CHOICE}=local")
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # as a cluster has it; its client would send none by itself
        from ray.exceptions import AuthenticationError
        from ray.job_submission import JobSubmissionClient

        address = os.environ.get(ADDRESS) or DEFAULT_ADDRESS
        # Ray gives tasks one thread where nothing is said; a local child has as many as the machine has cores.
        forget = [] if "OMP_NUM_THREADS" in environment else ["-u", "OMP_NUM_THREADS"]
        carried = {name: value for name, value in environment.items() if name.startswith(CARRIED)}
        carried["RAY_JOB_STOP_WAIT_TIME_S"] = str(int(grace_seconds()) + 1)
        gpus = float(os.environ.get(GPUS) or 0)
        try:
            self._client = JobSubmissionClient(address)
            self._id = self._client.submit_job(
                entrypoint=shlex.join(["env", *forget, sys.executable, "-m", "assets_defs.ray_jobs"]),
                runtime_env={"env_vars": carried},
                entrypoint_num_gpus=gpus or None,
            )
        except AuthenticationError as error:
            raise GristmillError(
                f"the Ray cluster at {address} does not take this machine's token; give it the cluster's (RAY_AUTH_TOKEN_PATH), or set "
                f"RAY_AUTH_MODE=disabled where the cluster has none, or {CHOICE}=local"
            ) from error
        except (ConnectionError, RuntimeError) as error:
            raise GristmillError(
                f"no Ray cluster takes jobs at {address} ({error}); start one (`ray start --head`), correct {ADDRESS}, or set "
                f"{CHOICE}=local"
            ) from error
        self._asked = 0.0
        self.returncode: int | None = None

    @property
    def pid(self) -> int:
        """Raise ProcessLookupError: the process is another machine's, or Ray's."""
        raise ProcessLookupError(f"Ray job {self._id} is no process of this step")

    def poll(self) -> int | None:
        """Return the exit code, or None while the job is not over; Ray is asked once a second."""
        if self.returncode is None and time.monotonic() - self._asked >= SECONDS_BETWEEN_QUESTIONS:
            self._asked = time.monotonic()
            self.returncode = _exit_code(self._client.get_job_info(self._id))
            if self.returncode:
                sys.stderr.write(self._client.get_job_logs(self._id))
        return self.returncode

    def terminate(self) -> None:
        """Ask the job to end; a training writes a resume point first."""
        self._client.stop_job(self._id)

    def wait(self, timeout: float | None = None) -> int:
        """Wait until the job is over and return its exit code.

        Raises:
            subprocess.TimeoutExpired: it is not within `timeout` seconds.
        """
        limit = time.monotonic() + timeout if timeout is not None else None
        while self.poll() is None:
            if limit is not None and time.monotonic() > limit:
                raise subprocess.TimeoutExpired(f"Ray job {self._id}", timeout or 0.0)
            time.sleep(0.1)
        return self.returncode or 0


def _exit_code(job: Any) -> int | None:  # noqa: ANN401  Ray's JobDetails
    """Return the exit code of `job`, that of a killed process where it was stopped, or None while it is not over."""
    status = str(job.status.value)
    if status not in ("STOPPED", "SUCCEEDED", "FAILED"):
        return None
    if status == "SUCCEEDED":
        return 0
    return -signal.SIGTERM if status == "STOPPED" else job.driver_exit_code or 1


def main() -> int:
    """Compute the artifact that the step asks for, in this job; return the exit code."""
    from assets_defs.child import PARENT
    from assets_defs.child import main as compute

    os.environ[PARENT] = str(os.getppid())  # the step is the parent of a local child; here it is Ray's supervisor of the job
    return compute()


if __name__ == "__main__":
    sys.exit(main())
