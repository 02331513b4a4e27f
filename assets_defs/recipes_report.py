"""recipes_report, over all recipes."""

import dagster as dg

from assets_defs.materialization import mill_asset
from assets_defs.partitions import ALL
from assets_defs.resources import Mill, load_recipes
from pipelines import recipes_report as step
from pipelines.store import Build

SHOWN = {
    "evaluations": "evaluation",
    "general": "general_checkpoint",
    "checkpoints": "pretrained_checkpoint",
    "deduplicated": "deduplicated_corpus",
    "selections": "selected_subset",
    "ratios": "verified_ratio",
    "mixtures": "domain_mixture",
    "tasks": "task_evaluation",
    "comparisons": "comparison",
}


@mill_asset(
    step=step.write_recipes_report,
    audits=step.RECIPES_REPORT_AUDITS,
    deps=[dg.AssetDep(asset, partition_mapping=ALL) for asset in SHOWN.values()],
    kinds={"html"},
)
def recipes_report(mill: Mill, partition: str | None) -> Build:
    """One page, recipes.html: every recipe that was evaluated, and those measured on the same documents compared in pairs.

    Input: the manifests of the recipes' artifacts and the losses of their held-out documents. Holm's correction goes over all rows of the
    recipes that share their held-out documents. Cost: seconds.
    """
    recipes = load_recipes()
    done = [name for name in sorted(recipes) if all(mill.store.is_current(asset, name) for asset in SHOWN.values())]
    facts = tuple(
        step.RecipeFacts(name=name, description=recipes[name].description, baseline=recipes[name].evaluation.baseline) for name in done
    )
    return Build(
        asset="recipes_report",
        step=step.write_recipes_report,
        settings=step.RecipesReportSettings(recipes=facts, missing=tuple(sorted(set(recipes) - set(done)))),
        inputs={name: tuple(mill.store.current(asset, recipe) for recipe in done) for name, asset in SHOWN.items()},
        audits=step.RECIPES_REPORT_AUDITS,
    )
