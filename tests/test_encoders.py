"""Encoders: whatever backend runs, the ids are those of `tokenizers`, and bytes, places and special tokens follow from them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_world import sample_texts
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from pipelines.documents import DOCUMENT_SCHEMA, TableWriter
from pipelines.encoders import (
    LONGEST_VERIFIED,
    REFERENCE,
    VERIFIED_EVERY,
    VERIFIED_PATTERNS,
    BackendFailed,
    Encoder,
    load_tokenizer,
    open_encoder,
    special_tokens,
)
from pipelines.errors import GristmillError
from pipelines.odd_texts import odd_texts
from pipelines.tokenization import backend_sample, write_shard

END, MASK = "<|endoftext|>", "<|mask|>"
ROOT = Path(__file__).parents[1]
O200K = max(VERIFIED_PATTERNS, key=len)
"""The pattern of o200k_base, which reads contractions without case."""


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    cut = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def saved(tokenizer: Tokenizer, directory: Path, **names: str) -> Path:
    directory.mkdir(exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(names))
    return directory


def trained(model: models.Model, trainer: trainers.Trainer, pre_tokenizer: pre_tokenizers.PreTokenizer) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.train_from_iterator(sample_texts("wiki", 30, 2000), trainer)
    return tokenizer


def byte_level(pre_tokenizer: pre_tokenizers.PreTokenizer | None = None) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=[END, MASK], initial_alphabet=alphabet, show_progress=False)
    tokenizer = trained(models.BPE(), trainer, pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(byte_level(), tmp_path_factory.mktemp("byte_level"), eos_token=END, mask_token=MASK)


@pytest.fixture(scope="module")
def encoder(directory: Path) -> Encoder:
    return open_encoder(directory)


def assert_as_tokenizers(encoder: Encoder, texts: list[str]) -> None:
    """The ids are those of `encode`, and each token begins in the character that its offsets name."""
    encoded = encoder.encode(texts)
    before = 0
    for number, text in enumerate(texts):
        expected = encoder.tokenizer.encode(text, add_special_tokens=False)
        mine = slice(encoded.bounds[number], encoded.bounds[number + 1])
        content = text.encode()
        places = [len(content[: start - before].decode(errors="ignore")) for start in encoded.starts[mine].tolist()]
        assert encoded.ids[mine].tolist() == expected.ids, ascii(text)
        assert places == [start for start, _ in expected.offsets], ascii(text)
        before += len(content)
    assert encoded.bounds[-1] == len(encoded.ids) == len(encoded.starts)


def assert_as_tokenizers_ids(encoder: Encoder, texts: list[str]) -> None:
    """The ids are those of `encode`, and tokens begin within their text, in order."""
    encoded = encoder.encode(texts)
    expected = [encoder.tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    assert [part.tolist() for part in np.split(encoded.ids, encoded.bounds[1:-1])] == expected
    ends = np.cumsum([len(text.encode()) for text in texts])
    owners = np.repeat(np.arange(len(texts)), np.diff(encoded.bounds))
    assert (np.diff(encoded.starts) >= 0).all() and (encoded.starts <= ends[owners]).all()


@pytest.mark.parametrize("pattern", [None, *sorted(VERIFIED_PATTERNS)])
def test_the_fast_backend_gives_the_ids_of_tokenizers(tmp_path: Path, pattern: str | None) -> None:
    pytest.importorskip("fastokens")
    encoder = open_encoder(saved(byte_level(split(pattern) if pattern else None), tmp_path))
    assert (encoder.backend, encoder.reason) == ("fastokens", None)
    assert_as_tokenizers(encoder, odd_texts((END, MASK), count=6_000, seed=5))


def test_letters_that_fold_to_ascii_are_left_to_tokenizers(tmp_path: Path) -> None:
    encoder = open_encoder(saved(byte_level(split(O200K)), tmp_path))
    assert_as_tokenizers(encoder, ["plain", "É'ſt x", "", "a'ſb'ſ", "'\u212a", "plain again"])


def wordpiece() -> Tokenizer:
    special = ["[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = trained(
        models.WordPiece(unk_token="[UNK]"),
        trainers.WordPieceTrainer(vocab_size=400, special_tokens=special, show_progress=False),
        pre_tokenizers.BertPreTokenizer(),
    )
    tokenizer.normalizer = normalizers.BertNormalizer()
    return tokenizer


def unigram() -> Tokenizer:
    trainer = trainers.UnigramTrainer(vocab_size=400, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False)
    return trained(models.Unigram(), trainer, pre_tokenizers.Metaspace())


def composed() -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.NFC()
    return tokenizer


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (wordpiece, "no byte-level BPE"),
        (unigram, "no byte-level BPE"),
        (lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True)), "no byte-level BPE"),
        (lambda: byte_level(split(r"\w{1,5}|\s|[^\w\s]+")), "a pattern"),
    ],
)
def test_any_tokenizer_is_encoded_and_a_slow_one_has_its_reason(tmp_path: Path, make: object, reason: str) -> None:
    encoder = open_encoder(saved(make(), tmp_path))  # type: ignore[operator]
    assert encoder.backend == REFERENCE and reason in str(encoder.reason)
    texts = odd_texts((END, "[MASK]"), count=400, seed=2)
    assert_as_tokenizers_ids(encoder, texts)


def test_texts_that_a_tokenizer_composes_are_encoded_by_it(tmp_path: Path) -> None:
    """The fast path takes texts in composed form; the others keep their place among them."""
    encoder = open_encoder(saved(composed(), tmp_path))
    assert_as_tokenizers_ids(encoder, ["é", "e\u0301 e", "", "plain", "\u1112\u1161\u11ab", "漢字", *odd_texts((END,), count=2_000)])


def test_tokens_that_take_text_with_them_are_placed_by_offsets(tmp_path: Path) -> None:
    """An added token that swallows the spaces before it has not the length of its text; one in Chinese is not written in bytes."""
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("[X]", lstrip=True), AddedToken("漢字", single_word=True), AddedToken("foo", rstrip=True)])
    encoder = open_encoder(saved(tokenizer, tmp_path))
    assert_as_tokenizers(encoder, ["a   [X] b", "no such", "漢字 foo   bar", "é漢字é [X]", ""])


def test_text_that_spells_a_special_token_is_text(directory: Path, encoder: Encoder) -> None:
    special = special_tokens(directory)
    for text in (END, f"a{END}b", MASK * 3, f" {MASK} "):
        ids = encoder.encode([text]).ids
        assert not {special.end_of_text, special.mask} & set(ids.tolist())
        assert encoder.bytes_of.decode(ids) == text.encode()


def test_no_text_gives_no_ids(encoder: Encoder) -> None:
    assert [len(part) for part in (encoder.encode([]).ids, encoder.encode([]).bounds, encoder.encode(["", ""]).ids)] == [0, 1, 0]


# Backends that fail


def changed_at(encoder: Encoder, word: str) -> Encoder:
    """Return a twin of `encoder` whose backend errs in texts that hold `word`."""

    def encode(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        ids, bounds = encoder.encode_ids(texts)
        ids = ids.copy()
        for number, text in enumerate(texts):
            if word in text:
                ids[bounds[number]] += 1
        return ids, bounds

    return Encoder(encoder.tokenizer, encode, "twin", bytes_of=encoder.bytes_of)


def raising(encoder: Encoder, error: BaseException) -> Encoder:
    def encode(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        raise error

    return Encoder(encoder.tokenizer, encode, "twin", bytes_of=encoder.bytes_of)


class Panic(BaseException):
    """As native code raises it."""


@pytest.mark.parametrize("long", [False, True])
def test_a_wrong_id_is_found_while_it_runs(encoder: Encoder, long: bool) -> None:
    """One text in `VERIFIED_EVERY` is encoded twice: of a wrong backend, one of the first so many; of a long text its beginning."""
    twin = changed_at(encoder, "wrong")
    texts = ["right"] * (VERIFIED_EVERY - 1) + ["wrong" + " and on" * (LONGEST_VERIFIED if long else 1)]
    assert twin.encode(texts[:-1]).bounds[-1] > 0
    with pytest.raises(BackendFailed, match="twin gives other ids than tokenizers for a text that begins 'wrong"):
        twin.encode(texts[-1:])


def test_a_panic_is_a_failure_and_an_interrupt_is_not(encoder: Encoder) -> None:
    with pytest.raises(BackendFailed, match="Panic: index out of bounds"):
        raising(encoder, Panic("index out of bounds")).encode(["a"])
    with pytest.raises(KeyboardInterrupt):
        raising(encoder, KeyboardInterrupt()).encode(["a"])


def documents(path: Path, texts: list[str]) -> Path:
    with TableWriter(path, DOCUMENT_SCHEMA) as writer:
        for number, text in enumerate(texts):
            writer.write({"id": f"wiki-{number}", "text": text, "domain": "wiki"})
    return path


def test_a_shard_that_a_backend_has_spoiled_is_written_anew(encoder: Encoder, tmp_path: Path) -> None:
    texts = [*odd_texts(count=3_000), *["wrong"] * VERIFIED_EVERY, *odd_texts(count=200, seed=1)]
    path = documents(tmp_path / "documents.parquet", texts)
    written = {}
    for name, by in {"fast": encoder, "exact": encoder.reference("asked for"), "spoiled": changed_at(encoder, "wrong")}.items():
        (tmp_path / name).mkdir()
        _, used = write_shard(path, tmp_path / name, by, end_of_text=0, max_characters=100)
        written[name] = {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()}
    assert used.backend == REFERENCE and "twin gives other ids" in str(used.reason)
    assert written["fast"] == written["exact"] == written["spoiled"]


def test_a_missing_package_is_named(directory: Path) -> None:
    code = (
        "import sys; sys.modules['fastokens'] = None\nfrom pathlib import Path\nfrom pipelines.encoders import open_encoder\n"
        f"encoder = open_encoder(Path({str(directory)!r}))\nprint(encoder.backend, encoder.reason, encoder.encode(['a b']).ids.tolist())"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout.strip()
    ids = load_tokenizer(directory).encode("a b").ids
    assert found == f"tokenizers fastokens is not installed {ids}"


def test_the_sample_is_spread_over_the_file_and_bounded(tmp_path: Path) -> None:
    path = documents(tmp_path / "many.parquet", [f"{number} " + "word " * 200 for number in range(9_000)])
    numbers = [int(text.split()[0]) for text in backend_sample(path)]
    assert numbers == sorted(numbers) and numbers[0] < 100 and numbers[-1] > 8_000
    assert 300 <= len(numbers) <= 500
    long = backend_sample(documents(tmp_path / "long.parquet", ["x" * 3_000_000] * 3))
    assert {len(text) for text in long} == {LONGEST_VERIFIED}
    assert backend_sample(documents(tmp_path / "none.parquet", [])) == []


# Bytes


@settings(max_examples=200, deadline=None)
@given(content=st.binary(max_size=300))
def test_any_bytes_come_back(encoder: Encoder, content: bytes) -> None:
    """Bytes that are no text have ids, too: those of single bytes, as they lie in the vocabulary."""
    one = {encoder.bytes_of.decode(np.array([number])): number for number in range(len(encoder.bytes_of.lengths))}
    ids = np.array([one[bytes([byte])] for byte in content], dtype=np.uint16)
    assert encoder.bytes_of.decode(ids) == content


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.sampled_from("\x00\ue000\u0301\U0010ffff\ufeff") | st.characters(exclude_categories=["Cs"]), max_size=200))
def test_any_text_comes_back(encoder: Encoder, text: str) -> None:
    assert encoder.bytes_of.decode(encoder.encode([text]).ids) == text.encode()


def test_the_bytes_of_a_token_are_those_that_tokenizers_decodes(encoder: Encoder) -> None:
    for number in range(encoder.tokenizer.get_vocab_size()):
        content = encoder.bytes_of.decode(np.array([number]))
        assert content.decode(errors="replace") == encoder.tokenizer.decode([number], skip_special_tokens=False)
        assert len(content) == encoder.bytes_of.lengths[number]


# Special tokens


def test_special_tokens_are_read_where_they_are_named(tmp_path: Path) -> None:
    tokenizer = byte_level()
    found = special_tokens(saved(tokenizer, tmp_path / "a", eos_token=END, mask_token=MASK))
    assert (found.end_of_text, found.mask, found.vocabulary_size) == (0, 1, 700)
    bert = special_tokens(saved(wordpiece(), tmp_path / "b", sep_token="[SEP]"))
    assert (bert.end_of_text, bert.mask) == (2, None)
    nested = saved(tokenizer, tmp_path / "c")
    (nested / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": END, "lstrip": False}}))
    assert special_tokens(nested).end_of_text == 0


def test_a_vocabulary_with_holes_is_as_large_as_its_largest_id(tmp_path: Path) -> None:
    directory = saved(Tokenizer(models.WordLevel({END: 0, "a": 9}, unk_token=END)), tmp_path, eos_token=END)
    assert special_tokens(directory).vocabulary_size == 10


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({}, "no token to end a document; name an eos_token"),
        ({"eos_token": "</s>"}, "names the token '</s>', which the tokenizer does not"),
    ],
)
def test_a_tokenizer_without_an_end_of_text_is_an_error(tmp_path: Path, names: dict[str, str], message: str) -> None:
    directory = saved(byte_level(), tmp_path, **names)
    with pytest.raises(GristmillError, match=message):
        special_tokens(directory)


def test_what_cuts_pads_or_varies_texts_is_switched_off(tmp_path: Path) -> None:
    tokenizer = byte_level()
    text = "a longer text than four tokens, and the and the and the"
    whole = tokenizer.encode(text).ids
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    tokenizer.model.dropout = 0.9
    encoder = open_encoder(saved(tokenizer, tmp_path))
    assert encoder.encode([text]).ids.tolist() == whole == encoder.tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "holds no tokenizer.json"),
        ("{", "is not JSON"),
        ("{}", "has no model"),
        ('{"model": {"type": "Nonesuch"}}', "cannot be read"),
    ],
)
def test_what_is_no_tokenizer_is_an_error(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(GristmillError, match=message):
        load_tokenizer(tmp_path)
