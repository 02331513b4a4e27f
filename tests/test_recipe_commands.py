"""`gristmill recipes`: listing, checking, showing and comparing; and a project in which a recipe file has mistakes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from assets_defs.cli import app
from assets_defs.recipe_plans import by_recipe, compare_plans, plan
from assets_defs.recipes import recipe_metadata, recipe_table
from assets_defs.resources import Mill, load_project, load_recipes
from pipelines.configuration import read_project, read_recipe
from pipelines.engine import Engine
from pipelines.errors import UnknownName
from pipelines.recipes import Recipe
from pipelines.settings_files import differences

ROOT = Path(__file__).parents[1]


def run(*arguments: str, code: int = 0) -> str:
    """Run `gristmill` on the recipes of the project and return what it printed."""
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


@pytest.fixture
def mill(tmp_path: Path) -> Mill:
    """The mill of a project of which nothing was made yet."""
    return Mill(tmp_path / "home", Engine(kind="serial"))


def test_the_list_names_every_recipe_with_what_it_is() -> None:
    lines = run("recipes").splitlines()
    assert [line.split()[0] for line in lines] == sorted(load_recipes())
    ramp = next(line for line in lines if line.startswith("code-ramp"))
    assert ramp.split()[1:3] == [load_recipes()["code-ramp"].fingerprint, "code-critical"]
    assert ramp.endswith(load_recipes()["code-ramp"].description)
    rows = json.loads(run("recipes", "--json"))
    assert {row["recipe"]: row["fingerprint"] for row in rows} == {name: recipe.fingerprint for name, recipe in load_recipes().items()}
    assert all(row["problems"] == [] for row in rows)


def test_the_recipes_of_the_project_check() -> None:
    assert run("recipes", "check") == f"{len(load_recipes())} files, 0 problems\n"


def test_every_recipe_asks_for_something_of_its_own() -> None:
    fingerprints = [recipe.fingerprint for recipe in load_recipes().values()]
    assert len(set(fingerprints)) == len(fingerprints)


def test_a_fingerprint_is_of_the_settings_alone(tmp_path: Path) -> None:
    project, tiny = read_project(ROOT / "project.yaml"), (ROOT / "recipes" / "tiny.yaml").read_text()
    fingerprints = {
        name: read_recipe(write(tmp_path, name, text), project).fingerprint
        for name, text in {
            "tiny": tiny,
            "commented": f"# another comment\n{tiny}",
            "described": tiny.replace("description: The", "description: Not the"),
            "extending": "extends: tiny\ndescription: the same by other means\n",
            "defaults": "extends: tiny\nselection: {seed: 0}\n",
            "other": "extends: tiny\nselection: {seed: 1}\n",
        }.items()
    }
    other = fingerprints.pop("other")
    assert set(fingerprints.values()) == {load_recipes()["tiny"].fingerprint} and other not in fingerprints.values()


def write(directory: Path, name: str, text: str) -> Path:
    path = directory / f"{name}.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("full", [[], ["--full"]])
@pytest.mark.parametrize("name", ["code-guarded", "age-since-1900", "quality-off"])
def test_what_is_shown_is_the_recipe_as_one_file(tmp_path: Path, name: str, full: list[str]) -> None:
    shown = run("recipes", "show", name, *full)
    assert "extends:" not in shown
    again = read_recipe(write(tmp_path, "again", shown), load_project())
    assert again == load_recipes()[name] and again.fingerprint in shown.splitlines()[0]


def test_an_unknown_recipe_is_refused_with_the_nearest(mill: Mill) -> None:
    for call in (lambda: load_recipes()["tinny"], lambda: compare_plans(mill, "tiny", "tinny"), lambda: plan(mill, "tinny")):
        with pytest.raises(UnknownName, match="unknown recipe 'tinny'; did you mean 'tiny'"):
            call()


# Where two recipes part


def test_recipes_part_where_the_first_setting_that_differs_is_read(mill: Mill) -> None:
    found = compare_plans(mill, "code-critical", "code-random")
    assert [key for key, *_ in found.settings] == ["description", "selection.function"]
    assert found.settings[1][1:] == ("facility_location", "random_order")
    assert found.part_at == ("selected_subset",) and not found.problems
    before = by_recipe()[: by_recipe().index("selected_subset")]
    assert all(found.shared[asset] == (1, 1) for asset in before)
    assert all(found.shared[asset][0] == 0 for asset in by_recipe()[len(before) :])


def test_recipes_may_part_in_several_places_and_share_what_lies_between(mill: Mill) -> None:
    found = compare_plans(mill, "code-critical", "code-ramp")
    assert [key for key, *_ in found.settings] == ["description", "pretraining.0.tokens", "pretraining.0.target_share", "pretraining.1"]
    assert found.part_at == ("domain_mixture",)
    assert found.shared["mixture_probe"] == (3, 3) and found.shared["verified_ratio"] == (1, 1)
    probes = compare_plans(mill, "code-critical", "code-guarded")
    assert probes.shared["general_checkpoint"] == (1, 1) and probes.part_at == ("probe_windows",)


def test_a_recipe_judged_by_another_shares_what_it_is_judged_on(mill: Mill) -> None:
    found = compare_plans(mill, "quality-on", "quality-off")
    assert found.part_at[0] == "quality_filtered_corpus" and found.shared["comparison"] == (0, 1)
    same = compare_plans(mill, "tiny", "tiny")
    assert same.settings == () and same.part_at == () and all(shared == asked for shared, asked in same.shared.values())
    assert not (mill.home / "artifacts").exists() and not (mill.home / "current").exists()  # nothing is made for it


def test_the_command_prints_settings_and_assets() -> None:
    text = run("recipes", "diff", "code-critical", "code-random")
    assert "selection.function  facility_location  ->  random_order" in text
    assert "part at: selected_subset\n" in text and "shared: quality_filtered_corpus," in text
    found = json.loads(run("recipes", "diff", "code-critical", "code-random", "--json"))
    assert found["part_at"] == ["selected_subset"] and set(found["assets"]) == set(by_recipe())
    assert found["settings"][1] == {"key": "selection.function", "code-critical": "facility_location", "code-random": "random_order"}


def test_differences_are_those_of_the_values() -> None:
    first, second = {"a": {"b": 1, "c": [1, 2]}, "d": [{"e": 1}, {"e": 2}]}, {"a": {"b": 2, "c": [1, 2]}, "d": [{"e": 1}, {"e": 3, "f": 4}]}
    assert list(differences(first, second)) == [(("a", "b"), 1, 2), (("d", 1, "e"), 2, 3), (("d", 1, "f"), None, 4)]
    assert list(differences(first, first)) == []


# A project with a recipe that has mistakes


BAD = """\
extends: tiny
description: a recipe of a test
selection: {function: facility_locatoin}
model: {hidden_sise: 3}
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project of three recipes, two of which cannot be used."""
    directory = tmp_path_factory.mktemp("project")
    shutil.copy(ROOT / "project.yaml", directory)
    (directory / "recipes").mkdir()
    shutil.copy(ROOT / "recipes" / "tiny.yaml", directory / "recipes")
    (directory / "data").symlink_to(ROOT / "data")
    write(directory / "recipes", "bad", BAD)
    write(directory / "recipes", "child", "extends: bad\n")
    return directory


def in_project(project: Path, *command: str, code: int) -> tuple[str, str]:
    """Run Python in the project's directory."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("GRISTMILL_", "DAGSTER_"))} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *command], cwd=project, env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout, done.stderr


