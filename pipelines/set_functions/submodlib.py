"""Submodlib: its set functions (https://github.com/decile-team/submodlib), on random partitions, each with dense similarities.

Partitions because a matrix costs 8 n^2 bytes and the greedy about n^2.6; that is also how INGENIOUS (Renduchintala et al. 2023)
applies it. A child process computes, because submodlib holds the interpreter's lock while it maximizes.
Measured on 10,000 points: partitions of 2,500 keep half of the gain over random that one order over all points has.

The mutual informations measure a set A against a target set Q (Kothawade et al. 2022, "PRISM", table 1; s is the cosine, at least 0):

    facility_location_mutual_information           sum_i min(max_{j in A} s_ij, eta max_{q in Q} s_iq), over all i      (FLVMI)
    facility_location_variant_mutual_information   sum_q max_{j in A} s_qj + eta sum_{j in A} max_q s_jq               (FLQMI)
    graph_cut_mutual_information                   sum_{j in A} sum_q s_jq: modular, a ranking by mean similarity      (GCMI)
    concave_over_modular                           eta sum_{j in A} log(1 + sum_q s_jq) + sum_q log(1 + sum_{j in A} s_jq)
    log_determinant_mutual_information             log det S_A - log det(S_A - eta^2 S_AQ S_Q^-1 S_QA)
"""

from __future__ import annotations

import warnings
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib.util import find_spec
from multiprocessing import get_context
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from pipelines.embedders._grid import UNIT
from pipelines.engine import die_with_parent
from pipelines.errors import GristmillError
from pipelines.set_functions import Order, Points, SetFunction

if TYPE_CHECKING:
    import submodlib

TOWARDS_QUERIES = (
    "facility_location_mutual_information",
    "facility_location_variant_mutual_information",
    "graph_cut_mutual_information",
    "log_determinant_mutual_information",
    "concave_over_modular",
)
"""Functions of a target set; the others look at none."""
NOT_SUBMODULAR = ("disparity_sum", "disparity_min", "log_determinant_mutual_information")
"""A gain may rise while others are picked, so that a lazy greedy would skip the best point: all gains are computed at every step."""
PARTITION_SIZE, NAIVE_PARTITION_SIZE = 2_500, 500
MAX_NAIVE_PARTITION_SIZE = 1_000
MAX_QUERIES = 500
"""Queries that are looked at, taken at equal distances; each costs a column of similarities, and a cubed one in the log-determinant."""
LEAST_DIAGONAL = 0.01
"""Of the log-determinant: below, rounding to float32 could make a gain the logarithm of a negative number."""
LEAST_GAIN = 1e-9
"""What counts as no gain: submodlib takes 1e-38 for the similarity to a target set that is 0."""


