"""Training: the general checkpoint, the mixture probes and the pretrained checkpoint, all by the loop of `pipelines.trainer`.

A checkpoint is a Hugging Face directory; transformers alone opens it. Several processes run this module under torchrun:

    python -m torch.distributed.run --nproc-per-node 2 -m pipelines.training REQUEST.json
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from pipelines import checkpoints
from pipelines.checkpoints import RetentionSettings
from pipelines.distributed import ERROR_NAME, current_world, joined, launch, pick_device
from pipelines.documents import write_table
from pipelines.errors import EmptyInput, GristmillError
from pipelines.manifests import Check, Json, Manifest, Member, Outcome, read_manifest
from pipelines.plan import NOT_IN_FINGERPRINT, TrainingSettings
from pipelines.plugins import Settings
from pipelines.run_records import EVENTS, METRICS, VALIDATION, read_records
from pipelines.run_summary import dry_run, run_outcome
from pipelines.run_watch import TOKENIZER_FILES
from pipelines.shards import held_out_documents, windows_of
from pipelines.store import advisory
from pipelines.trainer import RESUME, Run

TRAINING_PACKAGES = ("torch", "transformers")
LOSSES = pa.schema(
    [
        ("probe", pa.string()),
        ("ratio", pa.float64()),
        ("seed", pa.int64()),
        ("tokens", pa.int64()),
        ("corpus", pa.string()),
        ("window", pa.int64()),
        ("loss", pa.float64()),
    ]
)


class GeneralSettings(TrainingSettings):
    """The general checkpoint: trained on the general domains alone, each by its selected tokens."""

    role: Literal["general", "target"] = "general"
    """The role whose selected passages are read."""


class ProbeSettings(TrainingSettings):
    """One probe: the base continued at a target share, measured on paired windows along the way."""

    ratio: float = Field(ge=0, le=1)
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
    shares = role_shares(selection)
    run = Run(settings, mixed_shares(shares, settings.ratio), selection, shards, tokenizer, base)
    windows = _held_out_windows(settings, decisions, shards, shares, run.end_of_text)
    label = f"r{settings.ratio:.2f}-s{settings.seed}"
    points = sorted({max(1, round(share * run.num_steps)) for share in settings.measure_at})
    rows: list[pa.Table] = []

    def measure(step: int) -> dict[str, np.ndarray]:
        losses = {corpus: run.window_losses(batch) for corpus, batch in windows.items()}
        rows.extend(_loss_table(label, settings, step * run.tokens_per_step, corpus, found) for corpus, found in losses.items())
        return losses

    final = measure(0)
    for point in points:
        run.advance(point, out, resumable=False)
        final = measure(point)
    write_table(out / "losses.parquet", pa.concat_tables(rows))
    return run_outcome(
        run,
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
    if settings.processes == 1:
        outcome = _train(Run(settings, shares, selection, shards, tokenizer, base), out)
    else:
        outcome = _train_in_processes(settings, shares, out, selection=selection, shards=shards, tokenizer=tokenizer, base=base)
    shutil.rmtree(out / RESUME, ignore_errors=True)
    _plot_losses(out)
    return outcome.model_copy(update={"plots": ("training_loss.png",)})


def _train(run: Run, out: Path) -> Outcome:
    """Train to the end and write the checkpoint; every process of a run does, and the first one writes."""
    from safetensors.torch import save_file

    run.advance(run.num_steps, out)
    run.finish()
    model, optimizer = checkpoints.full_model_state(run.model), checkpoints.full_optimizer_state(run.model, run.optimizer)
    if run.world.is_first:
        run.model.save_pretrained(out, state_dict=model)
        for name in TOKENIZER_FILES:
            shutil.copyfile(run.tokenizer.file(name), out / name)
        (out / "trainer").mkdir(exist_ok=True)
        save_file(optimizer, out / "trainer" / "optimizer.safetensors")
        if run.guard.events:
            (out / EVENTS).write_text("".join(json.dumps(event) + "\n" for event in run.guard.events), encoding="utf-8")
    return run_outcome(run)


class Request(Settings):
    """A run as a file, for the processes that share it."""

    settings: dict[str, Json]
    """A TrainingSettings, the fields that are left out of fingerprints included."""
    shares: dict[str, float]
    """Share of each domain."""
    selection: tuple[tuple[str, str], ...]
    """Directory of the artifact and name of the file."""
    shards: tuple[str, ...]
    """Directories of the artifacts."""
    tokenizer: str
    """Directory of the artifact."""
    base: str | None
    """Directory of the artifact."""
    out: str
    """Where the checkpoint is written."""

    def run(self) -> Run:
        """Return the run, opened in this process."""
        members = tuple(Member(manifest=read_manifest(Path(directory)), name=name) for directory, name in self.selection)
        shards = tuple(read_manifest(Path(directory)) for directory in self.shards)
        base = read_manifest(Path(self.base)) if self.base else None
        settings = TrainingSettings.model_validate(self.settings)
        return Run(settings, self.shares, members, shards, read_manifest(Path(self.tokenizer)), base)


def _train_in_processes(
    settings: TrainingSettings,
    shares: Mapping[str, float],
    out: Path,
    *,
    selection: tuple[Member, ...],
    shards: tuple[Manifest, ...],
    tokenizer: Manifest,
    base: Manifest | None,
) -> Outcome:
    values = TrainingSettings(**{name: getattr(settings, name) for name in TrainingSettings.model_fields})
    layout = {name: getattr(values, name) for name in NOT_IN_FINGERPRINT} | {"root": str(values.root.absolute())}
    layout["retention"] = {name: getattr(values.retention, name) for name in RetentionSettings.model_fields}
    whole = {**values.model_dump(mode="json"), **layout}
    work = out / "processes"
    work.mkdir(exist_ok=True)
    request = Request(
        settings=whole,
        shares=dict(shares),
        selection=tuple((str(member.manifest.directory), member.name) for member in selection),
        shards=tuple(str(manifest.directory) for manifest in shards),
        tokenizer=str(tokenizer.directory),
        base=str(base.directory) if base else None,
        out=str(out),
    )
    (work / "request.json").write_text(request.model_dump_json(), encoding="utf-8")
    launch("pipelines.training", work / "request.json", settings.processes)
    outcome = Outcome.model_validate_json((work / "outcome.json").read_text(encoding="utf-8"))
    shutil.rmtree(work)
    return outcome


def _train_as_one_of_many(path: Path) -> None:
    """Train as one process of the run that the request at `path` describes; what goes wrong is left beside it in words."""
    request = Request.model_validate_json(path.read_text(encoding="utf-8"))
    world = current_world()
    wanted = TrainingSettings.model_validate(request.settings).device
    try:
        with joined(world, pick_device(wanted, world)):
            outcome = _train(request.run(), Path(request.out))
    except GristmillError as error:
        (path.parent / ERROR_NAME).write_text(str(error), encoding="utf-8")
        raise
    if world.is_first:
        (path.parent / "outcome.json").write_text(outcome.model_dump_json(), encoding="utf-8")


def dry_run_checkpoint(
    settings: TrainingSettings,
    shares: Mapping[str, float],
    *,
    selection: tuple[Member, ...],
    shards: tuple[Manifest, ...],
    tokenizer: Manifest,
    base: Manifest | None = None,
) -> dict[str, Json]:
    """Return what a run would take (parameters, memory, tokens, epochs, time) from a few steps of it; nothing is written."""
    return dry_run(Run(settings.model_copy(update={"processes": 1}), shares, selection, shards, tokenizer, base))


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

    records = read_records(out / METRICS)
    curves = {"training loss": ([record["tokens"] for record in records], [record["loss"] for record in records])}
    if measured := read_records(out / VALIDATION):
        curves["validation loss"] = ([record["tokens"] for record in measured], [record["loss"] for record in measured])
    line_plot(out / "training_loss.png", curves, x="tokens", y="nats per token")


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
    """In the last phase, the mean training loss of the last tenth lies below that of the first tenth."""
    found = read_records(draft.directory / METRICS)
    start = draft.counts["steps"] - int(draft.outcome.tables["phases"][-1]["steps"])
    records = [record["loss"] for record in found if record["step"] > start] or [found[-1]["loss"]]
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


if __name__ == "__main__":
    _train_as_one_of_many(Path(sys.argv[1]))
