"""fastText classifiers, read with package fasttext-predict: a model once per process, and one prediction per document."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.errors import GristmillError, UnknownName

if TYPE_CHECKING:
    from fasttext.FastText import _FastText

PREFIX = "__label__"
_MAGIC = 793712314
_ENTRIES = 2 * 4 + 12 * 4 + 8  # after magic, version and the training arguments
_WORDS = _ENTRIES + 3 * 4 + 2 * 8  # after the numbers of entries, words and labels, of tokens and of pruned indices


def predictions(path: Path, texts: Sequence[str], *, max_characters: int | None) -> list[dict[str, float]]:
    """Return the probability of every label that fastText gives one, the most probable first, for each text; line breaks are spaces.

    A text of white space has no prediction. Of a text longer than `max_characters` `excerpt` is read.

    Raises:
        GristmillError: the file is not a fastText classifier.
    """
    model = _load(path, path.stat().st_size, path.stat().st_mtime_ns)
    found = []
    for text in texts:
        line = " ".join(excerpt(text, max_characters).split())
        labels, shares = model.predict(line, k=-1) if line else ((), ())
        # Sums of float32 shares may end above 1 by rounding.
        found.append({label.removeprefix(PREFIX): min(1.0, share) for label, share in zip(labels, shares, strict=True)})
    return found


def label_probabilities(path: Path, texts: Sequence[str], label: str, *, max_characters: int | None) -> list[float]:
    """Return the probability of `label` for each of `texts`; NaN where there is no word.

    Raises:
        UnknownName: the model has no such label.
    """
    known = _labels(path, path.stat().st_size, path.stat().st_mtime_ns)
    if label not in known:
        raise UnknownName(f"label of {path.name}", label, known)
    found = predictions(path, texts, max_characters=max_characters)
    return [shares.get(label, 0.0) if shares else math.nan for shares in found]


def excerpt(text: str, max_characters: int | None) -> str:
    """Return `text`, or where it is longer than `max_characters` five pieces of a fifth of that, evenly from its start to its end."""
    if max_characters is None or len(text) <= max_characters:
        return text
    size = max(1, max_characters // 5)
    starts = [number * (len(text) - size) // 4 for number in range(5)]
    return " ".join(text[start : start + size] for start in starts)


@lru_cache(maxsize=2)
def _load(path: Path, size: int, modified: int) -> _FastText:
    """Load `path` once per process for each size and time of modification."""
    import fasttext

    try:
        model = fasttext.load_model(str(path))
        model.predict("a text", k=1)
    except ValueError as error:
        raise GristmillError(
            f"{path.name} is not a fastText classifier ({error}); give the .bin or .ftz file of a supervised model"
        ) from error
    return model


@lru_cache(maxsize=2)
def _labels(path: Path, size: int, modified: int) -> tuple[str, ...]:
    """Return the labels in the dictionary of `path`, in its order: predictions leave out those of probability 0.

    The layout is that of fastText's model files, version 12: https://github.com/facebookresearch/fastText/blob/main/src/dictionary.cc
    """
    content = path.read_bytes()
    magic, entries = int.from_bytes(content[:4], "little"), int.from_bytes(content[_ENTRIES : _ENTRIES + 4], "little")
    if magic != _MAGIC:
        raise GristmillError(f"{path.name} is not a fastText model; give the .bin or .ftz file of a supervised one")
    found, place = [], _WORDS
    for _ in range(entries):
        end = content.index(b"\0", place)
        if content[end + 9]:  # after the word its count, eight bytes, and its type: 0 a word, 1 a label
            found.append(content[place:end].decode("utf-8", "replace").removeprefix(PREFIX))
        place = end + 10
    return tuple(found)
