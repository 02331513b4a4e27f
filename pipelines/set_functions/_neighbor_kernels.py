"""Compiled loops of the neighbour graph: similarities are offered to lists of each point's nearest, which keep the best.

A list is sorted by falling similarity, then by rising column, and holds no column twice, so what it ends with does not depend on the
order of the offers. Entries beyond its end have column -1 and similarity 0. Only positive similarities are kept.
"""

from __future__ import annotations

import numpy as np

from pipelines.native import INNER, KERNEL


@INNER
def _insert(columns: np.ndarray, similarities: np.ndarray, row: int, column: int, similarity: int) -> None:
    """Put `column` into the list of `row`, which it is known to reach the end of, unless it stands there."""
    place = columns.shape[1]
    while place > 0:
        above = similarities[row, place - 1]
        if above > similarity or (above == similarity and 0 <= columns[row, place - 1] <= column):
            break
        place -= 1
    if place == columns.shape[1]:
        return
    if place > 0 and columns[row, place - 1] == column:
        return
    for moved in range(columns.shape[1] - 1, place, -1):
        columns[row, moved] = columns[row, moved - 1]
        similarities[row, moved] = similarities[row, moved - 1]
    columns[row, place] = column
    similarities[row, place] = similarity


@KERNEL
def offer_columns(
    block: np.ndarray,
    row_ids: np.ndarray,
    column_ids: np.ndarray,
    columns: np.ndarray,
    similarities: np.ndarray,
    low: int,
    high: int,
) -> None:
    """Offer every column of rows ``low..high`` of `block` (float32 integers) to its row's list; a part of the rows is one thread's."""
    last = columns.shape[1] - 1
    for place in range(low, high):
        row = row_ids[place]
        least = np.float32(max(1, similarities[row, last]))
        for number in range(block.shape[1]):
            if block[place, number] >= least:
                _insert(columns, similarities, row, column_ids[number], int(block[place, number]))
                least = np.float32(max(1, similarities[row, last]))


@KERNEL
def offer_rows(
    block: np.ndarray,
    row_ids: np.ndarray,
    column_ids: np.ndarray,
    columns: np.ndarray,
    similarities: np.ndarray,
    least: np.ndarray,
    low: int,
    high: int,
) -> None:
    """Offer every row to the lists of columns ``low..high`` of `block`: the other half of a symmetric matrix.

    `least` (float32, a value for each column) is written over.
    """
    last = columns.shape[1] - 1
    for number in range(low, high):
        least[number] = np.float32(max(1, similarities[column_ids[number], last]))
    for place in range(block.shape[0]):
        for number in range(low, high):
            if block[place, number] >= least[number]:
                point = column_ids[number]
                _insert(columns, similarities, point, row_ids[place], int(block[place, number]))
                least[number] = np.float32(max(1, similarities[point, last]))
