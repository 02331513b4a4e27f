"""Project file and recipes: every problem is listed at once, layers of thresholds, and the settings that come out."""

from __future__ import annotations

import math
import re
from pathlib import Path

import hypothesis
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pipelines import plugins
from pipelines.configuration import RecipeBook, open_recipes, read_project, read_recipe, read_recipes
from pipelines.decisions import default_thresholds
from pipelines.errors import GristmillError, UnknownName
from pipelines.recipes import Project, Recipe, resolve_thresholds
from pipelines.settings_files import read_recipe_file

ROOT = Path(__file__).parents[1]
RECIPE = """
description: A recipe of these tests
roles: {general: [wiki, book], target: [code], evaluation: [wikitext]}
snapshots: ["2026-01-01"]
selection:
  budget: {general: {fraction: 0.25}, target: {tokens: 1000}}
model: {hidden_size: 48, num_layers: 2, num_heads: 2, intermediate_size: 128}
training: {sequence_length: 64, threads: 2, compile: auto}
general: {tokens: 200_000, learning_rate: 4.0e-3}
mixture:
  ratios: [0.2, 0.5]
  seeds: [0, 7]
  phase: {tokens: 40_000, learning_rate: 8.0e-4}
pretraining:
  - {tokens: 40_000, learning_rate: 8.0e-4}
  - {tokens: 10_000, learning_rate: 1.0e-4, schedule: cosine}
"""
PROJECT = """
name: test
first_snapshot: "2026-01-01"
snapshots: ["2026-01-01"]
fit_on: ["2026-01-01"]
source: parquet
source_settings: {paths: [all.parquet], where: {domain: "{domain}"}}
quality:
  gopher_quality: {num_words: 30, num_stop_words: off}
  encoding: {}
  markup: off
toxicity: {toxic_words: {}}
domains:
  wiki: {held_out: 0.2, quality: {gopher_quality: {num_words: 40}}}
  book: {source: text, source_settings: {paths: [book.txt]}, cleaning: {html: extract}}
  code: {quality: {gopher_quality: off, markup: {}}, toxicity: {toxic_words: off}}
  wikitext: {}
"""


def write(directory: Path, text: str, name: str = "bad.yaml") -> Path:
    path = directory / name
    path.write_text(text, encoding="utf-8")
    return path


def with_values(text: str, **values: object) -> str:
    """Return YAML `text` with top-level keys replaced."""
    return yaml.safe_dump(yaml.safe_load(text) | values, sort_keys=False, allow_unicode=True)


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return read_project(write(tmp_path, PROJECT, "project.yaml"))


def recipe(tmp_path: Path, project: Project, **values: object) -> Recipe:
    return read_recipe(write(tmp_path, with_values(RECIPE, **values), "good.yaml"), project)


def problems(tmp_path: Path, project: Project, **values: object) -> list[str]:
    """Return the lines that a recipe with `values` is refused with."""
    with pytest.raises(GristmillError) as caught:
        recipe(tmp_path, project, **values)
    return sorted(without_place(line) for line in str(caught.value).splitlines())


def without_place(line: str) -> str:
    """Return a problem without the file and the line that it names first."""
    return re.sub(r"^\w+\.yaml(:\d+)?: ", "", line)


# Files that come with the project


def test_all_recipes_of_the_project_load() -> None:
    ours = read_project(ROOT / "project.yaml")
    recipes = read_recipes(ROOT / "recipes", ours)
    assert set(recipes) == {path.stem for path in (ROOT / "recipes").glob("*.yaml")}
    for found in recipes.values():
        assert found.filter_settings(ours, "quality").thresholds.keys() == set(found.domains)
        assert found.filter_settings(ours, "toxicity").thresholds.keys() == set(found.domains)
        assert sum(phase.tokens for phase in found.pretraining) == found.mixture_settings().tokens
        assert found.general_settings().phases == (found.general,)
        assert found.pretraining_settings().phases == found.pretraining
        assert found.evaluation_settings().roles == found.role_of
        probes = [found.probe_settings(probe) for probe in found.probes]
        if found.mixture.search:
            assert [probe.swarm.number for probe in probes] == list(range(len(probes))) and not found.mixture.ratios
        else:
            assert [probe.ratio for probe in probes] == [ratio for ratio in found.mixture.ratios for _ in found.mixture.seeds]
        assert set(found.selection_settings().roles.values()) == {"general", "target"}
    for domain in ours.domains:
        plugins.build("sources", *ours.source_of(domain))
        ours.cleaning_of(domain)


