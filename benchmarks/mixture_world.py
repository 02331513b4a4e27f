"""Everything that probes of a mixture need, made from a corpus by the project's own steps: roles, base, held-out windows, probes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.selection_pool import LENGTH, Pool, prepare, selection_table, split_documents
from pipelines import critical_ratio, probing, training
from pipelines.documents import write_table
from pipelines.engine import Engine, map_shards
from pipelines.manifests import Manifest, Member, Outcome
from pipelines.plan import training_plugins
from pipelines.plugins import Settings
from pipelines.store import Build, Store

MODEL = {"hidden_size": 96, "num_layers": 3, "num_heads": 4, "intermediate_size": 264}
RUN = {
    "sequence_length": LENGTH,
    "batch_sequences": 16,
    "threads": 1,
    "samples": {"max_new_tokens": 0},
    "guards": {"on_spike": "ignore"},
}
BASE_RATE = 1.2e-2
FLOOR = 0.2
PROBE_RATE = BASE_RATE * FLOOR
"""The rate that the base ends with, so that no re-warming stands between it and the probes."""
MAX_BYTES = 60_000_000


class RoleSettings(Settings):
    """Which domains are general and which target."""

    roles: dict[str, str]


def assign_roles(settings: RoleSettings, out: Path, *, pool: Manifest) -> Outcome:
    """Write ``general.parquet`` and ``target.parquet``: all passages of the domains of each role."""
    table = pq.read_table(pool.file("pool.parquet"))
    domains = np.asarray(table["domain"].to_pylist())
    for role in ("general", "target"):
        (mine,) = np.nonzero([settings.roles.get(domain) == role for domain in domains])
        rows = selection_table(table, mine, np.zeros(len(mine)))
        place = rows.schema.get_field_index("role")
        write_table(
            out / f"{role}.parquet",
            rows.set_column(place, rows.schema.field(place), pa.array([role] * len(mine), rows.schema.field(place).type)),
        )
    return Outcome()


@dataclass(frozen=True)
class World:
    """A target domain beside the general ones, with a base and held-out windows."""

    pool: Pool
    target: str
    selection: tuple[Member, Member]
    base: Manifest
    windows: Manifest

    def probe(self, ratio: float, tokens: int, measure_at: Sequence[float], *, seed: int = 0, stop_beyond: float | None = None) -> Build:
        """Return the request for a probe, which may end early beyond so many tolerances."""
        settings = self.probe_settings(ratio, tokens, measure_at, seed=seed).model_copy(update={"stop_beyond": stop_beyond})
        name = f"{self.target}|r{ratio:.3f}-s{seed}-{tokens}"
        return Build("mixture_probe", probing.train_probe, settings, name, inputs=self.inputs(), plugins=training_plugins(settings))

    def verification(self, estimate: Manifest, tokens: int, measure_at: Sequence[float], *, seed: int = 0) -> Build:
        """Return the request for the run at `estimate`."""
        settings = self.probe_settings(None, tokens, measure_at, seed=seed)
        inputs = {"critical_ratio": estimate, **self.inputs()}
        step = probing.train_verification
        return Build("verification_probe", step, settings, self.target, inputs=inputs, plugins=training_plugins(settings))

    def probe_settings(self, ratio: float | None, tokens: int, measure_at: Sequence[float], *, seed: int = 0) -> probing.ProbeSettings:
        """Return a run of `tokens` at `ratio`."""
        phases = ({"tokens": tokens, "learning_rate": PROBE_RATE},)
        return probing.ProbeSettings(ratio=ratio, phases=phases, measure_at=tuple(measure_at), seed=seed, **RUN)

    def inputs(self) -> dict[str, object]:
        """Return what a probe reads."""
        shared = {"selection": self.selection, "shards": self.pool.shards, "tokenizer": self.pool.tokenizer}
        return {"base": self.base, "windows": self.windows, **shared}

    def estimate(self, settings: critical_ratio.RatioSettings, probes: Sequence[Manifest]) -> Manifest:
        """Return the critical ratio that `probes` give."""
        step, measured = critical_ratio.estimate_critical_ratio, self.measured(probes)
        plugins = critical_ratio.ratio_plugins(settings)
        return self.pool.store.build(Build("critical_ratio", step, settings, self.target, inputs=measured, plugins=plugins)).manifest

    def verified(
        self, settings: critical_ratio.VerificationSettings, estimate: Manifest, probes: Sequence[Manifest], run: Manifest
    ) -> Manifest:
        """Return the ratio after the run at it."""
        step, plugins = critical_ratio.verify_ratio, critical_ratio.ratio_plugins(settings)
        inputs = {"critical_ratio": estimate, "verification": run, **self.measured(probes)}
        return self.pool.store.build(Build("verified_ratio", step, settings, self.target, inputs=inputs, plugins=plugins)).manifest

    def measured(self, probes: Sequence[Manifest]) -> dict[str, object]:
        """Return what an estimate reads."""
        return {"probes": tuple(probes), "windows": self.windows, "selection": self.selection}


def build_world(paths: Sequence[Path], directory: Path, *, general: Sequence[str], target: str, base_tokens: int, windows: int) -> World:
    """Make the pool, the base over `general`, and the windows; what is there already in `directory` is taken."""
    pool = prepare(paths, directory, max_bytes=MAX_BYTES, duplicates="near")
    store = pool.store
    roles = RoleSettings(roles={**dict.fromkeys(general, "general"), target: "target"})
    subset = store.build(Build("selected_subset", assign_roles, roles, target, inputs={"pool": pool.passages})).manifest
    selection = (Member(manifest=subset, name="general.parquet"), Member(manifest=subset, name="target.parquet"))
    base = trained_base(store, pool, general, base_tokens)
    measuring = probing.WindowSettings(
        phases=({"tokens": 1, "learning_rate": 1.0},), windows={"general": windows, "target": windows // 4}, **RUN
    )
    inputs = {"base": base, "decisions": split_documents(store, paths, MAX_BYTES, "near").decisions, "selection": selection}
    inputs |= {"shards": pool.shards, "tokenizer": pool.tokenizer}
    plugins = training_plugins(measuring)
    held_out = store.build(Build("probe_windows", probing.measure_base, measuring, target, inputs=inputs, plugins=plugins)).manifest
    return World(pool, target, selection, base, held_out)


def trained_base(store: Store, pool: Pool, general: Sequence[str], tokens: int) -> Manifest:
    """Return the general checkpoint; its selection names the general domains alone, so that all targets share it."""
    roles = RoleSettings(roles=dict.fromkeys(general, "general"))
    subset = store.build(Build("selected_subset", assign_roles, roles, "general", inputs={"pool": pool.passages})).manifest
    schedule = {"schedule": "linear", "schedule_settings": {"floor": FLOOR, "warmup_fraction": 0.02}}
    settings = training.GeneralSettings(model=MODEL, phases=({"tokens": tokens, "learning_rate": BASE_RATE, **schedule},), **RUN)
    shards = tuple(shard for shard in pool.shards if str(shard.partition).partition("|")[0] in general)
    inputs = {"selection": (Member(manifest=subset, name="general.parquet"),), "shards": shards, "tokenizer": pool.tokenizer}
    step, plugins = training.train_general, training_plugins(settings)
    return store.build(Build("general_checkpoint", step, settings, "base", inputs=inputs, plugins=plugins, resumable=True)).manifest


class Building:
    """``store.build`` as a function that a process pool can carry."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def __call__(self, build: Build) -> Manifest:
        return self.store.build(build).manifest


def built(store: Store, builds: Sequence[Build], processes: int) -> list[Manifest]:
    """Build each in a process of its own, some side by side; return the manifests in order.

    Raises:
        GristmillError: one of them failed.
    """
    found: dict[str, Manifest] = {}
    for mapped in map_shards(Building(store), builds, Engine(kind="processes", workers=processes), isolate=True):
        if mapped.error:
            raise mapped.error
        found[mapped.item.fingerprint()] = mapped.result
    return [found[build.fingerprint()] for build in builds]


def cpu_seconds(runs: Sequence[Manifest]) -> float:
    """Return what `runs` cost."""
    return sum(float(run.outcome.metrics["cpu_seconds"]) for run in runs)
