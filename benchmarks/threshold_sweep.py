"""Recall on planted dirt against the loss of clean documents, as thresholds move: one knob for all rules, and each rule alone.

    python -m benchmarks.threshold_sweep [--quick] [--corpus data/sample] [--plot .gristmill/threshold_sweep.png]

Strictness s: in each domain every rule of the recipe fails s times as many documents as at the recipe's threshold; 0 is off, 1 is
the recipe. A planted document counts as handled when a filter drops it or cleaning mended it (`benchmarks.planted_dirt`);
duplicates are no work of filters and are left out. Labels choose nothing at s = 1. For "recall at no more than 2 % loss" the
strictness of a domain is chosen on one half of its documents and measured on the other, both ways round. `--quick` reads one snapshot.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from benchmarks import planted_dirt as dirt
from pipelines import sweeping
from pipelines.documents import stable_fraction
from pipelines.plots import new_figure, save_figure
from pipelines.store import Store
from pipelines.sweeping import Bound, Scored, Stage

STRICTNESS = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0, 6.0, 8.0)
MAX_LOSS = 0.02
"""Of the clean documents of a domain, for the strictness that the labels choose."""
ALONE_LOSS = 0.005
"""Of the clean documents of a domain, for a rule on its own."""
MIN_SHOWN = 0.05
"""A rule that alone finds less than this of every kind is not drawn."""


@dataclass(frozen=True)
class Labelled:
    """The scores of one domain and what is known of its documents, all of shape ``(n,)``."""

    scored: Scored
    stages: Mapping[str, Stage]
    kinds: np.ndarray
    """Kind of noise; empty for a clean document, and for planted duplicates, which are not counted, `duplicate`."""
    mended: np.ndarray
    half: np.ndarray

    @property
    def clean(self) -> np.ndarray:
        return self.kinds == ""

    def bounds(self, strictness: float) -> dict[tuple[str, str], Bound]:
        """Return the threshold of each rule of the recipe at `strictness`, by stage and rule."""
        found = {}
        for stage, settings in self.stages.items():
            for rule, bound in settings.active.items():
                values = self.scored.scores[stage][rule]
                found[stage, rule] = moved(values, bound, round(strictness * int(bound.fails(values).sum())))
        return found

    def dropped(self, strictness: float) -> np.ndarray:
        """Return which documents fail a rule at `strictness`."""
        gone = np.zeros(len(self.kinds), dtype=bool)
        for (stage, rule), bound in self.bounds(strictness).items():
            gone |= bound.fails(self.scored.scores[stage][rule])
        return gone


def moved(values: np.ndarray, bound: Bound, failing: int) -> Bound:
    """Return `bound` moved so that as many of `values` as can be without exceeding `failing` fail."""
    applying = np.sort(values[~np.isnan(values)])
    if bound.keep == "at_most":
        applying = applying[::-1]
    if failing >= len(applying):
        return Bound(bound.keep, np.inf if bound.keep == "at_least" else -np.inf)
    return Bound(bound.keep, float(applying[failing]))


def main() -> None:
    """Measure, print the tables, draw the curves, and end with one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, default=Path("data/sample"))
    parser.add_argument("--quick", action="store_true", help="one snapshot instead of all")
    parser.add_argument("--plot", type=Path, default=Path(".gristmill/threshold_sweep.png"), help="where the curves are drawn")
    arguments = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        store = Store(Path(directory))
        dirt.measure(store, arguments.corpus, quick=arguments.quick)
        scored = time.process_time()
        domains = read(store, arguments.corpus)
    curve = {strictness: measured(domains, dict.fromkeys((d.scored.domain for d in domains), strictness)) for strictness in STRICTNESS}
    chosen, at_loss = at_max_loss(domains)
    alone = by_rule(domains)
    arguments.plot.parent.mkdir(parents=True, exist_ok=True)
    draw(arguments.plot, curve, alone)
    swept = time.process_time() - scored
    show(curve, chosen, at_loss, alone)
    result = {
        "max_loss": MAX_LOSS,
        "recall": rounded(at_loss["recall"]),
        "clean_loss": rounded(at_loss["loss"]),
        "recall_at_recipe": rounded(curve[1.0]["recall"]),
        "clean_loss_at_recipe": rounded(curve[1.0]["loss"]),
        "strictness": chosen,
        "plot": str(arguments.plot),
        "sweep_seconds": round(swept, 1),
        "seconds": round(time.monotonic() - started, 1),
    }
    print(json.dumps(result))


