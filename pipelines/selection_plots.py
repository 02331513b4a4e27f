"""Pictures of a selection: what it covers, what each pick added, how near the rest is, which domains it takes, and where its picks lie.

One panel a role. The same numbers give the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipelines.plots import new_figure, save_figure
from pipelines.set_functions._certificate import Certificate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DARK, MIDDLE, LIGHT = "#1b3a5c", "#4477aa", "#b8cfe5"
RANDOM, BOUND = "#888888", "#cc6677"
DOMAINS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb", "#ee8866", "#44bb99", "#aaaa00")
"""Bright colours that the colour-blind tell apart (Paul Tol); they come round again after ten domains."""
SMALL = 8
PANEL_WIDTH = 5.2
KEY_WIDTH, LETTER_WIDTH, LINE_HEIGHT = 0.65, 0.065, 0.17
"""Of the legend, in inches."""
GAIN_POINTS = 1_000
SMALLEST_GAIN = 0.01
"""Gains below this share of the median one, of which a long tail is made, are off the picture."""
MAP_POINTS, LEAST_PICKS = 5_000, 200
"""Points of the map, and picks that it shows at least; where there are more, as large a share of them as of the points."""
BINS = np.linspace(0, 1, 51)


@dataclass(frozen=True)
class RolePicture:
    """What is drawn of one role with n candidates."""

    certificate: Certificate
    gains: np.ndarray
    """float64: of each pick of the whole order, by rank; at least one."""
    similarity: np.ndarray
    """float64, shape ``(n,)``: cosine of each point to its representative."""
    shares: Sequence[tuple[str, float, float]]
    """Domain, its share of the tokens before, and after."""
    embeddings: np.ndarray
    """int16, shape ``(n, d)``."""
    picks: np.ndarray
    """int64: the selected points."""
    domains: np.ndarray
    """int64, shape ``(n,)``: place of each point's domain in `domain_names`."""
    domain_names: Sequence[str]

    @property
    def is_selected(self) -> np.ndarray:
        """bool, shape ``(n,)``."""
        selected = np.zeros(len(self.similarity), dtype=bool)
        selected[self.picks] = True
        return selected


def draw(out: Path, roles: Mapping[str, RolePicture]) -> tuple[str, ...]:
    """Write the pictures of all `roles` into `out` and return their names."""
    drawn = figures(roles)
    for name, figure in drawn.items():
        save_figure(figure, out / name)
    return tuple(drawn)


def figures(roles: Mapping[str, RolePicture]) -> dict[str, Figure]:
    """Return the pictures by file name."""
    names = sorted({name for picture in roles.values() for name in picture.domain_names})
    colours = {name: DOMAINS[number % len(DOMAINS)] for number, name in enumerate(names)}
    tallest = max(len(picture.shares) for picture in roles.values())
    panels = {
        "coverage.png": (_coverage, 3.3),
        "gains.png": (_gains, 3.0),
        "similarity.png": (_similarity, 3.0),
        "shares.png": (partial(_shares, num_rows=tallest), 1.1 + 0.42 * tallest),
        "map.png": (partial(_map, colours=colours), 4.3),
    }
    return {name: _figure(roles, panel, height) for name, (panel, height) in panels.items()}


def _figure(roles: Mapping[str, RolePicture], panel: Callable[[Axes, RolePicture], None], height: float) -> Figure:
    """Return a figure of panels side by side, one a role."""
    figure, first = new_figure(PANEL_WIDTH * len(roles), height)
    first.remove()
    for place, (role, picture) in enumerate(roles.items(), start=1):
        axes = figure.add_subplot(1, len(roles), place)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        panel(axes, picture)
        axes.set_title(f"{role}: {axes.get_title()}", fontsize=9)
        axes.tick_params(labelsize=SMALL)
        axes.xaxis.label.set_size(SMALL + 1)
        axes.yaxis.label.set_size(SMALL + 1)
    _legend(figure)
    return figure


