"""Contamination: matches against brute force over strings; planted evaluation texts are found, and nothing else is."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import corpus
from hypothesis import given, settings
from hypothesis import strategies as st
from small_world import sample_texts

from pipelines.contamination import (
    CONTAMINATION_AUDITS,
    INDEX_AUDITS,
    ITEMS,
    ContaminationSettings,
    DecontaminationSettings,
    EvaluationSet,
    NgramSettings,
    index_evaluation_sets,
    index_settings,
    measure_contamination,
)
from pipelines.decisions import FILTER_AUDITS, FilterSettings, Threshold, filter_corpus
from pipelines.errors import GristmillError
from pipelines.manifests import Manifest, Member
from pipelines.ngrams import CODE_POINTS, LAST_LETTER, NgramIndex, find_words
from pipelines.store import AuditFailed, Build, Store

ROOT = Path(__file__).parents[1]
ALPHABET = st.text(st.sampled_from("aAbB1 .é日İß\n\0"), max_size=60)


# --- words and n-grams ------------------------------------------------------------------


def plain_words(text: str) -> list[str]:
    """Return the words as their definition reads."""
    return re.findall(r"[^\W_]+", "".join(c.lower() if len(c.lower()) == 1 else c for c in text))


def ngrams(words: list[str], length: int) -> list[tuple[str, ...]]:
    return [tuple(words[start : start + length]) for start in range(len(words) - length + 1)]


@settings(deadline=None)  # the first call makes the tables
@given(st.lists(ALPHABET, max_size=5))
def test_words_are_runs_of_letters_and_digits_in_lower_case(texts: list[str]) -> None:
    words, spelled = find_words(texts), find_words(texts).spelled()
    for number, text in enumerate(texts):
        mine = range(words.offsets[number], words.offsets[number + 1])
        assert [spelled.ngram(word, 1) for word in mine] == plain_words(text)
        begin = words.text_starts[number]
        assert ["".join(plain_words(text[words.starts[w] - begin : words.ends[w] - begin])) for w in mine] == plain_words(text)


def test_no_letter_is_left_out() -> None:
    assert not any(chr(code).isalnum() for code in range(LAST_LETTER + 1, CODE_POINTS))


def test_a_words_hash_depends_on_the_word_alone() -> None:
    words = find_words(["Mill, the MILL", "x mill ll mi", "mill" * 50])
    spelled = words.spelled()
    by_word: dict[str, set[int]] = {}
    for word, value in enumerate(words.hashes.tolist()):
        by_word.setdefault(spelled.ngram(word, 1), set()).add(value)
    assert all(len(values) == 1 for values in by_word.values())
    assert len(set.union(*by_word.values())) == len(by_word) == 6


@settings(deadline=None)
@given(
    items=st.lists(st.lists(st.sampled_from("abc"), max_size=12).map(" ".join), max_size=5),
    texts=st.lists(st.lists(st.sampled_from("abcd"), max_size=20).map(", ".join), max_size=4),
    ngram=st.integers(2, 6),
    min_words=st.integers(1, 6),
    hash_bits=st.sampled_from([0, 2, 64]),
)
def test_matches_are_those_of_brute_force(items: list[str], texts: list[str], ngram: int, min_words: int, hash_bits: int) -> None:
    """With hashes of 0 or 2 bits nearly every n-gram collides: the words decide."""
    index = NgramIndex(items, ngram=ngram, min_words=min_words, hash_bits=hash_bits)
    words = find_words(texts)
    matches = index.find(words)
    place, item = index.items_of(matches.entry)
    found = {(int(matches.word[p]), int(matches.length[p]), int(i)) for p, i in zip(place, item, strict=True)}
    expected = set()
    for number, text in enumerate(items):
        own = plain_words(text)
        length = ngram if len(own) >= ngram else len(own) if len(own) >= max(min_words, 1) else 0
        wanted = set(ngrams(own, length)) if length else set()
        assert index.item_ngrams[number] == len(wanted)
        for at, document in enumerate(texts):
            for start, gram in enumerate(ngrams(plain_words(document), length) if length else []):
                if gram in wanted:
                    expected.add((int(words.offsets[at]) + start, length, number))
    assert found == expected


# --- the steps ---------------------------------------------------------------------------


def indexed(store: Store, root: Path, sets: dict[str, EvaluationSet], *corpora: Manifest, **values: int) -> Manifest:
    request = Build(
        asset="evaluation_index",
        step=index_evaluation_sets,
        settings=index_settings(sets, NgramSettings(**values), root),
        inputs={"corpora": corpora},
        audits=INDEX_AUDITS,
    )
    return store.build(request).manifest


def measured(store: Store, cleaned: Manifest, index: Manifest, **values: int) -> Manifest:
    domain, snapshot = str(cleaned.partition).split("|")
    request = Build(
        asset="contamination",
        partition=cleaned.partition,
        step=measure_contamination,
        settings=ContaminationSettings(domain=domain, snapshot=snapshot, **values),
        inputs={"cleaned": cleaned, "items": Member(manifest=index, name=ITEMS)},
        audits=CONTAMINATION_AUDITS,
    )
    return store.build(request).manifest


def jsonl(root: Path, texts: list[str]) -> EvaluationSet:
    (root / "questions.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return EvaluationSet(path="questions.jsonl")


def scores(manifest: Manifest) -> dict[str, list[float]]:
    table = pq.read_table(manifest.file("scores.parquet")).to_pydict()
    return {name.partition(".")[2]: values for name, values in table.items() if name.startswith("contamination.")}


ITEM = "Who built the old mill that stands by the river below the second bridge of the town, and when was it?"
TWISTED = "WHO BUILT — the old-mill (that stands) by the river;\nbelow the second bridge of the TOWN; and when was it"
AROUND = "There is a question that people ask here. {} Nobody has answered it so far, and nobody will."


def test_scores_by_hand(store: Store, tmp_path: Path) -> None:
    index = indexed(store, tmp_path, {"q": jsonl(tmp_path, [ITEM, "A short question of eight words is this.", "Too short."])})
    assert index.outcome.tables["by_set"] == [
        {"evaluation_set": "q", "from": "questions.jsonl", "items": 3, "words": 21 + 8 + 2, "ngrams": 9 + 1, "items_too_short": 1}
    ]
    half = " ".join(ITEM.split()[:15])
    documents = [AROUND.format(ITEM), AROUND.format(TWISTED), half, "a SHORT question, of eight: words is this", AROUND, ""]
    result = measured(store, corpus(store, "wiki", documents), index)
    found = scores(result)
    assert found["ngrams"] == [9, 9, 3, 1, 0, 0]
    assert found["items"] == [1, 1, 1, 1, 0, 0]
    np.testing.assert_allclose(found["item_share"], [1, 1, 3 / 9, 1, 0, 0])
    np.testing.assert_allclose(found["document_share"], [21 / 38, 21 / 38, 1, 1, 0, 0])
    assert result.counts["contaminated"] == 4 and result.counts["spans"] == 4
    spans = pq.read_table(result.file("matches.parquet")).to_pylist()
    for row, text in zip(spans, documents, strict=False):
        assert row["span"] == text[row["start"] : row["end"]]
    assert plain_words(spans[1]["span"]) == plain_words(ITEM)
    assert [row["item"] for row in spans] == ["0", "0", "0", "1"]
    assert result.outcome.tables["by_set"] == [{"evaluation_set": "q", "items_hit": 2}]


def test_stretches_are_parted_where_the_text_differs(store: Store, tmp_path: Path) -> None:
    words = [f"w{number}" for number in range(60)]
    changed = [*words[:20], "other", *words[21:]]
    index = indexed(store, tmp_path, {"q": jsonl(tmp_path, [" ".join(words)])})
    result = measured(store, corpus(store, "wiki", [" ".join(changed)]), index)
    rows = pq.read_table(result.file("matches.parquet")).to_pylist()
    assert [(row["span"].split()[0], row["span"].split()[-1], row["ngrams"]) for row in rows] == [("w0", "w19", 8), ("w21", "w59", 27)]
    assert rows[0]["item_share"] == pytest.approx(35 / 48)


def test_a_domain_is_not_contaminated_by_itself(store: Store, tmp_path: Path) -> None:
    held = corpus(store, "wikitext", [ITEM, "something else"])
    sets = {"wikitext": EvaluationSet(domain="wikitext"), "q": jsonl(tmp_path, ["something else that has more than eight words in it"])}
    index = indexed(store, tmp_path, sets, held)
    assert scores(measured(store, held, index))["ngrams"] == [0, 0]
    copied = corpus(store, "wiki", [ITEM])
    assert scores(measured(store, copied, index))["ngrams"] == [9]
    assert pq.read_table(measured(store, copied, index).file("matches.parquet"))["evaluation_set"].to_pylist() == ["wikitext"]


def twist(text: str, random_: random.Random) -> str:
    """Return `text` with other punctuation, case and white space, its words the same."""
    words = re.findall(r"[^\W_]+", text)
    return "".join(random_.choice([word, word.upper(), word.lower()]) + random_.choice([" ", ", ", "\n", " -- ", "; "]) for word in words)


def test_planted_texts_are_found_and_nothing_else(store: Store) -> None:
    """Evaluation texts pasted into the middle of real documents, every second one with other case and punctuation."""
    blimp = EvaluationSet(path="data/eval/blimp.parquet", columns=("good", "bad"))
    index = indexed(store, ROOT, {"blimp": blimp})
    rows = pq.read_table(index.file(ITEMS))["text"].to_pylist()
    random_ = random.Random(0)
    long_enough = [text for text in rows if len(plain_words(text)) >= 8]
    items = random_.sample(long_enough, 60)
    clean = [text for domain in ("wiki", "techdoc", "book", "code") for text in sample_texts(domain, 60, 2_000)]
    documents = []
    for number, text in enumerate(clean):
        item = items[number // 2] if number % 2 == 0 and number // 2 < len(items) else None
        place = text.find(" ", len(text) // 2)
        shown = item if item is None or number % 4 == 0 else twist(item, random_)
        documents.append(text if shown is None else f"{text[:place]} {shown} {text[place:]}")
    result = measured(store, corpus(store, "wiki", documents), index)
    found = np.array(scores(result)["ngrams"]) > 0
    planted = np.array([number % 2 == 0 and number // 2 < len(items) for number in range(len(clean))])
    assert planted.sum() == 60
    np.testing.assert_array_equal(found, planted)
    assert result.counts["documents"] == len(documents)


def test_the_order_of_documents_and_of_batches_does_not_matter(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = indexed(store, tmp_path, {"q": jsonl(tmp_path, [ITEM, TWISTED + " and one more thing"])})
    documents = [AROUND.format(ITEM), "nothing", TWISTED, "", "more of nothing"]
    names = [f"d{number}" for number in range(len(documents))]
    one = measured(store, corpus(store, "wiki", documents, ids=names), index)
    other = Store(tmp_path / "other")
    monkeypatch.setattr("pipelines.contamination.BATCH_CHARACTERS", 1)
    two = measured(other, corpus(other, "wiki", documents[::-1], ids=names[::-1]), index)
    for name in ("scores.parquet", "matches.parquet"):
        rows = [sorted(map(str, pq.read_table(m.file(name)).to_pylist())) for m in (one, two)]
        assert rows[0] == rows[1]


def test_decisions_conserve_documents_and_spare_what_is_evaluated_on(store: Store, tmp_path: Path) -> None:
    held = corpus(store, "wikitext", [ITEM])
    index = indexed(store, tmp_path, {"wikitext": EvaluationSet(domain="wikitext"), "q": jsonl(tmp_path, [ITEM])}, held)
    partitions = [measured(store, held, index), measured(store, corpus(store, "wiki", [AROUND.format(ITEM), "clean", "clean too"]), index)]
    limits = {rule: Threshold(keep="at_most", value=value) for rule, value in DecontaminationSettings().limits().items()}
    request = Build(
        asset="decontaminated_corpus",
        partition="tiny",
        step=filter_corpus,
        settings=FilterSettings(thresholds={"wiki": limits, "wikitext": {}}),
        inputs={"scores": tuple(partitions)},
        audits=FILTER_AUDITS,
    )
    result = store.build(request).manifest
    assert {key: result.counts[key] for key in ("documents_in", "kept", "dropped")} == {"documents_in": 4, "kept": 3, "dropped": 1}
    dropped = [row for row in pq.read_table(result.file("decisions.parquet")).to_pylist() if not row["kept"]]
    assert [(row["domain"], row["rule"], row["score"]) for row in dropped] == [("wiki", "contamination.ngrams", 9.0)]


def test_limits() -> None:
    assert DecontaminationSettings().limits() == {"contamination.ngrams": 0.0}
    limits = DecontaminationSettings(rules={"ngrams": "off", "item_share": 0.5}).limits()
    assert limits == {"contamination.item_share": 0.5}
    with pytest.raises(ValueError, match="did you mean 'item_share'"):
        DecontaminationSettings(rules={"item_shar": 0.5})


def test_what_an_evaluation_set_may_be(store: Store, tmp_path: Path) -> None:
    for values in ({}, {"path": "a.jsonl", "domain": "wiki"}, {"path": "a.csv"}):
        with pytest.raises(ValueError, match="names a path or a domain|neither"):
            EvaluationSet(**values)
    with pytest.raises(GristmillError, match="no file matches 'absent.jsonl'"):
        index_settings({"q": EvaluationSet(path="absent.jsonl")}, NgramSettings(), tmp_path)
    with pytest.raises(GristmillError, match="row 0 has no column 'question'; it has: text"):
        indexed(store, tmp_path, {"q": jsonl(tmp_path, [ITEM]).model_copy(update={"columns": ("question",)})})
    (tmp_path / "broken.jsonl").write_text("{\n")
    with pytest.raises(GristmillError, match="broken.jsonl:1 is not JSON"):
        indexed(store, tmp_path, {"q": EvaluationSet(path="broken.jsonl")})
    with pytest.raises(AuditFailed, match="sets without a text to look for: q; lower `min_words`"):
        indexed(store, tmp_path, {"q": jsonl(tmp_path, ["Too short."])})


def test_no_evaluation_set_is_no_contamination(store: Store, tmp_path: Path) -> None:
    index = indexed(store, tmp_path, {})
    assert scores(measured(store, corpus(store, "wiki", [ITEM]), index))["ngrams"] == [0]
