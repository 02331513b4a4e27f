"""Settings classes as Dagster config: what the Launchpad shows, completes and refuses, from the fields and their docstrings.

Every field may be left out. A type that Dagster has no word for (one of several, or what a validator rewrites) is `Any`; whether the value
is right is then said by the settings themselves.
"""

import types
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Literal, Union, get_args, get_origin

import dagster as dg
from pydantic import BaseModel, BeforeValidator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

DagsterType = object
"""A type of Dagster's config: it has no common class."""
SCALARS = {bool: dg.Bool, int: dg.Int, float: dg.Float, str: dg.String}


@cache
def shape(model: type[BaseModel], left_out: frozenset[str] = frozenset()) -> dg.Shape:
    """Return the fields of `model` but `left_out`."""
    return dg.Shape({name: config_field(model, name, field) for name, field in model.model_fields.items() if name not in left_out})


def config_field(model: type[BaseModel], name: str, field: FieldInfo) -> dg.Field:
    """Return field `name` of `model`, described by its docstring and its default."""
    rewritten = any(isinstance(item, BeforeValidator) for item in field.metadata)
    kind = dg.Any if rewritten else config_type(field.annotation, f"{model.__name__}_{name}")
    return dg.Field(kind, is_required=False, description=f"{' '.join((field.description or '').split())}{_default(field)}")


def config_type(annotation: object, name: str) -> DagsterType:
    """Return the Dagster type of `annotation`; `name` is that of an enumeration, which has to be unique."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        rewritten = any(isinstance(item, BeforeValidator) for item in arguments[1:])
        return dg.Any if rewritten else config_type(arguments[0], name)
    if annotation in SCALARS:
        return SCALARS[annotation]
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return shape(annotation)
    if origin is Literal and all(isinstance(value, str) for value in arguments):
        return _enumeration(name, arguments)
    if origin in (Union, types.UnionType):
        return _union(arguments, name)
    if origin is tuple:
        return dg.Array(config_type(arguments[0], name))
    if origin in (dict, Mapping):
        return _mapping(arguments, name)
    return dg.Any


def _union(arguments: tuple[object, ...], name: str) -> DagsterType:
    kinds = [argument for argument in arguments if argument is not type(None)]
    if len(kinds) > 1 or len(kinds) == len(arguments):
        return dg.Any
    inner = config_type(kinds[0], name)
    return inner if inner is dg.Any else dg.Noneable(inner)


def _mapping(arguments: tuple[object, ...], name: str) -> DagsterType:
    keys, values = arguments
    inner = config_type(values, name)
    if get_origin(keys) is Literal:
        return dg.Shape({key: dg.Field(inner, is_required=False) for key in get_args(keys)})
    return dg.Permissive() if inner is dg.Any else dg.Map(str, inner)


@cache
def _enumeration(name: str, values: tuple[str, ...]) -> dg.Enum:
    return dg.Enum(name, [dg.EnumValue(value) for value in values])


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined or isinstance(field.default, BaseModel):
        return ""
    return f" Default: {field.default!r}."
