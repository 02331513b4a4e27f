"""Overrides of a run: typed and refused as config, part of the artifact's address, seen downstream, and gone with the next ordinary run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dagster as dg
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dagster._core.definitions.data_version import extract_data_version_from_entry

from assets_defs import filtering
from assets_defs import overrides as ours
from assets_defs.automation import STAGES
from assets_defs.definitions import defs
from assets_defs.driver import QUIET
from assets_defs.overrides import OF_PROJECT, OF_RECIPE, OverriddenMill, check_overrides, overridable, parsed
from assets_defs.partitions import PROBE, RECIPE, SOURCE
from assets_defs.resources import Mill, MillResource, load_project, load_recipes
from pipelines.engine import Engine
from pipelines.errors import GristmillError, UnknownName
from pipelines.manifests import Json, Manifest, Outcome
from pipelines.overrides import standing
from pipelines.plugins import Settings
from pipelines.recipes import Project, Recipe
from pipelines.store import Build

DOMAINS = ("code", "techdoc", "wiki")  # those of recipes/tiny.yaml
QUALITY, TOXICITY = "quality_filtered_corpus", "toxicity_filtered_corpus"
WORDS = "gopher_quality.num_words"


class Scored(Settings):
    """A corpus of ten documents, of which number n scores 10 * n in every rule that wants much, and 0 in the others."""

    domain: str
    stage: str


def score(settings: Scored, out: Path) -> Outcome:
    """Write the scores of every rule that the recipe decides by."""
    thresholds = load_recipes()["tiny"].filter_settings(load_project(), settings.stage).thresholds  # type: ignore[arg-type]
    rules = {rule: bound.keep for found in thresholds.values() for rule, bound in found.items()}
    rows = [
        {"id": f"{settings.domain}-{n}", "domain": settings.domain, "snapshot": "2026-01-01", "characters": 100}
        | {rule: (10.0 * n if rule == WORDS else float("nan")) for rule in rules}
        for n in range(10)
    ]
    pq.write_table(pa.Table.from_pylist(rows), out / "scores.parquet")
    return Outcome(counts={"kept": len(rows)})


@pytest.fixture(scope="module")
def mill(tmp_path_factory: pytest.TempPathFactory) -> Mill:
    """A store in which three domains are scored for quality and toxicity."""
    mill = Mill(tmp_path_factory.mktemp("overrides"), Engine(kind="serial"))
    for stage in ("quality", "toxicity"):
        for domain in DOMAINS:
            settings = Scored(domain=domain, stage=stage)
            mill.store.build(Build(asset=f"{stage}_scores", partition=f"{domain}|2026-01-01", step=score, settings=settings))
    return mill


@pytest.fixture(scope="module")
def instance() -> dg.DagsterInstance:
    return dg.DagsterInstance.ephemeral()


Overrides = Mapping[str, Json]


def materialize(mill: Mill, instance: dg.DagsterInstance, chosen: Mapping[str, Overrides | None], *, partition: str = "tiny") -> Any:
    """Run the assets of `chosen`, each with its overrides, as the Launchpad does."""
    job = dg.Definitions(
        assets=[filtering.quality_filtered_corpus, filtering.toxicity_filtered_corpus],
        resources={"mill": MillResource(home=str(mill.home), workers=1)},
        executor=dg.in_process_executor,
    ).resolve_implicit_global_asset_job_def()
    ops = {name: {"config": {"overrides": overrides}} for name, overrides in chosen.items() if overrides is not None}
    return job.execute_in_process(
        instance=instance,
        partition_key=partition,
        asset_selection=[dg.AssetKey(name) for name in chosen],
        run_config={**QUIET, "ops": ops},
        raise_on_error=False,
    )


def shown(instance: dg.DagsterInstance, asset: str) -> dict[str, Any]:
    """Return the metadata of the last materialization, with its data version."""
    event = instance.get_latest_materialization_event(dg.AssetKey(asset))
    assert event and event.asset_materialization
    found = {key: value.value for key, value in event.asset_materialization.metadata.items()}
    return {**found, "data_version": extract_data_version_from_entry(event).value}


def current(mill: Mill, asset: str) -> Manifest:
    return mill.store.current(asset, "tiny")


def kept_of_wiki(decided: Manifest) -> int:
    return next(int(row["kept"]) for row in decided.outcome.tables["by_domain"] if row["domain"] == "wiki")  # type: ignore[arg-type]


LOOSER = {"quality": {"filters": {"gopher_quality": {"num_words": 15}}}}


def test_an_override_is_another_artifact_that_says_so_until_an_ordinary_run(mill: Mill, instance: dg.DagsterInstance) -> None:
    assert materialize(mill, instance, {QUALITY: None, TOXICITY: None}).success
    own = {asset: current(mill, asset) for asset in (QUALITY, TOXICITY)}
    assert "overridden" not in shown(instance, QUALITY) and not (mill.store.root / "overridden").exists()
    assert shown(instance, QUALITY)["recipe_fingerprint"] == load_recipes()["tiny"].fingerprint
    assert shown(instance, QUALITY)["recipe_extends"] == "none"

    assert materialize(mill, instance, {QUALITY: LOOSER}).success
    other, seen = current(mill, QUALITY), shown(instance, QUALITY)
    made = {f"{QUALITY}[tiny]": {f"quality.filters.{WORDS}": 15}}
    assert other.settings["thresholds"]["wiki"][WORDS]["value"] == 15.0 != own[QUALITY].settings["thresholds"]["wiki"][WORDS]["value"]
    assert other.fingerprint == seen["data_version"] != own[QUALITY].fingerprint
    assert kept_of_wiki(other) > kept_of_wiki(own[QUALITY])
    assert standing(other) == seen["overrides"] == made
    assert other.provenance["overrides"] == made[f"{QUALITY}[tiny]"] and "overrides" not in own[QUALITY].provenance
    assert "not its recipe's own" in seen["overridden"]

    assert materialize(mill, instance, {TOXICITY: None}).success  # what is made from it says so too
    assert current(mill, TOXICITY).fingerprint != own[TOXICITY].fingerprint
    assert shown(instance, TOXICITY)["overrides"] == made
    assert f"Made from {QUALITY}[tiny], whose settings a run overrode" in shown(instance, TOXICITY)["overridden"]

    assert materialize(mill, instance, {QUALITY: LOOSER}).success  # asked for again: a hit, and still not the recipe's own
    assert shown(instance, QUALITY)["cache"] == "hit" and shown(instance, QUALITY)["overrides"] == made

    assert materialize(mill, instance, {QUALITY: None, TOXICITY: None}).success
    for asset, manifest in own.items():
        assert current(mill, asset).fingerprint == manifest.fingerprint == shown(instance, asset)["data_version"]
        assert shown(instance, asset)["cache"] == "hit" and "overridden" not in shown(instance, asset)
        assert standing(current(mill, asset)) == {}


def test_an_override_that_changes_nothing_is_the_recipes_own(mill: Mill, instance: dg.DagsterInstance) -> None:
    assert materialize(mill, instance, {QUALITY: None}).success
    own = current(mill, QUALITY)
    assert materialize(mill, instance, {QUALITY: {"quality": {"mode": "keep"}}}).success
    assert current(mill, QUALITY).fingerprint == own.fingerprint and "overridden" not in shown(instance, QUALITY)


def test_a_wrong_value_is_refused_with_the_nearest_name_and_changes_nothing(mill: Mill, instance: dg.DagsterInstance) -> None:
    assert materialize(mill, instance, {QUALITY: None}).success
    before = current(mill, QUALITY).fingerprint
    wrong = {"quality": {"filters": {"gopher_qualty": {}, "gopher_quality": {"num_word": 3, "num_words": "many"}}}}
    result = materialize(mill, instance, {QUALITY: wrong})
    (failure,) = [event.step_failure_data.user_failure_data.description for event in result.all_events if event.is_step_failure]
    for said in ("did you mean 'gopher_quality'?", "did you mean 'num_words'?", "'many' is not a number or off"):
        assert said in failure, failure
    assert f"overrides of {QUALITY}[tiny]: quality.filters" in failure
    assert current(mill, QUALITY).fingerprint == before and standing(current(mill, QUALITY)) == {}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"qualty": {}}, 'unexpected config entry "qualty" at path root:ops:quality_filtered_corpus:config:overrides.*quality'),
        ({"quality": {"modes": "off"}}, 'unexpected config entry "modes".*mode'),
        ({"quality": {"mode": "inverted"}}, "not in enum type StageSettings_mode got inverted"),
        ({"quality": 3}, "must be dict"),
    ],
)
def test_dagster_refuses_what_is_no_setting_before_a_run_exists(
    mill: Mill, instance: dg.DagsterInstance, overrides: dict, message: str
) -> None:
    before = len(instance.get_runs())
    with pytest.raises(dg.DagsterInvalidConfigError, match=f"(?s){message}"):
        materialize(mill, instance, {QUALITY: overrides})
    assert len(instance.get_runs()) == before


# The fields of the config


def nodes() -> dict[str, Any]:
    return {node.key.to_user_string(): node for node in defs.resolve_asset_graph().asset_nodes}


def test_every_asset_with_settings_can_be_overridden() -> None:
    without = {"threshold_sweep", "report", "recipes_report"}  # these have none
    assert set(nodes()) - without == {*OF_RECIPE, *OF_PROJECT}
    for name, node in nodes().items():
        assert name not in OF_RECIPE or node.partitions_def in (RECIPE, PROBE)
        assert name not in OF_PROJECT or node.partitions_def in (SOURCE, None)
    assert {key for keys in OF_RECIPE.values() for key in keys} <= set(Recipe.model_fields)
    assert {key for keys in OF_PROJECT.values() for key in keys} <= set(Project.model_fields)


@pytest.mark.parametrize("asset", [*OF_RECIPE, *OF_PROJECT])
def test_the_launchpad_shows_typed_and_described_fields(asset: str) -> None:
    fields = overridable(asset)
    assert fields
    overrides = fields["overrides"]
    assert "until the asset is materialized without overrides" in overrides.description
    assert {*overrides.config_type.fields} == {*OF_RECIPE.get(asset, OF_PROJECT.get(asset, ()))}
    assert all(field.description and not field.is_required for field in overrides.config_type.fields.values())


def test_fields_have_the_types_of_the_settings() -> None:
    selection = overridable("selected_subset")["overrides"].config_type.fields["selection"].config_type.fields
    assert selection["max_queries"].config_type.given_name == "Int"
    assert selection["max_queries"].description == "Passages of these domains that are looked at, by a stable hash. Default: 4000."
    assert [value.config_value for value in selection["arrival"].config_type.enum_values] == ["joint", "by_snapshot"]
    budget = selection["budget"].config_type.fields["general"].config_type.fields["fraction"].config_type
    assert (budget.kind.name, budget.inner_type.given_name) == ("NONEABLE", "Float")
    phase = overridable("pretrained_checkpoint")["overrides"].config_type.fields["pretraining"].config_type.inner_type.fields
    assert phase["target_share"].config_type.given_name == "Any"  # a number, a word or a ramp
    scores = overridable("quality_scores")["overrides"].config_type.fields["quality"].config_type.fields
    assert set(scores) == set(load_project().scored("quality"))


@pytest.mark.parametrize("name", sorted(load_recipes()))
def test_what_is_laid_under_an_override_is_the_recipe_itself(name: str, tmp_path: Path) -> None:
    mill = Mill(tmp_path, Engine(kind="serial"))
    again = OverriddenMill(mill, "selected_subset", name, {"selection": {}}).recipe(name)
    assert again == mill.recipe(name) and again.fingerprint == mill.recipe(name).fingerprint


def test_an_override_of_the_project_is_laid_over_its_domains(tmp_path: Path) -> None:
    mill = Mill(tmp_path, Engine(kind="serial"))
    assert OverriddenMill(mill, "cleaned_corpus", None, {"cleaning": {}}).project == mill.project
    seen = OverriddenMill(mill, "cleaned_corpus", "web|2026-01-01", {"cleaning": {"html": "keep", "min_characters": 77}}).project
    for domain in mill.project.domains:
        cleaning = mill.project.cleaning_of(domain).model_copy(update={"html": "keep", "min_characters": 77})
        assert seen.cleaning_of(domain) == cleaning
    check_overrides(mill, "quality_scores", None, {"quality": {"gopher_quality": {"words": "whitespace"}}})
    with pytest.raises(
        GristmillError, match=r"overrides of quality_scores: quality.gopher_quality: unknown rule 'wrds'; did you mean 'words'"
    ):
        check_overrides(mill, "quality_scores", None, {"quality": {"gopher_quality": {"wrds": "whitespace"}}})


def test_null_takes_a_key_of_a_plugins_settings_away(tmp_path: Path) -> None:
    mill = Mill(tmp_path, Engine(kind="serial"))
    general = mill.recipe("tiny").general
    assert general and general.schedule_settings == {"floor": 0.2}
    change = {"general": {"schedule": "constant", "schedule_settings": {"floor": None}}}
    seen = OverriddenMill(mill, "general_checkpoint", "tiny", change).recipe("tiny")
    assert seen.general and (seen.general.schedule, seen.general.schedule_settings) == ("constant", {})
    assert seen.general.tokens == general.tokens


# --set


def test_settings_of_the_command_are_overrides_by_asset() -> None:
    given = [
        "selected_subset.selection.budget.general.fraction=0.5",
        "selected_subset.selection.function=random_order",
        "pretrained_checkpoint.pretraining=[{tokens: 10, learning_rate: 1e-3}]",
    ]
    assert parsed(given) == {
        "selected_subset": {"selection": {"budget": {"general": {"fraction": 0.5}}, "function": "random_order"}},
        "pretrained_checkpoint": {"pretraining": [{"tokens": 10, "learning_rate": 1e-3}]},
    }
    staged = {asset for _, assets in STAGES for asset in assets}
    assert {*OF_RECIPE, *OF_PROJECT} <= staged
    assert json.loads(json.dumps(parsed(given))) == parsed(given)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("selected_subset", "give ASSET.KEY=VALUE"),
        ("selected_subset=3", "give ASSET.KEY=VALUE"),
        ("selected_subset..x=3", "give ASSET.KEY=VALUE"),
        ("selected_subst.selection.seed=3", "unknown asset with settings 'selected_subst'; did you mean 'selected_subset'"),
        ("selected_subset.selection.seed=[", "is not YAML"),
    ],
)
def test_a_setting_of_another_form_is_refused(setting: str, message: str) -> None:
    with pytest.raises(GristmillError, match=message):
        parsed([setting])


def test_overrides_are_checked_before_anything_is_started(tmp_path: Path) -> None:
    mill = Mill(tmp_path, Engine(kind="serial"))
    with pytest.raises(UnknownName, match="unknown setting of selected_subset 'mixture'; did you mean|known: selection"):
        check_overrides(mill, "selected_subset", "tiny", {"mixture": {}})
    with pytest.raises(GristmillError, match=r"^overrides of selected_subset\[tiny\]: unknown key 'selection.sed'; did you mean 'seed'\?"):
        check_overrides(mill, "selected_subset", "tiny", {"selection": {"sed": 3}})
    assert ours.override_metadata(mill.store.build(Build("x", score, Scored(domain="wiki", stage="quality"), "tiny")).manifest) == {}
