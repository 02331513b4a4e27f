"""Submodlib: its set functions (https://github.com/decile-team/submodlib), on random partitions, each with a dense kernel.

Partitions because a kernel costs 8 n^2 bytes and the greedy about n^2.6; that is also how INGENIOUS (Renduchintala et al. 2023)
applies it. A child process computes, because submodlib holds the interpreter's lock while it maximizes.
Measured on 10,000 points: partitions of 2,500 keep half of the gain over random that one order over all points has.
"""

from __future__ import annotations

import warnings
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib.util import find_spec
from multiprocessing import get_context
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from pipelines.embedders._grid import UNIT
from pipelines.engine import die_with_parent
from pipelines.errors import GristmillError
from pipelines.set_functions import Order, SetFunction


class Submodlib(SetFunction):
    """Lazy greedy by submodlib on random partitions, merged by gain."""

    packages: ClassVar[tuple[str, ...]] = ("submodlib-py",)
    """Installed packages whose version changes the order."""

    function: Literal["facility_location", "graph_cut", "log_determinant"] = "facility_location"
    """The set function."""
    partition_size: int = Field(default=2_500, ge=2)
    """Points per partition at most."""
    trade_off: float = Field(default=0.4, gt=0)
    """Graph cut: the weight of redundancy (submodlib's lambda; monotone up to 0.5). Log-determinant: what is added to the diagonal."""
    seed: int = 0
    """Seed of the partition."""

    def order(self, embeddings: np.ndarray) -> Order:
        """Order the rows; left out are points of no gain and, in each partition, the last point (submodlib orders all but one).

        Raises:
            GristmillError: submodlib is not installed, or its process was killed.
        """
        if find_spec("submodlib") is None:
            raise GristmillError(
                "set function 'submodlib' needs package submodlib-py, which is not installed (wheels exist for Python 3.11 and 3.12); "
                "install it, or choose facility_location, which needs nothing"
            )
        num_partitions = -(-len(embeddings) // self.partition_size)
        shuffled = np.random.default_rng(self.seed).permutation(len(embeddings))
        parts = [np.sort(part) for part in np.array_split(shuffled, num_partitions)] if num_partitions else []
        try:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=die_with_parent) as pool:
                ordered = list(pool.map(_order_partition, [self] * len(parts), [embeddings[part] for part in parts]))
        except BrokenProcessPool as error:
            raise GristmillError(
                f"the submodlib process was killed, most often for lack of memory; set partition_size below {self.partition_size}"
            ) from error
        picks = np.concatenate([part[picked] for part, (picked, _) in zip(parts, ordered, strict=True)] or [np.zeros(0, dtype=np.int64)])
        gains = np.concatenate([gained for _, gained in ordered] or [np.zeros(0)])
        place = np.concatenate([np.arange(len(gained)) for _, gained in ordered] or [np.zeros(0, dtype=np.int64)])
        order = np.lexsort((picks, place, -gains))
        order = order[gains[order] > 0]
        return Order(picks=picks[order].astype(np.int64), gains=gains[order])


def _order_partition(settings: Submodlib, embeddings: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return local picks (int64) and gains (float64) of one partition; runs in the child process."""
    count = len(embeddings)
    if count < 2:
        return np.arange(count), np.ones(count)
    rows = embeddings[::-1].astype(np.float32)  # submodlib gives ties to the highest id, this project to the lowest
    kernel = np.ascontiguousarray(np.maximum(rows @ rows.T, 0.0), dtype=np.float32)  # other layouts are read as raw memory
    exact = settings.function == "facility_location"
    if not exact:
        kernel /= UNIT
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        maximizer = _function(settings, kernel)
        # The stop switches compare with 1.0 and not with 0, so they are off and gains are cut by the caller.
        greedy = maximizer.maximize(
            budget=count - 1, optimizer="LazyGreedy", stopIfZeroGain=False, stopIfNegativeGain=False, verbose=False, show_progress=False
        )
    picks = np.array([count - 1 - int(pick) for pick, _ in greedy], dtype=np.int64)
    gains = np.array([gain for _, gain in greedy], dtype=np.float64)
    return picks, gains / UNIT if exact else gains


def _function(settings: Submodlib, kernel: np.ndarray) -> object:
    """Return submodlib's function object over a dense `kernel` (float32, shape ``(n, n)``)."""
    from submodlib import FacilityLocationFunction, GraphCutFunction, LogDeterminantFunction

    count = len(kernel)
    if settings.function == "facility_location":
        return FacilityLocationFunction(n=count, mode="dense", separate_rep=False, sijs=kernel, pybind_mode="array")
    if settings.function == "graph_cut":
        return GraphCutFunction(n=count, mode="dense", lambdaVal=settings.trade_off, separate_rep=False, ggsijs=kernel)
    return LogDeterminantFunction(n=count, mode="dense", lambdaVal=settings.trade_off, sijs=kernel)
