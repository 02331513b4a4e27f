"""Tasks after training: the same items scored on the base and on the checkpoint, compared in pairs.

    base, checkpoint, tokenizer -> items.parquet (a row per task, group, metric and item), tasks.json (a row per group, with intervals)

In a recipe (BLiMP alone where `tasks` is left out):

    evaluation:
      tasks:
        blimp: {}
        trivia: {task: multiple_choice, settings: {path: data/trivia.parquet}}
        reading: {task: harness, settings: {tasks: [arc_easy], limit: 500, allow_network: true}}

An item is right or wrong in both checkpoints alike far more often than not, so the difference is known better than either accuracy;
its interval resamples items, each with both of its scores. The mean over groups counts every group alike, and its interval resamples
within each of them. Intervals are expanded percentile ones (Hesterberg 2015, Am. Stat. 69(4), section 5.3), since plain ones are too
narrow for the few items of a group. Where every item of a group changed alike, a resampling finds no spread: read `items`, too.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field

from pipelines.documents import write_table
from pipelines.errors import GristmillError
from pipelines.files import file_hashes
from pipelines.manifests import Check, Json, Manifest, Outcome
from pipelines.models import denormals_flushed, load_checkpoint, set_up_torch
from pipelines.plots import new_figure, save_figure
from pipelines.plugins import Settings, build, load
from pipelines.rounding import rounded
from pipelines.store import advisory
from pipelines.tasks import ITEM_SCHEMA, LOWER_IS_BETTER, Task

ITEMS, TASKS = "items.parquet", "tasks.json"
TASK_PACKAGES = ("torch", "transformers")
ALL_GROUPS = "all groups"
"""The row of the mean over groups."""
KEYS = ("task", "group", "metric", "item")
COUNTS_AT_A_TIME = 2_000_000
"""Of the bootstrap, which counts how often it draws each distinct pair of scores."""
Row = dict[str, Json]


class TaskChoice(Settings):
    """One task of a recipe."""

    task: str | None = None
    """A plugin of `tasks/`; the name that the task stands under where absent."""
    settings: dict[str, Json] = Field(default_factory=dict)
    """Settings of the task."""


def default_tasks() -> dict[str, TaskChoice]:
    """Return the tasks of a recipe that names none: those that come with the project."""
    return {"blimp": TaskChoice()}


class TaskEvaluationSettings(Settings):
    """Which tasks there are, and how sure their differences have to be."""

    tasks: dict[str, TaskChoice] = Field(default_factory=default_tasks)
    """Name to task; none where empty."""
    draws: int = Field(default=2000, ge=1)
    """Bootstrap draws over items."""
    seed: int = Field(default=0, ge=0)
    """Of the bootstrap."""
    threads: int = Field(default=2, ge=1)
    """Torch threads."""
    files: dict[str, str] = Field(default_factory=dict)
    """File -> SHA-256 of every local file that the tasks read."""
    root: Path = Field(default=Path(), exclude=True)
    """Where relative paths start. Not part of the identity: the same project elsewhere has the same items."""

    def built(self) -> dict[str, Task]:
        """Return the tasks by name, located; every problem with their settings is an error."""
        return {name: cast(Task, build("tasks", chosen.task or name, chosen.settings)).at(self.root) for name, chosen in self.tasks.items()}


def task_plugins(settings: TaskEvaluationSettings) -> tuple[str, ...]:
    """Return the plugin modules that `settings` names, for the code version."""
    return tuple(sorted({f"pipelines.tasks.{chosen.task or name}" for name, chosen in settings.tasks.items()}))


def task_packages(settings: TaskEvaluationSettings) -> tuple[str, ...]:
    """Return the packages whose version is part of the identity: those of the models, and of the tasks."""
    classes = [cast(type[Task], load("tasks", chosen.task or name)) for name, chosen in settings.tasks.items()]
    return tuple(sorted({*TASK_PACKAGES, *(package for one in classes for package in one.packages)}))


def located(settings: TaskEvaluationSettings, root: Path) -> TaskEvaluationSettings:
    """Return `settings` with `root`, and with the hashes of the files that the tasks read.

    Raises:
        GristmillError: one of them does not exist.
    """
    settings = settings.model_copy(update={"root": root})
    paths = [path for task in settings.built().values() for path in task.files()]
    return settings.model_copy(update={"files": file_hashes(paths, root)})


def evaluate_tasks(settings: TaskEvaluationSettings, out: Path, *, base: Manifest, checkpoint: Manifest, tokenizer: Manifest) -> Outcome:
    """Score every task on `base` and `checkpoint`; write ``items.parquet``, ``tasks.json`` and a plot per task.

    Raises:
        GristmillError: a file of a task changed since it was hashed, or an item cannot be scored.
    """
    if located(settings, settings.root).files != settings.files:
        raise GristmillError("the files of the tasks changed since they were hashed; materialize again")
    before, after = (_score(settings, one, tokenizer) for one in (base, checkpoint))
    items = _paired(before, after)
    write_table(out / ITEMS, items)
    rows = [row for name in _distinct(items, ("task", "metric")) for row in _compare(settings, _where(items, name))]
    (out / TASKS).write_text(json.dumps({"tasks": rows}, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    whole = _overall(rows)
    return Outcome(
        counts={"items": len(_distinct(items, ("task", "group", "item"))), "groups": len(_distinct(items, ("task", "group")))},
        metrics={_metric_name(row, when): cast(float, row[when]) for row in whole for when in ("before", "after")},
        tables={"tasks": rounded(whole), "groups": rounded(row for row in rows if row["group"] != ALL_GROUPS)},
        plots=tuple(_plot(out, task, rows) for task in dict.fromkeys(str(row["task"]) for row in rows)),
    )


@denormals_flushed()
def _score(settings: TaskEvaluationSettings, checkpoint: Manifest, tokenizer: Manifest) -> pa.Table:
    """Return the items of all tasks, with the name of the task in front."""
    set_up_torch(settings.threads)
    model = load_checkpoint(checkpoint.directory).eval()
    tables = []
    for name, task in sorted(settings.built().items()):
        table = task.score(model, tokenizer.directory)
        tables.append(table.add_column(0, "task", pa.array([name] * table.num_rows, pa.string())))
    scored = pa.concat_tables([pa.schema([("task", pa.string()), *ITEM_SCHEMA]).empty_table(), *tables])
    twice = scored.num_rows - len(_distinct(scored, KEYS))
    if twice:
        raise GristmillError(
            f"{twice} scores have the task, group, metric and item of another one; a task gives each item a name of its own"
        )
    return scored


def _paired(before: pa.Table, after: pa.Table) -> pa.Table:
    """Return a row per item of either, sorted; a score that only one of them has is null in the other."""
    left = before.rename_columns([name if name != "score" else "before" for name in before.column_names])
    right = after.select([*KEYS, "score"]).rename_columns([*KEYS, "after"])
    joined = left.join(right, keys=list(KEYS), join_type="full outer", use_threads=False)
    columns = [*KEYS, "before", "after", "weight", "tokens", "bytes"]
    return joined.select(columns).sort_by([(key, "ascending") for key in ("task", "metric", "group", "item")])


def _compare(settings: TaskEvaluationSettings, items: pa.Table) -> list[Row]:
    """Return the rows of one metric of one task: its groups, and their mean where there are several."""
    task, metric = items["task"][0].as_py(), items["metric"][0].as_py()
    rows, total, sizes = [], np.zeros(settings.draws), []
    for group in _distinct(items, ("group",)):
        values = _values(_where(items, group))
        key = zlib.crc32(f"{task}|{metric}|{group['group']}".encode())  # a group's interval is the same whatever other groups there are
        draws = _differences(values, settings.draws, np.random.Generator(np.random.Philox(key=[settings.seed, key])))
        total, sizes = total + draws, [*sizes, len(values)]
        rows.append({"task": task, "metric": metric, **group, **_summary(values), **_interval(draws, sizes[-1:])})
    if len(rows) > 1:
        mean = {when: float(np.mean([cast(float, row[when]) for row in rows])) for when in ("before", "after", "change")}
        sums = {name: sum(cast(int, row[name]) for row in rows) for name in ("items", "higher", "lower")}
        rows.append({"task": task, "metric": metric, "group": ALL_GROUPS, **sums, **mean, **_interval(total / len(rows), sizes)})
    return rows


def _values(items: pa.Table) -> np.ndarray:
    """Return before, after and weight of each item that has all of them, float64 of shape (items, 3)."""
    table = np.stack([items[name].to_numpy().astype(float) for name in ("before", "after", "weight")], axis=1)
    return table[np.isfinite(table).all(axis=1)]  # the audits refuse the rest


def _differences(values: np.ndarray, draws: int, generator: np.random.Generator) -> np.ndarray:
    """Return the change of the weighted mean in bootstrap draws over items, shape (draws,).

    Drawing items is drawing how often each distinct row comes: a multinomial count, of four rows where scores are right or wrong.
    """
    found = np.full(draws, np.nan)
    if not len(values):
        return found
    distinct, counts = np.unique(values, axis=0, return_counts=True)
    change, weight = (distinct[:, 1] - distinct[:, 0]) * distinct[:, 2], distinct[:, 2]
    step = max(1, COUNTS_AT_A_TIME // len(distinct))
    for begin in range(0, draws, step):
        drawn = generator.multinomial(len(values), counts / len(values), size=min(step, draws - begin))
        found[begin : begin + step] = (drawn @ change) / (drawn @ weight)
    return found


def _summary(values: np.ndarray) -> Row:
    before, after, weight = values.T
    means = [float(np.average(scores, weights=weight)) if len(values) else float("nan") for scores in (before, after)]
    counts = {"items": len(values), "higher": int((after > before).sum()), "lower": int((after < before).sum())}
    return {**counts, "before": means[0], "after": means[1], "change": means[1] - means[0]}


def _interval(draws: np.ndarray, sizes: Sequence[int]) -> Row:
    """Return the ends of the 95 % interval of a mean over groups of `sizes` items from its bootstrap `draws`."""
    from scipy.special import ndtr, stdtrit

    free = sum(sizes) - len(sizes)
    level = ndtr(np.sqrt(sum(sizes) / free) * stdtrit(free, 0.025)) if free > 0 else 0.0
    low, high = np.quantile(draws, [level, 1.0 - level])
    return {"change_low": float(low), "change_high": float(high)}


def _distinct(items: pa.Table, names: Sequence[str]) -> list[dict[str, str]]:
    """Return the distinct values of columns `names`, in their order."""
    found = zip(*(items[name].to_pylist() for name in names), strict=True)
    return [dict(zip(names, values, strict=True)) for values in dict.fromkeys(found)]


def _where(items: pa.Table, values: Mapping[str, str]) -> pa.Table:
    for name, value in values.items():
        items = items.filter(pc.equal(items[name], value))
    return items


def _overall(rows: Sequence[Row]) -> list[Row]:
    """Return one row per task and metric: the mean over its groups, or its only group."""
    last = {(row["task"], row["metric"]): row for row in rows}
    return list(last.values())


def _metric_name(row: Row, when: str) -> str:
    return re.sub(r"[^\w./-]+", "_", f"{row['task']}_{row['metric']}_{when}")


def _plot(out: Path, task: str, rows: Sequence[Row]) -> str:
    """Plot the changes of the groups of `task`, by its first metric; return the file's name."""
    metric = next(row["metric"] for row in rows if row["task"] == task)
    mine = [row for row in rows if row["task"] == task and row["metric"] == metric]
    groups = sorted((row for row in mine if row["group"] != ALL_GROUPS), key=lambda row: cast(float, row["change"]))
    shown = [*(row for row in mine if row["group"] == ALL_GROUPS), *groups]
    figure, axes = new_figure(width=7.0, height=1.2 + 0.19 * len(shown))
    change, low, high = (np.asarray([row[name] for row in shown], dtype=float) for name in ("change", "change_low", "change_high"))
    places = np.arange(len(shown))
    errors = np.maximum(0.0, [change - low, high - change])
    axes.errorbar(change, places, xerr=errors, fmt="o", markersize=3.5, capsize=2, linewidth=1)
    axes.axvline(0.0, color="grey", linewidth=1)
    axes.set_yticks(places, [f"{row['group']}  {row['before']:.2f} → {row['after']:.2f}" for row in shown], fontsize=7)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set(xlabel=f"change of {metric} (95 % interval over items)", title=task)
    name = f"{re.sub(r'[^A-Za-z0-9_-]+', '_', task)}.png"
    save_figure(figure, out / name)
    return name