PROBLEMS = [
    "bad.yaml:3: selection.function: unknown plugin in set_functions 'facility_locatoin'; did you mean 'facility_location'?",
    "bad.yaml:4: unknown key 'model.hidden_sise'; did you mean 'hidden_size'?",
]


def test_the_check_lists_every_problem_once(project: Path) -> None:
    said, _ = in_project(project, "-m", "assets_defs.cli", "recipes", "check", code=1)
    lines = said.splitlines()
    assert len(lines) == 3 and lines[-1] == "3 files, 2 problems"
    assert all(line.startswith(start) for line, start in zip(lines, PROBLEMS, strict=False)), said
    said, _ = in_project(project, "-m", "assets_defs.cli", "recipes", "check", "recipes/child.yaml", code=1)
    assert all("[in child.yaml, which extends it]" in line for line in said.splitlines()[:2])


LOADED = """
import dagster as dg
from assets_defs import filtering
from assets_defs.definitions import defs
from assets_defs.partitions import PROBES, RECIPE
from assets_defs.recipes import recipe_table
from assets_defs.resources import MillResource
print(RECIPE.get_partition_keys(), {name: len(keys) for name, keys in PROBES.items()})
print([record.data["recipe"] for record in recipe_table()["recipes"].records])
defs.resolve_asset_graph()
result = dg.materialize(
    [filtering.quality_filtered_corpus], instance=dg.DagsterInstance.ephemeral(), partition_key="child",
    resources={"mill": MillResource(home="home")}, raise_on_error=False,
)
print([event.step_failure_data.user_failure_data.description for event in result.all_events if event.is_step_failure][0])
"""


def test_the_code_location_loads_and_the_recipe_that_has_mistakes_says_so(project: Path) -> None:
    said, logged = in_project(project, "-W", "ignore", "-c", LOADED, code=0)
    keys, shown, *failure = said.splitlines()
    assert keys == "['bad', 'child', 'tiny'] {'bad': 0, 'child': 0, 'tiny': 3}"
    assert shown == "['bad', 'child', 'tiny']"
    assert [line.partition(" known:")[0].removeprefix("quality_filtered_corpus: ") for line in failure] == PROBLEMS
    assert "recipes/bad.yaml cannot be used: 2 problems; `gristmill recipes check` lists them" in logged
    said, _ = in_project(project, "-m", "assets_defs.cli", "recipes", code=1)
    assert "CANNOT BE USED: 2 problems, the first: bad.yaml:3: selection.function" in said and "tiny " in said


def test_metadata_names_the_recipe_of_a_partition() -> None:
    found = {key: value.value for key, value in recipe_metadata("code-ramp|r0.25-s0").items()}
    ramp: Recipe = load_recipes()["code-ramp"]
    assert found == {
        "recipe_fingerprint": ramp.fingerprint,
        "recipe_description": ramp.description,
        "recipe_extends": "code-critical",
    }
    records = recipe_table()["recipes"].records  # type: ignore[attr-defined]
    assert [record.data["recipe"] for record in records] == sorted(load_recipes())


class OtherBase(Mill):
    """A mill whose recipes continue a checkpoint that is not there."""

    def recipe(self, name: str) -> Recipe:
        recipe = super().recipe(name)
        return recipe.model_copy(update={"model": recipe.model.model_copy(update={"checkpoint": "nowhere"})})


def test_a_plan_that_cannot_be_made_says_why(tmp_path: Path) -> None:
    found = plan(OtherBase(tmp_path, Engine(kind="serial")), "tiny")
    assert found["selected_subset"].problem == "" and found["selected_subset"].addresses
    assert "nowhere" in found["general_checkpoint"].problem and "nowhere" in found["pretrained_checkpoint"].problem