def read(store: Store, data: Path) -> list[Labelled]:
    """Join the scores that `dirt.measure` left in `store` with the labels."""
    labels = dirt._labels(data)
    keys = store.partitions("quality_scores")
    scores = {stage: [store.current(f"{stage}_scores", key) for key in keys] for stage in sweeping.STAGES}
    cleaned = {key: {"cleaned": store.current("cleaned_corpus", key)} for key in keys}
    changed, texts, domain_of = dirt._cleaned(cleaned, labels)
    decided = {stage: store.current(f"{stage}_filtered_corpus") for stage in sweeping.STAGES}
    found = []
    for domain in sorted({key.partition("|")[0] for key in keys}):
        found_there = sweeping.read_domain(domain, scores)
        scored = replace(found_there, scores={stage: dict(columns) for stage, columns in found_there.scores.items()})
        tables = [pq.read_table(m.file("scores.parquet"), columns=["id"]) for m in sweeping.of_domain(scores["quality"], domain)]
        ids = [dirt._own(name) for table in tables for name in table["id"].to_pylist()]
        if not ids:
            continue
        noise = [labels[name].noise if name in labels else "" for name in ids]
        mended = [name in labels and dirt._handled(name, labels[name], set(), changed, texts, domain_of) for name in ids]
        stages = {stage: sweeping.stage_of(manifest, domain) for stage, manifest in decided.items()}
        kinds = np.array(["duplicate" if kind in dirt.TWINS else kind for kind in noise])
        half = np.array([stable_fraction("half", name) < 0.5 for name in ids])
        found.append(Labelled(scored, stages, kinds, np.array(mended, dtype=bool), half))
    return found


def measured(domains: Sequence[Labelled], strictness: Mapping[str, float], halves: Mapping[str, bool] | None = None) -> dict[str, dict]:
    """Return recall by kind and domain (`cells`), by kind, and loss by domain, each over all domains under ``all`` too.

    Args:
        strictness: by domain.
        halves: the half of each domain that is counted; both where absent.
    """
    cells: dict[tuple[str, str], np.ndarray] = {}
    for found in domains:
        counted = np.ones(len(found.kinds), dtype=bool) if halves is None else found.half == halves[found.scored.domain]
        gone = found.dropped(strictness[found.scored.domain])
        for kind in set(found.kinds[counted]) - {"duplicate"}:
            mine = counted & (found.kinds == kind)
            handled = gone[mine] | (found.mended[mine] if kind else False)
            cells[kind, found.scored.domain] = np.array([int(handled.sum()), int(mine.sum())])
    return shares(cells)


def shares(cells: Mapping[tuple[str, str], np.ndarray]) -> dict[str, dict]:
    """Return the shares of ``[handled, all]`` counts by kind and domain; of clean documents the share is the loss."""

    def total(chosen: Sequence[np.ndarray]) -> float:
        handled, documents = np.sum(chosen, axis=0) if len(chosen) else (0, 0)
        return handled / documents if documents else float("nan")

    kinds, domains = sorted({kind for kind, _ in cells if kind}), sorted({domain for kind, domain in cells if not kind})
    recall = {kind: total([cell for (own, _), cell in cells.items() if own == kind]) for kind in kinds}
    loss = {domain: total([cells["", domain]]) for domain in domains}
    recall["all"] = total([cell for (kind, _), cell in cells.items() if kind])
    loss["all"] = total([cell for (kind, _), cell in cells.items() if not kind])
    return {"recall": recall, "loss": loss, "cells": dict(cells)}


