"""The critical mixture ratio from three short probes and a verifying run, against the paper's grid of six full ones.

    python -m benchmarks.mixture [--quick] [--corpus data/sample/corpus.parquet] [--targets code math] [--tokens 400000]

A base (0.7 M parameters) is trained on the general domains, once for all targets. For each target domain, probes at three ratios and
three tenths of the length give the estimate at the full length; one run at the estimate, of the full length, verifies it and is
one more point of the last fit. The grid is that of the CMR paper (2407.17467, section 5.1): six ratios, full length. All runs are
measured as often per token trained. The grid's critical ratio is the root of the own-share law over its ratios below 1, where they end.

Costs are CPU seconds of training and measuring, the base excluded on both sides. Errors are differences to the grid's ratio.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.mixture_world import World, build_world, built, cpu_seconds
from pipelines.critical_ratio import RatioSettings, VerificationSettings
from pipelines.manifests import Manifest
from pipelines.probe_losses import Tolerance

GENERAL = ("wiki", "speech", "book", "techdoc", "web")
RATIOS = (0.25, 0.5, 0.75)
GRID = (1 / 8, 1 / 4, 1 / 3, 1 / 2, 3 / 4, 1.0)
"""Of the CMR paper, section 5.1."""
SHORT = 0.3
"""Length of a probe, as a share of the full one."""
POINTS = 8
"""Measurements of a probe; a full run has as many per token."""
TOLERANCE = 0.05


def main() -> None:
    """Measure, print the tables, and end with one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, nargs="+", default=[Path("data/sample/corpus.parquet")], help="texts by domain")
    parser.add_argument("--quick", action="store_true", help="one target, half the tokens")
    parser.add_argument("--targets", nargs="+", help="target domains; code and math where absent, code with --quick")
    parser.add_argument("--general", nargs="+", default=list(GENERAL), help="general domains")
    parser.add_argument("--tokens", type=int, help="full length: tokens of continued pretraining that the ratio is wanted for")
    parser.add_argument("--windows", type=int, default=640, help="held-out windows of the general corpus; a quarter as many of the target")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the data")
    parser.add_argument("--parallel", type=int, default=2, help="processes at a time, of one thread each")
    parser.add_argument("--store", type=Path, help="where artifacts stay for the next time; a temporary directory where absent")
    arguments = parser.parse_args()
    tokens = arguments.tokens or (200_000 if arguments.quick else 400_000)
    targets = arguments.targets or (["code"] if arguments.quick else ["code", "math"])
    console, started = Console(width=None if sys.stdout.isatty() else 150), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gristmill-mixture-") as name:
        directory = arguments.store or Path(name)
        found = {}
        for target in targets:
            size = {"base_tokens": 5 * tokens, "windows": arguments.windows}
            world = build_world(arguments.corpus, directory, general=arguments.general, target=target, **size)
            found[target] = compared(world, tokens, arguments.seed, arguments.parallel)
            print(f"{target} after {time.monotonic() - started:.0f} s", file=sys.stderr)
    console.print(ratio_table(found, tokens), cost_table(found))
    first = found[targets[0]]
    keys = (
        "critical_ratio",
        "ci_low",
        "ci_high",
        "tolerance",
        "verified_general_delta",
        "verified",
        "cost_ratio",
        "cost_ratio_verified",
        "error",
    )
    seconds = round(time.monotonic() - started, 1)
    print(json.dumps({**{key: first[key] for key in keys}, "tokens": tokens, "targets": found, "seconds": seconds}))


