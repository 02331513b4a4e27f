"""The plan of a training run: its settings, and which phase, rate and batch belong to a step.

Everything here is a pure function of the settings and the step.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal, TypeVar, cast

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from pipelines import plugins
from pipelines.checkpoints import RetentionSettings
from pipelines.errors import GristmillError
from pipelines.files import file_hashes
from pipelines.manifests import Json
from pipelines.model_files import local_path, weight_files
from pipelines.models import ModelSettings
from pipelines.objectives import Objective
from pipelines.parameterizations import Parameterization
from pipelines.plugins import Plugin, Settings
from pipelines.schedules import Schedule
from pipelines.teachers import Teacher


class Reselection(Settings):
    """What a phase reads of its passages: chosen at its start, and again along the way, by the model as it then stands."""

    function: str = "facility_location"
    """A plugin of `set_functions/`. Where it draws, it draws anew in each round."""
    settings: dict[str, Json] = Field(default_factory=dict)
    """Settings of the set function."""
    fraction: float = Field(default=0.25, gt=0, le=1)
    """Share of the tokens of each domain that is selected; the shares of the mixture stay."""
    every_tokens: int = Field(ge=1)
    """Tokens read between two selections: a phase of N tokens has ceil(N / `every_tokens`) rounds, the last one shorter."""
    layer: int | None = None
    """Hidden state that passages are embedded by: 0 are the embeddings, -1 the last layer; three quarters of the depth where absent."""
    max_tokens_per_passage: int | None = Field(default=None, ge=1)
    """A passage is embedded by its first so many tokens; `sequence_length` where absent."""


def _target_share(value: object) -> object:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if value == "critical" or (number and 0 <= value <= 1):
        return value
    raise ValueError(f"target share {value!r} is neither a share from 0 to 1 nor `critical`, which is the measured ratio")


TargetShare = Annotated[float | Literal["critical"], BeforeValidator(_target_share)]


class Ramp(Settings):
    """A target share that moves linearly with the tokens of the phase."""

    start: TargetShare
    """Where the phase begins: a share from 0 to 1, or `critical`."""
    end: TargetShare
    """Where it ends."""


def _share_or_ramp(value: object) -> str:
    return "ramp" if isinstance(value, Ramp | Mapping) else "share"


ShareOrRamp = Annotated[Annotated[TargetShare, Tag("share")] | Annotated[Ramp, Tag("ramp")], Discriminator(_share_or_ramp)]


class PhaseMixture(Settings):
    """How much a phase reads, and of what."""

    tokens: int = Field(ge=1)
    """Tokens read; rounded down to whole batches."""
    mixture: dict[str, float] | None = None
    """Share of each domain in this phase; the run's own where absent."""
    target_share: ShareOrRamp | None = None
    """Share of the target domains in this phase, where it is to differ from the run's: a number, `critical` for the measured ratio, or
    `start` and `end` of a ramp. The shares of domains within their roles stay. Needs a domain mixture."""

    @model_validator(mode="after")
    def _shares_are_shares(self) -> PhaseMixture:
        if self.mixture is not None and (min(self.mixture.values(), default=0.0) < 0 or sum(self.mixture.values()) <= 0):
            raise ValueError(f"mixture {self.mixture} needs shares of at least 0, one of them above; they are divided by their sum")
        if self.mixture is not None and self.target_share is not None:
            raise ValueError(f"mixture {self.mixture} says all shares, so target_share says nothing; leave one of them out")
        return self


