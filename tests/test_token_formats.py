"""Token files: what we write is what the peers' own readers read, what their writers write we read, and nothing is lost between.

datatrove and megatron-core read for themselves where they are installed. llm.c is C and scripts, so its reader stands here, as
`dev/data/data_common.py` and `llmc/dataloader.h` describe the files; so does one for Megatron's, after `indexed_dataset.py`.
"""

from __future__ import annotations

import importlib.util
import struct
import tempfile
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_world import World, build_world, byte_tokenizer, publish
from tokenizers import Tokenizer
from typer.testing import CliRunner

from assets_defs.cli import app
from assets_defs.resources import Mill, load_recipes
from assets_defs.token_exports import export_partition_tokens, export_recipe_tokens
from pipelines import plugins
from pipelines.corpus import CORPUS_AUDITS, corpus_settings, ingest, source_plugins
from pipelines.documents import Document, Quarantined
from pipelines.engine import Engine
from pipelines.errors import EmptyInput, GristmillError, UnknownName
from pipelines.recipes import Recipe
from pipelines.shards import TokenShard, WindowStream, passage_pools
from pipelines.store import Build, Store
from pipelines.token_formats import TokenFormat, Vocabulary

END = 0
SMALL, LARGE = Vocabulary(300, END), Vocabulary(128_256, END)
FORMATS = plugins.names("token_formats")
DOCUMENTS = [[5, 6, 7], [], [8], [299] * 4, [9, 10]]

documents_of_any_kind = st.lists(st.lists(st.integers(1, 299), max_size=12), min_size=1, max_size=12)


def format_of(name: str, **values: object) -> TokenFormat:
    return plugins.build("token_formats", name, values)  # type: ignore[return-value]


def write(name: str, prefix: Path, documents: Sequence[Sequence[int]], vocabulary: Vocabulary = SMALL, **values: object) -> list[Path]:
    return format_of(name, **values).write((np.asarray(ids, dtype=np.uint32) for ids in documents), prefix, vocabulary=vocabulary)


def read(name: str, paths: Sequence[Path], vocabulary: Vocabulary = SMALL) -> list[list[int]]:
    return [document.ids.tolist() for document in format_of(name).read(paths, vocabulary=vocabulary)]


def token_files(name: str, written: Sequence[Path]) -> list[Path]:
    return [path for path in written if path.suffix == {"nanotron": ".ds"}.get(name, ".bin")]


# round trips


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=60, deadline=None)
@given(documents=documents_of_any_kind, size=st.sampled_from([300, 65_499, 65_500, 65_536, 65_537, 128_256]))
def test_what_is_written_is_read_back(name: str, documents: list[list[int]], size: int) -> None:
    documents = [*documents, [size - 1]]
    with tempfile.TemporaryDirectory() as directory:
        written = write(name, Path(directory) / "a.b", documents, Vocabulary(size, END))
        assert all(path.is_file() and path.name.startswith("a.b") for path in written)
        found = list(format_of(name).read(token_files(name, written), vocabulary=Vocabulary(size, END)))
        assert [document.ids.tolist() for document in found] == documents
        assert [document.number for document in found] == list(range(1, len(documents) + 1))
        beside = [path for file in token_files(name, written) for path in format_of(name).companions(file)]
        assert sorted([*token_files(name, written), *beside]) == sorted(written)


@pytest.mark.parametrize("name", FORMATS)
def test_the_same_documents_give_the_same_bytes(name: str, tmp_path: Path) -> None:
    once, again = (write(name, tmp_path / place, DOCUMENTS) for place in ("once", "again"))
    assert [path.read_bytes() for path in once] == [path.read_bytes() for path in again]


