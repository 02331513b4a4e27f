"""Plugins by file: a module in an extension folder is a plugin, its name is its name in recipes.

An extension folder (`filters/`, `sources/`, ...) holds one module per plugin. The module defines one
frozen settings class derived from `Plugin`, which is the plugin: its fields are the settings, its
methods do the work. Adding a plugin is adding a file.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Self, TypeVar

from pydantic import BaseModel, ConfigDict, PrivateAttr, ValidationError

from pipelines.errors import GristmillError, UnknownName, suggestion

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
        raise GristmillError("\n".join(problems(error, model, where=where))) from None


def problems(error: ValidationError, model: type[BaseModel], *, where: str) -> list[str]:
    """Return one line per problem of a pydantic `error` about `model`."""
    lines = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            lines.append(f"{where}: unknown key {key!r}{suggestion(str(item['loc'][-1]), _keys_at(model, item['loc']))}")
            continue
        value = item.get("input")
        shown = "" if item["type"] == "missing" or isinstance(value, dict | BaseModel) else f" (got {value!r})"
        lines.append(f"{where}: {key or 'settings'}: {item['msg']}{shown}")
    return lines


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