def _legend(figure: Figure) -> None:
    """Put one legend of all panels below them and make room for it; its dots are full and large, whatever those of the panels are."""
    from matplotlib.collections import PathCollection

    named = {label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    named = dict(sorted(named.items(), key=lambda item: item[0] == "selected"))  # last
    widest = KEY_WIDTH + LETTER_WIDTH * max(map(len, named))
    columns = max(1, min(len(named), int(figure.get_figwidth() / widest)))
    figure.set_figheight(figure.get_figheight() + LINE_HEIGHT * -(-len(named) // columns))
    place = {"loc": "outside lower center", "ncols": columns, "fontsize": SMALL, "frameon": False}
    legend = figure.legend(list(named.values()), list(named), **place)
    for handle in legend.legend_handles:
        if isinstance(handle, PathCollection):
            handle.set(alpha=1, sizes=[26])


def _coverage(axes: Axes, picture: RolePicture) -> None:
    """Draw coverage against the share of tokens, of the order and of random selections, below the bound."""
    found = picture.certificate
    (shares, covered), (random_shares, random), (bound_shares, bound) = (
        (100 * curve[0][1:], curve[1][1:]) for curve in (found.curve, found.random_curve, found.bound_curve)
    )
    share, same = 100 * found.selected_share, 100 * found.random_share_for_same_coverage
    axes.fill_between(bound_shares, bound, np.interp(bound_shares, shares, covered), color=BOUND, alpha=0.10, linewidth=0)
    axes.plot(bound_shares, bound, color=BOUND, linewidth=1.2, label="bound: as many tokens")
    axes.plot([share], [found.upper_bound], "_", color=BOUND, markersize=14, markeredgewidth=2, label="bound: as many passages, too")
    axes.plot(shares, covered, color=DARK, linewidth=1.8, label="in this order")
    axes.plot(random_shares, random, color=RANDOM, linewidth=1.4, linestyle="--", label="random")
    axes.plot([share, max(share, same)], [found.coverage] * 2, color=MIDDLE, linewidth=1, marker="|", markevery=[1], label="same coverage")
    axes.plot([share], [found.coverage], "o", color=DARK, markersize=4.5, label="selected")
    axes.axvline(share, color=DARK, linewidth=0.8, linestyle=":")
    lowest = float(min(covered.min(), random.min()))
    axes.set(xlim=(0, 100), ylim=(lowest - 0.06 * (1 - lowest), 1.02), xlabel="tokens (%)", ylabel="mean cosine to nearest selected")
    axes.set_title(
        f"{share:.0f}% of the tokens cover {found.coverage:.3f}, random {found.coverage_random:.3f};\nrandom needs {same:.0f}% for as much"
    )


def _gains(axes: Axes, picture: RolePicture) -> None:
    """Draw the gain of each pick by rank, both logarithmic, and where the selection ends."""
    last, selected = len(picture.gains), len(picture.picks)
    ranks = np.unique(np.geomspace(1, last, GAIN_POINTS).astype(np.int64))
    ranks = ranks[picture.gains[ranks - 1] > 0]
    gains = picture.gains[ranks - 1]
    axes.plot(ranks, gains, color=DARK, linewidth=1.4, label="gain")
    axes.axvline(selected, color=DARK, linewidth=0.8, linestyle=":", label="last selected")
    axes.set(xscale="log", yscale="log", xlabel="rank", ylabel="gain of the pick")
    if len(gains):
        axes.set_ylim(max(gains.min(), SMALLEST_GAIN * np.median(gains)) / 1.5, 1.5 * gains.max())
    axes.set_title(f"{selected:,} of {len(picture.similarity):,} passages selected,\n{last:,} add something")


def _similarity(axes: Axes, picture: RolePicture) -> None:
    """Draw how near passages are to their representative: those left out as a histogram, the selected as a bar at 1."""
    selected = picture.is_selected
    left_out = np.clip(picture.similarity[~selected], 0, 1)
    percent = np.histogram(left_out, BINS)[0] * 100 / len(selected)
    share = 100 * selected.mean()
    top = 1.3 * max(percent.max(), 1.0)
    axes.bar(BINS[:-1], percent, width=np.diff(BINS), align="edge", color=LIGHT, edgecolor=MIDDLE, linewidth=0.4, label="left out")
    axes.bar([1.0], [min(share, top)], width=0.02, align="edge", color=DARK, label="selected (themselves)")
    axes.text(1.0, min(share, top), f"{share:.0f}% ", ha="right", va="top" if share >= top else "bottom", fontsize=SMALL, color=DARK)
    if len(left_out):
        middle = float(np.median(left_out))
        axes.axvline(middle, color=BOUND, linewidth=1, label="median of these")
    axes.set(xlim=(0, 1.03), ylim=(0, top), xlabel="cosine to the representative", ylabel="passages (%)")
    axes.set_title(f"half of the {len(left_out):,} left out are nearer than {middle:.2f}" if len(left_out) else "none is left out")


def _shares(axes: Axes, picture: RolePicture, *, num_rows: int) -> None:
    """Draw the share of tokens of each domain before and after, with room for `num_rows` domains."""
    rows = list(reversed(picture.shares))
    places = np.arange(len(rows))
    for offset, part, colour, name in ((0.19, 1, LIGHT, "before"), (-0.19, 2, DARK, "after")):
        percent = [100 * row[part] for row in rows]
        bars = axes.barh(places + offset, percent, height=0.36, color=colour, label=f"{name} the selection")
        axes.bar_label(bars, [f"{value:.1f}" for value in percent], padding=3, fontsize=SMALL)
    axes.set_yticks(places, [row[0] for row in rows])
    axes.set_ylim(len(rows) - num_rows - 0.5, len(rows) - 0.5)
    axes.set_xlim(0, max(10.0, 115 * max(max(row[1:]) for row in rows)))
    axes.set_xlabel("tokens (%)")
    axes.grid(visible=False)
    axes.set_title("share of tokens by domain")


def _map(axes: Axes, picture: RolePicture, *, colours: Mapping[str, str]) -> None:
    """Draw the points on their two widest directions, light by domain, and the picks over them, dark."""
    points = _spaced(len(picture.embeddings), MAP_POINTS)
    num_picks = max(LEAST_PICKS, len(picture.picks) * len(points) // len(picture.embeddings))
    picks = np.sort(picture.picks)[_spaced(len(picture.picks), num_picks)]
    places, picked_places = project(picture.embeddings[points], picture.embeddings[picks])
    for number, name in enumerate(picture.domain_names):
        mine = places[picture.domains[points] == number]
        if len(mine):
            axes.scatter(*mine.T, s=9, color=colours[name], alpha=0.4, linewidths=0, label=name)
    axes.scatter(*picked_places.T, s=4, color="#111111", linewidths=0, label="selected")
    axes.set(xticks=[], yticks=[], aspect="equal")
    axes.spines[:].set_visible(False)
    axes.grid(visible=False)
    axes.set_title(f"{len(picks):,} of {len(picture.picks):,} selected, {len(points):,} of {len(picture.embeddings):,} passages")


def _spaced(count: int, most: int) -> np.ndarray:
    """Return at most `most` of ``0..count - 1`` at equal distances (int64)."""
    return np.linspace(0, count - 1, min(count, most)).astype(np.int64) if count else np.zeros(0, dtype=np.int64)


def project(points: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the places of `points` and `others` (int16 rows) on the first two principal components of `points` (float64, ``(n, 2)``).

    The matrix whose eigenvectors these are, n^2 times the covariance, holds integers below 2**53 up to 20,000 points: the same on
    every machine. Of the two signs of a component the one is taken that makes its largest entry positive.
    """
    from threadpoolctl import threadpool_limits

    rows = points.astype(np.float64)
    sums = rows.sum(axis=0)
    with threadpool_limits(1, user_api="blas"):
        _, vectors = np.linalg.eigh(len(rows) * (rows.T @ rows) - np.outer(sums, sums))
        axes = vectors[:, ::-1][:, :2]
        axes = axes * np.where(axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])] < 0, -1.0, 1.0)
        middle = sums / len(rows)
        return tuple(np.round((some.astype(np.float64) - middle) @ axes, 1) for some in (points, others))
