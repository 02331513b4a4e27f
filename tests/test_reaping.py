"""Runs whose process is gone are ended, and nothing else is; what they hold in pools is free again. On a real Dagster instance."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest
from dagster import DagsterInstance, DagsterRunStatus

from assets_defs.children import gpus_of_one
from assets_defs.reaping import PROCESS_TAG, process_tag, reap, remind
from pipelines.manifests import Outcome
from pipelines.plan import Phase, TrainingSettings
from pipelines.plugins import Settings
from pipelines.store import Build

STARTED, CANCELING, STARTING = DagsterRunStatus.STARTED, DagsterRunStatus.CANCELING, DagsterRunStatus.STARTING


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[DagsterInstance]:
    with DagsterInstance.local_temp(str(tmp_path)) as instance:
        yield instance


def ended_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@dg.job
def nothing() -> None:
    """A job without steps."""


def started(instance: DagsterInstance, status: DagsterRunStatus, process: str | None = None) -> str:
    """Return the id of a run that is recorded as under way, in `process`."""
    run_id = instance.create_run_for_job(nothing, status=status).run_id
    if process:
        instance.add_run_tags(run_id, {PROCESS_TAG: f"{run_id} {socket.gethostname()} {process}"})
    return run_id


def living() -> str:
    """Return this process as the tag says it."""
    return " ".join(process_tag("run")[PROCESS_TAG].split(" ")[2:])


@pytest.mark.parametrize(("status", "then"), [(STARTED, "FAILURE"), (STARTING, "FAILURE"), (CANCELING, "CANCELED")])
def test_a_run_whose_process_is_gone_is_ended(instance: DagsterInstance, status: DagsterRunStatus, then: str) -> None:
    run = started(instance, status, f"{ended_process()} 1")
    assert reap(instance) == [f"run {run} was lost"]
    assert instance.get_run_by_id(run).status.value == then
    assert reap(instance) == []


def test_a_run_whose_process_lives_goes_on(instance: DagsterInstance) -> None:
    run = started(instance, STARTED, living())
    assert reap(instance) == [] and instance.get_run_by_id(run).status == STARTED


def test_the_number_of_a_process_may_have_been_given_again(instance: DagsterInstance) -> None:
    run = started(instance, STARTED, f"{os.getpid()} 1")
    assert reap(instance) == [f"run {run} was lost"]


def test_a_retry_has_the_tags_of_the_lost_run_and_is_not_lost(instance: DagsterInstance) -> None:
    lost = started(instance, STARTED, f"{ended_process()} 1")
    retry = instance.create_run_for_job(nothing, status=STARTED, tags=dict(instance.get_run_by_id(lost).tags)).run_id
    assert reap(instance) == [f"run {lost} was lost"]
    assert instance.get_run_by_id(retry).status == STARTED


def test_a_run_that_has_not_begun_a_step_is_known_by_what_dagster_says(instance: DagsterInstance) -> None:
    from dagster._core.events import EngineEventData

    runs = {}
    for pid in (ended_process(), os.getpid()):
        runs[pid] = started(instance, STARTED)
        instance.report_engine_event("Started process", instance.get_run_by_id(runs[pid]), EngineEventData.in_process(pid))
    unknown = started(instance, STARTING)
    gone, here = runs.values()
    assert reap(instance) == [f"run {gone} was lost"]
    assert [instance.get_run_by_id(run).status for run in (here, unknown)] == [STARTED, STARTING]


def failures(instance: DagsterInstance, run: str) -> int:
    return len(instance.get_records_for_run(run, of_type=dg.DagsterEventType.RUN_FAILURE).records)


def test_a_retry_that_dagster_has_passed_over_is_asked_for_once_more(instance: DagsterInstance) -> None:
    forgotten, retried, final = (started(instance, STARTED) for _ in range(3))
    for run in (forgotten, retried, final):
        instance.report_run_failed(instance.get_run_by_id(run), "lost")
        instance.add_run_tags(run, {"dagster/will_retry": str(run != final).lower()})
    instance.add_run_tags(retried, {"dagster/auto_retry_run_id": "another"})
    assert remind(instance) == [], "the daemon is given time"
    assert remind(instance, seconds=0.0) == [f"run {forgotten} was to be started again"]
    assert [failures(instance, run) for run in (forgotten, retried, final)] == [2, 1, 1]
    assert remind(instance, seconds=0.0) == [] and failures(instance, forgotten) == 2


def test_what_a_lost_run_holds_in_a_pool_is_free_again(instance: DagsterInstance) -> None:
    storage = instance.event_log_storage
    storage.set_concurrency_slots("accelerator", 1)
    lost = started(instance, STARTED, f"{ended_process()} 1")
    waiting = started(instance, STARTED, living())
    assert storage.claim_concurrency_slot("accelerator", lost, "train").is_claimed
    assert not storage.claim_concurrency_slot("accelerator", waiting, "train").is_claimed
    assert reap(instance) == [f"run {lost} was lost", f"run {lost} left its place in a pool"]
    assert storage.claim_concurrency_slot("accelerator", waiting, "train").is_claimed


def trains(**settings: object) -> Build:
    phases = (Phase(tokens=1, learning_rate=0.1),)
    return Build("mixture_probe", lambda *_: Outcome(), TrainingSettings(phases=phases, **settings))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("visible", "builds", "found"),
    [
        ("0,2,GPU-1a", [trains()] * 5, ["0", "2", "GPU-1a"]),
        ("0,1", [trains(), trains(processes=2)], [None]),
        ("0,1", [trains(device="cpu")] * 3, [None] * 3),
        ("0,1", [Build("evaluation", lambda *_: Outcome(), Settings())] * 3, ["0", "1"]),
        ("", [trains()] * 2, [None] * 2),
    ],
)
def test_trainings_of_one_step_take_a_gpu_each(
    visible: str, builds: list[Build], found: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpus_of_one(builds) == found
