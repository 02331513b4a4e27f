"""Settings files: YAML as values, with the file and the line that each value stands in, and recipes that extend others.

A recipe that begins with ``extends: other`` is `other` with its own keys laid over it: mappings are merged, everything else, lists too,
is replaced. ``key: !remove`` takes a key of the other away; ``key: !replace {...}`` replaces a mapping instead of merging it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path

import yaml

from pipelines.errors import GristmillError, Location, Problem, dotted, suggestion
from pipelines.manifests import Json

EXTENDS = "extends"
MAX_VALUES = 100_000
"""Of a file once its aliases are followed: a few lines of them can stand for billions."""


class _Remove:
    """What ``!remove`` stands for."""


@dataclass(frozen=True)
class _Replace:
    """What ``!replace`` stands for."""

    value: object


REMOVE = _Remove()


@dataclass(frozen=True)
class SettingsFile:
    """What a settings file says, what it extends laid under it."""

    name: str
    """The file's name."""
    values: dict[str, Json]
    """Without ``extends``."""
    places: Mapping[Location, tuple[str, int]]
    """Of each key and each item of a list the file and the line, from 1."""
    extends: tuple[str, ...] = ()
    """The recipes that it extends, the nearest first."""
    faults: tuple[str, ...] = ()
    """What is wrong with the files as files: a key that is given twice, a marker without meaning. One line each."""

    def place(self, location: Location) -> tuple[str, int]:
        """Return file and line of the value at `location`, or of the nearest key around it; line 0 is the file as a whole."""
        while location and location not in self.places:
            location = location[:-1]
        return self.places.get(location, (self.name, 0))

    def line(self, problem: Problem) -> str:
        """Return `problem` with the place of the value that it is about."""
        file, number = self.place(problem.location)
        place = f"{file}:{number}" if number else file
        return f"{place}: {problem.text}{'' if file == self.name else inherited(self.name)}"


def inherited(name: str) -> str:
    """Return what is said of a problem of file `name` that came from a file it extends."""
    return f" [in {name}, which extends it]"


def read_settings_file(path: Path) -> SettingsFile:
    """Read one file that extends nothing.

    Raises:
        GristmillError: the file is missing, or is no YAML or no mapping.
    """
    found, problems = _read(path)
    return _plain_file(found, problems, "this file extends none")


def read_recipe_file(path: Path, asked: tuple[str, ...] = (), read: dict[Path, SettingsFile] | None = None) -> SettingsFile:
    """Read a recipe's file and lay it over what it extends; `asked` are the recipes that led here.

    Where `read` is given, a file that is in it is taken from there, and one that is not is put there: many recipes extend one.

    Raises:
        GristmillError: as `read_settings_file`, of any file of the chain; or what it extends is unknown or comes back to itself.
    """
    read = {} if read is None else read
    if path not in read:
        read[path] = _extended(path, asked, read)
    return read[path]


def _extended(path: Path, asked: tuple[str, ...], read: dict[Path, SettingsFile]) -> SettingsFile:
    own, problems = _read(path)
    parent = own.values.pop(EXTENDS, None)
    if parent is None:
        return _plain_file(own, problems, f"{own.name} extends none")
    chain = (*asked, path.stem)
    known = sorted(other.stem for other in path.parent.glob("*.yaml"))
    if not isinstance(parent, str):
        problems.append(Problem((EXTENDS,), f"extends: give the name of one recipe (got {parent!r})"))
    elif parent in chain:
        problems.append(Problem((EXTENDS,), f"extends: {' -> '.join((*chain, parent))}: recipes extend each other in a circle"))
    elif parent not in known:
        problems.append(Problem((EXTENDS,), f"extends: unknown recipe {parent!r}{suggestion(parent, known)}"))
    else:
        return _laid_over(read_recipe_file(path.with_name(f"{parent}.yaml"), chain, read), own, parent, problems)
    raise GristmillError("\n".join(own.line(problem) for problem in problems))


