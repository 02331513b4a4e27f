"""The graph and the greedy order of coverage in torch: the same bytes as `_neighbors` and `_greedy`, in parallel, on a GPU too.

Greedy in rounds. Two candidates conflict where they share a point whose coverage both would raise. A candidate that beats
(by gain over cost, then by lower index) every candidate it conflicts with has the gain that sequential greedy would find when it gets
there, so all such candidates are taken in one round; sorted by key, then index, the picks are the sequential order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pipelines.set_functions._greedy import Picks
from pipelines.set_functions._neighbors import NeighborGraph

if TYPE_CHECKING:
    import torch

TILE_ROWS, TILE_COLUMNS = 4096, 32_768


def neighbor_graph_on(device: str, points: np.ndarray, candidates: np.ndarray, neighbors: int) -> NeighborGraph:
    """Return the exact graph of the `neighbors` nearest rows of `candidates` (int16) for every row of `points`, computed on `device`."""
    import torch

    if torch.backends.cuda.matmul.allow_tf32:
        raise ValueError("TF32 rounds integer similarities; set torch.backends.cuda.matmul.allow_tf32 to False")
    count = len(candidates)
    columns = np.full((len(points), neighbors), -1, dtype=np.int32)
    similarities = np.zeros((len(points), neighbors), dtype=np.int32)
    others = torch.from_numpy(np.ascontiguousarray(candidates)).to(device)
    for first in range(0, len(points), TILE_ROWS):
        rows = torch.from_numpy(np.ascontiguousarray(points[first : first + TILE_ROWS])).to(device).float()
        best = torch.zeros((len(rows), 0), dtype=torch.int64, device=device)
        for start in range(0, count, TILE_COLUMNS):
            block = (rows @ others[start : start + TILE_COLUMNS].float().T).long()
            ids = torch.arange(start, start + block.shape[1], device=device)
            keys = torch.where(block > 0, block * count + (count - 1 - ids), -1)  # a similarity, then the lower index
            best = torch.cat([best, keys.topk(min(neighbors, keys.shape[1]), dim=1).values], dim=1)
            best = best.topk(min(neighbors, best.shape[1]), dim=1).values
        kept = best.cpu().numpy()
        there = kept >= 0
        part = slice(first, first + len(kept)), slice(0, kept.shape[1])
        columns[part] = np.where(there, count - 1 - kept % count, -1)
        similarities[part] = np.where(there, kept // count, 0)
    return NeighborGraph(count, columns, similarities)


def coverage_order_in_rounds(
    graph: NeighborGraph,
    *,
    weights: np.ndarray | None = None,
    covered: np.ndarray | None = None,
    bonus: np.ndarray | None = None,
    costs: np.ndarray | None = None,
    device: str = "cpu",
) -> Picks:
    """Return the order that `coverage_order` returns, found on `device`."""
    import torch

    def on_device(values: np.ndarray | None, size: int, fill: int, dtype: torch.dtype) -> torch.Tensor:
        if values is None:
            return torch.full((size,), fill, dtype=dtype, device=device)
        return torch.from_numpy(np.ascontiguousarray(values)).to(device, dtype)

    columns = torch.from_numpy(graph.columns).to(device).long().clamp(min=0)
    similarities = torch.from_numpy(graph.similarities).to(device).long()
    weight = on_device(weights, graph.num_rows, 1, torch.int64)[:, None]
    cover = on_device(covered, graph.num_rows, 0, torch.int64)[:, None]
    price = on_device(costs, graph.num_points, 1, torch.float64)
    gains = on_device(bonus, graph.num_points, 0, torch.int64)
    left = torch.ones(graph.num_points, dtype=torch.bool, device=device)
    alive = (similarities > cover) & (weight > 0)
    gains = gains.index_add(0, columns[alive], ((similarities - cover) * weight)[alive])
    picks, picked = [], []
    while bool((gains[left] > 0).any()):
        winners = _winners(columns, alive, gains / price, left & (gains > 0))
        picks.append(winners)
        picked.append(gains[winners])
        left[winners] = False
        chosen = torch.zeros_like(left)
        chosen[winners] = True
        raised = torch.where(alive & chosen[columns], similarities, cover).amax(dim=1, keepdim=True)
        lost = (torch.minimum(similarities, raised) - cover) * weight
        gains = gains.index_add(0, columns[alive], -lost[alive])
        alive &= similarities > raised
        cover = torch.maximum(cover, raised)
    if not picks:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    points, found = torch.cat(picks).cpu().numpy(), torch.cat(picked).cpu().numpy()
    prices = np.ones(graph.num_points) if costs is None else costs.astype(np.float64)
    order = np.lexsort((points, -(found / prices[points])))
    return points[order], found[order]


def _winners(columns: torch.Tensor, alive: torch.Tensor, keys: torch.Tensor, open_: torch.Tensor) -> torch.Tensor:
    """Return the open candidates that are the best one at each point they would raise."""
    import torch

    count = len(keys)
    key = torch.where(alive, keys[columns], -1.0)
    best = key.amax(dim=1, keepdim=True)
    first = torch.where(alive & (key == best), columns, count).amin(dim=1)
    won = torch.bincount(first[first < count], minlength=count)
    wanted = torch.bincount(columns[alive], minlength=count)
    return torch.nonzero(open_ & (won == wanted)).flatten()
