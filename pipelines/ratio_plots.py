"""Pictures of a critical ratio: loss against ratio, general against target loss along training, and the ratio against tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pipelines.mixing_laws import FittedLaw, two_shares
from pipelines.plots import new_figure, save_figure
from pipelines.probe_losses import ProbeLosses, ProbePoints, ProbeRun
from pipelines.ratio_estimate import RatioEstimate

NORMAL_95 = 1.96
TICKS = 4
"""Labels of lengths that stand beside each other."""
PICTURES = ("critical_ratio.png", "trajectories.png", "critical_ratio_by_tokens.png")


def plot_all(out: Path, losses: ProbeLosses, points: ProbePoints, found: RatioEstimate, ratio: float, verified: ProbeRun | None) -> None:
    """Write the three pictures; the run `verified` is in another colour."""
    plot_ratio(out / PICTURES[0], losses, points, found, ratio, verified)
    plot_trajectories(out / PICTURES[1], losses, verified)
    plot_by_tokens(out / PICTURES[2], found)


def plot_ratio(path: Path, losses: ProbeLosses, points: ProbePoints, found: RatioEstimate, ratio: float, verified: ProbeRun | None) -> None:
    """Write the change of general loss against the target share: points, law, bands of the bootstrap, tolerance and ratio.

    Runs that ended before `points` are hollow: they stand where they ended.
    """
    figure, axes = new_figure()
    grid = np.linspace(0.0, min(1.0, float(losses.ratios.max(initial=0.0)) + 0.1), 101)
    ended = [n for n, run in enumerate(losses.runs) if run not in points.runs]
    if ended:
        levels = [float(losses.course(n, "general")[1][-1]) for n in ended]
        axes.plot(losses.ratios[ended], levels, "o", color="tab:blue", markerfacecolor="none", markersize=4, label="shorter probes")
    if found.fitted:
        drawn = _curves(found.fitted, grid, found.measured_tokens)
        axes.fill_between(grid, *np.quantile(drawn, [0.025, 0.975], axis=0), color="tab:blue", alpha=0.2, linewidth=0)
        axes.plot(grid, drawn[0], color="tab:blue", label=found.law.replace("_", " "))
    for mine, colour, label in ((False, "tab:blue", "probes"), (True, "tab:orange", "verification")):
        shown = np.asarray([_is(run, verified) == mine for run in points.runs], dtype=bool)
        if shown.any():
            spread = NORMAL_95 * np.nan_to_num(points.errors[shown])
            axes.errorbar(points.ratios[shown], points.general[shown], yerr=spread, fmt="o", color=colour, markersize=4, label=label)
    axes.axhline(found.tolerance, color="tab:red", linewidth=1, linestyle="--", label="tolerance")
    wanted = f" for {found.tokens:,.0f} tokens" if found.extrapolation else ""
    axes.axvline(ratio, color="tab:green", linewidth=1.2, label=f"ratio {ratio:.3f}{wanted}")
    if found.interval:
        axes.axvspan(*found.interval, color="tab:green", alpha=0.15)
    low, high = min(0.0, points.general.min(initial=0.0)), max(2 * found.tolerance, points.general.max(initial=0.0))
    axes.set(
        xlabel="share of target tokens R",
        ylabel="change of general loss, nats",
        title=f"after {points.tokens:,} tokens",
        ylim=(low - 0.1 * (high - low), high + 0.1 * (high - low)),
    )
    axes.legend(frameon=False, fontsize=8)
    save_figure(figure, path)


def plot_trajectories(path: Path, losses: ProbeLosses, verified: ProbeRun | None) -> None:
    """Write general against target change of loss along training, a line a ratio (2407.17467, figure 1)."""
    from matplotlib import colormaps

    figure, axes = new_figure()
    ratios = sorted({run.ratio for run in losses.runs})
    for index, run in enumerate(losses.runs):
        general, target = losses.course(index, "general")[1], losses.course(index, "target")[1]
        colour = "tab:orange" if _is(run, verified) else colormaps["viridis"](ratios.index(run.ratio) / max(1, len(ratios)))
        first = all(other.ratio != run.ratio for other in losses.runs[:index])
        label = f"R = {run.ratio:.2f}" if first or _is(run, verified) else None
        axes.plot(np.append(0.0, target), np.append(0.0, general), marker="o", markersize=3, color=colour, label=label)
    axes.set(xlabel="change of target loss, nats", ylabel="change of general loss, nats")
    axes.legend(frameon=False, fontsize=8)
    save_figure(figure, path)


def plot_by_tokens(path: Path, found: RatioEstimate) -> None:
    """Write the critical ratio against the tokens of training, with its band; the tokens asked for are marked."""
    from matplotlib.ticker import EngFormatter, NullFormatter

    figure, axes = new_figure()
    rows = [row for row in found.by_tokens if row["bracketed"] and row["estimate"] is not None]
    tokens, ratios, low, high = (np.asarray([row[key] for row in rows], dtype=float) for key in ("tokens", "estimate", "low", "high"))
    axes.fill_between(tokens, low, high, color="tab:blue", alpha=0.2, linewidth=0)
    axes.plot(tokens, ratios, marker="o", markersize=4, color="tab:blue", label="measured")
    axes.axvline(found.tokens, color="tab:green", linewidth=1.2, label=f"asked for: {found.tokens:,.0f} tokens")
    if found.extrapolation and found.interval:
        spread = [[max(0.0, found.value - found.interval[0])], [max(0.0, found.interval[1] - found.value)]]
        how = "by the law" if found.extrapolation.by_law else "by a line in log tokens"
        axes.errorbar([found.tokens], [found.value], yerr=spread, fmt="s", color="tab:green", markersize=4, label=how)
        if len(rows):
            last = [tokens[-1], found.tokens]
            axes.plot(last, [ratios[-1], found.value], color="tab:blue", linestyle=":")
            axes.fill_between(last, [low[-1], found.interval[0]], [high[-1], found.interval[1]], color="tab:blue", alpha=0.1, linewidth=0)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_minor_formatter(NullFormatter())
    shown = tokens[:: max(1, len(tokens) // 2)] if len(tokens) > TICKS else tokens
    axes.set_xticks(sorted({*shown.tolist(), found.tokens}))
    axes.set(xlabel="tokens of continued pretraining", ylabel="critical ratio", ylim=(0.0, 1.0))
    axes.legend(frameon=False, fontsize=8)
    save_figure(figure, path)


def _is(run: ProbeRun, verified: ProbeRun | None) -> bool:
    return verified is not None and (run.ratio, run.seed) == (verified.ratio, verified.seed)


def _curves(fitted: list[FittedLaw], grid: np.ndarray, tokens: float) -> np.ndarray:
    """Return the law of every row along `grid`, shape (D, len(grid))."""
    return np.stack([law.predict(two_shares(grid), np.full(len(grid), tokens)) for law in fitted])
