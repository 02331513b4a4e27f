"""Embedders: passages to vectors in one space.

`fit` runs once, on the pinned sample, in one thread, and writes its state; `embed` reads that state, so that all
partitions share one space.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
from pydantic import PrivateAttr

from pipelines.plugins import Plugin


class Embedder(Plugin):
    """Base of every embedder."""

    packages: ClassVar[tuple[str, ...]] = ()
    """Installed packages whose version changes the vectors."""

    _root: Path = PrivateAttr(default=Path())

    @property
    def root(self) -> Path:
        """Where relative paths of the settings start: the project's directory."""
        return self._root

    def at(self, root: Path) -> Self:
        """Return a copy that takes relative paths from `root`."""
        copy = self.model_copy()
        copy._root = root
        return copy

    def files(self) -> Sequence[Path]:
        """Return the local files that change the vectors, apart from the code.

        Raises:
            GristmillError: a file that the settings name does not exist.
        """
        return ()

    def fit(self, texts: Iterable[str], state: Path) -> dict[str, float]:
        """Fit on `texts` and write the state into directory `state` (safetensors or JSON); return what was measured."""
        raise NotImplementedError

    def embed(self, texts: Sequence[str], state: Path) -> np.ndarray:
        """Return float32 unit vectors of shape ``(len(texts), dimensions)``; a text without known words gives zeros."""
        raise NotImplementedError
