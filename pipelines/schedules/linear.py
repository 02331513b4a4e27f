"""Linear decay from the peak rate to a floor."""

from __future__ import annotations

from pydantic import Field

from pipelines.schedules import Schedule


class Linear(Schedule):
    """Linear decay."""

    floor: float = Field(default=0.1, ge=0, le=1)
    """Factor reached at the end of the phase."""

    def after_warmup(self, step: int, num_steps: int) -> float:
        return 1.0 - (1.0 - self.floor) * step / num_steps
