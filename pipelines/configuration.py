"""The project file and the recipes as files: read, and checked in full, every problem of a file listed at once."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import yaml
from pydantic import ValidationError

from pipelines import plugins
from pipelines.decisions import default_thresholds
from pipelines.errors import GristmillError, suggestion
from pipelines.manifests import Json
from pipelines.plan import TrainingSettings
from pipelines.recipes import Filters, Project, Recipe, StageSettings, is_off, mapping


def read_project(path: Path) -> Project:
    """Read and check the project file.

    Raises:
        GristmillError: one line per problem.
    """
    project = plugins.validate(Project, _read_yaml(path), where=path.name)
    problems = []
    for stage in ("quality", "toxicity"):
        problems += _filter_problems(f"{path.name}: {stage}", getattr(project, stage), fields=True)
        for name, domain in project.domains.items():
            problems += _filter_problems(f"{path.name}: domains.{name}.{stage}", getattr(domain, stage), fields=False)
    problems += _plugin_problems(path.name, [("embedders", project.embedder, project.embedder_settings)])
    for name in project.domains:
        problems += _attempt(lambda name=name: project.cleaning_of(name))
        problems += _plugin_problems(f"{path.name}: domains.{name}", [("sources", *project.source_of(name))])
    for name, chosen in project.evaluation_sets.items():
        if chosen.domain and chosen.domain not in project.domains:
            hint = suggestion(chosen.domain, project.domains)
            problems.append(f"{path.name}: evaluation_sets.{name}: unknown domain {chosen.domain!r}{hint}")
    problems += _attempt(lambda: project.cluster_settings(()))
    _raise(problems)
    _raise(_fit_problems(path.name, project))
    return project


def read_recipe(path: Path, project: Project) -> Recipe:
    """Read one recipe file and check it against `project`.

    Raises:
        GristmillError: one line per problem.
    """
    where = path.name
    recipe, problems = _read_recipe_settings(path)
    for domain in recipe.domains:
        if domain not in project.domains:
            problems.append(f"{where}: roles: unknown domain {domain!r}{suggestion(domain, project.domains)}")
    names = [domain for role in ("general", "target", "evaluation") for domain in getattr(recipe.roles, role)]
    problems += [f"{where}: roles: {name} has two roles; give it one" for name in sorted({n for n in names if names.count(n) > 1})]
    for stage in ("quality", "toxicity"):
        mine: StageSettings = getattr(recipe, stage)
        problems += _filter_problems(f"{where}: {stage}.filters", mine.filters, fields=False)
        unscored = sorted(
            {n for layer in (mine.filters, *mine.domains.values()) for n in layer}
            & set(plugins.names("filters")) - set(project.scored(stage))
        )
        problems += [f"{where}: {stage}: {name} is not scored; add it under `{stage}` in project.yaml" for name in unscored]
        for domain, filters in mine.domains.items():
            if domain not in recipe.domains:
                problems.append(f"{where}: {stage}.domains: unknown domain {domain!r}{suggestion(domain, recipe.domains)}")
            problems += _filter_problems(f"{where}: {stage}.domains.{domain}", filters, fields=False)
    problems += _selection_problems(where, recipe, project)
    phases = (*filter(None, [recipe.general]), recipe.mixture.phase, *recipe.pretraining)
    wanted = [("set_functions", recipe.selection.function, recipe.selection.settings)]
    wanted += [("optimizers", recipe.training.optimizer, recipe.training.optimizer_settings)]
    wanted += [named for phase in phases for named in phase.named()]
    wanted += [("mixing_laws", name, {}) for name in recipe.mixture.laws]
    wanted += [("evaluators", recipe.evaluation.evaluator, recipe.evaluation.evaluator_settings)]
    wanted += [("tasks", chosen.task or name, chosen.settings) for name, chosen in recipe.evaluation.tasks.items()]
    problems += _plugin_problems(where, wanted)
    problems += [
        f"{where}: mixture of a phase: unknown domain {domain!r}{suggestion(domain, recipe.domains)}"
        for phase in phases
        for domain in phase.mixture or {}
        if domain not in recipe.domains
    ]
    problems += [f"{where}: mixture.ratios: {r} is not in [0, 1]" for r in recipe.mixture.ratios if not 0 <= r <= 1]
    problems += [
        f"{where}: mixture.ratios: {r} has more than the two decimals that name a probe" for r in recipe.mixture.ratios if round(r, 2) != r
    ]
    problems += [f"{where}: mixture: probe {p} is asked for twice" for p in recipe.probes if recipe.probes.count(p) > 1]
    problems += [
        f"{where}: selection.budget: no budget for role {role!r}" for role in ("general", "target") if role not in recipe.selection.budget
    ]
    _raise(list(dict.fromkeys(problems)))
    _raise(_plan_problems(where, recipe))
    return recipe


def _plan_problems(where: str, recipe: Recipe) -> list[str]:
    """Return what is wrong with the plans as a whole, which their parts do not show."""
    problems = []
    for plan in (recipe.general_settings if recipe.general else recipe.adoption_settings, recipe.pretraining_settings):
        try:
            plan()
        except ValidationError as error:
            problems += plugins.problems(error, TrainingSettings, where=where)
    return problems


def _selection_problems(where: str, recipe: Recipe, project: Project) -> list[str]:
    score = recipe.selection.score
    named = {domain for domains in recipe.selection.towards.values() for domain in domains}
    problems = [
        f"{where}: selection.towards: unknown domain {domain!r}{suggestion(domain, recipe.domains)}"
        for domain in sorted(named - {*recipe.domains})
    ]
    if score and score.partition(".")[0] not in (*project.scored("quality"), *project.scored("toxicity")):
        problems.append(f"{where}: selection.score: {score.partition('.')[0]} is not scored; add it under `quality` in project.yaml")
    return problems


def _read_recipe_settings(path: Path) -> tuple[Recipe, list[str]]:
    """Return the recipe in `path` without the keys that are wrong in it, and a line for each of them.

    Raises:
        GristmillError: one line per problem, where nothing can be read without these keys.
    """
    values = _read_yaml(path)
    try:
        return Recipe.model_validate(values), []
    except ValidationError as error:
        problems = plugins.problems(error, Recipe, where=path.name)
        values = copy.deepcopy(values)
        for item in error.errors():
            _remove(values, item["loc"])
    try:
        return Recipe.model_validate(values), problems
    except ValidationError:
        raise GristmillError("\n".join(problems)) from None


def _remove(values: Json, location: tuple[int | str, ...]) -> None:
    """Take the key at `location` out of `values`, where there is such a key."""
    for part in location[:-1]:
        values = values[part] if isinstance(values, dict) and part in values else None
    if isinstance(values, dict):
        values.pop(location[-1], None)


def read_recipes(directory: Path, project: Project) -> dict[str, Recipe]:
    """Read every ``*.yaml`` in `directory`; the file's name is the recipe's.

    Raises:
        GristmillError: the problems of all files, one line each.
    """
    recipes, problems = {}, []
    for path in sorted(directory.glob("*.yaml")):
        try:
            recipes[path.stem] = read_recipe(path, project)
        except GristmillError as error:
            problems.append(str(error))
    _raise(problems or _unknown_recipes(recipes))
    if not recipes:
        raise GristmillError(f"no recipe in {directory}; a recipe is a file recipes/NAME.yaml")
    return recipes


def _unknown_recipes(recipes: Mapping[str, Recipe]) -> list[str]:
    """Return where a recipe names another that is not there, or that is judged by a third one itself."""
    found = []
    for name, recipe in recipes.items():
        for field in ("reference", "baseline"):
            other = getattr(recipe.evaluation, field)
            if other is not None and other not in recipes:
                found.append(f"{name}.yaml: evaluation.{field}: unknown recipe {other!r}{suggestion(other, recipes)}")
    return found


class _Loader(yaml.SafeLoader):
    """YAML with the booleans of YAML 1.2, where ``off`` is a word, and with dates as text."""


_BOOL, _TIMESTAMP = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:timestamp"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_BOOL, _TIMESTAMP)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))


def _read_yaml(path: Path) -> Mapping[str, Json]:
    if not path.exists():
        raise GristmillError(f"{path} does not exist; run from the directory that holds project.yaml, or set GRISTMILL_PROJECT")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise GristmillError(f"{path.name} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise GristmillError(f"{path.name} holds no mapping of keys to values")
    return content


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _filter_problems(where: str, filters: Filters, *, fields: bool) -> list[str]:
    """Return what is wrong with `filters`; `fields` says whether a filter's own settings may stand beside thresholds."""
    problems = []
    for name, values in filters.items():
        if name not in plugins.names("filters"):
            problems.append(f"{where}: unknown filter {name!r}{suggestion(name, plugins.names('filters'))}")
            continue
        plugin = plugins.load("filters", name)
        rules = {rule.partition(".")[2] for rule in default_thresholds(name)}
        known = rules | set(plugin.model_fields) if fields else rules
        for key, value in mapping(values).items():
            if key not in known:
                problems.append(f"{where}.{name}: unknown rule {key!r}{suggestion(key, known)}")
            elif key in rules and not is_off(value) and not _is_number(value):
                problems.append(f"{where}.{name}.{key}: {value!r} is not a number or off")
        if fields:
            own = {k: v for k, v in mapping(values).items() if k in plugin.model_fields}
            problems += _attempt(lambda plugin=plugin, own=own, name=name: plugins.validate(plugin, own, where=f"{where}.{name}"))
    return problems


def _fit_problems(where: str, project: Project) -> list[str]:
    """Return a line for each domain that a filter is to be fitted on and that the project does not have."""
    problems = _attempt(project.fitted)
    for settings in () if problems else project.fitted():
        asked = plugins.build("filters", settings.filter, settings.settings).domains()  # type: ignore[attr-defined]
        unknown = [name for name in asked if name not in project.domains]
        problems += [f"{where}: {settings.filter}: unknown domain {name!r}{suggestion(name, project.domains)}" for name in unknown]
    return problems


def _plugin_problems(where: str, wanted: Iterable[tuple[str, str, Mapping[str, Json]]]) -> list[str]:
    return [
        f"{where}: {line}"
        for kind, name, settings in wanted
        for line in _attempt(lambda k=kind, n=name, s=settings: plugins.build(k, n, s))
    ]


def _attempt(check: object) -> list[str]:
    try:
        check()  # type: ignore[operator]
    except GristmillError as error:
        return str(error).splitlines()
    return []


def _raise(problems: list[str]) -> None:
    if problems:
        raise GristmillError("\n".join(problems))
