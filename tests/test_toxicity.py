"""Toxicity against scikit-learn's own arithmetic, sentence by sentence."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.toxicity import auc, matched
from pipelines import plugins
from pipelines.filters import Filter
from pipelines.filters._vocabulary import character_classes

SENTENCE_BREAK = re.compile(r"(?<=[.!?])[\"'”’)\]]*\s+|\n+")
WORDS = ["You idiot", "stupid", "x", "shit_happens", "Straße", "ΟΔΟΣ", "日本語", "İstanbul", "pokémon", "damn-it", "fuckfuck", "42"]
MARKS = [" ", "  ", ".", "!", "?", '"', "')", "”", "\n", "\r\n", "\u2028", "…", "\u00a0", "\x1c", "a" * 30, "\ufffd", "\ud800"]
PIECES = st.sampled_from([*WORDS, *MARKS])


def score(texts: list[str], limit: int) -> dict[str, np.ndarray]:
    plugin = plugins.build("filters", "toxicity", {"max_sentence_characters": limit})
    assert isinstance(plugin, Filter)
    return {name: np.asarray(values) for name, values in plugin.score(texts).items()}


def reference(texts: list[str], limit: int) -> dict[str, np.ndarray]:
    """Score with scikit-learn: each document, and each of its sentences on its own."""
    from profanity_check import profanity_check

    def probability(parts: list[str]) -> np.ndarray:
        return profanity_check.model.predict_proba(profanity_check.vectorizer.transform(parts))[:, 1]

    documents, sentences = np.full(len(texts), np.nan), np.full(len(texts), np.nan)
    for row, text in enumerate(texts):
        parts = [part.lower()[:limit] for part in SENTENCE_BREAK.split(text) if part and not part.isspace()]
        if parts:
            documents[row], sentences[row] = probability([text])[0], probability(parts).max()
    return {"document_probability": documents, "sentence_probability_max": sentences}


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(PIECES, max_size=40).map("".join), min_size=1, max_size=3), st.sampled_from([5, 12, 1_000]))
def test_the_scores_are_those_of_scikit_learn(texts: list[str], limit: int) -> None:
    found, wanted = score(texts, limit), reference(texts, limit)
    for rule, values in wanted.items():
        np.testing.assert_array_equal(found[rule], values)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(max_size=80), max_size=4))
def test_any_text_is_scored_as_scikit_learn_does(texts: list[str]) -> None:
    found = score(texts, 1_000)
    for rule, values in reference(texts, 1_000).items():
        np.testing.assert_array_equal(found[rule], values)


def test_characters_are_classed_as_re_does() -> None:
    every = "".join(map(chr, range(0x110000)))
    words = np.zeros(0x110000, bool)
    words[[match.start() for match in re.finditer(r"\w", every)]] = True
    spaces = np.zeros(0x110000, bool)
    spaces[[match.start() for match in re.finditer(r"\s", every)]] = True
    np.testing.assert_array_equal(character_classes() & 1 > 0, words)
    np.testing.assert_array_equal(character_classes() & 2 > 0, spaces)


def mentioned(*texts: str, **values: object) -> list[str]:
    plugin = plugins.build("filters", "topics", values)
    assert isinstance(plugin, Filter)
    return [str(found) for found in plugin.score(list(texts))["mentioned"]]


def test_topics_by_hand() -> None:
    assert mentioned("The RABBI met a nurse.", "rabbit, nursery", "", "Japanese women at war") == [
        "identity,medicine,religion",
        "",
        "",
        "gender,identity,nationality,violence",
    ]


def test_one_word_does_not_make_a_long_text_mention_a_topic() -> None:
    text = "word " * 990
    assert mentioned(f"{text} surgeon", f"{text} surgeon surgeons") == ["", "medicine"]
    assert mentioned(f"{text} surgeon", min_per_thousand_words=1) == ["medicine"]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1), st.lists(st.integers(0, 5), min_size=1))
def test_the_area_under_the_curve_is_that_of_all_pairs(positive: list[int], negative: list[int]) -> None:
    pairs = [1.0 if high > low else 0.5 if high == low else 0.0 for high in positive for low in negative]
    assert auc(np.array(positive, float), np.array(negative, float)) == pytest.approx(sum(pairs) / len(pairs))


def test_clean_sentences_are_as_long_as_the_prompts_and_each_is_taken_once() -> None:
    pool = ["x" * length for length in (5, 5, 9, 30)]
    assert sorted(map(len, matched(["a" * 5, "b" * 5, "c" * 8], pool))) == [5, 5, 9]