@settings(max_examples=60, deadline=None)
@given(documents=documents_of_any_kind, limit=st.integers(1, 20))
def test_a_document_of_llmc_goes_on_in_the_next_file(documents: list[list[int]], limit: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        written = write("llmc", Path(directory) / "x", documents, max_tokens_per_file=limit)
        counts = [len(llmc_tokens(path)) for path in written]
        assert counts[:-1] == [limit] * (len(counts) - 1) and sum(counts) == sum(map(len, documents)) + len(documents)
        found = list(format_of("llmc").read(written, vocabulary=SMALL))
        assert [document.ids.tolist() for document in found] == documents
        assert len({(document.path, document.number) for document in found}) == len(documents)


@settings(max_examples=60, deadline=None)
@given(documents=st.lists(st.lists(st.integers(1, 299), min_size=1, max_size=8), min_size=1, max_size=8), cut=st.integers(0, 80))
def test_an_end_of_text_behind_each_document_is_understood_too(documents: list[list[int]], cut: int) -> None:
    """The other custom in `.bin` files; the cut falls anywhere."""
    tokens = [token for ids in documents for token in (*ids, END)]
    with tempfile.TemporaryDirectory() as directory:
        paths = [Path(directory) / name for name in ("a.bin", "b.bin")]
        for path, part in zip(paths, (tokens[: cut + 1], tokens[cut + 1 :]), strict=True):
            path.write_bytes(llmc_header(20240520, 1, len(part)) + np.asarray(part, dtype="<u2").tobytes())
        assert read("llmc", paths) == documents


# the peers


def llmc_header(magic: int, version: int, count: int) -> bytes:
    return struct.pack("<3i", magic, version, count) + bytes(253 * 4)


def llmc_tokens(path: Path) -> np.ndarray:
    """Read a data file the way `dataloader_load_shard_` checks it, and `train_llama3.py` for uint32."""
    raw = path.read_bytes()
    magic, version, count = struct.unpack("<3i", raw[:12])
    width = {(20240520, 1): 2, (20240801, 7): 4}[magic, version]
    assert raw[12:1024] == bytes(1012) and count > 0 and len(raw) == 1024 + count * width
    return np.frombuffer(raw[1024:], dtype=f"<u{width}")


def megatron_documents(prefix: Path) -> tuple[np.dtype, list[list[int]]]:
    """Read an indexed dataset field by field, as `_IndexReader` does."""
    raw, tokens = prefix.with_name(f"{prefix.name}.idx").read_bytes(), prefix.with_name(f"{prefix.name}.bin").read_bytes()
    magic, version, code, num_sequences, num_bounds = struct.unpack("<9sQBQQ", raw[:34])
    assert (magic, version) == (b"MMIDIDX\x00\x00", 1)
    dtype = np.dtype({8: np.uint16, 4: np.int32}[code])
    at = 34
    columns = []
    for kind, count in ((np.int32, num_sequences), (np.int64, num_sequences), (np.int64, num_bounds)):
        columns.append(np.frombuffer(raw, dtype=kind, count=count, offset=at))
        at += columns[-1].nbytes
    assert at == len(raw)
    lengths, offsets, bounds = columns
    assert bounds[0] == 0 and bounds[-1] == num_sequences
    sequences = [np.frombuffer(tokens, dtype=dtype, count=n, offset=o).tolist() for n, o in zip(lengths, offsets, strict=True)]
    return dtype, [[token for ids in sequences[a:b] for token in ids] for a, b in pairwise(bounds)]


@pytest.mark.parametrize(("vocabulary", "width", "magic"), [(SMALL, 2, 20240520), (LARGE, 4, 20240801)])
def test_llmc_reads_what_we_write(tmp_path: Path, vocabulary: Vocabulary, width: int, magic: int) -> None:
    (path,) = write("llmc", tmp_path / "x", DOCUMENTS, vocabulary)
    assert path.name == "x_000000.bin" and path.read_bytes()[:4] == struct.pack("<i", magic)
    tokens = llmc_tokens(path)
    assert tokens.itemsize == width and tokens.tolist() == [token for ids in DOCUMENTS for token in (END, *ids)]


@pytest.mark.parametrize(("vocabulary", "dtype"), [(SMALL, "<u2"), (Vocabulary(65_500, END), "<i4"), (LARGE, "<i4")])
def test_the_format_of_megatron_is_what_we_write(tmp_path: Path, vocabulary: Vocabulary, dtype: str) -> None:
    write("megatron", tmp_path / "x.y", DOCUMENTS, vocabulary)
    assert megatron_documents(tmp_path / "x.y") == (np.dtype(dtype), [[*ids, END] for ids in DOCUMENTS])


@cache
def megatron_is_here() -> bool:
    return importlib.util.find_spec("megatron") is not None and importlib.util.find_spec("megatron.core") is not None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("vocabulary", [SMALL, LARGE])
def test_megatron_core_reads_and_writes_the_same(tmp_path: Path, vocabulary: Vocabulary) -> None:
    if not megatron_is_here():
        pytest.skip("megatron-core is not installed")
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

    bin_path, idx_path = write("megatron", tmp_path / "ours", DOCUMENTS, vocabulary)
    opened = IndexedDataset(str(tmp_path / "ours"))
    assert [opened[number].tolist() for number in range(len(opened))] == [[*ids, END] for ids in DOCUMENTS]
    assert opened.document_indices.tolist() == list(range(len(DOCUMENTS) + 1))
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=DType.optimal_dtype(vocabulary.size))
    for ids in DOCUMENTS:
        builder.add_document(torch.tensor([*ids, END]), [len(ids) + 1])
    builder.finalize(str(tmp_path / "theirs.idx"))
    assert (tmp_path / "theirs.idx").read_bytes() == idx_path.read_bytes()
    assert (tmp_path / "theirs.bin").read_bytes() == bin_path.read_bytes()
    builder = IndexedDatasetBuilder(str(tmp_path / "sentences.bin"), dtype=np.int64)
    for ids in DOCUMENTS:  # a document of two sequences, as for BERT, and no end of text
        builder.add_document(torch.tensor([*ids, *ids], dtype=torch.int64), [len(ids), len(ids)])
    builder.finalize(str(tmp_path / "sentences.idx"))
    assert read("megatron", [tmp_path / "sentences.bin"], vocabulary) == [[*ids, *ids] for ids in DOCUMENTS]


