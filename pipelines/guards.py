"""Guard rails: whether a step's loss and gradient are sound, and what was done where they were not."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from pipelines.manifests import Json
from pipelines.plan import GuardSettings

Action = Literal["go on", "report", "stop", "skip", "rewind"]
MAX_DOCUMENTS = 64
MAX_REPORTS = 1000


@dataclass
class Guard:
    """Watches the loss and the gradient norm of each step."""

    settings: GuardSettings
    losses: deque[float] = field(init=False)
    norms: deque[float] = field(init=False)
    events: list[dict[str, Json]] = field(default_factory=list)
    """What happened, in order; survives a rewind."""

    def __post_init__(self) -> None:
        self.losses = deque(maxlen=self.settings.spike_steps)
        self.norms = deque(maxlen=self.settings.spike_steps)

    def judge(self, loss: float, norm: float) -> tuple[Action, str]:
        """Return what to do about a step, and why. A sound step, and one that is only reported, enters the means."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return self.settings.on_nan, f"loss {loss}, gradient norm {norm}"
        action, reason = self._spike(loss, norm)
        if action in ("go on", "report"):
            self.losses.append(loss)
            self.norms.append(norm)
        return action, reason

    def _spike(self, loss: float, norm: float) -> tuple[Action, str]:
        if self.settings.on_spike == "ignore":
            return "go on", ""
        for name, value, recent in (("loss", loss, self.losses), ("gradient norm", norm, self.norms)):
            if len(recent) < self.settings.spike_steps // 2:
                continue
            mean = math.fsum(recent) / len(recent)
            deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in recent) / (len(recent) - 1))
            if value > mean + self.settings.spike_sigmas * deviation:
                return self.settings.on_spike, f"{name} {value:.4g} after a mean of {mean:.4g} (standard deviation {deviation:.2g})"
        return "go on", ""

    def record(self, step: int, action: Action, reason: str, documents: Sequence[tuple[str, str]]) -> dict[str, Json]:
        """Write down what was done at `step`; return it."""
        shown = [f"{name} ({domain})" for domain, name in documents[:MAX_DOCUMENTS]]
        event: dict[str, Json] = {"step": step, "action": action, "reason": reason, "num_documents": len(documents), "documents": shown}
        if len(self.events) < MAX_REPORTS:
            self.events.append(event)
        return event

    @property
    def num_interventions(self) -> int:
        """Skips and rewinds so far."""
        return sum(event["action"] in ("skip", "rewind") for event in self.events)

    def state(self) -> dict[str, Json]:
        """Return what a resume needs."""
        return {"losses": list(self.losses), "norms": list(self.norms), "events": list(self.events)}

    def restore(self, state: dict[str, Json], *, events: bool = True) -> None:
        """Take over what `state` returned; the events only where asked."""
        self.losses.clear()
        self.norms.clear()
        self.losses.extend(state["losses"])
        self.norms.extend(state["norms"])
        if events:
            self.events = list(state["events"])
