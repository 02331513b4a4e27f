"""general_checkpoint and pretrained_checkpoint by recipe."""

import dagster as dg

from assets_defs.materialization import mill_asset
from assets_defs.partitions import ALL, RECIPE
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
    """A model of the general domains alone, or a checkpoint taken as it is: the base that every probe starts from.

    Input: the general part of selected_subset, tokenized_shards; of a recipe without a `general` phase, its `model.checkpoint`
    alone. Recipes that ask for the same one share it. A killed run resumes to the same bytes. Cost: 6 x parameters x tokens
    operations; `gristmill run --dry-run` says how long that takes here.
    """
    recipe = mill.recipe(partition)
    if recipe.general is None:
        return adopted(mill, partition)
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

    Input: general_checkpoint, domain_mixture, selected_subset, tokenized_shards. `AutoModelForCausalLM.from_pretrained` opens its
    path with nothing of this project installed. A killed run resumes to the same bytes. Cost: 6 x parameters x tokens operations;
    `gristmill run --dry-run` says how long that takes here.
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


def adopted(mill: Mill, recipe: str) -> Build:
    """Return the request for the checkpoint that `recipe` takes as it is."""
    return Build(
        asset="general_checkpoint",
        partition=recipe,
        step=training.adopt_checkpoint,
        settings=training.located_checkpoint(mill.recipe(recipe).adoption_settings(), mill.root),
        inputs={"tokenizer": mill.store.current("tokenizer")},
        audits=training.CHECKPOINT_AUDITS,
        packages=training.TRAINING_PACKAGES,
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
