"""Linear models over TF-IDF of words, for documents and for each of their sentences, in one pass over the characters.

The features are those of scikit-learn's `TfidfVectorizer` with its own token pattern (two or more word characters), lower case,
idf and the l2 norm; the values are those of a linear decision function. Same operations in the same order, so the same bits.
Import it inside functions: numba loads with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipelines.filters._vocabulary import LINE_FEED, OFFSET, PRIME, STOP, Vocabulary, character_classes, encode, lookup, vocabulary
from pipelines.native import ARRAYS


@dataclass(frozen=True)
class LinearWords:
    """A vocabulary as an open hash table, and the models' weights."""

    words: Vocabulary
    """The words by number."""
    idf: np.ndarray
    """float64 per word."""
    weights: np.ndarray
    """float64 of shape ``(words, models)``."""
    intercepts: np.ndarray
    """float64 per model."""

    @classmethod
    def of(cls, numbers: Mapping[str, int], idf: np.ndarray, weights: np.ndarray, intercepts: np.ndarray) -> LinearWords:
        """Return the models over the words of `numbers`, which are 0 and up; `weights` has a row per model."""
        words = vocabulary(sorted(numbers, key=numbers.__getitem__))
        return cls(words, np.asarray(idf, np.float64), np.ascontiguousarray(weights.T, np.float64), np.asarray(intercepts))

    def decide(self, texts: Sequence[str], max_sentence_characters: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the values of the decision functions of `texts` and of their sentences, and each text's number of sentences.

        A sentence ends at a line feed, or at white space after a stop; what follows `max_sentence_characters` of lower case is
        left out. One of white space alone is none.
        """
        codes, bounds = encode([text.lower() for text in texts])
        most = int(np.count_nonzero(character_classes()[codes] & (STOP | LINE_FEED))) + len(texts)
        documents, sentences = np.empty((len(texts), self.weights.shape[1])), np.empty((most, self.weights.shape[1]))
        counts = np.zeros(len(texts), np.int64)
        arrays = (*self.words, self.idf, self.weights, self.intercepts)
        used = _decide(codes, bounds, character_classes(), max_sentence_characters, *arrays, documents, sentences, counts)
        return documents, sentences[:used], counts


@ARRAYS
def _value(words, count, idf, weights, intercepts, out):  # noqa: ANN001, ANN202
    """Write the decision values of a bag of `count` word numbers, which are sorted in place."""
    bag = words[:count]
    bag.sort()
    squares, start = 0.0, 0
    while start < count:
        end = start + 1
        while end < count and bag[end] == bag[start]:
            end += 1
        value = (end - start) * idf[bag[start]]
        squares += value * value
        start = end
    norm = np.sqrt(squares)
    out[:] = 0.0
    start = 0
    while start < count:
        end = start + 1
        while end < count and bag[end] == bag[start]:
            end += 1
        value = (end - start) * idf[bag[start]] / norm
        for model in range(len(out)):
            out[model] += value * weights[bag[start], model]
        start = end
    for model in range(len(out)):
        out[model] += intercepts[model]


@ARRAYS
def _decide(codes, texts, classes, limit, table, letters, bounds, idf, weights, intercepts, documents, sentences, counts):  # noqa: ANN001, ANN202
    longest = 1
    for text in range(len(texts) - 1):
        longest = max(longest, texts[text + 1] - texts[text])
    bag, part = np.empty(longest // 2 + 1, np.int32), np.empty(longest // 2 + 1, np.int32)
    used = 0
    for text in range(len(texts) - 1):
        place, end = texts[text], texts[text + 1]
        in_bag, in_part, begun, visible, first = 0, 0, place, False, used
        closing = False  # after a stop and what closes it: white space would end the sentence
        while place < end:
            kind = classes[codes[place]]
            if kind & 1:
                start, hashed, at_cut, cut = place, OFFSET, OFFSET, begun + limit
                while place < end and classes[codes[place]] & 1:
                    if place == cut:
                        at_cut = hashed
                    hashed = (hashed ^ np.uint64(codes[place])) * PRIME
                    place += 1
                visible, closing = True, False
                word = lookup(codes, start, place, hashed, table, letters, bounds) if place - start > 1 else np.int32(-1)
                if word >= 0:
                    bag[in_bag] = word
                    in_bag += 1
                if place > cut:
                    word = lookup(codes, start, cut, at_cut, table, letters, bounds) if cut - start > 1 else np.int32(-1)
                if word >= 0:
                    part[in_part] = word
                    in_part += 1
                continue
            if (kind & 2 and closing) or kind & 16:
                if visible:
                    _value(part, in_part, idf, weights, intercepts, sentences[used])
                    used += 1
                same = 2 if closing else 16
                while place < end and classes[codes[place]] & same:
                    place += 1
                in_part, begun, visible, closing = 0, place, False, False
                continue
            visible = visible or not kind & 2
            closing = bool(kind & 4) or (closing and bool(kind & 8))
            place += 1
        if visible:
            _value(part, in_part, idf, weights, intercepts, sentences[used])
            used += 1
        _value(bag, in_bag, idf, weights, intercepts, documents[text])
        counts[text] = used - first
    return used
