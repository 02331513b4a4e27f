"""evaluation by recipe."""

import dagster as dg

from assets_defs.materialization import mill_asset
from assets_defs.partitions import ALL, RECIPE, named_by
from assets_defs.resources import Mill
from assets_defs.training import both_roles
from pipelines import evaluation as step
from pipelines.store import Build


@mill_asset(
    step=step.evaluate,
    audits=step.EVALUATION_AUDITS,
    packages=step.EVALUATION_PACKAGES,
    partitions=RECIPE,
    deps=[
        "pretrained_checkpoint",
        "general_checkpoint",
        "selected_subset",
        named_by("reference", "deduplicated_corpus"),
        dg.AssetDep("cleaned_corpus", partition_mapping=ALL),
        dg.AssetDep("tokenized_shards", partition_mapping=ALL),
    ],
    kinds={"pytorch"},
    plugin_kinds=["evaluators"],
    isolate=True,
)
def evaluation(mill: Mill, partition: str) -> Build:
    """Loss (nats per token) and bits per byte on held-out documents, before and after, by domain, with paired 95 % intervals.

    Input: general_checkpoint, pretrained_checkpoint, the held-out documents of deduplicated_corpus (of the recipe, or of its
    reference), selected_subset (what they share with training text), cleaned_corpus (their dates and languages). Formula: loss =
    sum of -ln p(token) / tokens; bits per byte = sum of -log2 p(token) / bytes. Cost: two forward passes over every held-out token.
    """
    recipe = mill.recipe(partition)
    return Build(
        asset="evaluation",
        partition=partition,
        step=step.evaluate,
        settings=recipe.evaluation_settings(),
        inputs={
            "base": mill.store.current("general_checkpoint", partition),
            "checkpoint": mill.store.current("pretrained_checkpoint", partition),
            "decisions": mill.store.current("deduplicated_corpus", recipe.evaluation.reference or partition),
            "selection": both_roles(mill, partition),
            "cleaned": mill.sources("cleaned_corpus", recipe),
            "shards": mill.sources("tokenized_shards", recipe),
            "tokenizer": mill.store.current("tokenizer"),
        },
        audits=step.EVALUATION_AUDITS,
        plugins=(f"pipelines.evaluators.{recipe.evaluation.evaluator}",),
        packages=step.EVALUATION_PACKAGES,
    )
