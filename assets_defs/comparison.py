"""comparison by recipe."""

from assets_defs.materialization import mill_asset
from assets_defs.partitions import RECIPE, named_by
from assets_defs.resources import Mill
from pipelines import comparison as step
from pipelines.store import Build


@mill_asset(
    step=step.compare_recipes,
    audits=step.COMPARISON_AUDITS,
    partitions=RECIPE,
    deps=[named_by("baseline", "evaluation")],
    kinds={"python"},
)
def comparison(mill: Mill, partition: str) -> Build:
    """What the recipe's checkpoint loses and gains against its baseline, on the same held-out documents, and whether its guards hold.

    Input: evaluation, and that of `evaluation.baseline`; of a recipe that names none, before training against after. Cost: about a
    second: a bootstrap over the losses that the evaluations stored.
    """
    recipe = mill.recipe(partition)
    baseline = recipe.evaluation.baseline
    against = {"baseline": mill.store.current("evaluation", baseline)} if baseline else {}
    return Build(
        asset="comparison",
        partition=partition,
        step=step.compare_recipes,
        settings=recipe.comparison_settings(),
        inputs={"candidate": mill.store.current("evaluation", partition), **against},
        audits=step.COMPARISON_AUDITS,
    )
