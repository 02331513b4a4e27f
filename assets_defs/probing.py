"""probe_windows and verification_probe by recipe; mixture_probe by recipe and probe."""

import dagster as dg

from assets_defs.materialization import mill_asset
from assets_defs.partitions import PROBE, RECIPE, RECIPE_TO_PROBES
from assets_defs.resources import Mill
from assets_defs.training import PLUGIN_KINDS, SHARDS, both_roles, role_shards
from pipelines import probing
from pipelines.documents import split_partition
from pipelines.manifests import Manifest, Member
from pipelines.plan import located, training_plugins
from pipelines.store import Build
from pipelines.training import TRAINING_PACKAGES


@mill_asset(
    step=probing.measure_base,
    audits=probing.PROBE_AUDITS,
    packages=TRAINING_PACKAGES,
    partitions=RECIPE,
    deps=["general_checkpoint", "deduplicated_corpus", "selected_subset", SHARDS, "tokenizer"],
    kinds={"pytorch"},
    plugin_kinds=PLUGIN_KINDS,
    isolate=True,
)
def probe_windows(mill: Mill, partition: str) -> Build:
    """The held-out windows that every probe of the recipe is measured on, with the loss of the general checkpoint on each.

    Input: general_checkpoint, held-out documents of deduplicated_corpus, selected_subset (which domains, in which shares). Cost:
    one forward pass over the windows.
    """
    recipe = mill.recipe(partition)
    settings = located(recipe.window_settings(), mill.root)
    return Build(
        asset="probe_windows",
        partition=partition,
        step=probing.measure_base,
        settings=settings,
        inputs={
            "base": mill.store.current("general_checkpoint", partition),
            "decisions": mill.store.current("deduplicated_corpus", partition),
            "selection": both_roles(mill, partition),
            "shards": role_shards(mill, recipe, ("general", "target")),
            "tokenizer": mill.store.current("tokenizer"),
        },
        audits=probing.PROBE_AUDITS,
        plugins=training_plugins(settings),
        packages=TRAINING_PACKAGES,
    )


@mill_asset(
    step=probing.train_probe,
    audits=probing.PROBE_AUDITS,
    packages=TRAINING_PACKAGES,
    partitions=PROBE,
    deps=[
        dg.AssetDep("general_checkpoint", partition_mapping=RECIPE_TO_PROBES),
        dg.AssetDep("probe_windows", partition_mapping=RECIPE_TO_PROBES),
        dg.AssetDep("selected_subset", partition_mapping=RECIPE_TO_PROBES),
        SHARDS,
    ],
    kinds={"pytorch"},
    plugin_kinds=PLUGIN_KINDS,
    training=True,
)
def mixture_probe(mill: Mill, partition: str) -> Build:
    """The general checkpoint continued at one target share R, with the loss of every held-out window along the way.

    Input: general_checkpoint, probe_windows, selected_subset. Windows and the order of each domain are the same for all ratios, so
    differences between probes are paired. The learning rate is constant, so every point of the course is a run of that length.
    Cost: 6 x parameters x tokens operations for each probe, and the held-out windows at each point that is measured.
    """
    name, probe = split_partition(partition)
    settings = located(mill.recipe(name).probe_settings(probe), mill.root)
    return Build(
        asset="mixture_probe",
        partition=partition,
        step=probing.train_probe,
        settings=settings,
        inputs=_probe_inputs(mill, name),
        audits=probing.PROBE_AUDITS,
        plugins=training_plugins(settings),
        packages=TRAINING_PACKAGES,
    )


@mill_asset(
    step=probing.train_verification,
    audits=probing.PROBE_AUDITS,
    packages=TRAINING_PACKAGES,
    partitions=RECIPE,
    deps=["critical_ratio", "general_checkpoint", "probe_windows", "selected_subset", SHARDS],
    kinds={"pytorch"},
    plugin_kinds=PLUGIN_KINDS,
    training=True,
)
def verification_probe(mill: Mill, partition: str) -> Build:
    """One more probe, trained at the critical ratio: what it measures says whether the estimate holds.

    Input: critical_ratio, and all that mixture_probe reads. Cost: 6 x parameters x tokens operations, for as many tokens as the
    plan trains on.
    """
    settings = located(mill.recipe(partition).verification_settings(), mill.root)
    return Build(
        asset="verification_probe",
        partition=partition,
        step=probing.train_verification,
        settings=settings,
        inputs={"critical_ratio": mill.store.current("critical_ratio", partition), **_probe_inputs(mill, partition)},
        audits=probing.PROBE_AUDITS,
        plugins=training_plugins(settings),
        packages=TRAINING_PACKAGES,
    )


def _probe_inputs(mill: Mill, recipe: str) -> dict[str, Manifest | tuple[Member, ...] | tuple[Manifest, ...]]:
    """Return what a probe of `recipe` reads."""
    return {
        "base": mill.store.current("general_checkpoint", recipe),
        "windows": mill.store.current("probe_windows", recipe),
        "selection": both_roles(mill, recipe),
        "shards": role_shards(mill, mill.recipe(recipe), ("general", "target")),
        "tokenizer": mill.store.current("tokenizer"),
    }
