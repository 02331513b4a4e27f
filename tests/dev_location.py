"""The code location of test_dagster_dev: the project's own, with a stricter corpus beside it and a schedule that ticks every minute.

`strict_corpus` refuses a partition of fewer than `ENOUGH` documents; `strict_cleaned` is downstream of it in the same partition space,
`strict_count` by recipe.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import dagster as dg

from assets_defs import definitions
from assets_defs.automation import ingest
from assets_defs.materialization import mill_asset
from assets_defs.partitions import ALL, RECIPE, SOURCE
from assets_defs.resources import Mill
from pipelines import cleaning, corpus
from pipelines.documents import row_count, split_partition
from pipelines.manifests import Check, Manifest, Outcome
from pipelines.plugins import Settings
from pipelines.store import Build

ENOUGH = 3
SCHEDULED = "wiki|2026-02-01"


def enough_documents(draft: Manifest) -> Check:
    """Pass where a partition holds what the test calls a corpus."""
    kept = draft.counts["kept"]
    return Check(name="enough_documents", passed=kept >= ENOUGH, description=f"{kept} documents, at least {ENOUGH} wanted")


class NoSettings(Settings):
    """Nothing to set."""


def count_documents(settings: NoSettings, out: Path, *, corpora: tuple[Manifest, ...]) -> Outcome:
    """Write how many documents there are."""
    count = sum(row_count(one.file("documents.parquet")) for one in corpora)
    (out / "count.json").write_text(json.dumps(count))
    return Outcome(counts={"documents": count})


AUDITS = (*corpus.CORPUS_AUDITS, enough_documents)


@mill_asset(step=corpus.ingest, audits=AUDITS, partitions=SOURCE, kinds={"parquet"})
def strict_corpus(mill: Mill, partition: str) -> Build:
    """Documents of strict/<domain>/<month>.jsonl."""
    domain, snapshot = split_partition(partition)
    paths = {"paths": [f"strict/{domain}/{snapshot}.jsonl"]}
    settings = corpus.corpus_settings(domain, snapshot, "jsonl", paths, mill.root)
    return Build(asset="strict_corpus", partition=partition, step=corpus.ingest, settings=settings, audits=AUDITS)


@mill_asset(step=cleaning.clean_corpus, audits=cleaning.CLEANING_AUDITS, partitions=SOURCE, deps=["strict_corpus"], kinds={"parquet"})
def strict_cleaned(mill: Mill, partition: str) -> Build:
    """The same, cleaned."""
    return Build(
        asset="strict_cleaned",
        partition=partition,
        step=cleaning.clean_corpus,
        settings=mill.project.cleaning_of(split_partition(partition)[0]),
        inputs={"raw": mill.store.current("strict_corpus", partition)},
        audits=cleaning.CLEANING_AUDITS,
    )


@mill_asset(step=count_documents, partitions=RECIPE, deps=[dg.AssetDep("strict_corpus", partition_mapping=ALL)], kinds={"json"})
def strict_count(mill: Mill, partition: str) -> Build:
    """How many documents a recipe takes."""
    corpora = mill.sources("strict_corpus", mill.recipe(partition))
    return Build(asset="strict_count", partition=partition, step=count_documents, settings=NoSettings(), inputs={"corpora": corpora})


@dg.schedule(cron_schedule="* * * * *", job=ingest)
def every_minute(context: dg.ScheduleEvaluationContext) -> Iterator[dg.RunRequest]:
    """Ask for one partition, at every tick."""
    yield dg.RunRequest(partition_key=SCHEDULED)


defs = dg.Definitions.merge(
    definitions.defs, dg.Definitions(assets=[strict_corpus, strict_cleaned, strict_count], schedules=[every_minute])
)
