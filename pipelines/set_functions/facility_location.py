"""Facility location: a subset such that every point has a near one in it.

f(S) = sum over points i of max(0, max over j in S of cos(i, j)). The greedy order is within 1 - 1/e of the optimum at every
prefix (Nemhauser, Wolsey, Fisher 1978). It is computed exactly on the graph of nearest neighbours, where a pair that
is no edge counts 0; Wei, Iyer, Bilmes 2014 ("Fast multi-stage submodular maximization") give the argument for such a graph.

With a target set the represented points are the queries, in one of two ways (Kothawade et al. 2022, "PRISM", table 1): FLQMI,
f(S) = sum over queries q of max over S of cos(q, j) + eta * sum over S of max over queries of cos(j, q); or FLVMI, the sum over all points
of min(max over S of cos(i, j), eta * max over queries of cos(i, q)). What was picked earlier is covered already: only what a
pick adds to it counts (the conditional gain of the same table, nu = 1).
"""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from pipelines.embedders._grid import UNIT
from pipelines.errors import GristmillError
from pipelines.set_functions import Order, Points, SetFunction
from pipelines.set_functions._greedy import Picks, coverage_order
from pipelines.set_functions._neighbors import NeighborGraph, nearest_candidates, nearest_pick, neighbor_graph
from pipelines.set_functions._tables import clustered_graph

LARGEST_WEIGHT = 10


