"""The project file and the recipes as files: read, and checked in full, every problem of all files listed at once."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from pipelines import plugins
from pipelines.errors import GristmillError, Location, Problem, UnknownName
from pipelines.manifests import Json
from pipelines.plugins import Settings
from pipelines.recipe_checks import project_problems, recipe_problems, reference_problems
from pipelines.recipes import Project, Recipe
from pipelines.settings_files import SettingsFile, inherited, read_recipe_file, read_settings_file

SettingsType = TypeVar("SettingsType", bound=Settings)


class RecipeBook(Mapping[str, Recipe]):
    """The recipes of a directory by name: those that can be used, and of each of the others what is wrong with it.

    One file with a mistake takes no other recipe away. Asking for its recipe raises the whole list; it is not among the keys.
    """

    def __init__(self, recipes: Mapping[str, Recipe], broken: Mapping[str, Sequence[str]], files: Mapping[str, SettingsFile]) -> None:
        self._recipes = dict(recipes)
        self.broken = {name: tuple(lines) for name, lines in broken.items()}
        """By recipe one line per problem."""
        self.files = dict(files)
        """By recipe what its file says, with what it extends; those that can be read at all."""

    def __getitem__(self, name: str) -> Recipe:
        """Return recipe `name`.

        Raises:
            GristmillError: its file has problems, which are listed.
            UnknownName: there is no such file; the message names the nearest.
        """
        if name in self.broken:
            raise GristmillError("\n".join(self.broken[name]))
        if name not in self._recipes:
            raise UnknownName("recipe", name, self.names)
        return self._recipes[name]

    def get(self, name: str, default: Recipe | None = None) -> Recipe | None:  # type: ignore[override]
        """Return recipe `name`, or `default` where it cannot be used or there is none."""
        return self._recipes.get(name, default)

    def __contains__(self, name: object) -> bool:
        return name in self._recipes

    def __iter__(self) -> Iterator[str]:
        return iter(self._recipes)

    def __len__(self) -> int:
        return len(self._recipes)

    @property
    def names(self) -> list[str]:
        """Every recipe that has a file, sorted."""
        return sorted({*self._recipes, *self.broken})

    @property
    def problems(self) -> list[str]:
        """The problems of all files. One that came from an extended file stands there alone, however many extend it."""
        lines = [(line, line.removesuffix(inherited(f"{name}.yaml"))) for name, lines in sorted(self.broken.items()) for line in lines]
        own = {line for line, bare in lines if line == bare}
        return list(dict.fromkeys(line for line, bare in lines if line == bare or bare not in own))


def read_project(path: Path) -> Project:
    """Read and check the project file.

    Raises:
        GristmillError: one line per problem.
    """
    return check_project(read_settings_file(path))


def check_project(file: SettingsFile) -> Project:
    """Return the project that `file` holds.

    Raises:
        GristmillError: one line per problem.
    """
    project, problems = _validated(Project, file.values)
    _raise(file, problems or project_problems(project))
    return project


def read_recipe(path: Path, project: Project) -> Recipe:
    """Read one recipe file, with what it extends, and check it against `project`.

    Raises:
        GristmillError: one line per problem.
    """
    return check_recipe(read_recipe_file(path), project)


def check_recipe(file: SettingsFile, project: Project) -> Recipe:
    """Return the recipe that `file` holds, checked against `project`.

    Raises:
        GristmillError: one line per problem.
    """
    recipe, problems = _validated(Recipe, file.values)
    if recipe is not None:
        follow = [problem.location for problem in problems]  # what is missing because it was wrong is no problem of its own
        further = [p for p in recipe_problems(recipe, project) if not any(at[: len(p.location)] == p.location for at in follow)]
        problems = problems + further
    _raise(file, problems)
    return recipe


def read_recipes(directory: Path, project: Project) -> RecipeBook:
    """Read every ``*.yaml`` in `directory`; the file's name is the recipe's.

    Raises:
        GristmillError: the problems of all files, one line each; or there is no recipe at all.
    """
    book = open_recipes(directory, project)
    if book.broken:
        raise GristmillError("\n".join(book.problems))
    return book


def open_recipes(directory: Path, project: Project) -> RecipeBook:
    """As `read_recipes`, but a file with problems makes its own recipe unusable and no other.

    Raises:
        GristmillError: not one recipe can be used: the problems of all files, one line each.
    """
    book = _book(sorted(directory.glob("*.yaml")), project)
    if not len(book):
        none = f"no recipe in {directory}; a recipe is a file recipes/NAME.yaml"
        raise GristmillError("\n".join(book.problems) or none)
    return book


def check_recipes(paths: Sequence[Path], project: Project, directory: Path) -> list[str]:
    """Return every problem of the recipes in `paths`, one line each; they may name those of `directory` and those beside them."""
    folders = {directory, *(path.parent for path in paths)}
    return _book(paths, project, {other.stem for folder in folders for other in folder.glob("*.yaml")}).problems


def _book(paths: Sequence[Path], project: Project, known: Iterable[str] = ()) -> RecipeBook:
    recipes: dict[str, Recipe] = {}
    broken: dict[str, Sequence[str]] = {}
    files: dict[str, SettingsFile] = {}
    read: dict[Path, SettingsFile] = {}
    for path in paths:
        try:
            files[path.stem] = read_recipe_file(path, read=read)
            recipes[path.stem] = check_recipe(files[path.stem], project)
        except GristmillError as error:
            broken[path.stem] = str(error).splitlines()
    for name, problems in reference_problems(recipes, {*known, *recipes, *broken}).items():
        del recipes[name]
        broken[name] = [files[name].line(problem) for problem in problems]
    return RecipeBook(recipes, broken, files)


def _validated(model: type[SettingsType], values: Mapping[str, Json]) -> tuple[SettingsType, list[Problem]]:
    """Return the settings that `values` make without the keys that are wrong in them, and these problems.

    The settings are None where nothing can be made without these keys.
    """
    try:
        return model.model_validate(values), []
    except ValidationError as error:
        problems = plugins.problems(error, model, values)
    rest = copy.deepcopy(dict(values))
    for problem in problems:
        _remove(rest, problem.location)
    try:
        return model.model_validate(rest), problems
    except ValidationError:
        return None, problems  # type: ignore[return-value]


def _remove(values: Json, location: Location) -> None:
    """Take the key at `location` out of `values`, where there is such a key."""
    for part in location[:-1]:
        values = values[part] if isinstance(values, dict) and part in values else None
    if isinstance(values, dict) and location:
        values.pop(location[-1], None)


def _raise(file: SettingsFile, problems: Sequence[Problem]) -> None:
    ordered = sorted(problems, key=lambda problem: file.place(problem.location))
    if lines := dict.fromkeys([*file.faults, *(file.line(problem) for problem in ordered)]):
        raise GristmillError("\n".join(lines))
