"""What is wrong with a project file or a recipe beyond the types of its values: names, plugins and their settings, plans."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from pipelines import plugins
from pipelines.cleaning import CleaningSettings
from pipelines.decisions import default_thresholds
from pipelines.errors import GristmillError, Location, Problem, dotted, suggestion
from pipelines.manifests import Json
from pipelines.plugins import Settings
from pipelines.recipes import Filters, Project, Recipe, StageSettings, is_off, mapping


def project_problems(project: Project) -> list[Problem]:
    """Return what is wrong with `project`."""
    problems: list[Problem] = []
    for stage in ("quality", "toxicity"):
        problems += _filter_problems((stage,), getattr(project, stage), fields=True)
        for name, domain in project.domains.items():
            problems += _filter_problems(("domains", name, stage), getattr(domain, stage), fields=False)
    problems += _plugin_problems("embedders", project.embedder, project.embedder_settings, ("embedder",))
    for name in project.domains:
        own = _invalid(CleaningSettings, project.domain(name).cleaning, ("domains", name, "cleaning"))
        problems += own or _invalid(CleaningSettings, {**project.cleaning, **project.domain(name).cleaning}, ("cleaning",))
        at: Location = ("domains", name, "source") if project.domain(name).source else ("source",)
        problems += _plugin_problems("sources", *project.source_of(name), at)
    for name, chosen in project.evaluation_sets.items():
        if chosen.domain:
            problems += _unknown_domains(("evaluation_sets", name, "domain"), [chosen.domain], project.domains)
    problems += _attempt(lambda: project.cluster_settings(()), ("clusters",))
    return problems or _fit_problems(project)


def recipe_problems(recipe: Recipe, project: Project) -> list[Problem]:
    """Return what is wrong with `recipe` in `project`; of the plans as a whole only where their parts are right."""
    problems = [*_role_problems(recipe, project)]
    for stage in ("quality", "toxicity"):
        problems += _stage_problems((stage,), getattr(recipe, stage), recipe, project)
    problems += _selection_problems(recipe, project)
    for at, plan in _phases(recipe):
        for kind, name, settings in plan.named():
            field = "select" if kind == "set_functions" else kind.removesuffix("s")
            problems += _plugin_problems(kind, name, settings, (*at, field))
        problems += _unknown_domains((*at, "mixture"), plan.mixture or {}, recipe.domains)
    problems += _named_plugins(recipe)
    problems += _probe_problems(recipe)
    return list(dict.fromkeys(problems or _settings_problems(recipe, project)))


def reference_problems(recipes: Mapping[str, Recipe], known: Iterable[str]) -> dict[str, list[Problem]]:
    """Return by recipe where it names another that is not among `known`, or is judged by one that is judged by it."""
    found: dict[str, list[Problem]] = {}
    for name, recipe in recipes.items():
        for field in ("reference", "baseline"):
            at: Location = ("evaluation", field)
            other = getattr(recipe.evaluation, field)
            if other is not None and other not in known:
                found.setdefault(name, []).append(Problem(at, f"{dotted(at)}: unknown recipe {other!r}{suggestion(other, known)}"))
            elif circle := _circle(name, recipes, field):
                said = f"{dotted(at)}: {' -> '.join(circle)}: recipes are compared in a circle; take one `{dotted(at)}` away"
                found.setdefault(name, []).append(Problem(at, said))
    return found


def _circle(name: str, recipes: Mapping[str, Recipe], first: str) -> list[str]:
    """Return a way from `name` by its `first` and then any recipe that is named back to `name`; nothing where there is none."""
    start = getattr(recipes[name].evaluation, first)
    pending = [[name, start]] if start not in (None, name) else []
    seen: set[str] = set()
    while pending:
        way = pending.pop()
        if way[-1] == name:
            return way
        if way[-1] in seen or way[-1] not in recipes:
            continue
        seen.add(way[-1])
        evaluation = recipes[way[-1]].evaluation
        pending += [[*way, other] for other in (evaluation.reference, evaluation.baseline) if other and other != way[-1]]
    return []


def _role_problems(recipe: Recipe, project: Project) -> Iterator[Problem]:
    given = [(role, domain) for role in ("general", "target", "evaluation") for domain in getattr(recipe.roles, role)]
    for role, domain in given:
        if domain not in project.domains:
            yield Problem(("roles", role), f"roles: unknown domain {domain!r}{suggestion(domain, project.domains)}")
    names = [domain for _, domain in given]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield Problem(("roles",), f"roles: {name} has two roles; give it one")


def _stage_problems(at: Location, mine: StageSettings, recipe: Recipe, project: Project) -> Iterator[Problem]:
    stage = dotted(at)
    yield from _filter_problems((*at, "filters"), mine.filters, fields=False)
    layers = [((*at, "filters"), mine.filters), *(((*at, "domains", domain), layer) for domain, layer in mine.domains.items())]
    for place, layer in layers:
        for name in layer:
            if name in plugins.names("filters") and name not in project.scored(stage):  # type: ignore[arg-type]
                yield Problem((*place, name), f"{stage}: {name} is not scored; add it under `{stage}` in project.yaml")
    for domain, filters in mine.domains.items():
        place = (*at, "domains", domain)
        if domain not in recipe.domains:
            yield Problem(place, f"{stage}.domains: unknown domain {domain!r}{suggestion(domain, recipe.domains)}")
        yield from _filter_problems(place, filters, fields=False)


def _selection_problems(recipe: Recipe, project: Project) -> Iterator[Problem]:
    chosen = recipe.selection
    yield from _plugin_problems("set_functions", chosen.function, chosen.settings, ("selection", "function"))
    for role, domains in chosen.towards.items():
        for domain in domains:
            if domain not in recipe.domains:
                yield Problem(
                    ("selection", "towards", role), f"selection.towards: unknown domain {domain!r}{suggestion(domain, recipe.domains)}"
                )
    name = (chosen.score or "").partition(".")[0]
    if name and name not in (*project.scored("quality"), *project.scored("toxicity")):
        yield Problem(("selection", "score"), f"selection.score: {name} is not scored; add it under `quality` in project.yaml")
    for role in ("general", "target"):
        if role not in chosen.budget:
            yield Problem(("selection", "budget"), f"selection.budget: no budget for role {role!r}")


def _phases(recipe: Recipe) -> Iterator[tuple[Location, Any]]:
    if recipe.general:
        yield ("general",), recipe.general
    yield ("mixture", "phase"), recipe.mixture.phase
    for number, phase in enumerate(recipe.pretraining):
        yield ("pretraining", number), phase


def _named_plugins(recipe: Recipe) -> Iterator[Problem]:
    training, evaluation = recipe.training, recipe.evaluation
    yield from _plugin_problems("optimizers", training.optimizer, training.optimizer_settings, ("training", "optimizer"))
    yield from _plugin_problems("evaluators", evaluation.evaluator, evaluation.evaluator_settings, ("evaluation", "evaluator"))
    laws: Location = ("mixture", "search") if recipe.mixture.search else ("mixture", "estimate")
    for name in recipe.mixture.laws:
        yield from _plugin_problems("mixing_laws", name, {}, laws)
    for name, chosen in evaluation.tasks.items():
        yield from _plugin_problems("tasks", chosen.task or name, chosen.settings, ("evaluation", "tasks", name))


def _probe_problems(recipe: Recipe) -> Iterator[Problem]:
    at: Location = ("mixture", "ratios")
    for number, ratio in enumerate(recipe.mixture.ratios):
        if not 0 <= ratio <= 1:
            yield Problem((*at, number), f"mixture.ratios: {ratio} is not in [0, 1]")
        if round(ratio, 2) != ratio:
            yield Problem((*at, number), f"mixture.ratios: {ratio} has more than the two decimals that name a probe")
    for probe in recipe.probes:
        if recipe.probes.count(probe) > 1:
            yield Problem(at, f"mixture: probe {probe} is asked for twice")


def _settings_problems(recipe: Recipe, project: Project) -> list[Problem]:
    """Return what the settings of the steps say of what they are made from, as a whole."""
    made: list[tuple[str, Callable[[], object]]] = [
        ("general", recipe.general_settings if recipe.general else recipe.adoption_settings),
        ("pretraining", recipe.pretraining_settings),
        ("selection", recipe.selection_settings),
        ("mixture", recipe.verification_settings),
        ("mixture", recipe.window_settings),
        ("mixture", recipe.mixture_settings),
        ("evaluation", recipe.evaluation_settings),
        ("evaluation", recipe.comparison_settings),
        ("evaluation", recipe.task_settings),
        ("evaluation", recipe.classification_settings),
        ("decontamination", lambda: recipe.decontamination_settings(project)),
    ]
    return [problem for key, make in made for problem in _attempt(make, (key,))]


def _filter_problems(at: Location, filters: Filters, *, fields: bool) -> list[Problem]:
    """Return what is wrong with `filters`; `fields` says whether a filter's own settings may stand beside thresholds."""
    problems: list[Problem] = []
    where = dotted(at)
    for name, values in filters.items():
        here = (*at, name)
        if name not in plugins.names("filters"):
            problems.append(Problem(here, f"{where}: unknown filter {name!r}{suggestion(name, plugins.names('filters'))}"))
            continue
        plugin = plugins.load("filters", name)
        rules = {rule.partition(".")[2] for rule in default_thresholds(name)}
        known = rules | set(plugin.model_fields) if fields else rules
        for key, value in mapping(values).items():
            if key not in known:
                problems.append(Problem((*here, key), f"{where}.{name}: unknown rule {key!r}{suggestion(key, known)}"))
            elif key in rules and not is_off(value) and not _is_number(value):
                problems.append(Problem((*here, key), f"{where}.{name}.{key}: {value!r} is not a number or off"))
        if fields:
            problems += _invalid(plugin, {k: v for k, v in mapping(values).items() if k in plugin.model_fields}, here)
    return problems


