"""`gristmill recipes`: list, check, show and compare the recipes."""

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="The recipes: list them, or check, show and compare them.")

Name = Annotated[str, typer.Argument(help="A file in recipes/, without .yaml.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON value.")]


@app.callback(invoke_without_command=True)
def list_recipes(context: typer.Context, as_json: AsJson = False) -> None:
    """List the recipes: name, fingerprint, what each extends, description. Exit code 1 where one cannot be used."""
    if context.invoked_subcommand:
        return
    from assets_defs.recipes import recipe_rows
    from assets_defs.resources import load_recipes

    book = load_recipes()
    rows = recipe_rows(book)
    if as_json:
        typer.echo(json.dumps([{**row, "problems": list(book.broken.get(row["recipe"], ()))} for row in rows], indent=1))
    else:
        _print_rows(rows)
    raise typer.Exit(1 if book.broken else 0)


@app.command()
def check(files: Annotated[list[Path] | None, typer.Argument(help="Recipe files; all of recipes/ where absent.")] = None) -> None:
    """Check recipe files and list every problem: file, line, key, value, and the nearest valid name. Exit code 1 where there is one."""
    from assets_defs.resources import load_project, root_directory
    from pipelines.configuration import check_recipes

    directory = root_directory() / "recipes"
    chosen = list(files or sorted(directory.glob("*.yaml")))
    problems = check_recipes(chosen, load_project(), directory)
    for line in problems:
        typer.echo(line)
    typer.echo(f"{len(chosen)} files, {len(problems)} problems")
    raise typer.Exit(1 if problems else 0)


@app.command()
def show(
    name: Name,
    full: Annotated[bool, typer.Option("--full", help="Fill in every default.")] = False,
) -> None:
    """Print a recipe as one file that extends nothing."""
    import yaml

    from assets_defs.resources import load_recipes

    book = load_recipes()
    recipe = book[name]
    extends = book.files[name].extends
    typer.echo(f"# {name}, fingerprint {recipe.fingerprint}{', extends ' if extends else ''}{' < '.join(extends)}")
    values = recipe.model_dump(mode="json") if full else book.files[name].values
    typer.echo(yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=140), nl=False)


@app.command()
def diff(
    first: Annotated[str, typer.Argument(metavar="A", help="A file in recipes/, without .yaml.")],
    second: Annotated[str, typer.Argument(metavar="B", help="Another.")],
    as_json: AsJson = False,
) -> None:
    """Print the keys in which two recipes differ, and at which asset they part: all before it is built once for both."""
    from assets_defs.recipe_plans import compare_plans
    from assets_defs.resources import MillResource

    found = compare_plans(MillResource().open(), first, second)
    typer.echo(json.dumps(found.as_json(), indent=1) if as_json else "\n".join(found.lines()))


def _print_rows(rows: list[dict[str, str]]) -> None:
    widths = {key: max(len(row[key]) for row in rows) for key in ("recipe", "fingerprint", "extends")}
    for row in rows:
        typer.echo("  ".join([*(row[key].ljust(width) for key, width in widths.items() if width), row["description"]]))
