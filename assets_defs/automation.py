"""Jobs, one per partition space and stage; the monthly schedules; the sensors."""

import hashlib
import json
from collections.abc import Mapping

import dagster as dg

from assets_defs.alerts import alert_on_failure
from assets_defs.partitions import SOURCE
from assets_defs.reaping import lost_runs
from assets_defs.resources import Mill, MillResource
from pipelines.corpus import corpus_settings
from pipelines.documents import split_partition
from pipelines.errors import GristmillError
from pipelines.manifests import Json

INGESTED = ("raw_corpus", "cleaned_corpus", "duplicate_signatures")
FITTED = ("duplicate_clusters", "tokenizer", "embedder", "filter_models", "evaluation_index")
MEASURED = ("quality_scores", "toxicity_scores", "contamination", "document_embeddings", "tokenized_shards")
DECIDED = (
    "quality_filtered_corpus",
    "toxicity_filtered_corpus",
    "threshold_sweep",
    "decontaminated_corpus",
    "deduplicated_corpus",
    "age_splits",
    "selected_subset",
    "general_checkpoint",
    "probe_windows",
)
PROBED = ("mixture_probe",)
TRAINED = (
    "critical_ratio",
    "verification_probe",
    "verified_ratio",
    "domain_mixture",
    "pretrained_checkpoint",
    "evaluation",
    "task_evaluation",
    "classification",
    "comparison",
    "report",
)
COMPARED = ("recipes_report",)


def _job(name: str, assets: tuple[str, ...], description: str):  # noqa: ANN202 - dagster does not export the type
    return dg.define_asset_job(name, selection=list(assets), description=description)


ingest = _job("ingest", INGESTED, "By source: read, clean and sign.")
fit = _job("fit", FITTED, "Once: near-duplicate clusters with held-out split, tokenizer, embedder, fitted filters, evaluation texts.")
measure = _job("measure", MEASURED, "By source: score, look for evaluation texts, embed and tokenize, after `fit`.")
ingest_and_measure = _job("ingest_and_measure", INGESTED + MEASURED, "By source, everything: what a new snapshot needs once `fit` has run.")
decide = _job(
    "decide", DECIDED, "By recipe: filter, decontaminate, deduplicate, split by age, select, train the general checkpoint and measure it."
)
probe = _job("probe", PROBED, "By recipe and probe: train at one target share.")
train = _job(
    "train", TRAINED, "By recipe: critical ratio and the run that verifies it, mixture, pretrained checkpoint, evaluation, report."
)

compare = _job("compare", COMPARED, "Over all recipes that were evaluated: the page that sets them side by side.")

JOBS = (ingest, fit, measure, ingest_and_measure, decide, probe, train, compare)
STAGES = (
    ("ingest", INGESTED),
    ("fit", FITTED),
    ("measure", MEASURED),
    ("decide", DECIDED),
    ("probe", PROBED),
    ("train", TRAINED),
    ("compare", COMPARED),
)
"""The order in which `gristmill run` drives the graph: one Dagster job cannot span two partition spaces."""
OVER_ALL = "compare"
"""The stage that has no partition of a recipe: once is enough, at the end."""

monthly_snapshot = dg.build_schedule_from_partitioned_job(
    ingest_and_measure,
    name="monthly_snapshot",
    description="Ingests and measures the newest snapshot of every domain, on the second day of the month.",
    day_of_month=2,
    hour_of_day=3,
)

monthly_fit = dg.ScheduleDefinition(
    name="monthly_fit",
    job=fit,
    cron_schedule="0 6 2 * *",
    description="Gives the new snapshot's documents their clusters and splits; all that is fitted on the pinned sample is a cache hit.",
)


@dg.sensor(
    jobs=[ingest, ingest_and_measure],
    minimum_interval_seconds=60,
    description="Launches the partitions whose source files are new or changed, by content, once each: read, and measured after `fit`.",
)
def new_source_files(context: dg.SensorEvaluationContext, mill: MillResource) -> dg.SensorResult:
    """Compare what each partition's source holds with what its raw_corpus was made from, and with the last tick.

    The first tick takes what is there, and is not in the store, as the baseline: it is for `gristmill run` or a backfill.
    """
    opened = mill.open()
    baseline = context.cursor is None
    job = ingest_and_measure if all(opened.store.is_current(asset) for asset in FITTED) else ingest
    seen: dict[str, str] = json.loads(context.cursor or "{}")
    requests, problems = [], []
    for key in SOURCE.get_partition_keys():
        if not _is_watched(opened, str(key)):
            continue
        try:
            wanted, made_from = _source_identity(opened, str(key)), _corpus_identity(opened, str(key))
        except GristmillError as error:
            problems.append(str(error))
            continue
        before, seen[str(key)] = seen.get(str(key)), wanted
        if wanted not in (before, made_from) and not (baseline and made_from is None):
            requests.append(dg.RunRequest(partition_key=str(key), job_name=job.name))
    skip = "no new or changed source file"
    if problems:
        skip += f"; {len(problems)} partitions cannot be read, the first: {problems[0]}"
    return dg.SensorResult(run_requests=requests, cursor=json.dumps(seen), skip_reason=None if requests else dg.SkipReason(skip))


def _is_watched(mill: Mill, key: str) -> bool:
    """Return whether a change of its source says something about partition `key`.

    Where one file holds all months, a change of it says nothing about a month that the project does not list.
    """
    domain, snapshot = split_partition(key)
    _, settings = mill.project.source_of(domain)
    own_files = "{snapshot" in json.dumps({name: value for name, value in settings.items() if name != "where"})
    return own_files or snapshot in mill.project.snapshots or mill.store.is_current("raw_corpus", key)


def _source_identity(mill: Mill, key: str) -> str:
    """Return what says which content the source of partition `key` holds now.

    Raises:
        GristmillError: the source cannot be read.
    """
    domain, snapshot = split_partition(key)
    source, settings = mill.project.source_of(domain)
    found = corpus_settings(domain, snapshot, source, settings, mill.root, max_documents=mill.project.max_documents)
    return _identity(found.model_dump(mode="json"))


def _corpus_identity(mill: Mill, key: str) -> str | None:
    """Return what the raw corpus of partition `key` was made from; None where there is none.

    Raises:
        MissingArtifact: it was deleted by hand.
    """
    return _identity(mill.store.current("raw_corpus", key).settings) if mill.store.is_current("raw_corpus", key) else None


def _identity(settings: Mapping[str, Json]) -> str:
    content = json.dumps([settings.get("files"), settings.get("revision")], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


SCHEDULES = (monthly_snapshot, monthly_fit)
refresh_reports = dg.AutomationConditionSensorDefinition(
    "refresh_reports",
    target=["report"],
    description="Writes the report of a recipe anew when one of its evaluations was materialized.",
)

SENSORS = (new_source_files, refresh_reports, lost_runs, alert_on_failure)
