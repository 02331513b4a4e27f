"""quality_scores and toxicity_scores by source; quality_filtered_corpus and toxicity_filtered_corpus by recipe."""

import dagster as dg

from assets_defs.materialization import mill_asset
from assets_defs.partitions import ALL, RECIPE, SOURCE
from assets_defs.resources import Mill
from pipelines import filtering, plugins
from pipelines.documents import split_partition
from pipelines.recipes import Stage
from pipelines.store import Build


@mill_asset(
    step=filtering.collect_scores,
    audits=filtering.SCORE_AUDITS,
    partitions=SOURCE,
    deps=["cleaned_corpus"],
    kinds={"parquet"},
    plugin_kinds=["filters"],
)
def quality_scores(mill: Mill, partition: str) -> Build:
    """The score of every quality rule for every document, kept or not: thresholds belong to recipes.

    Input: cleaned_corpus. Each filter is scored and stored on its own, so a changed rule re-scores that rule alone.
    """
    return _scores(mill, "quality", partition)


@mill_asset(
    step=filtering.collect_scores,
    audits=filtering.SCORE_AUDITS,
    partitions=SOURCE,
    deps=["cleaned_corpus"],
    kinds={"parquet", "scikitlearn"},
    plugin_kinds=["filters"],
)
def toxicity_scores(mill: Mill, partition: str) -> Build:
    """Toxicity of every document: a linear classifier's probability (document and worst sentence) and a word list's share.

    Input: cleaned_corpus.
    """
    return _scores(mill, "toxicity", partition)


@mill_asset(
    step=filtering.filter_corpus,
    audits=filtering.FILTER_AUDITS,
    partitions=RECIPE,
    deps=[dg.AssetDep("quality_scores", partition_mapping=ALL)],
    kinds={"duckdb"},
)
def quality_filtered_corpus(mill: Mill, partition: str) -> Build:
    """Which documents pass the recipe's quality thresholds, and for every other one all rules it failed, with score and threshold.

    Input: quality_scores of the recipe's domains and snapshots; no text is read.
    """
    recipe = mill.recipe(partition)
    return Build(
        asset="quality_filtered_corpus",
        partition=partition,
        step=filtering.filter_corpus,
        settings=recipe.filter_settings(mill.project, "quality"),
        inputs={"scores": mill.sources("quality_scores", recipe)},
        audits=filtering.FILTER_AUDITS,
    )


@mill_asset(
    step=filtering.filter_corpus,
    audits=filtering.FILTER_AUDITS,
    partitions=RECIPE,
    deps=["quality_filtered_corpus", dg.AssetDep("toxicity_scores", partition_mapping=ALL)],
    kinds={"duckdb"},
)
def toxicity_filtered_corpus(mill: Mill, partition: str) -> Build:
    """Which of the documents that passed the quality filter pass the recipe's toxicity thresholds.

    Input: toxicity_scores and quality_filtered_corpus.
    """
    recipe = mill.recipe(partition)
    return Build(
        asset="toxicity_filtered_corpus",
        partition=partition,
        step=filtering.filter_corpus,
        settings=recipe.filter_settings(mill.project, "toxicity"),
        inputs={"scores": mill.sources("toxicity_scores", recipe), "previous": mill.store.current("quality_filtered_corpus", partition)},
        audits=filtering.FILTER_AUDITS,
    )


def _scores(mill: Mill, stage: Stage, partition: str) -> Build:
    domain, snapshot = split_partition(partition)
    cleaned = mill.store.current("cleaned_corpus", partition)
    families = tuple(
        Build(
            asset=f"{stage}_scores.{settings.filter}",
            partition=partition,
            step=filtering.score_documents,
            settings=settings,
            inputs={"cleaned": cleaned},
            plugins=(f"pipelines.filters.{settings.filter}",),
            packages=plugins.load("filters", settings.filter).packages,  # type: ignore[attr-defined]
        )
        for settings in mill.project.score_settings(stage)
    )
    return Build(
        asset=f"{stage}_scores",
        partition=partition,
        step=filtering.collect_scores,
        settings=filtering.CollectSettings(domain=domain, snapshot=snapshot),
        inputs={"cleaned": cleaned, "families": families},
        audits=filtering.SCORE_AUDITS,
    )
