"""critical_ratio and verified_ratio by recipe."""

import dagster as dg

from assets_defs.materialization import mill_asset
from assets_defs.partitions import PROBES_TO_RECIPE, RECIPE
from assets_defs.resources import Mill
from assets_defs.training import both_roles
from pipelines import critical_ratio as step
from pipelines import mixture_search as search
from pipelines.manifests import Manifest, Member
from pipelines.store import Build

PROBES = dg.AssetDep("mixture_probe", partition_mapping=PROBES_TO_RECIPE)


@mill_asset(
    step=step.estimate_critical_ratio,
    other_step=search.search_mixture,
    audits=step.RATIO_AUDITS,
    partitions=RECIPE,
    deps=[PROBES, "probe_windows", "selected_subset"],
    kinds={"numpy"},
    plugin_kinds=["mixing_laws"],
)
def critical_ratio(mill: Mill, partition: str) -> Build:
    """The largest share of target text at which the general loss rises by no more than the tolerance, with its 95 % interval.

    Input: the recipe's mixture_probe partitions. Rule: L_gen(R, T) <= L_gen(base) + tolerance (CMR, 2407.17467, definition 1); the
    root of the own-share law, bootstrapped over held-out windows. It refuses, with a code and a remedy, where the probes do not
    support an estimate. A recipe with `mixture.search` asks for the shares of all domains at which each guarded one holds its own
    tolerance. Cost: seconds: the fits of the bootstrap over stored losses; no training.
    """
    chosen, tokens = mill.recipe(partition).mixture, mill.recipe(partition).pretraining_tokens
    inputs = _measurements(mill, partition)
    if chosen.search:
        searching = chosen.search_settings(chosen.search, tokens)
        plugins = search.search_plugins(searching)
        return Build("critical_ratio", search.search_mixture, searching, partition, inputs, search.SEARCH_AUDITS, plugins)
    settings = chosen.ratio_settings(tokens)
    return Build(
        "critical_ratio", step.estimate_critical_ratio, settings, partition, inputs, step.RATIO_AUDITS, step.ratio_plugins(settings)
    )


@mill_asset(
    step=step.verify_ratio,
    other_step=search.verify_mixture,
    audits=step.VERIFICATION_AUDITS,
    partitions=RECIPE,
    deps=["critical_ratio", "verification_probe", PROBES, "probe_windows", "selected_subset"],
    kinds={"numpy"},
    plugin_kinds=["mixing_laws"],
)
def verified_ratio(mill: Mill, partition: str) -> Build:
    """The critical ratio after a run at it: whether that run held the tolerance, and the estimate with it as one more point.

    Input: critical_ratio, verification_probe, and what critical_ratio reads. Rule: the measured change of general loss lies within
    half the tolerance of what was predicted. Cost: seconds; no training.
    """
    chosen, tokens = mill.recipe(partition).mixture, mill.recipe(partition).pretraining_tokens
    inputs = {
        "critical_ratio": mill.store.current("critical_ratio", partition),
        "verification": mill.store.current("verification_probe", partition),
        **_measurements(mill, partition),
    }
    if chosen.search:
        searching = chosen.verified_search(chosen.search, tokens)
        plugins = search.search_plugins(searching)
        return Build("verified_ratio", search.verify_mixture, searching, partition, inputs, search.VERIFICATION_AUDITS, plugins)
    settings = chosen.verified_settings(tokens)
    plugins = step.ratio_plugins(settings)
    return Build("verified_ratio", step.verify_ratio, settings, partition, inputs, step.VERIFICATION_AUDITS, plugins)


def _measurements(mill: Mill, recipe: str) -> dict[str, Manifest | tuple[Member, ...] | tuple[Manifest, ...]]:
    """Return what was measured for `recipe`."""
    return {
        "probes": tuple(mill.store.current("mixture_probe", f"{recipe}|{probe}") for probe in mill.recipe(recipe).probes),
        "windows": mill.store.current("probe_windows", recipe),
        "selection": both_roles(mill, recipe),
    }
