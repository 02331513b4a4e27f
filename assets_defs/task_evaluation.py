"""task_evaluation by recipe."""

from assets_defs.materialization import mill_asset
from assets_defs.partitions import RECIPE
from assets_defs.resources import Mill
from pipelines import task_evaluation as step
from pipelines.store import Build


@mill_asset(
    step=step.evaluate_tasks,
    audits=step.TASK_AUDITS,
    packages=step.TASK_PACKAGES,
    partitions=RECIPE,
    deps=["pretrained_checkpoint", "general_checkpoint", "tokenizer"],
    kinds={"pytorch"},
    plugin_kinds=["tasks"],
    isolate=True,
)
def task_evaluation(mill: Mill, partition: str) -> Build:
    """Scores of tasks (BLiMP by default) before and after, item by item, with paired 95 % intervals by group.

    Input: general_checkpoint, pretrained_checkpoint, the items that the recipe's tasks name. Cost: two forward passes over every
    item and its alternatives; about 10 s for a small model and the default.
    """
    settings = step.located(mill.recipe(partition).task_settings(), mill.root)
    return Build(
        asset="task_evaluation",
        partition=partition,
        step=step.evaluate_tasks,
        settings=settings,
        inputs={
            "base": mill.store.current("general_checkpoint", partition),
            "checkpoint": mill.store.current("pretrained_checkpoint", partition),
            "tokenizer": mill.store.current("tokenizer"),
        },
        audits=step.TASK_AUDITS,
        plugins=step.task_plugins(settings),
        packages=step.task_packages(settings),
    )
