"""report by recipe."""

import dagster as dg

from assets_defs.materialization import mill_asset
from assets_defs.partitions import ALL, PROBES_TO_RECIPE, RECIPE
from assets_defs.recipes import extended_by
from assets_defs.resources import Mill
from pipelines import report as step
from pipelines.manifests import Manifest
from pipelines.overrides import inherited
from pipelines.store import Build

EVALUATED = dg.AssetSelection.assets("evaluation", "task_evaluation", "classification", "comparison")
REFRESHED = (
    dg.AutomationCondition.any_deps_updated().allow(EVALUATED).since_last_handled()
    & ~dg.AutomationCondition.any_deps_missing().allow(EVALUATED)
    & ~dg.AutomationCondition.any_deps_in_progress()
    & ~dg.AutomationCondition.in_progress()
)
"""A recipe's report is refreshed when an evaluation of it lands. That its blocking checks passed needs no asking: without that it does
not land; and Dagster asks by asset, so that one recipe's failed check would keep the others waiting."""


@mill_asset(
    step=step.write_report,
    audits=step.REPORT_AUDITS,
    partitions=RECIPE,
    deps=[
        "evaluation",
        "task_evaluation",
        "classification",
        "comparison",
        "probe_windows",
        "critical_ratio",
        "verification_probe",
        "verified_ratio",
        "domain_mixture",
        "selected_subset",
        "quality_filtered_corpus",
        "toxicity_filtered_corpus",
        "threshold_sweep",
        "decontaminated_corpus",
        "deduplicated_corpus",
        "general_checkpoint",
        "pretrained_checkpoint",
        dg.AssetDep("mixture_probe", partition_mapping=PROBES_TO_RECIPE),
        dg.AssetDep("raw_corpus", partition_mapping=ALL),
        dg.AssetDep("cleaned_corpus", partition_mapping=ALL),
        dg.AssetDep("tokenized_shards", partition_mapping=ALL),
    ],
    kinds={"html"},
    automation=REFRESHED,
)
def report(mill: Mill, partition: str) -> Build:
    """One page, report.html: what was kept and why, the critical ratio, the losses before and after, every check, cost and lineage.

    Input: the manifests of the recipe's artifacts. The page holds its plots and style; it opens without a network. Cost: under a
    second.
    """
    recipe = mill.recipe(partition)

    def current(asset: str) -> Manifest:
        return mill.store.current(asset, partition)

    inputs: dict[str, Manifest | tuple[Manifest, ...]] = {
        "raw": mill.sources("raw_corpus", recipe),
        "cleaned": mill.sources("cleaned_corpus", recipe),
        "shards": mill.sources("tokenized_shards", recipe),
        "quality": current("quality_filtered_corpus"),
        "toxicity": current("toxicity_filtered_corpus"),
        "sweep": current("threshold_sweep"),
        "decontaminated": current("decontaminated_corpus"),
        "deduplicated": current("deduplicated_corpus"),
        "selection": current("selected_subset"),
        "general": current("general_checkpoint"),
        "probes": tuple(mill.store.current("mixture_probe", f"{partition}|{probe}") for probe in recipe.probes),
        "windows": current("probe_windows"),
        "estimate": current("critical_ratio"),
        "verification": current("verification_probe"),
        "ratio": current("verified_ratio"),
        "mixture": current("domain_mixture"),
        "checkpoint": current("pretrained_checkpoint"),
        "evaluation": current("evaluation"),
        "tasks": current("task_evaluation"),
        "classification": current("classification"),
        "comparison": current("comparison"),
    }
    settings = step.ReportSettings(
        recipe=partition,
        description=recipe.description,
        fingerprint=recipe.fingerprint,
        extends=extended_by(partition),
        overrides=inherited(inputs),
    )
    return Build("report", step.write_report, settings, partition, inputs, step.REPORT_AUDITS)
