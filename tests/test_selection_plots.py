"""The pictures of a selection: what they show, that everything on them can be read, and that their bytes are the numbers' alone."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipelines.embedders._grid import UNIT, to_integer_rows
from pipelines.selection_plots import BINS, RolePicture, draw, figures, project
from pipelines.set_functions import Order
from pipelines.set_functions._certificate import certify, num_within, represent
from pipelines.set_functions._greedy import coverage_order
from pipelines.set_functions._neighbors import neighbor_graph

NAMES = ("coverage.png", "gains.png", "similarity.png", "shares.png", "map.png")


def picture(domain_names: tuple[str, ...], *, count: int = 400, share: float = 0.25, seed: int = 0) -> RolePicture:
    """Return the picture of a greedy selection among random points, a cluster a domain."""
    random = np.random.default_rng(seed)
    domains = random.integers(len(domain_names), size=count)
    rows = to_integer_rows(random.normal(size=(len(domain_names), 12))[domains] + 0.6 * random.normal(size=(count, 12)))
    tokens, graph = random.integers(20, 200, size=count), neighbor_graph(rows, 16)
    picks, gains = coverage_order(graph)
    order = Order(picks=picks, gains=gains / UNIT, graph=graph)
    size = num_within(tokens[picks], int(share * tokens.sum()))
    represented = represent(rows, order, size)
    similarity = represented.similarity / UNIT
    similarity[picks[:size]] = 1.0
    sums = [np.bincount(domains[points], tokens[points], minlength=len(domain_names)) for points in (np.arange(count), picks[:size])]
    shares = [(name, *(float(part[place] / part.sum()) for part in sums)) for place, name in enumerate(domain_names)]
    found = certify(rows, tokens, order, size, represented=represented, seed=seed)
    return RolePicture(found, order.gains, similarity, shares, rows, picks[:size], domains, domain_names)


@pytest.fixture(scope="module")
def roles() -> dict[str, RolePicture]:
    """Two roles, one with more domains than there are colours."""
    many = tuple(f"a-domain-of-long-name-{number}" for number in range(12))
    return {"general": picture(("wikipedia", "books", "web")), "target": picture(many, count=150, share=0.1, seed=1)}


def test_the_same_numbers_give_the_same_bytes(roles: dict[str, RolePicture], tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for out in (first, second):
        out.mkdir()
        assert draw(out, roles) == NAMES
    for name in NAMES:
        written = (first / name).read_bytes()
        assert written == (second / name).read_bytes()
        assert written.startswith(b"\x89PNG") and 4_000 < len(written) < 400_000


@pytest.mark.parametrize("chosen", [("general",), ("target",), ("general", "target")])
def test_everything_written_stands_within_the_picture_and_nothing_on_the_legend(
    roles: dict[str, RolePicture], chosen: tuple[str, ...]
) -> None:
    for name, figure in figures({role: roles[role] for role in chosen}).items():
        figure.canvas.draw()
        width, height = figure.canvas.get_width_height()
        renderer, (legend,) = figure.canvas.get_renderer(), figure.legends
        panels = [axes.get_tightbbox(renderer) for axes in figure.axes]
        for box in (*panels, legend.get_window_extent(renderer)):
            assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1, name
        assert not any(legend.get_window_extent(renderer).overlaps(box) for box in panels), name
        assert not any(first.overlaps(second) for first, second in itertools.combinations(panels, 2)), name
        assert [axes.get_title().split(":")[0] for axes in figure.axes] == list(chosen)


def test_the_pictures_hold_the_numbers(roles: dict[str, RolePicture]) -> None:
    general, found = roles["general"], figures({"general": roles["general"]})
    lines = {line.get_label(): line for line in found["coverage.png"].axes[0].get_lines()}
    assert lines["in this order"].get_ydata().tolist() == general.certificate.curve[1][1:].tolist()
    assert lines["selected"].get_xydata().tolist() == [[100 * general.certificate.selected_share, general.certificate.coverage]]
    assert (lines["bound: as many tokens"].get_ydata() == general.certificate.bound_curve[1][1:]).all()
    gain = found["gains.png"].axes[0].get_lines()[0].get_xydata()
    assert gain[0].tolist() == [1, general.gains[0]] and len(gain) <= len(general.gains)
    bars = [patch.get_height() for patch in found["similarity.png"].axes[0].patches]
    assert len(bars) == len(BINS)  # a bin each, and the bar of the selected
    assert sum(bars[:-1]) == pytest.approx(100 * (1 - len(general.picks) / len(general.similarity)))
    widths = [patch.get_width() for patch in found["shares.png"].axes[0].patches]
    assert widths == pytest.approx([100 * row[part] for part in (1, 2) for row in reversed(general.shares)])
    *points, picks = found["map.png"].axes[0].collections
    assert sum(len(dots.get_offsets()) for dots in points) == len(general.embeddings)
    assert len(picks.get_offsets()) == min(200, len(general.picks))


def test_pictures_of_extremes_are_drawn(roles: dict[str, RolePicture], tmp_path: Path) -> None:
    general = roles["general"]
    count = len(general.similarity)
    everything = replace(general, picks=np.arange(count), similarity=np.ones(count), gains=np.ones(count))
    one = replace(general, picks=general.picks[:1], gains=general.gains[:1], similarity=np.zeros(count))
    alike = replace(general, embeddings=np.zeros_like(general.embeddings))
    assert draw(tmp_path, {"everything": everything, "one": one, "alike": alike}) == NAMES


def test_the_map_is_a_principal_component_analysis() -> None:
    random = np.random.default_rng(3)
    rows = to_integer_rows(random.normal(size=(300, 6)) * [5, 3, 1, 1, 1, 1] + [2, 0, 1, 0, 0, 0])
    centred = rows - rows.mean(axis=0)
    left, values, _ = np.linalg.svd(centred, full_matrices=False)
    places, others = project(rows, rows[7:9])
    assert np.abs(places) == pytest.approx(np.abs(left[:, :2] * values[:2]), abs=0.2)
    assert (others == places[7:9]).all()
    shuffled = random.permutation(len(rows))
    assert (project(rows[shuffled], rows)[0] == places[shuffled]).all(), "nor does the sign depend on the order of the points"
