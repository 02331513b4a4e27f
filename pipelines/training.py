"""Training: one loop that runs a plan of phases over selected passages, and resumes to the same bytes after a kill.

The batch of a step is a pure function of (passages, shares, seed, step), so the data position needs no state. The
checkpoint is a Hugging Face directory; transformers alone opens it. Three steps use the loop: the general checkpoint,
the mixture probes, and the pretrained checkpoint.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from pipelines import checkpoints, plugins
from pipelines.documents import write_table
from pipelines.errors import EmptyInput, GristmillError
from pipelines.manifests import Check, Json, Manifest, Member, Outcome
from pipelines.models import denormals_flushed, load_checkpoint, set_up_torch
from pipelines.objectives import Objective
from pipelines.optimizers import Optimizer
from pipelines.plugins import Settings
from pipelines.progress import Progress, short
from pipelines.schedules import Schedule
from pipelines.shards import WindowStream, held_out_documents, passage_pools, windows_of
from pipelines.store import advisory

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

TRAINING_PACKAGES = ("torch", "transformers")
STEPS_PER_RECORD = 10
ROUNDING = 1e-9
LOSSES = pa.schema(
    [("probe", pa.string()), ("ratio", pa.float64()), ("seed", pa.int64()), ("tokens", pa.int64())]
    + [("corpus", pa.string()), ("window", pa.int64()), ("loss", pa.float64())]
)


class ModelSettings(Settings):
    """A Llama-like decoder (Touvron et al. 2023): rotary positions, RMSNorm, SwiGLU, tied embeddings."""

    hidden_size: int = 128
    """Width of the residual stream."""
    num_layers: int = 4
    """Decoder layers."""
    num_heads: int = 4
    """Attention heads."""
    intermediate_size: int = 352
    """Width of the feed-forward layer."""


class Phase(Settings):
    """A stretch of training with one objective, one schedule and one mixture."""

    tokens: int
    """Predicted tokens; rounded down to whole batches."""
    learning_rate: float
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
    sequence_length: int = 128
    """Positions per window."""
    batch_sequences: int = 16
    """Windows per step."""
    optimizer: str = "adamw"
    """A plugin of `optimizers/`."""
    optimizer_settings: dict[str, Json] = Field(default_factory=dict)
    """Settings of the optimizer."""
    gradient_clip: float = 1.0
    """Bound on the norm of the gradient (Pascanu et al. 2013)."""
    seed: int = 0
    """Of the initial weights and of the data order."""
    threads: int = 1
    """Torch threads. Part of the identity: sums are ordered by it, so another number gives other last bits."""
    compile: bool = False
    """Whether torch.compile is used. Part of the identity for the same reason."""
    checkpoint_seconds: float = Field(default=20.0, exclude=True)
    """Time between resume points; does not change the result."""


class MixtureShares(Settings):
    """Shares of tokens by domain; they sum to 1."""

    shares: dict[str, float]
    """Domain to share."""


class GeneralSettings(TrainingSettings):
    """The general checkpoint: trained on the general domains alone, each by its selected tokens."""

    role: Literal["general", "target"] = "general"
    """The role whose selected passages are read."""


class ProbeSettings(TrainingSettings):
    """One probe: the base continued at a target share, measured on paired windows along the way."""

    ratio: float
    """Share of tokens from the target domains, in [0, 1] (R of the CMR paper, 2407.17467, section 3)."""
    measure_at: tuple[float, ...] = (0.25, 0.5, 1.0)
    """Shares of the run after which the held-out windows are measured."""
    windows: dict[str, int] = Field(default_factory=lambda: {"general": 480, "target": 240})
    """Held-out windows per corpus."""


def train_general(
    settings: GeneralSettings, out: Path, *, selection: tuple[Member, ...], shards: tuple[Manifest, ...], tokenizer: Manifest
) -> Outcome:
    """Train a model on the selected passages of the general domains, in proportion to their tokens."""
    shares = role_shares(selection)[settings.role]
    return _train_checkpoint(settings, shares, out, selection=selection, shards=shards, tokenizer=tokenizer)


def train_mixture(
    settings: TrainingSettings,
    out: Path,
    *,
    base: Manifest,
    mixture: Manifest,
    selection: tuple[Member, ...],
    shards: tuple[Manifest, ...],
    tokenizer: Manifest,
) -> Outcome:
    """Continue `base` on the domain mixture of `mixture`."""
    shares = json.loads(mixture.file("mixture.json").read_text())["shares"]
    return _train_checkpoint(settings, shares, out, selection=selection, shards=shards, tokenizer=tokenizer, base=base)


def train_probe(
    settings: ProbeSettings,
    out: Path,
    *,
    base: Manifest,
    selection: tuple[Member, ...],
    decisions: Manifest,
    shards: tuple[Manifest, ...],
    tokenizer: Manifest,
) -> Outcome:
    """Continue `base` at one target share and store the loss of every held-out window, before and along the run.

    The windows, the data order of each domain and the base are the same for every ratio, so losses are paired.
    """
    run = _Run(settings, mixed_shares(role_shares(selection), settings.ratio), selection, shards, tokenizer, base)
    windows = _held_out_windows(settings, decisions, shards, role_shares(selection), run.end_of_text)
    label = f"r{settings.ratio:.2f}-s{settings.seed}"
    points = sorted({max(1, round(share * run.num_steps)) for share in settings.measure_at})
    rows: list[pa.Table] = []

    def measure(step: int) -> None:
        for corpus, batch in windows.items():
            losses = run.window_losses(batch)
            rows.append(_loss_table(label, settings, step * run.tokens_per_step, corpus, losses))

    measure(0)
    for point in points:
        run.advance(point, out)
        measure(point)
    write_table(out / "losses.parquet", pa.concat_tables(rows))
    shutil.rmtree(out / "resume", ignore_errors=True)
    final = {corpus: run.window_losses(batch) for corpus, batch in windows.items()}
    return run.outcome(
        metrics={f"{corpus}_loss_nats_per_token": float(losses.mean()) for corpus, losses in final.items()},
        counts={f"{corpus}_windows": len(batch) for corpus, batch in windows.items()},
    )


def role_shares(selection: tuple[Member, ...]) -> dict[str, dict[str, float]]:
    """Return, by role, each domain's share of the selected tokens of that role."""
    import duckdb

    rows = duckdb.sql(
        "select role, domain, sum(tokens) from read_parquet($paths) where selected group by all order by all",
        params={"paths": [str(member.path) for member in selection]},
    ).fetchall()
    totals: dict[str, int] = {}
    for role, _, tokens in rows:
        totals[role] = totals.get(role, 0) + tokens
    return {role: {d: t / totals[role] for r, d, t in rows if r == role} for role in totals}


