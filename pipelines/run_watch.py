"""What is looked at along a run: losses on documents set aside, checkpoints that are kept, continuations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from pipelines import checkpoints
from pipelines.data_order import DataOrder
from pipelines.distributed import World
from pipelines.errors import EmptyInput
from pipelines.generation import continuations
from pipelines.manifests import Json, Manifest
from pipelines.objectives import Objective
from pipelines.plan import TrainingSettings
from pipelines.run_records import Records

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KEPT = "checkpoints"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


class Watched(Protocol):
    """What is looked at: a run in progress."""

    settings: TrainingSettings
    step: int
    stopped_early: bool
    model: PreTrainedModel
    tokenizer: Manifest
    world: World

    @property
    def num_steps(self) -> int: ...
    @property
    def tokens_per_step(self) -> int: ...
    @property
    def order(self) -> DataOrder: ...
    @property
    def validation_windows(self) -> dict[str, np.ndarray]: ...
    def objective(self, step: int) -> Objective: ...
    def window_losses(self, windows: np.ndarray) -> np.ndarray: ...
    def timed(self, kind: str) -> AbstractContextManager[None]: ...


@dataclass
class Watch:
    """Looks at a run as its settings say."""

    run: Watched
    best: tuple[float, int] | None = None
    """The lowest validation loss so far, and its step."""

    def look(self, out: Path, records: Records) -> None:
        """Measure, keep and sample what the step that `run` stands at asks for."""
        run, settings = self.run, self.run.settings
        last = run.step == run.num_steps
        if settings.validation.fraction and (run.step % settings.validation.every_steps == 0 or last):
            with run.timed("validation"):
                self._validate(out, records)
        if settings.retention.every_steps and run.step % settings.retention.every_steps == 0:
            self.keep(out, f"step-{run.step:08d}")
        due = last or run.stopped_early or (settings.samples.every_steps and run.step % settings.samples.every_steps == 0)
        if due and settings.samples.max_new_tokens:
            with run.timed("samples"):
                records.samples.extend(self._samples())

    def _validate(self, out: Path, records: Records) -> None:
        losses = self._losses(self.run.validation_windows)
        mean = float(np.mean(list(losses.values())))
        records.validation.append(
            {"step": self.run.step, "tokens": self.run.step * self.run.tokens_per_step, "loss": mean, "domains": losses}
        )
        if self.best is None or mean < self.best[0]:
            self.best = (mean, self.run.step)
            if self.run.settings.retention.best:
                self.keep(out, "best")
        validation = self.run.settings.validation
        if validation.patience is not None:
            self.run.stopped_early = self.run.step - self.best[1] >= validation.patience * validation.every_steps

    def _losses(self, windows: Mapping[str, np.ndarray]) -> dict[str, float]:
        if not windows:
            fraction = self.run.settings.validation.fraction
            raise EmptyInput(f"validation.fraction {fraction} sets aside less than a window of every domain; raise it")
        return {domain: float(self.run.window_losses(rows).mean()) for domain, rows in windows.items()}

    def keep(self, out: Path, name: str) -> None:
        """Write the model as it stands as a Hugging Face directory ``checkpoints/<name>``."""
        run = self.run
        with run.timed("checkpoints"):
            state = checkpoints.full_model_state(run.model)
            if run.world.is_first:
                files = [run.tokenizer.file(file) for file in TOKENIZER_FILES]
                checkpoints.save_kept(out / KEPT / name, run.model, state, files, step=run.step)

    def _samples(self) -> Iterator[dict[str, Json]]:
        """Yield continuations of the prompts, or of the opening of a window of each domain; none of a model that sees both sides."""
        run, samples = self.run, self.run.settings.samples
        if run.objective(run.step - 1).attention == "bidirectional" or run.world.size > 1:
            return
        openings: dict[str, np.ndarray | str] = {f"prompt {number}": prompt for number, prompt in enumerate(samples.prompts)}
        if not openings:
            openings = {d: stream.window(0) for d, stream in zip(run.order.domains, run.order.streams, strict=True)}
        for name, row in continuations(run.model, run.tokenizer.directory, openings, samples.max_new_tokens).items():
            yield {"step": run.step, "name": name, **row}