class Phase(PhaseMixture):
    """A stretch of training with one objective, one schedule and one mixture."""

    learning_rate: float = Field(gt=0)
    """The peak rate that the schedule multiplies."""
    objective: str = "causal"
    """A plugin of `objectives/`."""
    objective_settings: dict[str, Json] = Field(default_factory=dict)
    """Settings of the objective."""
    schedule: str = "constant"
    """A plugin of `schedules/`."""
    schedule_settings: dict[str, Json] = Field(default_factory=dict)
    """Settings of the schedule."""
    attention: Literal["window", "document"] = "window"
    """`document`: no position attends beyond its own document, and positions begin anew with each."""
    parameterization: str | None = None
    """A plugin of `parameterizations/` that holds for this phase."""
    parameterization_settings: dict[str, Json] = Field(default_factory=dict)
    """Settings of the parameterization."""
    teacher: str | None = None
    """A plugin of `teachers/` that the loss of this phase listens to."""
    teacher_settings: dict[str, Json] = Field(default_factory=dict)
    """Settings of the teacher."""
    select: Reselection | None = None
    """Which of its passages the phase reads; all of them where absent."""

    def named(self) -> Iterator[tuple[str, str, Mapping[str, Json]]]:
        """Yield the extension folder, the name and the settings of each plugin of the phase."""
        for kind in ("objective", "schedule", "parameterization", "teacher"):
            if name := getattr(self, kind):
                yield f"{kind}s", name, getattr(self, f"{kind}_settings")
        if self.select:
            yield "set_functions", self.select.function, self.select.settings


class GuardSettings(Settings):
    """What happens when training goes wrong. Each event is written to ``events.jsonl`` with the documents of its batch.

    A spike is a step whose loss or gradient norm lies more than `spike_sigmas` standard deviations above the mean of the last
    `spike_steps` (after OLMo-core's SkipStepOptimizer, which skips such updates).
    """

    on_nan: Literal["stop", "skip", "rewind"] = "stop"
    """`skip` leaves the update out; `rewind` goes back to the last rewind point and reads other batches in place of the last ones."""
    on_spike: Literal["ignore", "report", "stop", "skip", "rewind"] = "report"
    """As `on_nan`; `report` only writes the event."""
    spike_sigmas: float = Field(default=6.0, gt=0)
    """Standard deviations that make a spike."""
    spike_steps: int = Field(default=128, ge=8)
    """Steps of the mean; half of them must have passed since the start."""
    rewind_every: int = Field(default=200, ge=1)
    """Steps between rewind points, where a policy rewinds."""
    replaced_batches: int = Field(default=8, ge=1)
    """Batches up to the bad one that a rewind replaces by unread ones."""
    max_events: int = Field(default=10, ge=1)
    """Skips and rewinds after which the run stops."""

    @property
    def rewinds(self) -> bool:
        """Whether rewind points are needed."""
        return "rewind" in (self.on_nan, self.on_spike)


class ValidationSettings(Settings):
    """Losses along the run on documents that are set aside from the selected ones."""

    fraction: float = Field(default=0.0, ge=0, lt=1)
    """Share of the selected documents of each domain that is set aside, by a stable hash of the id; 0 measures nothing."""
    every_steps: int = Field(default=100, ge=1)
    """Steps between measurements."""
    windows_per_domain: int = Field(default=16, ge=1)
    """Windows measured of each domain."""
    patience: int | None = Field(default=None, ge=1)
    """Measurements without a new lowest loss after which the run stops early."""


class SampleSettings(Settings):
    """Greedy continuations along the run, in ``samples.jsonl``; only of models that read left to right."""

    prompts: tuple[str, ...] = ()
    """What is continued; openings of training windows, one a domain, where empty."""
    every_steps: int | None = Field(default=None, ge=1)
    """Steps between samples; at the end only where absent."""
    max_new_tokens: int = Field(default=32, ge=0)
    """Tokens of a continuation; 0 writes none."""


