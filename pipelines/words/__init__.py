"""Words of texts, in a named dialect: what a rule about words counts depends on it.

    spacy_en    spaCy's English tokens, punctuation marks being tokens of their own (datatrove)
    whitespace  `str.split`: punctuation stays on its word (Dolma, NeMo Curator)
    uax29       words between the boundaries of Unicode Standard Annex 29 that hold a letter or a digit (DCLM)

A word is a stretch of its text, so a split is arrays of offsets into the code points of all texts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Dialect = Literal["spacy_en", "whitespace", "uax29"]
"""What a word is."""

GROUP_CHARACTERS = 1_000_000
"""Characters taken at a time: bounds the memory of the arrays."""


@dataclass(frozen=True)
class Words:
    """The words of a group of texts."""

    text_codes: np.ndarray
    """uint32: the code points of all texts, one after the other."""
    text_bounds: np.ndarray
    """int64, one more than texts: text t is ``text_codes[text_bounds[t]:text_bounds[t + 1]]``."""
    codes: np.ndarray
    """uint32: what the words are offsets in; `text_codes` itself, but where `UNSAFE` was taken out of a text."""
    bounds: np.ndarray
    """int64: the texts in `codes`."""
    starts: np.ndarray
    """int32: where each word begins in `codes`."""
    ends: np.ndarray
    """int32: where each word ends."""
    offsets: np.ndarray
    """int64, one more than texts: text t has words ``offsets[t]:offsets[t + 1]``."""

    @property
    def counts(self) -> np.ndarray:
        """Number of words of each text."""
        return np.diff(self.offsets)

    def of(self, text: int) -> list[str]:
        """Return the words of one text."""
        return [decode(self.codes[self.starts[w] : self.ends[w]]) for w in range(self.offsets[text], self.offsets[text + 1])]


def encode(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the code points of all `texts` (uint32) and where each begins (int64, one more than texts)."""
    bounds = np.zeros(len(texts) + 1, np.int64)
    np.cumsum([len(text) for text in texts], out=bounds[1:])
    return np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), np.uint32), bounds


def decode(codes: np.ndarray) -> str:
    """Return the text of code points."""
    return codes.astype("<u4").tobytes().decode("utf-32-le", "surrogatepass")


def split_words(texts: Sequence[str], dialect: Dialect = "spacy_en") -> Words:
    """Return the words of `texts`.

    Raises:
        ValueError: `dialect` is not known.
    """
    if dialect == "spacy_en":
        return _spacy_words(texts)
    codes, bounds = encode(texts)
    if dialect == "whitespace":
        from pipelines.words._plain import split_at_spaces

        return Words(codes, bounds, codes, bounds, *split_at_spaces(codes, bounds))
    if dialect == "uax29":
        from pipelines.words._plain import split_at_boundaries

        return Words(codes, bounds, codes, bounds, *split_at_boundaries(texts))
    raise ValueError(f"words: {dialect!r} is not a dialect of words; known: spacy_en, whitespace, uax29")


UNSAFE = "IS_ALPHA"
"""datatrove takes this name out of a text of whose words it is one, since spaCy fails on it."""


def _spacy_words(texts: Sequence[str]) -> Words:
    from pipelines.words._spacy_english import split_texts

    codes, bounds = encode(texts)
    words = Words(codes, bounds, codes, bounds, *split_texts(codes, bounds))
    if not any(UNSAFE in text for text in texts):
        return words
    safe = [text.replace(UNSAFE, "") if UNSAFE in text and UNSAFE in words.of(number) else text for number, text in enumerate(texts)]
    changed, changed_bounds = encode(safe)
    return Words(codes, bounds, changed, changed_bounds, *split_texts(changed, changed_bounds))


def in_groups(texts: Sequence[str], characters: int = GROUP_CHARACTERS) -> Iterator[Sequence[str]]:
    """Yield `texts` in groups of at most `characters`, a longer text on its own."""
    start = size = 0
    for number, text in enumerate(texts):
        if size and size + len(text) > characters:
            yield texts[start:number]
            start, size = number, 0
        size += len(text)
    if start < len(texts):
        yield texts[start:]
