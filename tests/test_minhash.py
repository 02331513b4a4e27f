"""Signatures against datatrove's own, byte for byte; words, hashes and minima against plain definitions."""

from __future__ import annotations

import random
import unicodedata
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.minhash import Signer, agreement, band_keys, folded_words, simplified_texts

DATA = Path(__file__).parent.parent / "data" / "sample"
MERSENNE = 2**61 - 1
HARD = [
    "",
    "two words",
    "1.2.3,4 \u0661\u066b\u0662 v1.0 \uff11\uff0e 3,000,000.50",
    "\u0130stanbul \u03a3\u0391\u03a3 \u03a3 caf\u00e9 cafe\u0301 \u0301 \u0301x",
    "\ud55c\uad6d\uc5b4 \u6f22\u5b57\u3002\u304b\u306a \U00020000\U0002f801 \U0001f600\u200d\U0001f525",
    "don't we've I'm it's U.S.A. e.g. :-) a--b http://x.y/?q=1 x_y 10km 5pm ain't cannot gonna",
    "\u1715\u1734 a\u302e\u0301b \x00\x1f\x85\u2028\u3000 tab\tnew\nline\r\n",
]


@pytest.fixture(scope="module")
def documents() -> list[str]:
    """Documents of every domain, clean and dirty, and texts made to be hard."""
    texts = []
    for name in ("corpus", "dirty"):
        rows = pq.read_table(DATA / f"{name}.parquet", columns=["text", "domain"]).to_pylist()
        random.Random(5).shuffle(rows)
        seen: Counter[str] = Counter()
        for row in rows:
            seen[row["domain"]] += 1
            if seen[row["domain"]] <= 4 and len(row["text"]) < 20_000:
                texts.append(row["text"])
    return texts + HARD


def peer(bands: int, rows: int, ngram: int, seed: int) -> object:
    """Return datatrove's first stage; xxhash 4 takes bytes alone, earlier ones made them of strings so."""
    minhash = pytest.importorskip("datatrove.pipeline.dedup.minhash")
    xxhash = pytest.importorskip("xxhash")
    config = minhash.MinhashConfig(n_grams=ngram, num_buckets=bands, hashes_per_bucket=rows, seed=seed)
    stage = minhash.MinhashDedupSignature("unused", config)
    stage._hash_func = lambda words: xxhash.xxh64_intdigest(words.encode())
    return stage


@pytest.mark.parametrize(("bands", "rows", "ngram", "seed"), [(14, 8, 5, 1), (5, 3, 2, 9), (1, 20, 13, 4)])
def test_signatures_are_datatroves(documents: list[str], bands: int, rows: int, ngram: int, seed: int) -> None:
    stage = peer(bands, rows, ngram, seed)
    signatures, counts = Signer(num_permutations=bands * rows, ngram=ngram, seed=seed, words="datatrove").sign(documents)
    compared = 0
    for text, signature, count in zip(documents, signatures, counts, strict=True):
        shingles = stage.get_shingles(text)
        if not shingles.size:  # datatrove gives a text with fewer words than an n-gram no signature
            assert count <= 1
            continue
        theirs = np.array(stage.get_signature(shingles), dtype=np.uint64).ravel()
        assert count == len(shingles) and signature.tobytes() == theirs.tobytes()
        compared += 1
    assert compared >= 60


@settings(deadline=None)
@given(
    st.lists(st.text(alphabet=st.sampled_from("aB1.,' -_\n\u0301\u00e9\u0130\u03a3\u066b\u0661\u1715\U00020000\u00a0\u4e00"), max_size=30))
)
def test_simplification_is_datatroves(texts: list[str]) -> None:
    text = pytest.importorskip("datatrove.utils.text")
    assert simplified_texts(texts) == [text.simplify_text(each) for each in texts]