PRESETS = ("code-full", "code-ingenious", "code-perplexity", "code-random")


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_differs_from_code_critical_in_its_selection_alone(name: str) -> None:
    """So that what a comparison of their losses finds is due to the selection."""
    ours = read_project(ROOT / "project.yaml")
    critical, preset = (read_recipe(ROOT / "recipes" / f"{stem}.yaml", ours) for stem in ("code-critical", name))
    changed = {key for key in Recipe.model_fields if getattr(critical, key) != getattr(preset, key)}
    assert changed == {"description", "selection"}
    assert preset.selection.function != critical.selection.function
    assert preset.selection.budget == critical.selection.budget or name == "code-full"
    assert preset.probes == critical.probes


def test_the_presets_select_what_they_are_named_for() -> None:
    ours = read_project(ROOT / "project.yaml")
    found = {name: read_recipe(ROOT / "recipes" / f"{name}.yaml", ours).selection_settings() for name in PRESETS}
    assert {budget.fraction for budget in found["code-full"].budget.values()} == {1.0}
    assert found["code-perplexity"].score == "perplexity.log_perplexity"
    assert "perplexity" in ours.scored("quality")
    plugin = plugins.build("set_functions", found["code-perplexity"].function, found["code-perplexity"].settings)
    assert plugin.model_dump()["prefer"] == "low"


# Problems


def test_every_problem_of_a_recipe_is_listed_at_once(tmp_path: Path, project: Project) -> None:
    found = problems(
        tmp_path,
        project,
        roles={"general": ["wiki", "boook"], "target": ["code", "wiki"]},
        selecton=3,
        quality={"filters": {"gopher_qualty": {}, "encoding": {"mojibak": 1}, "gopher_quality": {"num_words": "many"}}},
        toxicity={"filters": {"toxicity": {}}, "domains": {"cod": {}, "code": {"toxic_words": {"listed_word": 0.1}}}},
        selection={"function": "facility_locatio", "budget": {"general": {"fraction": 0.5}}},
        mixture=yaml.safe_load(RECIPE)["mixture"] | {"ratios": [0.2, 1.5, 0.125], "lenght": 1},
        general={"tokens": 1, "learning_rate": 1.0, "schedule": "linnear", "objective": "causl"},
        training={"optimizer": "adam", "compile": "on"},
    )
    starts = [
        "general.objective: unknown plugin in objectives 'causl'; did you mean 'causal'?",
        "general.schedule: unknown plugin in schedules 'linnear'; did you mean 'linear'?",
        "mixture.ratios: 0.125 has more than the two decimals",
        "mixture.ratios: 1.5 is not in [0, 1]",
        "quality.filters.encoding: unknown rule 'mojibak'",
        "quality.filters.gopher_quality.num_words: 'many' is not a number or off",
        "quality.filters: unknown filter 'gopher_qualty'; did you mean 'gopher_quality'?",
        "roles: unknown domain 'boook'; did you mean 'book'?",
        "roles: wiki has two roles; give it one",
        "selection.budget: no budget for role 'target'",
        "selection.function: unknown plugin in set_functions 'facility_locatio'; did you mean 'facility_location'?",
        "toxicity.domains.code.toxic_words: unknown rule 'listed_word'; did you mean 'listed_word_fraction'?",
        "toxicity.domains: unknown domain 'cod'; did you mean 'code'?",
        "toxicity: toxicity is not scored; add it under `toxicity` in project.yaml",
        "training.optimizer: unknown plugin in optimizers 'adam'; did you mean 'adamw'?",
        "unknown key 'mixture.lenght'",
        "unknown key 'selecton'; did you mean 'selection'?",
    ]
    assert len(found) == len(starts), found
    for line, start in zip(found, starts, strict=True):
        assert line.startswith(start), (line, start)


def test_problems_of_all_files_are_listed(tmp_path: Path, project: Project) -> None:
    directory = tmp_path / "recipes"
    directory.mkdir()
    with pytest.raises(GristmillError, match=r"no recipe in .*; a recipe is a file recipes/NAME.yaml"):
        read_recipes(directory, project)
    write(directory, RECIPE, "good.yaml")
    assert list(read_recipes(directory, project)) == ["good"]
    write(directory, with_values(RECIPE, extra=1), "one.yaml")
    write(directory, with_values(RECIPE, description=None), "two.yaml")
    with pytest.raises(GristmillError) as caught:
        read_recipes(directory, project)
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == ["one.yaml", "two.yaml"]


