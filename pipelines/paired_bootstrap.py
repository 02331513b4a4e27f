"""Paired differences of losses over documents: bootstrap intervals, p-values, and Holm's correction where many are looked at.

Two checkpoints are scored on the same documents; documents are drawn with replacement, within their strata, and both sums move
together. The percentile interval is too narrow: the spread of n draws of n equal documents is too small by ``sqrt((n - 1) / n)``, and
Student's t is wider than the normal (Hesterberg 2015, Am. Stat. 69(4), section 5.3). Its two arms are made longer for both, each by the
same factor, so that it stays as lopsided as the draws; here for documents of unequal length, which pull the ratio towards themselves
(`_spare`). The p-value is that of Student's t with the arm towards 0 as its scale: below 0.05 where the interval leaves 0 out. Documents
are drawn, training runs are not: another seed of the training moves the difference too, and no interval here knows by how much.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipelines.intervals import NORMAL_95

LEVEL = 0.95  # as of NORMAL_95
"""Of every interval."""
VALUES_AT_A_TIME = 2_000_000


@dataclass(frozen=True)
class PairedLosses:
    """Documents scored twice; arrays of shape (n,), n at least 1."""

    tokens: np.ndarray
    bytes: np.ndarray
    before: np.ndarray
    """Negative log-likelihood in nats, summed over the document."""
    after: np.ndarray
    strata: np.ndarray
    """Integers: documents are drawn within their stratum, so that each draw has as many of a domain as there are."""

    @classmethod
    def of(cls, table: pa.Table, *, before: str = "nll_before", after: str = "nll_after", stratum: str | None = None) -> PairedLosses:
        """Return the documents of `table`, which has ``tokens``, ``bytes`` and the two columns named; one stratum without `stratum`."""
        columns = (table[name].to_numpy().astype(np.float64) for name in ("tokens", "bytes", before, after))
        strata = np.zeros(table.num_rows, dtype=np.int64)
        if stratum:
            _, strata = np.unique(np.asarray(table[stratum].to_pylist(), dtype=str), return_inverse=True)
        return cls(*columns, strata)


@dataclass(frozen=True)
class Change:
    """A difference, after - before, with the ends of its 95 % interval."""

    change: float
    low: float
    high: float


@dataclass(frozen=True)
class PairedChange:
    """What the documents say of two checkpoints: ratios of sums, so that every token counts alike."""

    loss_before: float
    """Nats per token."""
    loss_after: float
    bits_before: float
    """Bits per byte."""
    bits_after: float
    loss: Change
    bits: Change
    p_value: float
    """Two-sided, that there is no difference of the loss; bits per byte have the same sign in every draw."""


def paired_change(losses: PairedLosses, *, draws: int, seed: int) -> PairedChange:
    """Return the losses before and after and their difference, with intervals over `draws` draws of documents.

    Where every stratum is one document there is nothing to draw: the interval is the difference itself and the p-value 1. One document
    that outweighs all others counts as one degree of freedom, whose interval is wide; with less it would have no bounds.
    """
    nats = losses.after - losses.before
    tokens, size = losses.tokens.sum(), losses.bytes.sum() * math.log(2)
    drawn = np.concatenate(list(_drawn_sums(np.stack([nats, losses.tokens, losses.bytes]), losses.strata, draws, seed)), axis=1)
    spare = _spare(losses.tokens, len(np.unique(losses.strata)))
    freedom = max(1.0, spare * tokens**2 / (losses.tokens**2).sum()) if spare else 0.0  # of Kish's effective number of documents
    loss = _interval(float(nats.sum() / tokens), drawn[0] / drawn[1], spare, freedom)
    return PairedChange(
        loss_before=float(losses.before.sum() / tokens),
        loss_after=float(losses.after.sum() / tokens),
        bits_before=float(losses.before.sum() / size),
        bits_after=float(losses.after.sum() / size),
        loss=loss,
        bits=_interval(float(nats.sum() / size), drawn[0] / (drawn[2] * math.log(2)), spare, freedom),
        p_value=_p_value(loss, len(nats), freedom),
    )


def _drawn_sums(columns: np.ndarray, strata: np.ndarray, draws: int, seed: int) -> Iterator[np.ndarray]:
    """Yield sums of the rows of `columns`, shape (columns, draws), over documents drawn with replacement within each stratum."""
    generator = np.random.Generator(np.random.Philox(key=seed))
    members = [np.nonzero(strata == stratum)[0] for stratum in np.unique(strata)]
    at_a_time = max(1, VALUES_AT_A_TIME // len(strata))
    for first in range(0, draws, at_a_time):
        count = min(at_a_time, draws - first)
        sums = np.zeros((len(columns), count))
        for mine in members:
            chosen = mine[generator.integers(0, len(mine), (count, len(mine)))]
            sums += np.stack([column[chosen].sum(axis=1) for column in columns])
        yield sums


def _spare(weights: np.ndarray, strata: int) -> float:
    """Return the share of the variance of a ratio that is left in the residuals: ``(n - strata) / n`` of equal documents.

    Document i with share ``w_i`` of the tokens leaves ``w_i**2 * (1 - 2 * w_i + sum(w**2))`` of a variance in proportion to ``w_i**2``
    (as the leverages of a regression do: MacKinnon and White 1985, J. Econometrics 29(3), section 2).
    """
    shares = weights / weights.sum()
    squared = float((shares**2).sum())
    spare = 1 - 2 * float((shares**3).sum()) / squared + squared - (strata - 1) / len(weights)
    return spare if spare > 1e-9 else 0.0


def _interval(change: float, drawn: np.ndarray, spare: float, freedom: float) -> Change:
    """Return `change` with the percentile interval of `drawn`, its arms made longer.

    Args:
        spare: what the variance of the draws is too small by.
        freedom: of Student's t, which stands for the estimated variance.
    """
    from scipy.special import stdtrit

    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()
    longer = float(stdtrit(freedom, (1 + LEVEL) / 2)) / (NORMAL_95 * math.sqrt(spare)) if spare else 1.0
    return Change(change, change - longer * max(0.0, change - low), change + longer * max(0.0, high - change))


def _p_value(found: Change, num: int, freedom: float) -> float:
    """Return the two-sided p-value of no difference; not below that of n signs which all agree, ``2**(1 - n)``."""
    from scipy.special import stdtr, stdtrit

    arm = found.change - found.low if found.change > 0 else found.high - found.change
    if not freedom or not found.change:
        return 1.0
    statistic = float(stdtrit(freedom, (1 + LEVEL) / 2)) * abs(found.change) / arm if arm else math.inf
    return min(1.0, max(2.0 ** (1 - num), 2 * float(stdtr(freedom, -statistic))))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p-values adjusted for their number (Holm 1979, Scand. J. Stat. 6(2)): the chance of any false one stays below each."""
    num = len(p_values)
    adjusted, worst = [0.0] * num, 0.0
    for rank, place in enumerate(sorted(range(num), key=lambda place: p_values[place])):
        worst = max(worst, min(1.0, (num - rank) * p_values[place]))
        adjusted[place] = worst
    return adjusted
