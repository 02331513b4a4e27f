"""Runs of a study: the same small model on as many tokens of every variant, in child processes, measured on one set of windows.

A child trains several runs one after the other, so that what is imported is imported once. What a run gives depends on its job alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.selection_pays import difference, trained
from benchmarks.selection_pool import LENGTH
from benchmarks.study_pool import StudyPool
from pipelines.errors import GristmillError
from pipelines.manifests import Manifest
from pipelines.tasks._continuations import sampled_continuations

MAX_EPOCHS = 4.0
"""Repeated so often, text is almost worth as much as fresh text (2305.16264)."""
Losses = dict[str, dict[str, np.ndarray]]
"""By variant and group of windows, shape ``(seeds, windows)``."""


@dataclass(frozen=True)
class Variant:
    """What a study trains on."""

    name: str
    selection: Manifest
    shares: Mapping[str, float]
    """Of its domains, wanted: a domain that would be read more than `MAX_EPOCHS` times gives up what is beyond."""

    @property
    def tokens(self) -> dict[str, int]:
        """Tokens that it may read, by domain."""
        return dict(self.selection.outcome.details["tokens"])  # type: ignore[arg-type]


@dataclass(frozen=True)
class Sampling:
    """What is continued at the end of each run."""

    prompts: Mapping[str, Sequence[Sequence[int]]]
    """Token ids, by set of prompts."""
    samples: int = 5
    new_tokens: int = 24


@dataclass(frozen=True)
class Plan:
    """How a study trains and measures."""

    tokens: int
    seeds: tuple[int, ...]
    windows: int
    """Held-out windows of a group, at most."""
    parallel: int
    """Processes at a time, of one thread each."""


def equal_tokens(variants: Sequence[Variant], tokens: int) -> int:
    """Return how much all variants can read: `tokens`, or what the smallest of them is in `MAX_EPOCHS` epochs."""
    return min([tokens, *(int(MAX_EPOCHS * sum(readable(variant.tokens).values())) for variant in variants)])


def readable(available: Mapping[str, int]) -> dict[str, int]:
    """Return the domains that hold more than two windows."""
    return {domain: tokens for domain, tokens in available.items() if tokens > 2 * LENGTH}


def capped_shares(wanted: Mapping[str, float], available: Mapping[str, int], tokens: int) -> dict[str, float]:
    """Return the shares nearest to `wanted` under which no domain is read more than `MAX_EPOCHS` times in `tokens`; they sum to 1.

    What a domain gives up goes to the others in proportion to theirs. Domains with less than two windows are not read.

    Raises:
        GristmillError: all domains together are too small.
    """
    limits = {domain: MAX_EPOCHS * found / tokens for domain, found in readable(available).items() if wanted.get(domain, 0) > 0}
    if sum(limits.values()) < 1 - 1e-9:
        raise GristmillError(
            f"{tokens:,} tokens are more than {MAX_EPOCHS:g} epochs of {dict(available)}; give fewer --tokens or more text"
        )
    full: set[str] = set()
    while True:
        rest = 1 - sum(limits[domain] for domain in full)
        weight = sum(wanted[domain] for domain in limits if domain not in full)
        shares = {domain: limits[domain] if domain in full else wanted[domain] / weight * rest for domain in limits}
        beyond = {domain for domain, share in shares.items() if share > limits[domain] * (1 + 1e-9)}
        if not beyond:
            return shares
        full |= beyond


def run_all(
    pool: StudyPool, directory: Path, variants: Sequence[Variant], windows: Mapping[str, np.ndarray], plan: Plan, sampling: Sampling | None
) -> list[dict]:
    """Train every variant with every seed; return the runs in order of variants and seeds.

    Raises:
        GristmillError: a process failed.
    """
    jobs = jobs_of(pool, directory, variants, windows, plan, sampling)
    parts = [jobs[number :: plan.parallel] for number in range(min(plan.parallel, len(jobs)))]
    files = [directory / f"jobs-{number}.json" for number in range(len(parts))]
    for path, part in zip(files, parts, strict=True):
        path.write_text(json.dumps(part), encoding="utf-8")
    with ThreadPoolExecutor(plan.parallel) as threads:
        found = [run for runs in threads.map(_child, files) for run in runs]
    order = {variant.name: number for number, variant in enumerate(variants)}
    return sorted(found, key=lambda run: (order[run["variant"]], run["seed"]))


def jobs_of(
    pool: StudyPool, directory: Path, variants: Sequence[Variant], windows: Mapping[str, np.ndarray], plan: Plan, sampling: Sampling | None
) -> list[dict]:
    """Write `windows` into `directory`, once for all; return what a training process is told of every variant and seed."""
    directory.mkdir(parents=True)
    held = directory / "held_out.npz"
    np.savez(held, **windows)
    shared = {
        "tokens": plan.tokens,
        "shards": [str(shard.directory) for shard in pool.shards],
        "tokenizer": str(pool.tokenizer.directory),
        "held_out": str(held),
        "sampling": None if sampling is None else {**vars(sampling), "prompts": dict(sampling.prompts)},
    }
    jobs: list[dict] = []
    for variant in variants:
        shares = capped_shares(variant.shares, variant.tokens, plan.tokens)
        for seed in plan.seeds:
            own = {"variant": variant.name, "seed": seed, "shares": shares, "selection": str(variant.selection.directory)}
            jobs.append({**shared, **own, "out": str(directory / str(len(jobs)))})
    return jobs


def _child(path: Path) -> list[dict]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GRISTMILL_WORKERS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.studies", "--worker", str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise GristmillError(f"a training process ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def work(path: Path) -> None:
    """Train the jobs in the file `path` in this process; print a line of JSON for each."""
    for job in json.loads(path.read_text(encoding="utf-8")):
        run, found = trained(job)
        if sampling := job["sampling"]:
            settings = {"samples": sampling["samples"], "new_tokens": sampling["new_tokens"], "seed": job["seed"]}
            settings["end_of_text"] = run.end_of_text
            sets = sampling["prompts"].items()
            texts = {name: sampled_continuations(run.model, Path(job["tokenizer"]), prompts, **settings) for name, prompts in sets}
            found["continuations"] = texts
        print(json.dumps(found | {"variant": job["variant"], "seed": job["seed"], "shares": job["shares"]}), flush=True)


# What the runs say


def losses_of(runs: Sequence[Mapping[str, object]]) -> Losses:
    """Return the losses of every window."""
    found: Losses = {}
    for variant in dict.fromkeys(str(run["variant"]) for run in runs):
        mine = [run["losses"] for run in runs if run["variant"] == variant]
        found[variant] = {group: np.array([losses[group] for losses in mine]) for group in mine[0]}  # type: ignore[index, attr-defined]
    return found


def compared(losses: Losses, variant: str, baseline: str, groups: Sequence[str]) -> list[float]:
    """Return by how much `variant` lies above `baseline` in the mean of `groups`, with the ends of the 95 % interval."""
    paired = [losses[variant][group] - losses[baseline][group] for group in groups]
    return difference(paired, np.full(len(groups), 1 / len(groups)))


def slope_over_distance(losses: Losses, years: Mapping[str, float], unit: float = 10.0) -> list[float]:
    """Return by how many nats the loss rises in `unit` years between training and evaluation, with the ends of the 95 % interval.

    Least squares of the loss on the absolute distance of the mean years, beside an effect of each period trained on and one of each
    period evaluated on: some are harder, and some teach more. (Luu et al. 2022, 2111.07408, fit a line for each evaluation
    period; a model that is better everywhere would tilt these.) By that, the slope is a sum over windows: its interval is that of
    `difference`, over seeds and windows. At least three periods are needed.

    Args:
        losses: by period trained on and period evaluated on.
        years: the mean year of each period.
    """
    names = list(losses)
    distance = np.array([[abs(years[one] - years[other]) for other in names] for one in names]) / unit
    centred = distance - distance.mean(axis=0) - distance.mean(axis=1, keepdims=True) + distance.mean()
    weights = centred / (centred**2).sum()
    parts = [sum(weights[row, column] * losses[one][other] for row, one in enumerate(names)) for column, other in enumerate(names)]
    return difference(parts, np.ones(len(parts)))
