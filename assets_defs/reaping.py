"""Runs whose process is gone: after a power failure, or a kill of everything, Dagster would show them as started for ever.

Dagster's default launcher cannot tell, and a lost run keeps its place in the pool, so that the next training waits. `reap` reports
such runs as failed and frees what they hold; `run_retries` of dagster.yaml then starts them again, and trainings go on from
their resume points. The sensor `lost_runs` does so while a daemon runs, `gristmill run` before it begins.
"""

import os
import socket
from datetime import UTC, datetime, timedelta
from pathlib import Path

import dagster as dg
import psutil
from dagster import AssetExecutionContext

WILL_RETRY_TAG = "dagster/will_retry"
PROCESS_TAG = "gristmill/process"
"""Of a run: its id, and machine, number and start of the process that runs it. A retry has the tags of the run before it."""
REMINDED_TAG = "gristmill/reminded"
"""Of a failed run: its failure was reported once more."""
SECONDS_TO_RETRY = 25.0
"""How long Dagster's daemon, which looks every five seconds, is given to start a run again."""
UNFINISHED = [dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.CANCELING]
GONE = "the process that ran it is gone"


def process_tag(run_id: str) -> dict[str, str]:
    """Return the tag of run `run_id`, which this process runs."""
    return {PROCESS_TAG: f"{run_id} {socket.gethostname()} {os.getpid()} {_start_of(os.getpid())}"}


def tag_run(context: AssetExecutionContext) -> None:
    """Note in the run of `context` that this process runs it, once."""
    if context.run.run_id not in _tagged:
        context.instance.add_run_tags(context.run.run_id, process_tag(context.run.run_id))
        _tagged.add(context.run.run_id)


_tagged: set[str] = set()


def reap(instance: dg.DagsterInstance) -> list[str]:
    """End every run whose process on this machine is gone, free the pool slots of runs that are over; return what was done.

    A killed process does neither, and a slot that nobody holds keeps the next training waiting for ever. Where runs of several
    machines are kept in one database, each looks after those that have begun a step on it.
    """
    done = []
    for run in instance.get_runs(dg.RunsFilter(statuses=UNFINISHED)):
        if not _is_lost(instance, run):
            continue
        if run.status == dg.DagsterRunStatus.CANCELING:
            instance.report_run_canceled(run, GONE)
        else:
            instance.report_run_failed(run, GONE)
        done.append(f"run {run.run_id} was lost")
    return done + _free_slots(instance)


def remind(instance: dg.DagsterInstance, *, seconds: float = SECONDS_TO_RETRY) -> list[str]:
    """Report the failure of runs again that were to be started again `seconds` ago and were not; return what was done.

    Dagster stores that a run has failed before it says so of the run itself. Its daemon, if it looks between the two, passes over the
    run and does not come back to it: nothing would ever start it, and a backfill would wait for it for ever. Once is enough.
    """
    now = datetime.now(UTC)
    recent = dg.RunsFilter(statuses=[dg.DagsterRunStatus.FAILURE], tags={WILL_RETRY_TAG: "true"}, updated_after=now - timedelta(days=1))
    done = []
    for record in instance.get_run_records(recent):
        run = record.dagster_run
        waited = (now - record.update_timestamp.replace(tzinfo=UTC)).total_seconds()
        if run.is_complete_and_waiting_to_retry and REMINDED_TAG not in run.tags and waited >= seconds:
            instance.add_run_tags(run.run_id, {REMINDED_TAG: "true"})
            instance.report_run_failed(run, "it was to be started again, and was not")
            done.append(f"run {run.run_id} was to be started again")
    return done


def _free_slots(instance: dg.DagsterInstance) -> list[str]:
    storage = instance.event_log_storage
    keys = storage.get_concurrency_keys()
    held = {slot.run_id for key in keys for slot in storage.get_concurrency_info(key).claimed_slots}
    held |= {step.run_id for key in keys for step in storage.get_concurrency_info(key).pending_steps}
    done = []
    for run_id in sorted(held):
        run = instance.get_run_by_id(run_id)
        if run is None or run.is_finished:
            storage.free_concurrency_slots_for_run(run_id)
            done.append(f"run {run_id} left its place in a pool")
    return done


def _is_lost(instance: dg.DagsterInstance, run: dg.DagsterRun) -> bool:
    """Return whether the run's process was one of this machine and is gone."""
    one_machine = "sqlite" in type(instance.run_storage).__name__.lower()
    run_id, host, pid, start = run.tags.get(PROCESS_TAG, "- - - -").split(" ")
    if run_id == run.run_id:
        return (one_machine or host == socket.gethostname()) and _start_of(int(pid)) != start
    if not one_machine:
        return False
    found = _said_to_run(instance, run.run_id)
    return found is not None and not _was_there(*found)


def _said_to_run(instance: dg.DagsterInstance, run_id: str) -> tuple[int, float] | None:
    """Return the number of the process that Dagster started for the run, and when it said so; None where it has not."""
    for record in instance.get_records_for_run(run_id, of_type=dg.DagsterEventType.ENGINE_EVENT, limit=20).records:
        event = record.event_log_entry.dagster_event
        if event and (pid := event.engine_event_data.metadata.get("pid")):
            return int(str(pid.value)), record.event_log_entry.timestamp
    return None


def _start_of(pid: int) -> str | None:
    """Return when process `pid` started, in a form that no change of the clock changes; None where there is none."""
    stat = Path(f"/proc/{pid}/stat")
    try:
        if not Path("/proc/self/stat").exists():  # macOS
            return f"{psutil.Process(pid).create_time():.0f}"
        state, *rest = stat.read_text().rpartition(")")[2].split()
    except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
        return None
    return None if state == "Z" else rest[18]


def _was_there(pid: int, seen: float) -> bool:
    """Return whether process `pid` is there and was at the time `seen`, in seconds since 1970: numbers are given again."""
    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and process.create_time() <= seen + 5.0
    except psutil.NoSuchProcess:
        return False


@dg.sensor(
    minimum_interval_seconds=30,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Ends runs whose process is gone, after a power failure say, frees their places in pools, and sees that they are retried.",
)
def lost_runs(context: dg.SensorEvaluationContext) -> dg.SkipReason:
    """Look for lost runs at the start of the daemon, and twice a minute."""
    done = reap(context.instance) + remind(context.instance)
    return dg.SkipReason("; ".join(done) or "every started run has its process")
