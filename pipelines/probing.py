"""Mixture probes: the base continued at some mixture, and the loss of every held-out window measured along the way.

The windows are cut, and the base measured on them, once (`measure_base`). Every probe reads the same windows and the same order
of each domain from the same base, so that losses are paired: noise of the windows cancels in differences.

    probe_windows: windows.npy     int32 (W, T + 1)
                   windows.parquet corpus, domain, window, tokens, bytes, loss (of the base), contaminated (by selected text)
    mixture_probe: losses.parquet  probe, ratio, seed, tokens, corpus, domain, window, loss
                   probe.json      ratio, shares, seed, tokens, stopped (why it ended early, null where it did not)
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, model_validator

from pipelines.documents import write_table
from pipelines.errors import EmptyInput, GristmillError
from pipelines.manifests import Check, Manifest, Member, Outcome
from pipelines.plan import TrainingSettings
from pipelines.plugins import Settings
from pipelines.probe_losses import Tolerance
from pipelines.run_summary import run_outcome
from pipelines.shards import HeldOutDocuments, held_out_documents, passage_pools, windows_of
from pipelines.shared_spans import windows_in_training
from pipelines.shares import domain_tokens, mixed_shares, role_shares
from pipelines.swarm import draw_mixtures
from pipelines.trainer import Run

WINDOWS = pa.schema(
    [
        ("corpus", pa.string()),
        ("domain", pa.string()),
        ("window", pa.int64()),
        ("tokens", pa.int64()),
        ("bytes", pa.float64()),
        ("loss", pa.float64()),
        ("contaminated", pa.bool_()),
    ]
)
LOSSES = pa.schema(
    [
        ("probe", pa.string()),
        ("ratio", pa.float64()),
        ("seed", pa.int64()),
        ("tokens", pa.int64()),
        ("corpus", pa.string()),
        ("domain", pa.string()),
        ("window", pa.int64()),
        ("loss", pa.float64()),
    ]
)
EARLIEST_STOP = 0.5
"""Share of a probe before which it does not end: the law along training is to see some of its course beyond the first rise."""


class WindowSettings(TrainingSettings):
    """The held-out windows, and how the base is measured on them: the objective of the first phase counts."""

    windows: dict[str, int] = Field(default_factory=lambda: {"general": 640, "target": 240})
    """Held-out windows of each role; its domains get theirs by their share of it."""
    windows_per_domain: int | None = Field(default=None, ge=1)
    """As many of every domain instead, where each is judged by itself."""


class SwarmSettings(Settings):
    """A mixture of a swarm: see `draw_mixtures`, which draws around the shares of the selected tokens."""

    number: int = Field(ge=0)
    """Of the mixture within the swarm."""
    count: int = Field(ge=1)
    """Mixtures of the swarm."""
    seed: int = Field(default=0, ge=0)
    """Of the draws."""
    targets: tuple[str, ...] = ()
    """Domains whose share in sum is spread over `target_range`."""
    target_range: tuple[float, float] = (0.1, 0.8)
    """Lowest and highest target share."""
    min_share: float = 0.02
    """Least share of a domain."""


class ProbeSettings(TrainingSettings):
    """One probe: the base continued at a target share, or on a mixture of domains."""

    ratio: float | None = Field(default=None, ge=0, le=1)
    """Share of tokens from the target domains (R of the CMR paper, 2407.17467, section 3)."""
    shares: dict[str, float] | None = None
    """Share of every domain, instead of `ratio`."""
    swarm: SwarmSettings | None = None
    """A mixture of a swarm, instead of both."""
    measure_at: tuple[float, ...] = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
    """Shares of the run after which the held-out windows are measured."""
    stride: int = Field(default=4, ge=1)
    """Along the run one window in `stride` is measured, at each point the next ones; the last point measures all. What differs between
    checkpoints is noise of the checkpoint as much as of the windows, so many points on some bear more than few on all."""
    tolerance: Tolerance = Tolerance(nats=0.05)
    """How much the general loss may rise; see `stop_beyond`."""
    stop_beyond: float | None = Field(default=None, gt=0)
    """A probe ends early where its change of general loss lies this many tolerances above or below the base's by two standard errors: on
    which side of the tolerance it ends is then certain, and so far off it says little of where the ratio lies. None trains to the end."""

    @model_validator(mode="after")
    def _one_mixture(self) -> ProbeSettings:
        given = [name for name in ("ratio", "shares", "swarm") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"a probe has one mixture, and got {' and '.join(given)}; give one of them")
        return self


def measure_base(
    settings: WindowSettings,
    out: Path,
    *,
    base: Manifest,
    selection: tuple[Member, ...],
    decisions: Manifest,
    shards: tuple[Manifest, ...],
    tokenizer: Manifest,
) -> Outcome:
    """Cut the held-out windows of the general and the target corpus and write them with the base's loss on each.

    Raises:
        EmptyInput: a role has no held-out window.
    """
    roles = role_shares(selection)
    run = Run(settings, roles["general"], selection, shards, tokenizer, base)
    windows, rows = _cut_windows(settings, roles, held_out_documents(decisions, shards), run.end_of_text)
    losses = run.window_losses(windows)
    np.save(out / "windows.npy", windows.astype(np.int32))
    contaminated = windows_in_training(windows, passage_pools(selection, shards, run.end_of_text).values())
    table = pa.table({**rows, "loss": losses, "contaminated": contaminated}).select(WINDOWS.names).cast(WINDOWS)
    write_table(out / "windows.parquet", table)
    corpus = np.asarray(rows["corpus"])
    return Outcome(
        counts={f"{role}_windows": int((corpus == role).sum()) for role in settings.windows}
        | {"tokens": int(np.sum(rows["tokens"])), "contaminated": int(contaminated.sum())},
        metrics={f"{role}_loss_nats_per_token": float(losses[corpus == role].mean()) for role in settings.windows},
        tables={"windows": _by_domain(rows, losses, contaminated)},
    )


def train_probe(
    settings: ProbeSettings,
    out: Path,
    *,
    base: Manifest,
    windows: Manifest,
    selection: tuple[Member, ...],
    shards: tuple[Manifest, ...],
    tokenizer: Manifest,
) -> Outcome:
    """Continue `base` at one mixture and store the loss of every held-out window along the run.

    Raises:
        GristmillError: the settings name no mixture.
        EmptyInput: a role that is to be read has no selected passage.
    """
    name = f"m{settings.swarm.number:02d}-s{settings.seed}" if settings.swarm else None
    shares = probe_shares(settings, selection)
    return _measured_run(settings, Run(settings, shares, selection, shards, tokenizer, base), shares, out, windows, name=name)


def train_verification(
    settings: ProbeSettings,
    out: Path,
    *,
    critical_ratio: Manifest,
    base: Manifest,
    windows: Manifest,
    selection: tuple[Member, ...],
    shards: tuple[Manifest, ...],
    tokenizer: Manifest,
) -> Outcome:
    """Train one more probe, at the ratio (or the mixture) that `critical_ratio` found: what it measures says whether that holds."""
    found = json.loads(critical_ratio.file("critical_ratio.json").read_text())
    wanted = {"ratio": None, "shares": found["shares"]} if found.get("shares") else {"ratio": found["ratio"]}
    chosen = settings.model_copy(update=wanted)
    shares = probe_shares(chosen, selection)
    return _measured_run(chosen, Run(chosen, shares, selection, shards, tokenizer, base), shares, out, windows, name="verification")


def probe_shares(settings: ProbeSettings, selection: tuple[Member, ...]) -> dict[str, float]:
    """Return the share of every domain.

    Raises:
        GristmillError: the settings name no mixture.
    """
    if settings.shares is not None:
        return settings.shares
    if settings.swarm is not None:
        drawn = {name: getattr(settings.swarm, name) for name in ("count", "seed", "targets", "target_range", "min_share")}
        return draw_mixtures(domain_tokens(selection), **drawn)[settings.swarm.number]
    if settings.ratio is None:
        raise GristmillError("a probe needs `ratio`, `shares` or `swarm`: the mixture that it is trained on")
    return mixed_shares(role_shares(selection), settings.ratio)


def _measured_run(
    settings: ProbeSettings, run: Run, shares: Mapping[str, float], out: Path, windows: Manifest, *, name: str | None
) -> Outcome:
    """Train `run`, which reads `shares`, to its end, measuring on the way, and write what was measured."""
    started = time.process_time()
    held = _Measured(windows)
    target = set(role_shares(run.selection).get("target", {}))
    ratio = sum(share for domain, share in shares.items() if domain in target) if settings.ratio is None else settings.ratio
    point = {"probe": name or f"r{ratio:.2f}-s{settings.seed}", "ratio": ratio, "seed": settings.seed}
    tables, stopped = [], None
    places = sorted(set(settings.measure_at))
    for number, place in enumerate(places):
        step = max(1, round(place * run.num_steps))
        run.advance(step, out, resumable=False)
        losses = _measure(run, held, held.rows[number % settings.stride :: settings.stride])
        if place < 1.0 and place >= EARLIEST_STOP:
            stopped = _certain(settings, held, losses)
        if stopped or number == len(places) - 1:
            losses = _measure(run, held, held.rows)
        tables.append(_loss_table(held, losses, **point, tokens=step * run.tokens_per_step))
        if stopped:
            break
    write_table(out / "losses.parquet", pa.concat_tables(tables))
    done = {**point, "shares": dict(sorted(shares.items())), "tokens": run.step * run.tokens_per_step, "stopped": stopped}
    (out / "probe.json").write_text(json.dumps(done, indent=1, sort_keys=True) + "\n")
    change = losses - held.base
    final = {f"{corpus}_delta_nats_per_token": float(change[held.corpus == corpus].mean()) for corpus in held.corpora}
    return run_outcome(
        run,
        metrics=final | {"cpu_seconds": time.process_time() - started},
        counts={"windows": len(held.rows), "measurements": len(tables)},
    )


def _measure(run: Run, held: _Measured, chosen: np.ndarray) -> np.ndarray:
    """Return the losses of the windows `chosen`, float64 of shape (W,), NaN elsewhere."""
    losses = np.full(len(held.rows), np.nan)
    losses[chosen] = run.window_losses(held.windows[chosen])
    return losses


def _certain(settings: ProbeSettings, held: _Measured, losses: np.ndarray) -> str | None:
    """Return why the run may end here, None where it may not."""
    if settings.stop_beyond is None:
        return None
    general = (held.corpus == "general") & np.isfinite(losses)
    change = (losses - held.base)[general]
    error = float(change.std(ddof=1) / np.sqrt(len(change))) if len(change) > 1 else float("inf")
    bound = settings.stop_beyond * settings.tolerance.in_nats(float(held.base[held.corpus == "general"].mean()), held.bytes_per_token)
    if abs(change.mean()) - 2.0 * error <= bound:
        return None
    return f"general loss {change.mean():+.3f} nats, beyond {settings.stop_beyond:g} tolerances by two standard errors"


class _Measured:
    """The windows of a probe_windows artifact."""

    def __init__(self, windows: Manifest) -> None:
        table = pq.read_table(windows.file("windows.parquet"))
        self.windows = np.load(windows.file("windows.npy"), allow_pickle=False).astype(np.int64)
        self.rows = np.arange(len(self.windows))
        self.base = table["loss"].to_numpy()
        self.corpus = np.asarray(table["corpus"].to_pylist())
        self.corpora = sorted(set(self.corpus.tolist()))
        mine = self.corpus == "general"
        self.bytes_per_token = float(table["bytes"].to_numpy()[mine].sum() / max(1, table["tokens"].to_numpy()[mine].sum()))
        self.table = table


def _cut_windows(
    settings: WindowSettings, roles: Mapping[str, Mapping[str, float]], documents: Mapping[str, HeldOutDocuments], end_of_text: int
) -> tuple[np.ndarray, dict[str, list]]:
    """Return windows, int64 (W, T + 1), and their columns: each domain of a role by its share, or as many of each."""
    parts: list[np.ndarray] = []
    rows: dict[str, list] = {name: [] for name in ("corpus", "domain", "window", "tokens", "bytes")}
    for role, total in settings.windows.items():
        before = len(rows["window"])
        for domain, share in roles.get(role, {}).items():
            if domain not in documents:
                continue
            held = documents[domain]
            found = windows_of(held, settings.sequence_length, settings.windows_per_domain or max(1, round(total * share)), end_of_text)
            parts.append(found)
            first, count = len(rows["window"]), len(found)
            bytes_per_window = float(held.bytes.sum()) / max(1, held.num_tokens) * settings.sequence_length
            columns = ([role] * count, [domain] * count, range(first, first + count), [settings.sequence_length] * count)
            for name, values in zip(rows, (*columns, [bytes_per_window] * count), strict=True):
                rows[name].extend(values)
        if len(rows["window"]) == before:
            raise EmptyInput(
                f"no held-out window of the {role} domains; raise `held_out` of {', '.join(roles.get(role, {}))} in project.yaml"
            )
    return np.concatenate(parts), rows


def _loss_table(held: _Measured, losses: np.ndarray, **point: object) -> pa.Table:
    (chosen,) = np.nonzero(np.isfinite(losses))
    columns = {name: pa.array([value] * len(chosen)) for name, value in point.items()}
    mine = held.table.select(["corpus", "domain", "window"]).take(pa.array(chosen))
    table = pa.table({**columns, **{name: mine[name] for name in mine.column_names}, "loss": losses[chosen]})
    return table.select(LOSSES.names).cast(LOSSES)


def _by_domain(rows: Mapping[str, list], losses: np.ndarray, contaminated: np.ndarray) -> list[dict[str, object]]:
    domain, tokens = np.asarray(rows["domain"]), np.asarray(rows["tokens"])
    role = dict(zip(rows["domain"], rows["corpus"], strict=True))
    found = []
    for name in role:
        mine = domain == name
        sizes = {"windows": int(mine.sum()), "tokens": int(tokens[mine].sum()), "contaminated": int(contaminated[mine].sum())}
        found.append({"domain": name, "role": role[name], **sizes, "loss": round(float(losses[mine].mean()), 4)})
    return found


def losses_finite(draft: Manifest) -> Check:
    """Every held-out window has a finite loss at every measured point."""
    name = "losses.parquet" if (draft.directory / "losses.parquet").exists() else "windows.parquet"
    losses = pq.read_table(draft.directory / name, columns=["loss"])["loss"].to_numpy()
    wrong = int((~np.isfinite(losses)).sum())
    return Check(
        name="losses_finite", passed=wrong == 0 and len(losses) > 0, description=f"{len(losses)} window losses, {wrong} not finite"
    )


PROBE_AUDITS = (losses_finite,)
