"""How a request for an artifact becomes a Dagster asset.

An asset is a function from a partition to a `Build`. `mill_asset` turns it into an asset whose audits are its checks:
the audit runs on what was staged, before it is published, so a failed audit is a failed check and no materialization.
One run may hold many partitions; they are mapped over processes, and each gets its own materialization event. What trains
runs in a child of its own (`assets_defs.children`).
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import dagster as dg
from dagster import AssetExecutionContext

from assets_defs.child import ChildEnded
from assets_defs.children import build_in_children
from assets_defs.gates import Gate
from assets_defs.metadata import describe
from assets_defs.overrides import overridable, override_metadata, overriding
from assets_defs.reaping import tag_run
from assets_defs.recipes import recipe_metadata, recipe_table
from assets_defs.resources import Mill, MillResource
from pipelines.code_version import code_version
from pipelines.engine import Engine, Mapped, map_shards
from pipelines.errors import GristmillError
from pipelines.manifests import Check, Manifest
from pipelines.plugins import names
from pipelines.progress import report_line
from pipelines.store import Audit, AuditFailed, Build, Built, Step, Store, audit_name, is_blocking, needed
from pipelines.tracking import LiveRun, RunTags

GROUP = "gristmill"
OWNERS = ["team:data"]
TRAINING_POOL = "accelerator"
"""One training at a time per accelerator; the limit is set in dagster.yaml."""
MAX_RETRIES = 2
RETRY_SECONDS = 5
"""Before the first retry; twice that before the second."""
SHOWN_ERRORS = 5
DATA_VERSION_TAG = "dagster/data_version"
PROVENANCE_TAGS = ("dagster/code_version", "dagster/input_")


Request = Callable[[Mill, Any], Build]
REQUESTS: dict[str, Request] = {}
"""The function of each asset, by its name: what the partition's artifact is made from, without making it."""


def mill_asset(
    *,
    step: Step,
    other_step: Step | None = None,
    audits: Sequence[Audit] = (),
    partitions: dg.PartitionsDefinition | None = None,
    deps: Sequence[str | dg.AssetDep] = (),
    kinds: set[str],
    plugin_kinds: Sequence[str] = (),
    plugins: Sequence[str] = (),
    packages: tuple[str, ...] = (),
    training: bool = False,
    isolate: bool = False,
    freshness: dg.FreshnessPolicy | None = None,
    automation: dg.AutomationCondition | None = None,
) -> Callable[[Request], dg.AssetsDefinition]:
    """Make an asset of a function that returns the `Build` of a partition.

    Args:
        step: the step the build runs; its code is the asset's code version, with that of all plugins of `plugin_kinds`, which recipes
            choose from, and of the modules `plugins`, which the project has chosen.
        other_step: the step that it runs for some recipes instead; its audits have the same names.
        audits: the audits of the build, as check specs.
        training: holds the accelerator's pool while it runs, in a process of its own.
        isolate: runs in a process of its own.
        freshness: when it has to be materialized again.
        automation: when the sensor of automation materializes it, where that is on.
    """

    def wrap(request: Request) -> dg.AssetsDefinition:
        choices = tuple(f"pipelines.{kind}.{name}" for kind in plugin_kinds for name in names(kind))
        modules = [one.__module__ for one in (step, other_step) if one]
        version = code_version((*modules, *choices, *plugins), packages)
        name = request.__name__
        if request.__module__.startswith("assets_defs."):  # another code location may have an asset of the same name
            REQUESTS[name] = request
        by_recipe = isinstance(partitions, dg.StaticPartitionsDefinition)

        @dg.asset(
            name=name,
            description=inspect.getdoc(request),
            group_name=GROUP,
            owners=OWNERS,
            kinds=kinds,
            deps=list(deps),
            partitions_def=partitions,
            backfill_policy=dg.BackfillPolicy.single_run() if partitions else None,
            code_version=version,
            config_schema=overridable(name),
            metadata=recipe_table() if by_recipe else None,
            check_specs=[
                dg.AssetCheckSpec(audit_name(audit), asset=name, blocking=is_blocking(audit), description=audit.__doc__) for audit in audits
            ],
            pool=TRAINING_POOL if training else None,
            freshness_policy=freshness,
            automation_condition=automation,
            output_required=False,
            dagster_type=dg.Nothing,
        )
        def materialize(context: AssetExecutionContext, mill: MillResource) -> Iterator[Any]:
            tag_run(context)
            checks = [audit_name(audit) for audit in audits]
            asked = overriding(name, request, context.op_execution_context.op_config)
            with contextlib.ExitStack() as held:
                try:
                    yield from _materialize(context, mill.open(), asked, checks, held, isolate=training or isolate)
                except Exception as error:
                    _try_again(context, error)
                    raise

        return materialize

    return wrap


