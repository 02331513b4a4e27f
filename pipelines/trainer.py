"""The training loop: phases over token streams, with the data position in the step and nowhere else.

The batch of a step is a pure function of (passages, shares, seed, step), so a run that was killed goes on from its newest
resume point to the same bytes. The model is a transformers model; the loop, the batches and the resume points are ours.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field, model_validator

from pipelines import checkpoints, plugins
from pipelines.errors import EmptyInput, GristmillError
from pipelines.manifests import Json, Manifest, Member, Outcome
from pipelines.models import denormals_flushed, load_checkpoint, set_up_torch
from pipelines.objectives import Objective
from pipelines.optimizers import Optimizer
from pipelines.plugins import Settings
from pipelines.progress import Progress, short
from pipelines.schedules import Schedule
from pipelines.shards import WindowStream, passage_pools

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

STEPS_PER_RECORD = 10
ROUNDING = 1e-9


class ModelSettings(Settings):
    """A Llama-like decoder (Touvron et al. 2023): rotary positions, RMSNorm, SwiGLU, tied embeddings."""

    hidden_size: int = Field(default=128, ge=2)
    """Width of the residual stream."""
    num_layers: int = Field(default=4, ge=1)
    """Decoder layers."""
    num_heads: int = Field(default=4, ge=1)
    """Attention heads."""
    intermediate_size: int = Field(default=352, ge=1)
    """Width of the feed-forward layer."""

    @model_validator(mode="after")
    def _heads_divide_width(self) -> ModelSettings:
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of twice num_heads {self.num_heads}; rotary positions need even heads"
            )
        return self


class Phase(Settings):
    """A stretch of training with one objective, one schedule and one mixture."""

    tokens: int = Field(ge=1)
    """Predicted tokens; rounded down to whole batches."""
    learning_rate: float = Field(gt=0)
    """The peak rate that the schedule multiplies."""
    objective: str = "causal"
    """A plugin of `objectives/`."""
    schedule: str = "constant"
    """A plugin of `schedules/`."""
    schedule_settings: dict[str, Json] = Field(default_factory=dict)
    """Settings of the schedule."""


class TrainingSettings(Settings):
    """A run: a model or a base checkpoint, and a plan of phases."""

    model: ModelSettings | None = None
    """The model to initialise; None continues from the base checkpoint, its optimizer state included."""
    phases: tuple[Phase, ...]
    """Run in order."""
    sequence_length: int = Field(default=128, ge=2)
    """Positions per window."""
    batch_sequences: int = Field(default=16, ge=1)
    """Windows per step."""
    optimizer: str = "adamw"
    """A plugin of `optimizers/`."""
    optimizer_settings: dict[str, Json] = Field(default_factory=dict)
    """Settings of the optimizer."""
    gradient_clip: float = 1.0
    """Bound on the norm of the gradient (Pascanu et al. 2013)."""
    seed: int = 0
    """Of the initial weights and of the data order."""
    threads: int = Field(default=1, ge=1)
    """Torch threads. Part of the identity: sums are ordered by it, so another number gives other last bits."""
    compile: bool = False
    """Whether torch.compile is used. Part of the identity for the same reason."""
    checkpoint_seconds: float = Field(default=20.0, exclude=True)
    """Time between resume points; does not change the result."""


@dataclass
class Run:
    """A run in progress: model, optimizer, data streams and the step it stands at."""

    settings: TrainingSettings
    shares: Mapping[str, float]
    selection: tuple[Member, ...]
    shards: tuple[Manifest, ...]
    tokenizer: Manifest
    base: Manifest | None

    def __post_init__(self) -> None:
        import torch

        set_up_torch(self.settings.threads)
        torch.manual_seed(self.settings.seed)
        self.step = 0
        self.seconds = 0.0
        self.trained = 0
        self.model = self._base_model() if self.base else self._new_model()
        self.optimizer = self._optimizer_settings.build(self.model, self.settings.phases[0].learning_rate)
        if self.base:
            self._carry_optimizer_state(self.base)
        if self.settings.compile:
            self.model.base_model.compile()

    @cached_property
    def end_of_text(self) -> int:
        from tokenizers import Tokenizer

        config = json.loads(self.tokenizer.file("tokenizer_config.json").read_text())
        return Tokenizer.from_file(str(self.tokenizer.file("tokenizer.json"))).token_to_id(config["eos_token"])

    @cached_property
    def domains(self) -> list[str]:
        return sorted(self.shares)

    @cached_property
    def streams(self) -> list[WindowStream]:
        pools = passage_pools(self.selection, self.shards, self.end_of_text)
        missing = [domain for domain in self.domains if domain not in pools]
        if missing:
            raise EmptyInput(f"no selected passage of {', '.join(missing)}; loosen its filters or raise its budget")
        return [WindowStream(pools[d], self.settings.sequence_length, self.settings.seed, name=d) for d in self.domains]

    @property
    def tokens_per_step(self) -> int:
        return self.settings.batch_sequences * self.settings.sequence_length

    @cached_property
    def phase_steps(self) -> list[int]:
        return [max(1, phase.tokens // self.tokens_per_step) for phase in self.settings.phases]

    @property
    def num_steps(self) -> int:
        return sum(self.phase_steps)

    @cached_property
    def assignment(self) -> np.ndarray:
        return assign_sequences(self.shares, self.num_steps * self.settings.batch_sequences)

    @cached_property
    def positions(self) -> np.ndarray:
        """Window number of each sequence within its domain's stream."""
        counts = np.zeros(len(self.domains), dtype=np.int64)
        out = np.empty(len(self.assignment), dtype=np.int64)
        for number, domain in enumerate(self.assignment):
            out[number] = counts[domain]
            counts[domain] += 1
        return out

    @cached_property
    def objectives(self) -> list[Objective]:
        return [plugins.build("objectives", phase.objective) for phase in self.settings.phases]  # type: ignore[misc]

    @cached_property
    def schedules(self) -> list[Schedule]:
        return [plugins.build("schedules", p.schedule, p.schedule_settings) for p in self.settings.phases]  # type: ignore[misc]

    @cached_property
    def _optimizer_settings(self) -> Optimizer:
        return plugins.build("optimizers", self.settings.optimizer, self.settings.optimizer_settings)  # type: ignore[return-value]

    def batch(self, step: int) -> torch.Tensor:
        """Return the windows of `step`, int64 of shape (B, T + 1)."""
        import torch

        sequences = range(step * self.settings.batch_sequences, (step + 1) * self.settings.batch_sequences)
        rows = [self.streams[self.assignment[n]].window(int(self.positions[n])) for n in sequences]
        return torch.from_numpy(np.stack(rows))

    @denormals_flushed()
    def advance(self, until: int, out: Path) -> None:
        """Train up to step `until`, going on from the newest resume point under `out` if it is ahead."""
        self._resume(out)
        progress = Progress(
            f"training ({short(sum(p.numel() for p in self.model.parameters()))} parameters)",
            self.num_steps * self.tokens_per_step,
            "tokens",
        )
        saved = started = time.monotonic()
        first = self.step
        self.model.train()
        with (out / "metrics.jsonl").open("a") as records:
            while self.step < until:
                record = self._train_step()
                if self.step % STEPS_PER_RECORD == 0 or self.step == self.num_steps:
                    records.write(json.dumps(record) + "\n")
                progress.update(self.step * self.tokens_per_step, f"loss {record['loss']:.3f}")
                if time.monotonic() - saved > self.settings.checkpoint_seconds and self.step < self.num_steps:
                    records.flush()
                    checkpoints.save_resume_point(out / "resume", self.step, self.model, self.optimizer)
                    saved = time.monotonic()
        self.seconds += time.monotonic() - started
        self.trained += self.step - first

    def _train_step(self) -> dict[str, float]:
        import torch

        phase, first = self._phase_at(self.step)
        rate = self.settings.phases[phase].learning_rate
        multiplier = self.schedules[phase].multiplier(self.step - first, self.phase_steps[phase])
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] / self.settings.phases[0].learning_rate * rate * multiplier
        loss = self.objectives[phase].loss(self.model, self.batch(self.step))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.gradient_clip)
        value = loss.item()
        if not np.isfinite(value):
            raise GristmillError(f"loss is {value} at step {self.step}; lower learning_rate ({rate}) or gradient_clip, and run again")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return {
            "step": self.step,
            "tokens": self.step * self.tokens_per_step,
            "loss": value,
            "learning_rate": rate * multiplier,
            "gradient_norm": norm.item(),
        }

    def _phase_at(self, step: int) -> tuple[int, int]:
        first = 0
        for number, steps in enumerate(self.phase_steps):
            if step < first + steps:
                return number, first
            first += steps
        raise GristmillError(f"step {step} lies beyond the plan of {first} steps")

    def _resume(self, out: Path) -> None:
        """Go to the newest resume point if it is ahead of this run; cut the records that lie after it."""
        point = checkpoints.latest_resume_point(out / "resume")
        if point and point.step > self.step:
            self.model.load_state_dict(point.model, strict=False)
            self.model.tie_weights()
            checkpoints.load_optimizer_state(self.model, self.optimizer, point.optimizer)
            self.step = point.step
        path = out / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= self.step]
        path.write_text("".join(f"{line}\n" for line in kept))

    @denormals_flushed()
    def window_losses(self, windows: np.ndarray, *, batch: int = 64) -> np.ndarray:
        """Return the mean loss of each window in nats per token, float64 of shape (n,)."""
        import torch

        self.model.eval()
        objective = self.objectives[-1]
        parts = [
            objective.window_losses(self.model, torch.from_numpy(windows[i : i + batch])).double().numpy()
            for i in range(0, len(windows), batch)
        ]
        self.model.train()
        return np.concatenate(parts) if parts else np.empty(0)

    def epochs(self) -> dict[str, float]:
        """Return, by domain, how many times the run reads its passages."""
        counts = np.bincount(self.assignment, minlength=len(self.domains))
        return {domain: float(counts[i] / self.streams[i].windows_per_epoch) for i, domain in enumerate(self.domains)}

    def outcome(
        self, *, metrics: Mapping[str, float] | None = None, counts: Mapping[str, int] | None = None, plots: tuple[str, ...] = ()
    ) -> Outcome:
        """Return what the run found."""
        tokens = self.num_steps * self.tokens_per_step
        rate = {"tokens_per_second": self.trained * self.tokens_per_step / self.seconds} if self.seconds else {}  # of this process
        epochs = self.epochs()
        table = [{"domain": d, "share": round(self.shares[d], 4), "epochs": round(epochs[d], 3)} for d in self.domains]
        return Outcome(
            counts={
                "tokens": tokens,
                "steps": self.num_steps,
                "parameters": sum(p.numel() for p in self.model.parameters()),
                **(counts or {}),
            },
            metrics={**rate, **(metrics or {})},
            tables={"domains": table},
            plots=plots,
        )

    def _new_model(self) -> PreTrainedModel:
        from transformers import LlamaConfig, LlamaForCausalLM

        if self.settings.model is None:
            raise GristmillError("training needs `model` settings where there is no base checkpoint")
        model = self.settings.model
        config = LlamaConfig(
            vocab_size=int(self.shards[0].outcome.details["vocabulary_size"]),
            hidden_size=model.hidden_size,
            num_hidden_layers=model.num_layers,
            num_attention_heads=model.num_heads,
            num_key_value_heads=model.num_heads,
            intermediate_size=model.intermediate_size,
            max_position_embeddings=self.settings.sequence_length,
            tie_word_embeddings=True,
            initializer_range=0.02,
            bos_token_id=self.end_of_text,
            eos_token_id=self.end_of_text,
            pad_token_id=self.end_of_text,
        )
        return LlamaForCausalLM(config)

    def _base_model(self) -> PreTrainedModel:
        return load_checkpoint(self.base.directory)

    def _carry_optimizer_state(self, base: Manifest) -> None:
        from safetensors.torch import load_file

        path = base.directory / "trainer" / "optimizer.safetensors"
        if path.exists():
            checkpoints.load_optimizer_state(self.model, self.optimizer, load_file(path))


def assign_sequences(shares: Mapping[str, float], num_sequences: int) -> np.ndarray:
    """Return the domain (index into sorted `shares`) of each sequence, int16 of shape ``(num_sequences,)``.

    After any number of sequences every one of the n domains is within ``1 - 1 / (2n - 2)`` sequences of its exact share:
    of the domains that are behind by ``1 / (2n - 2)`` or more, the next is the one that would reach the bound first
    (Tijdeman 1980, The chairman assignment problem). Taking the one furthest behind keeps no such bound beyond two.
    """
    wanted = np.asarray([shares[name] for name in sorted(shares)], dtype=float)
    wanted /= wanted.sum()
    least = 1.0 / max(2 * len(wanted) - 2, 1)
    behind = np.zeros(len(wanted))
    out = np.empty(num_sequences, dtype=np.int16)
    for number in range(num_sequences):
        behind += wanted
        ready = np.nonzero(behind >= least - ROUNDING)[0]
        out[number] = ready[np.argmin((1.0 - least - behind[ready]) / wanted[ready])]
        behind[out[number]] -= 1.0
    return out