def test_the_same_bands_give_datatroves_pairs(tmp_path: Path, documents: list[str]) -> None:
    """What the files of datatrove's second stage join is what sharing a band of our signatures joins."""
    minhash = pytest.importorskip("datatrove.pipeline.dedup.minhash")
    data = pytest.importorskip("datatrove.data")
    stage = peer(14, 8, 5, 1)
    texts = [text for text in documents if len(text.split()) > 100]
    chance = random.Random(1)
    for text in texts[:40]:
        words = text.split(" ")
        for place in chance.sample(range(len(words)), max(1, len(words) // 60)):
            words[place] = "edited"
        texts.append(" ".join(words))
    stage.output_folder = minhash.get_datafolder(str(tmp_path / "signatures"))
    stage.run([data.Document(text=text, id=str(number)) for number, text in enumerate(texts)])
    for bucket in range(14):
        minhash.MinhashDedupBuckets(str(tmp_path / "signatures"), str(tmp_path / "pairs"), config=stage.config).run(None, bucket, 14)
    pairs = [np.fromfile(path, dtype="<u4").reshape(-1, 4)[:, [1, 3]] for path in sorted((tmp_path / "pairs").glob("*.dups"))]
    signatures = Signer(num_permutations=112, ngram=5, seed=1, words="datatrove").sign(texts)[0]
    keys = band_keys(signatures.astype(np.uint32), bands=14, rows=8)
    mine = [pair for band in keys.T for pair in combinations(range(len(texts)), 2) if band[pair[0]] == band[pair[1]]]
    assert components(len(texts), np.concatenate(pairs).tolist()) == components(len(texts), mine)
    assert len(mine) > 100


def components(total: int, pairs: Sequence[Sequence[int]]) -> list[int]:
    """Return the smallest member of each number's component."""
    found = list(range(total))
    for one, other in pairs:
        low, high = sorted((found[one], found[other]))
        found = [low if value == high else value for value in found]
    return found


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_hash_is_xxhash64(value: bytes) -> None:
    xxhash = pytest.importorskip("xxhash")
    from pipelines.minhash_kernels import xxhash64

    data = np.frombuffer(b"?" + value + b"?", dtype=np.uint8)
    assert xxhash64(data, 1, len(value) + 1) == xxhash.xxh64_intdigest(value)


EDGES = st.sampled_from([0, 1, MERSENNE - 1, MERSENNE, MERSENNE + 1, 8 * MERSENNE, 8 * MERSENNE + 7, 2**64 - 1])


@settings(deadline=None)
@given(st.lists(st.integers(0, 2**64 - 1) | EDGES, min_size=1), st.integers(1, MERSENNE - 1) | st.just(1), st.integers(0, MERSENNE - 1))
def test_minima_are_remainders_by_the_mersenne_prime(hashes: list[int], multiplier: int, increment: int) -> None:
    from pipelines.minhash_kernels import lower_minima

    minima = np.full(1, 2**64 - 1, dtype=np.uint64)
    arguments = (np.array([value], dtype=np.uint64) for value in (multiplier, increment))
    lower_minima(minima, np.array(hashes, dtype=np.uint64), len(hashes), *arguments)
    assert minima[0] == min((value * multiplier + increment) % 2**64 % MERSENNE for value in hashes)


@pytest.mark.parametrize("words", ["folded", "datatrove"])
def test_company_order_pieces_and_threads_change_nothing(documents: list[str], words: str) -> None:
    signer = Signer(num_permutations=112, ngram=5, seed=1, words=words)
    signatures, counts = signer.sign(documents)
    places = random.Random(2).sample(range(len(documents)), len(documents))
    with ThreadPoolExecutor(4) as pool:
        alone = list(pool.map(lambda place: signer.sign([documents[place]]), places))
    for place, (signature, count) in zip(places, alone, strict=True):
        assert (signature[0] == signatures[place]).all() and count[0] == counts[place]
    cut = Signer(num_permutations=112, ngram=5, seed=1, words=words, piece_characters=500)
    again, counted = cut.sign(documents)
    assert (counted == counts).all() and (again == signatures).all()


def words_of(text: str) -> list[str]:
    found = folded_words([text])
    return [found.data[start:end].tobytes().decode() for start, end in zip(found.starts, found.ends, strict=True)]


def test_folded_words() -> None:
    assert words_of("The caf\u00e9's na\u00efve x_1, 3.5 STRASSE!") == ["the", "cafe", "s", "naive", "x_1", "3", "5", "strasse"]
    assert words_of("\u6f22\u5b57\u3002\u304b\u306aabc\u4e00") == ["\u6f22", "\u5b57", "\u304b", "\u306a", "abc", "\u4e00"]
    assert words_of("co\u00adop zero\u200dwidth \U00020000x") == ["coop", "zerowidth", "\U00020000", "x"]
    assert words_of("... --- \u3002") == [] and words_of("") == []
    text = "\u00c5ngstr\u00f6m \ud55c\uad6d\uc5b4 \u0939\u093f\u0928\u094d\u0926\u0940"
    assert words_of(text) == words_of(unicodedata.normalize("NFD", text)) and len(words_of(text)) == 3


def test_edits_are_found_in_a_script_without_spaces() -> None:
    chance = random.Random(4)
    alphabet = [chr(code) for code in range(0x4E00, 0x4E00 + 800)]
    texts = ["\u3002".join("".join(chance.choices(alphabet, k=30)) for _ in range(20)) for _ in range(20)]
    edited = [text[:200] + chance.choice(alphabet) + text[201:400] + chance.choice(alphabet) + text[401:] for text in texts]
    close = {}
    for words in ("folded", "datatrove"):
        signer = Signer(num_permutations=112, ngram=5, seed=1, words=words)
        close[words] = (agreement(signer.sign(texts)[0], signer.sign(edited)[0]) >= 0.7).mean()
    assert close["folded"] == 1.0 and close["datatrove"] < 0.5


def test_planted_near_duplicates_share_a_band_and_agree() -> None:
    """By domain, at the defaults. Mathematics is short: two edits and a header leave 12 of 20 pairs below a Jaccard of 0.7."""
    labels = pq.read_table(DATA / "labels.parquet").to_pylist()
    twins = {row["id"]: row["origin"] for row in labels if row["noise"] == "near_duplicate"}
    wanted = twins.keys() | set(twins.values())
    rows = [row for name in ("corpus", "dirty") for row in pq.read_table(DATA / f"{name}.parquet").to_pylist() if row["id"] in wanted]
    texts = {row["id"]: row["text"] for row in rows}
    pairs = [(row["domain"], row["text"], texts[twins[row["id"]]]) for row in rows if texts.get(twins.get(row["id"]))]
    signer = Signer(num_permutations=112, ngram=5, seed=1)
    one, other = (signer.sign([pair[place] for pair in pairs])[0].astype(np.uint32) for place in (1, 2))
    found = (band_keys(one, bands=22, rows=5) == band_keys(other, bands=22, rows=5)).any(axis=1) & (agreement(one, other) >= 0.7)
    share = {domain: np.mean([ok for pair, ok in zip(pairs, found, strict=True) if pair[0] == domain]) for domain, *_ in pairs}
    assert len(pairs) > 300
    assert min(value for domain, value in share.items() if domain != "math") >= 0.95
    assert share["math"] >= 0.35
