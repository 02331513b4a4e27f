"""The quality rules give the reasons that datatrove gives, document by document."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.filtering import ODD, PROSE, REASONS, _is_same, _ours, _peers, _their_chain, _theirs, measure, read_documents
from pipelines.plugins import build

pytest.importorskip("datatrove", reason="datatrove comes with the extra `bench`")
pytest.importorskip("spacy", reason="spaCy comes with the extra `bench`")

LINES = st.sampled_from(
    [
        *(PROSE, "short", "", " ", "- item one of the list", "• another", "It ends here...", "and so on…", "# the", "only two"),
        *("a b c d e", "lorem IPSUM dolor sit", "Enable JavaScript now please", "if (x) { return y; }", "[1] [2] [edit]"),
        *("See our cooKie policy for the rest", "He said so.[1] It was.[citation needed]  ) Done!", "w" * 1_001 + " of the"),
        *("1 2 3 4 5", "日本語の文章です。", "x" * 40, "x:) y): (8) 10km. a.m.)"),
    ]
)
BREAKS = st.sampled_from(["\n", "\n\n", "\r\n", " ", "\u2028"])
TEXTS = st.tuples(st.lists(LINES, max_size=30), BREAKS).map(lambda drawn: drawn[1].join(drawn[0]))


@cache
def peers():
    return _peers()


def differences(name: str, texts: list[str]) -> list[tuple[str, str | None, str | None]]:
    ours, theirs = _ours(build("filters", name), name, texts).reasons, _theirs(peers()[name], texts).reasons
    pairs = [(text[:200], mine, other) for text, mine, other in zip(texts, ours, theirs, strict=True) if not _is_same(mine, other)]
    # With lines of both kinds, datatrove names the first; both are counted here.
    return [pair for pair in pairs if set(pair[1:]) != {"lorem_ipsum", "curly_bracket"}]


@cache
def sample() -> list[str]:
    texts = [
        text for name in ("corpus", "dirty") for text in pq.read_table(f"data/sample/{name}.parquet", columns=["text"])["text"].to_pylist()
    ]
    return random.Random(1).sample([text for text in texts if len(text) < 4_000], 150)


@pytest.mark.parametrize("name", REASONS)
def test_reasons_on_the_sample_are_those_of_datatrove(name: str) -> None:
    assert differences(name, sample()) == []


@pytest.mark.parametrize("name", REASONS)
def test_reasons_on_odd_documents_are_those_of_datatrove(name: str) -> None:
    assert differences(name, [text[:10_000] for text in ODD.values()]) == []


@pytest.mark.parametrize("name", REASONS)
@settings(max_examples=25, deadline=None)
@given(texts=st.lists(TEXTS, min_size=1, max_size=4))
def test_reasons_on_made_up_documents_are_those_of_datatrove(name: str, texts: list[str]) -> None:
    assert differences(name, texts) == []


def test_the_chain_gives_the_reasons_of_datatroves_chain() -> None:
    ours = {name: _ours(build("filters", name), name, sample()).reasons for name in REASONS if name != "fineweb_quality"}
    ours["fineweb_quality"] = _ours(build("filters", "fineweb_quality", {"lines": "c4"}), "fineweb_quality", sample()).reasons
    first = [next((reason for reason in reasons if reason), None) for reasons in zip(*ours.values(), strict=True)]
    theirs = _their_chain(peers(), sample()).reasons
    assert first == theirs
    assert len(set(theirs)) > 5 and None in theirs


def test_the_benchmark_reports_what_it_measures() -> None:
    documents = [document for document in read_documents(Path("data/sample"), 2e5) if len(document.text) < 10_000]
    result = measure(documents)
    assert result["verdict_parity"] == 1.0 and result["documents"] == len(documents)
    assert result["chain_speedup"] > 5  # a loose bound: the target holds on a quiet machine, not on two shared cores
    assert result["flips"]["whitespace"]["gopher_quality"]
