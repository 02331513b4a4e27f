"""Training: the general checkpoint, trained or adopted, and the pretrained checkpoint, by the loop of `pipelines.trainer`.

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
from pydantic import Field

from pipelines import checkpoints, interruption
from pipelines.checkpoints import RetentionSettings
from pipelines.data_order import DataOrder, DomainMixture
from pipelines.distributed import ERROR_NAME, current_world, joined, launch, pick_device
from pipelines.encoders import special_tokens
from pipelines.engine import die_with_parent
from pipelines.errors import GristmillError
from pipelines.files import file_hashes, locked
from pipelines.manifests import Check, Json, Manifest, Member, Outcome, read_manifest
from pipelines.model_files import Commit, local_path, model_folder, weight_files
from pipelines.models import ModelSettings, check_head, new_model, set_up_torch
from pipelines.plan import NOT_IN_FINGERPRINT, Plan, TrainingSettings
from pipelines.plugins import Settings
from pipelines.run_records import EVENTS, METRICS, VALIDATION, read_records
from pipelines.run_summary import dry_run, run_outcome
from pipelines.run_watch import TOKENIZER_FILES
from pipelines.shards import passage_pools, split_pool
from pipelines.shares import role_shares
from pipelines.store import advisory
from pipelines.trainer import RESUME, Run

TRAINING_PACKAGES = ("torch", "transformers")
WRITERS = "writers.lock"
"""Held by each process of a run, so that the next attempt waits for all of them."""


class GeneralSettings(TrainingSettings):
    """The general checkpoint: trained on the general domains alone, each by its selected tokens."""

    role: Literal["general", "target"] = "general"
    """The role whose selected passages are read."""


def train_general(
    settings: GeneralSettings, out: Path, *, selection: tuple[Member, ...], shards: tuple[Manifest, ...], tokenizer: Manifest
) -> Outcome:
    """Train a model on the selected passages of the general domains, in proportion to their tokens."""
    shares = role_shares(selection)[settings.role]
    return _train_checkpoint(settings, shares, out, selection=selection, shards=shards, tokenizer=tokenizer)


class AdoptionSettings(Settings):
    """The general checkpoint where a model is taken as it is."""

    checkpoint: str
    """A Hugging Face directory (relative paths start at `root`), or a repository on the hub."""
    revision: Commit | None = None
    """The commit of the repository: where it is given, the hub is asked."""
    sequence_length: int = Field(default=128, ge=2)
    """Positions that the model has to have."""
    files: dict[str, str] = Field(default_factory=dict)
    """File -> SHA-256 of the directory's weights, configuration and tokenizer; `located_checkpoint` fills it in."""
    root: Path = Field(default=Path(), exclude=True)
    """Where relative paths start. Not part of the identity."""


def located_checkpoint(settings: AdoptionSettings, root: Path) -> AdoptionSettings:
    """Return `settings` with `root`, and with the hashes of the files of a local checkpoint: its bytes are its identity.

    Raises:
        GristmillError: there is no such directory, or it leaves `root`.
    """
    if settings.revision:
        return settings.model_copy(update={"root": root})
    directory = local_path(settings.checkpoint, root, key="model.checkpoint")
    tokenizer = [directory / name for name in TOKENIZER_FILES if (directory / name).is_file()]
    return settings.model_copy(update={"files": file_hashes([*weight_files(directory), *tokenizer], root), "root": root})


