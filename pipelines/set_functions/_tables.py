"""The graph of nearest neighbours where comparing every pair costs too much: points meet in the cells of several clusterings.

A clustering (a table) assigns every point to the nearest of its centres; a point is compared with the members of the cells of its
`probes` nearest centres. Independent tables find what each of them cuts apart: at equal cost, four tables with two probes have a
higher recall than one with eight. The cells of inverted file indexes (Sivic, Zisserman 2003; Jegou, Douze, Schmid 2011), with exact
integer similarities, so that the graph depends on the seed alone.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from pipelines.embedders._grid import to_integer_rows
from pipelines.engine import Engine
from pipelines.set_functions._neighbors import TILE_ROWS, NeighborGraph, empty_lists, nearest_candidates

POINTS_PER_CELL = 500
SAMPLE_PER_CENTRE = 32
"""Points that the centres are fitted on, for each of them."""
ROUNDS = 2
"""Rounds of k-means on the sample."""
FLAT_CENTRES = 256
"""Centres that every point is compared with; more are looked for through centres of centres."""
UPPER_PROBES = 8


def clustered_graph(embeddings: np.ndarray, neighbors: int, *, tables: int = 4, probes: int = 2, seed: int = 0) -> NeighborGraph:
    """Return a graph of about the `neighbors` nearest of every row of `embeddings` (int16, shape ``(n, d)``).

    Costs about ``2 n d tables (c + POINTS_PER_CELL probes)`` floating-point operations, c being ``n / POINTS_PER_CELL`` centres up to
    `FLAT_CENTRES` and about ``10 sqrt(n / POINTS_PER_CELL)`` beyond.
    """
    columns, similarities = empty_lists(len(embeddings), neighbors)
    for table in range(tables):
        random = np.random.default_rng([seed, table])
        centres = fitted_centres(embeddings, max(1, len(embeddings) // POINTS_PER_CELL), random)
        cells = nearest_centres(embeddings, centres, probes, random).copy()
        cells[:, 0] = np.maximum(cells[:, 0], 0)  # what is near to no centre has a home, too
        for probe in range(cells.shape[1]):
            _compare(embeddings, embeddings, cells[:, 0], cells[:, probe], len(centres), columns, similarities)
    return NeighborGraph(len(embeddings), columns, similarities, is_exact=False)


def nearest_centres(embeddings: np.ndarray, centres: np.ndarray, probes: int, random: np.random.Generator) -> np.ndarray:
    """Return the `probes` nearest of `centres` for each row, int32 of shape ``(n, probes)``, -1 where there is none of positive cosine."""
    if len(centres) <= FLAT_CENTRES:
        return nearest_candidates(embeddings, centres, probes).columns
    upper = fitted_centres(centres, round(len(centres) ** 0.5), random)
    home = nearest_candidates(centres, upper, 1).columns[:, 0]
    probed = nearest_candidates(embeddings, upper, UPPER_PROBES).columns
    columns, similarities = empty_lists(len(embeddings), probes)
    for probe in range(UPPER_PROBES):
        _compare(embeddings, centres, home, probed[:, probe], len(upper), columns, similarities)
    return columns


def fitted_centres(embeddings: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    """Return `count` centres, int16 rows, by spherical k-means (Dhillon, Modha 2001) on a sample of `embeddings`."""
    sample = random.choice(len(embeddings), min(len(embeddings), count * SAMPLE_PER_CENTRE), replace=False)
    rows = embeddings[np.sort(sample)]
    centres = rows[np.sort(random.choice(len(rows), count, replace=False))]
    for _ in range(ROUNDS):
        cell = np.maximum(nearest_candidates(rows, centres, 1).columns[:, 0], 0)
        order = np.argsort(cell, kind="stable")
        filled, starts = np.unique(cell[order], return_index=True)
        centres = centres.copy()
        centres[filled] = to_integer_rows(np.add.reduceat(rows[order].astype(np.int64), starts))
    return centres


def _compare(
    points: np.ndarray,
    others: np.ndarray,
    home: np.ndarray,
    probed: np.ndarray,
    num_cells: int,
    columns: np.ndarray,
    similarities: np.ndarray,
) -> None:
    """Offer to each of `points` those of `others` whose `home` is the cell it has `probed`.

    A point probes one cell, so cells are work for different threads.
    """
    from threadpoolctl import threadpool_limits

    members, member_starts = _by_cell(home, num_cells)
    askers, asker_starts = _by_cell(probed, num_cells)

    def visit(cell: int) -> None:
        inside = members[member_starts[cell] : member_starts[cell + 1]]
        asking = askers[asker_starts[cell] : asker_starts[cell + 1]]
        _offer(points, others, asking, inside, columns, similarities)

    # The largest first, so that no thread is left with one at the end.
    by_size = np.argsort(-(np.diff(member_starts) * np.diff(asker_starts)), kind="stable")
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(Engine().num_workers) as pool:
        list(pool.map(visit, by_size.tolist()))


def _by_cell(cells: np.ndarray, num_cells: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the points sorted by cell, and where each cell starts; points without one (-1) are left out."""
    order = np.argsort(cells, kind="stable")
    starts = np.searchsorted(cells[order], np.arange(num_cells + 1))
    return order, starts


def _offer(
    points: np.ndarray, others: np.ndarray, asking: np.ndarray, inside: np.ndarray, columns: np.ndarray, similarities: np.ndarray
) -> None:
    from pipelines.set_functions._neighbor_kernels import offer_columns

    if not len(inside) or not len(asking):
        return
    transposed = others[inside].astype(np.float32).T
    for first in range(0, len(asking), TILE_ROWS):
        rows = asking[first : first + TILE_ROWS]
        block = points[rows].astype(np.float32) @ transposed
        offer_columns(block, rows, inside, columns, similarities, 0, len(rows))
