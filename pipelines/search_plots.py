"""Pictures of a searched mixture: predictions of mixtures left out, and each guard against its tolerance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from pipelines.manifests import Json
from pipelines.plots import new_figure, save_figure
from pipelines.swarm import DomainFit

COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb", "#ee8866", "#44bb99", "#aaaa00")
"""Bright colours that the colour-blind tell apart (Paul Tol)."""


def plot_fits(path: Path, fits: Mapping[str, DomainFit], guards: Mapping[str, float]) -> None:
    """Write predicted against measured change of loss, each mixture predicted by the law fitted without it; guards by themselves.

    The band is half the least tolerance: the error that a guard's law may have.
    """
    parts = {"guarded": [domain for domain in fits if domain in guards], "not guarded": [domain for domain in fits if domain not in guards]}
    shown = {title: domains for title, domains in parts.items() if domains}
    figure, first = new_figure(4.4 * max(1, len(shown)), 3.6)
    first.remove()
    colours = dict(zip(fits, COLOURS * len(fits), strict=False))
    for place, (title, domains) in enumerate(shown.items(), start=1):
        axes = figure.add_subplot(1, len(shown), place)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        for domain in domains:
            fit, mine = fits[domain], fits[domain].fitted_N
            label = f"{domain}, {fit.loo_error:.4f} nats"
            axes.plot(fit.measured_N[mine], fit.left_out_N[mine], "o", markersize=4, color=colours[domain], label=label)
        ends = np.asarray([axes.get_xlim(), axes.get_ylim()])
        line = np.asarray([ends[:, 0].min(), ends[:, 1].max()])
        axes.plot(line, line, color="#888888", linewidth=1)
        bound = min((guards[domain] / 2 for domain in domains if domain in guards), default=0.0)
        axes.fill_between(line, line - bound, line + bound, color="#888888", alpha=0.15, linewidth=0)
        axes.set(xlabel="measured change of loss, nats", ylabel="predicted without the mixture, nats", title=title)
        axes.legend(frameon=False, fontsize=8)
    save_figure(figure, path)


def plot_guards(path: Path, rows: Sequence[Mapping[str, Json]]) -> None:
    """Write the predicted rise of each guarded corpus with its interval, its tolerance, and what was measured."""
    figure, axes = new_figure(height=1.3 + 0.4 * len(rows))
    for place, row in enumerate(rows):
        if row["predicted"] is not None:
            ends = [row["low"], row["high"]] if row["low"] is not None else [row["predicted"], row["predicted"]]
            axes.plot(ends, [place, place], color="#4477aa", linewidth=2)
            axes.plot([row["predicted"]], [place], "o", color="#4477aa", label=None if place else "predicted")
        if row.get("measured") is not None:
            axes.plot([row["measured"]], [place], "x", color="#1b3a5c", label=None if place else "measured")
        tolerance = row["tolerance_nats"]
        axes.plot([tolerance, tolerance], [place - 0.35, place + 0.35], color="#cc6677", label=None if place else "tolerance")
    axes.set_yticks(range(len(rows)), [str(row["domain"]) for row in rows])
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set(xlabel="change of loss, nats")
    axes.legend(frameon=False, fontsize=8)
    save_figure(figure, path)