def every_item_in_both(draft: Manifest) -> Check:
    """Every item has a score of the base and one of the checkpoint."""
    table = pq.read_table(draft.directory / ITEMS)
    lone = {when: table[when].null_count for when in ("before", "after")}
    description = f"{table.num_rows} scores, {lone['before']} without one of the base, {lone['after']} without one of the checkpoint"
    return Check(name="every_item_in_both", passed=not any(lone.values()), description=description)


def scores_finite(draft: Manifest) -> Check:
    """Every score is a finite number."""
    table = pq.read_table(draft.directory / ITEMS)
    wrong = sum(int((~np.isfinite(table[when].drop_null().to_numpy())).sum()) for when in ("before", "after"))
    return Check(name="scores_finite", passed=wrong == 0, description=f"{2 * table.num_rows} scores, {wrong} not finite")


@advisory
def abilities_held(draft: Manifest) -> Check:
    """No task got worse beyond its interval."""
    worse = [_told(row) for row in _overall(json.loads((draft.directory / TASKS).read_text(encoding="utf-8"))["tasks"]) if _worse(row)]
    return Check(name="abilities_held", passed=not worse, description="; ".join(worse) or "no task got worse beyond its 95 % interval")


def _worse(row: Row) -> bool:
    low, high = cast(float, row["change_low"]), cast(float, row["change_high"])
    return low > 0 if str(row["metric"]).partition(",")[0] in LOWER_IS_BETTER else high < 0


def _told(row: Row) -> str:
    return f"{row['task']} {row['metric']}: {row['change']:+.3f} [{row['change_low']:+.3f}, {row['change_high']:+.3f}]"


TASK_AUDITS = (every_item_in_both, scores_finite, abilities_held)
