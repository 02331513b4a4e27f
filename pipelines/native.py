"""How native code is compiled: once per machine and version of the code, without the interpreter's lock.

Numba keeps compiled functions by the file that defines them and does not see that a constant or a function of another file,
which was compiled into them, has changed. So they are kept in a directory named by a hash over all files of native code.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from numba import config, njit

PACKAGE = Path(__file__).parent


def _cache_directory() -> str:
    """Return where compiled code of this version is kept: beside the code, or in the user's cache where that is read-only."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        source = path.read_bytes()
        if b"numba" in source or b"pipelines.native" in source:
            digest.update(path.relative_to(PACKAGE).as_posix().encode() + b"\0" + source)
    if config.CACHE_DIR:  # NUMBA_CACHE_DIR
        base = Path(config.CACHE_DIR)
    elif os.access(PACKAGE, os.W_OK):
        base = PACKAGE / "__pycache__"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gristmill"
    return str(base / f"native-{digest.hexdigest()[:12]}")


config.CACHE_DIR = _cache_directory()

KERNEL = njit(cache=True, nogil=True, _nrt=False)
"""Native code that makes no array: counting references to arrays would take most of its time."""
INNER = njit(cache=True, nogil=True, _nrt=False, forceinline=True)
"""The same, made part of the code that calls it."""
ARRAYS = njit(cache=True, nogil=True)
"""Native code that makes arrays."""
