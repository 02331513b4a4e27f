"""MinHash: signatures whose agreement estimates how many word n-grams two texts share, and bands that find similar pairs.

    words      by dialect, see `WORDS`
    shingle    xxHash64 of `ngram` consecutive words joined by a space, in UTF-8; a text with fewer words is one shingle
    signature  for each of P hash functions ``((a x + b) mod 2^64) mod (2^61 - 1)`` the minimum over the text's shingles, with
               `a` and `b` drawn by numpy's Mersenne Twister: those of datatrove 0.10.1 (pipeline/dedup/minhash.py)
    agreement  share of equal positions of two signatures: an unbiased estimate of the Jaccard similarity of the two shingle
               sets, standard error sqrt(J (1 - J) / P) (Broder, "On the resemblance and containment of documents", 1997)
    bands      `bands` groups of `rows` positions; two texts with similarity J share a whole band with probability
               1 - (1 - J^rows)^bands (Leskovec, Rajaraman, Ullman, "Mining of Massive Datasets", section 3.4)

With words `datatrove` the minima are datatrove's bit for bit, at any number of bands, rows and words per shingle.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pipelines import folding
from pipelines.words import encode

WordDialect = Literal["folded", "datatrove"]
"""`folded`: runs of letters, digits and `_`, lower-cased, without accents; in scripts written without spaces, characters.
`datatrove`: its simplification (numbers are 0, no punctuation), then spaCy's English tokenizer."""

SPACE = re.compile(r"\s")
PIECE_CHARACTERS = 65_536
"""A text is read in pieces of about this length, so that memory does not grow with the longest document."""
BATCH_CHARACTERS = 2_097_152
"""Short texts are signed together up to this many characters."""
NO_SHINGLE = np.uint64(2**64 - 1)
MERSENNE = 2**61 - 1


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


@dataclass(frozen=True)
class Words:
    """The words of some segments of text: UTF-8 bytes in which consecutive words of a segment are parted by one space."""

    data: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    offsets: np.ndarray
    """int64 ``(segments + 1,)``: segment s has words ``offsets[s]:offsets[s + 1]``."""

    def after(self, before: Words, keep: int) -> Words:
        """Return these words, one segment, behind the last `keep` words of `before`."""
        first = max(0, len(before.starts) - keep)
        parts = [part for part in (before._cut(first), self._cut(0)) if len(part.starts)]
        if len(parts) < 2:
            return parts[0] if parts else self
        head, tail = parts
        data = np.concatenate([head.data, np.array([32], dtype=np.uint8), tail.data])
        starts = np.concatenate([head.starts, tail.starts + len(head.data) + 1])
        ends = np.concatenate([head.ends, tail.ends + len(head.data) + 1])
        return Words(data, starts, ends, np.array([0, len(starts)]))

    def _cut(self, first: int) -> Words:
        """Return the words from `first` on as one segment, without bytes around them."""
        starts, ends = self.starts[first:], self.ends[first:]
        if not len(starts):
            return Words(self.data[:0], starts, ends, np.array([0, 0]))
        return Words(self.data[starts[0] : ends[-1]], starts - starts[0], ends - starts[0], np.array([0, len(starts)]))


def folded_words(texts: Sequence[str]) -> Words:
    """Return the words of dialect `folded`."""
    from pipelines import minhash_kernels

    codes, bounds = encode(texts)
    out = np.empty(10 * len(codes) + 8, dtype=np.uint8)
    starts, ends = np.empty((2, len(codes) + 1), dtype=np.int64)
    offsets = np.empty(len(bounds), dtype=np.int64)
    folds = folding.folded_characters()
    count = minhash_kernels.cut_words(codes, bounds, folding.word_classes(), *folds, out, starts, ends, offsets)
    return Words(out, starts[:count], ends[:count], offsets)


def datatrove_words(texts: Sequence[str]) -> Words:
    """Return the words of dialect `datatrove`."""
    from pipelines import minhash_kernels
    from pipelines.words import split_words

    found = split_words(simplified_texts(texts), "spacy_en")
    return Words(*minhash_kernels.joined_words(found.codes, found.starts, found.ends, found.offsets), found.offsets)


