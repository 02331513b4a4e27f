"""Warm-up, stable, decay (MiniCPM, 2404.06395, section 4): constant, then a linear decay at the end."""

from __future__ import annotations

from pipelines.schedules import Schedule


class WarmupStableDecay(Schedule):
    """Constant until the last `decay_fraction` of the phase."""

    decay_fraction: float = 0.2
    """Share of the steps after the warm-up over which the rate falls."""
    floor: float = 0.0
    """Factor reached at the end of the phase."""

    def after_warmup(self, progress: float) -> float:
        remaining = (1.0 - progress) / self.decay_fraction if self.decay_fraction else 1.0
        return self.floor + (1.0 - self.floor) * min(1.0, remaining)
