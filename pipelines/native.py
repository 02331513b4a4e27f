"""How native code is compiled: once per machine and version of the code, without the interpreter's lock.

Numba keeps compiled functions by the file that defines them and does not see that a constant or a function of another file,
which was compiled into them, has changed. So they are kept in a directory named by the code version of all native modules: of
everything that they import.
"""

from __future__ import annotations

import os
from pathlib import Path

from numba import config, njit

from pipelines.code_version import code_version

PACKAGE = Path(__file__).parent


def native_modules() -> tuple[str, ...]:
    """Return the modules of `pipelines` that compile native code, sorted."""
    using = (path for path in PACKAGE.rglob("*.py") if b"from pipelines.native import" in path.read_bytes())
    return tuple(sorted(f"pipelines.{'.'.join(path.relative_to(PACKAGE).with_suffix('').parts)}" for path in using))


def _cache_directory() -> str:
    """Return where compiled code of this version is kept: beside the code, or in the user's cache where that is read-only."""
    if config.CACHE_DIR:  # NUMBA_CACHE_DIR
        base = Path(config.CACHE_DIR)
    elif os.access(PACKAGE, os.W_OK):
        base = PACKAGE / "__pycache__"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gristmill"
    return str(base / f"native-{code_version(native_modules())}")


config.CACHE_DIR = _cache_directory()

KERNEL = njit(cache=True, nogil=True, _nrt=False)
"""Native code that makes no array: counting references to arrays would take most of its time."""
INNER = njit(cache=True, nogil=True, _nrt=False, forceinline=True)
"""The same, made part of the code that calls it."""
ARRAYS = njit(cache=True, nogil=True)
"""Native code that makes arrays."""
