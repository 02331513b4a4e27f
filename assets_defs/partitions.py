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
RECIPE_TO_PROBES = dg.StaticPartitionMapping(PROBES)
PROBES_TO_RECIPE = dg.StaticPartitionMapping({key: name for name, keys in PROBES.items() for key in keys})
