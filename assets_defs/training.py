"""general_checkpoint and pretrained_checkpoint by recipe; mixture_probe by recipe and probe."""

import dagster as dg

from assets_defs.materialization import mill_asset
from assets_defs.partitions import ALL, PROBE, RECIPE, RECIPE_TO_PROBES
from assets_defs.resources import Mill
from pipelines import training
from pipelines.documents import split_partition
from pipelines.manifests import Manifest, Member
from pipelines.plan import located, training_plugins
from pipelines.recipes import Recipe
from pipelines.store import Build

PLUGIN_KINDS = ["objectives", "schedules", "optimizers", "parameterizations", "teachers"]
SHARDS = dg.AssetDep("tokenized_shards", partition_mapping=ALL)


@mill_asset(
    step=training.train_general,
    audits=training.CHECKPOINT_AUDITS,
    packages=training.TRAINING_PACKAGES,
    partitions=RECIPE,
    deps=["selected_subset", SHARDS, "tokenizer"],
    kinds={"pytorch", "huggingface"},
    plugin_kinds=PLUGIN_KINDS,
    training=True,
)
def general_checkpoint(mill: Mill, partition: str) -> Build:
    """A model of the general domains alone: the base that every probe starts from.

    Input: the general part of selected_subset, tokenized_shards. Recipes that ask for the same one share it. A killed run
    resumes to the same bytes.
    """
    recipe = mill.recipe(partition)
    settings = located(recipe.general_settings(), mill.root)
    return Build(
        asset="general_checkpoint",
        partition=partition,
        step=training.train_general,
        settings=settings,
        inputs={
            "selection": (selected(mill, partition, "general"),),
            "shards": role_shards(mill, recipe, ("general",)),
            "tokenizer": mill.store.current("tokenizer"),
        },
        audits=training.CHECKPOINT_AUDITS,
        plugins=training_plugins(settings),
        packages=training.TRAINING_PACKAGES,
        resumable=True,
    )


@mill_asset(
    step=training.train_probe,
    audits=training.PROBE_AUDITS,
    packages=training.TRAINING_PACKAGES,
    partitions=PROBE,
    deps=[
        dg.AssetDep("general_checkpoint", partition_mapping=RECIPE_TO_PROBES),
        dg.AssetDep("deduplicated_corpus", partition_mapping=RECIPE_TO_PROBES),
        SHARDS,
    ],
    kinds={"pytorch"},
    plugin_kinds=PLUGIN_KINDS,
    training=True,
)
def mixture_probe(mill: Mill, partition: str) -> Build:
    """The general checkpoint continued at one target share R, with the loss of every held-out window along the way.

    Input: general_checkpoint, selected_subset, held-out documents of deduplicated_corpus. Windows and data order are the
    same for all ratios, so differences between probes are paired.
    """
    name, probe = split_partition(partition)
    recipe = mill.recipe(name)
    settings = located(recipe.probe_settings(probe), mill.root)
    return Build(
        asset="mixture_probe",
        partition=partition,
        step=training.train_probe,
        settings=settings,
        inputs={
            "base": mill.store.current("general_checkpoint", name),
            "decisions": mill.store.current("deduplicated_corpus", name),
            "selection": both_roles(mill, name),
            "shards": role_shards(mill, recipe, ("general", "target")),
            "tokenizer": mill.store.current("tokenizer"),
        },
        audits=training.PROBE_AUDITS,
        plugins=training_plugins(settings),
        packages=training.TRAINING_PACKAGES,
    )


@mill_asset(
    step=training.train_mixture,
    audits=training.CHECKPOINT_AUDITS,
    packages=training.TRAINING_PACKAGES,
    partitions=RECIPE,
    deps=["general_checkpoint", "domain_mixture", "selected_subset", SHARDS, "tokenizer"],
    kinds={"pytorch", "huggingface"},
    plugin_kinds=PLUGIN_KINDS,
    training=True,
)
def pretrained_checkpoint(mill: Mill, partition: str) -> Build:
    """The general checkpoint continued on the domain mixture at the critical ratio: a Hugging Face directory.

    Input: general_checkpoint, domain_mixture, selected_subset, tokenized_shards. `AutoModelForCausalLM.from_pretrained`
    opens its path with nothing of this project installed. A killed run resumes to the same bytes.
    """
    recipe = mill.recipe(partition)
    settings = located(recipe.pretraining_settings(), mill.root)
    return Build(
        asset="pretrained_checkpoint",
        partition=partition,
        step=training.train_mixture,
        settings=settings,
        inputs={
            "base": mill.store.current("general_checkpoint", partition),
            "mixture": mill.store.current("domain_mixture", partition),
            "selection": both_roles(mill, partition),
            "shards": role_shards(mill, recipe, ("general", "target")),
            "tokenizer": mill.store.current("tokenizer"),
        },
        audits=training.CHECKPOINT_AUDITS,
        plugins=training_plugins(settings),
        packages=training.TRAINING_PACKAGES,
        resumable=True,
    )


def selected(mill: Mill, recipe: str, role: str) -> Member:
    """Return the selection of one role: a reader of it does not depend on the other role's."""
    return Member(manifest=mill.store.current("selected_subset", recipe), name=f"{role}.parquet")


def both_roles(mill: Mill, recipe: str) -> tuple[Member, ...]:
    """Return the selections of both roles."""
    return (selected(mill, recipe, "general"), selected(mill, recipe, "target"))


def role_shards(mill: Mill, recipe: Recipe, roles: tuple[str, ...]) -> tuple[Manifest, ...]:
    """Return the token shards of the domains of `roles`."""
    wanted = {domain for domain, role in recipe.role_of.items() if role in roles}
    return tuple(m for m in mill.sources("tokenized_shards", recipe) if split_partition(str(m.partition))[0] in wanted)