@pytest.mark.parametrize("vocabulary", [SMALL, LARGE])
def test_datatrove_writes_the_same(tmp_path: Path, vocabulary: Vocabulary) -> None:
    pytest.importorskip("datatrove", reason="datatrove comes with the extra `bench`")
    from datatrove.pipeline.tokens.tokenizer import TokenizedFile

    write("nanotron", tmp_path / "ours", DOCUMENTS, vocabulary)
    size = 2 if vocabulary.size <= 65_536 else 4
    theirs = TokenizedFile(str(tmp_path), "theirs.ds", tokenizer_name_or_path="tokenizer.json", save_final_metadata=True, token_size=size)
    for ids in DOCUMENTS:
        theirs.write([*ids, END], None)
    theirs.close()
    for suffix in (".ds", ".ds.index", ".ds.metadata"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()


def test_numbers_for_people_are_those_of_datatrove(tmp_path: Path) -> None:
    humanize = pytest.importorskip("humanize", reason="comes with datatrove")
    from pipelines.token_formats.nanotron import _for_people

    for count in [*range(1, 1100), 9994, 9995, 9999, 99_949, 12_345, 123_456, 1_234_567, 10**9, 2 * 10**12]:
        assert _for_people(count) == humanize.metric(count, unit="T")


# exports


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return build_world(Store(tmp_path_factory.mktemp("world")), documents=16)


class SmallMill(Mill):
    """The mill over a small world: recipe `tiny` with its domains."""

    def recipe(self, name: str) -> Recipe:
        tiny = load_recipes()[name]
        roles = tiny.roles.model_copy(update={"general": ("wiki", "book"), "target": ("legal",), "evaluation": ()})
        return tiny.model_copy(update={"roles": roles})


@pytest.fixture(scope="module")
def mill(world: World) -> Mill:
    files = {member.name: pq.read_table(member.path).to_pylist() for member in world.selection}
    publish(world.store, "selected_subset", files, partition="tiny")
    return SmallMill(world.store.root, Engine(kind="serial"))


@pytest.mark.parametrize("name", FORMATS)
def test_a_partition_is_exported_in_its_order(name: str, mill: Mill, world: World, tmp_path: Path) -> None:
    partition = str(world.shards[0].partition)
    (exported,) = export_partition_tokens(mill, name, partition, tmp_path / "out")
    shard, stem = TokenShard(world.shards[0]), partition.replace("|", "@")
    paths = [path for path in sorted((tmp_path / "out").iterdir()) if path.suffix in (".ds", ".bin")]
    found = read(name, paths, Vocabulary(512, END))
    assert found == [shard.document_tokens(number)[:-1].tolist() for number in range(shard.documents.num_rows)]
    assert (exported.name, exported.documents, exported.tokens) == (stem, len(found), sum(map(len, found)))
    listed = pq.read_table(tmp_path / "out" / f"{stem}.documents.parquet").to_pylist()
    assert [row["id"] for row in listed] == shard.documents["id"].to_pylist()
    assert [row["number"] for row in listed] == list(range(len(found))) and {row["passage"] for row in listed} == {None}
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == world.tokenizer.file("tokenizer.json").read_bytes()


@pytest.mark.parametrize("name", FORMATS)
def test_a_recipe_is_exported_in_the_order_of_its_first_epoch(name: str, mill: Mill, world: World, tmp_path: Path) -> None:
    """What stands in the files, ends of text included, is what the streams of training read, from the beginning."""
    exported = export_recipe_tokens(mill, name, "tiny", tmp_path / "out")
    pools = passage_pools(world.selection, world.shards, END)
    assert [file.name for file in exported] == sorted(pools)
    for file in exported:
        paths = [path for path in sorted((tmp_path / "out").glob(f"{file.name}*")) if path.suffix in (".ds", ".bin")]
        found = read(name, paths, Vocabulary(512, END))
        stream = WindowStream(pools[file.name], 16, mill.recipe("tiny").training.seed)
        shown = stream.windows(range(stream.windows_per_epoch))
        written = [token for ids in found for token in (*ids, END)]
        assert [shown[0, 0], *shown[:, 1:].ravel()] == written[: shown[:, 1:].size + 1]
        listed = sorted(pq.read_table(tmp_path / "out" / f"{file.name}.documents.parquet").to_pylist(), key=lambda row: row["number"])
        assert [(row["id"], row["passage"]) for row in listed] == pools[file.name].names(stream.order(0)) and len(listed) == file.documents


def test_one_role_is_exported_alone(mill: Mill, tmp_path: Path) -> None:
    assert [file.name for file in export_recipe_tokens(mill, "nanotron", "tiny", tmp_path / "out", role="target")] == ["legal"]
    assert sorted(path.name for path in (tmp_path / "out").glob("*.ds")) == ["legal.ds"]


def test_datatrove_reads_an_export(mill: Mill, world: World, tmp_path: Path) -> None:
    pytest.importorskip("datatrove", reason="datatrove comes with the extra `bench`")
    from datatrove.utils.dataset import DatatroveFileDataset, DatatroveFolderDataset

    export_recipe_tokens(mill, "nanotron", "tiny", tmp_path / "out")
    total = 0
    for domain, pool in passage_pools(world.selection, world.shards, END).items():
        stream = WindowStream(pool, 31, mill.recipe("tiny").training.seed)
        dataset = DatatroveFileDataset(str(tmp_path / "out" / f"{domain}.ds"), 31, return_positions=True)
        tokens = np.concatenate([[stream.window(0)[0]], stream.windows(range(stream.windows_per_epoch))[:, 1:].ravel()])
        total += len(dataset)
        for number in range(len(dataset)):
            expected, item = tokens[number * 32 : (number + 1) * 32], dataset[number]
            if len(expected) == 32:
                assert item["input_ids"].tolist() == expected.tolist()
                starts = np.maximum.accumulate(np.where(np.concatenate([[True], expected[:-1] == END]), np.arange(32), 0))
                assert item["positions"].tolist() == (np.arange(32) - starts).tolist()
    folder = DatatroveFolderDataset(str(tmp_path / "out"), 31)
    assert len(folder) == total and [Path(file.file_path).name for file in folder.files] == ["book.ds", "legal.ds", "wiki.ds"]


def test_what_a_tokenizer_of_datatrove_wrote_is_read(world: World, tmp_path: Path) -> None:
    pytest.importorskip("datatrove", reason="datatrove comes with the extra `bench`")
    from datatrove.data import Document as Theirs
    from datatrove.pipeline.tokens.tokenizer import DocumentTokenizer

    texts = pq.read_table(world.corpora["wiki"].file("documents.parquet"))["text"].to_pylist()
    step = DocumentTokenizer(
        str(tmp_path), str(world.tokenizer.file("tokenizer.json")), eos_token="<|endoftext|>", shuffle_documents=False, seed=1
    )
    step.run((Theirs(text=text, id=str(number)) for number, text in enumerate(texts)), rank=0, world_size=1)
    (path,) = tmp_path.glob("*.ds")
    encoder = Tokenizer.from_file(str(world.tokenizer.file("tokenizer.json")))
    assert read("nanotron", [path], Vocabulary(512, END)) == [encoder.encode(text).ids for text in texts]
    assert [item.text for item in source(tmp_path, path.name, "nanotron", world.tokenizer.file("tokenizer.json"))] == texts


def test_the_command_exports_a_partition_and_refuses_what_it_does_not_know(mill: Mill, world: World, tmp_path: Path) -> None:
    environment = {"GRISTMILL_HOME": str(world.store.root)}

    def call(*arguments: str):
        return CliRunner().invoke(app, ["tokens", "export", *arguments], env=environment)

    done = call(str(tmp_path / "a"), "--format", "megatron", "--partition", str(world.shards[1].partition))
    assert done.exit_code == 0 and "documents," in done.output and f"tokens in {tmp_path / 'a'}" in done.output.replace("\n", "")
    assert sorted(path.suffix for path in (tmp_path / "a").iterdir()) == [".bin", ".idx", ".json", ".json", ".parquet"]
    assert call(str(tmp_path / "b"), "--format", "megatron").exit_code == 2
    errors = {
        ("--format", "megatron", "--partition", "wiki|2026-01-01"): (
            tmp_path / "a",
            GristmillError,
            "exists; name a directory that does not",
        ),
        ("--format", "megatrom", "--recipe", "tiny"): (tmp_path / "b", UnknownName, "did you mean 'megatron'"),
        ("--format", "llmc", "--recipe", "tin"): (tmp_path / "b", UnknownName, "did you mean 'tiny'"),
        ("--format", "llmc", "--recipe", "tiny", "--role", "generall"): (tmp_path / "b", UnknownName, "did you mean 'general'"),
    }
    for arguments, (directory, kind, message) in errors.items():
        failed = call(str(directory), *arguments)
        assert isinstance(failed.exception, kind) and message in str(failed.exception)
    assert not (tmp_path / "b").exists() and not list(tmp_path.glob(".*"))


def test_a_failed_export_leaves_nothing(mill: Mill, world: World, tmp_path: Path) -> None:
    empty = [{"id": "a", "passage": 0, "domain": "wiki", "role": "general", "tokens": 0, "selected": True}]
    publish(world.store, "selected_subset", {"general.parquet": empty, "target.parquet": empty}, partition="code-random")
    with pytest.raises(EmptyInput, match="recipe code-random selects no passage of general or target"):
        export_recipe_tokens(mill, "llmc", "code-random", tmp_path / "none")
    assert not list(tmp_path.iterdir())


# the source


def source(root: Path, pattern: str, name: str, tokenizer: Path, **values: object) -> list[Document | Quarantined]:
    plugin = plugins.build("sources", "token_files", {"paths": [pattern], "format": name, "tokenizer": str(tokenizer), **values})
    return list(plugin.read("river", "2026-02-01", root=root))


@pytest.mark.parametrize("name", FORMATS)
def test_a_corpus_is_made_of_exported_tokens(name: str, mill: Mill, world: World, tmp_path: Path) -> None:
    """Out and in again: the same texts, as a corpus that is addressed by every file that was read."""
    partition = str(world.shards[0].partition)
    export_partition_tokens(mill, name, partition, tmp_path / "out")
    texts = pq.read_table(world.corpora["wiki"].file("documents.parquet"))["text"].to_pylist()
    values = {"paths": ["out/*.ds" if name == "nanotron" else "out/*.bin"], "format": name, "tokenizer": "out/tokenizer.json"}
    made = corpus_settings("river", "2026-02-01", "token_files", values, tmp_path)
    names = {path.name for path in (tmp_path / "out").iterdir() if path.suffix not in (".parquet",)} - {"tokenizer_config.json"}
    assert {Path(file).name for file in made.files} == names
    assert source_plugins(made) == ("pipelines.sources.token_files", f"pipelines.token_formats.{name}")
    raw = Store(tmp_path / "store").build(Build("raw_corpus", ingest, made, "river|2026-02-01", audits=CORPUS_AUDITS)).manifest
    table = pq.read_table(raw.file("documents.parquet"))
    assert table["text"].to_pylist() == texts and raw.counts["quarantined"] == 0
    assert all(name.startswith("river-") and name.endswith("@2026-02") for name in table["id"].to_pylist())


@settings(max_examples=30, deadline=None)
@given(texts=st.lists(st.text(min_size=1, max_size=40), min_size=1, max_size=5), at=st.integers(0, 30))
def test_bytes_come_back_exactly_and_what_is_not_utf_8_is_kept_aside(texts: list[str], at: int) -> None:
    tokenizer = byte_tokenizer()
    documents = [[1 + byte for byte in text.encode()] for text in texts]
    cut = documents[0][: 1 + at % len(documents[0])]
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        tokenizer.save(str(root / "tokenizer.json"))
        write("megatron", root / "x", [*documents, cut])
        *whole, last = source(root, "x.bin", "megatron", root / "tokenizer.json")
    assert [item.text for item in whole] == texts
    assert [item.locator for item in whole] == [f"x.bin:{number}" for number in range(1, len(texts) + 1)]
    raw = bytes(number - 1 for number in cut)
    try:
        assert last == Document(text=raw.decode(), locator=last.locator)
    except UnicodeDecodeError:
        assert last == Quarantined(f"x.bin:{len(texts) + 1}", "text is not UTF-8", raw.decode("utf-8", "backslashreplace"))


def test_other_tokenizers_decode_by_their_own_decoder(tmp_path: Path) -> None:
    from tokenizers import decoders, models

    vocabulary = {"<|endoftext|>": 0, "▁the": 1, "▁mill": 2, "<0xE2>": 3, "<0x82>": 4, "<0xAC>": 5}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    write("nanotron", tmp_path / "x", [[1, 2], [1, 3, 4, 5], [1, 3, 4]], Vocabulary(6, END))
    *whole, cut = source(tmp_path, "x.ds", "nanotron", tmp_path / "tokenizer.json")
    assert [item.text for item in whole] == ["the mill", "the€"]
    assert isinstance(cut, Quarantined) and cut.reason == "text is not UTF-8" and cut.excerpt.startswith("the")


def test_a_wrong_tokenizer_is_an_error(tmp_path: Path) -> None:
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "broken.json").write_text("{}")
    write("llmc", tmp_path / "x", [[5, 6], [299]])
    with pytest.raises(GristmillError, match=r"x_000000.bin:2: ids from 299 to 299 are not all among the 257 of .*; name the tokenizer"):
        source(tmp_path, "x_*.bin", "llmc", tmp_path / "tokenizer.json")
    with pytest.raises(UnknownName, match=r"unknown special token in .*tokenizer.json '<end>'"):
        source(tmp_path, "x_*.bin", "llmc", tmp_path / "tokenizer.json", end_of_text="<end>")
    with pytest.raises(GristmillError, match=r"broken.json is not the tokenizer.json of a Hugging Face tokenizer"):
        source(tmp_path, "x_*.bin", "llmc", tmp_path / "broken.json")
    with pytest.raises(GristmillError, match=r"names 2 files; name one tokenizer.json"):
        source(tmp_path, "x_*.bin", "llmc", tmp_path / "*.json")
    with pytest.raises(GristmillError, match=r"unknown plugin in token_formats 'megatrom'; did you mean 'megatron'"):
        source(tmp_path, "x_*.bin", "megatrom", tmp_path / "tokenizer.json")


