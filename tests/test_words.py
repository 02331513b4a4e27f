"""Words: spaCy's own tokens, `str.split`, and Unicode's word boundaries; the same whatever the grouping."""

from __future__ import annotations

import hashlib
import random
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.words import Words, decode, encode, in_groups, split_words
from pipelines.words._characters import TABLE, TABLE_SHA256, spacy_table

spacy = pytest.importorskip("spacy", reason="spaCy comes with the extra `bench`")
EXCEPTIONS = [written.replace(" ", "") for written in spacy_table()["exceptions"]]
PIECES = [
    *"abzAZ019.,:;!?-–—~'\"’“”()[]{}<>=/_+*^&%$€£#@…\\|°²µ `´é中Жд。ก☃😀½٣",
    *("..", "...", "……", "km", "US$", "C$", "'s", "’S", "--", "---", "——", "://", "www.", "com", "http://", "a.m.", "10", "x\u0301"),
    *("192.168.1.1", "8.8.8.8", "foo@bar.org", "\u00a0", " ", " ", "  ", "\n", "\t", "\r\n", "\x00", "\u2028"),
    *EXCEPTIONS,
]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=12).map("".join)


@cache
def tokenizer():
    return spacy.blank("en").tokenizer


def tokens(text: str) -> list[str]:
    return [token.text for token in tokenizer()(text) if token.text.strip()]


def sample_chunks() -> list[str]:
    chunks: set[str] = set()
    for name in ("corpus", "dirty", "heldout"):
        for text in pq.read_table(f"data/sample/{name}.parquet", columns=["text"])["text"].to_pylist():
            chunks.update(text.split())
    return sorted(chunks)


@settings(max_examples=300, deadline=None)
@given(st.lists(TEXTS, min_size=1, max_size=20))
def test_spacy_words_are_those_of_spacy(texts: list[str]) -> None:
    words = split_words(texts)
    assert [words.of(number) for number in range(len(texts))] == [tokens(text) for text in texts]


def test_spacy_words_of_the_sample_are_those_of_spacy() -> None:
    chunks = sample_chunks()
    drawn = random.Random(0).sample(chunks, 20_000)
    words = split_words(drawn)
    different = [chunk for number, chunk in enumerate(drawn) if words.of(number) != tokens(chunk)]
    assert len(chunks) > 200_000 and not different


@pytest.mark.parametrize("text", ["x" * 20_000, "." * 5_001, "a.b-c@" * 100, "!?" * 2_000, "(8) ): " * 2_000])
def test_long_chunks_are_split_as_spacy_splits_them(text: str) -> None:
    assert split_words([text]).of(0) == tokens(text)


def test_a_name_that_spacy_fails_on_is_left_out() -> None:
    words = split_words(["plain words", "see IS_ALPHA, twice IS_ALPHA.", "XIS_ALPHAS stays", "end"])
    assert [words.of(number) for number in range(4)] == [["plain", "words"], ["see", ",", "twice", "."], ["XIS_ALPHAS", "stays"], ["end"]]
    assert decode(words.text_codes) == "plain wordssee IS_ALPHA, twice IS_ALPHA.XIS_ALPHAS staysend"


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(), max_size=8))
def test_whitespace_words_are_those_of_str_split(texts: list[str]) -> None:
    words = split_words(texts, "whitespace")
    assert [words.of(number) for number in range(len(texts))] == [text.split() for text in texts]


def test_uax29_words_by_hand() -> None:
    words = split_words(["Can't stop: 3.14, U.S.A. naïve—yes", "", "..."], "uax29")
    assert words.of(0) == ["Can't", "stop", "3.14", "U.S.A", "naïve", "yes"]
    assert words.counts.tolist() == [6, 0, 0]


@settings(max_examples=50, deadline=None)
@given(st.lists(TEXTS, min_size=2, max_size=6), st.sampled_from(["spacy_en", "whitespace", "uax29"]))
def test_words_do_not_depend_on_the_company(texts: list[str], dialect: str) -> None:
    together = split_words(texts, dialect)
    assert [together.of(number) for number in range(len(texts))] == [split_words([text], dialect).of(0) for text in texts]


def test_threads_give_the_same_words() -> None:
    groups = [[piece * 50 for piece in PIECES[start : start + 200]] for start in range(0, 1_400, 200)]

    def arrays(words: Words) -> list[list[int]]:
        return [words.starts.tolist(), words.ends.tolist(), words.offsets.tolist()]

    alone = [arrays(split_words(group)) for group in groups]
    with ThreadPoolExecutor(4) as pool:
        assert [arrays(words) for words in pool.map(split_words, groups * 3)] == alone * 3


def test_a_chunk_without_end_takes_linear_time() -> None:
    for text in ("x" * 3_000_000, "a.b-c@" * 500_000, "." * 3_000_000, "!?" * 1_500_000, "1-" * 1_500_000, "(8)" * 1_000_000):
        started = time.process_time()
        split_words([text])
        assert time.process_time() - started < 3


def test_groups_are_bounded_and_keep_the_order() -> None:
    texts = ["a" * 400, "b" * 400, "c" * 400, "d" * 3_000, "", "e"]
    groups = list(in_groups(texts, 1_000))
    assert [len(group) for group in groups] == [2, 1, 1, 2] and [text for group in groups for text in group] == texts
    assert list(in_groups([], 10)) == []


def test_codes_are_code_points() -> None:
    codes, bounds = encode(["aé", "", "😀\ud800"])
    assert codes.tolist() == [0x61, 0xE9, 0x1F600, 0xD800] and bounds.tolist() == [0, 2, 2, 4]
    assert decode(codes[2:]) == "😀\ud800" and codes.dtype == np.uint32


def test_an_unknown_dialect_is_refused() -> None:
    with pytest.raises(ValueError, match="'klingon' is not a dialect of words"):
        split_words(["x"], "klingon")


def test_the_table_is_part_of_the_code_version() -> None:
    assert hashlib.sha256(TABLE.read_bytes()).hexdigest() == TABLE_SHA256, (
        "set TABLE_SHA256 to the new table's hash: it enters the code version"
    )