class RunSettings(Settings):
    """How a run is done, whatever its model and its plan."""

    sequence_length: int = Field(default=128, ge=2)
    """Positions per window."""
    batch_sequences: int = Field(default=16, ge=1)
    """Windows per step, over all processes."""
    micro_batch_sequences: int | None = Field(default=None, ge=1)
    """Windows per forward pass of a process; gradients are accumulated over the rest of its share. None takes all at once."""
    optimizer: str = "muon"
    """A plugin of `optimizers/`."""
    optimizer_settings: dict[str, Json] = Field(default_factory=dict)
    """Settings of the optimizer."""
    gradient_clip: float = Field(default=1.0, gt=0)
    """Bound on the norm of the gradient (Pascanu et al. 2013)."""
    seed: int = Field(default=0, ge=0)
    """Of the initial weights, the data order and what objectives draw."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes a GPU where there is one."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of matrix products; weights are float32. `auto` is bfloat16 on a GPU and float32 on a CPU, where bfloat16 is slower."""
    activation_checkpointing: bool = False
    """Whether activations are computed again in the backward pass, for less memory."""
    threads: int = Field(default=1, ge=1)
    """Torch threads per process. Part of the identity: sums are ordered by it, so another number gives other last bits."""
    processes: int = Field(default=1, ge=1, exclude=True)
    """Processes on this machine, one a GPU, through torchrun. A run may be resumed on another number: the order of the data stays, last
    bits do not."""
    sharding: Literal["ddp", "fsdp"] = Field(default="ddp", exclude=True)
    """How several processes share the model: each a whole copy (DDP), or a part (FSDP2)."""
    checkpoint_seconds: float = Field(default=20.0, ge=0, exclude=True)
    """Time between resume points; does not change the result."""
    max_seconds: float | None = Field(default=None, gt=0, exclude=True)
    """Time after which the run writes a resume point and ends with an error; asked again, it goes on from there."""
    retention: RetentionSettings = RetentionSettings()
    """Which checkpoints are kept."""
    guards: GuardSettings = GuardSettings()
    """What happens when training goes wrong."""
    validation: ValidationSettings = ValidationSettings()
    """Losses along the run, and early stopping."""
    samples: SampleSettings = SampleSettings()
    """Continuations along the run."""

    @model_validator(mode="after")
    def _parts_fit(self) -> RunSettings:
        if self.batch_sequences % self.processes:
            raise ValueError(
                f"batch_sequences {self.batch_sequences} is no multiple of processes {self.processes}; each takes an equal share"
            )
        if self.retention.best and not self.validation.fraction:
            raise ValueError("retention.best needs validation.fraction above 0: without documents set aside no checkpoint is the best")
        return self


class TrainingSettings(RunSettings):
    """A run: a model or a base checkpoint, and a plan of phases."""

    model: ModelSettings | None = None
    """The model to initialise; None continues from the base checkpoint, its optimizer state included."""
    phases: tuple[Phase, ...] = Field(min_length=1)
    """Run in order."""
    max_tokens: int | None = Field(default=None, ge=1)
    """The plan ends early here; schedules stay as planned."""
    compile: bool = False
    """Whether torch.compile is used. Part of the identity, as threads are."""
    files: dict[str, str] = Field(default_factory=dict)
    """File -> SHA-256 of what the model and the teachers are read from on this machine; `located` fills it in."""
    root: Path = Field(default=Path(), exclude=True)
    """Where relative paths start; the same project elsewhere trains the same."""

    @model_validator(mode="after")
    def _selections_fit(self) -> TrainingSettings:
        for number, phase in enumerate(self.phases):
            if phase.select and (problem := self._selection_problem(phase.select)):
                raise ValueError(f"phase {number}: {problem}")
        return self

    def _selection_problem(self, select: Reselection) -> str | None:
        step = self.batch_sequences * self.sequence_length
        if self.processes > 1:
            return f"processes {self.processes}: a phase with `select` runs in one process, which holds the passages; set processes: 1"
        if select.every_tokens < step:
            return f"select.every_tokens {select.every_tokens} is less than the {step} tokens of a step; a round is a step at least"
        if (select.max_tokens_per_passage or 0) > self.sequence_length:
            return (
                f"select.max_tokens_per_passage {select.max_tokens_per_passage} is more than sequence_length {self.sequence_length}, "
                "beyond which the model never reads; leave it out"
            )
        return None


SettingsOfARun = TypeVar("SettingsOfARun", bound=TrainingSettings)
NOT_IN_FINGERPRINT = tuple(name for name, field in TrainingSettings.model_fields.items() if field.exclude)
"""Settings that say how the work is laid out, not what is trained."""


@dataclass(frozen=True)
class Round:
    """The steps of a selecting phase from one selection to the next."""

    phase: int
    select: Reselection
    first: int
    """Its first step (0-based)."""
    stop: int
    """The step behind its last one."""