def adopt_checkpoint(settings: AdoptionSettings, out: Path, *, tokenizer: Manifest) -> Outcome:
    """Save the checkpoint that `settings` names as it is, in float32, with the project's tokenizer: nothing is trained.

    Raises:
        GristmillError: it cannot be opened, has other tokens than the tokenizer, is shorter than a window, computes its logits in
            a way that training does not, or was changed since its files were hashed.
    """
    set_up_torch(1)
    named = ModelSettings(checkpoint=settings.checkpoint, revision=settings.revision)
    directory = model_folder(settings.checkpoint, settings.revision, settings.root)
    _check_same_tokens(directory, tokenizer)
    tokens = special_tokens(tokenizer.directory)
    model = new_model(named, tokens, settings.sequence_length, settings.root)
    check_head(model)
    if settings.files and located_checkpoint(settings, settings.root).files != settings.files:
        raise GristmillError(f"checkpoint {settings.checkpoint} was changed while it was read; materialize general_checkpoint again")
    model.save_pretrained(out)
    for name in TOKENIZER_FILES:
        shutil.copyfile(tokenizer.file(name), out / name)
    return Outcome(
        counts={"tokens": 0, "steps": 0, "parameters": sum(p.numel() for p in model.parameters())},
        details={"adopted": settings.checkpoint, "architecture": type(model).__name__, "vocabulary_size": model.config.vocab_size},
    )


def _check_same_tokens(directory: Path, tokenizer: Manifest) -> None:
    """Check that each id means to the checkpoint in `directory` what it means to the project, where it has a tokenizer to ask.

    Raises:
        GristmillError: the first id that differs is named.
    """
    from tokenizers import Tokenizer

    if not (directory / TOKENIZER_FILES[0]).is_file():
        return
    own, ours = (Tokenizer.from_file(str(path / TOKENIZER_FILES[0])) for path in (directory, tokenizer.directory))
    for number in range(max(own.get_vocab_size(), ours.get_vocab_size())):
        theirs, here = own.id_to_token(number), ours.id_to_token(number)
        if theirs != here:
            raise GristmillError(
                f"token {number} is {theirs!r} in checkpoint {directory} and {here!r} in the project's tokenizer; a model that is taken as "
                "it is needs its own: name its directory as `tokenizer: {path: ...}` in project.yaml"
            )


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
    """Continue `base` on the domain mixture of `mixture`: its shares, the target shares of phases over its roles, and its limits.

    Where a limit ends the run before its plan, `ended_by` of the outcome's details names the domains.
    """
    return _train_checkpoint(settings, DomainMixture.read(mixture), out, selection=selection, shards=shards, tokenizer=tokenizer, base=base)


def _train_checkpoint(
    settings: TrainingSettings,
    shares: Mapping[str, float] | DomainMixture,
    out: Path,
    *,
    selection: tuple[Member, ...],
    shards: tuple[Manifest, ...],
    tokenizer: Manifest,
    base: Manifest | None = None,
) -> Outcome:
    mixture = DomainMixture.of(shares)
    settings, ended_by = _while_it_lasts(settings, mixture, selection, shards, tokenizer)
    if settings.processes == 1:
        outcome = _train(Run(settings, mixture, selection, shards, tokenizer, base), out)
    else:
        outcome = _train_in_processes(settings, mixture, out, selection=selection, shards=shards, tokenizer=tokenizer, base=base)
    shutil.rmtree(out / RESUME, ignore_errors=True)
    _plot_losses(out)
    details = {**outcome.details, "ended_by": ended_by} if ended_by else outcome.details
    return outcome.model_copy(update={"plots": ("training_loss.png",), "details": details})


def _while_it_lasts(
    settings: TrainingSettings,
    mixture: DomainMixture,
    selection: tuple[Member, ...],
    shards: tuple[Manifest, ...],
    tokenizer: Manifest,
) -> tuple[TrainingSettings, list[str]]:
    """Return `settings` that end where the limits of `mixture` end the run, and the domains whose limits do; none where none does.

    Every process of the run has to know its end, so it is found before they start.
    """
    if mixture.on_exhausted == "repeat" or mixture.max_epochs is None:
        return settings, []
    pools, fraction = passage_pools(selection, shards, special_tokens(tokenizer.directory).end_of_text), settings.validation.fraction
    if fraction:
        pools = {domain: split_pool(pool, fraction)[0] for domain, pool in pools.items()}
    plan = Plan(settings)
    order = DataOrder(plan, mixture, pools)
    if order.num_steps == plan.num_steps:
        return settings, []
    return settings.model_copy(update={"max_tokens": order.num_steps * plan.tokens_per_step}), order.ended_by()


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
    return _as_read(run_outcome(run), run.order)