def mixed_shares(by_role: Mapping[str, Mapping[str, float]], ratio: float) -> dict[str, float]:
    """Return the shares of a mixture with target share `ratio`; within a role by selected tokens.

    Raises:
        EmptyInput: a role that is to be read has no selected passage.
    """
    wanted = {"general": 1.0 - ratio, "target": ratio}
    for role, share in wanted.items():
        if share > 0 and role not in by_role:
            raise EmptyInput(f"no {role} passage was selected; a mixture with target share {ratio} needs both roles")
    shares = {d: wanted[role] * s for role in ("general", "target") for d, s in by_role.get(role, {}).items() if wanted[role] > 0}
    return dict(sorted(shares.items()))


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


def _train_checkpoint(
    settings: TrainingSettings,
    shares: Mapping[str, float],
    out: Path,
    *,
    selection: tuple[Member, ...],
    shards: tuple[Manifest, ...],
    tokenizer: Manifest,
    base: Manifest | None = None,
) -> Outcome:
    from safetensors.torch import save_file

    run = _Run(settings, shares, selection, shards, tokenizer, base)
    run.advance(run.num_steps, out)
    run.model.save_pretrained(out)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer.file(name), out / name)
    (out / "trainer").mkdir(exist_ok=True)
    save_file(checkpoints.flat_optimizer_state(run.model, run.optimizer), out / "trainer" / "optimizer.safetensors")
    shutil.rmtree(out / "resume", ignore_errors=True)
    _plot_losses(out)
    return run.outcome(plots=("training_loss.png",))