def _materialize(
    context: AssetExecutionContext, mill: Mill, request: Request, checks: Sequence[str], held: contextlib.ExitStack, *, isolate: bool
) -> Iterator[Any]:
    """Build the partitions and yield their events; what they are made from is kept from housekeeping until `held` is left."""
    partitions = list(context.partition_keys) if context.has_partition_key_range or context.has_partition_key else [None]
    asset = context.asset_key.to_user_string()
    found = mill.store.leases.taken(lambda: _requests(mill, request, asset, partitions), lambda requests: needed(requests[0]))
    builds, errors = held.enter_context(found)
    logged: list[tuple[Built, Future[str]]] = []
    with ThreadPoolExecutor(1) as pool:
        if _pending(mill.store, builds):
            pool.submit(mill.tracker.prepare)
        try:
            for mapped in _mapped(context, mill, builds, pool, isolate=isolate):
                if mapped.error:
                    errors.append(mapped.error)
                    report_line(f"{mapped.item.label}: FAILED: {mapped.error}")
                    continue
                built = mapped.result
                logged.append((built, pool.submit(_log, mill, built.manifest, *_placed(context, built.manifest))))
                report_line(f"{built.manifest.label}: {summary(built)}")
        except dg.DagsterExecutionInterruptedError:
            pool.shutdown(wait=False, cancel_futures=True)  # what is not logged yet is when the artifact is met again
            if len(partitions) > 1:
                told = [(built, log.result() if _went_well(log) else None) for built, log in logged]
                yield from _partition_events(context, told, finished=False)
            raise
    done = [(built, log.result()) for built, log in logged]
    if context.retry_number < MAX_RETRIES and (passing := _passing(errors)):
        raise passing  # the next attempt finds what is done here, and records it
    if len(partitions) == 1:
        yield from (_result(context, built, url) for built, url in done)
    else:
        yield from _partition_events(context, done, finished=not errors)
    if audited := [*(b.manifest for b, _ in done), *(e.manifest for e in errors if isinstance(e, AuditFailed))]:
        yield from _check_results(asset, checks, audited)
    if errors:
        _fail(asset, errors, len(partitions))


def _try_again(context: AssetExecutionContext, error: Exception) -> None:
    """Ask Dagster for another attempt where `error` may not come again: twice, or as often as a child got further.

    No RetryPolicy does this: with one, Dagster retries a step whose run is cancelled too, and the cancelled run succeeds.

    Raises:
        dg.RetryRequested: a month of training outlives many kills.
    """
    went_on = isinstance(error, ChildEnded) and error.went_on
    if isinstance(error, dg.Failure | dg.DagsterError | GristmillError) or (context.retry_number >= MAX_RETRIES and not went_on):
        return
    context.log.warning(f"{error}; the step is run again")
    most = max(MAX_RETRIES, context.retry_number + 1)
    delay = RETRY_SECONDS if went_on else RETRY_SECONDS * 2**context.retry_number
    raise dg.RetryRequested(max_retries=most, seconds_to_wait=delay) from error


def _requests(mill: Mill, request: Request, asset: str, partitions: Sequence[Any]) -> tuple[list[Build], list[Exception]]:
    """Return the requests that can be made, and why the others cannot: one partition's missing file is not its neighbours' business.

    Raises:
        dg.Failure: none can be made.
    """
    gate, builds, errors = Gate(mill.store), [], []
    for key in partitions:
        try:
            build = request(mill, str(key) if key else None)
            gate.check(build)
            builds.append(build)
        except GristmillError as error:
            errors.append(GristmillError(f"{asset}[{key}]: {error}") if len(partitions) > 1 else error)
            report_line(f"{asset}{f'[{key}]' if key else ''}: FAILED: {error}")
    if not builds:
        raise dg.Failure(_message(asset, errors, len(partitions)), allow_retries=False) from errors[0]
    return builds, errors


