"""A logistic regression over hashed word n-grams: one pass over the words for features, sequential AdaGrad for the weights.

Everything is summed in one fixed order, so the weights are the same bits in every run on one machine.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipelines.filters._hashed_words import hash_words, joined, word_groups
from pipelines.native import KERNEL

MOST_NGRAMS = 512
"""Evidence grows with the root of the n-grams, but of no more than these: a book is not surer than a page."""
SMALLEST_GRADIENT = 1e-8


def features(texts: Sequence[str], *, ngrams: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the hashed n-grams of `texts`, n up to `ngrams`: uint32 in ``[0, 2**bits)``, and offsets, one more than texts."""
    return _ngrams(*hash_words(texts), ngrams=ngrams, bits=bits)


def logits(texts: Sequence[str], weights: np.ndarray, bias: float, *, ngrams: int) -> np.ndarray:
    """Return the logit of each of `texts`, float64; NaN for a text without words.

    Args:
        weights: float32, a power of two of them.
    """
    bits = len(weights).bit_length() - 1
    parts = []
    for hashes, offsets in word_groups(texts):
        parts.append(predict(*_ngrams(hashes, offsets, ngrams=ngrams, bits=bits), weights, bias))
    return np.concatenate([np.zeros(0), *parts])


def train(
    indices: np.ndarray, offsets: np.ndarray, classes: np.ndarray, order: np.ndarray, *, bits: int, rate: float, penalty: float
) -> tuple[np.ndarray, float]:
    """Return weights (float32, ``2**bits``) and bias of a logistic regression.

    Args:
        indices: hashed n-grams of all examples, as `features` returns them.
        classes: 1.0 or 0.0 for each example; both classes weigh alike.
        order: the examples in the order of the steps, any number of times.
        rate: AdaGrad's step.
        penalty: of the squared weights of an example's features.
    """
    weights, squares = np.zeros(2**bits), np.full(2**bits, SMALLEST_GRADIENT)
    bias = _train(indices, offsets, classes, order, weights, squares, rate, penalty)
    return weights.astype(np.float32), float(bias)


def predict(indices: np.ndarray, offsets: np.ndarray, weights: np.ndarray, bias: float) -> np.ndarray:
    """Return ``bias + mean weight * sqrt(n-grams, MOST_NGRAMS at most)`` of each text that `features` cut; NaN where it has none."""
    result = np.full(len(offsets) - 1, np.nan)
    _predict(indices, offsets, weights, bias, result)
    return result


def _ngrams(hashes: np.ndarray, offsets: np.ndarray, *, ngrams: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
    indices, ends = np.empty(len(hashes) * ngrams, dtype=np.uint32), np.zeros(len(offsets), dtype=np.int64)
    count = _features(hashes, offsets, ngrams, np.uint64(2**bits - 1), indices, ends)
    return indices[:count].copy(), ends


@KERNEL
def _features(hashes: np.ndarray, offsets: np.ndarray, ngrams: int, mask: np.uint64, indices: np.ndarray, ends: np.ndarray) -> int:
    """Write the hashed n-grams into `indices`, and where each text ends into `ends`; return their number."""
    count = 0
    for document in range(len(offsets) - 1):
        for first in range(offsets[document], offsets[document + 1]):
            value = hashes[first]
            indices[count] = value & mask
            count += 1
            for last in range(first + 1, min(first + ngrams, offsets[document + 1])):
                value = joined(value, hashes[last])
                indices[count] = value & mask
                count += 1
        ends[document + 1] = count
    return count


@KERNEL
def _predict(indices: np.ndarray, offsets: np.ndarray, weights: np.ndarray, bias: float, result: np.ndarray) -> None:
    for document in range(len(offsets) - 1):
        count = offsets[document + 1] - offsets[document]
        if count:
            total = 0.0
            for place in range(offsets[document], offsets[document + 1]):
                total += weights[indices[place]]
            result[document] = bias + total / count * np.sqrt(min(count, MOST_NGRAMS))


@KERNEL
def _train(
    indices: np.ndarray,
    offsets: np.ndarray,
    classes: np.ndarray,
    order: np.ndarray,
    weights: np.ndarray,
    squares: np.ndarray,
    rate: float,
    penalty: float,
) -> float:
    """Change `weights` and their sums of squared gradients in `squares`; return the bias."""
    bias, bias_square = 0.0, SMALLEST_GRADIENT
    positives = classes.sum()
    share = positives / len(classes)
    for example in order:
        start, end = offsets[example], offsets[example + 1]
        if end == start:
            continue
        scale = np.sqrt(min(end - start, MOST_NGRAMS)) / (end - start)
        total = bias
        for place in range(start, end):
            total += weights[indices[place]] * scale
        label = classes[example]
        weight = 0.5 / share if label > 0.5 else 0.5 / (1.0 - share)
        error = weight * (1.0 / (1.0 + np.exp(-total)) - label)
        bias_square += error * error
        bias -= rate * error / np.sqrt(bias_square)
        for place in range(start, end):
            index = indices[place]
            gradient = error * scale + penalty * weights[index]
            squares[index] += gradient * gradient
            weights[index] -= rate * gradient / np.sqrt(squares[index])
    return bias