@dataclass
class _Run:
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

    @cached_property
    def _compiled_loss(self) -> Callable[[Objective, torch.Tensor], torch.Tensor]:
        import torch

        if self.settings.compile:
            self.model.base_model.compile()
        return lambda objective, windows: objective.loss(self.model, windows.to(torch.int64))

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
        loss = self._compiled_loss(self.objectives[phase], self.batch(self.step))
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


def _held_out_windows(
    settings: ProbeSettings, decisions: Manifest, shards: tuple[Manifest, ...], roles: Mapping[str, Mapping[str, float]], end_of_text: int
) -> dict[str, np.ndarray]:
    """Return the held-out windows of the general and the target corpus, each domain by its share of its role."""
    documents = held_out_documents(decisions, shards)
    windows = {}
    for role, total in settings.windows.items():
        parts = [
            windows_of(documents[domain], settings.sequence_length, max(1, round(total * share)), end_of_text)
            for domain, share in roles.get(role, {}).items()
            if domain in documents
        ]
        if not parts or not sum(len(part) for part in parts):
            raise EmptyInput(
                f"no held-out window of the {role} domains; raise `held_out` of {', '.join(roles.get(role, {}))} in project.yaml"
            )
        windows[role] = np.concatenate(parts)
    return windows


def _loss_table(label: str, settings: ProbeSettings, tokens: int, corpus: str, losses: np.ndarray) -> pa.Table:
    n = len(losses)
    columns = [[label] * n, [settings.ratio] * n, [settings.seed] * n, [tokens] * n, [corpus] * n, list(range(n)), losses.tolist()]
    return pa.table(dict(zip(LOSSES.names, columns, strict=True)), schema=LOSSES)


def _plot_losses(out: Path) -> None:
    from pipelines.plots import line_plot

    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    tokens = [record["tokens"] for record in records]
    line_plot(
        out / "training_loss.png", {"training loss": (tokens, [record["loss"] for record in records])}, x="tokens", y="nats per token"
    )


def weights_finite(draft: Manifest) -> Check:
    """Every weight is a finite number."""
    import torch
    from safetensors.torch import load_file

    weights = load_file(draft.directory / "model.safetensors")
    wrong = [name for name, tensor in weights.items() if not torch.isfinite(tensor).all()]
    return Check(
        name="weights_finite", passed=not wrong, description=f"{len(weights)} tensors, {len(wrong)} with non-finite values {wrong[:3]}"
    )


@advisory
def loss_fell(draft: Manifest) -> Check:
    """The mean training loss of the last tenth lies below that of the first tenth."""
    records = [json.loads(line)["loss"] for line in (draft.directory / "metrics.jsonl").read_text().splitlines()]
    tenth = max(1, len(records) // 10)
    first, last = float(np.mean(records[:tenth])), float(np.mean(records[-tenth:]))
    return Check(name="loss_fell", passed=last < first, description=f"training loss {first:.3f} -> {last:.3f} nats per token")


def losses_finite(draft: Manifest) -> Check:
    """Every held-out window has a finite loss at every measured point."""
    import pyarrow.parquet as pq

    losses = pq.read_table(draft.directory / "losses.parquet", columns=["loss"])["loss"].to_numpy()
    wrong = int((~np.isfinite(losses)).sum())
    return Check(
        name="losses_finite", passed=wrong == 0 and len(losses) > 0, description=f"{len(losses)} window losses, {wrong} not finite"
    )


CHECKPOINT_AUDITS = (weights_finite, loss_fell)
PROBE_AUDITS = (losses_finite,)


def training_plugins(settings: TrainingSettings) -> tuple[str, ...]:
    """Return the plugin modules that `settings` names, for the code version."""
    phases = [(f"pipelines.objectives.{p.objective}", f"pipelines.schedules.{p.schedule}") for p in settings.phases]
    return tuple(sorted({name for pair in phases for name in pair} | {f"pipelines.optimizers.{settings.optimizer}"}))
