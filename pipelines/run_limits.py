"""When a run writes a resume point and when it ends before its plan: by the clock, and where its process is asked to end."""

from __future__ import annotations

import contextlib
import time
from contextlib import AbstractContextManager

from pipelines import interruption
from pipelines.errors import GristmillError
from pipelines.interruption import Interrupted
from pipelines.plan import TrainingSettings


class BudgetReached(GristmillError):
    """The wall-clock budget ended before the plan; the run goes on when it is asked for again."""


class Limits:
    """The limits of one stretch of a run, from now on."""

    def __init__(self, settings: TrainingSettings, *, resumable: bool) -> None:
        self._settings, self._resumable = settings, resumable
        self.started = self._saved = time.monotonic()

    def held(self) -> AbstractContextManager[None]:
        """Wait with the end until a resume point is written, where there is one to write; inside, `over` says that it is due."""
        return interruption.deferred() if self._resumable else contextlib.nullcontext()

    def over(self) -> bool:
        """Return whether the run is to end here."""
        budget = self._settings.max_seconds
        return interruption.requested() or (budget is not None and time.monotonic() - self.started > budget)

    def due(self) -> bool:
        """Return whether it is time for a resume point."""
        return time.monotonic() - self._saved > self._settings.checkpoint_seconds

    def saved(self) -> None:
        """Count the time to the next resume point from now."""
        self._saved = time.monotonic()

    def reached(self, step: int, num_steps: int) -> BaseException:
        """Return what a run that ends at `step` raises."""
        if interruption.requested() or self._settings.max_seconds is None:  # of several processes, the first one knows
            return Interrupted(f"asked to end at step {step} of {num_steps}; a resume point is written, run again to go on")
        return BudgetReached(
            f"max_seconds {self._settings.max_seconds:g} are over at step {step} of {num_steps}; a resume point is written, "
            "run again to go on"
        )