def _passing(errors: Sequence[Exception]) -> Exception | None:
    """Return the first error that may not come again: what is wrong with input and settings does."""
    return next((error for error in errors if not isinstance(error, GristmillError)), None)


def _mapped(
    context: AssetExecutionContext, mill: Mill, builds: Sequence[Build], pool: ThreadPoolExecutor, *, isolate: bool
) -> Iterator[Mapped[Build, Built]]:
    """Yield what became of each of `builds`, in order."""
    if not isolate:
        return map_shards(_Building(mill.store), builds, _engine(mill, builds))

    def live(build: Build) -> LiveRun:
        tags = RunTags(context.run.run_id, build.asset, build.partition, build.fingerprint())
        directory = mill.store.staging(build.asset, build.fingerprint())
        return LiveRun(mill.tracker, tags, directory, parent=_parent_run(context, build.partition))

    return build_in_children(context, mill.store, builds, mill.engine.num_workers, live=live, pool=pool)


class _Building:
    """``store.build`` as a function that a process pool can carry."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def __call__(self, build: Build) -> Built:
        return self.store.build(build)


def _engine(mill: Mill, builds: Sequence[Build]) -> Engine:
    """Return where `builds` run: in this process where all are there already."""
    return mill.engine if _pending(mill.store, builds) else Engine(kind="serial")


def _pending(store: Store, builds: Sequence[Build]) -> bool:
    """Return whether any of `builds` is to be computed."""
    return any(store.find(build.asset, build.fingerprint()) is None for build in builds)


def _described(context: AssetExecutionContext, built: Built, url: str | None) -> dict[str, dg.MetadataValue]:
    """Return the metadata of a materialization, with that of the recipe that it belongs to and of what a run overrode."""
    by_recipe = isinstance(context.assets_def.partitions_def, dg.StaticPartitionsDefinition)
    recipe = recipe_metadata(str(built.manifest.partition)) if by_recipe else {}
    return describe(built, url) | recipe | override_metadata(built.manifest)


def _result(context: AssetExecutionContext, built: Built, url: str | None) -> dg.MaterializeResult:
    return dg.MaterializeResult(metadata=_described(context, built, url), data_version=dg.DataVersion(built.manifest.fingerprint))


def _partition_events(context: AssetExecutionContext, done: Sequence[tuple[Built, str | None]], *, finished: bool) -> Iterator[Any]:
    """Yield a materialization for each partition, after the output without which the steps below would be skipped.

    For the output Dagster records a materialization of every partition itself, all with one data version and no metadata;
    the last one recorded counts, so ours follow, with the provenance of Dagster's. The one version is that of the last of ours, with
    which Dagster compares it.
    """
    provenance: dict[str, str] = {}
    if finished:
        yield dg.Output(None, data_version=dg.DataVersion(done[-1][0].manifest.fingerprint))
        provenance = _provenance(context)
    for built, url in done:
        key = str(built.manifest.partition)
        yield dg.AssetMaterialization(
            asset_key=context.asset_key,
            partition=key,
            metadata=_described(context, built, url),
            tags={**provenance, **_dimensions(context, key), DATA_VERSION_TAG: built.manifest.fingerprint},
        )


def _dimensions(context: AssetExecutionContext, key: str) -> dict[str, str]:
    """Return the tags that name each dimension of a partition in two dimensions."""
    partitions = context.assets_def.partitions_def
    if not isinstance(partitions, dg.MultiPartitionsDefinition):
        return {}
    found = partitions.get_partition_key_from_str(key).keys_by_dimension
    return {f"dagster/partition/{dimension}": value for dimension, value in found.items()}


def _provenance(context: AssetExecutionContext) -> dict[str, str]:
    """Return the tags of this run's last materialization that say which code and which inputs it was made from."""
    event = context.instance.get_latest_materialization_event(context.asset_key)
    tags: Mapping[str, str] = event.asset_materialization.tags or {} if event and event.asset_materialization else {}
    return {name: value for name, value in tags.items() if name.startswith(PROVENANCE_TAGS)}


