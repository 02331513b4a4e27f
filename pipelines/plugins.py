"""Plugins by file: a module in an extension folder is a plugin, its name is its name in recipes.

An extension folder (`filters/`, `sources/`, ...) holds one module per plugin. The module defines one
frozen settings class derived from `Plugin`, which is the plugin: its fields are the settings, its
methods do the work. Adding a plugin is adding a file.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Self, TypeVar

from pydantic import BaseModel, ConfigDict, PrivateAttr, ValidationError

from pipelines.errors import GristmillError, Location, Problem, UnknownName, dotted, nearest, suggestion

KINDS = (
    "sources",
    "filters",
    "embedders",
    "token_formats",
    "set_functions",
    "mixing_laws",
    "objectives",
    "schedules",
    "optimizers",
    "parameterizations",
    "teachers",
    "evaluators",
    "tasks",
)
"""The extension folders."""


class Settings(BaseModel):
    """Frozen settings; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Plugin(Settings):
    """Base of every plugin class."""


class LocatedPlugin(Plugin):
    """Base of the plugins whose settings may name files of the user."""

    _root: Path = PrivateAttr(default=Path())

    @property
    def root(self) -> Path:
        """Where relative paths of the settings start: the project's directory."""
        return self._root

    def at(self, root: Path) -> Self:
        """Return a copy that takes relative paths from `root`."""
        copy = self.model_copy()
        copy._root = root
        return copy

    def files(self) -> Sequence[Path]:
        """Return the local files that change what the plugin makes, apart from the code: their content is part of its identity.

        Raises:
            GristmillError: a file that the settings name does not exist.
        """
        return ()


SettingsType = TypeVar("SettingsType", bound=Settings)


@cache
def names(kind: str) -> tuple[str, ...]:
    """Return the plugins of extension folder `kind`, sorted."""
    if kind not in KINDS:
        raise UnknownName("extension folder", kind, KINDS)
    package = importlib.import_module(f"pipelines.{kind}")
    return tuple(sorted(m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_")))


@cache
def load(kind: str, name: str) -> type[Plugin]:
    """Return the plugin class of module ``pipelines.<kind>.<name>``.

    Raises:
        UnknownName: there is no such module; the message names the nearest one.
    """
    if name not in names(kind):
        raise UnknownName(f"plugin in {kind}", name, names(kind))
    module = importlib.import_module(f"pipelines.{kind}.{name}")
    classes = [c for c in vars(module).values() if isinstance(c, type) and issubclass(c, Plugin) and c.__module__ == module.__name__]
    if len(classes) != 1:
        raise GristmillError(f"{module.__name__} defines {len(classes)} plugin classes; a plugin module defines exactly one")
    return classes[0]


def build(kind: str, name: str, settings: Mapping[str, object] | None = None) -> Plugin:
    """Return plugin `name` of `kind` with `settings`, validated."""
    return validate(load(kind, name), settings or {}, where=f"{kind}.{name}")


def validate(model: type[SettingsType], values: Mapping[str, object], *, where: str) -> SettingsType:
    """Build `model` from `values`; every problem is listed in one error, with the nearest valid key.

    Raises:
        GristmillError: one line per problem, each with `where`, the key, the value and the rule.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        found = problems(error, model, values)
        raise GristmillError("\n".join(f"{where}: {problem.text}" for problem in found)) from None


def problems(error: ValidationError, model: type[BaseModel], values: object, at: Location = ()) -> list[Problem]:
    """Return the problems of a pydantic `error` about `model`, made of `values` that stand at `at`; None where they are not at hand.

    What each of several types says of one value is one problem.
    """
    found: dict[Location, str] = {}
    items = error.errors()
    for item in items:
        if item["type"] == "too_short" and any(other["loc"][:-1][: len(item["loc"])] == item["loc"] for other in items):
            continue  # what is in it is wrong, and was not counted
        inner = item["loc"] if values is None else _in_values(item["loc"], values, model)
        location = (*at, *inner)
        if item["type"] == "extra_forbidden":
            found[location] = f"unknown key {dotted(location)!r}{suggestion(str(inner[-1]), _keys_at(model, inner))}"
            continue
        value, message = item.get("input"), item["msg"].removeprefix("Value error, ")
        if item["type"] == "literal_error":
            message += nearest(str(value), re.findall("'([^']*)'", item["ctx"]["expected"]))
        shown = "" if item["type"] == "missing" or isinstance(value, dict | BaseModel) else f" (got {value!r})"
        before = found[location].removesuffix(shown) + "; or" if location in found else f"{dotted(location) or 'settings'}:"
        found[location] = f"{before} {message}{shown}"
    return [Problem(location, text) for location, text in found.items()]


def _in_values(location: Location, values: object, model: type[BaseModel]) -> Location:
    """Return `location` without what is neither a key of `values` nor of `model`: pydantic names the type of a union that it tried too."""
    kept: list[int | str] = []
    for part in location:
        if isinstance(values, BaseModel):
            values = dict(values)
        inside = (isinstance(values, Mapping) and part in values) or (
            isinstance(values, Sequence) and isinstance(part, int) and part < len(values)
        )
        if inside:
            values = values[part]  # type: ignore[index]
        if inside or part in _keys_at(model, (*kept, part)):
            kept.append(part)
    return tuple(kept)


def _keys_at(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Return the keys that are valid where `location` points to."""
    current: type[BaseModel] | None = model
    for part in location[:-1]:
        field = current.model_fields.get(str(part)) if current else None
        current = _inner_model(field.annotation) if field else current
    return list(current.model_fields) if current else []


def _inner_model(annotation: object) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        if found := _inner_model(argument):
            return found
    return None