FRACTIONS = {"general": {"fraction": 0.25}, "target": {"fraction": 0.5}}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"roles": {"general": [], "target": ["code"]}}, "roles.general"),
        ({"pretraining": []}, "pretraining"),
        ({"selection": {"budget": {"general": {}, "target": {"fraction": 1, "tokens": 3}}}}, "selection.budget.general"),
        ({"selection": {"budget": {"general": {"fraction": 2}, "target": {"fraction": 1}}}}, "selection.budget.general.fraction"),
        ({"selection": {"budget": FRACTIONS, "score": "perplexity.bucket"}}, "selection.score"),
        ({"selection": {"budget": FRACTIONS, "towards": {"general": []}}}, "selection.towards.general"),
        ({"selection": {"budget": FRACTIONS, "arrival": "later"}}, "selection.arrival"),
        ({"selection": {"budget": {"general": {"bytes": 9}, "target": {"fraction": 1}}, "arrival": "by_snapshot"}}, "selection"),
        ({"model": {"hidden_size": "wide"}}, "model.hidden_size"),
        ({"quality": {"mode": "inverted"}}, "quality.mode"),
    ],
)
def test_values_out_of_range_are_named(tmp_path: Path, project: Project, values: dict, expected: str) -> None:
    assert any(line.startswith(f"{expected}: ") for line in problems(tmp_path, project, **values))


@pytest.mark.parametrize("value", [math.nan, math.inf, True, "many"])
def test_a_threshold_is_a_finite_number(tmp_path: Path, project: Project, value: object) -> None:
    found = problems(tmp_path, project, quality={"filters": {"gopher_quality": {"num_words": value}}})
    assert found == [f"quality.filters.gopher_quality.num_words: {value!r} is not a number or off"]


def test_probes_with_one_name_are_refused(tmp_path: Path, project: Project) -> None:
    mixture = yaml.safe_load(RECIPE)["mixture"] | {"ratios": [0.2, 0.2]}
    assert problems(tmp_path, project, mixture=mixture) == [f"mixture: probe r0.20-s{seed} is asked for twice" for seed in (0, 7)]


def test_every_problem_of_the_project_file_is_listed_at_once(tmp_path: Path) -> None:
    text = PROJECT.replace("gopher_quality: off", "gopher_quality: {num_word: 3}").replace("source: parquet", "source: parqet")
    text = text.replace("html: extract", "htm: extract").replace("encoding: {}", "encodin: {}") + "embedder: static_word\n"
    with pytest.raises(GristmillError) as caught:
        read_project(write(tmp_path, text, "project.yaml"))
    found = str(caught.value).splitlines()
    starts = [
        "project.yaml:6: source: unknown plugin in sources 'parqet'; did you mean 'parquet'?",
        "project.yaml:10: quality: unknown filter 'encodin'; did you mean 'encoding'?",
        "project.yaml:15: unknown key 'domains.book.cleaning.htm'; did you mean 'html'?",
        "project.yaml:16: domains.code.quality.gopher_quality: unknown rule 'num_word'; did you mean 'num_words'?",
        "project.yaml:18: embedder: unknown plugin in embedders 'static_word'; did you mean 'static_words'?",
    ]
    assert sorted(line.partition(";")[0] for line in found) == sorted(line.partition(";")[0] for line in starts), found
    assert all(any(line.startswith(start) for line in found) for start in starts), found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "bad.yaml is not YAML"),
        ("- a\n- b\n", "bad.yaml holds no mapping of keys to values"),
        ("", "bad.yaml holds no mapping of keys to values"),
        ("a: !!python/object:os.system {}", "bad.yaml is not YAML"),
    ],
)
def test_what_is_no_settings_file_is_named(tmp_path: Path, project: Project, text: str, message: str) -> None:
    for read in (lambda path: read_recipe(path, project), read_project):
        with pytest.raises(GristmillError, match=message):
            read(write(tmp_path, text))


def test_a_missing_file_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(GristmillError, match=r"project.yaml does not exist; run from the directory .*GRISTMILL_PROJECT"):
        read_project(tmp_path / "project.yaml")


