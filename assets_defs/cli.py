"""The command `gristmill`: what the UI does not do.

gristmill run [--recipe NAME]    drive the whole graph in order and print the results; --dry-run: what training would take
gristmill ui                     Dagster and MLflow on 127.0.0.1
gristmill recipes                list the recipes; check, show NAME, diff A B
gristmill export ASSET PARTITION DIRECTORY
gristmill tokens export DIRECTORY --format nanotron (--recipe NAME [--role general] | --partition PARTITION)
gristmill verify ASSET[PARTITION]    re-hash an artifact and all it was made from; --all: the whole store
gristmill trace DOCUMENT_ID | ASSET[PARTITION] | FINGERPRINT    from a document to its training steps, from a number to its ancestors
gristmill gc [--delete]          what nothing needs any more; gristmill pin ASSET[PARTITION] keeps it
gristmill explain ID [--recipe NAME] [--json]    why a document was kept or dropped
gristmill refusals               partitions whose last attempt failed its audit; --dismiss ASSET [PARTITION]
gristmill promote RECIPE         make its checkpoint the champion of MLflow's registry, if its comparison passed
"""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Annotated

import typer

from assets_defs import recipe_commands
from pipelines.errors import GristmillError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Orchestrated data and training pipelines for language-model pretraining.",
)

tokens = typer.Typer(no_args_is_help=True, help="Token files of other trainers.")
app.add_typer(tokens, name="tokens")
app.add_typer(recipe_commands.app, name="recipes")

RecipeName = Annotated[str, typer.Option("--recipe", "-r", help="A file in recipes/, without .yaml.")]


@app.command()
def run(
    recipe: RecipeName = "code-critical",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Train nothing: print parameters, memory, tokens, epochs per domain and estimated time.")
    ] = False,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="ASSET.KEY=VALUE", help="Another setting of one asset for this run alone; may be given again."),
    ] = None,
) -> None:
    """Materialize the whole graph for one recipe, stage by stage, and print the results.

    A partition that was made with --set stands at what was asked for until the next run without.
    """
    if dry_run and settings:
        raise typer.BadParameter("--set changes a run, and --dry-run makes none")
    if dry_run:
        from assets_defs.dry_run import show_dry_run

        show_dry_run(_mill(), recipe)
        return
    from assets_defs.driver import drive
    from assets_defs.overrides import parsed as parsed_overrides

    drive(recipe, parsed_overrides(settings) if settings else None)


@app.command()
def export(
    asset: Annotated[
        str, typer.Argument(help="raw_corpus or cleaned_corpus, deduplicated_corpus for what a recipe keeps, or pretrained_checkpoint.")
    ],
    partition: Annotated[str, typer.Argument(help="A source partition such as 'wiki|2026-01-01', or a recipe.")],
    directory: Annotated[Path, typer.Argument(help="Where the folder is written; must not exist.")],
) -> None:
    """Write a corpus as a folder that `datasets` opens, or a checkpoint as one that `transformers` opens, with its model and data card."""
    from assets_defs.exports import export_partition

    with _reading() as mill:
        typer.echo(export_partition(mill, asset, partition, directory))


@tokens.command("export")
def export_tokens(
    directory: Annotated[Path, typer.Argument(help="Where the token files are written; must not exist.")],
    format: Annotated[str, typer.Option(help="A plugin of token_formats: nanotron (datatrove), megatron or llmc.")],
    recipe: Annotated[str | None, typer.Option("--recipe", "-r", help="Its selected passages, a file per domain, as shuffled.")] = None,
    role: Annotated[str | None, typer.Option(help="general or target; both where absent. Of a recipe.")] = None,
    partition: Annotated[str | None, typer.Option(help="A source partition such as 'wiki|2026-01-01': its documents, in order.")] = None,
) -> None:
    """Write tokens as the files of another trainer, with the tokenizer and a table that names the documents.

    The source `token_files` reads such files back into a corpus.
    """
    from assets_defs import token_exports

    if (recipe is None) == (partition is None) or (role and not recipe):
        raise typer.BadParameter("give --recipe NAME, with or without --role, or --partition KEY")
    with _reading() as mill:
        if recipe:
            written = token_exports.export_recipe_tokens(mill, format, recipe, directory, role=role)
        else:
            written = token_exports.export_partition_tokens(mill, format, str(partition), directory)
    for file in written:
        typer.echo(f"{file.name}: {file.documents:,} documents, {file.tokens:,} tokens")
    typer.echo(f"{sum(file.tokens for file in written):,} tokens in {directory}")