def _plain_file(found: SettingsFile, problems: list[Problem], why: str) -> SettingsFile:
    values = {key: _plain(value, (key,), problems, why) for key, value in found.values.items()}
    return replace(found, values=values, faults=tuple(found.line(problem) for problem in problems))


def _laid_over(base: SettingsFile, own: SettingsFile, parent: str, problems: list[Problem]) -> SettingsFile:
    places = dict(base.places)

    def lay(under: dict[str, Json], over: Mapping[str, object], at: Location) -> dict[str, Json]:
        result = dict(under)
        for key, value in over.items():
            here = (*at, key)
            before = result.pop(key, None) if value is REMOVE and key in result else result.get(key)
            if value is REMOVE and key not in under:
                problems.append(Problem(here, f"{dotted(here)}: {parent} has no such key to remove{suggestion(key, under)}"))
            elif isinstance(value, dict) and isinstance(before, dict):
                result[key] = lay(before, value, here)
                places[here] = own.places[here]
                continue
            elif value is not REMOVE:
                result[key] = _plain(value, here, problems, f"{parent} has no such key")
            for place in [place for place in places if place[: len(here)] == here]:
                del places[place]
            if value is not REMOVE:
                places.update({place: line for place, line in own.places.items() if place[: len(here)] == here})
        return result

    values = lay(base.values, own.values, ())
    note = inherited(own.name)
    faults = [line if line.endswith(note) else f"{line}{note}" for line in base.faults] + [own.line(problem) for problem in problems]
    return SettingsFile(own.name, values, places, (parent, *base.extends), tuple(faults))


def _plain(value: object, at: Location, problems: list[Problem], why: str) -> Json:
    """Return `value` without markers; each ``!remove`` in it is a problem, as there is nothing to remove."""
    if isinstance(value, _Replace):
        return _plain(value.value, at, problems, why)
    if value is REMOVE:
        problems.append(Problem(at, f"{dotted(at)}: nothing to remove: {why}"))
        return None
    if isinstance(value, dict):
        return {key: _plain(item, (*at, key), problems, why) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item, (*at, number), problems, "a list is replaced as a whole") for number, item in enumerate(value)]
    return value  # type: ignore[return-value]


