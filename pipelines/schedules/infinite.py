"""Infinite schedule: warm-up, cool-down, constant, anneal (Ibrahim et al. 2024, 2403.08763, section 7.4; 2503.02844).

    1    /\\
        /  \\__
    c  /      `------------------- - -      as long as there is text
      /                           `
    f                              `-.      the anneal, when a checkpoint is to be handed on

Half a cosine leads from the peak to the constant rate c, and an exponential ``c (f/c)^x`` from there to the floor f. With the
cool-down and the warm-up in steps and no anneal, the factor of a step does not depend on the length of the phase: a run can be
made longer and its earlier steps stay the same. As a phase plan:

    - {tokens: 2000000, learning_rate: 0.004, schedule: infinite, schedule_settings: {warmup_steps: 20, cooldown_steps: 100}}
    - {tokens: 9000000, learning_rate: 0.002, schedule: constant}                                  # c = 0.5: goes on at 0.002
    - {tokens: 1000000, learning_rate: 0.002, schedule: infinite,
       schedule_settings: {constant: 1.0, cooldown_steps: 0, anneal_fraction: 1.0}}                 # anneals to 0.002 * floor
"""

from __future__ import annotations

import math

from pydantic import Field, model_validator

from pipelines.schedules import Schedule


class Infinite(Schedule):
    """Cool-down to a constant rate that lasts, and an optional anneal at the end of the phase."""

    constant: float = Field(default=0.5, gt=0, le=1)
    """Factor of the constant rate."""
    cooldown_fraction: float = Field(default=0.2, ge=0, le=1)
    """Share of the steps after the warm-up over which the rate falls from the peak to the constant rate."""
    cooldown_steps: int | None = Field(default=None, ge=0)
    """Steps of the cool-down, in place of the share."""
    anneal_fraction: float = Field(default=0.0, ge=0, le=1)
    """Share of the steps after the warm-up over which the rate falls from the constant rate to the floor; 0 never anneals."""
    floor: float = Field(default=0.05, gt=0, le=1)
    """Factor reached at the end of the anneal."""

    @model_validator(mode="after")
    def _falls_fit(self) -> Infinite:
        if self.floor > self.constant:
            raise ValueError(f"floor {self.floor} lies above constant {self.constant}; the anneal leads down")
        if self.cooldown_steps is None and self.cooldown_fraction + self.anneal_fraction > 1:
            raise ValueError(
                f"cooldown_fraction {self.cooldown_fraction} and anneal_fraction {self.anneal_fraction} are more than the phase; lower one"
            )
        return self

    def after_warmup(self, step: int, num_steps: int) -> float:
        annealed = round(self.anneal_fraction * num_steps)
        into = step - (num_steps - annealed)
        level = self._before_anneal(min(step, num_steps - annealed), num_steps)
        return level if into < 0 else level * (min(self.floor, level) / level) ** (into / max(1, annealed))

    def _before_anneal(self, step: int, num_steps: int) -> float:
        cooldown = round(self.cooldown_fraction * num_steps) if self.cooldown_steps is None else self.cooldown_steps
        if step >= cooldown:
            return self.constant
        return self.constant + (1.0 - self.constant) * 0.5 * (1.0 + math.cos(math.pi * step / cooldown))
