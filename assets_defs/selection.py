"""selected_subset by recipe."""

import dagster as dg

from assets_defs.materialization import mill_asset
from assets_defs.partitions import ALL, RECIPE
from assets_defs.resources import Mill
from pipelines import selection
from pipelines.store import Build


@mill_asset(
    step=selection.select_subset,
    audits=selection.SELECTION_AUDITS,
    partitions=RECIPE,
    deps=[
        "deduplicated_corpus",
        dg.AssetDep("document_embeddings", partition_mapping=ALL),
        dg.AssetDep("tokenized_shards", partition_mapping=ALL),
    ],
    kinds={"numpy"},
    plugin_kinds=["set_functions"],
)
def selected_subset(mill: Mill, partition: str) -> Build:
    """The passages to train on: a greedy order by facility location, f(S) = sum over i of max over j in S of cos(i, j), cut at the budget.

    Input: deduplicated_corpus, document_embeddings, and token counts from tokenized_shards. The full order is stored, so
    every budget is a prefix of it; the certificate says what the subset covers, and what random choice would.
    """
    recipe = mill.recipe(partition)
    return Build(
        asset="selected_subset",
        partition=partition,
        step=selection.select_subset,
        settings=recipe.selection_settings(),
        inputs={
            "decisions": mill.store.current("deduplicated_corpus", partition),
            "embeddings": mill.sources("document_embeddings", recipe),
            "shards": mill.sources("tokenized_shards", recipe),
        },
        audits=selection.SELECTION_AUDITS,
        plugins=(f"pipelines.set_functions.{recipe.selection.function}",),
    )