def test_a_problem_says_file_and_line_and_the_lines_are_right(tmp_path: Path, project: Project) -> None:
    text = "\n".join(
        [
            "description: one",
            "roles: {general: [wiki], target: [code]}",
            "model: {hidden_size: 48, num_layers: 2, num_heads: 2, intermediate_size: 128, hidden_sise: 3}",
            "selection:",
            "  function: facility_location",
            "  settings:",
            "    weigths: high_score",
            "  budget: {general: {fraction: 0.5}, target: {fraction: 0.5}}",
            "  function: random_order",
            "general: {tokens: 10, learning_rate: 1e-3}",
            "mixture: {ratios: [0.5], windows: {genral: 3}, phase: {tokens: 10, learning_rate: 1.0e-3}, on_exhausted: repaet}",
            "pretraining:",
            "  - tokens: 10",
            "quality:",
            "  filters: {encoding: 3}",
        ]
    )
    with pytest.raises(GristmillError) as caught:
        read_recipe(write(tmp_path, text, "one.yaml"), project)
    found = str(caught.value).splitlines()
    expected = [
        r"one.yaml:9: selection.function is given twice, first in line 5; take one of them away",
        r"one.yaml:3: unknown key 'model.hidden_sise'; did you mean 'hidden_size'\?",
        r"one.yaml:11: mixture.windows.genral: Input should be 'general' or 'target'; did you mean 'general'\? \(got 'genral'\)",
        r"one.yaml:11: mixture.on_exhausted: Input should be .*; did you mean 'repeat'\? \(got 'repaet'\)",
        r"one.yaml:13: pretraining.0.learning_rate: Field required",
        r"one.yaml:15: quality.filters.encoding: Input should be a valid dictionary; or .*'off'.*; or .*boolean.* \(got 3\)",
    ]
    assert len(found) == len(expected), found
    assert all(re.match(pattern, line) for pattern, line in zip(expected, found, strict=True)), found
    repaired = text.replace("  function: random_order\n", "").replace(", hidden_sise: 3", "").replace("genral: 3", "general: 3, target: 3")
    repaired = repaired.replace("repaet", "repeat").replace("tokens: 10\n", "tokens: 10\n    learning_rate: 1\n").replace(": 3}", ": off}")
    with pytest.raises(GristmillError) as caught:
        read_recipe(write(tmp_path, repaired.replace("target: off", "target: 3"), "two.yaml"), project)
    (line,) = str(caught.value).splitlines()  # a plugin's own settings
    assert line.startswith("two.yaml:7: unknown key 'selection.settings.weigths'; did you mean 'weights'?")


BOMB = "a: &a [0, 0, 0, 0, 0, 0, 0, 0, 0, 0]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdef", "bcdefg", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &x {b: *x}\n", "a.b: an alias stands for what it is a part of"),
        (BOMB, "its aliases stand for more than 100,000 values"),
        ("1900: x\n", "bad.yaml:1: 1900 is a key, and a key is text; put it in quotes"),
        ("a: !remove\n", "bad.yaml:1: a: nothing to remove: bad.yaml extends none"),
        ("a: !replace 3\n", "bad.yaml is not YAML: line 1: !replace wants a mapping"),
        ("a: {b: 1, b: 2, b: 3}\n", "bad.yaml:1: a.b is given twice, first in line 1"),
    ],
)
def test_what_yaml_allows_and_a_recipe_does_not(tmp_path: Path, project: Project, text: str, message: str) -> None:
    with pytest.raises(GristmillError, match=re.escape(message)):
        read_recipe(write(tmp_path, text), project)


def test_merge_keys_and_anchors_are_read(tmp_path: Path, project: Project) -> None:
    text = RECIPE.replace("general: {tokens: 200_000", "general: &plan {schedule: linear, tokens: 200_000")
    text = text.replace("phase: {tokens: 40_000, learning_rate: 8.0e-4}", "phase: {<<: *plan, tokens: 40_000, learning_rate: 8e-4}")
    phase = read_recipe(write(tmp_path, text), project).mixture.phase
    assert (phase.schedule, phase.tokens, phase.learning_rate) == ("linear", 40_000, 8e-4)


