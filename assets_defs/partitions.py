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

RECIPE = dg.StaticPartitionsDefinition(load_recipes().names)
"""One key per file in recipes/: what is decided. A file with problems keeps its key, and with it what was made from it before; to
materialize it fails with the list of them."""

PROBES = {
    name: [f"{name}|{probe}" for probe in load_recipes()[name].probes] if name in load_recipes() else [] for name in load_recipes().names
}
"""The probes of each recipe; none of one that cannot be read."""

PROBE = dg.StaticPartitionsDefinition([key for keys in PROBES.values() for key in keys])
"""Keys such as ``code-critical|r0.50-s0``: one probe of one recipe."""

ALL = dg.AllPartitionMapping()


def named_by(field: str, asset: str) -> dg.AssetDep:
    """Return the dependency on `asset` of a recipe and of the other recipe that ``evaluation.FIELD`` of it names."""
    needed: dict[str, list[str]] = {name: [name] for name in load_recipes().names}
    for name, recipe in sorted(load_recipes().items()):
        other = getattr(recipe.evaluation, field)
        if other in needed and name not in needed[other]:
            needed[other].append(name)
    return dg.AssetDep(asset, partition_mapping=dg.StaticPartitionMapping(needed))


RECIPE_TO_PROBES = dg.StaticPartitionMapping(PROBES)
PROBES_TO_RECIPE = dg.StaticPartitionMapping({key: name for name, keys in PROBES.items() for key in keys})
