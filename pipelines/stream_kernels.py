"""Native code of the order of the data: windows copied out of token files, documents numbered, sequences assigned to domains.

Imported where it is used: compiled code is slow to load, and definitions are loaded often.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from pipelines.native import INNER, KERNEL

ROUNDING = 1e-9


@KERNEL
def copy_pieces(tokens: np.ndarray, source: np.ndarray, target: np.ndarray, count: np.ndarray, out: np.ndarray) -> None:
    """Copy stretches of `tokens`: `count` tokens from `source` on to `target` on in `out`, all int64 of one shape."""
    for piece in range(len(source)):
        first, at = source[piece], target[piece]
        for place in range(count[piece]):
            out[at + place] = tokens[first + place]


@KERNEL
def cumulate(length: np.ndarray, order: np.ndarray, ends: np.ndarray) -> None:
    """Fill `ends`, int64, with where each passage of `order` ends in the epoch, one end of text counted for each."""
    end = 0
    for place in range(len(order)):
        end += length[order[place]] + 1
        ends[place] = end


@KERNEL
def number_documents(windows_BT: np.ndarray, end_of_text: int, out_BT: np.ndarray) -> None:
    """Fill `out_BT` with the number of each position's document within its window."""
    for window in range(windows_BT.shape[0]):
        number = 0
        for place in range(windows_BT.shape[1]):
            out_BT[window, place] = number
            number += windows_BT[window, place] == end_of_text


@INNER
def time_to(amount: float, rate: float, slope: float) -> float:
    """Return how long it takes to read `amount` at ``rate + slope * time``; infinity where it never comes to that."""
    if amount <= 0.0:
        return 0.0
    if amount == np.inf:
        return np.inf
    root = rate * rate + 2.0 * slope * amount
    speed = rate + np.sqrt(max(root, 0.0))
    return 2.0 * amount / speed if root >= 0.0 and speed > 0.0 else np.inf


class Shares(Protocol):
    """The shares of n domains over time, as `data_order.Course` gives them."""

    weights: np.ndarray

    def shares_from(self, time: float, alive: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]: ...


@dataclass(frozen=True)
class Flow:
    """How much of each of n domains is read by any time, exactly: K stretches, in each of which the shares move linearly."""

    begins: np.ndarray
    """float64 (K,): where each stretch begins; the last one has no end."""
    read: np.ndarray
    """float64 (K, n): what was read by then."""
    rates: np.ndarray
    """float64 (K, n): the shares there; each row sums to 1."""
    slopes: np.ndarray
    """float64 (K, n): how fast they move; each row sums to 0."""
    end: float
    """When nothing is left to read: infinity where that never is."""

    def at(self, time: float) -> np.ndarray:
        """Return what was read of each domain by `time`, at most `end`: float64 (n,), which sum to `time`."""
        if not len(self.begins):
            return np.zeros(self.read.shape[1])
        stretch = int(np.searchsorted(self.begins, time, side="right")) - 1
        since = time - self.begins[stretch]
        return self.read[stretch] + since * (self.rates[stretch] + self.slopes[stretch] * since / 2)

    def reaches(self, domain: int, amount: float) -> float:
        """Return when `amount` of `domain` was read; infinity where it never is."""
        if not len(self.begins):
            return 0.0 if amount <= 0 else np.inf
        return float(_reached(amount, domain, 0, self.begins, self.read, self.rates, self.slopes)[0])