@pytest.mark.parametrize("names", [("b", "c", "a"), ("b", "a", "a")])
def test_recipes_judged_in_a_circle_are_refused(tmp_path: Path, project: Project, names: tuple[str, ...]) -> None:
    for name, baseline in zip("abc", names, strict=True):
        write(tmp_path, with_values(RECIPE, evaluation={"baseline": baseline}), f"{name}.yaml")
    (tmp_path / "project.yaml").unlink()
    book = open_recipes_beside(tmp_path, project)
    circle = "ab" if names[1] == "a" else "abc"
    assert sorted(book.broken) == list(circle)
    assert all("recipes are compared in a circle; take one `evaluation.baseline` away" in line for line in book.problems)


def open_recipes_beside(directory: Path, project: Project) -> RecipeBook:
    """Return the recipes of `directory`, with one that nothing is wrong with."""
    write(directory, RECIPE, "good.yaml")
    return open_recipes(directory, project)


def test_a_bad_recipe_takes_no_other_away(tmp_path: Path, project: Project) -> None:
    directory = tmp_path / "recipes"
    directory.mkdir()
    write(directory, with_values(RECIPE, model={"hidden_sise": 1}), "bad.yaml")
    write(directory, "extends: bad\ndescription: inherits\n", "child.yaml")
    write(directory, with_values(RECIPE, evaluation={"reference": "goood"}), "lost.yaml")
    write(directory, with_values(RECIPE, evaluation={"reference": "bad"}), "judged.yaml")
    book = open_recipes_beside(directory, project)
    assert list(book) == ["good", "judged"] and book.names == ["bad", "child", "good", "judged", "lost"]
    assert "bad" not in book and book.get("bad") is None and book.get("good") is book["good"]
    assert book["good"].description == "A recipe of these tests"
    assert book.problems == [
        *book.broken["bad"],
        "lost.yaml:47: evaluation.reference: unknown recipe 'goood'; did you mean 'good'? known: bad, child, good, judged, lost",
    ]
    assert book.broken["child"] == tuple(f"{line} [in child.yaml, which extends it]" for line in book.broken["bad"])
    with pytest.raises(GristmillError, match=r"^bad.yaml:\d+: unknown key 'model.hidden_sise'; did you mean 'hidden_size'"):
        book["bad"]
    with pytest.raises(UnknownName, match="unknown recipe 'baad'; did you mean 'bad'"):
        book["baad"]
    with pytest.raises(GristmillError) as caught:
        read_recipes(directory, project)
    assert str(caught.value).splitlines() == book.problems
    for name in ("good", "judged"):
        (directory / f"{name}.yaml").unlink()
    with pytest.raises(GristmillError, match=r"^bad.yaml:\d+: unknown key"):
        open_recipes(directory, project)


# Recipes that extend others


def test_a_recipe_is_what_it_extends_with_its_own_keys_laid_over(tmp_path: Path, project: Project) -> None:
    write(tmp_path, with_values(RECIPE, selection={"settings": {"weights": "high_score"}, "budget": FRACTIONS}), "first.yaml")
    second_text = "extends: first\nroles: {target: [wiki], general: [book]}\nmixture: {seeds: !remove, windows: {general: 9}}\n"
    write(tmp_path, second_text, "second.yaml")
    third = "extends: second\ndescription: third\nselection: {function: random_order, settings: !replace {}}\ngeneral: {tokens: 7}\n"
    path = write(tmp_path, third, "third.yaml")
    first, second, found = (read_recipe(tmp_path / f"{name}.yaml", project) for name in ("first", "second", "third"))
    assert (found.description, second.description) == ("third", first.description)
    assert (found.roles.general, found.roles.target, found.roles.evaluation) == (("book",), ("wiki",), ("wikitext",))
    assert (found.selection.function, found.selection.settings, found.selection.budget) == ("random_order", {}, first.selection.budget)
    assert (found.mixture.seeds, found.mixture.windows, found.mixture.ratios) == ((0,), {"general": 9}, (0.2, 0.5))
    assert (found.general.tokens, found.general.learning_rate, found.pretraining) == (7, 4e-3, first.pretraining)
    assert read_recipe_file(path).extends == ("second", "first")
    whole = write(tmp_path, yaml.safe_dump(read_recipe_file(path).values), "whole.yaml")
    assert read_recipe(whole, project) == found