# errors


@pytest.mark.parametrize("name", FORMATS)
def test_ids_outside_of_the_vocabulary_are_not_written(name: str, tmp_path: Path) -> None:
    with pytest.raises(GristmillError, match=r"document 2 holds id 300, the vocabulary has 300 ids from 0; name the tokenizer"):
        write(name, tmp_path / "x", [[5], [4, 300, 3]])
    with pytest.raises(GristmillError, match="document 1 holds id -1"):
        format_of(name).write([np.asarray([-1, 5])], tmp_path / "x", vocabulary=SMALL)
    with pytest.raises(EmptyInput, match="no document to write"):
        write(name, tmp_path / "x", [])


@pytest.mark.parametrize(("name", "suffix"), [("nanotron", ".index"), ("megatron", ".idx")])
def test_a_missing_index_is_named(name: str, suffix: str, tmp_path: Path) -> None:
    tokens, index, *_ = write(name, tmp_path / "x", DOCUMENTS)
    index.unlink()
    with pytest.raises(GristmillError, match=rf"has no {index.name} beside it, which says where documents end; copy it too") as caught:
        read(name, [tokens])
    assert index.name.endswith(suffix) and str(tokens) in str(caught.value)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("lost", [1, 2, 8, 11])
def test_every_cut_file_is_an_error(name: str, lost: int, tmp_path: Path) -> None:
    written = write(name, tmp_path / "x", DOCUMENTS)
    for path in written:
        whole = path.read_bytes()
        path.write_bytes(whole[:-lost])
        if not path.name.endswith(".metadata"):
            with pytest.raises(GristmillError, match=r"cut|multiple of 8|index of"):
                read(name, token_files(name, written))
        path.write_bytes(whole)
    assert read(name, token_files(name, written)) == DOCUMENTS


