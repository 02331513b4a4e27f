"""Filters by hand count and brute force; decisions conserve documents, follow thresholds, and never re-read text."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import corpus
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import plugins
from pipelines.decisions import FILTER_AUDITS, PASSED, FilterSettings, Threshold, default_thresholds, filter_corpus
from pipelines.errors import GristmillError, UnknownName
from pipelines.filtering import (
    COLLECT_AUDITS,
    SCORE_AUDITS,
    CollectSettings,
    ScoreSettings,
    collect_scores,
    score_documents,
)
from pipelines.filters import Filter, FittedFilter
from pipelines.manifests import Manifest
from pipelines.store import AuditFailed, Build, Store

PROSE = (
    "The mill stood by the river, and the miller lived in the house beside it with his wife and three children. Every "
    "morning he opened the gate to let the water run. The stones began to turn. Farmers came with carts of wheat and rye "
    "from the villages that lay behind the hill, and they waited in the yard until their sacks were filled with flour."
)
REPEATED = "Buy our cheap watches today.\n" * 30
SHORT = "Too short to tell."


def needs_settings(name: str) -> bool:
    """Return whether the filter names a model of the user's."""
    return any(field.is_required() for field in plugins.load("filters", name).model_fields.values())


FILTERS = plugins.names("filters")
UNFITTED = [name for name in FILTERS if not issubclass(plugins.load("filters", name), FittedFilter) and not needs_settings(name)]


def score(name: str, *texts: str, **values: object) -> dict[str, np.ndarray]:
    plugin = plugins.build("filters", name, values)
    assert isinstance(plugin, Filter)
    return plugin.score(*(list(texts) if column == "text" else [""] * len(texts) for column in plugin.columns))


def scored(store: Store, cleaned: Manifest, name: str) -> Manifest:
    request = Build(
        asset=f"quality_scores.{name}",
        partition=cleaned.partition,
        step=score_documents,
        settings=ScoreSettings(filter=name),
        inputs={"cleaned": cleaned},
        audits=SCORE_AUDITS,
        plugins=(f"pipelines.filters.{name}",),
    )
    return store.build(request).manifest


def collected(store: Store, domain: str, texts: list[str], names: tuple[str, ...] = ("gopher_quality", "gopher_repetition")) -> Manifest:
    cleaned = corpus(store, domain, texts)
    request = Build(
        asset="quality_scores",
        partition=cleaned.partition,
        step=collect_scores,
        settings=CollectSettings(domain=domain, snapshot="2026-01-01"),
        inputs={"cleaned": cleaned, "families": tuple(scored(store, cleaned, name) for name in names)},
        audits=COLLECT_AUDITS,
    )
    return store.build(request).manifest


def filtered(store: Store, *scores: Manifest, previous: Manifest | None = None, **values: object) -> Manifest:
    inputs: dict[str, Manifest | tuple[Manifest, ...]] = {"scores": scores}
    if previous:
        inputs["previous"] = previous
    request = Build(
        asset="quality_filtered_corpus",
        partition="tiny",
        step=filter_corpus,
        settings=FilterSettings.model_validate(values),
        inputs=inputs,
        audits=FILTER_AUDITS,
    )
    return store.build(request).manifest


def decisions(manifest: Manifest) -> list[dict[str, object]]:
    return pq.read_table(manifest.file("decisions.parquet")).to_pylist()


DEFAULTS = default_thresholds("gopher_quality") | default_thresholds("gopher_repetition")


# --- the rules -----------------------------------------------------------------------