def _as_read(outcome: Outcome, order: DataOrder) -> Outcome:
    """Return `outcome` with what `order` read of each domain, and with the share that target domains had over all phases."""
    share = order.target_share()
    metrics = outcome.metrics if share is None else {**outcome.metrics, "target_share": share}
    return outcome.model_copy(update={"metrics": metrics, "tables": {**outcome.tables, "domains": order.table()}})


class Request(Settings):
    """A run as a file, for the processes that share it."""

    settings: dict[str, Json]
    """A TrainingSettings, the fields that are left out of fingerprints included."""
    mixture: DomainMixture
    """What is read of each domain."""
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
        return Run(settings, self.mixture, members, shards, read_manifest(Path(self.tokenizer)), base)


def _train_in_processes(
    settings: TrainingSettings,
    mixture: DomainMixture,
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
        mixture=mixture,
        selection=tuple((str(member.manifest.directory), member.name) for member in selection),
        shards=tuple(str(manifest.directory) for manifest in shards),
        tokenizer=str(tokenizer.directory),
        base=str(base.directory) if base else None,
        out=str(out),
    )
    with locked(work / WRITERS):  # processes of an attempt whose launcher was killed may still be on their way to their end
        (work / "request.json").write_text(request.model_dump_json(), encoding="utf-8")
    launch("pipelines.training", work / "request.json", settings.processes)
    outcome = Outcome.model_validate_json((work / "outcome.json").read_text(encoding="utf-8"))
    shutil.rmtree(work)
    return outcome


def _train_as_one_of_many(path: Path) -> None:
    """Train as one process of the run that the request at `path` describes; what goes wrong is left beside it in words."""
    die_with_parent()
    interruption.install()
    request = Request.model_validate_json(path.read_text(encoding="utf-8"))
    world = current_world()
    wanted = TrainingSettings.model_validate(request.settings).device
    try:
        with locked(path.parent / WRITERS, shared=True), joined(world, pick_device(wanted, world)):
            outcome = _train(request.run(), Path(request.out))
    except GristmillError as error:
        (path.parent / ERROR_NAME).write_text(str(error), encoding="utf-8")
        raise
    if world.is_first:
        (path.parent / "outcome.json").write_text(outcome.model_dump_json(), encoding="utf-8")


def dry_run_checkpoint(
    settings: TrainingSettings,
    shares: Mapping[str, float] | DomainMixture,
    *,
    selection: tuple[Member, ...],
    shards: tuple[Manifest, ...],
    tokenizer: Manifest,
    base: Manifest | None = None,
) -> dict[str, Json]:
    """Return what a run would take (parameters, memory, tokens, epochs, time) from a few steps of it; nothing is written."""
    mixture = DomainMixture.of(shares)
    settings, _ = _while_it_lasts(settings.model_copy(update={"processes": 1}), mixture, selection, shards, tokenizer)
    return dry_run(Run(settings, mixture, selection, shards, tokenizer, base))


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
    if not draft.counts["steps"]:
        return Check(name="loss_fell", passed=True, description="the checkpoint was taken as it is; no step was trained")
    found = read_records(draft.directory / METRICS)
    start = draft.counts["steps"] - int(draft.outcome.tables["phases"][-1]["steps"])
    records = [record["loss"] for record in found if record["step"] > start] or [found[-1]["loss"]]
    tenth = max(1, len(records) // 10)
    first, last = float(np.mean(records[:tenth])), float(np.mean(records[-tenth:]))
    return Check(name="loss_fell", passed=last < first, description=f"training loss {first:.3f} -> {last:.3f} nats per token")


CHECKPOINT_AUDITS = (weights_finite, loss_fell)


if __name__ == "__main__":
    _train_as_one_of_many(Path(sys.argv[1]))