def test_a_file_of_another_kind_is_an_error(tmp_path: Path) -> None:
    (llmc,) = write("llmc", tmp_path / "llmc", DOCUMENTS)
    megatron, idx = write("megatron", tmp_path / "megatron", DOCUMENTS * 200)
    with pytest.raises(GristmillError, match=r"megatron.bin begins with \d+; the data files of llm.c begin with 20240520 .* see `format`"):
        read("llmc", [megatron])
    idx.write_bytes(b"MMIDIDY" + idx.read_bytes()[7:])
    with pytest.raises(GristmillError, match=r"megatron.idx begins with b'MMIDIDY.*: see `format`"):
        read("megatron", [megatron])
    idx.write_bytes(struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 6, 0, 1) + bytes(8))
    with pytest.raises(GristmillError, match="version 1 and type 6 of ids"):
        read("megatron", [megatron])
    llmc.write_bytes(llmc_header(20240520, 2, 0))
    with pytest.raises(GristmillError, match="version 2 of magic 20240520; 1 is read"):
        read("llmc", [llmc])
    llmc.write_bytes(b"")
    with pytest.raises(GristmillError, match="holds 0 bytes, 1,024 are announced"):
        read("llmc", [llmc])


def test_an_index_of_another_file_is_an_error(tmp_path: Path) -> None:
    tokens, index, metadata = write("nanotron", tmp_path / "x", DOCUMENTS)
    index.write_bytes(np.asarray([9, 4, 15], dtype="<u8").tobytes())
    with pytest.raises(GristmillError, match=r"document 2 ends at 4, the one before at 9; this is no index of x.ds"):
        read("nanotron", [tokens])
    metadata.write_text("gpt2|2\n16\n16.0 T")
    with pytest.raises(GristmillError, match=r"x.ds holds 15 ids of 2 bytes, 16 are announced"):
        read("nanotron", [tokens])
    for text in ("gpt2", "gpt2|x\n15", "gpt2|3\n15"):
        metadata.write_text(text)
        with pytest.raises(GristmillError, match=r"x.ds.metadata"):
            read("nanotron", [tokens])
    tokens, index = write("megatron", tmp_path / "y", DOCUMENTS)
    raw = bytearray(index.read_bytes())
    raw[34 + 4 * 5 : 34 + 4 * 5 + 8] = struct.pack("<q", 10**6)
    index.write_bytes(raw)
    with pytest.raises(GristmillError, match=r"document 1 is to begin at byte 1000000 .*: the index is of another file"):
        read("megatron", [tokens])


def test_ids_of_four_bytes_are_known_by_the_metadata(tmp_path: Path) -> None:
    """Where it is missing, the size of the vocabulary tells, as it does for datatrove."""
    tokens, _, metadata = write("nanotron", tmp_path / "x", DOCUMENTS, LARGE)
    assert read("nanotron", [tokens], SMALL) == DOCUMENTS
    metadata.unlink()
    assert read("nanotron", [tokens], LARGE) == DOCUMENTS
    with pytest.raises(GristmillError, match="x.ds holds 30 ids of 2 bytes, 15 are announced"):
        read("nanotron", [tokens], SMALL)


def test_the_benchmark_of_reading_runs(tmp_path: Path) -> None:
    pytest.importorskip("datatrove", reason="datatrove comes with the extra `bench`")
    from benchmarks.reading import measure

    found = measure(tmp_path, 300_000)
    assert len(found["rates"]) == 8 and min(found["rates"].values()) > 0 and found["cold_seek_ms"] > 0