def simplified_texts(texts: Sequence[str]) -> list[str]:
    """Return `texts` simplified as datatrove does."""
    from pipelines import minhash_kernels

    codes, bounds = encode(texts)
    out = np.empty(10 * len(codes) + 8, dtype=np.uint8)
    starts, ends = np.zeros((2, len(texts)), dtype=np.int64)
    minhash_kernels.simplify(codes, bounds, folding.simplified_classes(), *folding.folded_characters(), out, starts, ends)
    content = out.data
    return [
        str(content[start:end], "utf-8", "surrogatepass") if end >= 0 else folding.simplified(text)
        for text, start, end in zip(texts, starts.tolist(), ends.tolist(), strict=True)
    ]


WORDS = {"folded": folded_words, "datatrove": datatrove_words}


class Signer:
    """Signs texts; the same texts and arguments give the same bytes on every machine."""

    def __init__(
        self, *, num_permutations: int, ngram: int, seed: int, words: WordDialect = "folded", piece_characters: int = PIECE_CHARACTERS
    ) -> None:
        random = np.random.RandomState(seed)
        self._multipliers = random.randint(1, MERSENNE, dtype=np.uint64, size=num_permutations)
        self._increments = random.randint(0, MERSENNE, dtype=np.uint64, size=num_permutations)
        self._ngram = ngram
        self._words = WORDS[words]
        self._piece_characters = piece_characters

    def sign(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return signatures, uint64 ``(len(texts), num_permutations)``, and each text's number of shingles, repeats counted.

        A text without words has no shingle and a signature of ones; it is similar to nothing.
        """
        minima = np.full((len(texts), len(self._multipliers)), NO_SHINGLE)
        counts = np.zeros(len(texts), dtype=np.int64)
        batch: list[int] = []
        size = 0
        for owner, text in enumerate(texts):
            if len(text) > 2 * self._piece_characters:
                self._sign_long(owner, text, minima, counts)
                continue
            batch.append(owner)
            size += len(text)
            if size >= BATCH_CHARACTERS:
                self._lower(self._words([texts[row] for row in batch]), batch, minima, counts)
                batch, size = [], 0
        if batch:
            self._lower(self._words([texts[row] for row in batch]), batch, minima, counts)
        return minima, counts

    def _sign_long(self, owner: int, text: str, minima: np.ndarray, counts: np.ndarray) -> None:
        """Sign `text` piece by piece, each with the words before it that share a shingle with it."""
        before = self._words([""])
        any_yet = False
        for piece in pieces(text, self._piece_characters):
            before = self._words([piece]).after(before, self._ngram - 1 if any_yet else len(before.starts))
            if len(before.starts) >= self._ngram:
                self._lower(before, [owner], minima, counts)
                any_yet = True
        if not any_yet:
            self._lower(before, [owner], minima, counts)

    def _lower(self, words: Words, owners: Sequence[int], minima: np.ndarray, counts: np.ndarray) -> None:
        from pipelines import minhash_kernels

        rows = np.array(owners, dtype=np.int64)
        functions = (self._ngram, self._multipliers, self._increments)
        minhash_kernels.sign_words(words.data, words.starts, words.ends, words.offsets, rows, *functions, minima, counts)


def agreement(signatures: np.ndarray, signature: np.ndarray) -> np.ndarray:
    """Return the share of equal positions, float64 ``(n,)``, of `signatures` ``(n, P)`` with `signature`, ``(P,)`` or ``(n, P)``."""
    return (signatures == signature).mean(axis=1)


def band_keys(signatures: np.ndarray, *, bands: int, rows: int) -> np.ndarray:
    """Return uint64 ``(n, bands)``: equal in two rows where two signatures agree on that whole band.

    A band is compared by a 64-bit hash of its number and its positions: a collision makes a pair to compare, not a match.
    """
    from pipelines import minhash_kernels

    return minhash_kernels.band_keys(signatures, bands, rows)
