"""age_splits by recipe."""

import dagster as dg

from assets_defs.materialization import mill_asset
from assets_defs.partitions import ALL, RECIPE
from assets_defs.resources import Mill
from pipelines import age_splits as step
from pipelines.store import Build


@mill_asset(
    step=step.split_by_age,
    audits=step.AGE_SPLIT_AUDITS,
    partitions=RECIPE,
    deps=["deduplicated_corpus", dg.AssetDep("quality_scores", partition_mapping=ALL)],
    kinds={"duckdb"},
)
def age_splits(mill: Mill, partition: str) -> Build:
    """The recipe's documents by when they were written: ids by period, so that a study can train on one and evaluate on another.

    Input: deduplicated_corpus, and from quality_scores what the filter `age` found; no text is read. Cost: about 0.3 s for 10,000
    documents.
    """
    recipe = mill.recipe(partition)
    return Build(
        asset="age_splits",
        partition=partition,
        step=step.split_by_age,
        settings=recipe.age_splits,
        inputs={"decisions": mill.store.current("deduplicated_corpus", partition), "scores": mill.sources("quality_scores", recipe)},
        audits=step.AGE_SPLIT_AUDITS,
    )
