"""Constant rate: every checkpoint of a run is comparable, so probes use it (CMR, 2407.17467, section 5.1)."""

from __future__ import annotations

from pipelines.schedules import Schedule


class Constant(Schedule):
    """The peak rate after the warm-up."""

    def after_warmup(self, step: int, num_steps: int) -> float:
        return 1.0
