"""Errors that a user can act on: each message names the value, the rule and the remedy."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


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
    close = get_close_matches(name, choices, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ";"
    return f"{hint} known: {', '.join(choices) or 'none'}"
