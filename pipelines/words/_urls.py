"""Whether a stretch of text is a URL as spaCy's pattern has it (lang/tokenizer_exceptions.py).

Scheme and user are optional, then a host name or a public IPv4 address, then an optional port and path.
"""

from __future__ import annotations

import numpy as np

from pipelines.native import KERNEL
from pipelines.words._characters import DECIMAL, LABEL, LOWER, WORD

PLUS, HYPHEN, PERIOD, SLASH, COLON, QUESTION, AT, UNDERSCORE, NUMBER = map(ord, "+-./:?@_#")


@KERNEL
def _ends_url(codes: np.ndarray, place: int, end: int, classes: np.ndarray) -> bool:
    """Return whether ``codes[place:end]`` is nothing, or a port, or a path, or both."""
    if place < end and codes[place] == COLON:
        stop = place + 1
        while stop < end and classes[codes[stop]] & DECIMAL:
            stop += 1
        if not 2 <= stop - place - 1 <= 5:
            return False
        place = stop
    return place == end or codes[place] == SLASH or codes[place] == QUESTION or codes[place] == NUMBER


@KERNEL
def _is_named_host(codes: np.ndarray, start: int, end: int, classes: np.ndarray) -> bool:
    """Return whether a URL's host name, port and path begin at `start` and end at `end`."""
    place = start
    while True:
        label = place
        while place < end and (classes[codes[place]] & LABEL or codes[place] == UNDERSCORE or codes[place] == HYPHEN):
            place += 1
        length = place - label
        if place >= end or codes[place] != PERIOD or not 1 <= length <= 64:
            return False
        if not (classes[codes[label]] & LABEL and classes[codes[place - 1]] & LABEL):
            return False
        place += 1
        stop = place
        while stop < end and classes[codes[stop]] & LOWER:
            stop += 1
        if 2 <= stop - place <= 63 and _ends_url(codes, stop, end, classes):
            return True


@KERNEL
def _is_octet(codes: np.ndarray, start: int, stop: int, octet: int) -> bool:
    """Return whether ``codes[start:stop]`` is octet 1, 2 or 3 as the pattern has it: any script's digits count as digits."""
    last = octet == 3
    length = stop - start
    one = codes[start]
    if length == 1:
        return not last or 0x31 <= one <= 0x39
    if length == 2:
        return not last or 0x31 <= one <= 0x39
    if length != 3:
        return False
    two, three = codes[start + 1], codes[start + 2]
    if one == 0x31:
        return True
    if one != 0x32:
        return False
    if 0x30 <= two <= 0x34:
        return True
    return two == 0x35 and 0x30 <= three <= (0x34 if last else 0x35)


@KERNEL
def _is_first_octet(codes: np.ndarray, start: int, stop: int) -> bool:
    """Return whether ``codes[start:stop]`` is 1 to 223."""
    length, one = stop - start, codes[start]
    if length == 1 or length == 2:
        return 0x31 <= one <= 0x39
    if length != 3:
        return False
    if one == 0x31:
        return True
    two, three = codes[start + 1], codes[start + 2]
    return one == 0x32 and (0x30 <= two <= 0x31 or (two == 0x32 and 0x30 <= three <= 0x33))


@KERNEL
def _is_private(codes: np.ndarray, first: int, second: int, stop: int) -> bool:
    """Return whether an address whose octets begin at `first` and `second` (ends at `stop`) is private, local or loopback."""
    length, size = second - 1 - first, stop - second
    one, two = codes[first], codes[first + 1]
    if length == 2:
        return one == 0x31 and two == 0x30  # 10
    if length != 3 or one != 0x31:
        return False
    three, high, low = codes[first + 2], codes[second], codes[second + 1]
    if two == 0x32 and three == 0x37:  # 127
        return True
    last = codes[second + 2]
    if size == 3 and two == 0x36 and three == 0x39:  # 169.254
        return high == 0x32 and low == 0x35 and last == 0x34
    if size == 3 and two == 0x39 and three == 0x32:  # 192.168
        return high == 0x31 and low == 0x36 and last == 0x38
    if size == 2 and two == 0x37 and three == 0x32:  # 172.16 to 172.31
        return (high == 0x31 and 0x36 <= low <= 0x39) or high == 0x32 or (high == 0x33 and 0x30 <= low <= 0x31)
    return False


@KERNEL
def _is_numbered_host(codes: np.ndarray, start: int, end: int, classes: np.ndarray) -> bool:
    """Return whether a public IPv4 address, port and path begin at `start` and end at `end`."""
    place, second, stop = start, start, start
    for octet in range(4):
        begin = place
        while place < end and classes[codes[place]] & DECIMAL:
            place += 1
        if place == begin:
            return False
        if octet == 0 and not _is_first_octet(codes, begin, place):
            return False
        if octet > 0 and not _is_octet(codes, begin, place, octet):
            return False
        if octet == 1:
            second, stop = begin, place
        if octet < 3:
            if place >= end or codes[place] != PERIOD:
                return False
            place += 1
    return _ends_url(codes, place, end, classes) and not _is_private(codes, start, second, stop)


@KERNEL
def is_url(codes: np.ndarray, start: int, end: int, classes: np.ndarray) -> bool:
    """Return whether spaCy's URL pattern matches all of ``codes[start:end]``: scheme and user are optional, a host is not."""
    if _is_named_host(codes, start, end, classes) or _is_numbered_host(codes, start, end, classes):
        return True
    place = start
    while place < end and (classes[codes[place]] & WORD or codes[place] == PLUS or codes[place] == HYPHEN or codes[place] == PERIOD):
        place += 1
    if place - start >= 2 and place + 2 < end and codes[place] == COLON and codes[place + 1] == SLASH and codes[place + 2] == SLASH:
        host = place + 3
        if _is_named_host(codes, host, end, classes) or _is_numbered_host(codes, host, end, classes):
            return True
    for place in range(start + 1, end - 1):
        if codes[place] == AT and (_is_named_host(codes, place + 1, end, classes) or _is_numbered_host(codes, place + 1, end, classes)):
            return True
    return False