@app.command()
def verify(
    asset: Annotated[
        str | None, typer.Argument(help="An asset, ASSET[PARTITION], a fingerprint or the start of one, or a directory.")
    ] = None,
    partition: Annotated[str | None, typer.Argument(help="A partition; all where absent.")] = None,
    ancestors: Annotated[bool, typer.Option(help="Whether all that it was made from is re-hashed, too.")] = True,
    whole: Annotated[bool, typer.Option("--all", help="Every artifact of the store.")] = False,
) -> None:
    """Re-hash artifacts and all that they were made from, and name everything that is not as it was published.

    Exit code 0: no fault. 1: faults, each on a line, or no such artifact. 2: wrong usage.
    """
    from assets_defs import housekeeping

    if whole == (asset is not None):
        raise typer.BadParameter("name an artifact, or give --all")
    with _reading() as mill:
        addresses, gone = housekeeping.everything(mill) if whole else (housekeeping.named(mill, str(asset), partition), [])
        found = housekeeping.verify_artifacts(mill, addresses, ancestors=ancestors and not whole)
    found = dataclasses.replace(found, faults=(*found.faults, *gone))
    housekeeping.show_verified(found, _console())
    raise typer.Exit(1 if found.faults else 0)


@app.command()
def trace(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME", help="A document's id or the start of it; ASSET[PARTITION]; a fingerprint or its start; a directory."
        ),
    ],
    recipe: Annotated[str | None, typer.Option("--recipe", "-r", help="Of a document: this recipe alone.")] = None,
    down: Annotated[bool, typer.Option("--downstream", help="Of an artifact: what was made from it and stands at a partition.")] = False,
    documents: Annotated[
        Path | None, typer.Option(help="Of a checkpoint: a new Parquet file for every document it has seen, with tokens and times read.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Print every row of long tables.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object; it has every row.")] = False,
) -> None:
    """Follow a document to the training steps that read it, or an artifact to all that it was made from.

    Of a document: where it came from, what each filter decided, who represents it in the selection, where its tokens lie, which steps
    of which checkpoints read them, and the evaluations of these. Of an artifact: its settings, and fingerprint, code version and time of
    every ancestor; of a checkpoint also its documents by domain.
    """
    from assets_defs import housekeeping, trace_tables, tracing
    from assets_defs.explanations import finite

    with _reading() as mill:
        if down or documents:
            address = housekeeping.one(mill, name)
            answer = tracing.downstream(mill, address) if down else tracing.trace_artifact(mill, address, documents=documents)
        else:
            answer = tracing.trace(mill, name, recipe)
    if as_json:
        typer.echo(json.dumps(finite(answer), ensure_ascii=False, default=str))
        return
    trace_tables.show(answer, _console(), every=every)