def test_gopher_quality_by_hand() -> None:
    text = "- The cat and # the 42 dogs\n- run ... to\nhouses…"
    found = {name: values[0] for name, values in score("gopher_quality", text, words="whitespace").items()}
    # words: - The cat and # the 42 dogs - run ... to houses…  (13); of punctuation alone: - # - ...
    assert found["num_words"] == found["num_words_max"] == 9
    assert found["mean_word_length"] == pytest.approx((3 + 3 + 3 + 3 + 2 + 4 + 3 + 2 + 7) / 9)
    assert found["hash_to_word_ratio"] == pytest.approx(1 / 13)
    assert found["ellipsis_to_word_ratio"] == pytest.approx(2 / 13)
    assert found["bullet_line_fraction"] == pytest.approx(2 / 3)
    assert found["ellipsis_line_fraction"] == pytest.approx(1 / 3)
    assert found["alphabetic_word_fraction"] == pytest.approx(8 / 13)
    assert found["num_stop_words"] == 3  # and, the, to; "The" has a capital


def test_gopher_repetition_by_hand() -> None:
    text = "a b\na b\n\na b\n\na b"
    found = {name: values[0] for name, values in score("gopher_repetition", text, words="whitespace").items()}
    assert found["duplicate_paragraph_fraction"] == pytest.approx(1 / 3)  # "a b\na b", "a b", "a b"
    assert found["duplicate_paragraph_character_fraction"] == pytest.approx(3 / len(text))
    assert found["duplicate_line_fraction"] == pytest.approx(3 / 4)
    assert found["duplicate_line_character_fraction"] == pytest.approx(9 / len(text))
    assert found["top_2_gram_character_fraction"] == pytest.approx(4 * 3 / len(text))  # "a b" four times
    assert found["top_3_gram_character_fraction"] == pytest.approx(3 * 5 / len(text))  # "a b a" three times
    assert found["duplicate_5_gram_character_fraction"] == pytest.approx(5 / len(text))  # ababa babab ABABA babab
    assert np.isnan(score("gopher_repetition", "one", words="whitespace")["top_2_gram_character_fraction"][0])


WORDS = st.lists(st.sampled_from(["a", "b", "ab", "the", "é", "日本", "x."]), max_size=60)


@settings(max_examples=200, deadline=None)
@given(st.lists(WORDS, min_size=1, max_size=4))
def test_ngrams_match_their_definition(documents: list[list[str]]) -> None:
    texts = [" ".join(words) for words in documents]
    found = score("gopher_repetition", *texts, words="whitespace")
    for row, (text, words) in enumerate(zip(texts, documents, strict=True)):
        for n in (2, 3, 4):
            expected = top_share(text, words, n)
            np.testing.assert_equal(found[f"top_{n}_gram_character_fraction"][row], expected)
        for n in range(5, 11):
            expected = duplicate_share(text, words, n)
            np.testing.assert_equal(found[f"duplicate_{n}_gram_character_fraction"][row], expected)


def top_share(text: str, words: list[str], n: int) -> float:
    ngrams = Counter(" ".join(words[start : start + n]) for start in range(len(words) - n + 1))
    return len(ngrams.most_common(1)[0][0]) * ngrams.most_common(1)[0][1] / len(text) if ngrams else np.nan


def duplicate_share(text: str, words: list[str], n: int) -> float:
    seen: set[str] = set()
    start = characters = 0
    while start < len(words) - n + 1:
        ngram = "".join(words[start : start + n])
        if ngram in seen:
            characters += len(ngram)
            start += n
        else:
            seen.add(ngram)
            start += 1
    return characters / len(text) if text else np.nan


def test_c4_quality_by_hand() -> None:
    text = "One sentence here. Two (of them.) Three\nonly two\nThis site uses cookies. Accept.\nEnable JavaScript now please.\n"
    found = score("c4_quality", text, "We say Lorem Ipsum dolor sit.\nif (x) { return y; }\n{ }")
    assert [values.tolist() for values in found.values()] == [[0, 1], [0, 1], [3, 2]]
    strict = score("c4_quality", text, require_terminal_punctuation=True)
    assert strict["num_sentences"][0] == 0
    assert score("c4_quality", "It was so.[1] It is done.[2]")["num_sentences"][0] == 2


