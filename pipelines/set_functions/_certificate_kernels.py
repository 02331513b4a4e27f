"""Compiled loops of the certificate: nearest picks over the edges of a graph, coverage of many prefixes at once, and the dual bound."""

from __future__ import annotations

import numpy as np

from pipelines.native import INNER, KERNEL


@KERNEL
def nearest_on_graph(
    columns: np.ndarray, similarities: np.ndarray, places: np.ndarray, nearest: np.ndarray, similarity: np.ndarray
) -> None:
    """Fill `nearest` with the place of each row's nearest pick among its edges, the earliest of equals, and `similarity` with theirs.

    Args:
        columns, similarities: the graph, int32 ``(rows, k)``.
        places: int64 ``(n,)``: of each candidate among the picks, -1 for what is no pick.
        nearest, similarity: int64 ``(rows,)``; -1 and 0 where no edge leads to a pick.
    """
    rows, width = columns.shape
    for row in range(rows):
        nearest[row], similarity[row] = -1, 0
        for number in range(width):
            if similarities[row, number] <= 0 or similarities[row, number] < similarity[row]:
                break
            place = places[columns[row, number]]
            if place >= 0 and (nearest[row] < 0 or place < nearest[row]):
                nearest[row], similarity[row] = place, similarities[row, number]


@INNER
def _least(best: np.ndarray, row: int) -> int:
    least = best[row, 0, 0]
    for ranking in range(1, best.shape[1]):
        least = min(least, best[row, ranking, 0])
    return least


@KERNEL
def raise_prefixes(block: np.ndarray, prefixes: np.ndarray, best: np.ndarray) -> None:
    """Raise the coverage of each row by all prefixes of several rankings to what the columns of `block` give.

    Args:
        block: float32 integers ``(rows, columns)``.
        prefixes: uint8 ``(columns, rankings)``: the shortest prefix of each ranking that holds the column, as an index into `best`;
            an index beyond the last says that none does.
        best: int32 ``(rows, rankings, prefixes)``: rising along the prefixes, since a longer one covers no less.
    """
    num_rankings, num_prefixes = best.shape[1], best.shape[2]
    for row in range(len(block)):
        least = _least(best, row)  # most columns are no nearer than what the shortest prefixes hold
        for column in range(block.shape[1]):
            if block[row, column] <= least:
                continue
            value = np.int32(block[row, column])
            for ranking in range(num_rankings):
                prefix = prefixes[column, ranking]
                while prefix < num_prefixes and best[row, ranking, prefix] < value:
                    best[row, ranking, prefix] = value
                    prefix += 1
            least = _least(best, row)


@KERNEL
def sum_excess(columns: np.ndarray, similarities: np.ndarray, duals: np.ndarray, values: np.ndarray) -> None:
    """Add to `values` (int64, ``(n,)``) what each candidate exceeds the rows' `duals` (int64, ``(rows,)``) by, summed over the rows."""
    for row in range(len(duals)):
        for number in range(columns.shape[1]):
            excess = similarities[row, number] - duals[row]
            if excess <= 0:
                break
            values[columns[row, number]] += excess


@KERNEL
def sum_shares(columns: np.ndarray, similarities: np.ndarray, duals: np.ndarray, shares: np.ndarray, sums: np.ndarray) -> None:
    """Fill `sums` (float64, ``(rows,)``) with the shares (float64, ``(n,)``) of the candidates that exceed the row's dual."""
    for row in range(len(duals)):
        sums[row] = 0.0
        for number in range(columns.shape[1]):
            if similarities[row, number] <= duals[row]:
                break
            sums[row] += shares[columns[row, number]]
