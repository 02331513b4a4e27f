"""Errors that a user can act on: each message names the value, the rule and the remedy."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import NamedTuple

Location = tuple[int | str, ...]
"""Where a value stands in a settings file: the keys, and places in lists, that lead to it."""


class Problem(NamedTuple):
    """One thing that is wrong with settings."""

    location: Location
    text: str
    """The key, the value, the rule and the remedy."""


class GristmillError(ValueError):
    """Base of every error raised for bad input, bad settings or a full disk."""


class UnknownName(GristmillError):
    """A name that is not among the known ones."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        self._described = (kind, name, tuple(sorted(known)))
        super().__init__(f"unknown {kind} {name!r}{suggestion(name, self._described[2])}")

    def __reduce__(self) -> tuple[type, tuple[str, str, tuple[str, ...]]]:
        return (type(self), self._described)


class EmptyInput(GristmillError):
    """A step was left with nothing to work on."""


class MissingArtifact(GristmillError):
    """An upstream artifact has not been materialized."""


class OutOfSpace(GristmillError):
    """The disk under the store is full."""


def suggestion(name: str, known: Iterable[str]) -> str:
    """Return ``; did you mean 'x'? known: ...`` for an unknown `name`, or ``; known: ...`` where none is near."""
    choices = sorted(known)
    return f"{nearest(name, choices) or ';'} known: {', '.join(choices) or 'none'}"


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``; did you mean 'x'?`` for an unknown `name`, or nothing where none is near."""
    close = get_close_matches(name, sorted(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def dotted(location: Location) -> str:
    """Return `location` as recipes and messages write it: ``pretraining.0.tokens``."""
    return ".".join(str(part) for part in location)
