"""MinHash: signatures whose agreement estimates how many word n-grams two texts share, and bands that find similar pairs.

    words      lower-cased runs of letters, digits and `_`; one character each in scripts written without spaces
    shingle    `ngram` consecutive words; a text with fewer words is one shingle
    signature  for each of P random hash functions, the minimum over the text's shingles
    agreement  share of equal positions of two signatures: an unbiased estimate of the Jaccard similarity of the two shingle
               sets, standard error sqrt(J (1 - J) / P) (Broder, "On the resemblance and containment of documents", 1997)
    bands      `bands` groups of `rows` positions; two texts with similarity J share a whole band with probability
               1 - (1 - J^rows)^bands (Leskovec, Rajaraman, Ullman, "Mining of Massive Datasets", section 3.4)

The hash functions are multiply-shift, ``((a x + b) mod 2^64) >> 32`` with random 64-bit `a` and `b`: strongly universal on
32-bit `x` (Dietzfelbinger, "Universal hashing and k-wise independent random variables via integer arithmetic without
primes", STACS 1996). The shift keeps the order, so the minimum is taken before it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence

import numpy as np

NO_SPACES = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
"""Thai, Lao, Burmese, Khmer, kana and Han: a run of letters there is a sentence, so every character counts as a word."""

WORD = re.compile(rf"[{NO_SPACES}]|[^\W{NO_SPACES}]+")
ASCII_WORD = re.compile(r"\w+", re.ASCII)
SPACE = re.compile(r"\s")

PIECE_CHARACTERS = 65_536
"""A text is read in pieces of about this length, so that memory does not grow with the longest document."""
BLOCK_WORDS = 16_384
"""Words that are hashed together: the arrays of a block stay in a core's cache."""
MAX_MEMO = 500_000
"""Words whose hash is remembered; when full, the memo starts anew."""
MAX_MEMO_CHARACTERS = 64
NO_SHINGLE = np.uint64(2**64 - 1)


def pieces(text: str, characters: int = PIECE_CHARACTERS) -> Iterator[str]:
    """Yield `text` in consecutive pieces of at least `characters`, cut after white space, at twice that where there is none."""
    start = 0
    while len(text) - start > 2 * characters:
        gap = SPACE.search(text, start + characters, start + 2 * characters)
        end = gap.end() if gap else start + 2 * characters
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def exact_hash(text: str, piece_characters: int = PIECE_CHARACTERS) -> bytes:
    """Return 16 bytes (BLAKE2b) of `text` with every run of white space folded to one space and none at the ends; case is kept."""
    digest = hashlib.blake2b(digest_size=16)
    started = gap = False
    for piece in pieces(text, piece_characters):
        folded = " ".join(piece.split())
        if not folded:
            gap = True
            continue
        if started and (gap or piece[0].isspace()):
            digest.update(b" ")
        digest.update(folded.encode("utf-8", "surrogatepass"))
        started, gap = True, piece[-1].isspace()
    return digest.digest()


