"""Does selection pay? The same small model trained on as many tokens of every selection, and its held-out loss by domain against random.

    python -m benchmarks.selection_pays [--quick] [--corpus data/sample/corpus.parquet] [--seeds 0 1 2] [--shares fixed natural]

One Parquet file with columns text and domain, or a file for each domain, is cleaned, deduplicated (a near-duplicate of a held-out
document is held out or dropped with it), tokenized and embedded by the project's own steps. Every strategy then takes a share of the
tokens of the pool. With fixed shares it takes it of every domain, and all strategies train on the domains as the pool has them:
what differs is the choice within a domain. With natural shares it takes it of the whole pool, and trains on the domains as they come.

Perplexity is the project's filter, fitted on the pool, each passage scored by the model of the half that it is not in; low ones first.
INGENIOUS is one sample, not one every so many steps. A difference to random is over the same held-out windows and seeds of training,
and is negative where a strategy is better; its interval adds the variances over seeds and over windows (Student's t, degrees of
freedom by Welch and Satterthwaite). A seed is that of the model, of the order of the data, and of what a strategy draws.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.selection_pool import LENGTH, ChoiceSettings, Pool, Shares, prepare
from pipelines.manifests import Member, read_manifest
from pipelines.plan import TrainingSettings

if TYPE_CHECKING:
    from pipelines.trainer import Run

MODEL = {"hidden_size": 96, "num_layers": 3, "num_heads": 4, "intermediate_size": 264}
BATCH = 16
PHASE = {"learning_rate": 1.2e-2, "schedule": "linear", "schedule_settings": {"floor": 0.2, "warmup_fraction": 0.02}}
STRATEGIES: dict[str, tuple[str, dict[str, object], bool]] = {
    "random": ("random_order", {}, True),
    "full": ("full", {}, False),
    "facility_location": ("facility_location", {}, False),
    "facility_by_passage": ("facility_location", {"per_token": False}, False),
    "facility_of_others": ("facility_location", {"cover_itself": False}, False),
    "ingenious": ("ingenious", {}, True),
    "perplexity": ("by_score", {}, False),
}
"""The set function of each, its settings, and whether it draws: then its seed is that of the run."""


def main() -> None:
    """Train, print the tables, and end with one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, nargs="+", default=[Path("data/sample/corpus.parquet")], help="Parquet files, see above")
    parser.add_argument("--quick", action="store_true", help="a fifth of the text and of the training, two seeds")
    parser.add_argument("--seeds", type=int, nargs="+", help="seeds of training")
    parser.add_argument("--budget", type=float, default=0.25, help="share of the pool's tokens that is selected")
    parser.add_argument("--tokens", type=int, help="tokens of a run; once the selection where absent")
    parser.add_argument("--pool-bytes", type=int, help="text that is taken of the corpus, about")
    parser.add_argument("--shares", nargs="+", choices=["fixed", "natural"], default=["fixed"], help="shares of the domains")
    parser.add_argument(
        "--strategies", nargs="+", choices=STRATEGIES, default=list(STRATEGIES), help="random is what the others are compared with"
    )
    parser.add_argument("--duplicates", choices=["near", "exact", "off"], default="near", help="which duplicates are dropped from the pool")
    parser.add_argument("--parallel", type=int, default=2, help="processes at a time, of one thread each")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(train(json.loads(arguments.worker))))
        return
    console, started = Console(width=None if sys.stdout.isatty() else 150), time.monotonic()
    seeds = arguments.seeds or ([0, 1] if arguments.quick else [0, 1, 2])
    with tempfile.TemporaryDirectory(prefix="gristmill-selection-pays-") as name:
        max_bytes = arguments.pool_bytes or (3_000_000 if arguments.quick else 16_000_000)
        pool = prepare(arguments.corpus, Path(name), max_bytes=max_bytes, duplicates=arguments.duplicates)
        tokens = arguments.tokens or int(arguments.budget * sum(pool.tokens_by_domain.values()))
        print(f"pool and held-out windows after {time.monotonic() - started:.0f} s; {tokens:,} tokens a run", file=sys.stderr)
        found: dict[str, object] = {"pool": pool.figures(), "tokens": tokens, "budget": arguments.budget, "seeds": seeds}
        for shares in arguments.shares:
            jobs = [
                job_of(pool, Path(name), strategy, shares, seed=seed, budget=arguments.budget, tokens=tokens)
                for strategy in arguments.strategies
                for seed in seeds
            ]
            with ThreadPoolExecutor(arguments.parallel) as threads:
                runs = list(threads.map(measured, jobs))
            results = compared(pool, arguments.strategies, runs)
            console.print(loss_table(results, shares, tokens, len(seeds)), choice_table(results, shares))
            found[shares] = results
    print(json.dumps(found | {"seconds": round(time.monotonic() - started, 1)}))


