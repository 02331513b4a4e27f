"""Progress of long work on standard error: one line every few seconds, with rate and time left."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

SECONDS_BETWEEN_LINES = 5.0


@dataclass
class _Listener:
    """Somebody who is told how far the work of this process is."""

    tell: Callable[[str], None]
    every_seconds: float
    told: float


_listeners: list[_Listener] = []


def listen(tell: Callable[[str], None], *, every_seconds: float) -> None:
    """Have `tell` called with the line of progress of this process, `every_seconds` at most; the first comes after as long."""
    _listeners.append(_Listener(tell, every_seconds, time.monotonic()))


class Progress:
    """Tells ``label: 42% (1.2M of 2.9M tokens), 12.3k tokens/s, 130s left``: prints it while GRISTMILL_PROGRESS is set, and to `listen`."""

    def __init__(self, label: str, total: int, unit: str) -> None:
        self._label, self._total, self._unit = label, max(1, total), unit
        self._started = time.monotonic()
        self._first: int | None = None
        shown = _Listener(_print, SECONDS_BETWEEN_LINES, self._started)
        self._listeners = [*([shown] if os.environ.get("GRISTMILL_PROGRESS") else []), *_listeners]

    def update(self, done: int, note: str = "") -> None:
        """Tell that `done` units of the whole are finished."""
        now = time.monotonic()
        if self._first is None:
            self._first = done
            self._started = now
            return
        due = [listener for listener in self._listeners if now - listener.told >= listener.every_seconds]
        if not due:
            return
        rate = (done - self._first) / max(now - self._started, 1e-9)
        left = (self._total - done) / rate if rate else 0.0
        share = f"{done / self._total:.0%} ({short(done)} of {short(self._total)} {self._unit})"
        line = f"{self._label}: {share}, {short(rate)} {self._unit}/s, {left:.0f}s left"
        for listener in due:
            listener.told = now
            listener.tell(f"{line}{'; ' + note if note else ''}")


def _print(line: str) -> None:
    print(f"  {line}", file=sys.stderr, flush=True)


def short(number: float) -> str:
    """Return a number in four characters or so: 950, 1.2k, 3.4M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return f"{number:.0f}"


def report_line(line: str) -> None:
    """Print `line` to standard error while GRISTMILL_PROGRESS is set."""
    if os.environ.get("GRISTMILL_PROGRESS"):
        print(f"  {line}", file=sys.stderr, flush=True)


def warn(line: str) -> None:
    """Print `line` to standard error: what a person should know and no error says."""
    print(line, file=sys.stderr, flush=True)