def compared(world: World, tokens: int, seed: int, processes: int) -> dict[str, object]:
    """Return what the short probes say, what the run at it measured, what the grid says, and the costs."""
    store, full_points = world.pool.store, evenly(round(POINTS / SHORT))
    short = built(
        store, [world.probe(ratio, round(SHORT * tokens), evenly(POINTS), seed=seed, stop_beyond=3.0) for ratio in RATIOS], processes
    )
    settings = RatioSettings(tolerance=Tolerance(nats=TOLERANCE), tokens=tokens, on_refusal="lower_bound")
    estimate = world.estimate(settings, short)
    (run,) = built(store, [world.verification(estimate, tokens, full_points, seed=seed)], processes)
    verified = world.verified(VerificationSettings(**dict(settings)), estimate, short, run)
    grid = built(store, [world.probe(ratio, tokens, full_points, seed=seed) for ratio in GRID], processes)
    truth = read(world.estimate(settings.model_copy(update={"law": "own_share"}), grid), "critical_ratio.json")
    first, last = read(estimate, "critical_ratio.json"), read(verified, "verified_ratio.json")
    low, high = first["interval_95"] or (None, None)
    costs = {"estimate": cpu_seconds(short), "verification": cpu_seconds([run]), "grid": cpu_seconds(grid)}
    return {
        "critical_ratio": first["ratio"],
        "ci_low": low,
        "ci_high": high,
        "decision": first["decision"],
        "refusals": first["refusals"],
        "tolerance": TOLERANCE,
        "verified": last["verification"]["held"],
        "verified_general_delta": last["verification"]["measured_general_delta"],
        "predicted_general_delta": last["verification"]["predicted_general_delta"],
        "verified_ratio": last["ratio"],
        "grid_ratio": truth["estimate"],
        "grid_interval": truth["interval_95"],
        "grid_points": truth["points"],
        "points": first["points"],
        "error": difference(first["ratio"], truth["estimate"]),
        "error_verified": difference(last["ratio"], truth["estimate"]),
        "cpu_seconds": {name: round(cost, 1) for name, cost in costs.items()},
        "cost_ratio": round(costs["estimate"] / costs["grid"], 3),
        "cost_ratio_verified": round((costs["estimate"] + costs["verification"]) / costs["grid"], 3),
    }


def evenly(count: int) -> list[float]:
    """Return `count` shares of a run, the last one 1."""
    return [(number + 1) / count for number in range(count)]


def read(manifest: Manifest, name: str) -> dict:
    """Return a JSON file of an artifact."""
    return json.loads(manifest.file(name).read_text(encoding="utf-8"))


def difference(ratio: float | None, other: float | None) -> float | None:
    """Return the difference of two ratios, None where one is missing."""
    return None if ratio is None or other is None else round(ratio - other, 4)


def ratio_table(found: Mapping[str, Mapping], tokens: int) -> Table:
    """Return ratios, intervals and verification by target."""
    table = Table("target", title=f"critical ratio after {tokens:,} tokens, tolerance {TOLERANCE} nats", title_justify="left")
    for head in ("estimate", "95 % interval", "measured at it", "held", "verified", "grid", "error", "error verified"):
        table.add_column(head, justify="right")
    for target, row in found.items():
        interval = f"{row['ci_low']:.3f} to {row['ci_high']:.3f}" if row["ci_low"] is not None else "none"
        measured = f"{row['verified_general_delta']:+.4f} (predicted {row['predicted_general_delta']:+.4f})"
        ratios = [shown(row[name]) for name in ("verified_ratio", "grid_ratio", "error", "error_verified")]
        name = f"{shown(row['critical_ratio'])} ({row['decision']})"
        table.add_row(target, name, interval, measured, "yes" if row["verified"] else "no", *ratios)
    return table


def cost_table(found: Mapping[str, Mapping]) -> Table:
    """Return CPU seconds by target."""
    heads: Sequence[str] = ("estimate", "verification", "grid")
    table = Table("target", *heads, "estimate / grid", "with verification / grid", title="CPU seconds, base excluded", title_justify="left")
    for target, row in found.items():
        costs = [f"{row['cpu_seconds'][head]:.1f}" for head in heads]
        table.add_row(target, *costs, f"{row['cost_ratio']:.3f}", f"{row['cost_ratio_verified']:.3f}")
    return table


def shown(value: float | None) -> str:
    """Return a ratio as text."""
    return "none" if value is None else f"{value:.3f}"


if __name__ == "__main__":
    main()
