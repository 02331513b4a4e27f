"""INGENIOUS (Renduchintala et al. 2023, 2305.06677, section 3), as its code was released: the baseline of submodular selection.

    points -> random partitions -> per partition: a greedy order and its gains -> importance -> a sample without replacement

The greedy order is LazierThanLazyGreedy of facility location over all pairs of a partition, asked for all points but one. Its sample
size n / budget * ln(1 / epsilon), at epsilon 0.1, is then 2: each step takes the better, by current gain, of two random points. The
importance of a point is the second-order Taylor softmax of its gain g in that order, 1 + g + g^2 / 2 over the sum in its partition.
Every so many training steps a new subset is sampled from the same importances, which is what `draw` stands for.

Faithful: partitions at random, the order with its sample size, raw gains in units of cosine, the importances at temperature 1, and
sampling by them within each partition, in proportion to its size. Different:
- Everything is seeded; the released code samples by the clock.
- A partition holds 2,500 points, not 27,700, unless `partition_size` says so.
- The point of a partition that the released order leaves out (and so never samples) comes last in the order, and can be sampled.
- Similarities are integers, so the order does not depend on the machine.

Successive sampling is the order by E_i / w_i with E_i drawn from the exponential distribution of mean 1 (Efraimidis, Spirakis 2006), so
one order holds the samples of all sizes as its prefixes.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import Field

from pipelines.embedders._grid import UNIT
from pipelines.set_functions import Order, Points, SetFunction

BLOCK_ROWS = 512
"""Rows of similarities that stand in memory a second time, as float32."""
GREEDY, SAMPLE = 1, 2
"""What random numbers are for: apart, so that another draw samples from the same greedy order."""


class Ingenious(SetFunction):
    """Samples by importance, in random partitions; target set and earlier picks are not looked at."""

    is_independent: ClassVar[bool] = True

    partition_size: int = Field(default=2_500, ge=1)
    """Points of a partition at most; the paper's experiments had 27,700. A partition needs 4 n^2 bytes and about 3 n^2 operations."""
    num_candidates: int = Field(default=2, ge=1)
    """Random points that a step of the greedy order chooses from."""
    seed: int = Field(default=0, ge=0)
    """Seed of the partitions, of the greedy orders and of the samples."""
    draw: int = Field(default=0, ge=0)
    """Which of the samples from the same importances."""

    def order(self, points: Points) -> Order:
        """Return all points, so that every prefix is a sample by importance; a gain is the point's in the greedy order, in cosines.

        The gains do not fall, and a point of gain 0 can come before others: its weight is 1.
        """
        picks, gains, quantiles = [np.zeros(0, dtype=np.int64)], [np.zeros(0)], [np.zeros(0)]
        for number, part in enumerate(self._partitions(len(points))):
            order, gained = self.greedy_order(points.embeddings[part], number)
            gained = gained / UNIT
            keys = np.random.default_rng((self.seed, SAMPLE, number, self.draw)).exponential(size=len(part)) / importance(gained)
            sampled = np.lexsort((order, keys))
            picks.append(part[order[sampled]])
            gains.append(gained[sampled])
            quantiles.append(np.arange(len(part)) / len(part))
        all_picks = np.concatenate(picks)
        merged = np.lexsort((all_picks, np.concatenate(quantiles)))
        return Order(picks=all_picks[merged], gains=np.concatenate(gains)[merged])

    def greedy_order(self, embeddings: np.ndarray, partition: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Return the stochastic greedy order of all rows of one partition and the integer gains (both int64, shape ``(n,)``)."""
        from pipelines.set_functions._stochastic_greedy import stochastic_order

        count = len(embeddings)
        picks, gains = np.empty(count, dtype=np.int64), np.empty(count, dtype=np.int64)
        draws = self.draws(count, partition)
        stochastic_order(similarity_matrix(embeddings), draws, np.arange(count), np.zeros(count, dtype=np.int32), picks, gains)
        return picks, gains

    def draws(self, count: int, partition: int) -> np.ndarray:
        """Return what `stochastic_order` chooses from (int64, shape ``(count, num_candidates)``): uniform among the points left."""
        sizes = np.arange(count, 0, -1)[:, None] - np.arange(self.num_candidates)
        return np.random.default_rng((self.seed, GREEDY, partition)).integers(0, np.maximum(sizes, 1))

    def _partitions(self, count: int) -> list[np.ndarray]:
        """Return random partitions of equal size, give or take one: each a sorted int64 array."""
        shuffled = np.random.default_rng(self.seed).permutation(count).astype(np.int64)
        number = -(-count // self.partition_size)
        return [np.sort(part) for part in np.array_split(shuffled, number)] if number else []


def importance(gains: np.ndarray) -> np.ndarray:
    """Return the second-order Taylor expansion of ``exp(gains)`` (float64, at least 1 where gains are at least 0), not normalized."""
    return 1.0 + gains + gains * gains / 2.0


def similarity_matrix(embeddings: np.ndarray) -> np.ndarray:
    """Return all integer similarities of `embeddings` (int16, shape ``(n, d)``) as int32, shape ``(n, n)``."""
    rows = embeddings.astype(np.float32)
    similarities = np.empty((len(rows), len(rows)), dtype=np.int32)
    for start in range(0, len(rows), BLOCK_ROWS):
        similarities[start : start + BLOCK_ROWS] = rows[start : start + BLOCK_ROWS] @ rows.T
    return similarities