def test_a_wrong_value_is_looked_for_where_it_came_from(tmp_path: Path, project: Project) -> None:
    write(tmp_path, RECIPE.replace("  budget:", "  settings: {weights: high_score}\n  budget:").lstrip(), "first.yaml")
    text = "extends: first\nselection:\n  function: random_order\nmixture: {phase: {tokens: 0}}\nroles: {target: [cod]}\n"
    with pytest.raises(GristmillError) as caught:
        read_recipe(write(tmp_path, text, "second.yaml"), project)
    assert [line.partition(";")[0].partition(" known")[0] for line in sorted(str(caught.value).splitlines())] == [
        "second.yaml:4: mixture.phase.tokens: Input should be greater than or equal to 1 (got 0)",
    ]
    with pytest.raises(GristmillError) as caught:
        read_recipe(write(tmp_path, text.replace("tokens: 0", "tokens: 1"), "second.yaml"), project)
    lines = sorted(str(caught.value).splitlines())
    assert lines[0].startswith("first.yaml:5: unknown key 'selection.settings.weights'")
    assert lines[0].endswith(" [in second.yaml, which extends it]")
    assert lines[1].startswith("second.yaml:5: roles: unknown domain 'cod'; did you mean 'code'?")


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ("extends: frist", "second.yaml:1: extends: unknown recipe 'frist'; did you mean 'first'?"),
        ("extends: [first]", "second.yaml:1: extends: give the name of one recipe (got ['first'])"),
        ("extends: ../first", "extends: unknown recipe '../first'; did you mean 'first'?"),
        ("extends: second", "second.yaml:1: extends: second -> second: recipes extend each other in a circle"),
        ("extends: third", "third.yaml:1: extends: second -> third -> second: recipes extend each other in a circle"),
        ("extends: first\nmodle: !remove", "second.yaml:2: modle: first has no such key to remove; did you mean 'model'?"),
        ("extends: first\nmixture: {ratios: [!remove, 0.5]}", "second.yaml:2: mixture.ratios.0: nothing to remove: a list is replaced"),
    ],
)
def test_what_cannot_be_extended_is_refused(tmp_path: Path, project: Project, second: str, message: str) -> None:
    write(tmp_path, RECIPE, "first.yaml")
    write(tmp_path, "extends: second\n", "third.yaml")
    with pytest.raises(GristmillError, match=re.escape(message)):
        read_recipe(write(tmp_path, second, "second.yaml"), project)


# Off


@pytest.mark.parametrize("off", ["off", '"off"', "false"])
def test_off_is_understood_in_every_spelling(tmp_path: Path, project: Project, off: str) -> None:
    text = f"{RECIPE}quality: {{filters: {{encoding: {off}, gopher_quality: {{num_words: {off}}}}}}}\n"
    found = read_recipe(write(tmp_path, text), project).filter_settings(project, "quality").thresholds
    assert not [rule for rules in found.values() for rule in rules if rule.startswith("encoding.") or rule == "gopher_quality.num_words"]
    assert "gopher_quality.num_words_max" in found["wiki"]


def test_off_is_a_word_where_a_setting_is_one_of_several_words(tmp_path: Path, project: Project) -> None:
    text = RECIPE.replace("compile: auto", "compile: off") + "quality: {mode: off}\n"
    found = read_recipe(write(tmp_path, text), project)
    assert found.filter_settings(project, "quality").mode == "off"
    assert found.pretraining_settings().compile is False
    assert read_recipe(write(tmp_path, RECIPE.replace("compile: auto", "compile: on")), project).general_settings().compile is True


def test_a_date_is_text(tmp_path: Path, project: Project) -> None:
    assert read_recipe(write(tmp_path, RECIPE.replace('"2026-01-01"', "2026-01-01")), project).snapshots == ("2026-01-01",)


# Layers


def test_thresholds_lie_over_each_other(tmp_path: Path, project: Project) -> None:
    filters = {"gopher_quality": {"num_words_max": 500}}
    found = recipe(tmp_path, project, quality={"filters": filters, "domains": {"wiki": {"gopher_quality": {"num_words_max": 600}}}})
    thresholds = found.filter_settings(project, "quality").thresholds

    def value(domain: str, rule: str) -> float | None:
        return thresholds[domain][rule].value if rule in thresholds[domain] else None

    assert [value(d, "gopher_quality.num_words") for d in ("book", "wiki")] == [30, 40]  # project < domain
    assert [value(d, "gopher_quality.num_words_max") for d in ("book", "wiki")] == [500, 600]  # recipe < recipe's domain
    assert value("wiki", "gopher_quality.num_stop_words") is None  # off in the project
    assert value("wiki", "gopher_quality.mean_word_length") == default_thresholds("gopher_quality")["gopher_quality.mean_word_length"].value
    assert [value(d, next(iter(default_thresholds("markup")))) is None for d in ("book", "code")] == [True, False]  # a domain switches on
    assert value("code", "gopher_quality.num_words_max") == 500  # a later layer that gives values switches on again
    assert found.filter_settings(project, "toxicity").thresholds["code"] == {}


