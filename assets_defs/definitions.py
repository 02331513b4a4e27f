"""The code location: what `dagster dev` loads."""

import sys
import warnings

import dagster as dg

# single_run backfill policies are marked beta; they are what lets one run hold many partitions.
warnings.filterwarnings("ignore", category=dg.BetaWarning)

from assets_defs import (  # noqa: E402
    age_splits,
    automation,
    classification,
    comparison,
    contamination,
    corpus,
    critical_ratio,
    deduplication,
    embedding,
    evaluation,
    filtering,
    mixture,
    probing,
    recipes_report,
    report,
    selection,
    sweeping,
    task_evaluation,
    tokenization,
    training,
)
from assets_defs.recipes import unusable  # noqa: E402
from assets_defs.resources import MillResource, load_recipes  # noqa: E402

for line in unusable(load_recipes()):
    sys.stderr.write(f"{line}\n")

ASSETS = dg.load_assets_from_modules(
    [
        corpus,
        filtering,
        sweeping,
        contamination,
        deduplication,
        age_splits,
        tokenization,
        embedding,
        selection,
        training,
        probing,
        critical_ratio,
        mixture,
        evaluation,
        task_evaluation,
        classification,
        comparison,
        report,
        recipes_report,
    ]
)

defs = dg.Definitions(
    assets=ASSETS,
    jobs=automation.JOBS,
    schedules=automation.SCHEDULES,
    sensors=automation.SENSORS,
    resources={"mill": MillResource()},
    executor=dg.in_process_executor,
)
