"""The command `gristmill`: what the UI does not do.

gristmill run [--recipe NAME]    drive the whole graph in order and print the results; --dry-run: what training would take
gristmill ui                     Dagster and MLflow on 127.0.0.1
gristmill recipes                list the recipes; check, show NAME, diff A B
gristmill export ASSET PARTITION DIRECTORY
gristmill tokens export DIRECTORY --format nanotron (--recipe NAME [--role general] | --partition PARTITION)
gristmill verify ASSET [PARTITION]
gristmill explain ID [--recipe NAME] [--json]    why a document was kept or dropped
gristmill promote RECIPE         make its checkpoint the champion of MLflow's registry, if its comparison passed
"""

import contextlib
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
    asset: Annotated[str, typer.Argument(help="raw_corpus or cleaned_corpus, or deduplicated_corpus for what a recipe keeps.")],
    partition: Annotated[str, typer.Argument(help="A source partition such as 'wiki|2026-01-01', or a recipe.")],
    directory: Annotated[Path, typer.Argument(help="Where the `datasets` folder is written; must not exist.")],
) -> None:
    """Write a corpus as a folder that `datasets.load_from_disk` opens."""
    from assets_defs.exports import export_partition

    count = export_partition(_mill(), asset, partition, directory)
    typer.echo(f"{count:,} documents in {directory}; open with datasets.load_from_disk({str(directory)!r})")


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
    if recipe:
        written = token_exports.export_recipe_tokens(_mill(), format, recipe, directory, role=role)
    else:
        written = token_exports.export_partition_tokens(_mill(), format, str(partition), directory)
    for file in written:
        typer.echo(f"{file.name}: {file.documents:,} documents, {file.tokens:,} tokens")
    typer.echo(f"{sum(file.tokens for file in written):,} tokens in {directory}")


@app.command()
def verify(
    asset: Annotated[str, typer.Argument(help="An asset.")],
    partition: Annotated[str | None, typer.Argument(help="A partition; all where absent.")] = None,
) -> None:
    """Re-hash the files of an asset's artifacts and name every one that differs."""
    store = _mill().store
    keys: list[str | None] = [partition] if partition else [*store.partitions(asset)] or [None]
    faults = [fault for key in keys for fault in store.verify(store.current(asset, key))]
    for fault in faults:
        typer.echo(fault)
    typer.echo(f"{len(keys)} artifacts, {len(faults)} faults")
    raise typer.Exit(1 if faults else 0)


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

    found = explanations.explain_document(_mill(), document, recipe)
    if as_json:
        typer.echo(explanations.as_json(found))
        return
    from rich.console import Console

    explanations.show(found, Console(width=None if sys.stdout.isatty() else 140))


@app.command()
def promote(recipe: Annotated[str, typer.Argument(help="A file in recipes/, without .yaml.")]) -> None:
    """Make a recipe's pretrained checkpoint the champion of MLflow's model registry.

    Refused where its comparison did not pass the check `not_worse_than_baseline`; the broken guards are named.
    """
    mill = _mill()
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

    home = home_directory()
    home.mkdir(parents=True, exist_ok=True)
    tracking = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home / 'mlflow.db'}"
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
