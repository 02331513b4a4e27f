"""Embedders: passages to vectors in one space.

`fit` runs once, on the pinned sample, in one thread, and writes its state; `embed` reads that state, so that all
partitions share one space.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from pipelines.plugins import LocatedPlugin


class Embedder(LocatedPlugin):
    """Base of every embedder."""

    packages: ClassVar[tuple[str, ...]] = ()
    """Installed packages whose version changes the vectors."""

    def fit(self, texts: Iterable[str], state: Path) -> dict[str, float]:
        """Fit on `texts` and write the state into directory `state` (safetensors or JSON); return what was measured."""
        raise NotImplementedError

    def embed(self, texts: Sequence[str], state: Path) -> np.ndarray:
        """Return float32 unit vectors of shape ``(len(texts), dimensions)``; a text without known words gives zeros."""
        raise NotImplementedError
