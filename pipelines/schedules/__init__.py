"""Learning-rate schedules: a pure multiplier of the peak rate as a function of the step.

A phase of `num_steps` steps counts them from 0. Its first w steps are the warm-up, with the factor ``(step + 1) / (w + 1)``:
never 0, and 1 at step w. The n = num_steps - w steps that follow have the progress ``(step - w) / n``: 0 at the first of
them, ``1 - 1/n`` at the last, so that a floor "at the end of the phase" is what step `num_steps` would have. Lengths are
shares (of the phase for the warm-up, of the steps after it for the rest), rounded to whole steps by Python's `round`, or
steps, which take precedence and do not depend on the length of the phase.
"""

from __future__ import annotations

from pydantic import Field

from pipelines.plugins import Plugin


class Schedule(Plugin):
    """Base of every schedule."""

    warmup_fraction: float = Field(default=0.0, ge=0, le=1)
    """Share of the phase's steps over which the rate rises linearly from 0."""
    warmup_steps: int | None = Field(default=None, ge=0)
    """Steps of the warm-up, in place of the share."""

    def multiplier(self, step: int, num_steps: int) -> float:
        """Return the factor on the peak rate at `step` (0-based) of `num_steps`."""
        warmup = round(self.warmup_fraction * num_steps) if self.warmup_steps is None else self.warmup_steps
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return self.after_warmup(step - warmup, max(1, num_steps - warmup))

    def after_warmup(self, step: int, num_steps: int) -> float:
        """Return the factor at `step` (0-based) of the `num_steps` that follow the warm-up."""
        raise NotImplementedError
