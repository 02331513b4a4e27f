"""selected_subset by recipe."""

import dagster as dg

from assets_defs.materialization import mill_asset
from assets_defs.partitions import ALL, RECIPE
from assets_defs.resources import Mill
from pipelines import plugins, selection
from pipelines import selection_audits as audits
from pipelines.errors import GristmillError
from pipelines.manifests import Manifest
from pipelines.recipes import Recipe
from pipelines.store import Build


@mill_asset(
    step=selection.select_subset,
    audits=audits.SELECTION_AUDITS,
    partitions=RECIPE,
    deps=[
        "deduplicated_corpus",
        dg.AssetDep("document_embeddings", partition_mapping=ALL),
        dg.AssetDep("tokenized_shards", partition_mapping=ALL),
        dg.AssetDep("quality_scores", partition_mapping=ALL),
        dg.AssetDep("toxicity_scores", partition_mapping=ALL),
    ],
    kinds={"numpy"},
    plugin_kinds=["set_functions"],
)
def selected_subset(mill: Mill, partition: str) -> Build:
    """The passages to train on, in the order of the recipe's set function, cut at the budget; facility location if it names no other.

    Input: deduplicated_corpus, document_embeddings, token counts from tokenized_shards, and the scores of quality_scores or
    toxicity_scores where the recipe names one. The full order is stored, so every budget is a prefix of it; the certificate says
    what the subset covers, what random choice would, and what no equally large set exceeds. Cost: about 13 s for 8,000 documents by
    facility location.
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
            **scores(mill, recipe),
        },
        audits=audits.SELECTION_AUDITS,
        plugins=(f"pipelines.set_functions.{recipe.selection.function}",),
        packages=getattr(plugins.load("set_functions", recipe.selection.function), "packages", ()),
    )


def scores(mill: Mill, recipe: Recipe) -> dict[str, tuple[Manifest, ...]]:
    """Return the scores that the recipe's selection reads; nothing where it names no rule.

    Raises:
        GristmillError: the rule's filter is not scored.
    """
    score = recipe.selection.score
    if score is None:
        return {}
    name = score.partition(".")[0]
    stage = next((stage for stage in ("quality", "toxicity") if name in mill.project.scored(stage)), None)
    if stage is None:
        scored = ", ".join(f"{stage}: {', '.join(mill.project.scored(stage))}" for stage in ("quality", "toxicity"))
        raise GristmillError(f"selection.score {score!r}: {name} is not scored; add it to project.yaml, or name a rule of {scored}")
    return {"scores": mill.sources(f"{stage}_scores", recipe)}
