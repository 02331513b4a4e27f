"""Static token vectors, averaged with smooth inverse frequency weights, less what all passages share.

The table (32,000 tokens x 256) and its tokenizer are read from the files of package `wordllama`
(https://github.com/dleemiller/WordLlama, MIT); the package itself is not imported, since its loader asks the network.
The weights and the removal of the common component are SIF: Arora, Liang, Ma 2017, "A Simple but Tough-to-Beat Baseline for
Sentence Embeddings", section 3 and algorithm 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import Field

from pipelines.embedders import Embedder
from pipelines.errors import EmptyInput, GristmillError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

STATE = "static_words.safetensors"
TABLE = "wordllama/weights/l2_supercat_256.safetensors"
TOKENIZER = "wordllama/tokenizers/l2_supercat_tokenizer_config.json"
GRID = 4_000
"""Sample vectors are rounded to 1/GRID before their Gram matrix is taken: its sums are then exact in float64, in any order."""
BATCH = 1_000
SMALLEST_NORM = 1e-6
"""A shorter remainder after the common components are removed is rounding noise, and counts as zero."""


class StaticWords(Embedder):
    """Weighted means of static token vectors."""

    packages: ClassVar[tuple[str, ...]] = ("wordllama",)

    smoothing: float = Field(default=1e-3, gt=0)
    """a in the token weight a / (a + p(token)); the paper's value."""
    components: int = Field(default=1, ge=0, le=16)
    """How many common components are removed; the paper removes one."""

    def fit(self, texts: Iterable[str], state: Path) -> dict[str, float]:
        """Count tokens, then find the common components of the sample's vectors; write `STATE`.

        Raises:
            EmptyInput: there is no text.
        """
        from safetensors.numpy import save_file

        tokens = [_tokenize(batch) for batch in _batches(texts)]
        counts = sum((np.bincount(flat, minlength=len(_table())) for flat, _ in tokens), np.zeros(len(_table()), dtype=np.int64))
        total = int(counts.sum())
        if total == 0:
            raise EmptyInput("embedder static_words: the sample holds no text to fit on; check the filters, or raise sample_passages")
        weights = self.smoothing / (self.smoothing + counts / total)
        gram = np.zeros((_table().shape[1],) * 2)
        for flat, lengths in tokens:
            grid = np.rint(_unit(_pool(flat, lengths, weights)) * GRID)
            gram += grid.T @ grid
        values, vectors = np.linalg.eigh(gram)
        common = np.ascontiguousarray(vectors[:, ::-1][:, : self.components].T)
        common *= np.where(common[np.arange(len(common)), np.abs(common).argmax(axis=1)] < 0, -1.0, 1.0)[:, None]
        # LAPACK's last bits may depend on its build and threads; nine digits do not.
        save_file({"weights": weights, "components": np.round(common, 9)}, state / STATE)
        share = float(values[::-1][: self.components].sum() / values.sum()) if values.sum() > 0 else 0.0
        return {"dimensions": float(len(gram)), "sample_tokens": float(total), "share_of_common_components": round(share, 6)}

    def embed(self, texts: Sequence[str], state: Path) -> np.ndarray:
        """Return float32 unit vectors, shape ``(len(texts), 256)``; each depends on its text and the state alone."""
        from safetensors.numpy import load_file

        fitted = load_file(state / STATE)
        vectors = _unit(_pool(*_tokenize(texts), fitted["weights"]))
        for component in fitted["components"]:
            vectors -= (vectors * component).sum(axis=1, keepdims=True) * component
        return _unit(vectors).astype(np.float32)


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    remaining = iter(texts)
    while batch := list(islice(remaining, BATCH)):
        yield batch


def _tokenize(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the token ids of all `texts` in one int32 array, and each text's number of tokens."""
    encoded = [encoding.ids for encoding in _tokenizer().encode_batch_fast(list(texts), add_special_tokens=False)]
    lengths = np.array([len(ids) for ids in encoded], dtype=np.int64)
    return np.fromiter((token for ids in encoded for token in ids), dtype=np.int32, count=int(lengths.sum())), lengths


def _pool(flat: np.ndarray, lengths: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the weighted mean vector of each text, float64; SciPy's sparse product sums in one fixed order, without BLAS."""
    from scipy.sparse import csr_array

    ends = np.concatenate([[0], np.cumsum(lengths)])
    matrix = csr_array((weights[flat], flat, ends), shape=(len(lengths), len(weights)))
    matrix.sum_duplicates()
    return (matrix @ _table()) / np.maximum(lengths, 1)[:, None]


def _unit(vectors: np.ndarray) -> np.ndarray:
    norms = np.sqrt((vectors * vectors).sum(axis=1, keepdims=True))
    return np.where(norms > SMALLEST_NORM, vectors / np.where(norms > SMALLEST_NORM, norms, 1.0), 0.0)


@cache
def _table() -> np.ndarray:
    """Return the token vectors, float64, shape ``(32000, 256)``."""
    from safetensors.numpy import load_file

    return load_file(_package_file(TABLE))["embedding.weight"].astype(np.float64)


@cache
def _tokenizer() -> Tokenizer:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(_package_file(TOKENIZER)))


def _package_file(name: str) -> Path:
    try:
        path = Path(str(distribution("wordllama").locate_file(name)))
    except PackageNotFoundError as error:
        raise GristmillError(
            "embedder 'static_words' needs package wordllama, which is not installed; install it, or choose hashed_tfidf"
        ) from error
    if not path.exists():
        raise GristmillError(f"package wordllama {distribution('wordllama').version} has no file {name}; install version 0.4.0")
    return path
