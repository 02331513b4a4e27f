"""Plugins by file: every module loads, and an unknown name or key is answered with the nearest."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

import pipelines.schedules
from pipelines import plugins
from pipelines.errors import GristmillError, UnknownName
from pipelines.plugins import Plugin, Settings

EVERY = [(kind, name) for kind in plugins.KINDS for name in plugins.names(kind)]


class Inner(Settings):
    """Nested settings."""

    fraction: float = Field(default=0.5, gt=0)
    """A share."""


class Outer(Settings):
    """Settings that nest others in each way."""

    one: Inner = Inner()
    """One."""
    several: tuple[Inner, ...] = ()
    """Several."""
    by_name: dict[str, Inner] = Field(default_factory=dict)
    """By name."""
    needed: int
    """Has no default."""


def test_every_extension_folder_has_a_plugin() -> None:
    assert {kind for kind, _ in EVERY} == set(plugins.KINDS)


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_every_module_is_a_plugin_of_that_name(kind: str, name: str) -> None:
    plugin = plugins.load(kind, name)
    assert issubclass(plugin, Plugin) and plugin.__module__ == f"pipelines.{kind}.{name}"
    assert plugin.model_config["frozen"] and plugin.model_config["extra"] == "forbid"
    required = [key for key, field in plugin.model_fields.items() if field.is_required()]
    if not required:
        built = plugins.build(kind, name)
        assert pickle.loads(pickle.dumps(built)) == built


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_an_unknown_key_of_a_plugin_is_named_with_the_nearest(kind: str, name: str) -> None:
    fields = sorted(plugins.load(kind, name).model_fields)
    for wrong in [f"{fields[0]}x"] if fields else ["nonsense"]:
        with pytest.raises(GristmillError, match=rf"{kind}\.{name}: unknown key '{wrong}'.*known: {', '.join(fields) or 'none'}") as caught:
            plugins.build(kind, name, {wrong: 1})
        assert not fields or f"did you mean {fields[0]!r}?" in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "name", "nearest"),
    [("filters", "gopher_qualty", "gopher_quality"), ("schedules", "cosin", "cosine"), ("set_functions", "facility", "facility_location")],
)
def test_an_unknown_name_is_answered_with_the_nearest(kind: str, name: str, nearest: str) -> None:
    with pytest.raises(UnknownName, match=f"unknown plugin in {kind} '{name}'; did you mean '{nearest}'") as caught:
        plugins.load(kind, name)
    again = pickle.loads(pickle.dumps(caught.value))  # errors come back from worker processes
    assert type(again) is UnknownName and str(again) == str(caught.value)


def test_a_name_that_is_near_to_nothing_lists_what_there_is() -> None:
    with pytest.raises(UnknownName, match=r"'zzz'; known: constant, cosine, infinite, linear, wsd"):
        plugins.load("schedules", "zzz")
    with pytest.raises(UnknownName, match="unknown extension folder 'filter'; did you mean 'filters'"):
        plugins.names("filter")


def test_modules_with_an_underscore_are_no_plugins() -> None:
    assert not [name for _, name in EVERY if name.startswith("_")]
    with pytest.raises(UnknownName):
        plugins.load("filters", "_words")


@pytest.mark.parametrize(("classes", "number"), [("", 0), ("class A(Schedule): ...\nclass B(Schedule): ...", 2)])
def test_a_module_defines_exactly_one_plugin(tmp_path: Path, classes: str, number: int) -> None:
    name = f"with_{number}_classes"
    (tmp_path / f"{name}.py").write_text(f"from pipelines.schedules import Schedule\n{classes}\n")
    pipelines.schedules.__path__.append(str(tmp_path))
    plugins.names.cache_clear()
    try:
        assert name in plugins.names("schedules")
        with pytest.raises(GristmillError, match=rf"{name} defines {number} plugin classes; a plugin module defines exactly one"):
            plugins.load("schedules", name)
    finally:
        pipelines.schedules.__path__.remove(str(tmp_path))
        plugins.names.cache_clear()


def test_all_problems_are_listed_with_value_and_rule() -> None:
    values = {"one": {"fractoin": 1}, "several": [{"fraction": -1}], "by_name": {"x": {"fractio": 2}}, "neded": 3}
    with pytest.raises(GristmillError) as caught:
        plugins.validate(Outer, values, where="file.yaml")
    assert sorted(str(caught.value).splitlines()) == [
        "file.yaml: needed: Field required",
        "file.yaml: several.0.fraction: Input should be greater than 0 (got -1)",
        "file.yaml: unknown key 'by_name.x.fractio'; did you mean 'fraction'? known: fraction",
        "file.yaml: unknown key 'neded'; did you mean 'needed'? known: by_name, needed, one, several",
        "file.yaml: unknown key 'one.fractoin'; did you mean 'fraction'? known: fraction",
    ]


@given(st.dictionaries(st.text(max_size=6), st.integers() | st.text(max_size=4), max_size=4))
def test_validation_fails_with_our_error_or_not_at_all(values: dict[str, object]) -> None:
    if set(values) == {"needed"} and isinstance(values["needed"], int):
        assert plugins.validate(Outer, values, where="here").needed == values["needed"]
        return
    with pytest.raises(GristmillError, match="^here: "):
        plugins.validate(Outer, {"several": 0, **values}, where="here")
