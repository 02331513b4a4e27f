"""Jobs, one per partition space and stage; the monthly schedules; the sensor for new source files."""

import json

import dagster as dg

from assets_defs.partitions import SOURCE
from assets_defs.resources import MillResource
from pipelines.corpus import corpus_settings
from pipelines.documents import split_partition
from pipelines.errors import GristmillError

INGESTED = ("raw_corpus", "cleaned_corpus", "quality_scores", "toxicity_scores", "duplicate_signatures")
FITTED = ("duplicate_clusters", "tokenizer", "embedder")
MEASURED = ("document_embeddings", "tokenized_shards")
DECIDED = ("quality_filtered_corpus", "toxicity_filtered_corpus", "deduplicated_corpus", "selected_subset", "general_checkpoint")
PROBED = ("mixture_probe",)
TRAINED = ("critical_ratio", "domain_mixture", "pretrained_checkpoint", "evaluation", "report")


def _job(name: str, assets: tuple[str, ...], description: str):  # noqa: ANN202 - dagster does not export the type
    return dg.define_asset_job(name, selection=list(assets), description=description)


ingest = _job("ingest", INGESTED, "By source: read, clean, score and sign.")
fit = _job("fit", FITTED, "Once: near-duplicate clusters with the held-out split, tokenizer, embedder.")
measure = _job("measure", MEASURED, "By source: embed and tokenize, after `fit`.")
ingest_and_measure = _job("ingest_and_measure", INGESTED + MEASURED, "By source, everything: what a new snapshot needs once `fit` has run.")
decide = _job("decide", DECIDED, "By recipe: filter, deduplicate, select, and train the general checkpoint.")
probe = _job("probe", PROBED, "By recipe and probe: train at one target share.")
train = _job("train", TRAINED, "By recipe: critical ratio, mixture, pretrained checkpoint, evaluation, report.")

JOBS = (ingest, fit, measure, ingest_and_measure, decide, probe, train)
STAGES = (("ingest", INGESTED), ("fit", FITTED), ("measure", MEASURED), ("decide", DECIDED), ("probe", PROBED), ("train", TRAINED))
"""The order in which `gristmill run` drives the graph: one Dagster job cannot span two partition spaces."""

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
    description="Gives the new snapshot's documents their clusters and splits; tokenizer and embedder are cache hits.",
)


@dg.sensor(
    job=ingest,
    minimum_interval_seconds=60,
    description="Launches the partitions whose source files are new or changed, by content, once each.",
)
def new_source_files(context: dg.SensorEvaluationContext, mill: MillResource) -> dg.SensorResult:
    """Compare each materialized-or-configured partition's source identity with that of its raw_corpus."""
    opened = mill.open()
    seen: dict[str, str] = json.loads(context.cursor or "{}")
    requests, problems = [], []
    for key in SOURCE.get_partition_keys():
        domain, snapshot = split_partition(str(key))
        source, settings = opened.project.source_of(domain)
        try:
            wanted = corpus_settings(
                domain, snapshot, source, settings, opened.root, max_documents=opened.project.max_documents
            ).model_dump(mode="json")
        except GristmillError as error:
            problems.append(str(error))
            continue
        identity = json.dumps(wanted.get("files"), sort_keys=True)
        current = opened.store.current("raw_corpus", str(key)).settings if opened.store.is_current("raw_corpus", str(key)) else None
        if seen.get(str(key)) == identity or (current and current.get("files") == wanted.get("files")) or (current is None and not seen):
            seen[str(key)] = identity
            continue
        seen[str(key)] = identity
        requests.append(dg.RunRequest(partition_key=str(key), run_key=f"{key}:{hash_of(identity)}"))
    skip = "; ".join(dict.fromkeys(problems)) or "no new or changed source file"
    return dg.SensorResult(run_requests=requests, cursor=json.dumps(seen), skip_reason=None if requests else dg.SkipReason(skip))


def hash_of(text: str) -> str:
    """Return 16 hex digits that depend on `text` alone."""
    import hashlib

    return hashlib.sha256(text.encode()).hexdigest()[:16]


SCHEDULES = (monthly_snapshot, monthly_fit)
SENSORS = (new_source_files,)
