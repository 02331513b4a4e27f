"""domain_mixture by recipe."""

from assets_defs.materialization import mill_asset
from assets_defs.partitions import RECIPE
from assets_defs.resources import Mill
from assets_defs.training import both_roles
from pipelines import mixture
from pipelines.store import Build


@mill_asset(
    step=mixture.mix_domains,
    audits=mixture.MIXTURE_AUDITS,
    partitions=RECIPE,
    deps=["verified_ratio", "selected_subset"],
    kinds={"json"},
)
def domain_mixture(mill: Mill, partition: str) -> Build:
    """The share of tokens of each domain at the critical ratio, how many epochs of it the budget reads, and where it runs out.

    Input: verified_ratio, selected_subset. A plan, not data: training reads the shards through it, and keeps to its limits. Cost:
    about a second.
    """
    recipe = mill.recipe(partition)
    return Build(
        asset="domain_mixture",
        partition=partition,
        step=mixture.mix_domains,
        settings=recipe.mixture_settings(),
        inputs={"critical_ratio": mill.store.current("verified_ratio", partition), "selection": both_roles(mill, partition)},
        audits=mixture.MIXTURE_AUDITS,
    )
