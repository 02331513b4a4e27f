"""`gristmill run`: the stages in order, each a Dagster run in this process, recorded where the UI shows it."""

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence

import dagster as dg
from rich.console import Console
from rich.table import Table

from assets_defs.automation import OVER_ALL, STAGES
from assets_defs.children import prepare
from assets_defs.overrides import check_overrides
from assets_defs.partitions import PROBES, SOURCE
from assets_defs.reaping import reap
from assets_defs.resources import Mill, MillResource, load_project, load_recipes, root_directory
from pipelines.documents import split_partition
from pipelines.errors import GristmillError
from pipelines.manifests import Json
from pipelines.recipes import Recipe

RANGE_TAGS = ("dagster/asset_partition_range_start", "dagster/asset_partition_range_end")
QUIET = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}


def drive(name: str, overrides: Mapping[str, Mapping[str, Json]] | None = None) -> None:
    """Materialize everything recipe `name` needs and print its results.

    Args:
        name: the recipe.
        overrides: by asset what is other for this run than in the recipe, as `assets_defs.overrides` reads it; the recipes that `name` is
            compared with are made as ever.

    Raises:
        GristmillError: a stage failed; the message is the step's.
    """
    recipes = load_recipes()
    recipes[name]  # an unknown name, and one whose file has problems, is refused before anything is started
    for asset, chosen in (overrides or {}).items():
        check_overrides(MillResource().open(), asset, name, chosen)
    os.environ.setdefault("GRISTMILL_PROGRESS", "1")
    os.environ.setdefault("DAGSTER_HOME", str(root_directory()))
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    started = time.monotonic()
    from assets_defs.definitions import defs

    with dg.DagsterInstance.get() as instance:
        reap(instance)
        for needed in _in_order(name, recipes):
            for stage, _ in STAGES:
                if stage == "fit" and not MillResource().open().store.is_current("pretrained_checkpoint", needed):
                    prepare()  # meanwhile, as the steps of this stage use one core
                if needed == name or stage != OVER_ALL:
                    _run_stage(defs, instance, stage, needed, recipes[needed], overrides if needed == name else None)
    _print_results(name, time.monotonic() - started)


def _in_order(name: str, recipes: Mapping[str, Recipe], asked: tuple[str, ...] = ()) -> list[str]:
    """Return the recipes that `name` is judged by or compared with, and those that they are, before `name`.

    Raises:
        GristmillError: recipes are compared with each other in a circle.
    """
    if name in asked:
        raise GristmillError(f"{' -> '.join((*asked, name))}: recipes are compared in a circle; take one `evaluation.baseline` away")
    evaluation = recipes[name].evaluation
    others = [other for other in (evaluation.reference, evaluation.baseline) if other and other != name]
    before = [one for other in others for one in _in_order(other, recipes, (*asked, name))]
    return list(dict.fromkeys([*before, name]))


def source_range(recipe: Recipe) -> tuple[str, str]:
    """Return the first and the last source partition of the smallest rectangle of domains and snapshots that is needed.

    All domains are taken: the pinned sample and the duplicate clusters span the project. Snapshots run from the first to
    the newest that the recipe or the pinned sample names; with ``all``, to the newest that holds documents.
    """
    domains = sorted(load_project().domains)
    snapshots = _snapshots(recipe)
    return f"{domains[0]}|{snapshots[0]}", f"{domains[-1]}|{snapshots[-1]}"


def _snapshots(recipe: Recipe) -> list[str]:
    project = load_project()
    months = sorted({split_partition(str(key))[1] for key in SOURCE.get_partition_keys()})
    wanted = set(project.snapshots if recipe.snapshots == "all" else recipe.snapshots) | set(project.fit_on)
    unknown = sorted(wanted - set(months))
    if unknown:
        raise GristmillError(
            f"snapshot {unknown[0]!r} is not between {months[0]} and {months[-1]}, the months that are over; months are YYYY-MM-01"
        )
    return [month for month in months if min(wanted) <= month <= max(wanted)]


def _run_stage(
    defs: dg.Definitions,
    instance: dg.DagsterInstance,
    stage: str,
    name: str,
    recipe: Recipe,
    overrides: Mapping[str, Mapping[str, Json]] | None = None,
) -> None:
    first, last = {
        "ingest": source_range(recipe),
        "measure": source_range(recipe),
        "fit": (None, None),
        "decide": (name, name),
        "probe": (PROBES[name][0], PROBES[name][-1]),
        "train": (name, name),
        "compare": (None, None),
    }[stage]
    started = time.monotonic()
    print(f"{stage}{f' [{first}]' if first == last and first else ''}", file=sys.stderr, flush=True)
    tags = {}
    if first != last:
        tags = dict(zip(RANGE_TAGS, (first, last), strict=True))
    job = defs.resolve_job_def(stage)
    chosen = {asset: {"config": {"overrides": dict(overrides[asset])}} for asset in dict(STAGES)[stage] if overrides and asset in overrides}
    result = job.execute_in_process(
        instance=instance,
        partition_key=first if first == last else None,
        tags=tags,
        run_config={**QUIET, "ops": chosen},
        raise_on_error=False,
    )
    if not result.success:
        raise GristmillError(
            f"stage {stage} failed: {_reason(result)}\nEverything finished so far is kept; the same command goes on from there."
        )
    print(f"{stage}: {time.monotonic() - started:.1f} s", file=sys.stderr, flush=True)


