"""Tokenization: ids as the tokenizer gives them, text back byte for byte, passages that partition documents, held-out text unseen."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from conftest import corpus
from hypothesis import given, settings
from hypothesis import strategies as st
from small_world import World, build_world, fit, publish, sample_texts, shard
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from pipelines.documents import passages
from pipelines.encoders import Encoder, load_tokenizer, open_encoder, special_tokens
from pipelines.errors import EmptyInput, GristmillError
from pipelines.manifests import Manifest, Member
from pipelines.shards import TokenShard, token_dtype
from pipelines.store import AuditFailed, Build, Store
from pipelines.tokenization import (
    END_OF_TEXT,
    MASK,
    TOKENIZATION_AUDITS,
    DecodesBack,
    TokenizerSettings,
    documents_conserved,
    import_tokenizer,
    located,
    passage_tokens,
    passages_within_documents,
    tokenize_documents,
)
from pipelines.vocabulary import by_domain, num_words

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


@pytest.fixture(scope="module")
def encoder(world: World) -> Encoder:
    return open_encoder(world.tokenizer.directory)


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


CHARACTERS = st.sampled_from("ab \n👩‍👧é漢\u0301\r\x00🇨🇿") | st.characters(exclude_categories=["Cs"])
TEXTS = st.lists(st.text(CHARACTERS, max_size=120), max_size=5)


@settings(max_examples=300, deadline=None)
@given(texts=TEXTS, max_characters=st.integers(1, 40))
def test_a_token_belongs_to_the_passage_of_its_first_character(encoder: Encoder, texts: list[str], max_characters: int) -> None:
    """The passages of a batch, found by the lengths of its tokens, are those that the offsets of `tokenizers` give text by text."""
    encoded, sizes = encoder.encode(texts), np.array([len(text.encode()) for text in texts], dtype=np.int64)
    rows = list(zip(*(column.tolist() for column in passage_tokens(texts, sizes, encoded, max_characters)), strict=True))
    expected = []
    for owner, text in enumerate(texts):
        encoding = encoder.tokenizer.encode(text, add_special_tokens=False)
        starts = [start for start, _ in encoding.offsets]
        position = int(encoded.bounds[owner])
        for number, (start, end) in enumerate(passages(text, max_characters)):
            held = sum(start <= place < end for place in starts)
            expected.append((owner, number, position, held))
            position += held
        assert position == encoded.bounds[owner + 1]
    assert rows == expected


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
    words = Tokenizer(models.WordLevel({END_OF_TEXT: 0, **{f"w{n}": n for n in range(1, 70_000)}}, unk_token=END_OF_TEXT))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    (tmp_path / "large").mkdir()
    words.save(str(tmp_path / "large" / "tokenizer.json"))
    (tmp_path / "large" / "tokenizer_config.json").write_text(json.dumps({"eos_token": END_OF_TEXT}))
    large = world.tokenizer.at(tmp_path / "large").model_copy(update={"fingerprint": "f" * 32}).at(tmp_path / "large")
    cleaned = corpus(Store(tmp_path / "store"), "wiki", ["w69999 w1 w65536", "w65535"])
    manifest = Store(tmp_path / "store").build(shard(cleaned, large, audits=TOKENIZATION_AUDITS)).manifest
    assert manifest.outcome.details["dtype"] == "<u4"
    assert TokenShard(manifest).tokens.tolist() == [69_999, 1, 65_536, 0, 65_535, 0]


def test_a_partition_without_documents_is_an_empty_shard(world: World) -> None:
    cleaned = corpus(world.store, "wiki", [], snapshot="2026-03-01")
    audits = (*TOKENIZATION_AUDITS, DecodesBack(cleaned, world.tokenizer))
    manifest = world.store.build(shard(cleaned, world.tokenizer, audits=audits)).manifest
    assert set(manifest.counts.values()) == {0}
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


def test_the_audit_reads_documents_of_several_row_groups(world: World) -> None:
    """Its rows are counted over the file: of others than those it names, no text would match."""
    cleaned = corpus(world.store, "wiki", [f"document {number}" for number in range(4_500)], snapshot="2026-05-01")
    manifest = world.store.build(shard(cleaned, world.tokenizer)).manifest
    check = DecodesBack(cleaned, world.tokenizer)(manifest)
    assert check.passed and 40 <= check.metadata["tried"] <= 50


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


# Tokenizers that are brought


def brought(directory: Path, tokenizer: Tokenizer, **names: str) -> TokenizerSettings:
    (directory / "mine").mkdir(parents=True)
    tokenizer.save(str(directory / "mine" / "tokenizer.json"))
    (directory / "mine" / "tokenizer_config.json").write_text(json.dumps(names))
    return located(TokenizerSettings(path="mine"), directory)


def import_of(settings: TokenizerSettings) -> Build:
    return Build(asset="tokenizer", step=import_tokenizer, settings=settings)


def wordpiece() -> Tokenizer:
    special = ["[UNK]", "[CLS]", "[SEP]", "[MASK]", "[PAD]"]
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    made.train_from_iterator(
        sample_texts("wiki", 20, 1000), trainers.WordPieceTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    )
    made.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    return made


def test_a_wordpiece_tokenizer_is_brought_and_ends_texts_with_its_separator(world: World, store: Store, tmp_path: Path) -> None:
    names = {"sep_token": "[SEP]", "mask_token": "[MASK]", "pad_token": "[PAD]", "unk_token": "[UNK]", "tokenizer_class": "BertTokenizer"}
    manifest = store.build(import_of(brought(tmp_path, wordpiece(), **names))).manifest
    assert manifest.outcome.details == {"end_of_text": "[SEP]", "end_of_text_id": 2, "mask": "[MASK]", "mask_id": 3}
    cleaned = world.corpora["wiki"]
    audits = (*TOKENIZATION_AUDITS, DecodesBack(cleaned, manifest))
    shards = store.build(shard(cleaned, manifest, audits=audits)).manifest
    assert [check.passed for check in shards.checks] == [True, True, True]
    assert shards.outcome.details["backend"] == "tokenizers" and "no byte-level" in shards.outcome.details["backend_reason"]
    reference, opened = load_tokenizer(manifest.directory), TokenShard(shards)
    for number, text in enumerate(texts_of(cleaned)):
        encoding = reference.encode(text, add_special_tokens=False)
        assert opened.document_tokens(number).tolist() == [*encoding.ids, 2]
        starts = [start for start, _ in encoding.offsets]
        held = [sum(start <= place < end for place in starts) for start, end in passages(text, 400)]
        rows = opened.passages.filter(pc.equal(opened.passages["id"], opened.documents["id"][number]))
        assert rows["length"].to_pylist() == held

    from transformers import AutoTokenizer

    opened_by = AutoTokenizer.from_pretrained(manifest.directory)
    assert (opened_by.eos_token, opened_by.mask_token_id, opened_by.pad_token) == ("[SEP]", 3, "[PAD]")


def test_a_byte_level_tokenizer_comes_back_as_it_was_trained(world: World, store: Store, tmp_path: Path) -> None:
    """One that was trained here and is brought gives the same shards."""
    manifest = store.build(import_of(brought(tmp_path, load_tokenizer(world.tokenizer.directory), eos_token=END_OF_TEXT))).manifest
    shards = store.build(shard(world.corpora["book"], manifest)).manifest
    assert (shards.directory / "tokens.bin").read_bytes() == (world.shards[1].directory / "tokens.bin").read_bytes()


def test_a_brought_tokenizer_is_known_by_its_content_not_its_place(store: Store, tokenizer: Tokenizer, tmp_path: Path) -> None:
    here, there = (brought(tmp_path / name, tokenizer, eos_token=END_OF_TEXT) for name in ("here", "there"))
    other = brought(tmp_path / "other", tokenizer, eos_token=END_OF_TEXT, pad_token=MASK)
    made = [store.build(import_of(settings)).manifest.fingerprint for settings in (here, there, other)]
    assert made[0] == made[1] != made[2]
    (tmp_path / "here" / "mine" / "tokenizer.json").write_text("{}")
    with pytest.raises(GristmillError, match="mine/tokenizer.json was changed while it was read"):
        import_tokenizer(here, tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"path": "a", "hub": "b/c", "revision": "0" * 40}, "both name a tokenizer"),
        ({"hub": "org/name"}, "hub and revision go together"),
        ({"hub": "org/name", "revision": "main"}, "40 hexadecimal digits"),
        ({"path": "a", "vocabulary_size": 9}, "vocabulary_size belong to a tokenizer that is trained"),
    ],
)
def test_settings_that_name_no_one_tokenizer_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenizerSettings(**values)


@pytest.mark.parametrize(("path", "message"), [("../outside", "leaves the project's directory"), ("none", "no path 'none'")])
def test_a_path_that_holds_no_tokenizer_is_an_error(tmp_path: Path, path: str, message: str) -> None:
    with pytest.raises(GristmillError, match=message):
        located(TokenizerSettings(path=path), tmp_path)


def test_a_tokenizer_that_ends_no_text_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(GristmillError, match="no token to end a document"):
        import_tokenizer(brought(tmp_path, tokenizer), tmp_path)


def test_a_trained_tokenizer_has_a_mask(world: World) -> None:
    from transformers import AutoTokenizer

    found = special_tokens(world.tokenizer.directory)
    assert (found.end_of_text, found.mask, found.vocabulary_size) == (0, 1, 512)
    assert AutoTokenizer.from_pretrained(world.tokenizer.directory).mask_token == MASK


# What the tokenizer makes of a domain


def test_words_are_what_stands_between_white_space() -> None:
    texts = ["", "one", " two  words\n", "\t", "naïve 漢字 e\u0301", "a\x0bb\x0cc"]
    column = pa.array(["left out", *texts, "left out"]).slice(1, len(texts))
    assert num_words(column) == 0 + 1 + 2 + 0 + 3 + 3
    assert num_words(pa.array([], pa.string())) == 0


@settings(max_examples=200, deadline=None)
@given(texts=st.lists(st.text(st.sampled_from("a \n漢"), max_size=9), max_size=6))
def test_words_are_those_of_split(texts: list[str]) -> None:
    assert num_words(pa.array(texts, pa.string())) == sum(len(text.split()) for text in texts)


def test_fertility_is_counted_by_domain(world: World) -> None:
    """Against counts of the decoded documents, one by one."""
    rows = {row["domain"]: row for row in by_domain([*world.shards, world.shards[0]])}
    used = {}
    for (domain, cleaned), manifest in zip(world.corpora.items(), world.shards, strict=True):
        opened, texts = TokenShard(manifest), texts_of(cleaned)
        ids = np.concatenate([opened.document_tokens(number)[:-1] for number in range(len(texts))])
        used[domain] = set(ids.tolist())
        assert manifest.counts["words"] == sum(len(text.encode().split()) for text in texts)
        assert manifest.counts["used_tokens"] == len(used[domain])
        assert rows[domain]["bytes_per_token"] == pytest.approx(sum(len(text.encode()) for text in texts) / len(ids))
        assert rows[domain]["tokens_per_word"] == pytest.approx(len(ids) / manifest.counts["words"])
        assert rows[domain]["vocabulary_share"] == pytest.approx(len(used[domain]) / 512)
        stored = pq.read_table(manifest.file("vocabulary.parquet"))
        assert dict(zip(*(stored[name].to_pylist() for name in ("token", "count")), strict=True)) == Counter(ids.tolist())
    for domain, ids in used.items():
        assert rows[domain]["own_tokens"] == len(ids - set().union(*(other for name, other in used.items() if name != domain)))


# The sample


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
