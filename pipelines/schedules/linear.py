"""Linear decay from the peak rate to a floor."""

from __future__ import annotations

from pipelines.schedules import Schedule


class Linear(Schedule):
    """Linear decay."""

    floor: float = 0.1
    """Factor reached at the end of the phase."""

    def after_warmup(self, progress: float) -> float:
        return 1.0 - (1.0 - self.floor) * progress
