"""The asset graph, the jobs, the schedules and the sensors are a golden file: a change of shape is a change of this file."""

from __future__ import annotations

import json
import os
from pathlib import Path

import dagster as dg
import pytest

from assets_defs.automation import STAGES
from assets_defs.columns import MAIN_TABLES, described
from assets_defs.definitions import defs
from assets_defs.metadata import describe
from assets_defs.partitions import PROBE, PROBES, RECIPE, SOURCE
from assets_defs.resources import Mill, load_project, load_recipes
from assets_defs.selection import scores
from pipelines.decisions import default_thresholds
from pipelines.documents import DOCUMENT_SCHEMA
from pipelines.engine import Engine
from pipelines.errors import GristmillError
from pipelines.store import Built, Store

GOLDEN = Path(__file__).parent / "golden_graph.json"


def graph() -> dict[str, object]:
    """Return the shape of the code location."""
    repository = defs.get_repository_def()
    assets = {}
    for key in sorted(repository.asset_graph.get_all_asset_keys()):
        node = repository.asset_graph.get(key)
        assets[key.to_user_string()] = {
            "group": node.group_name,
            "partitions": {SOURCE: "source", RECIPE: "recipe", PROBE: "probe"}.get(node.partitions_def, "none"),
            "upstream": sorted(parent.to_user_string() for parent in node.parent_keys),
            "checks": sorted(check.name for check in node.check_keys),
            "kinds": sorted(node.kinds),
            "pools": sorted(node.pools or ()),
        }
    jobs = {
        job.name: sorted(key.to_user_string() for key in job.asset_layer.executable_asset_keys)
        for job in repository.get_all_jobs()
        if not job.name.startswith("__")
    }
    schedules = {schedule.name: [schedule.cron_schedule, schedule.job_name] for schedule in repository.schedule_defs}
    return {"assets": assets, "jobs": jobs, "schedules": schedules, "sensors": sorted(s.name for s in repository.sensor_defs)}


def test_the_graph_is_the_golden_one() -> None:
    """Write it anew with GRISTMILL_GOLDEN=1 where the change is meant."""
    found = json.loads(json.dumps(graph()))
    if os.environ.get("GRISTMILL_GOLDEN"):
        GOLDEN.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    assert found == json.loads(GOLDEN.read_text())


def test_every_asset_is_described_owned_versioned_and_gated() -> None:
    for definition in defs.resolve_asset_graph().asset_nodes:
        assert definition.group_name == "gristmill"
        description = definition.description or ""
        first, _, rest = description.partition("\n\n")
        assert len(first) > 40 and "Input:" in rest and "Cost:" in rest, f"{definition.key}: what it is, then its input and its cost"
        assert definition.owners, definition.key
        assert definition.code_version, definition.key
        assert definition.check_keys or definition.key.to_user_string() == "tokenizer", definition.key


def test_the_stages_cover_every_asset_once() -> None:
    staged = [asset for _, assets in STAGES for asset in assets]
    assert sorted(staged) == sorted(node.key.to_user_string() for node in defs.resolve_asset_graph().asset_nodes)


def test_every_recipe_has_its_probes_as_partitions() -> None:
    assert set(PROBES) == set(RECIPE.get_partition_keys())
    assert sorted(key for keys in PROBES.values() for key in keys) == sorted(PROBE.get_partition_keys())


def test_the_monthly_schedule_asks_for_the_newest_snapshot_of_every_domain() -> None:
    from datetime import UTC, datetime

    schedule = defs.get_repository_def().get_schedule_def("monthly_snapshot")
    context = dg.build_schedule_context(scheduled_execution_time=datetime(2026, 4, 2, 3, 0, tzinfo=UTC))
    requests = schedule.evaluate_tick(context).run_requests
    assert sorted(request.partition_key for request in requests) == sorted(
        str(key) for key in SOURCE.get_partition_keys() if str(key).endswith("|2026-03-01")
    )


@pytest.mark.parametrize(
    ("score", "message"),
    [
        ("perplexity.log_perplexity", "quality_scores holds no snapshot of"),
        ("toxicity.document_probability", "toxicity_scores holds no snapshot of"),
        (
            "quality_classifier.good_probability",
            "quality_classifier is not scored; add it to project.yaml, or name a rule of quality: gopher",
        ),
    ],
)
def test_a_selection_reads_the_scores_that_its_recipe_names_and_no_others(tmp_path: Path, score: str, message: str) -> None:
    mill, recipe = Mill(tmp_path, Engine(kind="serial")), load_recipes()["code-critical"]
    assert scores(mill, recipe) == {}
    named = recipe.model_copy(update={"selection": recipe.selection.model_copy(update={"score": score})})
    with pytest.raises(GristmillError, match=message):
        scores(mill, named)


def test_how_much_is_kept_is_a_number_that_dagster_plots(tmp_path: Path) -> None:
    from conftest import corpus as publish
    from small_world import sample_texts

    manifest = publish(Store(tmp_path), "wiki", sample_texts("wiki", 2, 300))
    outcome = manifest.outcome.model_copy(update={"counts": {"documents_in": 8, "kept": 6, "dropped": 1, "quarantined": 1}})
    shown = describe(Built(manifest.model_copy(update={"outcome": outcome}).at(manifest.directory), hit=False, seconds=0.0), None)
    assert shown["keep_rate"].value == 0.75 and shown["dagster/row_count"].value == 6


def test_the_main_tables_describe_their_columns(tmp_path: Path) -> None:
    from conftest import corpus as publish
    from small_world import sample_texts

    manifest = publish(Store(tmp_path), "wiki", sample_texts("wiki", 2, 300))
    schema = describe(Built(manifest, hit=False, seconds=0.0), None)["dagster/column_schema"].value
    assert [column.name for column in schema.columns] == DOCUMENT_SCHEMA.names
    assert all(len(column.description or "") > 8 and column.type == "string" for column in schema.columns)
    assert set(MAIN_TABLES) < {node.key.to_user_string() for node in defs.resolve_asset_graph().asset_nodes}
    for stage in ("quality", "toxicity"):
        for name in load_project().scored(stage):
            assert all(described(f"{name}.{rule}") for rule in default_thresholds(name))
    assert described("no_such_column") is None and described("no_filter.rule") is None