class WordHashes(dict[str, int]):
    """64-bit BLAKE2b hashes of words, remembered: most words of a text have been seen before."""

    def __missing__(self, word: str) -> int:
        value = int.from_bytes(hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
        if len(word) <= MAX_MEMO_CHARACTERS:
            if len(self) >= MAX_MEMO:
                self.clear()
            self[word] = value
        return value

    def of(self, piece: str) -> list[int]:
        """Return the hashes of the words of `piece`, in order."""
        pattern = ASCII_WORD if piece.isascii() else WORD
        return [self[word] for word in pattern.findall(piece.lower())]


class Signer:
    """Signs texts; the same texts and arguments give the same bytes on every machine."""

    def __init__(self, *, num_permutations: int, ngram: int, seed: int, piece_characters: int = PIECE_CHARACTERS) -> None:
        random = np.random.Generator(np.random.PCG64(seed))
        self._multipliers = random.integers(0, 2**64, num_permutations, dtype=np.uint64) | np.uint64(1)
        self._increments = random.integers(0, 2**64, num_permutations, dtype=np.uint64)
        self._weights = random.integers(0, 2**64, ngram, dtype=np.uint64) | np.uint64(1)
        self._words = WordHashes()
        self._piece_characters = piece_characters

    def sign(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return signatures, uint32 ``(len(texts), num_permutations)``, and each text's number of shingles, repeats counted.

        A text without words has no shingle and a signature of ones; it is similar to nothing.
        """
        minima = np.full((len(texts), len(self._multipliers)), NO_SHINGLE)
        counts = np.zeros(len(texts), dtype=np.int64)
        words: list[int] = []
        owners: list[int] = []
        starts: list[int] = []
        for owner, text in enumerate(texts):
            for segment in self._segments(text):
                counts[owner] += len(segment) - len(self._weights) + 1
                owners.append(owner)
                starts.append(len(words))
                words += segment
                if len(words) >= BLOCK_WORDS:
                    self._lower(minima, words, owners, starts)
                    words, owners, starts = [], [], []
        if words:
            self._lower(minima, words, owners, starts)
        return (minima >> np.uint64(32)).astype(np.uint32), counts

    def _segments(self, text: str) -> Iterator[list[int]]:
        """Yield the word hashes of `text` piece by piece, each with the words before it that share a shingle with it."""
        ngram, before, any_yet = len(self._weights), [], False
        for piece in pieces(text, self._piece_characters):
            before += self._words.of(piece)
            if len(before) >= ngram:
                yield before
                before, any_yet = before[len(before) - ngram + 1 :], True
        if before and not any_yet:
            yield before + [0] * (ngram - len(before))

    def _lower(self, minima: np.ndarray, words: list[int], owners: list[int], starts: list[int]) -> None:
        """Lower `minima` by the shingles of one block: segments of `words` at `starts`, each of text ``owners[i]``."""
        ngram = len(self._weights)
        values = np.array(words, dtype=np.uint64)
        hashes = np.zeros(len(values) - ngram + 1, dtype=np.uint64)
        for offset, weight in enumerate(self._weights):
            hashes += values[offset : offset + len(hashes)] * weight
        within = np.ones(len(hashes), dtype=bool)
        within[(np.array(starts[1:], dtype=np.int64)[:, None] - np.arange(1, ngram)).ravel()] = False
        shingles = mixed(hashes[within]) >> np.uint64(32)
        texts, first = np.unique(owners, return_index=True)
        bounds = np.array(starts, dtype=np.int64)[first] - first * (ngram - 1)
        lowest = np.empty((len(self._multipliers), len(texts)), dtype=np.uint64)
        hashed = np.empty_like(shingles)
        for row, (multiplier, increment) in enumerate(zip(self._multipliers, self._increments, strict=True)):
            np.multiply(shingles, multiplier, out=hashed)
            np.add(hashed, increment, out=hashed)
            np.minimum.reduceat(hashed, bounds, out=lowest[row])
        minima[texts] = np.minimum(minima[texts], lowest.T)


def mixed(values: np.ndarray) -> np.ndarray:
    """Return uint64 `values` with their bits mixed (the finaliser of SplitMix64; Steele, Lea, Flood, OOPSLA 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def agreement(signatures: np.ndarray, signature: np.ndarray) -> np.ndarray:
    """Return the share of equal positions, float64 ``(n,)``, of `signatures` ``(n, P)`` with `signature`, ``(P,)`` or ``(n, P)``."""
    return (signatures == signature).mean(axis=1)


def buckets(signatures: np.ndarray, *, bands: int, rows: int, usable: np.ndarray) -> np.ndarray:
    """Return bucket numbers, int64 ``(n, bands)``: equal where two signatures agree on a whole band, -1 where a text is alone.

    `usable` (bool, ``(n,)``) marks the texts that take part. Bands are compared by a 64-bit hash: a collision makes a
    pair of texts to compare, not a match.
    """
    found = np.full((len(signatures), bands), -1, dtype=np.int64)
    positions = np.flatnonzero(usable)
    offset = 0
    for band in range(bands):
        keys = np.zeros(len(positions), dtype=np.uint64)
        for row in range(band * rows, (band + 1) * rows):
            keys = mixed(keys + signatures[positions, row].astype(np.uint64) + np.uint64(1))
        _, inverse, sizes = np.unique(keys, return_inverse=True, return_counts=True)
        shared = sizes[inverse] > 1
        found[positions[shared], band] = inverse[shared] + offset
        offset += len(sizes)
    return found
