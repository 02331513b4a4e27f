"""A real `dagster dev` in a project of its own, driven through GraphQL.

Runs, backfills, a cancelled run, one re-executed from its failure, a schedule that ticks, and the sensor before and after a restart.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import psutil
import pytest
from dev_location import ENOUGH, SCHEDULED
from small_world import sample_texts

from benchmarks.dagster_dev import (
    CANCEL,
    REEXECUTE,
    REPOSITORY,
    ROOT,
    RUNS,
    SCHEDULE_TICKS,
    SENSOR_STATE,
    START_SCHEDULE,
    START_SENSOR,
    STOP_SCHEDULE,
    STOP_SENSOR,
    TRY_SCHEDULE,
    TRY_SENSOR,
    DagsterDev,
    tags,
)

pytestmark = pytest.mark.slow

DOMAINS = ("code", "techdoc", "wiki")  # those of recipes/tiny.yaml
MONTHS = ("2026-01-01", "2026-02-01", "2026-03-01")
DOCUMENTS = 20
"""Per domain and month."""
BACKFILLED = tuple(f"techdoc|{month}" for month in MONTHS)
LAUNCHED = "wiki|2026-01-01"
CHANGED, CHANGED_WHILE_DOWN = "code|2026-02-01", "code|2026-03-01"
STRICT = tuple(f"{domain}|2026-01-01" for domain in DOMAINS)
"""What strict_count[tiny] takes; the first of them holds too few documents."""
WHOLE, MISSING = "techdoc|2026-02-01", "techdoc|2026-03-01"
LARGE = "wiki|2026-03-01"
LARGE_CHARACTERS = 8_000_000
"""Seconds of cleaning."""
SCHEDULE = {**REPOSITORY, "scheduleName": "monthly_snapshot"}
EVERY_MINUTE = {**REPOSITORY, "scheduleName": "every_minute"}
SENSOR = {**REPOSITORY, "sensorName": "new_source_files"}

PROJECT = """\
name: small
first_snapshot: "2026-01-01"
snapshots: ["2026-01-01", "2026-02-01", "2026-03-01"]
fit_on: ["2026-01-01"]
source: jsonl
source_settings: {paths: ["texts/{domain}/{snapshot}.jsonl"]}
quality: {gopher_quality: {num_words: 10}}
toxicity: {toxic_words: {}}
tokenizer: {vocabulary_size: 512}
domains: {code: {}, techdoc: {}, wiki: {}}
"""


def source_file(directory: Path, partition: str, *, folder: str = "texts") -> Path:
    return directory / folder / f"{partition.replace('|', '/')}.jsonl"


def write_texts(path: Path, texts: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"id": f"{path.stem}-{n}", "text": text}) + "\n" for n, text in enumerate(texts)))


def add_document(path: Path) -> None:
    """Append a document to a source file."""
    with path.open("a") as file:
        file.write(json.dumps({"id": "late", "text": "def late():\n    return 'a document that came after the first tick'\n" * 8}) + "\n")


def write_project(directory: Path) -> None:
    """Write three domains of real text over three months, one file for each, and what strict_corpus reads."""
    directory.mkdir()
    shutil.copy(ROOT / "dagster.yaml", directory)
    workspace = (ROOT / "workspace.yaml").read_text()
    assert "assets_defs.definitions" in workspace
    (directory / "workspace.yaml").write_text(workspace.replace("assets_defs.definitions", "dev_location"))
    (directory / "recipes").mkdir()
    shutil.copy(ROOT / "recipes" / "tiny.yaml", directory / "recipes")
    (directory / "project.yaml").write_text(PROJECT)
    for domain in DOMAINS:
        texts = sample_texts(domain, DOCUMENTS * len(MONTHS), 600)
        for number, month in enumerate(MONTHS):
            write_texts(source_file(directory, f"{domain}|{month}"), texts[number * DOCUMENTS : (number + 1) * DOCUMENTS])
    for number, key in enumerate((*STRICT, WHOLE)):
        write_texts(source_file(directory, key, folder="strict"), sample_texts(key.split("|")[0], ENOUGH - (number == 0), 600))
    texts = sample_texts("wiki", DOCUMENTS, 20_000)
    write_texts(source_file(directory, LARGE, folder="strict"), texts * (LARGE_CHARACTERS // sum(map(len, texts)) + 1))


def scheduled(dev: DagsterDev) -> list[str]:
    """Return the runs that the schedule of every minute has launched."""
    ticks = dev.ask(SCHEDULE_TICKS, s=EVERY_MINUTE)["scheduleState"]["ticks"]
    assert not [tick["error"] for tick in ticks if tick["error"]], ticks
    return [run for tick in ticks for run in tick["runIds"]]


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DagsterDev]:
    """A running `dagster dev`; its sensor is on and has a baseline, after which one source file was given a document.

    Sensor and schedule tick once a minute and the backfill daemon looks every half: what the tests wait for is started here.
    """
    directory = tmp_path_factory.mktemp("dagster_dev").resolve() / "project"
    write_project(directory)
    dev = DagsterDev(directory, modules=ROOT / "tests")
    left: list[int] = []
    try:
        dev.wait_until_loaded()
        dev.sensor_id = dev.ask(START_SENSOR, s=SENSOR)["sensorState"]["id"]  # type: ignore[attr-defined]
        every_minute = dev.ask(START_SCHEDULE, s=EVERY_MINUTE)["scheduleState"]["id"]
        dev.plain_backfill = dev.backfill({"raw_corpus": BACKFILLED})  # type: ignore[attr-defined]
        dev.gated_backfill = dev.backfill({"strict_corpus": STRICT, "strict_count": ["tiny"]})  # type: ignore[attr-defined]
        dev.failing = dev.launch(["strict_corpus", "strict_cleaned"], WHOLE, MISSING)  # type: ignore[attr-defined]
        dev.wait_for("first tick of the sensor", 90, lambda: dev.ticks(SENSOR))
        add_document(source_file(directory, CHANGED))
        dev.scheduled = dev.wait_for("tick of the schedule", 90, lambda: scheduled(dev))  # type: ignore[attr-defined]
        assert dev.ask(STOP_SCHEDULE, id=every_minute)["scheduleState"]["status"] == "STOPPED"
        yield dev
    finally:
        left = dev.stop()
    assert not left, f"processes outlived dagster dev: {left}\n{dev.tail()}"


def test_a_launched_asset_has_metadata_and_check_results(dev: DagsterDev) -> None:
    run = dev.launch(["raw_corpus"], LAUNCHED)
    dev.finished_run(run)
    found, manifest = dev.latest("raw_corpus", LAUNCHED), dev.store.current("raw_corpus", LAUNCHED)
    assert found["run"] == run
    assert found["metadata"]["documents_in"] == found["metadata"]["kept"] == DOCUMENTS == manifest.counts["kept"]
    assert found["metadata"]["path"] == str(manifest.directory)
    assert "/runs/" in found["metadata"]["mlflow_run"]
    assert found["tags"]["dagster/data_version"] == manifest.fingerprint
    results = {one["checkName"]: one["success"] for event in dev.events(run) if (one := event.get("evaluation"))}
    assert results == dict.fromkeys(("documents_conserved", "ids_unique", "text_present", "input_whole"), True)


def test_a_run_that_is_cancelled_ends_and_leaves_nothing(dev: DagsterDev) -> None:
    run = dev.launch(["strict_corpus", "strict_cleaned"], LARGE)
    dev.wait_for("text being cleaned", 90, lambda: list(dev.directory.glob(".gristmill/staging/strict_cleaned-*/*")))
    worker = dev.worker_of(run)
    assert psutil.pid_exists(worker)
    assert dev.ask(CANCEL, run=run)["__typename"] == "TerminateRunSuccess"
    assert dev.ended_run(run, 90)["status"] == "CANCELED"
    dev.wait_for("end of its process", 60, lambda: not psutil.pid_exists(worker))
    assert dev.store.is_current("strict_corpus", LARGE) and not dev.store.is_current("strict_cleaned", LARGE)
    assert not list(dev.directory.glob(".gristmill/staging/strict_*"))
    for lock in dev.directory.glob(".gristmill/locks/strict_*"):
        with lock.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_failed_run_is_re_executed_for_what_is_missing_alone(dev: DagsterDev) -> None:
    run = dev.failing  # type: ignore[attr-defined]
    ended = dev.ended_run(run)
    assert ended["status"] == "FAILURE" and f"strict_corpus[{MISSING}]: no file matches" in ended["failures"], ended
    first = dev.store.current("strict_corpus", WHOLE)
    assert dev.latest("strict_corpus", WHOLE)["metadata"]["cache"] == "computed", "the other partition is kept and recorded"
    write_texts(source_file(dev.directory, MISSING, folder="strict"), sample_texts("techdoc", ENOUGH, 700))
    again = dev.ask(REEXECUTE, run=run)
    assert again["__typename"] == "LaunchRunSuccess", again
    dev.finished_run(again["run"]["runId"])
    wanted = [(asset, key) for asset in ("strict_corpus", "strict_cleaned") for key in (WHOLE, MISSING)]
    found = {one: dev.latest(*one)["metadata"]["cache"] for one in wanted}
    assert found.pop(("strict_corpus", WHOLE)) == "hit" and set(found.values()) == {"computed"}, found
    assert dev.store.current("strict_corpus", WHOLE).provenance == first.provenance


def test_a_backfill_materializes_each_of_its_partitions(dev: DagsterDev) -> None:
    assert dev.ended_backfill(dev.plain_backfill) == "COMPLETED_SUCCESS", dev.tail()  # type: ignore[attr-defined]
    runs = set()
    for partition in BACKFILLED:
        found, manifest = dev.latest("raw_corpus", partition), dev.store.current("raw_corpus", partition)
        assert found["metadata"]["kept"] == DOCUMENTS
        assert found["metadata"]["path"] == str(manifest.directory)
        assert found["tags"]["dagster/data_version"] == manifest.fingerprint
        assert found["tags"]["dagster/partition/snapshot"] == partition.partition("|")[2]
        runs.add(found["run"])
    assert len(runs) == 1, "one run holds the whole backfill"


def test_a_backfill_over_two_partition_spaces_stops_at_a_failed_audit(dev: DagsterDev) -> None:
    assert dev.ended_backfill(dev.gated_backfill) == "COMPLETED_FAILED", dev.tail()  # type: ignore[attr-defined]
    assert dev.store.partitions("strict_corpus")[:2] != list(STRICT[:2]) and not dev.store.is_current("strict_corpus", STRICT[0])
    assert not dev.store.is_current("strict_count", "tiny") and not dev.ask(RUNS, partition="tiny")["results"], "it was not even tried"
    asked = dev.ended_run(dev.launch(["strict_count"], "tiny"))
    assert asked["status"] == "FAILURE" and not dev.store.is_current("strict_count", "tiny")
    assert f"lacks {STRICT[0]}: the last attempt at strict_corpus[{STRICT[0]}] failed its audit" in asked["failures"]


def test_the_monthly_schedule_starts_and_asks_for_the_newest_snapshot_of_every_domain(dev: DagsterDev) -> None:
    started = dev.ask(START_SCHEDULE, s=SCHEDULE)["scheduleState"]
    assert started["status"] == "RUNNING"
    assert dev.ask(STOP_SCHEDULE, id=started["id"])["scheduleState"]["status"] == "STOPPED"
    tick = dev.ask(TRY_SCHEDULE, s=SCHEDULE, t=datetime(2026, 4, 1, tzinfo=UTC).timestamp())
    assert not tick["evaluationResult"]["error"], tick
    requests = tick["evaluationResult"]["runRequests"]
    assert sorted(tags(request)["dagster/partition"] for request in requests) == [f"{domain}|2026-03-01" for domain in DOMAINS]


def test_a_schedule_ticks_and_launches(dev: DagsterDev) -> None:
    (run,) = dev.scheduled  # type: ignore[attr-defined]
    assert dev.finished_run(run)["tags"]["dagster/schedule_name"] == "every_minute"
    assert dev.latest("duplicate_signatures", SCHEDULED)["run"] == run


def test_the_sensor_launches_the_changed_file_and_nothing_else_once_also_after_a_restart(dev: DagsterDev) -> None:
    def launched() -> list[str]:
        return [run for tick in dev.ticks(SENSOR) for run in tick["runIds"]]

    (first,) = dev.wait_for("tick that launches", 120, launched)
    assert dev.finished_run(first, 180)["tags"]["dagster/partition"] == CHANGED
    assert dev.store.current("raw_corpus", CHANGED).counts["kept"] == DOCUMENTS + 1
    for asset in ("cleaned_corpus", "duplicate_signatures"):
        assert dev.store.partitions(asset) == sorted([CHANGED, SCHEDULED])
        assert dev.latest(asset, CHANGED)["run"] == first

    cursor = dev.ask(SENSOR_STATE, s=SENSOR)["sensorState"]["typeSpecificData"]["lastCursor"]
    again = dev.ask(TRY_SENSOR, s=SENSOR, c=cursor)["evaluationResult"]
    assert not again["error"] and not again["runRequests"] and "no new or changed" in again["skipReason"], again
    path = source_file(dev.directory, CHANGED)
    changed = path.read_text()
    path.write_text("".join(changed.splitlines(keepends=True)[:DOCUMENTS]))
    reverted = dev.ask(TRY_SENSOR, s=SENSOR, c=cursor)["evaluationResult"]
    assert [tags(request)["dagster/partition"] for request in reverted["runRequests"]] == [CHANGED], "back to its first content: a change"
    path.write_text(changed)

    assert not dev.stop(), dev.tail()
    add_document(source_file(dev.directory, CHANGED_WHILE_DOWN))
    dev.start()
    dev.wait_until_loaded()
    second = dev.wait_for("tick that launches after the restart", 120, lambda: [run for run in launched() if run != first])
    assert len(second) == 1
    assert dev.finished_run(second[0], 180)["tags"]["dagster/partition"] == CHANGED_WHILE_DOWN
    assert dev.ask(STOP_SENSOR, id=dev.sensor_id)["instigationState"]["status"] == "STOPPED"  # type: ignore[attr-defined]
    assert sorted(launched()) == sorted([first, *second])
    assert [run["runId"] for run in dev.ask(RUNS, partition=CHANGED)["results"]] == [first], "not launched again"
