"""Warm-up, stable, decay (MiniCPM, 2404.06395, section 4): constant, then a decay at the end.

The decay is linear, half a cosine, or ``1 - sqrt`` (Hägele et al. 2024, 2405.18392, equation 1).
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from pipelines.schedules import Schedule


class WarmupStableDecay(Schedule):
    """Constant until the last `decay_fraction` of the phase."""

    decay_fraction: float = Field(default=0.2, ge=0, le=1)
    """Share of the steps after the warm-up over which the rate falls."""
    decay: Literal["linear", "cosine", "one_minus_sqrt"] = "linear"
    """Shape of the fall."""
    floor: float = Field(default=0.0, ge=0, le=1)
    """Factor reached at the end of the phase."""

    def after_warmup(self, step: int, num_steps: int) -> float:
        falling = self.decay_fraction * num_steps
        done = max(0.0, 1.0 - (num_steps - step) / falling) if falling else 0.0
        left = {"linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done)), "one_minus_sqrt": 1.0 - math.sqrt(done)}
        return self.floor + (1.0 - self.floor) * left[self.decay]