RULES = list(default_thresholds("gopher_quality"))
LAYER = st.dictionaries(
    st.just("gopher_quality"),
    st.sampled_from(["off", False, None, True])
    | st.dictionaries(st.sampled_from([r.partition(".")[2] for r in RULES]), st.integers(0, 99) | st.just("off"), max_size=3),
)


@given(st.lists(LAYER, max_size=4))
def test_the_last_layer_that_speaks_decides(layers: list[dict]) -> None:
    found = resolve_thresholds(layers)
    spoken = [layer["gopher_quality"] for layer in layers if "gopher_quality" in layer]
    if not spoken or spoken[-1] in ("off", False):
        assert found == {}
        return
    expected = {rule: threshold.value for rule, threshold in default_thresholds("gopher_quality").items()}
    for layer in spoken:
        expected |= {f"gopher_quality.{key}": value for key, value in (layer.items() if isinstance(layer, dict) else ())}
    assert {rule: threshold.value for rule, threshold in found.items()} == {r: v for r, v in expected.items() if v != "off"}
    assert list(found) == [rule for rule in RULES if rule in found]  # in the filter's order


def test_filters_stand_in_the_order_of_the_project_file(project: Project, tmp_path: Path) -> None:
    filters = {"encoding": {}, "gopher_quality": {"num_words": 1}}
    thresholds = recipe(tmp_path, project, quality={"filters": filters}).filter_settings(project, "quality").thresholds["wiki"]
    assert list(dict.fromkeys(rule.partition(".")[0] for rule in thresholds)) == ["gopher_quality", "encoding"]


def test_scored_are_the_filters_that_any_domain_uses(project: Project) -> None:
    assert project.scored("quality") == ("gopher_quality", "encoding", "markup")
    assert project.scored("toxicity") == ("toxic_words",)
    assert [item.settings for item in project.score_settings("quality")] == [{}, {}, {}]  # thresholds are the recipes'


# Settings that come out


def test_probes_are_named_by_ratio_and_seed(tmp_path: Path, project: Project) -> None:
    found = recipe(tmp_path, project)
    assert found.probes == ("r0.20-s0", "r0.20-s7", "r0.50-s0", "r0.50-s7")
    settings = [found.probe_settings(probe) for probe in found.probes]
    assert [(one.ratio, one.seed) for one in settings] == [(0.2, 0), (0.2, 7), (0.5, 0), (0.5, 7)]
    assert {one.threads for one in settings} == {1} and found.general_settings().threads == 2
    with pytest.raises(UnknownName, match=r"unknown probe 'r0.20-s1'; did you mean 'r0.20-s"):
        found.probe_settings("r0.20-s1")


@hypothesis.settings(deadline=None)
@given(
    st.lists(st.integers(0, 100), min_size=1, max_size=4, unique=True),
    st.lists(st.integers(0, 99), min_size=1, max_size=3, unique=True),
)
def test_a_probe_is_what_its_name_says(percents: list[int], seeds: list[int]) -> None:
    values = yaml.safe_load(RECIPE)
    found = Recipe.model_validate(values | {"mixture": values["mixture"] | {"ratios": [p / 100 for p in percents], "seeds": seeds}})
    settings = [found.probe_settings(probe) for probe in found.probes]
    assert [(s.ratio, s.seed) for s in settings] == [(p / 100, seed) for p in percents for seed in seeds]


def test_settings_of_the_steps(tmp_path: Path, project: Project) -> None:
    found = recipe(tmp_path, project)
    assert found.domains == ("book", "code", "wiki", "wikitext")
    assert found.selection_settings().roles == {"wiki": "general", "book": "general", "code": "target"}
    assert found.mixture_settings().tokens == 50_000
    assert found.evaluation_settings().roles["wikitext"] == "evaluation"
    assert (found.general_settings().model, found.pretraining_settings().model) == (found.model, None)
    assert found.general_settings().sequence_length == 64
    assert project.held_out == {"book": 0.1, "code": 0.1, "wiki": 0.2, "wikitext": 0.1}
    assert project.cluster_settings(["b|2026-01-01", "a|2026-01-01"]).order == ("b|2026-01-01", "a|2026-01-01")


