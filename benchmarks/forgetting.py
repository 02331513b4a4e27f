"""Forgetting: a small model continued on three domains one after the other, with and without replay of what it was trained on before.

    python -m benchmarks.forgetting [--corpus data/sample/corpus.parquet] [--base wiki] [--sequence code math biomed]
        [--replay 0 0.25] [--tokens 400000] [--directory DIR]

The base is trained on the domains of `--base`. Each stage trains on the next domain of the sequence; with replay, a share of its tokens
comes in equal parts from the base's domains and those before it. After each stage all held-out documents are measured, and the step
`forgetting_matrix` makes the matrix. What a run took is kept in `--directory`, where the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from benchmarks.mixture_world import FLOOR, MAX_BYTES, PROBE_RATE, RUN, RoleSettings, assign_roles, trained_base
from benchmarks.selection_pool import Pool, prepare, split_documents
from pipelines.evaluation import EvaluationSettings, evaluate
from pipelines.forgetting import FORGETTING_AUDITS, ForgettingSettings, forgetting_matrix
from pipelines.manifests import Manifest, Member, Outcome
from pipelines.plan import TrainingSettings, training_plugins
from pipelines.plugins import Settings
from pipelines.store import Build
from pipelines.training import train_mixture

RATE = 2 * PROBE_RATE
"""Learning rate of a stage: above the one that the base ends with, as a domain that is new asks for."""


class Shares(Settings):
    """The shares of a stage."""

    shares: dict[str, float]


def write_shares(settings: Shares, out: Path) -> Outcome:
    """Write ``mixture.json``, as training reads it."""
    (out / "mixture.json").write_text(json.dumps({"shares": settings.shares}))
    return Outcome()


def shares_of(base: Sequence[str], sequence: Sequence[str], stage: int, replay: float) -> dict[str, float]:
    """Return the share of each domain in stage `stage` (from 0); those of the domains replayed are equal."""
    before = [*base, *sequence[:stage]]
    return {sequence[stage]: 1 - replay, **({domain: replay / len(before) for domain in before} if replay else {})}


def run_sequence(
    pool: Pool, decisions: Manifest, base: Manifest, domains: tuple[Sequence[str], Sequence[str]], *, replay: float, tokens: int
) -> tuple[Manifest, list[Manifest], list[Manifest]]:
    """Train and measure every stage; return the matrix, the evaluations and the checkpoints."""
    old, sequence = domains
    store, roles = pool.store, {**dict.fromkeys(old, "general"), **dict.fromkeys(sequence, "target")}
    subset = store.build(Build("selected_subset", assign_roles, RoleSettings(roles=roles), inputs={"pool": pool.passages})).manifest
    shared = {"shards": tuple(s for s in pool.shards if str(s.partition).partition("|")[0] in roles), "tokenizer": pool.tokenizer}
    selection = (Member(manifest=subset, name="general.parquet"), Member(manifest=subset, name="target.parquet"))
    schedule = {"schedule": "linear", "schedule_settings": {"floor": FLOOR, "warmup_fraction": 0.02}}
    settings = TrainingSettings(phases=({"tokens": tokens, "learning_rate": RATE, **schedule},), **RUN)
    measuring = EvaluationSettings(roles=roles, threads=1, max_tokens_per_domain=60_000)
    current, evaluations, checkpoints = base, [], []
    for stage, domain in enumerate(sequence):
        name = f"{domain}-replay-{replay:g}"
        mixture = store.build(Build("domain_mixture", write_shares, Shares(shares=shares_of(old, sequence, stage, replay)), name)).manifest
        inputs = {"base": current, "mixture": mixture, "selection": selection, **shared}
        trained = Build(
            "pretrained_checkpoint", train_mixture, settings, name, inputs=inputs, plugins=training_plugins(settings), resumable=True
        )
        checkpoints.append(store.build(trained).manifest)
        measured = {"base": current, "checkpoint": checkpoints[-1], "decisions": decisions, **shared}
        evaluations.append(store.build(Build("evaluation", evaluate, measuring, name, inputs=measured)).manifest)
        current = checkpoints[-1]
    asked = ForgettingSettings(sequence=tuple(sequence))
    found = Build("forgetting", forgetting_matrix, asked, f"replay-{replay:g}", {"evaluations": tuple(evaluations)}, FORGETTING_AUDITS)
    return store.build(found).manifest, evaluations, checkpoints


def base_change(evaluations: Sequence[Manifest], old: Sequence[str]) -> float:
    """Return how far the loss of the base's own domains rose from before the first stage to the end, in nats per token."""
    first, last = (pq.read_table(manifest.file("documents.parquet")).to_pandas() for manifest in (evaluations[0], evaluations[-1]))
    mine = first["domain"].isin(list(old))
    return float((last["nll_after"][mine].sum() - first["nll_before"][mine].sum()) / first["tokens"][mine].sum())


def main() -> None:
    """Train every sequence, print the matrices, and end with one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--corpus", type=Path, nargs="+", default=[Path("data/sample/corpus.parquet")], help="Parquet files with a column text"
    )
    parser.add_argument("--base", nargs="+", default=["wiki"], help="domains of the base")
    parser.add_argument("--sequence", nargs="+", default=["code", "math", "biomed"])
    parser.add_argument("--replay", type=float, nargs="+", default=[0.0, 0.25], help="shares of a stage that are replayed")
    parser.add_argument("--tokens", type=int, default=400_000, help="of each stage")
    parser.add_argument("--base-tokens", type=int, default=1_000_000)
    parser.add_argument("--directory", type=Path, help="where artifacts are kept; a temporary one where absent")
    arguments = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 120)
    with tempfile.TemporaryDirectory(prefix="gristmill-forgetting-") as name:
        directory = arguments.directory or Path(name)
        pool = prepare(arguments.corpus, directory, max_bytes=MAX_BYTES, duplicates="near")
        decisions = split_documents(pool.store, arguments.corpus, MAX_BYTES, "near").decisions
        base = trained_base(pool.store, pool, arguments.base, arguments.base_tokens)
        results = {}
        for replay in arguments.replay:
            domains = (arguments.base, arguments.sequence)
            matrix, evaluations, runs = run_sequence(pool, decisions, base, domains, replay=replay, tokens=arguments.tokens)
            record = json.loads(matrix.file("forgetting.json").read_text())
            _show(console, record, replay)
            costs = {
                "base_change": base_change(evaluations, arguments.base),
                "seconds": sum(float(run.provenance["seconds"]) for run in runs),
            }
            results[f"{replay:g}"] = {**record["mean"], **costs, "loss": record["loss"]}
    print(json.dumps({"sequence": arguments.sequence, "tokens": arguments.tokens, "replay": results}))


def _show(console: Console, record: dict[str, list], replay: float) -> None:
    table = Table(title=f"held-out loss, nats per token; replay {replay:g}", title_justify="left")
    table.add_column("after")
    for domain in record["sequence"]:
        table.add_column(domain, justify="right")
    for after, losses in zip(["base", *record["sequence"]], record["loss"], strict=True):
        table.add_row(after, *(f"{loss:.3f}" for loss in losses))
    table.add_row("forgetting", *(f"{row['forgetting']:+.3f}" if "forgetting" in row else "" for row in record["domains"]))
    console.print(table)


if __name__ == "__main__":
    main()
