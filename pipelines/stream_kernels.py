"""Native code of the order of the data: windows copied out of token files, documents numbered, sequences assigned to domains.

Imported where it is used: compiled code is slow to load, and definitions are loaded often.
"""

from __future__ import annotations

import numpy as np

from pipelines.native import KERNEL

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


@KERNEL
def assign(wanted: np.ndarray, behind: np.ndarray, least: float, out: np.ndarray) -> None:
    """Fill `out` with the domain of each sequence; `behind` holds how far each domain is behind its share (Tijdeman 1980)."""
    for number in range(len(out)):
        chosen, soonest = -1, np.inf
        for domain in range(len(wanted)):
            behind[domain] += wanted[domain]
            if behind[domain] < least - ROUNDING or wanted[domain] <= 0.0:
                continue
            left = (1.0 - least - behind[domain]) / wanted[domain]
            if left < soonest:
                chosen, soonest = domain, left
        out[number] = chosen
        behind[chosen] -= 1.0