def test_fineweb_quality_by_hand() -> None:
    text = "A line that is longer than thirty characters.\nshort one\n\nshort one\nshort two!"
    found = {name: values[0] for name, values in score("fineweb_quality", text, words="whitespace").items()}
    assert found["punctuated_line_fraction"] == 2 / 4
    assert found["short_line_fraction"] == 3 / 4
    assert found["duplicate_line_character_fraction"] == 9 / (len(text) - 4)
    assert found["line_break_to_word_ratio"] == 4 / 14


def test_markup_by_hand() -> None:
    text = "<b>x</b> 12\n2024-05-20T03:56:59Z up\n"
    found = {name: values[0] for name, values in score("markup", text).items()}
    assert found["tag_character_fraction"] == 7 / len(text)
    assert found["code_punctuation_fraction"] == 4 / len(text)
    assert found["whitespace_fraction"] == 4 / len(text)
    assert found["digit_fraction"] == 16 / len(text)
    assert found["timestamp_line_fraction"] == 1 / 2


def test_code_quality_by_hand() -> None:
    found = score("code_quality", "ab\n1234\n")
    assert [values[0] for values in found.values()] == [3, 4, 2 / 8]


def test_encoding_by_hand() -> None:
    found = score("encoding", "plain", "naïve café, “quoted”", "Verses 9â€“14", "lost \ufffd")
    assert found["mojibake_fraction"].tolist()[:2] == [0, 0]
    assert found["mojibake_fraction"][2] > 0.1
    assert found["replacement_character_fraction"].tolist() == [0, 0, 0, 1 / 6]


def test_word_order_sees_shuffled_words() -> None:
    shuffled = " ".join(np.random.default_rng(0).permutation(PROSE.split()))
    found = score("word_order", PROSE, shuffled, SHORT)["impossible_pair_fraction"]
    assert found[0] == 0
    assert found[1] > 0.1
    assert np.isnan(found[2])


def test_toxic_words_by_hand() -> None:
    found = score("toxic_words", "You ASSHOLE, leave now!", "a ball gag here", "the bass and the ball", "")["listed_word_fraction"]
    assert found[:3].tolist() == [1 / 4, 2 / 4, 0]
    assert np.isnan(found[3])


def test_toxicity_separates_an_insult_from_prose() -> None:
    insult = "You are a stupid fucking idiot and everyone hates you."
    found = score("toxicity", PROSE, insult, f"{PROSE} You stupid fucking idiot! {PROSE}")
    document, sentence = found["document_probability"], found["sentence_probability_max"]
    assert document[0] < 0.1 and document[1] > 0.9
    assert sentence[0] < 0.3 and sentence[2] > 0.9 > document[2]


@pytest.mark.parametrize("name", UNFITTED)
def test_scores_do_not_depend_on_the_batch(name: str) -> None:
    texts = [PROSE, "", REPEATED, " \n ", SHORT, "x" * 2_000, "日本語の文章です。", PROSE.upper()]
    together, plugin = score(name, *texts), plugins.load("filters", name)
    rules = [rule.name for rule in plugin.rules]
    assert list(together) == [*rules, *plugin.labels]
    assert all(together[rule].dtype == np.float64 and not np.isinf(together[rule]).any() for rule in rules)
    backwards, alone = score(name, *reversed(texts)), [score(name, text) for text in texts]
    for rule in rules:
        np.testing.assert_allclose(together[rule], np.concatenate([found[rule] for found in alone]), rtol=1e-12)
        np.testing.assert_allclose(together[rule], backwards[rule][::-1], rtol=1e-12)
    for label in plugin.labels:
        assert list(together[label]) == [found[label][0] for found in alone] == list(backwards[label])[::-1]
    assert all(len(values) == 0 for values in score(name).values())


def test_an_unknown_dialect_is_refused() -> None:
    with pytest.raises(GristmillError, match="dialect|words"):
        plugins.build("filters", "gopher_quality", {"words": "klingon"})


# --- scores and decisions --------------------------------------------------------------


