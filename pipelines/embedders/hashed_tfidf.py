"""Hashed word counts, weighted by TF-IDF, projected by a truncated SVD (latent semantic analysis, Deerwester et al. 1990).

Words are hashed to a fixed number of features (Weinberger et al. 2009), so no vocabulary is kept. Needs no package data.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import Field

from pipelines.embedders import Embedder
from pipelines.errors import EmptyInput

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

STATE = "hashed_tfidf.safetensors"


class HashedTfidf(Embedder):
    """TF-IDF over hashed words, then an SVD fitted on the sample."""

    packages: ClassVar[tuple[str, ...]] = ("scikit-learn",)

    dimensions: int = Field(default=256, ge=1)
    """Dimensions of the vectors; a sample of fewer passages gives fewer."""
    features: int = Field(default=2**15, ge=2)
    """Hashed features; the state takes ``4 * dimensions * features`` bytes."""
    seed: int = 0
    """Seed of the randomized SVD (Halko, Martinsson, Tropp 2011)."""

    def fit(self, texts: Iterable[str], state: Path) -> dict[str, float]:
        """Fit document frequencies and the projection, in one thread (its last bits could depend on BLAS threads); write `STATE`.

        Raises:
            EmptyInput: no text holds a word.
        """
        from safetensors.numpy import save_file
        from sklearn.decomposition import TruncatedSVD
        from threadpoolctl import threadpool_limits

        counts = self._counts(list(texts))
        if counts.nnz == 0:
            raise EmptyInput("embedder hashed_tfidf: the sample holds no word to fit on; check the filters, or raise sample_passages")
        document_frequencies = np.bincount(counts.indices, minlength=self.features)
        idf = np.log((1 + counts.shape[0]) / (1 + document_frequencies)) + 1.0
        dimensions = min(self.dimensions, counts.shape[0], self.features)
        with threadpool_limits(1):
            svd = TruncatedSVD(dimensions, random_state=self.seed).fit(_weigh(counts, idf))
        components = np.ascontiguousarray(svd.components_, dtype=np.float32)
        save_file({"idf": idf, "components": components}, state / STATE)
        return {"dimensions": float(len(components)), "share_of_variance": round(float(svd.explained_variance_ratio_.sum()), 6)}

    def embed(self, texts: Sequence[str], state: Path) -> np.ndarray:
        """Return float32 unit vectors, shape ``(len(texts), dimensions)``; SciPy's sparse product sums in one fixed order."""
        from safetensors.numpy import load_file
        from sklearn.preprocessing import normalize

        fitted = load_file(state / STATE)
        projected = _weigh(self._counts(texts), fitted["idf"]) @ np.ascontiguousarray(fitted["components"].T, dtype=np.float64)
        return normalize(projected).astype(np.float32)

    def _counts(self, texts: Sequence[str]) -> csr_matrix:
        from sklearn.feature_extraction.text import HashingVectorizer

        return HashingVectorizer(n_features=self.features, alternate_sign=False, norm=None).transform(texts)


def _weigh(counts: csr_matrix, idf: np.ndarray) -> csr_matrix:
    """Return rows of (1 + ln tf) * idf at norm 1 (Manning, Raghavan, Schuetze 2008, section 6.4)."""
    from sklearn.preprocessing import normalize

    weighted = counts.astype(np.float64)
    weighted.data = (1.0 + np.log(weighted.data)) * idf[weighted.indices]
    return normalize(weighted, copy=False)
