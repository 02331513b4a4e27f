"""Cosine decay from the peak rate to a floor (Loshchilov and Hutter 2017, 1608.03983, equation 5, one cycle)."""

from __future__ import annotations

import math

from pydantic import Field

from pipelines.schedules import Schedule


class Cosine(Schedule):
    """Half a cosine."""

    floor: float = Field(default=0.1, ge=0, le=1)
    """Factor reached at the end of the phase."""

    def after_warmup(self, step: int, num_steps: int) -> float:
        return self.floor + (1.0 - self.floor) * 0.5 * (1.0 + math.cos(math.pi * step / num_steps))
