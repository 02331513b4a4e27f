"""How native code is compiled: once per machine, kept beside the module, without the interpreter's lock."""

from __future__ import annotations

from numba import njit

KERNEL = njit(cache=True, nogil=True, _nrt=False)
"""Native code that makes no array: counting references to arrays would take most of its time."""
INNER = njit(cache=True, nogil=True, _nrt=False, forceinline=True)
"""The same, made part of the code that calls it."""