class Submodlib(SetFunction):
    """Greedy by submodlib on random partitions: lazy, or naive where the function is not submodular."""

    packages: ClassVar[tuple[str, ...]] = ("submodlib-py",)
    """Installed packages whose version changes the order."""
    reads: ClassVar[tuple[str, ...]] = ("queries",)

    function: Literal[
        "facility_location",
        "graph_cut",
        "log_determinant",
        "disparity_sum",
        "disparity_min",
        "facility_location_mutual_information",
        "facility_location_variant_mutual_information",
        "graph_cut_mutual_information",
        "log_determinant_mutual_information",
        "concave_over_modular",
    ] = "facility_location"
    """The set function. Those with `mutual_information` in their name and concave_over_modular need a target set; at most 500 of
    its passages are looked at, at equal distances."""
    partition_size: int | None = Field(default=None, ge=2)
    """Points per partition at most: 2,500 where it is not given; 500, and 1,000 at most, for the disparities and the log-determinant's
    mutual information, which take the cube of it in time."""
    trade_off: float = Field(default=0.4, gt=0)
    """Graph cut: the weight of redundancy (submodlib's lambda; monotone up to 0.5). Log-determinants: what is added to the diagonal, at
    least 0.01."""
    eta: float = Field(default=1.0, ge=0)
    """Mutual informations: the weight of nearness to the target set, as the module's formulas have it; at most 1 in the log-determinant."""
    seed: int = 0
    """Seed of the partition."""

    @model_validator(mode="after")
    def _function_takes_its_settings(self) -> Submodlib:
        if self.function in NOT_SUBMODULAR and (self.partition_size or 0) > MAX_NAIVE_PARTITION_SIZE:
            raise ValueError(
                f"partition_size {self.partition_size} is too large for {self.function}, which takes its cube in time; "
                f"set {MAX_NAIVE_PARTITION_SIZE} at most"
            )
        if self.function.startswith("log_determinant") and self.trade_off < LEAST_DIAGONAL:
            raise ValueError(f"trade_off {self.trade_off} is too small for {self.function}; set {LEAST_DIAGONAL} at least")
        if self.function == "log_determinant_mutual_information" and self.eta > 1:
            raise ValueError(f"eta {self.eta} would make the similarities of {self.function} indefinite; set 1 at most")
        return self

    def order(self, points: Points) -> Order:
        """Order the points, merged from the partitions by gain.

        Left out are rows of zeros, points of no gain and, in each partition, the last point (submodlib orders all but one).
        Exceptions, where gains do not fall: disparity_sum and log_determinant_mutual_information leave out no point for its gain,
        and partitions are merged by place. The gain of disparity_sum is the sum of the distances to all picks before it in its
        partition, so 0 for the first. That of disparity_min is the distance to the nearest pick before it, 1 for the first:
        submodlib's own are the differences of these, of which none but the second is above 0.

        Costs are not looked at. Ties between identical rows go to the lowest index, others to what submodlib's heap holds on top.

        Raises:
            GristmillError: submodlib is not installed, its process was killed, a target set is absent or is not looked at, or
                there are earlier picks.
        """
        self._check(points)
        rows = np.flatnonzero(points.embeddings.any(axis=1)) if len(points) else np.zeros(0, dtype=np.int64)
        shuffled = np.random.default_rng(self.seed).permutation(len(rows))
        size = self.partition_size or (NAIVE_PARTITION_SIZE if self.function in NOT_SUBMODULAR else PARTITION_SIZE)
        parts = [np.sort(rows[part]) for part in np.array_split(shuffled, -(-len(rows) // size))] if len(rows) else []
        ordered = self._ordered([points.embeddings[part] for part in parts], _spread(points.queries))
        picks = np.concatenate([part[picked] for part, (picked, _) in zip(parts, ordered, strict=True)] or [np.zeros(0, dtype=np.int64)])
        gains = np.concatenate([gained for _, gained in ordered] or [np.zeros(0)])
        if self.function in ("disparity_sum", "log_determinant_mutual_information"):
            order = np.lexsort((picks, np.concatenate([np.arange(len(gained)) for _, gained in ordered] or [np.zeros(0)])))
        else:
            order = np.lexsort((picks, -gains))
            order = order[gains[order] > LEAST_GAIN]
        return Order(picks=picks[order].astype(np.int64), gains=gains[order])

    def _check(self, points: Points) -> None:
        if find_spec("submodlib") is None:
            raise GristmillError(
                "set function 'submodlib' needs package submodlib-py, which is not installed (wheels exist for Python 3.11 and 3.12); "
                "install it, or choose facility_location, which needs nothing"
            )
        if points.earlier is not None:
            raise GristmillError("set function 'submodlib' cannot extend earlier picks; choose facility_location, which can")
        has_queries = points.queries is not None and points.queries.any()
        if self.function in TOWARDS_QUERIES and not has_queries:
            raise GristmillError(
                f"submodlib's {self.function} needs a target set, and there is none; name its domains in selection.towards, "
                "or choose a function without one, e.g. facility_location"
            )
        if self.function not in TOWARDS_QUERIES and points.queries is not None:
            raise GristmillError(
                f"submodlib's {self.function} looks at no target set; "
                f"remove selection.towards, or choose one of {', '.join(TOWARDS_QUERIES)}"
            )

    def _ordered(self, parts: list[np.ndarray], queries: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return picks and gains of each of `parts` (embeddings), from a child process."""
        try:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=die_with_parent) as pool:
                return list(pool.map(_order_partition, [self] * len(parts), parts, [queries] * len(parts)))
        except BrokenProcessPool as error:
            raise GristmillError(
                "the submodlib process was killed, most often for lack of memory; "
                f"set partition_size below {max(len(part) for part in parts)}"
            ) from error


def _spread(queries: np.ndarray | None) -> np.ndarray:
    """Return at most `MAX_QUERIES` rows of `queries` at equal distances, without rows of zeros."""
    if queries is None:
        return np.zeros((0, 0), dtype=np.int16)
    there = queries[queries.any(axis=1)]
    return there[np.linspace(0, len(there) - 1, min(MAX_QUERIES, len(there))).astype(np.int64)]


def _order_partition(settings: Submodlib, embeddings: np.ndarray, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return local picks (int64) and gains (float64) of one partition; runs in the child process."""
    count = len(embeddings)
    if count < 2:
        return np.arange(count), np.ones(count)
    rows = embeddings[::-1].astype(np.float32)  # submodlib gives ties to the highest id, this project to the lowest
    optimizer = "NaiveGreedy" if settings.function in NOT_SUBMODULAR else "LazyGreedy"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        function = _function(settings, rows, queries.astype(np.float32))
        # The stop switches compare with 1.0 and not with 0, so they are off and gains are cut by the caller.
        greedy = function.maximize(
            budget=count - 1, optimizer=optimizer, stopIfZeroGain=False, stopIfNegativeGain=False, verbose=False, show_progress=False
        )
    picks = _lowest_first(np.array([count - 1 - int(pick) for pick, _ in greedy], dtype=np.int64), embeddings)
    gains = np.array([gain for _, gain in greedy], dtype=np.float64)
    if settings.function == "disparity_min":
        gains = np.cumsum(gains)
        gains[0] = 1.0
    return picks, gains if _is_in_cosines(settings.function) else gains / UNIT


def _lowest_first(picks: np.ndarray, embeddings: np.ndarray) -> np.ndarray:
    """Return `picks` with identical rows in the order of their indices: lazy greedy takes either of two that have the same gain."""
    _, kinds, sizes = np.unique(embeddings, axis=0, return_inverse=True, return_counts=True)
    members, starts = np.argsort(kinds, kind="stable"), np.cumsum(sizes) - sizes
    by_kind = np.argsort(kinds[picks], kind="stable")
    kind = kinds[picks][by_kind]
    seen_before = np.arange(len(picks)) - np.searchsorted(kind, kind)
    sorted_picks = np.empty_like(picks)
    sorted_picks[by_kind] = members[starts[kind] + seen_before]
    return sorted_picks


def _function(settings: Submodlib, rows: np.ndarray, queries: np.ndarray) -> submodlib.functions.setFunction.SetFunction:
    """Return submodlib's function object over `rows` and `queries` (integer unit vectors as float32)."""
    import submodlib as lib

    name, count = settings.function, len(rows)
    if name in TOWARDS_QUERIES:
        return _towards(settings, rows, queries)
    kernel = _kernel(name, rows, rows)
    if name == "facility_location":
        return lib.FacilityLocationFunction(n=count, mode="dense", separate_rep=False, sijs=kernel, pybind_mode="array")
    if name == "graph_cut":
        return lib.GraphCutFunction(n=count, mode="dense", lambdaVal=settings.trade_off, separate_rep=False, ggsijs=kernel)
    if name == "log_determinant":
        return lib.LogDeterminantFunction(n=count, mode="dense", lambdaVal=settings.trade_off, sijs=kernel)
    disparity = lib.DisparitySumFunction if name == "disparity_sum" else lib.DisparityMinFunction
    return disparity(n=count, mode="dense", sijs=kernel)


def _towards(settings: Submodlib, rows: np.ndarray, queries: np.ndarray) -> submodlib.functions.setFunction.SetFunction:
    import submodlib as lib

    name, eta = settings.function, settings.eta
    given = {"n": len(rows), "num_queries": len(queries), "query_sijs": _kernel(name, rows, queries)}
    if name == "graph_cut_mutual_information":
        return lib.GraphCutMutualInformationFunction(**given)
    if name == "facility_location_variant_mutual_information":
        return lib.FacilityLocationVariantMutualInformationFunction(**given, queryDiversityEta=eta)
    if name == "concave_over_modular":
        return lib.ConcaveOverModularFunction(**given, queryDiversityEta=eta)
    given["data_sijs"] = _kernel(name, rows, rows)
    if name == "facility_location_mutual_information":
        return lib.FacilityLocationMutualInformationFunction(**given, magnificationEta=eta)
    within = _kernel(name, queries, queries)
    return lib.LogDeterminantMutualInformationFunction(**given, query_query_sijs=within, lambdaVal=settings.trade_off, magnificationEta=eta)


def _is_in_cosines(function: str) -> bool:
    """Return whether `function` gets cosines; the others are linear in the similarities and get integers, which sum exactly."""
    return function.startswith(("log_determinant", "disparity")) or function == "concave_over_modular"


def _kernel(function: str, rows: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the similarities that `function` is defined on: float32, shape ``(n, m)``, C-contiguous, finite.

    Negative ones count 0, but for the log-determinants, whose matrix would not stay positive definite. The disparities need 1 at
    most, and exactly 1 between duplicates, so they are given the cosine without the rounding of the vectors' norms.

    Raises:
        GristmillError: a similarity is infinite or not a number; submodlib would not end.
    """
    kernel = rows @ others.T
    if not np.isfinite(kernel).all():
        raise GristmillError("embeddings hold values that are infinite or not a number, and so do similarities; embed the corpus again")
    if not function.startswith("log_determinant"):
        kernel = np.maximum(kernel, 0)
    if function.startswith("disparity"):
        squared = (rows.astype(np.float64) ** 2).sum(axis=1)
        kernel = np.minimum(kernel / np.sqrt(squared[:, None] * squared), 1)
    elif _is_in_cosines(function):
        kernel = kernel / UNIT
    return np.ascontiguousarray(kernel, dtype=np.float32)  # other layouts are read as raw memory
