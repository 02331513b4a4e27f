"""Learning-rate schedules: a pure multiplier of the peak rate as a function of the step."""

from __future__ import annotations

from pipelines.plugins import Plugin


class Schedule(Plugin):
    """Base of every schedule."""

    warmup_fraction: float = 0.0
    """Share of the phase's steps over which the rate rises linearly from 0."""

    def multiplier(self, step: int, num_steps: int) -> float:
        """Return the factor on the peak rate at `step` (0-based) of `num_steps`."""
        warmup = round(self.warmup_fraction * num_steps)
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return self.after_warmup((step - warmup) / max(1, num_steps - warmup))

    def after_warmup(self, progress: float) -> float:
        """Return the factor at `progress` in [0, 1) of the steps that follow the warm-up."""
        raise NotImplementedError
