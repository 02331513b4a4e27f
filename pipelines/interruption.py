"""SIGTERM and SIGINT as a request to end: at once, or, inside `deferred`, after the loop has written what it goes on from.

A process says with `install` that it is ended so; elsewhere the signals do what they always did and nothing here counts.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FrameType

GRACE = "GRISTMILL_GRACE_SECONDS"
"""Environment variable: seconds that a process has from the request to its end."""
EXIT_CODE = 128 + signal.SIGTERM
"""Of a process that was asked to end and did not manage in time."""


class Interrupted(BaseException):
    """This process was asked to end; what it goes on from is written. Not an error: nothing that handles errors is to stop it."""


@dataclass
class _State:
    requested: bool = False
    deferring: int = 0
    hand_on: list[Callable[[], None]] = field(default_factory=list)


_state = _State()


def grace_seconds() -> float:
    """Return the seconds from the request to the end that is forced."""
    return float(os.environ.get(GRACE) or 60.0)


def install() -> None:
    """Let SIGTERM and SIGINT raise `Interrupted` in the main thread, but where that is deferred; after `grace_seconds` it ends anyway."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _request)


def requested() -> bool:
    """Return whether this process was asked to end."""
    return _state.requested


@contextlib.contextmanager
def deferred(hand_on: Callable[[], None] | None = None) -> Iterator[None]:
    """Raise nothing inside: the code there asks `requested` and ends by itself; the end of the block is not the end of the process.

    Args:
        hand_on: called when the request comes, or at once where it came before: tells another process.
    """
    _state.deferring += 1
    if hand_on:
        _state.hand_on.append(hand_on)
    try:
        if hand_on and _state.requested:
            hand_on()
        yield
    finally:
        _state.deferring -= 1
        if hand_on:
            _state.hand_on.remove(hand_on)


def _request(number: int, frame: FrameType | None) -> None:
    first, _state.requested = not _state.requested, True
    if first:
        timer = threading.Timer(grace_seconds(), _end_now)
        timer.daemon = True
        timer.start()
    for tell in _state.hand_on:
        tell()
    if not _state.deferring:
        raise Interrupted(f"asked to end by {signal.Signals(number).name}")


def _end_now() -> None:
    sys.stderr.write(f"asked to end {grace_seconds():g} s ago and still busy: ended; {GRACE} allows more\n")
    sys.stderr.flush()
    os._exit(EXIT_CODE)