def _fit_problems(project: Project) -> list[Problem]:
    """Return each domain that a filter is to be fitted on and that the project does not have."""
    problems = _attempt(project.fitted, ())
    for settings in () if problems else project.fitted():
        asked = plugins.build("filters", settings.filter, settings.settings).domains()  # type: ignore[attr-defined]
        stage = "quality" if settings.filter in project.quality else "toxicity"
        for name in asked:
            if name not in project.domains:
                said = f"{settings.filter}: unknown domain {name!r}{suggestion(name, project.domains)}"
                problems.append(Problem((stage, settings.filter), said))
    return problems


def _unknown_domains(at: Location, named: Iterable[str], known: Iterable[str]) -> list[Problem]:
    known = sorted(known)
    return [Problem((*at, name), f"{dotted(at)}: unknown domain {name!r}{suggestion(name, known)}") for name in named if name not in known]


def _plugin_problems(kind: str, name: str, settings: Mapping[str, Json], at: Location) -> list[Problem]:
    """Return what is wrong with a plugin that is named at `at`, and whose settings stand beside it as ``NAME_settings``."""
    if name not in plugins.names(kind):
        return [Problem(at, f"{dotted(at)}: unknown plugin in {kind} {name!r}{suggestion(name, plugins.names(kind))}")]
    beside = (*at[:-1], "settings" if at[-1] == "function" else f"{at[-1]}_settings")
    inside = (*at, "settings")  # of what is a mapping itself: a task, a selection on the way
    return _invalid(plugins.load(kind, name), settings, inside if at[-1] == "select" or at[-2:-1] == ("tasks",) else beside)


def _invalid(model: type[Settings], values: Mapping[str, Json], at: Location) -> list[Problem]:
    try:
        model.model_validate(values)
    except ValidationError as error:
        return plugins.problems(error, model, values, at)
    return []


def _attempt(check: Callable[[], object], at: Location) -> list[Problem]:
    """Return what `check` raises; its lines name what they are about themselves."""
    try:
        check()
    except ValidationError as error:
        return [Problem(at, f"{dotted(at)}: {item['msg'].removeprefix('Value error, ')}") for item in error.errors()]
    except GristmillError as error:
        return [Problem(at, line.removeprefix("project.yaml: ")) for line in str(error).splitlines()]
    return []


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