def _reason(result: dg.ExecuteInProcessResult) -> str:
    for event in result.all_events:
        if event.is_step_failure:
            data = event.step_failure_data
            if data.user_failure_data and data.user_failure_data.description:
                return f"{event.step_key}: {data.user_failure_data.description}"
            error = data.error
            while error and error.cause:
                error = error.cause
            return f"{event.step_key}: {error.message.strip() if error else 'unknown'}"
    return "see the run in the UI"


def _print_results(name: str, seconds: float) -> None:
    """Print what was kept, the critical ratio and the held-out losses, and where to look."""
    mill = MillResource().open()
    console = Console(width=130)
    funnel = Table(title=f"{name}: what was kept", title_justify="left")
    _columns(funnel, ["step", "documents in", "kept", "dropped"])
    for asset in ("quality_filtered_corpus", "toxicity_filtered_corpus", "decontaminated_corpus", "deduplicated_corpus"):
        counts = mill.store.current(asset, name).counts
        funnel.add_row(asset, *(f"{counts[key]:,}" for key in ("documents_in", "kept", "dropped")))
    console.print(funnel)
    _print_ratio(console, mill, name)
    rows = json.loads(mill.store.current("evaluation", name).file("evaluation.json").read_text())["domains"]
    held_out = Table(title="held-out documents, before and after continued pretraining", title_justify="left")
    _columns(held_out, ["domain", "role", "tokens", "loss before", "loss after", "change (95 %)", "bits/byte before", "after"])
    for row in rows:
        change = f"{row['loss_change']:+.3f} [{row['loss_change_low']:+.3f}, {row['loss_change_high']:+.3f}]"
        cells = [f"{row['tokens']:,}", f"{row['loss_before']:.3f}", f"{row['loss_after']:.3f}", change]
        held_out.add_row(row["domain"], row["role"], *cells, f"{row['bits_per_byte_before']:.3f}", f"{row['bits_per_byte_after']:.3f}")
    console.print(held_out)
    checkpoint, report = mill.store.current("pretrained_checkpoint", name), mill.store.current("report", name)
    print(f"report      {report.file('report.html')}")
    print(f"recipes     {mill.store.current('recipes_report').file('recipes.html')}")
    print(f"checkpoint  {checkpoint.directory}")
    print(f"done in {seconds:.0f} s; open the UI with: make ui   (Dagster http://127.0.0.1:3000, MLflow http://127.0.0.1:5000)")


def _print_ratio(console: Console, mill: Mill, name: str) -> None:
    """Print what the probes measured, the ratio, and what a run at it said."""
    found = mill.store.current("verified_ratio", name)
    probes = Table(title="change of loss by share R of target text, nats per token", title_justify="left")
    _columns(probes, ["R", "tokens", "general", "target"])
    for point in found.outcome.tables.get("probes", ()):
        losses = (f"{point[key]:+.4f}" for key in ("general_delta", "target_delta"))
        probes.add_row(f"{point['ratio']:.3f}", f"{point['tokens']:,}", *losses)
    if probes.row_count:
        console.print(probes)
    ratio = json.loads(found.file("verified_ratio.json").read_text())
    interval, checked = ratio["interval_95"], ratio["verification"]
    bounds = f", 95 % interval {interval[0]:.3f} to {interval[1]:.3f}" if interval else ""
    console.print(f"critical ratio: {ratio['ratio']:.3f} for {ratio['tokens']:,} tokens ({ratio['decision']}{bounds})")
    console.print(f"  {'verified' if checked['held'] else 'not verified'} by a run at {checked['before']:.3f}{_measured(checked)}")
    for row in ratio["refusals"]:
        console.print(f"  refused: {row['code']}: {row['seen']}; {row['remedy']}")


def _measured(checked: Mapping[str, Json]) -> str:
    if "measured_general_delta" not in checked:
        return ""
    return f": general loss {checked['measured_general_delta']:+.4f} after {checked['tokens']:,} tokens, wanted {checked['wanted']}"


def _columns(table: Table, names: Sequence[str]) -> None:
    for number, column in enumerate(names):
        table.add_column(column, justify="left" if number == 0 else "right")