def test_collected_scores_keep_the_documents_order(store: Store) -> None:
    scores = collected(store, "wiki", [SHORT, PROSE, REPEATED])
    table = pq.read_table(scores.file("scores.parquet"))
    assert table.column_names[:4] == ["id", "domain", "snapshot", "characters"]
    assert table["characters"].to_pylist() == [len(SHORT), len(PROSE), len(REPEATED)]
    np.testing.assert_equal(table["gopher_quality.num_words"].to_numpy(), score("gopher_quality", SHORT, PROSE, REPEATED)["num_words"])
    assert {check.name for check in scores.checks if check.passed} == {"documents_scored", "ids_unique"}


def test_every_document_has_a_verdict_and_a_reason(store: Store) -> None:
    scores = collected(store, "wiki", [SHORT, PROSE, REPEATED])
    result = filtered(store, scores, thresholds={"wiki": DEFAULTS})
    rows = {row["id"]: row for row in decisions(result)}
    short, prose, repeated = (rows[name] for name in pq.read_table(scores.file("scores.parquet"))["id"].to_pylist())
    assert (prose["kept"], prose["rule"], prose["reasons"]) == (True, None, [])
    assert (short["kept"], short["rule"], short["score"], short["threshold"]) == (False, "gopher_quality.num_words", 4, 50)
    assert [reason["rule"] for reason in repeated["reasons"]][:2] == [
        "gopher_quality.num_stop_words",
        "gopher_repetition.duplicate_line_fraction",
    ]
    assert result.counts == {"documents_in": 3, "kept": 1, "dropped": 2, "quarantined": 0}
    assert sum(row["dropped"] for row in result.outcome.tables["by_rule"]) == 2
    assert result.file("dropped_by_domain.png").stat().st_size < 40_000


def test_a_changed_threshold_needs_no_text(store: Store) -> None:
    scores = collected(store, "wiki", [SHORT, PROSE])
    cleaned = store.current("cleaned_corpus", "wiki|2026-01-01")
    (cleaned.directory / "documents.parquet").unlink()
    strict = filtered(store, scores, thresholds={"wiki": DEFAULTS})
    loose = filtered(store, scores, thresholds={"wiki": {"gopher_quality.num_words": Threshold(keep="at_least", value=4)}})
    assert [strict.counts["kept"], loose.counts["kept"]] == [1, 2]


def test_bounds_pass_and_nan_passes(store: Store) -> None:
    scores = collected(store, "wiki", ["one"])
    bound = {"gopher_quality.num_words": {"keep": "at_least", "value": 1}, "gopher_quality.num_words_max": {"keep": "at_most", "value": 1}}
    absent = {"gopher_repetition.top_2_gram_character_fraction": {"keep": "at_most", "value": 0}}
    assert filtered(store, scores, thresholds={"wiki": bound | absent}).counts["kept"] == 1


def test_modes(store: Store) -> None:
    scores = (collected(store, "wiki", [SHORT, PROSE, REPEATED]), collected(store, "code", [SHORT]))
    thresholds = {"wiki": DEFAULTS}
    verdicts = {
        mode: {row["id"]: row["kept"] for row in decisions(filtered(store, *scores, mode=mode, thresholds=thresholds))}
        for mode in ("keep", "off", "inverse")
    }
    assert all(verdicts["off"].values())
    for name, kept in verdicts["keep"].items():
        assert verdicts["inverse"][name] == (kept if name.startswith("code") else not kept)
    inverse = decisions(filtered(store, *scores, mode="inverse", thresholds=thresholds))
    assert [row["rule"] for row in inverse if not row["kept"]] == [PASSED]


def test_only_what_the_step_before_keeps_comes_in(store: Store) -> None:
    scores = collected(store, "wiki", [SHORT, PROSE, REPEATED])
    first = filtered(store, scores, thresholds={"wiki": default_thresholds("gopher_repetition")})
    second = filtered(store, scores, previous=first, thresholds={"wiki": default_thresholds("gopher_quality")})
    assert second.counts == {"documents_in": first.counts["kept"], "kept": 1, "dropped": first.counts["kept"] - 1, "quarantined": 0}
    kept = {row["id"] for row in decisions(first) if row["kept"]}
    assert {row["id"] for row in decisions(second)} == kept