def _placed(context: AssetExecutionContext, manifest: Manifest) -> tuple[RunTags, str]:
    """Return the tags of the artifact's MLflow run, and the name of the run that groups it with others."""
    tags = RunTags(context.run.run_id, manifest.asset, manifest.partition, manifest.fingerprint)
    return tags, _parent_run(context, manifest.partition)


def _log(mill: Mill, manifest: Manifest, tags: RunTags, parent: str) -> str:
    """Return the link to the artifact's MLflow run; leave one where there is none yet, also of an attempt that could not."""
    run_id = mill.tracker.recorded(manifest)
    if run_id is None:
        run_id = mill.tracker.finish(mill.tracker.start(manifest, parent=parent, tags=tags), manifest)
    return mill.tracker.url(run_id)


def _went_well(log: Future[str]) -> bool:
    return log.done() and not log.cancelled() and log.exception() is None


def _parent_run(context: AssetExecutionContext, partition: str | None) -> str:
    """Return the name of the MLflow run that groups those of `partition`: its recipe's, or the ingestion's."""
    return str(partition).partition("|")[0] if partition in _recipe_partitions(context) else "ingestion"


def _recipe_partitions(context: AssetExecutionContext) -> set[str]:
    partitions = context.assets_def.partitions_def
    return set(partitions.get_partition_keys()) if isinstance(partitions, dg.StaticPartitionsDefinition) else set()


def _check_results(asset: str, names: Sequence[str], manifests: Sequence[Manifest]) -> Iterator[dg.AssetCheckResult]:
    for name in names:
        found = [(manifest, check) for manifest in manifests for check in manifest.checks if check.name == name]
        failed = [(manifest, check) for manifest, check in found if not check.passed]
        shown = failed or found[:20]
        table = [dg.TableRecord({"partition": m.partition or "", "passed": str(c.passed), "finding": c.description}) for m, c in shown]
        yield dg.AssetCheckResult(
            check_name=name,
            passed=bool(found) and not failed,
            severity=dg.AssetCheckSeverity.ERROR if any(c.blocking for _, c in failed) else dg.AssetCheckSeverity.WARN,
            description="; ".join(c.description for _, c in failed[:3]) or (found[0][1].description if len(found) == 1 else None),
            metadata={
                "audited": len(found),
                "failed": len(failed),
                **_numbers(found),
                **({"findings": dg.MetadataValue.table(table)} if table else {}),
            },
        )


def _numbers(found: Sequence[tuple[Manifest, Check]]) -> dict[str, int | float | str]:
    return dict(found[0][1].metadata) if len(found) == 1 else {}


def _fail(asset: str, errors: Sequence[Exception], partitions: int) -> None:
    if passing := _passing(errors):
        raise passing
    raise dg.Failure(_message(asset, errors, partitions), allow_retries=False) from errors[0]


def _message(asset: str, errors: Sequence[Exception], partitions: int) -> str:
    """Return the first error, or the first few where one run holds many partitions."""
    if partitions == 1:
        return f"{asset}: {errors[0]}"
    more = f"\nand {len(errors) - SHOWN_ERRORS} more" if len(errors) > SHOWN_ERRORS else ""
    shown = "\n".join(str(error) for error in errors[:SHOWN_ERRORS])
    return f"{asset}: {len(errors)} of {partitions} partitions failed; the others are kept\n{shown}{more}"


def summary(built: Built) -> str:
    """Return one line for people: what came out and what it cost."""
    counts = built.manifest.counts
    shown = [
        f"{counts[key]:,} {key.replace('_', ' ')}"
        for key in ("documents_in", "kept", "dropped", "quarantined", "documents", "passages", "tokens")
        if key in counts
    ]
    cost = "cached" if built.hit else f"{built.seconds:.1f} s"
    return f"{', '.join(shown) or f'{len(built.manifest.files)} files'} ({cost})"