def test_settings_of_the_selection(tmp_path: Path, project: Project) -> None:
    choices = {"score": "gopher_quality.num_words", "towards": {"general": ["code"]}, "arrival": "by_snapshot", "max_queries": 9, "seed": 3}
    found = recipe(tmp_path, project, selection={"settings": {"weights": "high_score"}, "budget": FRACTIONS, **choices})
    made = found.selection_settings()
    assert made.model_dump(include=set(choices)) == choices | {"towards": {"general": ("code",)}}
    assert (made.function, made.settings, made.domains("general")) == ("facility_location", {"weights": "high_score"}, ["book", "wiki"])
    assert {role: budget.fraction for role, budget in made.budget.items()} == {"general": 0.25, "target": 0.5}
    with pytest.raises(GristmillError, match=r"selection.towards: unknown domain 'cod'; did you mean 'code'\?"):
        recipe(tmp_path, project, selection={"budget": FRACTIONS, "towards": {"target": ["cod"]}})
    with pytest.raises(GristmillError, match=r"selection.score: perplexity is not scored"):
        recipe(tmp_path, project, selection={"budget": FRACTIONS, "score": "perplexity.log_perplexity"})


def test_a_domain_with_its_own_source_does_not_inherit_settings(project: Project) -> None:
    assert project.source_of("book") == ("text", {"paths": ["book.txt"]})
    assert project.source_of("wiki") == ("parquet", {"paths": ["all.parquet"], "where": {"domain": "{domain}"}})
    with pytest.raises(UnknownName, match="unknown domain 'wikki'; did you mean 'wiki'"):
        project.source_of("wikki")


@pytest.mark.parametrize(
    ("function", "choices", "message"),
    [
        ("graph_cut", {"towards": {"general": ("code",)}}, r"selection\.towards; leave that out, or take facility_location or submodlib"),
        ("feature_based", {"arrival": "by_snapshot"}, "arrival: by_snapshot"),
        ("full", {"score": "perplexity.log_perplexity"}, r"selection\.score"),
    ],
)
def test_what_a_set_function_does_not_look_at_is_refused(function: str, choices: dict, message: str) -> None:
    from pipelines.selection import SelectionSettings

    given = {"roles": {"code": "general"}, "budget": {"general": {"fraction": 0.5}}, "function": function, **choices}
    with pytest.raises(ValueError, match=message):
        SelectionSettings.model_validate(given)


def test_a_plan_that_cannot_be_run_is_refused_where_the_recipe_is_read(tmp_path: Path, project: Project) -> None:
    phase = {"tokens": 100_000, "learning_rate": 1e-3, "select": {"every_tokens": 50_000}}
    with pytest.raises(GristmillError, match="processes"):
        recipe(tmp_path, project, training={"processes": 2}, pretraining=[phase])


PHASE = {"tokens": 40_000, "learning_rate": 8.0e-4}


def test_a_search_probes_a_swarm_and_a_ratio_does_not(tmp_path: Path, project: Project) -> None:
    found = recipe(tmp_path, project, mixture={"search": {"tolerance_nats": 0.1, "mixtures": 4}, "seeds": [0, 7], "phase": PHASE})
    assert found.probes == tuple(f"m0{number}-s{seed}" for number in range(4) for seed in (0, 7))
    third = found.probe_settings("m02-s7")
    assert (third.seed, third.swarm.number, third.swarm.count, third.ratio) == (7, 2, 4, None)
    assert third.swarm.targets == found.roles.target and third.stop_beyond is None
    assert found.window_settings().windows_per_domain == 640
    assert found.verification_settings().phases[0].tokens == PHASE["tokens"]
    assert found.mixture.search_settings(found.mixture.search, 123).tokens == 123


@pytest.mark.parametrize("given", [{}, {"ratios": [0.5], "search": {}}])
def test_a_mixture_asks_one_question(tmp_path: Path, project: Project, given: dict) -> None:
    found = problems(tmp_path, project, mixture={"phase": PHASE, **given})
    assert "give `ratios` to find one target share, or `search`" in "".join(found)