class FacilityLocation(SetFunction):
    """Exact greedy over the graph of nearest neighbours."""

    reads: ClassVar[tuple[str, ...]] = ("costs", "scores", "groups", "queries", "earlier")

    neighbors: int | None = Field(default=None, ge=1)
    """Edges per point; 48 where the graph is exact, else 16. At 25% of 10,000 passages of the sample greedy over all pairs covers 0.7525,
    over 96 edges 0.7526, over 48 edges 0.7523, over 32 edges 0.7516."""
    exact_up_to: int = Field(default=100_000, ge=0)
    """Points up to which every pair is compared; beyond, points are compared within the cells of several clusterings."""
    tables: int = Field(default=4, ge=1)
    """Clusterings."""
    probes: int = Field(default=2, ge=1)
    """Cells of each clustering that a point is compared with."""
    seed: int = 0
    """Of the clusterings."""
    weights: Literal["equal", "tokens", "low_score", "high_score"] = "equal"
    """What covering a point counts: 1, its tokens, or from 1 to 10 by the decile of its score within the domain, more for a low (or high)
    score."""
    cover_itself: bool = True
    """Whether a pick covers itself. Without, a passage is worth what it says of others, as unseen text is one of the others: text
    that resembles nothing is then worth nothing. The sum is over i of the maximum over j in S other than i, and is submodular, too."""
    per_token: bool = True
    """Whether the gain by token decides, where tokens are known, or the gain by passage. Under a budget of tokens the first covers more,
    and short passages come earlier."""
    towards: Literal["flqmi", "flvmi"] = "flqmi"
    """What is represented where there is a target set: the queries, or all points as far as queries are near them."""
    eta: float = Field(default=1.0, ge=0)
    """Weight of the queries' side, see above; kept to three digits in FLQMI."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the exact graph and the order are computed; the bytes are the same. `auto` takes a GPU where there is one."""

    def order(self, points: Points) -> Order:
        """Order by marginal coverage; a point that improves no point's coverage is left out."""
        on_gpu = self._on_gpu()
        graph = self.graph(points.embeddings)
        settings = {"costs": points.costs if self.per_token else None}
        if points.queries is not None and self.towards == "flqmi":
            return self._towards_queries(points, graph, settings)
        represented = graph if self.cover_itself else _without_itself(graph)
        if points.queries is not None:
            represented = _clipped(represented, self.eta * nearest_pick(points.embeddings, points.queries)[1])
        covered = nearest_pick(points.embeddings, points.earlier)[1] if points.earlier is not None else None
        picks, gains = self._picks(represented, on_gpu=on_gpu, covered=covered, weights=self._weights(points), **settings)
        return Order(picks=picks, gains=gains / UNIT, graph=graph)

    def graph(self, embeddings: np.ndarray) -> NeighborGraph:
        """Return the graph of nearest neighbours of `embeddings` (int16, shape ``(n, d)``)."""
        on_gpu = self._on_gpu()
        exact = on_gpu or len(embeddings) <= self.exact_up_to
        neighbors = self.neighbors or (48 if exact else 16)
        if on_gpu:
            from pipelines.set_functions._rounds import neighbor_graph_on

            return neighbor_graph_on("cuda", embeddings, embeddings, neighbors)
        if exact:
            return neighbor_graph(embeddings, neighbors)
        return clustered_graph(embeddings, neighbors, tables=self.tables, probes=self.probes, seed=self.seed)

    def _picks(self, graph: NeighborGraph, *, on_gpu: bool, **settings: np.ndarray | None) -> Picks:
        if not on_gpu:
            return coverage_order(graph, **settings)
        from pipelines.set_functions._rounds import coverage_order_in_rounds

        return coverage_order_in_rounds(graph, device="cuda", **settings)

    def _towards_queries(self, points: Points, graph: NeighborGraph, settings: dict[str, np.ndarray | None]) -> Order:
        """Order by FLQMI: the rows of the graph are the queries, all candidates their neighbours."""
        if not len(points.queries):
            raise GristmillError("the target set holds no passage; name domains in selection.towards that hold kept training documents")
        nearest = nearest_candidates(points.queries, points.embeddings, min(len(points), MOST_PER_QUERY))
        thousandths = round(self.eta * 1000)
        bonus = nearest_pick(points.embeddings, points.queries)[1] * thousandths
        covered = nearest_pick(points.queries, points.earlier)[1] if points.earlier is not None else None
        weights = np.full(len(points.queries), 1000, dtype=np.int64)
        picks, gains = coverage_order(nearest, weights=weights, covered=covered, bonus=bonus, **settings)
        return Order(picks=picks, gains=gains / (1000 * UNIT), graph=graph)

    def _weights(self, points: Points) -> np.ndarray | None:
        """Return what each point counts, int64 from 1 to `LARGEST_WEIGHT`; a point without a score counts 1."""
        if self.weights == "equal":
            return None
        if self.weights == "tokens":
            return points.costs
        if points.scores is None:
            raise GristmillError(
                f"facility_location: weights {self.weights!r} need a score; name a rule in selection.score, e.g. perplexity.log_perplexity"
            )
        groups = points.groups if points.groups is not None else np.zeros(len(points), dtype=np.int64)
        weights = np.ones(len(points), dtype=np.int64)
        for group in np.unique(groups):
            mine = np.flatnonzero((groups == group) & ~np.isnan(points.scores))
            ranked = mine[np.argsort(points.scores[mine], kind="stable")]
            decile = LARGEST_WEIGHT * np.arange(len(ranked)) // max(1, len(ranked))
            weights[ranked] = LARGEST_WEIGHT - decile if self.weights == "low_score" else decile + 1
        return weights

    def _on_gpu(self) -> bool:
        if self.device == "cpu":
            return False
        import torch

        there = torch.cuda.is_available()
        if self.device == "cuda" and not there:
            raise GristmillError("facility_location: device 'cuda' is asked for and there is none; set device to auto or cpu")
        return there


MOST_PER_QUERY = 256
"""Candidates that represent a query at most."""


def _without_itself(graph: NeighborGraph) -> NeighborGraph:
    """Return `graph` without the edge of each point to itself."""
    itself = graph.columns == np.arange(graph.num_rows)[:, None]
    order = np.argsort(itself, axis=1, kind="stable")  # the edge goes to the end of its row
    columns, similarities = (np.take_along_axis(values, order, axis=1) for values in (graph.columns, graph.similarities))
    found = itself.any(axis=1)
    columns[found, -1], similarities[found, -1] = -1, 0
    return NeighborGraph(graph.num_points, columns, similarities, is_exact=graph.is_exact)


def _clipped(graph: NeighborGraph, limits: np.ndarray) -> NeighborGraph:
    """Return `graph` with no similarity of a row above its limit; the order within a row stays falling."""
    clipped = np.minimum(graph.similarities, limits.astype(np.int64)[:, None]).astype(np.int32)
    return NeighborGraph(graph.num_points, np.where(clipped > 0, graph.columns, -1), clipped, is_exact=graph.is_exact)