def job_of(pool: Pool, directory: Path, strategy: str, shares: Shares, *, seed: int, budget: float, tokens: int) -> dict[str, object]:
    """Choose, and return what a training process is told."""
    function, settings, draws = STRATEGIES[strategy]
    settings = {**settings, "seed": seed} if draws else settings
    share = 1.0 if strategy == "full" else budget
    chosen = pool.chosen(ChoiceSettings(function=function, settings=settings, budget=share, shares=shares))
    return {
        "strategy": strategy,
        "seed": seed,
        "tokens": tokens,
        "choice": {**chosen.outcome.metrics, **chosen.outcome.counts, **chosen.outcome.details},
        "shares": pool.tokens_by_domain if shares == "fixed" else chosen.outcome.details["tokens"],
        "selection": str(chosen.directory),
        "shards": [str(shard.directory) for shard in pool.shards],
        "tokenizer": str(pool.tokenizer.directory),
        "held_out": str(pool.held_out),
        "out": str(directory / f"{strategy}-{shares}-{seed}"),
    }


# A process of its own


def measured(job: Mapping[str, object]) -> dict:
    """Train as `job` says in a process of its own, of one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GRISTMILL_WORKERS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.selection_pays", "--worker", json.dumps(job)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{job} failed:\n{done.stderr[-3000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    mean = float(np.mean([np.mean(losses) for losses in found["losses"].values()]))
    print(f"{job['strategy']}, seed {job['seed']}: loss {mean:.4f} (mean of domains), {found['cpu_seconds']:.0f} CPU-s", file=sys.stderr)
    return found | {"strategy": job["strategy"], "seed": job["seed"], "choice": job["choice"]}


def train(job: dict) -> dict:
    """Train in this process; return the loss of every held-out window by domain, and how often each domain's selection was read."""
    return trained(job)[1]


def trained(job: Mapping[str, object]) -> tuple[Run, dict]:
    """Train in this process; return the run at its end, and what `train` returns of it."""
    started = time.process_time()
    out = Path(str(job["out"]))
    out.mkdir()
    run = open_run(job)
    run.advance(run.num_steps, out, resumable=False)
    with np.load(str(job["held_out"])) as windows:
        losses = {domain: run.window_losses(windows[domain]).tolist() for domain in windows.files}
    epochs = {domain: round(times, 3) for domain, times in run.order.epochs().items()}
    return run, {"losses": losses, "epochs": epochs, "cpu_seconds": time.process_time() - started}


def open_run(job: Mapping[str, object]) -> Run:
    """Return a run over the selection of `job`."""
    from pipelines.trainer import Run

    shape = {"sequence_length": LENGTH, "batch_sequences": BATCH, "model": MODEL, "phases": [{**PHASE, "tokens": job["tokens"]}]}
    quiet = {"samples": {"max_new_tokens": 0}, "guards": {"on_spike": "ignore"}}
    settings = TrainingSettings.model_validate({**shape, **quiet, "seed": job["seed"], "threads": 1})
    selection = (Member(manifest=read_manifest(Path(str(job["selection"]))), name="general.parquet"),)
    shards = tuple(read_manifest(Path(shard)) for shard in job["shards"])  # type: ignore[attr-defined]
    return Run(settings, job["shares"], selection, shards, read_manifest(Path(str(job["tokenizer"]))), None)  # type: ignore[arg-type]


# Comparing


