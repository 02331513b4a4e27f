"""Probes of a made-up world, in memory and as the files that training writes, for tests of the critical ratio."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.critical_ratio import RATIO_AUDITS, Judged, estimate_critical_ratio, judge
from pipelines.manifests import FileEntry, InputReference, Manifest, Member, Outcome, sha256_file
from pipelines.mixing_laws._scan import box_cox
from pipelines.probe_losses import ProbeLosses, ProbeRun, Windows
from pipelines.ratio_estimate import RatioSettings
from pipelines.store import Build, Store

TOLERANCE = 0.05
RATIOS = (0.25, 0.5, 0.7, 0.85)
LENGTHS = (1000, 2000, 4000)
EARLY = (250, 500)
ONE_LENGTH = {"law": "own_share", "run_noise_nats": 0.002}
"""Settings of an estimate at one length of training; the defaults fit a law along it."""
SHIPPED = {name: RatioSettings.model_fields[name].default for name in ONE_LENGTH}
"""The same settings as they are shipped."""
K, SLOPE, GROWTH, DRIFT = -0.3, 0.08, 0.01, -0.02
LEVEL = TOLERANCE + SLOPE * float(box_cox(np.asarray(0.41), K))
"""The law of `drifting`, which reaches the tolerance at 0.6 after 4000 tokens; level and slope move with the logarithm of the tokens."""
PLENTY = {"general": 10**9, "target": 10**9}

Change = Callable[[float, float], float]
"""Ratio and tokens to a change of loss."""


def delta(ratio: float, root: float, *, k: float = -0.3, slope: float = 0.08) -> float:
    """Return the general change of loss at `ratio` under an own-share law that reaches the tolerance at `root`."""
    return TOLERANCE - slope * float(box_cox(np.asarray(1 - ratio + 0.01), k) - box_cox(np.asarray(1 - root + 0.01), k))


def healthy(ratio: float, tokens: float) -> float:
    """A world in which the ratio is 0.6 at 4000 tokens and gains 0.05 with every doubling."""
    return delta(ratio, 0.6 + 0.05 * math.log2(tokens / 4000))


def drifting(ratio: float | np.ndarray, tokens: float | np.ndarray) -> float | np.ndarray:
    """A world that the law along training holds: level and slope linear in log tokens."""
    time = np.log(np.asarray(tokens) / 4000)
    return LEVEL + DRIFT * time - (SLOPE + GROWTH * time) * box_cox(1.01 - np.asarray(ratio), K)


def rising(height: float) -> Change:
    """The same after a first rise that ends before 1000 tokens."""
    return lambda ratio, tokens: drifting(ratio, tokens) + (height * (1 + ratio) if tokens < 1000 else 0.0)


def true_ratio(tokens: float, *, tolerance: float = TOLERANCE) -> float:
    """The ratio at which `drifting` reaches `tolerance`, by hand."""
    time = math.log(tokens / 4000)
    height = (LEVEL + DRIFT * time - tolerance) / (SLOPE + GROWTH * time)
    return 1.01 - (1 + K * height) ** (1 / K)


def learnt(ratio: float, tokens: float) -> float:
    return -0.5 * tokens / 4000


def of_ratio(levels: Mapping[float, float]) -> Change:
    """A change that depends on the ratio alone."""
    return lambda ratio, _tokens: levels[ratio]


def held_out(general: int = 400, target: int = 60, *, seed: int = 0, contaminated: int | None = None) -> Windows:
    """Windows of two general domains and a target domain; the first `contaminated` hold training text."""
    random = np.random.default_rng(seed)
    corpus = ["general"] * general + ["target"] * target
    domain = ["book" if n % 4 == 0 else "wiki" for n in range(general)] + ["code"] * target
    strata = {"book": 0, "wiki": 1, "code": 2}
    total = general + target
    return Windows(
        tuple(zip(corpus, domain, range(total), strict=True)),
        np.asarray(corpus),
        np.asarray([strata[name] for name in domain]),
        random.normal(4.0, 0.8, total),
        np.full(total, 128.0),
        np.full(total, 512.0),
        None if contaminated is None else np.arange(total) < contaminated,
        hashlib.sha256(f"windows {general} {target} {seed}".encode()).hexdigest()[:32],
        "b" * 32,
    )


def world(
    ratios: Sequence[float] = RATIOS,
    *,
    general: Change = healthy,
    target: Change = learnt,
    seeds: Sequence[int] = (0,),
    shift_of_seed: float = 0.0,
    noise: float = 0.02,
    common: float = 0.0,
    windows: Windows | None = None,
    lengths: Sequence[int] = LENGTHS,
    ends: Mapping[float, int] | None = None,
    stopped: bool = True,
    seed: int = 0,
) -> ProbeLosses:
    """Return the losses of one probe per ratio and seed; `noise` is each window's own in each run, `common` its own in all.

    A ratio in `ends` was measured up to that many tokens. Early points are measured on one window in four.
    """
    held, ends = windows or held_out(), ends or {}
    random = np.random.default_rng(seed)
    is_general = held.corpus == "general"
    runs, rows = [], []
    tokens_A = np.asarray(sorted({*EARLY, *lengths}), dtype=float)
    alike_W = random.normal(0, common, len(held.keys))
    for ratio in ratios:
        for data_seed in seeds:
            own_W = random.normal(0, noise, len(held.keys)) + alike_W * (1 + ratio)
            end = ends.get(ratio, max(lengths))
            mean_AW = np.where(
                is_general,
                np.asarray([[general(ratio, t) + data_seed * shift_of_seed] for t in tokens_A]),
                np.asarray([[target(ratio, t)] for t in tokens_A]),
            )
            deltas_AW = mean_AW + own_W
            deltas_AW[tokens_A > end] = np.nan
            deltas_AW[np.ix_(tokens_A < min(lengths), np.arange(len(own_W)) % 4 > 0)] = np.nan
            rows.append(deltas_AW)
            why = "its verdict was certain" if stopped and ratio in ends else None
            runs.append(ProbeRun(f"r{ratio:.2f}-s{data_seed}", ratio, data_seed, why, end))
    return ProbeLosses(held, tuple(runs), tokens_A, np.stack(rows))


def judged(losses: ProbeLosses, available: Mapping[str, int] = PLENTY, **changes: object) -> Judged:
    return judge(RatioSettings(**{"draws": 60, **ONE_LENGTH, **changes}), losses, available)


def along(losses: ProbeLosses, **changes: object) -> Judged:
    """Return what the shipped settings say."""
    return judged(losses, **{**SHIPPED, **changes})


def codes(found: Judged) -> set[str]:
    return {row["code"] for row in found.refusals}


def warned(found: Judged) -> set[str]:
    return {row["code"] for row in found.warnings}


@dataclass(frozen=True)
class Files:
    """A world as artifacts."""

    windows: Manifest
    probes: tuple[Manifest, ...]
    selection: tuple[Member, ...]

    def inputs(self) -> dict[str, object]:
        return {"windows": self.windows, "probes": self.probes, "selection": self.selection}


def artifact(folder: Path, asset: str, partition: str, files: Mapping[str, pa.Table | str], **more: object) -> Manifest:
    """Write `files` and return the manifest of an artifact of them, as the store would publish it."""
    where = folder / f"{asset}-{partition}"
    where.mkdir(parents=True)
    for name, content in files.items():
        if isinstance(content, str):
            (where / name).write_text(content)
        else:
            pq.write_table(content, where / name)
    entries = tuple(FileEntry(path=n, bytes=(where / n).stat().st_size, sha256=sha256_file(where / n)) for n in files)
    name = hashlib.sha256("".join(e.sha256 for e in entries).encode()).hexdigest()[:32]
    values = {"fingerprint": name, "code_version": "0", "settings": {}, "inputs": {}, **more}
    return Manifest(asset=asset, partition=partition, files=entries, **values).at(where)


def window_file(folder: Path, held: Windows) -> Manifest:
    table = {name: [key[place] for key in held.keys] for place, name in enumerate(("corpus", "domain", "window"))}
    table |= {"tokens": held.tokens, "bytes": held.bytes, "loss": held.base}
    if held.contaminated is not None:
        table["contaminated"] = held.contaminated
    base = InputReference(asset="general_checkpoint", partition="r", fingerprint=str(held.base_fingerprint))
    return artifact(
        folder, "probe_windows", "r", {"windows.parquet": pa.table(table)}, fingerprint=held.fingerprint, inputs={"base": (base,)}
    )


def probe_file(folder: Path, losses: ProbeLosses, number: int, *, asset: str = "mixture_probe") -> Manifest:
    """Write run `number` as training does: a row a measured window, the points in order."""
    run, held = losses.runs[number], losses.windows
    place_P, window_P = np.nonzero(np.isfinite(losses.deltas_NAW[number]))
    keys = [held.keys[w] for w in window_P]
    table = {"probe": [run.name] * len(keys), "ratio": [run.ratio] * len(keys), "seed": [run.seed] * len(keys)}
    table |= {"tokens": losses.tokens_A[place_P].astype(np.int64), "window": window_P}
    table |= {"corpus": [key[0] for key in keys], "domain": [key[1] for key in keys]}
    table["loss"] = held.base[window_P] + losses.deltas_NAW[number][place_P, window_P]
    said = {"probe": run.name, "ratio": run.ratio, "seed": run.seed, "tokens": run.tokens, "shares": {}, "stopped": run.stopped}
    seen = {"windows": (InputReference(asset="probe_windows", partition="r", fingerprint=held.fingerprint),)}
    files = {"losses.parquet": pa.table(table), "probe.json": json.dumps(said)}
    return artifact(folder, asset, run.name, files, inputs=seen, outcome=Outcome(metrics={"cpu_seconds": 1.5}))


def write(folder: Path, losses: ProbeLosses, available: Mapping[str, int] = PLENTY) -> Files:
    rows = [(role, role, tokens, True) for role, tokens in available.items()] + [("target", "target", 10**15, False)]
    columns = dict(zip(("role", "domain", "tokens", "selected"), map(list, zip(*rows, strict=True)), strict=True))
    subset = artifact(folder, "selected_subset", "r", {"selection.parquet": pa.table(columns)})
    probes = tuple(probe_file(folder, losses, number) for number in range(len(losses.runs)))
    return Files(window_file(folder, losses.windows), probes, (Member(manifest=subset, name="selection.parquet"),))


def build(store: Store, files: Files, **changes: object) -> tuple[dict, Manifest]:
    """Return critical_ratio.json and the manifest."""
    made = RatioSettings(**{"draws": 40, **ONE_LENGTH, **changes})
    request = Build(asset="critical_ratio", step=estimate_critical_ratio, settings=made, inputs=files.inputs(), audits=RATIO_AUDITS)
    manifest = store.build(request).manifest
    return json.loads(manifest.file("critical_ratio.json").read_text()), manifest