def test_the_order_of_inputs_and_of_thresholds_does_not_matter(store: Store, tmp_path: Path) -> None:
    wiki, code = collected(store, "wiki", [SHORT, PROSE, REPEATED]), collected(store, "code", [SHORT, PROSE])
    backwards = dict(reversed(DEFAULTS.items()))
    one = filtered(store, wiki, code, thresholds={"wiki": DEFAULTS, "code": DEFAULTS})
    other = Store(tmp_path / "other")
    two = filtered(other, code, wiki, thresholds={"code": backwards, "wiki": backwards})
    assert one.content_sha256 == two.content_sha256
    rows = [(row["domain"], row["snapshot"], row["id"]) for row in decisions(one)]
    assert rows == sorted(rows)


def test_nothing_left_is_not_published(store: Store) -> None:
    scores = collected(store, "wiki", [SHORT, REPEATED])
    with pytest.raises(AuditFailed, match="nothing is left: wiki; no document is left: loosen the thresholds"):
        filtered(store, scores, thresholds={"wiki": DEFAULTS})


def test_an_emptied_domain_is_named(store: Store) -> None:
    result = filtered(store, collected(store, "wiki", [PROSE]), collected(store, "code", [SHORT]), thresholds={"code": DEFAULTS})
    check = next(check for check in result.checks if check.name == "something_left")
    assert check.passed and check.metadata["domains_empty"] == "code"


def test_an_unknown_rule_names_the_nearest(store: Store) -> None:
    scores = collected(store, "wiki", [PROSE])
    with pytest.raises(UnknownName, match=r"did you mean 'gopher_quality\.num_words'"):
        filtered(store, scores, thresholds={"wiki": {"gopher_quality.num_wrods": {"keep": "at_least", "value": 1}}})


def test_an_unknown_filter_names_the_nearest() -> None:
    with pytest.raises(UnknownName, match="did you mean 'gopher_quality'"):
        default_thresholds("gopher_qualty")


NUMBERS = st.floats(0, 1, allow_nan=False)


@settings(max_examples=20, deadline=None)
@given(values=st.dictionaries(st.sampled_from(sorted(DEFAULTS)), NUMBERS, min_size=1), mode=st.sampled_from(["keep", "off", "inverse"]))
def test_documents_are_conserved(tmp_path_factory: pytest.TempPathFactory, values: dict[str, float], mode: str) -> None:
    store = Store(tmp_path_factory.mktemp("store"))
    texts = [SHORT, PROSE, REPEATED, "", "one two"]
    scores = collected(store, "wiki", texts)
    thresholds = {rule: Threshold(keep=DEFAULTS[rule].keep, value=value) for rule, value in values.items()}
    settings = FilterSettings(mode=mode, thresholds={"wiki": thresholds})
    (store.root / "out").mkdir()
    outcome = filter_corpus(settings, store.root / "out", scores=(scores,))
    assert outcome.counts["documents_in"] == len(texts) == outcome.counts["kept"] + outcome.counts["dropped"]
    columns = pq.read_table(scores.file("scores.parquet")).to_pylist()
    fails = {row["id"]: any(failed(row[rule], bound) for rule, bound in thresholds.items()) for row in columns}
    for row in pq.read_table(store.root / "out" / "decisions.parquet").to_pylist():
        assert row["kept"] == {"keep": not fails[row["id"]], "off": True, "inverse": fails[row["id"]]}[mode]


def failed(value: float, bound: Threshold) -> bool:
    return value < bound.value if bound.keep == "at_least" else value > bound.value


def test_rule_names_are_columns() -> None:
    for name in FILTERS:
        names = [rule.name for rule in plugins.load("filters", name).rules]
        assert len(set(names)) == len(names)
        assert all(re.fullmatch(r"[a-z0-9_]+", column) for column in names)
