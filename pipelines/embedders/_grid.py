"""Integer unit vectors: how embeddings are stored.

A vector is scaled to norm `NORM` and rounded. Every dot product of two rows, and by the Cauchy-Schwarz inequality every partial
sum of one, is then an integer below 2**24, which float32 holds exactly in any order of summation.
"""

from __future__ import annotations

import numpy as np

NORM = 4_000
"""Norm of an integer unit vector. Rounding adds at most sqrt(d)/2, so dot products stay below 2**24 up to d = 36,000."""

UNIT = NORM * NORM
"""The integer similarity that stands for a cosine of 1."""


def to_integer_rows(vectors: np.ndarray) -> np.ndarray:
    """Return `vectors` (shape ``(n, d)``) as int16 rows of norm `NORM`; rows of zeros stay zeros."""
    vectors = vectors.astype(np.float64)
    norms = np.sqrt((vectors * vectors).sum(axis=1, keepdims=True))
    return np.rint(vectors * (NORM / np.where(norms > 0, norms, 1.0))).astype(np.int16)
