"""What is said of a run that failed: a line in the log, and a JSON object sent to the address in GRISTMILL_WEBHOOK.

The address comes from the environment alone and is shown nowhere: such addresses hold tokens. GRISTMILL_UI is where links point to.
"""

import json
import os
import re
import urllib.request
from collections.abc import Mapping

import dagster as dg

WEBHOOK = "GRISTMILL_WEBHOOK"
UI = "GRISTMILL_UI"
SECONDS = 10
MAX_CHARACTERS = 500
CREDENTIALS = re.compile(r"(://)[^/\s@]+@")
SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_?KEY|WEBHOOK", re.IGNORECASE)
MIN_SECRET = 6
"""Characters: shorter values stand in ordinary text."""
PARTITION_TAGS = ("dagster/partition", "dagster/asset_partition_range_start")


@dg.run_failure_sensor(
    name="alert_on_failure",
    minimum_interval_seconds=30,
    default_status=dg.DefaultSensorStatus.RUNNING if os.environ.get(WEBHOOK) else dg.DefaultSensorStatus.STOPPED,
    description="Logs every run that failed and sends it to GRISTMILL_WEBHOOK; on from the start where that is set.",
)
def alert_on_failure(context: dg.RunFailureSensorContext) -> None:
    """Say of a failed run which asset and partition it was, and the first line of its error."""
    found = alert(context)
    context.log.error(f"run {found['run_id']} of {found['job']} failed: {found['asset']}[{found['partition']}]: {found['error']}")
    address = os.environ.get(WEBHOOK)
    if not address:
        return
    try:
        send(address, found)
    except (OSError, ValueError) as error:
        # its text may hold the address
        context.log.warning(f"GRISTMILL_WEBHOOK did not take the alert of run {found['run_id']}: {type(error).__name__}")


def alert(context: dg.RunFailureSensorContext) -> dict[str, str | None]:
    """Return what is sent: run, job, asset, partition, the first line of the error and a link to the run."""
    run, steps = context.dagster_run, context.get_step_failure_events()
    error = context.failure_event.message or ""
    if steps and (data := steps[0].step_failure_data):
        own = data.user_failure_data.description if data.user_failure_data else None
        error = own or _root(data.error)
    ui = os.environ.get(UI, "http://127.0.0.1:3000").rstrip("/")
    return {
        "run_id": run.run_id,
        "job": run.job_name,
        "asset": steps[0].step_key if steps else None,
        "partition": next((run.tags[tag] for tag in PARTITION_TAGS if tag in run.tags), None),
        "error": first_line(error),
        "link": f"{ui}/runs/{run.run_id}",
    }


def first_line(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """Return the first line of `text`, without what the environment calls secret and without credentials in addresses."""
    line = CREDENTIALS.sub(r"\1***@", next((line.strip() for line in text.splitlines() if line.strip()), ""))
    for name, value in environment.items():
        if SECRET_NAME.search(name) and len(value) >= MIN_SECRET:
            line = line.replace(value, "***")
    return line[:MAX_CHARACTERS]


def send(address: str, content: Mapping[str, str | None]) -> None:
    """POST `content` as JSON to `address`.

    Raises:
        OSError: no answer within `SECONDS`, or one that is an error.
        ValueError: `address` is none of HTTP.
    """
    if not address.startswith(("http://", "https://")):
        raise ValueError("not an address of HTTP")
    request = urllib.request.Request(address, json.dumps(content).encode(), {"Content-Type": "application/json"}, method="POST")
    with urllib.request.urlopen(request, timeout=SECONDS) as answer:
        answer.read()


def _root(error: object) -> str:
    """Return the message of the error that the others were raised from."""
    while getattr(error, "cause", None):
        error = error.cause  # type: ignore[attr-defined]
    return str(getattr(error, "message", ""))
