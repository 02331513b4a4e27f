"""The training loop: phases over token streams, with the data position in the step and nowhere else.

The batch of a step is a pure function of (passages, shares, seed, step), and so is what an objective or a dropout layer
draws. A run that was killed goes on from its newest resume point to the same bytes; on another number of processes it goes
on with the same order of the data. The model is a transformers model; the loop, the batches and the resume points are ours.
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from pipelines import checkpoints, plugins
from pipelines.batch import Batch
from pipelines.checkpoints import CheckpointWriter, RetentionSettings, TrainingState
from pipelines.data_order import DataOrder, DomainMixture, first_windows
from pipelines.distributed import World, current_world, gradients_shared, layers_of, loss_module, parallelize, pick_device
from pipelines.draws import Generators, step_seed
from pipelines.encoders import special_tokens
from pipelines.errors import EmptyInput, GristmillError
from pipelines.guards import Action, Guard
from pipelines.manifests import Json, Manifest, Member
from pipelines.models import check_head, denormals_flushed, flops_per_token, load_checkpoint, new_model, set_up_torch
from pipelines.objectives import Objective
from pipelines.optimizers import Optimizer
from pipelines.plan import Plan, TrainingSettings
from pipelines.progress import Progress, report_line, short
from pipelines.reselection import SELECTION, Selector
from pipelines.run_limits import Limits
from pipelines.run_records import RECORDS, Records
from pipelines.run_watch import KEPT, Watch
from pipelines.shards import PassagePool, passage_pools, split_pool

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pipelines.parameterizations import Parameterization
    from pipelines.teachers import OpenTeacher

STEPS_PER_RECORD = 10
RESUME, REWIND = "resume", "resume/rewind"  # what a full disk leaves of a run lies under the first
MEASURING = 2**62
"""Key of what objectives draw when they measure: the same masks for every run, so that losses are paired."""


@dataclass
class Run:
    """A run in progress: model, optimizer, data order and the step it stands at."""

    settings: TrainingSettings
    shares: Mapping[str, float] | DomainMixture
    selection: tuple[Member, ...]
    shards: tuple[Manifest, ...]
    tokenizer: Manifest
    base: Manifest | None

    def __post_init__(self) -> None:
        import torch

        set_up_torch(self.settings.threads)
        self.world: World = current_world()
        self.device = pick_device(self.settings.device, self.world)
        self.plan = Plan(self.settings)
        self.tokens = special_tokens(self.tokenizer.directory)
        self.step = 0
        self.stopped_early = False
        self.seconds: defaultdict[str, float] = defaultdict(float)
        """Seconds of this process by kind of work."""
        self.trained = 0
        """Steps of this process."""
        self.guard = Guard(self.settings.guards)
        self.replaced: dict[int, int] = {}
        """Batches that are not read, and the spare ones in their place."""
        self.watch = Watch(self)
        self._phase: int | None = None
        self._teacher: OpenTeacher | None = None
        self._domain_sums = np.zeros((len(self.order.domains), 2))
        torch.manual_seed(self.settings.seed)
        self.model = self._new_model().to(self.device)
        check_head(self.model)
        self.selector = Selector(self)
        if self.settings.activation_checkpointing:
            self.model.activation_checkpointing_enable({"use_reentrant": False})
        if self.settings.compile:
            self.model.base_model.compile()
        shards = self.half and self.device.type == "cuda"
        self.module = parallelize(loss_module(self.model), layers_of(self.model), self.world, self.settings.sharding, half=shards)
        self.optimizer = self._optimizer.build(self.model, self.settings.phases[0].learning_rate)
        if self.base:
            self._carry_optimizer_state(self.base)

    @property
    def half(self) -> bool:
        """Whether matrix products are in bfloat16."""
        wanted = self.settings.precision
        return wanted == "bfloat16" or (wanted == "auto" and self.device.type == "cuda")

    @property
    def end_of_text(self) -> int:
        """The token that ends a document."""
        return self.tokens.end_of_text

    @property
    def tokens_per_step(self) -> int:
        """Tokens read by a step."""
        return self.plan.tokens_per_step

    @property
    def num_steps(self) -> int:
        """Planned steps."""
        return self.plan.num_steps

    @property
    def finished(self) -> bool:
        """Whether nothing is left to train."""
        return self.stopped_early or self.step >= self.num_steps

    @cached_property
    def _pools(self) -> tuple[dict[str, PassagePool], dict[str, PassagePool]]:
        pools = passage_pools(self.selection, self.shards, self.end_of_text)
        fraction = self.settings.validation.fraction
        if not fraction:
            return pools, {}
        halves = {domain: split_pool(pool, fraction) for domain, pool in pools.items()}
        return {d: kept for d, (kept, _) in halves.items()}, {d: aside for d, (_, aside) in halves.items()}

    @cached_property
    def order(self) -> DataOrder:
        """The sequences of the run."""
        return DataOrder(self.plan, self.shares, self._pools[0])

    @cached_property
    def validation_windows(self) -> dict[str, np.ndarray]:
        """Windows of the documents that are set aside, by domain; none of a domain whose set is shorter than a window."""
        return first_windows(self._pools[1], self.settings.sequence_length, self.settings.validation.windows_per_domain)

    @cached_property
    def _optimizer(self) -> Optimizer:
        return cast(Optimizer, plugins.build("optimizers", self.settings.optimizer, self.settings.optimizer_settings))

    def batch(self, step: int) -> Batch:
        """Return what this process reads at `step`."""
        mine = self._sequences(step)
        return self._prepared(step, self.order.windows(mine, step), Generators(self.settings.seed, mine))

    def _prepared(self, step: int, windows: np.ndarray, generators: Generators) -> Batch:
        phase = self.settings.phases[self.plan.phase_at(step)[0]]
        return self.objective(step).batch(windows, generators, self.tokens, document_attention=phase.attention == "document")

    def objective(self, step: int) -> Objective:
        """Return the objective of `step`; behind the plan, that of the last phase."""
        return self.plan.objectives[self.plan.phase_at(min(step, sum(self.plan.phase_steps) - 1))[0]]

    def _sequences(self, step: int) -> range:
        return self.world.share(self.order.sequences(self.replaced.get(step, step)))

    @denormals_flushed()
    def advance(self, until: int, out: Path, *, resumable: bool = True) -> None:
        """Train up to step `until`, going on from the newest resume point under `out` if it is ahead.

        Raises:
            GristmillError: a guard rail stopped the run.
            BudgetReached: `max_seconds` are over; a resume point is written.
            Interrupted: the process was asked to end; a resume point is written.
        """
        self._resume(out)
        label = f"training ({short(sum(p.numel() for p in self.model.parameters()))} parameters)"
        progress = Progress(label, self.num_steps * self.tokens_per_step, "tokens")
        limits, first = Limits(self.settings, resumable=resumable), self.step
        self.model.train()
        with limits.held(), Records(out, writes=self.world.is_first) as records, self._writer(out, resumable) as writer:
            while self.step < until and not self.stopped_early:
                self._rewind_point(out, records)
                loss = self._guarded_step(out, records, writer)
                progress.update(self.step * self.tokens_per_step, f"step {self.step}, loss {loss:.3f}")
                self.watch.look(out, records)
                records.show()
                over = limits.over()
                if resumable and not self.finished and self._agreed(over or limits.due()):
                    self._save(writer, records, wait=over)
                    limits.saved()
                    if self.world.agree(over):
                        raise limits.reached(self.step, self.num_steps)
        self.seconds["all"] += time.monotonic() - limits.started
        self.trained += self.step - first

    def _agreed(self, due: bool) -> bool:  # noqa: FBT001
        """Return whether a resume point is due, by the first process's clock; several processes ask each other now and then only."""
        return due if self.world.size == 1 else self.step % STEPS_PER_RECORD == 0 and self.world.agree(due)

    @contextlib.contextmanager
    def timed(self, kind: str) -> Iterator[None]:
        """Count the time inside as time for `kind`."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[kind] += time.perf_counter() - started

    def _guarded_step(self, out: Path, records: Records, writer: CheckpointWriter | None) -> float:
        """Train on the batch of the step, and do what the guard says; return the loss."""
        self.enter_phase()
        self.selector.enter(out)
        rate = self.plan.rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] / self.settings.phases[0].learning_rate * rate
        loss, norm, domains = self.gradients()
        action, reason = self.guard.judge(loss, norm)
        if action != "go on":
            self._intervene(action, reason, rate)
        if action == "rewind":
            self._rewind(out, records, writer)
            return loss
        with self.timed("optimizer"):
            if action != "skip":
                self.optimizer.step()
                if parameterization := self._parameterization:
                    parameterization.after_step(self.model)
            self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        if action != "skip":
            self._domain_sums += domains
        if self.step % STEPS_PER_RECORD == 0 or self.step == self.num_steps:
            records.metrics.append(self._record(loss, rate, norm))
        return loss

    def gradients(self) -> tuple[float, float, np.ndarray]:
        """Fill the gradients of the step; return its loss in nats per target, the gradient's norm, and sums and counts by domain."""
        import torch

        with self.timed("data"):
            batch = self.batch(self.step)
            targets = float(self.world.total(np.asarray([batch.num_targets], dtype=np.float64), self.device)[0])
        if not targets:
            raise EmptyInput(f"the batch of step {self.step} predicts nothing; raise batch_sequences or the objective's share of positions")
        size, rows = self.settings.micro_batch_sequences or len(batch.inputs_BT), len(batch.inputs_BT)
        objective, sums = self.objective(self.step), []
        with self.timed("forward and backward"):
            torch.manual_seed(step_seed(self.settings.seed, self.step, self.world.rank))
            for first in range(0, rows, size):
                part = batch.rows(first, min(rows, first + size)).to(self.device)
                with gradients_shared(self.module, last=first + size >= rows), self.autocast():
                    total, per_window_B, counts_B = self.module(objective, part, self._teacher)
                    (total * (self.world.size / targets)).backward()
                sums.append(torch.stack([per_window_B.double(), counts_B.double()], dim=1))
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.gradient_clip)
            norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
            per_window = torch.cat(sums).cpu().numpy()
        domains = np.zeros((len(self.order.domains), 2))
        np.add.at(domains, self.order.assignment[np.asarray(self._sequences(self.step))], per_window)
        domains = self.world.total(domains, self.device)
        return float(domains[:, 0].sum() / targets), norm.item(), domains

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """Compute in the run's precision inside."""
        import torch

        with torch.autocast(self.device.type, dtype=torch.bfloat16) if self.half else contextlib.nullcontext():
            yield

    def enter_phase(self) -> None:
        """Change parameterization and teacher where a phase begins."""
        number, _ = self.plan.phase_at(self.step)
        if number == self._phase:
            return
        if self._phase is not None and (before := self.plan.parameterizations[self._phase]):
            before.finalize(self.model)
        self._phase = number
        if parameterization := self._parameterization:
            parameterization.apply(self.model, optimizer=self.optimizer)
        teacher = self.plan.teachers[number]
        self._teacher = teacher.open(self.device, self.tokens, root=self.settings.root) if teacher else None

    @property
    def _parameterization(self) -> Parameterization | None:
        return self.plan.parameterizations[self._phase] if self._phase is not None else None

    def _intervene(self, action: Action, reason: str, rate: float) -> None:
        documents = list(self.order.documents(self.order.sequences(self.replaced.get(self.step, self.step)), self.step))
        self.guard.record(self.step, action, reason, documents)
        named = ", ".join(f"{name} ({domain})" for domain, name in documents[:3])
        words = f"step {self.step}: {reason}; its {len(documents)} documents begin with {named}"
        if action == "stop" or self.guard.num_interventions > self.settings.guards.max_events:
            raise GristmillError(
                f"{words}. Training stopped: lower learning_rate ({rate:g}) or gradient_clip, look at the documents, or set "
                "guards.on_nan and guards.on_spike to skip or rewind"
            )
        if self.world.is_first:
            report_line(f"{words}; {action}")

    def _rewind_point(self, out: Path, records: Records) -> None:
        """Keep the state at every `rewind_every` steps, where a policy goes back to it."""
        guards = self.settings.guards
        if not guards.rewinds or self.step % guards.rewind_every:
            return
        with self.timed("checkpoints"):
            state = self.state()
            if self.world.is_first:
                records.flush()
                retention = RetentionSettings(last=2 + guards.replaced_batches // guards.rewind_every)
                with CheckpointWriter(out / REWIND, retention, carried=self._carried(out)) as writer:
                    writer.save(state)
            self.world.wait()

    def _rewind(self, out: Path, records: Records, writer: CheckpointWriter | None) -> None:
        """Go back to the last rewind point before the batches that are replaced."""
        guards = self.settings.guards
        bad = range(max(0, self.step + 1 - guards.replaced_batches), self.step + 1)
        spare = max(self.replaced.values(), default=self.num_steps - 1) + 1
        self.replaced |= {step: spare + number for number, step in enumerate(bad)}
        saved = [step for step in _saved_steps(out / REWIND) if step <= self.step]
        state = checkpoints.latest_state(out / REWIND, step=max((s for s in saved if s <= bad[0]), default=min(saved, default=0)))
        if state is None:
            raise GristmillError(f"no rewind point under {out / REWIND} verifies; run again: the newest resume point is taken")
        self.optimizer.zero_grad(set_to_none=True)
        self._restore(state, rewound=True)
        if self.world.is_first:
            records.close()
            checkpoints.restore_carried(out / REWIND, self.step, self._carried(out))
        if writer or self.world.size > 1:
            self._save(writer, records, wait=True)

    def state(self) -> TrainingState:
        """Return everything a resume needs; all processes take part in gathering it."""
        loop: dict[str, Json] = {
            "guard": self.guard.state(),
            "replaced": sorted(self.replaced.items()),
            "domain_sums": self._domain_sums.tolist(),
            "best": list(self.watch.best) if self.watch.best else None,
            "stopped_early": self.stopped_early,
            "processes": self.world.size,
            "rounds": self.selector.records,
        }
        model = checkpoints.full_model_state(self.model)
        return TrainingState(self.step, model, checkpoints.full_optimizer_state(self.model, self.optimizer), loop)

    def _restore(self, state: TrainingState, *, rewound: bool = False) -> None:
        self.finish()  # what the phase holds back must not hold in an earlier one
        checkpoints.load_model_state(self.model, state.model)
        checkpoints.load_optimizer_state(self.model, self.optimizer, state.optimizer)
        self.step = state.step
        self._domain_sums = np.asarray(state.loop["domain_sums"], dtype=np.float64)
        self.watch.best = tuple(state.loop["best"]) if state.loop["best"] else None
        self.guard.restore(state.loop["guard"], events=not rewound)
        self.selector.restore(state.loop["rounds"])
        if rewound:
            return
        self.replaced = {int(step): int(spare) for step, spare in state.loop["replaced"]}
        self.stopped_early = bool(state.loop["stopped_early"])
        if state.loop["processes"] != self.world.size:
            report_line(f"resumed on {self.world.size} processes after {state.loop['processes']}: same order of data, other last bits")

    def _save(self, writer: CheckpointWriter | None, records: Records, *, wait: bool) -> None:
        with self.timed("checkpoints"):
            state = self.state()
            if writer:
                records.flush()
                writer.save(state, wait=wait)

    def _resume(self, out: Path) -> None:
        """Go to the newest resume point if it is ahead of this run, and put back the records as they were then."""
        state = checkpoints.latest_state(out / RESUME)
        ahead = state is not None and state.step > self.step
        if ahead:
            self._restore(state)
        if self.world.is_first and (ahead or not self.step):
            checkpoints.restore_carried(out / RESUME, self.step or None, self._carried(out))
        self.world.wait()

    @staticmethod
    def _carried(out: Path) -> tuple[Path, ...]:
        """Return what a resume point holds besides the state: the records, the checkpoints that are kept, what rounds read."""
        return (*(out / name for name in RECORDS), out / KEPT, out / SELECTION)

    @contextlib.contextmanager
    def _writer(self, out: Path, resumable: bool) -> Iterator[CheckpointWriter | None]:  # noqa: FBT001
        if not resumable or not self.world.is_first:
            yield None
            return
        with CheckpointWriter(out / RESUME, self.settings.retention, carried=self._carried(out)) as writer:
            yield writer

    def _record(self, loss: float, rate: float, norm: float) -> dict[str, Json]:
        sums, self._domain_sums = self._domain_sums, np.zeros_like(self._domain_sums)
        domains = {d: nats / count for d, (nats, count) in zip(self.order.domains, sums.tolist(), strict=True) if count}
        tokens = self.step * self.tokens_per_step
        return {"step": self.step, "tokens": tokens, "loss": loss, "learning_rate": rate, "gradient_norm": norm, "domains": domains}

    @denormals_flushed()
    def window_losses(self, windows: np.ndarray, *, batch: int = 64) -> np.ndarray:
        """Return the mean loss of each window in nats per predicted token, float64 of shape (n,)."""
        import torch

        last = max(0, self.step - 1)
        self.model.eval()
        parts = []
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), self.autocast():
            for first in range(0, len(windows), batch):
                rows = windows[first : first + batch]
                generators = Generators(MEASURING, range(first, first + len(rows)))
                part = self._prepared(last, rows, generators).to(self.device)
                _, nats_B, counts_B = self.module(self.objective(last), part, None)
                parts.append((nats_B.double() / counts_B.clamp(min=1)).cpu().numpy())
        self.model.train()
        return np.concatenate(parts) if parts else np.empty(0)

    def finish(self) -> None:
        """Leave the last phase: what its parameterization holds back is let go."""
        if parameterization := self._parameterization:
            parameterization.finalize(self.model)
        self._phase = None

    def flops_per_token(self) -> float:
        """Return the operations of one trained token, by the objective's share of predicted positions in the first batch."""
        batch = self.batch(0)
        share = batch.num_targets / max(1, batch.targets_BT.numel())
        return flops_per_token(self.model, self.settings.sequence_length, predicted_share=share)

    def _new_model(self) -> PreTrainedModel:
        if self.base:
            return load_checkpoint(self.base.directory)
        if self.settings.model is None:
            raise GristmillError("training needs `model` settings where there is no base checkpoint")
        return new_model(self.settings.model, self.tokens, self.settings.sequence_length, self.settings.root)

    def _carry_optimizer_state(self, base: Manifest) -> None:
        from safetensors.torch import load_file

        path = base.directory / "trainer" / "optimizer.safetensors"
        if path.exists() and base.settings.get("optimizer") == self.settings.optimizer:
            checkpoints.load_optimizer_state(self.model, self.optimizer, load_file(path))


def _saved_steps(directory: Path) -> list[int]:
    return [int(path.name.partition("-")[2]) for path in directory.glob("step-*")]
