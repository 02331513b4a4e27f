"""Progress of long work on standard error: one line every few seconds, with rate and time left."""

from __future__ import annotations

import os
import sys
import time

SECONDS_BETWEEN_LINES = 5.0


class Progress:
    """Prints ``label: 42% (1.2M of 2.9M tokens), 12.3k tokens/s, 2m10s left`` while GRISTMILL_PROGRESS is set."""

    def __init__(self, label: str, total: int, unit: str) -> None:
        self._label, self._total, self._unit = label, max(1, total), unit
        self._started = self._printed = time.monotonic()
        self._first: int | None = None
        self._shown = bool(os.environ.get("GRISTMILL_PROGRESS"))

    def update(self, done: int, note: str = "") -> None:
        """Tell that `done` units of the whole are finished."""
        now = time.monotonic()
        if self._first is None:
            self._first = done
            self._started = now
            return
        if not self._shown or now - self._printed < SECONDS_BETWEEN_LINES:
            return
        self._printed = now
        rate = (done - self._first) / max(now - self._started, 1e-9)
        left = (self._total - done) / rate if rate else 0.0
        share = f"{done / self._total:.0%} ({short(done)} of {short(self._total)} {self._unit})"
        line = f"{self._label}: {share}, {short(rate)} {self._unit}/s, {left:.0f}s left"
        print(f"  {line}{'; ' + note if note else ''}", file=sys.stderr, flush=True)


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
