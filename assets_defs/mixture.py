"""critical_ratio and domain_mixture by recipe."""

import dagster as dg

from assets_defs.materialization import mill_asset
from assets_defs.partitions import PROBES_TO_RECIPE, RECIPE
from assets_defs.resources import Mill
from assets_defs.training import both_roles
from pipelines import mixture
from pipelines.store import Build


@mill_asset(
    step=mixture.estimate_critical_ratio,
    audits=mixture.RATIO_AUDITS,
    partitions=RECIPE,
    deps=[dg.AssetDep("mixture_probe", partition_mapping=PROBES_TO_RECIPE)],
    kinds={"numpy"},
    plugin_kinds=["mixing_laws"],
)
def critical_ratio(mill: Mill, partition: str) -> Build:
    """The largest share of target text at which the general loss rises by no more than the tolerance, with its 95 % interval.

    Input: the recipe's mixture_probe partitions. Rule: L_gen(R, T) <= L_gen(base) + tolerance (CMR, 2407.17467, definition 1);
    the root of the own-share law, bootstrapped over held-out windows. It refuses, with a code and a remedy, where the
    probes do not support an estimate.
    """
    recipe = mill.recipe(partition)
    laws = {recipe.mixture.estimate.law, recipe.mixture.estimate.cross_check}
    return Build(
        asset="critical_ratio",
        partition=partition,
        step=mixture.estimate_critical_ratio,
        settings=recipe.mixture.estimate,
        inputs={"probes": tuple(mill.store.current("mixture_probe", f"{partition}|{probe}") for probe in recipe.probes)},
        audits=mixture.RATIO_AUDITS,
        plugins=tuple(f"pipelines.mixing_laws.{law}" for law in sorted(laws)),
    )


@mill_asset(
    step=mixture.mix_domains,
    audits=mixture.MIXTURE_AUDITS,
    partitions=RECIPE,
    deps=["critical_ratio", "selected_subset"],
    kinds={"json"},
)
def domain_mixture(mill: Mill, partition: str) -> Build:
    """The share of tokens of each domain at the critical ratio, and how many epochs of it the budget reads.

    Input: critical_ratio, selected_subset. A plan, not data: training reads the shards through it.
    """
    recipe = mill.recipe(partition)
    return Build(
        asset="domain_mixture",
        partition=partition,
        step=mixture.mix_domains,
        settings=recipe.mixture_settings(),
        inputs={"critical_ratio": mill.store.current("critical_ratio", partition), "selection": both_roles(mill, partition)},
        audits=mixture.MIXTURE_AUDITS,
    )
