"""What the UI shows of recipes: all of them on each asset that they partition, and each on what was made by it."""

from functools import cache

import dagster as dg

from assets_defs.metadata import MAX_ROWS
from assets_defs.resources import load_recipes
from pipelines.configuration import RecipeBook


def recipe_rows(book: RecipeBook) -> list[dict[str, str]]:
    """Return a row per recipe: name, fingerprint, what it extends, description; of one that cannot be read how much is wrong instead."""
    rows = []
    for name in book.names:
        extends = " < ".join(book.files[name].extends) if name in book.files else ""
        if name in book:
            rows.append({"recipe": name, "fingerprint": book[name].fingerprint, "extends": extends, "description": book[name].description})
        else:
            said = f"CANNOT BE USED: {_problems(len(book.broken[name]))}, the first: {book.broken[name][0]}"
            rows.append({"recipe": name, "fingerprint": "", "extends": extends, "description": said})
    return rows


@cache
def recipe_table() -> dict[str, dg.MetadataValue]:
    """Return the table of all recipes as metadata of an asset, those that cannot be used first."""
    rows = sorted(recipe_rows(load_recipes()), key=lambda row: bool(row["fingerprint"]))
    records = [dg.TableRecord(row) for row in rows[:MAX_ROWS]]
    return {"recipes": dg.MetadataValue.table(records)} if records else {}


def recipe_metadata(partition: str) -> dict[str, dg.MetadataValue]:
    """Return what is shown of the recipe of `partition`, ``recipe`` or ``recipe|probe``, on what was made by it."""
    name, book = partition.partition("|")[0], load_recipes()
    if name not in book:
        return {}
    extends = extended_by(name)
    return {
        "recipe_fingerprint": dg.MetadataValue.text(book[name].fingerprint),
        "recipe_description": dg.MetadataValue.text(book[name].description),
        "recipe_extends": dg.MetadataValue.text(" < ".join(extends) or "none"),
    }


def extended_by(partition: str) -> tuple[str, ...]:
    """Return the recipes that the recipe of `partition` extends, the nearest first."""
    found = load_recipes().files.get(partition.partition("|")[0])
    return found.extends if found else ()


def unusable(book: RecipeBook) -> list[str]:
    """Return one line per recipe that cannot be used, for the log of whoever loads the others."""
    return [
        f"recipes/{name}.yaml cannot be used: {_problems(len(lines))}; `gristmill recipes check` lists them"
        for name, lines in sorted(book.broken.items())
    ]


def _problems(count: int) -> str:
    return "1 problem" if count == 1 else f"{count} problems"
