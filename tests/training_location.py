"""A code location of one training: the project's own asset and step, over a small project of real text.

Its partitions are runs that differ in their seed; how long one takes is in TRAINING_STEPS.
"""

import os
from functools import cache
from pathlib import Path

import dagster as dg
from small_world import BATCH, MODEL, SEQUENCE_LENGTH, World, build_world, run

from assets_defs.materialization import mill_asset
from assets_defs.reaping import lost_runs
from assets_defs.resources import Mill, MillResource
from pipelines import training
from pipelines.store import Build, Store

PARTITIONS = ("killed", "cancelled", "twice", "lost")


@cache
def world_in(root: Path) -> World:
    return build_world(Store(root))


def request(world: World, partition: str) -> Build:
    """Return the request for the checkpoint of `partition`."""
    wanted = run(tokens=int(os.environ["TRAINING_STEPS"]) * BATCH * SEQUENCE_LENGTH)
    settings = training.GeneralSettings(model=MODEL, **{**wanted, "seed": PARTITIONS.index(partition), "checkpoint_seconds": 0.3})
    return world.general(settings)


@mill_asset(
    step=training.train_general,
    audits=training.CHECKPOINT_AUDITS,
    partitions=dg.StaticPartitionsDefinition(PARTITIONS),
    kinds={"pytorch"},
    training=True,
)
def general_checkpoint(mill: Mill, partition: str) -> Build:
    """A model of the general domains of a small world."""
    from dataclasses import replace

    return replace(request(world_in(mill.store.root), partition), partition=partition)


defs = dg.Definitions(assets=[general_checkpoint], sensors=[lost_runs], resources={"mill": MillResource()}, executor=dg.in_process_executor)
