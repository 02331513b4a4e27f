"""What happens by itself: a report that is refreshed, a corpus that grows old, a failed run that is told."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from typing import Any

import dagster as dg
import pytest

from assets_defs import alerts
from assets_defs.corpus import MONTHLY
from assets_defs.definitions import defs
from assets_defs.report import EVALUATED

EVALUATIONS = ("evaluation", "task_evaluation", "classification", "comparison")
TOKEN = "token-that-nobody-is-to-see"


class Hook:
    """An HTTP server that keeps what it is sent."""

    def __init__(self, status: int = 200) -> None:
        taken: list[dict[str, Any]] = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                taken.append({"path": self.path, "type": self.headers["Content-Type"], "body": body})
                self.send_response(status)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                return

        self.taken = taken
        self.server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}/services/{TOKEN}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def hook() -> Iterator[Hook]:
    hook = Hook()
    yield hook
    hook.server.shutdown()
    hook.server.server_close()


@dg.asset(partitions_def=dg.StaticPartitionsDefinition(["tiny"]))
def doomed() -> None:
    """Fails with a message that holds what must not be told."""
    raise dg.Failure(f"no answer from postgres://mill:hunter2@db/gristmill with {TOKEN}\nand more on a second line", allow_retries=False)


@pytest.fixture(scope="module")
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as instance:
        yield instance


def failed(instance: dg.DagsterInstance) -> dg.RunFailureSensorContext:
    """Return the context in which the sensor sees a run of `doomed` that has failed."""
    result = dg.materialize([doomed], instance=instance, partition_key="tiny", raise_on_error=False)
    event = next(event for event in reversed(result.all_events) if event.is_run_failure)
    return dg.build_run_status_sensor_context(
        sensor_name="alert_on_failure", dagster_instance=instance, dagster_run=result.dagster_run, dagster_event=event
    ).for_run_failure()


def test_a_failed_run_is_sent_without_its_secrets(instance: dg.DagsterInstance, hook: Hook, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRISTMILL_WEBHOOK", hook.address)
    monkeypatch.setenv("GRISTMILL_UI", "https://mill.example/")
    monkeypatch.setenv("HUB_TOKEN", TOKEN)
    context = failed(instance)
    alerts.alert_on_failure(context)
    (sent,) = hook.taken
    run = context.dagster_run.run_id
    assert sent["type"] == "application/json"
    assert sent["body"] == {
        "run_id": run,
        "job": context.dagster_run.job_name,
        "asset": "doomed",
        "partition": "tiny",
        "error": "no answer from postgres://***@db/gristmill with ***",
        "link": f"https://mill.example/runs/{run}",
    }


def test_a_hook_that_refuses_or_is_none_does_not_fail_the_sensor(
    instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    refusing = Hook(status=500)
    closed = refusing.address.replace(str(refusing.server.server_port), "9")
    for address in ("", refusing.address, closed, f"file:///{TOKEN}"):
        monkeypatch.setenv("GRISTMILL_WEBHOOK", address)
        alerts.alert_on_failure(failed(instance))
    refusing.server.shutdown()
    refusing.server.server_close()
    assert len(refusing.taken) == 1
    assert "did not take the alert" in (said := capfd.readouterr().err) and f"/services/{TOKEN}" not in said


def test_a_report_is_refreshed_when_an_evaluation_of_its_recipe_lands() -> None:
    with dg.DagsterInstance.ephemeral() as instance:

        def requested(cursor: object = None) -> tuple[set[str], object]:
            found = dg.evaluate_automation_conditions(
                defs=defs, instance=instance, asset_selection=dg.AssetSelection.assets("report"), cursor=cursor
            )
            return set(found.get_requested_partitions(dg.AssetKey("report")) or ()), found.cursor

        def landed(asset: str, recipe: str) -> None:
            instance.report_runless_asset_event(dg.AssetMaterialization(asset, partition=recipe))

        found, cursor = requested()
        assert found == set()
        for asset in EVALUATIONS[:-1]:
            landed(asset, "tiny")
        landed("raw_corpus", "wiki|2026-01-01")
        found, cursor = requested(cursor)
        assert found == set(), "one is missing still"
        landed(EVALUATIONS[-1], "tiny")
        found, cursor = requested(cursor)
        assert found == {"tiny"}
        found, cursor = requested(cursor)
        assert found == set(), "once"
        landed("raw_corpus", "wiki|2026-02-01")
        found, cursor = requested(cursor)
        assert found == set(), "a new month is none of its business"
        landed("evaluation", "tiny")
        assert requested(cursor)[0] == {"tiny"}
    assert {key.to_user_string() for key in EVALUATED.resolve(defs.resolve_asset_graph())} == set(EVALUATIONS)


def test_a_corpus_has_to_be_fresh_after_the_schedule_and_nothing_starts_by_itself() -> None:
    repository = defs.get_repository_def()
    assert repository.asset_graph.get(dg.AssetKey("raw_corpus")).freshness_policy == MONTHLY
    assert repository.get_schedule_def("monthly_snapshot").cron_schedule == "0 3 2 * *", "33 hours before the deadline"
    assert [sensor.name for sensor in repository.sensor_defs if sensor.default_status.value == "RUNNING"] == ["lost_runs"]