@dataclass(frozen=True)
class Plan:
    """`settings` as steps."""

    settings: TrainingSettings

    @property
    def tokens_per_step(self) -> int:
        """Tokens read by a step of all processes."""
        return self.settings.batch_sequences * self.settings.sequence_length

    @cached_property
    def phase_steps(self) -> list[int]:
        """Planned steps of each phase."""
        return [max(1, phase.tokens // self.tokens_per_step) for phase in self.settings.phases]

    @cached_property
    def num_steps(self) -> int:
        """Steps of the run."""
        planned = sum(self.phase_steps)
        limit = self.settings.max_tokens
        return planned if limit is None else max(1, min(planned, limit // self.tokens_per_step))

    def phase_at(self, step: int) -> tuple[int, int]:
        """Return the phase of `step` (0-based) and the phase's first step."""
        first = 0
        for number, steps in enumerate(self.phase_steps):
            if step < first + steps:
                return number, first
            first += steps
        raise GristmillError(f"step {step} lies beyond the plan of {first} steps")

    @cached_property
    def rounds(self) -> list[Round]:
        """The rounds of all selecting phases, as far as the run goes."""
        found, first = [], 0
        for number, (phase, steps) in enumerate(zip(self._p, self.phase_steps, strict=True)):
            if select := phase.select:
                stop = min(first + steps, self.num_steps)
                starts = (n * select.every_tokens // self.tokens_per_step for n in range(math.ceil(phase.tokens / select.every_tokens)))
                borders = [*(first + start for start in starts if first + start < stop), stop]
                found += [Round(number, select, *border) for border in pairwise(borders)]
            first += steps
        return found

    def round_at(self, step: int) -> int | None:
        """Return the number of the round that `step` lies in, or None where its phase reads all passages."""
        number = bisect_right(self.rounds, step, key=lambda one: one.first) - 1
        return number if number >= 0 and step < self.rounds[number].stop else None

    def rate(self, step: int) -> float:
        """Return the learning rate of `step`."""
        number, first = self.phase_at(step)
        return self.settings.phases[number].learning_rate * self.schedules[number].multiplier(step - first, self.phase_steps[number])

    @cached_property
    def objectives(self) -> list[Objective]:
        """The objective of each phase."""
        return [cast(Objective, self._built("objectives", p.objective, p.objective_settings)) for p in self.settings.phases]

    @cached_property
    def schedules(self) -> list[Schedule]:
        """The schedule of each phase."""
        return [cast(Schedule, self._built("schedules", p.schedule, p.schedule_settings)) for p in self.settings.phases]

    @cached_property
    def parameterizations(self) -> list[Parameterization | None]:
        """The parameterization of each phase, if it has one."""
        return [
            cast(Parameterization | None, self._built("parameterizations", p.parameterization, p.parameterization_settings))
            for p in self._p
        ]

    @cached_property
    def teachers(self) -> list[Teacher | None]:
        """The teacher of each phase, if it has one."""
        return [cast(Teacher | None, self._built("teachers", p.teacher, p.teacher_settings)) for p in self._p]

    @property
    def _p(self) -> tuple[Phase, ...]:
        return self.settings.phases

    @staticmethod
    def _built(kind: str, name: str | None, settings: Mapping[str, Json]) -> Plugin | None:
        return plugins.build(kind, name, dict(settings)) if name else None


def training_plugins(settings: TrainingSettings) -> tuple[str, ...]:
    """Return the plugin modules that `settings` names, for the code version."""
    named = {f"pipelines.{kind}.{name}" for phase in settings.phases for kind, name, _ in phase.named()}
    return tuple(sorted(named | {f"pipelines.optimizers.{settings.optimizer}"}))


def located(settings: SettingsOfARun, root: Path) -> SettingsOfARun:
    """Return `settings` with `root`, and with the hashes of the files that the model and the teachers are read from.

    Raises:
        GristmillError: one of them does not exist.
    """
    model = settings.model
    paths: list[Path] = []
    if model and model.checkpoint and not model.revision:
        paths += weight_files(local_path(model.checkpoint, root))
    for teacher in filter(None, Plan(settings).teachers):
        paths += [root / path for path in teacher.files()]
    return settings.model_copy(update={"files": file_hashes(paths, root), "root": root})