def flow(course: Shares, left: np.ndarray) -> Flow:
    """Return how `course` reads its domains, none of them beyond what is `left` of it.

    The share of a domain that is exhausted goes to the others of its role in proportion to theirs: the target share is what was
    measured, so it stays. It goes to the other role where a role is exhausted.

    Args:
        left: float64 (n,); infinity where there is no limit.
    """
    alive = (course.weights > 0) & (left > 0)
    time, read, stretches = 0.0, np.zeros(len(left)), []
    while alive.any():
        rates, slopes, until = course.shares_from(time, alive)
        lasts = np.asarray([time_to(*one) for one in zip(left - read, rates, slopes, strict=True)])
        lasts[~alive] = np.inf
        stretches.append((time, read, rates, slopes))
        step = min(until - time, float(lasts.min()))
        if step == np.inf:
            break
        gone = lasts <= step + ROUNDING
        read = np.where(gone, left, read + step * (rates + slopes * step / 2))
        alive, time = alive & ~gone, until if step == until - time else time + step
    columns = list(zip(*stretches, strict=True)) or [[]] + [np.empty((0, len(left)))] * 3
    return Flow(*(np.asarray(column, dtype=np.float64) for column in columns), end=np.inf if alive.any() else float(read.sum()))


@INNER
def _reached(
    amount: float, domain: int, stretch: int, begins: np.ndarray, read: np.ndarray, rates: np.ndarray, slopes: np.ndarray
) -> tuple[float, int]:
    """Return when `amount` of `domain` was read, and the stretch in which: `stretch` or a later one."""
    last = len(begins) - 1
    while stretch < last and read[stretch + 1, domain] < amount:
        stretch += 1
    time = begins[stretch] + time_to(amount - read[stretch, domain], rates[stretch, domain], slopes[stretch, domain])
    return (time if stretch == last else min(time, begins[stretch + 1])), stretch


def assigned(moves: Flow, num_sequences: int) -> np.ndarray:
    """Return the domain of each sequence along `moves`, int16 of shape ``(num_sequences,)``; at most up to its end.

    After any number of sequences every one of the n domains is within ``1 - 1 / (2n - 2)`` sequences of what the flow has read of it,
    whatever its shares do: of the domains that are behind by ``1 / (2n - 2)`` or more, the next is the one that would reach the bound
    first (Tijdeman 1980, The chairman assignment problem, which allows other shares at every step). Taking the one furthest behind
    keeps no such bound beyond two. A limit is a whole number of sequences, so it is reached and never passed.
    """
    num_domains = moves.read.shape[1]
    out = np.empty(num_sequences, dtype=np.int16)
    if num_sequences:
        arrays = (moves.begins, moves.read, moves.rates, moves.slopes)
        places, times = np.zeros((num_domains, 2), dtype=np.int64), np.zeros((num_domains, 2))
        _assign(arrays, 1.0 / max(2 * num_domains - 2, 1), np.zeros(num_domains), places, times, out)
    return out


@INNER
def _next_turn(moves: tuple, least: float, domain: int, taken: float, places: np.ndarray, times: np.ndarray) -> None:
    """Set from when on `domain` may be taken after `taken` times, and when it has to be; `places` are the stretches of those times."""
    times[domain, 0], places[domain, 0] = _reached(taken + least - ROUNDING, domain, places[domain, 0], *moves)
    times[domain, 1], places[domain, 1] = _reached(taken + 1.0 - least, domain, places[domain, 1], *moves)


@KERNEL
def _assign(moves: tuple, least: float, taken: np.ndarray, places: np.ndarray, times: np.ndarray, out: np.ndarray) -> None:
    """Fill `out` with the domain of each sequence: of those whose turn it may be, the one whose turn has to be first."""
    for domain in range(len(taken)):
        _next_turn(moves, least, domain, 0.0, places, times)
    for number in range(len(out)):
        chosen, nearest = -1, 0
        for domain in range(len(taken)):
            if times[domain, 0] <= number + 1.0:
                if chosen < 0 or times[domain, 1] < times[chosen, 1]:
                    chosen = domain
            elif times[domain, 0] < times[nearest, 0]:
                nearest = domain
        chosen = nearest if chosen < 0 else chosen  # one is always behind by enough, but for rounding after very many sequences
        out[number] = chosen
        taken[chosen] += 1.0
        _next_turn(moves, least, chosen, taken[chosen], places, times)