def compared(pool: Pool, strategies: Sequence[str], runs: Sequence[Mapping[str, object]]) -> dict[str, dict[str, object]]:
    """Return losses by domain, their means, and the differences to random, of each strategy; the choice is that of the first seed."""
    domains = sorted(runs[0]["losses"])  # type: ignore[arg-type]
    weights = {
        "mean": np.full(len(domains), 1 / len(domains)),
        "pool": np.array([pool.tokens_by_domain.get(domain, 0) for domain in domains], dtype=float),
    }
    weights["pool"] /= weights["pool"].sum()
    weights |= {domain: np.eye(len(domains))[place] for place, domain in enumerate(domains)}
    losses = {
        strategy: [np.array([run["losses"][domain] for run in runs if run["strategy"] == strategy]) for domain in domains]
        for strategy in strategies
    }
    found: dict[str, dict[str, object]] = {}
    for strategy, mine in losses.items():
        means = [loss.mean() for loss in mine]
        row: dict[str, object] = {"loss": {name: round(float(each @ means), 5) for name, each in weights.items()}}
        if strategy != "random" and "random" in losses:
            paired = [one - other for one, other in zip(mine, losses["random"], strict=True)]
            row["to_random"] = {name: difference(paired, each) for name, each in weights.items()}
        of_strategy = [run for run in runs if run["strategy"] == strategy]
        row |= {name: of_strategy[0][name] for name in ("choice", "epochs")}
        found[strategy] = row | {"cpu_seconds": round(float(np.mean([run["cpu_seconds"] for run in of_strategy])), 1)}
    return found


def difference(paired: Sequence[np.ndarray], weights: np.ndarray) -> list[float]:
    """Return the weighted mean of differences and the ends of its 95 % interval.

    Args:
        paired: of each domain, differences of shape ``(seeds, windows)``.
        weights: of the domains.

    The variance of the mean is that over seeds, of the weighted means, plus that over windows, of the means over seeds. It counts what
    is due to both together twice, and so is rather too wide.
    """
    from scipy.stats import t

    by_seed = sum(weight * each.mean(axis=1) for weight, each in zip(weights, paired, strict=True))
    parts = [(by_seed.var(ddof=1) / len(by_seed), len(by_seed) - 1)] if len(by_seed) > 1 else []
    for weight, each in zip(weights, paired, strict=True):
        if weight and each.shape[1] > 1:
            parts.append((weight**2 * each.mean(axis=0).var(ddof=1) / each.shape[1], each.shape[1] - 1))
    variance, mean = sum(part for part, _ in parts), float(by_seed.mean())
    freedom = variance**2 / sum(part**2 / degrees for part, degrees in parts) if variance else 1.0
    half = float(t.ppf(0.975, freedom) * np.sqrt(variance))
    return [round(value, 5) for value in (mean, mean - half, mean + half)]


# Tables


def loss_table(results: Mapping[str, Mapping[str, object]], shares: Shares, tokens: int, seeds: int) -> Table:
    """Return the losses and the differences to random, domains as rows; a star where an interval leaves out 0."""
    names = list(next(iter(results.values()))["loss"])  # type: ignore[call-overload]
    table = Table("held-out loss", *results, title=f"{tokens:,} tokens, {seeds} seeds, {shares} shares: loss, and difference to random")
    for name in names:
        cells = []
        for row in results.values():
            to_random = row.get("to_random", {}).get(name)  # type: ignore[attr-defined]
            cells.append(f"{row['loss'][name]:.4f}" + (f"\n{shown(to_random)}" if to_random else ""))
        table.add_row({"mean": "mean of domains", "pool": "as in the pool"}.get(name, name), *cells, end_section=name == "pool")
    return table


def shown(to_random: Sequence[float]) -> str:
    """Return a difference and its interval as text."""
    mean, low, high = to_random
    return f"{mean:+.4f} [{low:+.3f}, {high:+.3f}]{'' if low <= 0 <= high else ' *'}"


def choice_table(results: Mapping[str, Mapping[str, object]], shares: Shares) -> Table:
    """Return what the selections are like."""
    heads = ("passages", "selected_tokens", "tokens_per_passage", "coverage", "near_duplicates", "log_perplexity")
    table = Table("", *(head.replace("_", " ") for head in heads), "epochs", "shares of tokens", title=f"The selections, {shares} shares")
    for strategy, row in results.items():
        choice, epochs = row["choice"], row["epochs"]
        tokens = choice["tokens"]  # type: ignore[index]
        parts = ", ".join(f"{domain} {count / sum(tokens.values()):.0%}" for domain, count in tokens.items())
        low, high = min(epochs.values()), max(epochs.values())  # type: ignore[attr-defined]
        figures = [f"{choice[head]:,.0f}" if choice[head] > 10 else f"{choice[head]:.3f}" for head in heads]  # type: ignore[index]
        table.add_row(strategy, *figures, f"{low:.2f} to {high:.2f}", parts)
    return table


if __name__ == "__main__":
    main()
