"""raw_corpus and cleaned_corpus: by source."""

from datetime import timedelta

import dagster as dg

from assets_defs.materialization import mill_asset
from assets_defs.partitions import SOURCE
from assets_defs.resources import Mill, load_project
from pipelines import cleaning, corpus
from pipelines.documents import split_partition
from pipelines.recipes import Project
from pipelines.store import Build

MONTHLY = dg.FreshnessPolicy.cron(deadline_cron="0 12 3 * *", lower_bound_delta=timedelta(hours=33))
"""A new month is in by noon of its third day; the schedule `monthly_snapshot` starts 33 hours before."""


def _sources(project: Project) -> tuple[str, ...]:
    """Return the modules of the sources that the project's domains are read from."""
    used = (project.source_of(domain) for domain in sorted(project.domains))
    return tuple(dict.fromkeys(module for name, values in used for module in corpus.plugin_modules(name, values)))


@mill_asset(
    step=corpus.ingest,
    audits=corpus.CORPUS_AUDITS,
    partitions=SOURCE,
    kinds={"parquet"},
    plugins=_sources(load_project()),
    freshness=MONTHLY,
)
def raw_corpus(mill: Mill, partition: str) -> Build:
    """Documents as they came, of one domain and one collection month.

    Input: the domain's source in project.yaml. What cannot be read is quarantined with its place and reason; documents
    in = kept + quarantined. Cost: reading and hashing the source's files.
    """
    domain, snapshot = split_partition(partition)
    source, values = mill.project.source_of(domain)
    settings = corpus.corpus_settings(domain, snapshot, source, values, mill.root, max_documents=mill.project.max_documents)
    return Build(
        asset="raw_corpus",
        partition=partition,
        step=corpus.ingest,
        settings=settings,
        audits=corpus.CORPUS_AUDITS,
        plugins=corpus.source_plugins(settings),
    )


@mill_asset(
    step=cleaning.clean_corpus,
    audits=cleaning.CLEANING_AUDITS,
    packages=cleaning.CLEANING_PACKAGES,
    partitions=SOURCE,
    deps=["raw_corpus"],
    kinds={"parquet"},
)
def cleaned_corpus(mill: Mill, partition: str) -> Build:
    """Text as it will be trained on: encoding repaired, HTML extracted where the domain asks for it, personal data masked.

    Input: raw_corpus. Every change is counted by document in changes.parquet. Cost: about a second for 2 MB.
    """
    return Build(
        asset="cleaned_corpus",
        partition=partition,
        step=cleaning.clean_corpus,
        settings=mill.project.cleaning_of(split_partition(partition)[0]),
        inputs={"raw": mill.store.current("raw_corpus", partition)},
        audits=cleaning.CLEANING_AUDITS,
        packages=cleaning.CLEANING_PACKAGES,
    )