def at_max_loss(domains: Sequence[Labelled]) -> tuple[dict[str, list[float]], dict[str, dict]]:
    """Return each domain's strictness as chosen on either half, and what it does on the other."""
    chosen: dict[str, list[float]] = {found.scored.domain: [] for found in domains}
    cells: dict[tuple[str, str], np.ndarray] = {}
    for half in (False, True):
        for found in domains:
            clean = found.clean & (found.half == half)
            held = [s for s in STRICTNESS if not clean.any() or found.dropped(s)[clean].mean() <= MAX_LOSS]
            chosen[found.scored.domain].append(max(held))
        strictness = {domain: found[-1] for domain, found in chosen.items()}
        for key, cell in measured(domains, strictness, dict.fromkeys(strictness, not half))["cells"].items():
            cells[key] = cells.get(key, 0) + cell
    return chosen, shares(cells)


def by_rule(domains: Sequence[Labelled]) -> dict[str, dict[str, float]]:
    """Return, for each rule in use, the share of each kind that it finds alone, at `ALONE_LOSS` of each domain's clean documents."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for own in domains:
        for stage, settings in own.stages.items():
            for rule, bound in settings.active.items():
                values = own.scored.scores[stage][rule]
                strict = moved(values[own.clean], bound, int(ALONE_LOSS * own.clean.sum()))
                fails = strict.fails(values)
                for kind in set(own.kinds) - {"", "duplicate"}:
                    mine = own.kinds == kind
                    counts = found.setdefault(rule, {}).setdefault(kind, np.zeros(2, dtype=np.int64))
                    counts += (int(fails[mine].sum()), int(mine.sum()))
    return {rule: {kind: float(counts[0] / counts[1]) for kind, counts in kinds.items()} for rule, kinds in found.items()}


def rounded(values: Mapping[str, float]) -> dict[str, float]:
    """Return `values` to four places."""
    return {key: round(float(value), 4) for key, value in values.items()}


def draw(path: Path, curve: Mapping[float, dict[str, dict]], alone: Mapping[str, Mapping[str, float]]) -> None:
    """Draw recall by kind and loss by domain over strictness, recall over loss, and what each rule finds alone."""
    shown = {rule: kinds for rule, kinds in alone.items() if max(kinds.values()) >= MIN_SHOWN}
    figure, first = new_figure(13, 4.6 + 0.17 * len(shown))
    first.remove()
    grid = figure.add_gridspec(2, 3, height_ratios=(4.2, max(1, 0.17 * len(shown))))
    strictness = list(curve)
    colours = [*sweeping.COLOURS, *sweeping.COLOURS]
    for place, (name, title) in enumerate((("recall", "planted documents handled, %"), ("loss", "clean documents lost, %"))):
        axes = figure.add_subplot(grid[0, place])
        keys = [key for key in curve[1.0][name] if key != "all"]
        for colour, key in zip(colours, [*keys, "all"], strict=False):
            line = {"color": "black", "linewidth": 2.2} if key == "all" else {"color": colour, "linewidth": 1.1}
            axes.plot(strictness, [100 * point[name].get(key, np.nan) for point in curve.values()], label=key, **line)
        axes.axvline(1, color="grey", linestyle=":", linewidth=1)
        axes.set_xscale("symlog", linthresh=1)
        axes.set_xticks([0, 0.5, 1, 2, 4, 8], ["off", "½", "recipe", "2", "4", "8"])
        axes.set(xlabel="strictness")
        axes.set_title(title, fontsize=10)
        axes.legend(fontsize=6, frameon=False, ncols=2)
        axes.grid(alpha=0.25)
        if name == "loss":
            axes.axhline(100 * MAX_LOSS, color="grey", linestyle="--", linewidth=0.8)
            axes.set_ylim(0, 12)
    axes = figure.add_subplot(grid[0, 2])
    for colour, kind in zip(colours, [*(k for k in curve[1.0]["recall"] if k != "all"), "all"], strict=False):
        line = {"color": "black", "linewidth": 2.2} if kind == "all" else {"color": colour, "linewidth": 1.1}
        axes.plot([100 * p["loss"]["all"] for p in curve.values()], [100 * p["recall"][kind] for p in curve.values()], **line)
    axes.axvline(100 * curve[1.0]["loss"]["all"], color="grey", linestyle=":", linewidth=1)
    axes.set(xlabel="clean documents lost, %", xlim=(0, 8))
    axes.set_title("handled over lost", fontsize=10)
    axes.grid(alpha=0.25)
    _heatmap(figure.add_subplot(grid[1, :]), shown)
    save_figure(figure, path)


def _heatmap(axes: object, shown: Mapping[str, Mapping[str, float]]) -> None:
    kinds = sorted({kind for found in shown.values() for kind in found})
    cells = np.array([[100 * found.get(kind, 0.0) for kind in kinds] for found in shown.values()]).reshape(len(shown), len(kinds))
    axes.imshow(cells, aspect="auto", cmap="Blues", vmin=0, vmax=100)  # type: ignore[attr-defined]
    axes.set_xticks(range(len(kinds)), [kind.replace("_", " ") for kind in kinds], fontsize=7)  # type: ignore[attr-defined]
    axes.set_yticks(range(len(shown)), list(shown), fontsize=6)  # type: ignore[attr-defined]
    for row, column in zip(*np.nonzero(cells >= 100 * MIN_SHOWN), strict=True):
        colour = "white" if cells[row, column] > 60 else "black"
        axes.text(column, row, f"{cells[row, column]:.0f}", ha="center", va="center", fontsize=6, color=colour)  # type: ignore[attr-defined]
    title = f"found by one rule alone, %, where it fails {100 * ALONE_LOSS:g} % of each domain's clean documents"
    axes.set_title(title, fontsize=9)  # type: ignore[attr-defined]


def show(
    curve: Mapping[float, dict[str, dict]],
    chosen: Mapping[str, list[float]],
    at_loss: dict[str, dict],
    alone: Mapping[str, Mapping[str, float]],
) -> None:
    """Print the curve, the recall at the largest loss allowed, and the best rule for each kind."""
    console = Console(width=160)
    table = Table(title="all rules at one strictness: planted documents handled, clean documents lost", title_justify="left")
    kinds = list(curve[1.0]["recall"])
    worst = "worst domain"
    for column in ("strictness", *kinds, "lost", worst):
        table.add_column(column.replace("_", " "), justify="right")
    for strictness, point in curve.items():
        domain = max((d for d in point["loss"] if d != "all"), key=lambda d, p=point: p["loss"][d])
        cells = [f"{point['recall'][kind]:.1%}" for kind in kinds]
        name = "1 (recipe)" if strictness == 1 else f"{strictness:g}"
        table.add_row(name, *cells, f"{point['loss']['all']:.2%}", f"{domain} {point['loss'][domain]:.1%}")
    console.print(table)
    title = f"at no more than {MAX_LOSS:.0%} loss: strictness chosen on one half of a domain's documents, measured on the other"
    table = Table(title=title, title_justify="left")
    kinds = [kind for kind in at_loss["recall"] if kind != "all"]
    for column in ("domain", "strictness", "lost", *kinds):
        table.add_column(column.replace("_", " "), justify="left" if column == "domain" else "right")
    for domain, strictness in chosen.items():
        counts = [at_loss["cells"].get((kind, domain)) for kind in kinds]
        cells = ["" if cell is None else f"{cell[0]}/{cell[1]}" for cell in counts]
        table.add_row(domain, " ".join(f"{s:g}" for s in strictness), f"{at_loss['loss'].get(domain, 0):.2%}", *cells)
    table.add_row("all", "", f"{at_loss['loss']['all']:.2%}", *(f"{at_loss['recall'][kind]:.1%}" for kind in kinds), style="bold")
    console.print(table)
    for kind in kinds:
        best = sorted(alone, key=lambda rule, k=kind: -alone[rule].get(k, 0.0))[:3]
        console.print(f"{kind:16} alone at {ALONE_LOSS:.1%} loss: " + ", ".join(f"{rule} {alone[rule].get(kind, 0):.0%}" for rule in best))


if __name__ == "__main__":
    main()
