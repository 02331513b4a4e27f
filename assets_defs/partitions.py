"""The partition spaces: source (domain x snapshot), recipe, and probe (recipe x probe)."""

import dagster as dg

from assets_defs.resources import load_project, load_recipes

SOURCE = dg.MultiPartitionsDefinition(
    {
        "domain": dg.StaticPartitionsDefinition(sorted(load_project().domains)),
        "snapshot": dg.MonthlyPartitionsDefinition(start_date=load_project().first_snapshot),
    }
)
"""Keys such as ``code|2026-03-01``: what is measured, once."""

RECIPE = dg.StaticPartitionsDefinition(sorted(load_recipes()))
"""One key per file in recipes/: what is decided."""

PROBES = {name: [f"{name}|{probe}" for probe in recipe.probes] for name, recipe in sorted(load_recipes().items())}

PROBE = dg.StaticPartitionsDefinition([key for keys in PROBES.values() for key in keys])
"""Keys such as ``code-critical|r0.50-s0``: one probe of one recipe."""

ALL = dg.AllPartitionMapping()


def named_by(field: str, asset: str) -> dg.AssetDep:
    """Return the dependency on `asset` of a recipe and of the other recipe that ``evaluation.FIELD`` of it names."""
    needed: dict[str, list[str]] = {name: [name] for name in sorted(load_recipes())}
    for name, recipe in sorted(load_recipes().items()):
        other = getattr(recipe.evaluation, field)
        if other in needed and name not in needed[other]:
            needed[other].append(name)
    return dg.AssetDep(asset, partition_mapping=dg.StaticPartitionMapping(needed))


RECIPE_TO_PROBES = dg.StaticPartitionMapping(PROBES)
PROBES_TO_RECIPE = dg.StaticPartitionMapping({key: name for name, keys in PROBES.items() for key in keys})
