"""Tokenization: ids as the tokenizer gives them, text back byte for byte, passages that partition documents, held-out text unseen."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import corpus
from hypothesis import given, settings
from hypothesis import strategies as st
from small_world import World, build_world, fit, publish, sample_texts, shard
from tokenizers import Tokenizer

from pipelines.documents import passages
from pipelines.errors import EmptyInput
from pipelines.manifests import Manifest, Member
from pipelines.shards import TokenShard, token_dtype
from pipelines.store import AuditFailed, Store
from pipelines.tokenization import (
    END_OF_TEXT,
    TOKENIZATION_AUDITS,
    DecodesBack,
    documents_conserved,
    load_tokenizer,
    passage_tokens,
    passages_within_documents,
    tokenize_documents,
)

AWKWARD = [
    "one\r\ntwo\r\n\r\nthree\n",
    "👩‍👩‍👧‍👦 flags 🇨🇿🇺🇦 and skin 👍🏽, ok?",
    "\x00\x01\x07\t\x0b\x0c\x1b[31mred\x1b[0m\x7f\u0085\u2028\u2029",
    "e\u0301 é \u202eright to left\u202c שלום עולם مرحبا",
    "漢字かな交じり文、ひらがな。" * 20,
    " leading  and   trailing   ",
    "\ufeffbyte order mark \ufffd \U0010ffff \ue000",
    "\n",
    " ",
    "x" * 3000,
    f"a literal {END_OF_TEXT} inside",
    "",
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return build_world(Store(tmp_path_factory.mktemp("world")), documents=16)


@pytest.fixture(scope="module")
def tokenizer(world: World) -> Tokenizer:
    return load_tokenizer(world.tokenizer.directory)


def texts_of(cleaned: Manifest) -> list[str]:
    return pq.read_table(cleaned.file("documents.parquet"), columns=["text"])["text"].to_pylist()


def copied(manifest: Manifest, to: Path) -> Manifest:
    """Return `manifest` lying in a copy of its directory, for a test to damage."""
    shutil.copytree(manifest.directory, to)
    return manifest.at(to)


def test_ids_are_those_of_encode_for_every_document(world: World, tokenizer: Tokenizer) -> None:
    end = tokenizer.token_to_id(END_OF_TEXT)
    for cleaned, manifest in zip(world.corpora.values(), world.shards, strict=True):
        opened, texts = TokenShard(manifest), texts_of(cleaned)
        assert opened.documents.num_rows == len(texts)
        for number, text in enumerate(texts):
            assert opened.document_tokens(number).tolist() == [*tokenizer.encode(text, add_special_tokens=False).ids, end]
            assert opened.documents["bytes"][number].as_py() == len(text.encode())


def test_transformers_gives_the_same_ids(world: World) -> None:
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(world.tokenizer.directory)
    opened = TokenShard(world.shards[0])
    for number, text in enumerate(texts_of(world.corpora["wiki"])[:5]):
        assert reference(text)["input_ids"] == opened.document_tokens(number)[:-1].tolist()
    assert reference.eos_token == reference.pad_token == END_OF_TEXT


def test_awkward_text_comes_back_byte_for_byte(world: World, tokenizer: Tokenizer) -> None:
    cleaned = corpus(world.store, "wiki", AWKWARD, snapshot="2026-02-01")
    audits = (*TOKENIZATION_AUDITS, DecodesBack(cleaned, world.tokenizer))
    manifest = world.store.build(shard(cleaned, world.tokenizer, max_characters=50, audits=audits)).manifest
    assert [check.passed for check in manifest.checks] == [True, True, True]
    opened = TokenShard(manifest)
    for number, text in enumerate(AWKWARD):
        assert tokenizer.decode(opened.document_tokens(number)[:-1].tolist(), skip_special_tokens=False).encode() == text.encode()
    assert manifest.counts["characters"] == sum(map(len, AWKWARD))
    assert manifest.counts["bytes"] == sum(len(text.encode()) for text in AWKWARD)


@settings(max_examples=300, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=120))
def test_any_text_decodes_to_itself(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode_batch([text], add_special_tokens=False)[0].ids
    assert tokenizer.decode(ids, skip_special_tokens=False).encode() == text.encode()


@settings(max_examples=300, deadline=None)
@given(
    text=st.text(st.sampled_from("ab \n👩‍👧é漢\u0301\r\x00🇨🇿") | st.characters(exclude_categories=["Cs"]), max_size=200),
    max_characters=st.integers(1, 40),
)
def test_the_tokens_of_the_passages_partition_the_document(tokenizer: Tokenizer, text: str, max_characters: int) -> None:
    encoding = tokenizer.encode(text, add_special_tokens=False)
    spans = list(passage_tokens(text, encoding.offsets, max_characters))
    cuts = passages(text, max_characters)
    assert [number for number, _, _ in spans] == list(range(len(cuts)))
    position = 0
    for _, first, count in spans:
        assert first == position and count >= 0
        position += count
    assert position == len(encoding.ids)
    for (_, first, count), (start, end) in zip(spans, cuts, strict=True):
        assert all(start <= encoding.offsets[token][0] < end for token in range(first, first + count))


def test_the_passage_index_partitions_every_document(world: World) -> None:
    for manifest in world.shards:
        opened = TokenShard(manifest)
        by_document: dict[str, list[tuple[int, int, int]]] = {}
        for row in opened.passages.to_pylist():
            by_document.setdefault(row["id"], []).append((row["passage"], row["offset"], row["length"]))
        for row in opened.documents.to_pylist():
            position = row["offset"]
            for number, (passage, offset, length) in enumerate(by_document[row["id"]]):
                assert (passage, offset) == (number, position)
                position += length
            assert position == row["offset"] + row["length"] - 1


def test_small_vocabularies_take_two_bytes_and_large_ones_four() -> None:
    assert [token_dtype(size).str for size in (256, 65_536, 65_537, 250_000)] == ["<u2", "<u2", "<u4", "<u4"]
    assert np.array([65_535], token_dtype(65_536)).tolist() == [65_535]
    assert np.array([65_536], token_dtype(65_537)).tolist() == [65_536]


def test_a_large_vocabulary_is_stored_whole(world: World, tmp_path: Path) -> None:
    """Ids above 65,535 survive: a word-level tokenizer of 70,000 words stands for a large vocabulary."""
    from tokenizers import models, pre_tokenizers

    words = Tokenizer(models.WordLevel({END_OF_TEXT: 0, **{f"w{n}": n for n in range(1, 70_000)}}, unk_token=END_OF_TEXT))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    (tmp_path / "large").mkdir()
    words.save(str(tmp_path / "large" / "tokenizer.json"))
    large = world.tokenizer.at(tmp_path / "large").model_copy(update={"fingerprint": "f" * 32}).at(tmp_path / "large")
    cleaned = corpus(Store(tmp_path / "store"), "wiki", ["w69999 w1 w65536", "w65535"])
    manifest = Store(tmp_path / "store").build(shard(cleaned, large, audits=TOKENIZATION_AUDITS)).manifest
    assert manifest.outcome.details["dtype"] == "<u4"
    assert TokenShard(manifest).tokens.tolist() == [69_999, 1, 65_536, 0, 65_535, 0]


def test_a_partition_without_documents_is_an_empty_shard(world: World) -> None:
    cleaned = corpus(world.store, "wiki", [], snapshot="2026-03-01")
    audits = (*TOKENIZATION_AUDITS, DecodesBack(cleaned, world.tokenizer))
    manifest = world.store.build(shard(cleaned, world.tokenizer, audits=audits)).manifest
    assert manifest.counts == {"documents": 0, "passages": 0, "tokens": 0, "bytes": 0, "characters": 0}
    assert len(TokenShard(manifest).tokens) == 0 and all(check.passed for check in manifest.checks)


@pytest.mark.parametrize("lost", [1, 2, 100])
def test_a_torn_token_file_fails_its_audit(world: World, tmp_path: Path, lost: int) -> None:
    torn = copied(world.shards[0], tmp_path / "torn")
    path = torn.directory / "tokens.bin"
    path.write_bytes(path.read_bytes()[:-lost])
    assert documents_conserved(world.shards[0]).passed and not documents_conserved(torn).passed


def test_a_changed_token_fails_its_audit(world: World, tmp_path: Path) -> None:
    audit = DecodesBack(world.corpora["wiki"], world.tokenizer)
    changed = copied(world.shards[0], tmp_path / "changed")
    tokens = np.fromfile(changed.directory / "tokens.bin", "<u2")
    tokens[5] = (tokens[5] + 1) % 500
    tokens.tofile(changed.directory / "tokens.bin")
    assert audit(world.shards[0]).passed and not audit(changed).passed


def test_a_passage_index_that_lost_a_row_fails_its_audit(world: World, tmp_path: Path) -> None:
    lost = copied(world.shards[0], tmp_path / "lost")
    rows = pq.read_table(lost.directory / "passages.parquet")
    pq.write_table(rows.slice(1), lost.directory / "passages.parquet")
    assert passages_within_documents(world.shards[0]).passed and not passages_within_documents(lost).passed


def test_a_shard_of_another_corpus_is_not_published(world: World) -> None:
    """The audit reads the cleaned text itself, so a shard that stands for other text is rejected."""
    other = corpus(world.store, "wiki", ["not the text that was tokenized"] * 5, snapshot="2026-04-01")
    request = shard(world.corpora["legal"], world.tokenizer, max_characters=399, audits=(DecodesBack(other, world.tokenizer),))
    with pytest.raises(AuditFailed, match="decodes_back: 0 of 5"):
        world.store.build(request)


def test_the_same_input_gives_the_same_bytes(world: World, tmp_path: Path) -> None:
    store = Store(tmp_path / "again")
    tokenizer = store.build(fit(tuple(world.corpora.values()), world.splits, vocabulary_size=512)).manifest
    assert tokenizer.content_sha256 == world.tokenizer.content_sha256
    assert store.build(shard(world.corpora["book"], tokenizer)).manifest.content_sha256 == world.shards[1].content_sha256


def test_held_out_documents_do_not_reach_the_tokenizer(store: Store, tmp_path: Path) -> None:
    """A word that only held-out text holds is no token, and the tokenizer does not change when that text does."""

    def fitted(held_out: str, place: Path) -> Manifest:
        local = Store(place)
        texts = sample_texts("wiki", 4, 500)
        cleaned = corpus(local, "wiki", [*texts, held_out], ids=[f"wiki-{n}" for n in range(5)])
        rows = [{"id": f"wiki-{n}", "split": "held_out" if n == 4 else "train"} for n in range(5)]
        splits = publish(local, "duplicate_clusters", {"wiki.parquet": rows})
        return local.build(fit((cleaned,), (Member(manifest=splits, name="wiki.parquet"),), vocabulary_size=600)).manifest

    one, other = fitted("zyzzyva " * 500, tmp_path / "one"), fitted("qoph " * 700, tmp_path / "other")
    assert one.content_sha256 == other.content_sha256
    assert not [token for token in load_tokenizer(one.directory).get_vocab() if "zyzz" in token]
    assert one.counts["documents"] == 4
    assert one.counts["sample_bytes"] == sum(len(text.encode()) for text in sample_texts("wiki", 4, 500))


def test_a_sample_without_training_documents_is_an_error(store: Store) -> None:
    cleaned = corpus(store, "wiki", ["all of it is held out"], ids=["wiki-0"])
    splits = publish(store, "duplicate_clusters", {"wiki.parquet": [{"id": "wiki-0", "split": "held_out"}]})
    with pytest.raises(EmptyInput, match="fit_on"):
        store.build(fit((cleaned,), (Member(manifest=splits, name="wiki.parquet"),)))


def test_the_sample_takes_an_equal_part_of_every_domain(world: World) -> None:
    """12 documents of each domain train; a third of 6,000 bytes fills with whole documents of 1,200 characters at most."""
    manifest = world.store.build(fit(tuple(world.corpora.values()), world.splits, vocabulary_size=400, sample_bytes=6_000)).manifest
    assert 6 <= manifest.counts["documents"] <= 12
    assert 6_000 <= manifest.counts["sample_bytes"] < 6_000 + 3 * 1_400
    assert manifest.counts["vocabulary_size"] == 400


def test_the_vocabulary_holds_every_byte(tokenizer: Tokenizer) -> None:
    every = bytes(range(256)).decode("latin-1")
    assert tokenizer.decode(tokenizer.encode(every).ids, skip_special_tokens=False) == every
    assert tokenizer.get_vocab_size() == 512


def test_bytes_per_token_is_their_quotient(world: World) -> None:
    for manifest in world.shards:
        counts = manifest.counts
        assert manifest.outcome.metrics["bytes_per_token"] == pytest.approx(counts["bytes"] / (counts["tokens"] - counts["documents"]))


def test_passages_follow_the_setting(world: World) -> None:
    short = world.store.build(replace(shard(world.corpora["wiki"], world.tokenizer, max_characters=100), step=tokenize_documents)).manifest
    assert short.counts["passages"] > world.shards[0].counts["passages"]
    assert (short.directory / "tokens.bin").read_bytes() == (world.shards[0].directory / "tokens.bin").read_bytes()