@app.command()
def gc(
    delete: Annotated[bool, typer.Option("--delete", help="Remove them. Without it they are only listed.")] = False,
    older_than: Annotated[
        float | None,
        typer.Option(min=0, metavar="DAYS", help="Only what is older; where absent, resume points and failed attempts stay 7 days."),
    ] = None,
    superseded_checkpoints: Annotated[
        bool, typer.Option("--superseded-checkpoints", help="Also checkpoints that no partition stands at, and what only they need.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """List what nothing in the store needs: no partition, pin, promoted model, checkpoint or running process; with --delete, remove it.

    Also what killed builds left: staging, failed attempts, locks, leases, half-written files. It may run at any time.
    """
    from assets_defs import housekeeping

    found = housekeeping.keep_house(_mill(), delete=delete, older_than=older_than, checkpoints=not superseded_checkpoints)
    if as_json:
        typer.echo(json.dumps(housekeeping.survey_json(found)))
        return
    housekeeping.show_survey(found, _console())


@app.command()
def pin(
    name: Annotated[
        str | None, typer.Argument(metavar="ARTIFACT", help="ASSET[PARTITION], a fingerprint, or a directory; all pins where absent.")
    ] = None,
    why: Annotated[str, typer.Option("--name", help="Why it is kept.")] = "",
    remove: Annotated[bool, typer.Option("--remove", help="Take the pin away.")] = False,
) -> None:
    """Keep an artifact, and all that it was made from, from `gristmill gc`, whatever its partition moves on to."""
    from assets_defs import housekeeping

    if name is None and remove:
        raise typer.BadParameter("name the pin that is to go")
    if name is not None:
        typer.echo(housekeeping.pin_artifact(_mill(), name, why, remove=remove))
        return
    for one in housekeeping.pins(_mill()):
        typer.echo(f"{one.address.fingerprint}  {one.label}  {one.when}  {one.name}".rstrip())


@app.command()
def explain(
    document: Annotated[
        str, typer.Argument(metavar="ID", help="A document's id, or the start of it; or the file and line of quarantined input.")
    ],
    recipe: RecipeName = "code-critical",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say why a document was kept or dropped: every stage in order, every score beside its threshold.

    Exit code 0: explained, kept or not. 1: no such document (the nearest are named), several begin so, or nothing was
    ingested. 2: wrong usage.
    """
    from assets_defs import explanations

    with _reading() as mill:
        found = explanations.explain_document(mill, document, recipe)
    if as_json:
        typer.echo(explanations.as_json(found))
        return
    explanations.show(found, _console())


@app.command()
def refusals(
    dismiss: Annotated[str | None, typer.Option("--dismiss", metavar="ASSET", help="Forget the refusal of this asset's partition.")] = None,
    partition: Annotated[str | None, typer.Argument(help="Of the asset that is dismissed.")] = None,
) -> None:
    """List the partitions whose last attempt failed its audit; nothing is built of what they stand at until that is mended.

    Exit code 0: there are none, or one was dismissed. 1: there are some, or none was there to dismiss.
    """
    from pipelines import refusals as refused

    root = _mill().store.root
    if dismiss:
        label = f"{dismiss}[{partition}]" if partition else dismiss
        if not refused.clear(root, dismiss, partition):
            raise GristmillError(f"{label} was not refused; `gristmill refusals` lists what was")
        typer.echo(f"{label}: what it stands at is read again")
        return
    found = refused.refusals(root)
    for one in found:
        typer.echo(f"{one.label}: {one.remedy()}")
    raise typer.Exit(1 if found else 0)


@app.command()
def promote(recipe: Annotated[str, typer.Argument(help="A file in recipes/, without .yaml.")]) -> None:
    """Make a recipe's pretrained checkpoint the champion of MLflow's model registry.

    Refused where its comparison did not pass the check `not_worse_than_baseline`; the broken guards are named.
    """
    with _reading() as mill:
        checkpoint, comparison = (mill.store.current(asset, recipe) for asset in ("pretrained_checkpoint", "comparison"))
        version = mill.tracker.promote(checkpoint, comparison)
    typer.echo(f"{checkpoint.label} is version {version} of models:/{mill.project.name}@champion")


@app.command()
def ui(
    port: Annotated[int, typer.Option(help="Port of Dagster.")] = 3000,
    mlflow_port: Annotated[int, typer.Option(help="Port of MLflow.")] = 5000,
) -> None:
    """Start `dagster dev` and the MLflow UI on 127.0.0.1; Ctrl-C stops both."""
    from assets_defs.resources import home_directory, root_directory
    from pipelines.tracking import tracking_uri

    home = home_directory()
    home.mkdir(parents=True, exist_ok=True)
    tracking = tracking_uri(home)
    environment = {**os.environ, "GRISTMILL_MLFLOW_UI": f"http://127.0.0.1:{mlflow_port}", "MLFLOW_DISABLE_TELEMETRY": "true"}
    environment.setdefault("DAGSTER_HOME", str(root_directory()))
    mlflow = [
        sys.executable,
        "-m",
        "mlflow",
        "ui",
        "--host",
        "127.0.0.1",
        "--port",
        str(mlflow_port),
        "--workers",
        "1",
        "--backend-store-uri",
        tracking,
    ]
    dagster = [sys.executable, "-m", "dagster", "dev", "-h", "127.0.0.1", "-p", str(port)]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # started in the background, a shell has it ignored, and children would too
    typer.echo(f"Dagster: http://127.0.0.1:{port}   MLflow: http://127.0.0.1:{mlflow_port}   (Ctrl-C stops both)")
    children = [subprocess.Popen(command, env=environment, start_new_session=True) for command in (mlflow, dagster)]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        while all(child.poll() is None for child in children):
            time.sleep(0.5)
    except KeyboardInterrupt:
        pass
    finally:
        for child, stop in zip(children, (signal.SIGTERM, signal.SIGINT), strict=True):  # dagster dev ends its runs' servers on SIGINT
            _stop(child, stop)


def _stop(child: subprocess.Popen[bytes], stop: signal.Signals, *, seconds: float = 20.0) -> None:
    """Ask the process group of `child` to end, and end what is left of it after `seconds`."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, stop)
    deadline = time.monotonic() + seconds
    while child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _console():  # noqa: ANN202 - as _mill
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 140)


@contextlib.contextmanager
def _reading():  # noqa: ANN202 - as _mill
    """Yield the mill; inside, housekeeping leaves its artifacts where they are."""
    mill = _mill()
    with mill.store.leases.looking():
        yield mill


def _mill():  # noqa: ANN202 - imported where it is used, so that --help is fast
    from assets_defs.resources import MillResource

    return MillResource().open()


def main() -> None:
    """Run the command; an expected error is one message on stderr and exit code 1."""
    warnings.filterwarnings("ignore", message=".* is currently in beta")  # of Dagster, as in definitions.py
    try:
        app()
    except GristmillError as error:
        typer.secho(str(error), fg=typer.colors.RED, err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
