"""`gristmill tokens export`: the tokens of a source partition, or what a recipe selects, as the files of another trainer."""

import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from assets_defs.resources import Mill
from assets_defs.training import role_shards, selected
from pipelines import plugins
from pipelines.documents import partition_file, table_writer
from pipelines.errors import EmptyInput, GristmillError, UnknownName
from pipelines.manifests import Manifest
from pipelines.shards import PassagePool, TokenShard, WindowStream, passage_pools
from pipelines.token_formats import TokenFormat, Vocabulary

ROLES = ("general", "target")
EXPORTED = pa.schema([("number", pa.int64()), ("id", pa.string()), ("passage", pa.int32())])
"""Which document of the file (from 0) is which passage; null for a whole document. Rows stand in the order of the shards."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Exported:
    """One token file, or several numbered ones, of an export."""

    name: str
    """The domain, or the source partition."""
    documents: int
    tokens: int
    """Without ends of text."""


def export_partition_tokens(mill: Mill, name: str, partition: str, directory: Path) -> list[Exported]:
    """Write the documents of a source partition in format `name`, in the order of its shard.

    Raises:
        UnknownName: there is no such format.
        GristmillError: the directory exists.
    """
    shard = mill.store.current("tokenized_shards", partition)
    (reference,) = shard.inputs["tokenizer"]
    tokenizer = mill.store.find(reference.asset, reference.fingerprint) or mill.store.current("tokenizer")
    with _Export(name, directory, tokenizer) as export:
        opened = TokenShard(shard)
        bounds = zip(opened.documents["offset"].to_numpy().tolist(), opened.documents["length"].to_numpy().tolist(), strict=True)
        documents = (opened.tokens[offset : offset + length - 1] for offset, length in bounds)
        ids, rows = opened.documents["id"], opened.documents.num_rows
        table = pa.table([pa.array(np.arange(rows)), ids, pa.nulls(rows, pa.int32())], schema=EXPORTED)
        export.write(partition_file(partition).removesuffix(".parquet"), documents, table.to_batches())
        return export.done


def export_recipe_tokens(mill: Mill, name: str, recipe: str, directory: Path, *, role: str | None = None) -> list[Exported]:
    """Write the passages that `recipe` selects in format `name`, a file per domain, in the order of training's first epoch.

    Raises:
        UnknownName: there is no such format, recipe or role.
        GristmillError: the directory exists, or nothing is selected.
    """
    chosen = mill.recipe(recipe)
    if role not in (None, *ROLES):
        raise UnknownName("role", role, ROLES)
    roles = (role,) if role else ROLES
    with _Export(name, directory, mill.store.current("tokenizer")) as export:
        selection = tuple(selected(mill, recipe, wanted) for wanted in roles)
        pools = passage_pools(selection, role_shards(mill, chosen, roles), export.vocabulary.end_of_text)
        if not pools:
            raise EmptyInput(f"recipe {recipe} selects no passage of {' or '.join(roles)}; loosen its filters or raise its budget")
        for domain, pool in pools.items():
            order = WindowStream(pool, 1, chosen.training.seed, name=domain).order(0)
            export.write(domain, _passages(pool, order), _named(pool, order))
        return export.done


def _passages(pool: PassagePool, order: np.ndarray) -> Iterator[np.ndarray]:
    for passage in order.tolist():
        offset = int(pool.offset[passage])
        yield pool.tokens[pool.shard[passage]][offset : offset + int(pool.length[passage])]


def _named(pool: PassagePool, order: np.ndarray) -> Iterator[pa.RecordBatch]:
    numbers = np.empty(len(order), dtype=np.int64)
    numbers[order] = np.arange(len(order))
    for passages, rows in pool.name_batches():
        yield pa.record_batch([pa.array(numbers[passages]), rows.column("id"), rows.column("passage")], schema=EXPORTED)


class _Export:
    """A directory of token files that appears whole, with the tokenizer and the names of the documents."""

    def __init__(self, name: str, directory: Path, tokenizer: Manifest) -> None:
        if directory.exists():
            raise GristmillError(f"{directory} exists; name a directory that does not")
        self._format: TokenFormat = plugins.build("token_formats", name)  # type: ignore[assignment]
        self._directory, self._tokenizer = directory, tokenizer
        self.vocabulary = _vocabulary(tokenizer)
        self.done: list[Exported] = []

    def __enter__(self) -> "_Export":
        self._directory.parent.mkdir(parents=True, exist_ok=True)
        self._scratch = tempfile.TemporaryDirectory(prefix=f".{self._directory.name}-", dir=self._directory.parent)
        self._out = Path(self._scratch.name) / "tokens"
        self._out.mkdir()
        for name in TOKENIZER_FILES:
            shutil.copyfile(self._tokenizer.file(name), self._out / name)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._out.rename(self._directory)
        self._scratch.cleanup()

    def write(self, name: str, documents: Iterable[np.ndarray], names: Iterable[pa.RecordBatch]) -> None:
        """Write one file, and beside it which document is which."""
        counts = np.zeros(2, dtype=np.int64)

        def counted() -> Iterator[np.ndarray]:
            for ids in documents:
                counts[:] += (1, len(ids))
                yield ids

        self._format.write(counted(), self._out / name, vocabulary=self.vocabulary)
        with table_writer(self._out / f"{name}.documents.parquet", EXPORTED) as table:
            for batch in names:
                table.write_batch(batch)
        self.done.append(Exported(name, *counts.tolist()))


def _vocabulary(tokenizer: Manifest) -> Vocabulary:
    from tokenizers import Tokenizer

    loaded = Tokenizer.from_file(str(tokenizer.file("tokenizer.json")))
    config = json.loads(tokenizer.file("tokenizer_config.json").read_text())
    return Vocabulary(loaded.get_vocab_size(), loaded.token_to_id(config["eos_token"]))