def parse_value(text: str) -> Json:
    """Return the value that `text` is in YAML.

    Raises:
        GristmillError: it is none.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise GristmillError(f"{text!r} is not YAML: {_about(error)}") from error


def differences(first: Json, second: Json, at: Location = ()) -> Iterator[tuple[Location, Json, Json]]:
    """Yield where two settings differ, with both values, in the order of their keys; lists of mappings are compared item by item.

    A key that one of them lacks has the value None there: in settings with all defaults filled in it is a part of something that is None.
    """
    if isinstance(first, dict) and isinstance(second, dict):
        for key in dict.fromkeys([*first, *second]):
            yield from differences(first.get(key), second.get(key), (*at, key))
    elif _of_mappings(first) and _of_mappings(second):
        for number, pair in enumerate(zip_longest(first, second)):
            yield from differences(*pair, (*at, number))
    elif first != second:
        yield at, first, second


def _of_mappings(value: Json) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


# YAML


class _Loader(yaml.SafeLoader):
    """YAML with the booleans of YAML 1.2, where ``off`` is a word, its numbers, where ``1e-3`` is one, and with dates as text."""

    def scan_tag(self) -> yaml.TagToken:
        """Read a tag; as in YAML 1.2, a comma ends it: ``{a: !remove, b: 1}``."""
        start = self.get_mark()
        if self.prefix(len(_REMOVE)) != _REMOVE or self.peek(len(_REMOVE)) not in ",]}":
            return super().scan_tag()
        self.forward(len(_REMOVE))
        return yaml.TagToken(("!", _REMOVE[1:]), start, self.get_mark())


_REMOVE = "!remove"
_BOOL, _TIMESTAMP, _FLOAT = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:float"
_MERGE = "tag:yaml.org,2002:merge"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_BOOL, _TIMESTAMP)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(_FLOAT, re.compile(r"^[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789"))


def _construct_replace(loader: yaml.SafeLoader, node: yaml.Node) -> _Replace:
    if isinstance(node, yaml.MappingNode):
        return _Replace(loader.construct_mapping(node, deep=True))
    raise yaml.constructor.ConstructorError(None, None, "!replace wants a mapping, the only thing that is merged", node.start_mark)


_Loader.add_constructor(_REMOVE, lambda loader, node: REMOVE)
_Loader.add_constructor("!replace", _construct_replace)


def _read(path: Path) -> tuple[SettingsFile, list[Problem]]:
    """Return the file with its markers, and what is wrong with its keys.

    Raises:
        GristmillError: nothing can be read of it.
    """
    if not path.exists():
        raise GristmillError(f"{path} does not exist; run from the directory that holds project.yaml, or set GRISTMILL_PROJECT")
    try:
        loader = _Loader(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        keys = _Keys(path.name)
        keys.walk(node, (), frozenset())
        content = loader.construct_document(node) if node and not keys.fatal else None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise GristmillError(f"{path.name} is not YAML: {_about(error)}") from error
    if keys.fatal:
        raise GristmillError(f"{path.name}: {keys.fatal}")
    if not isinstance(content, dict):
        raise GristmillError(f"{path.name} holds no mapping of keys to values")
    return SettingsFile(path.name, content, keys.places), keys.problems


def _about(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    return f"line {mark.line + 1}: {getattr(error, 'problem', '')}" if mark else str(error)


class _Keys:
    """The place of each key of a YAML tree, and the keys that are given twice or are no text."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.places: dict[Location, tuple[str, int]] = {}
        self.problems: list[Problem] = []
        self.fatal = ""
        self._seen = 0

    def walk(self, node: yaml.Node | None, at: Location, above: frozenset[int]) -> None:
        """Note what stands in `node`; `above` are the nodes that it stands in."""
        self._seen += 1
        if id(node) in above:
            self.fatal = f"{dotted(at)}: an alias stands for what it is a part of"
        if self._seen > MAX_VALUES:
            self.fatal = f"its aliases stand for more than {MAX_VALUES:,} values"
        if self.fatal or node is None:
            return
        above = above | {id(node)}
        for key, child in self._children(node, at):
            self.places.setdefault((*at, key), (self.file, child[0]))
            self.walk(child[1], (*at, key), above)

    def _children(self, node: yaml.Node, at: Location) -> Iterator[tuple[int | str, tuple[int, yaml.Node]]]:
        if isinstance(node, yaml.SequenceNode):
            yield from ((number, (item.start_mark.line + 1, item)) for number, item in enumerate(node.value))
        if not isinstance(node, yaml.MappingNode):
            return
        first: dict[str, int] = {}
        for key, value in sorted(node.value, key=lambda pair: pair[0].tag == _MERGE):  # what is merged in counts for less
            line = key.start_mark.line + 1
            if key.tag == _MERGE:
                sources = value.value if isinstance(value, yaml.SequenceNode) else [value]
                yield from (child for source in sources for child in self._children(source, at))
            elif key.tag != "tag:yaml.org,2002:str":
                self._problem((*at, key.value), line, "is a key, and a key is text; put it in quotes")
            elif key.value in first:
                self._problem((*at, key.value), line, f"is given twice, first in line {first[key.value]}; take one of them away")
            else:
                first[key.value] = line
                yield key.value, (line, value)

    def _problem(self, location: Location, line: int, text: str) -> None:
        self.problems.append(Problem((*location, line), f"{dotted(location)} {text}"))
        self.places[(*location, line)] = (self.file, line)  # of this key, not of the first of its name
