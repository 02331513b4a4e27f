"""Token shards: memory-mapped token ids with an index of documents and passages, and streams of windows over them.

A stream gives window ``i`` of a pool of passages as a pure function of (pool, seed, sequence length): each epoch is a
permutation of the passages (Philox keyed by seed and epoch), joined with end-of-text tokens and cut into windows. So a
run resumes at any step without loader state, and a domain's stream is the same whatever share it gets in a mixture.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.documents import ROWS_PER_GROUP, read_batches, stable_fraction
from pipelines.errors import EmptyInput, GristmillError
from pipelines.manifests import Manifest, Member

TOKENS, DOCUMENTS, PASSAGES = "tokens.bin", "documents.parquet", "passages.parquet"


def token_dtype(vocabulary_size: int) -> np.dtype[np.unsignedinteger]:
    """Return the little-endian type of token ids: uint16 up to 65,536 tokens, else uint32."""
    return np.dtype("<u2") if vocabulary_size <= 65_536 else np.dtype("<u4")


class TokenShard:
    """A tokenized_shards artifact, opened for reading."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        dtype = np.dtype(str(manifest.outcome.details["dtype"]))
        path = manifest.directory / TOKENS
        held = path.stat().st_size // dtype.itemsize  # whole tokens: an audit counts those of a torn file
        self.tokens: np.ndarray = np.memmap(path, dtype=dtype, mode="r", shape=(held,)) if held else np.empty(0, dtype)

    @cached_property
    def documents(self) -> pa.Table:
        return pq.read_table(self.manifest.directory / DOCUMENTS)

    @cached_property
    def passages(self) -> pa.Table:
        return pq.read_table(self.manifest.directory / PASSAGES)

    def document_tokens(self, number: int) -> np.ndarray:
        """Return the tokens of document `number` (row of the index), the end of text included."""
        offset = self.documents["offset"][number].as_py()
        return self.tokens[offset : offset + self.documents["length"][number].as_py()]


@dataclass(frozen=True)
class PassagePool:
    """Passages of one domain, in shard order: where each lies and how long it is. 20 bytes a passage."""

    tokens: Sequence[np.ndarray]
    """The memory-mapped token files."""
    shard: np.ndarray
    """Integers, shape (n,): which of `tokens` each passage lies in."""
    offset: np.ndarray
    """int64, shape (n,): first token."""
    length: np.ndarray
    """Integers, shape (n,): number of tokens, at least 1."""
    end_of_text: int
    row: np.ndarray | None = None
    """Integers, shape (n,): row of each passage in the index of its shard; names are read there when they are asked for."""
    indexes: Sequence[Path] = ()
    """The passage index of each shard."""

    @property
    def num_tokens(self) -> int:
        """Tokens of one epoch, one end of text per passage included."""
        return int(self.length.sum(dtype=np.int64)) + len(self.length)

    def __len__(self) -> int:
        return len(self.length)

    def subset(self, passages: np.ndarray) -> PassagePool:
        """Return the pool of `passages` alone: a boolean mask of shape (n,), or their numbers."""
        row = None if self.row is None else self.row[passages]
        return replace(self, shard=self.shard[passages], offset=self.offset[passages], length=self.length[passages], row=row)

    def names(self, passages: np.ndarray) -> list[tuple[str, int]]:
        """Return ``(document id, passage)`` of each of `passages`; only the row groups that hold them are read."""
        rows, shards = self._rows[passages].astype(np.int64), self.shard[passages]
        found: list[tuple[str, int]] = [("", 0)] * len(rows)
        for shard in np.unique(shards):
            mine = np.nonzero(shards == shard)[0]
            for place, name in zip(mine.tolist(), _passage_names(self.indexes[shard], rows[mine]), strict=True):
                found[place] = name
        return found

    def name_batches(self) -> Iterator[tuple[np.ndarray, pa.RecordBatch]]:
        """Yield ``(passages, their rows of id and passage)`` for the whole pool, each index read once from its beginning."""
        for shard in np.unique(self.shard):
            mine = np.nonzero(self.shard == shard)[0]
            mine = mine[np.argsort(self._rows[mine], kind="stable")]
            rows, first = self._rows[mine].astype(np.int64), 0
            for batch in read_batches(self.indexes[shard], ["id", "passage"], rows=ROWS_PER_GROUP):
                low, high = np.searchsorted(rows, [first, first + batch.num_rows])
                if low < high:
                    yield mine[low:high], batch.take(pa.array(rows[low:high] - first))
                first += batch.num_rows

    @property
    def _rows(self) -> np.ndarray:
        if self.row is None:
            raise GristmillError("this pool was made without the rows of its passages, so their documents have no names; use passage_pools")
        return self.row


def _passage_names(index: Path, rows: np.ndarray) -> Iterator[tuple[str, int]]:
    """Yield ``(document id, passage)`` for `rows` of a passage index."""
    with pq.ParquetFile(index) as file:
        ends = np.cumsum([file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)])
        groups, places = np.unique(np.searchsorted(ends, rows, side="right"), return_inverse=True)
        tables = {int(group): file.read_row_group(int(group), columns=["id", "passage"]) for group in groups}
        for place, row in zip(places.tolist(), rows.tolist(), strict=True):
            group = int(groups[place])
            inside = row - (int(ends[group - 1]) if group else 0)
            yield tables[group]["id"][inside].as_py(), tables[group]["passage"][inside].as_py()


def split_pool(pool: PassagePool, fraction: float, *, salt: str = "validation") -> tuple[PassagePool, PassagePool]:
    """Return ``(training pool, validation pool)``: about `fraction` of the documents, whole, are kept from training.

    A document's side depends on `salt` and its id alone (`stable_fraction`), so it stays where it is when others come or go.

    Raises:
        GristmillError: `fraction` is not between 0 and 1.
        EmptyInput: a side has no passage.
    """
    if not 0 < fraction < 1:
        raise GristmillError(f"validation fraction {fraction} is not between 0 and 1; 0.01 keeps one document in a hundred from training")
    kept_out = np.zeros(len(pool), dtype=bool)
    for passages, rows in pool.name_batches():
        names = rows.column("id").dictionary_encode()
        chosen = np.asarray([stable_fraction(salt, name) < fraction for name in names.dictionary.to_pylist()], dtype=bool)
        kept_out[passages] = chosen[names.indices.to_numpy()]
    for side, empty in (("training", kept_out.all()), ("validation", not kept_out.any())):
        if empty:
            raise EmptyInput(f"a validation fraction of {fraction} leaves no {side} document of {len(pool)} passages; choose another")
    return pool.subset(~kept_out), pool.subset(kept_out)


class Span(NamedTuple):
    """A stretch of a window that comes from one passage, its end of text included."""

    document: str
    """Id of the document."""
    passage: int
    """Number of the passage within the document."""
    first: int
    """Position of its first token in the window."""
    count: int
    """Number of tokens."""


@dataclass(frozen=True)
class _Pieces:
    """The passages that some windows touch, one after the other; arrays of shape (pieces,)."""

    window: np.ndarray
    """Which of the windows, by its place in the request."""
    passage: np.ndarray
    begin: np.ndarray
    """Where the passage begins, relative to the window: below 0 where the window begins inside it."""


@dataclass
class WindowStream:
    """Windows of `sequence_length` + 1 tokens (inputs and their successors) over `pool`, shuffled without replacement per epoch.

    Neighbouring windows share one token, so every token of an epoch is predicted once; the rest that does not fill a
    window is left out of that epoch. Holds 12 bytes a passage for the order of one epoch, which takes 30 ms to make
    for a million passages and 9 seconds for a hundred million; any window of that epoch is then found by bisection.

    Raises:
        EmptyInput: the pool does not hold one window.
    """

    pool: PassagePool
    sequence_length: int
    seed: int
    name: str = "pool"
    _epoch: tuple[int, np.ndarray, np.ndarray] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.windows_per_epoch < 1:
            raise EmptyInput(
                f"{self.name}: {self.pool.num_tokens} tokens do not fill one window of {self.sequence_length}; "
                "raise its selection budget, loosen its filters or shorten sequence_length"
            )

    @cached_property
    def windows_per_epoch(self) -> int:
        """Windows that an epoch fills."""
        return (self.pool.num_tokens - 1) // self.sequence_length

    def window(self, number: int) -> np.ndarray:
        """Return window `number` (0-based, counted over epochs) as int64 of shape ``(sequence_length + 1,)``."""
        return self.windows([number])[0]

    def windows(self, numbers: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return windows by their numbers, in any order, as int64 of shape ``(n, sequence_length + 1)``."""
        chosen = np.asarray(numbers, dtype=np.int64)
        size = self.sequence_length + 1
        out = np.full((len(chosen), size), self.pool.end_of_text, dtype=np.int64)
        for pieces in self._pieces(chosen):
            low = np.maximum(pieces.begin, 0)
            count = np.minimum(pieces.begin + self.pool.length[pieces.passage], size) - low
            source = self.pool.offset[pieces.passage] + low - pieces.begin
            target = pieces.window * size + low
            self._copy(self.pool.shard[pieces.passage], source, target, count, out.reshape(-1))
        return out

    def trace(self, number: int) -> list[Span]:
        """Return what window `number` shows, first to last; the counts sum to ``sequence_length + 1``."""
        (pieces,) = self._pieces(np.asarray([number], dtype=np.int64))
        low = np.maximum(pieces.begin, 0)
        count = np.minimum(pieces.begin + self.pool.length[pieces.passage] + 1, self.sequence_length + 1) - low
        names = self.pool.names(pieces.passage)
        return [Span(*name, *place) for name, place in zip(names, zip(low.tolist(), count.tolist(), strict=True), strict=True)]

    def passages_of(self, number: int) -> np.ndarray:
        """Return the passages (rows of the pool) that window `number` shows, first to last."""
        (pieces,) = self._pieces(np.asarray([number], dtype=np.int64))
        return pieces.passage

    def order(self, epoch: int) -> np.ndarray:
        """Return the passages (rows of the pool) in the order of `epoch`."""
        return self._permutation(epoch)[0]

    def _pieces(self, numbers: np.ndarray) -> Iterator[_Pieces]:
        """Yield, for each epoch that `numbers` touch, the passages of their windows."""
        epochs, places = np.divmod(numbers, self.windows_per_epoch)
        for epoch in np.unique(epochs):
            order, ends = self._permutation(int(epoch))
            (windows,) = np.nonzero(epochs == epoch)
            starts = places[windows] * self.sequence_length
            first = np.searchsorted(ends, starts, side="right")
            num_pieces = np.searchsorted(ends, starts + self.sequence_length, side="right") - first + 1
            window = np.repeat(np.arange(len(windows)), num_pieces)
            rank = np.arange(len(window)) + (first - np.cumsum(num_pieces) + num_pieces)[window]
            passage = order[rank]
            yield _Pieces(windows[window], passage, ends[rank] - self.pool.length[passage] - 1 - starts[window])

    def _copy(self, shard: np.ndarray, source: np.ndarray, target: np.ndarray, count: np.ndarray, out: np.ndarray) -> None:
        """Copy the pieces, each file's in the order in which they lie there."""
        from pipelines.stream_kernels import copy_pieces

        place = np.lexsort((source, shard))
        bounds = np.searchsorted(shard[place], np.unique(shard), side="right").tolist()
        for low, high in pairwise([0, *bounds]):
            mine = place[low:high]
            tokens = np.asarray(self.pool.tokens[shard[mine[0]]])
            if (end := int((source[mine] + count[mine]).max())) > len(tokens):  # compiled code would read beyond the file
                rule = f"token file {shard[mine[0]]} ends at {len(tokens)} tokens, but its index has a passage up to {end}"
                raise GristmillError(f"{self.name}: {rule}; `gristmill verify tokenized_shards` names the shard: materialize it again")
            copy_pieces(tokens, source[mine], target[mine], count[mine], out)

    def _permutation(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the order of the passages in `epoch`, and where each ends, its end of text included."""
        from pipelines.stream_kernels import cumulate

        if self._epoch is None or self._epoch[0] != epoch:
            order = np.arange(len(self.pool), dtype=np.uint32 if len(self.pool) <= 2**32 else np.int64)
            np.random.Generator(np.random.Philox(key=[self.seed, epoch])).shuffle(order)
            ends = np.empty(len(order), dtype=np.int64)
            cumulate(self.pool.length, order, ends)
            self._epoch = (epoch, order, ends)
        return self._epoch[1], self._epoch[2]


def passage_pools(selection: Sequence[Member], shards: Sequence[Manifest], end_of_text: int) -> dict[str, PassagePool]:
    """Return the selected passages as one pool per domain, in shard order.

    The tables are joined by DuckDB, which spills to the disk what does not fit in memory.

    Args:
        selection: files of a selected_subset artifact, one per role.
        shards: the tokenized_shards artifacts that hold its passages.
    """
    import duckdb

    indexes = [manifest.directory / PASSAGES for manifest in shards]
    tokens = [TokenShard(manifest).tokens for manifest in shards]
    files = {"selected": [str(member.path) for member in selection]}
    with tempfile.TemporaryDirectory() as spill, duckdb.connect(config={"temp_directory": spill}) as connection:
        domains = [name for (name,) in connection.execute(_DOMAINS, files).fetchall()]
        located = {**files, "domains": domains, "indexes": [str(index) for index in indexes]}
        found = connection.execute(_LOCATED, located).fetchnumpy() if indexes and domains else {"domain": np.empty(0)}
    bounds = np.searchsorted(found["domain"], np.arange(1, len(domains) + 2)).tolist()
    pools = {}
    for domain, (low, high) in zip(domains, pairwise(bounds), strict=True):
        if low < high:
            shard, offset, length, row = (np.asarray(found[name][low:high]) for name in ("shard", "offset", "length", "row"))
            pools[domain] = PassagePool(tokens, shard, offset, length, end_of_text, row, indexes)
    return pools


_DOMAINS = "select distinct domain from read_parquet($selected) where selected order by domain"
_LOCATED = """
select list_position($domains, c.domain)::smallint as domain, l.file_index::integer as shard, l."offset", l.length::integer as length,
    l.file_row_number::uinteger as row
from read_parquet($indexes, file_row_number = true) l join read_parquet($selected) c using (id, passage)
where c.selected and l.length > 0
order by 1, 2, 3
"""


@dataclass(frozen=True)
class HeldOutDocuments:
    """The held-out documents of one domain: their tokens and their sizes."""

    ids: list[str]
    tokens: list[np.ndarray]
    """Token ids of each document, the end of text included."""
    bytes: np.ndarray
    """int64, shape (n,): UTF-8 bytes of each document."""

    @property
    def num_tokens(self) -> int:
        return sum(len(tokens) for tokens in self.tokens)


def held_out_documents(decisions: Manifest, shards: Sequence[Manifest], *, max_tokens: int | None = None) -> dict[str, HeldOutDocuments]:
    """Return, by domain, the documents of the held-out split that `decisions` (deduplicated_corpus) keeps.

    Args:
        max_tokens: per domain; documents are taken in the order of a stable hash of their id until it is reached.
    """
    table = pq.read_table(decisions.file("decisions.parquet"), columns=["id", "domain", "kept", "split"])
    wanted = table.filter(pc.and_(table["kept"], pc.equal(table["split"], "held_out")))
    domain_of = dict(zip(wanted["id"].to_pylist(), wanted["domain"].to_pylist(), strict=True))
    names = wanted["id"].combine_chunks()
    found: dict[str, list[tuple[float, str, np.ndarray, int]]] = {}
    for manifest in shards:
        shard = TokenShard(manifest)
        (numbers,) = np.nonzero(pc.is_in(shard.documents["id"], value_set=names).to_numpy())
        held = shard.documents.select(["id", "bytes"]).take(pa.array(numbers))
        for number, name, size in zip(numbers.tolist(), held["id"].to_pylist(), held["bytes"].to_pylist(), strict=True):
            order = stable_fraction("evaluation", name)
            found.setdefault(domain_of[name], []).append((order, name, shard.document_tokens(number), size))
    return {domain: _first_tokens(sorted(found[domain], key=lambda item: item[:2]), max_tokens) for domain in sorted(found)}


def _first_tokens(documents: list[tuple[float, str, np.ndarray, int]], max_tokens: int | None) -> HeldOutDocuments:
    total, count = 0, 0
    for _, _, tokens, _ in documents:
        if max_tokens is not None and total >= max_tokens:
            break
        total, count = total + len(tokens), count + 1
    chosen = documents[:count]
    return HeldOutDocuments([d[1] for d in chosen], [d[2] for d in chosen], np.asarray([d[3] for d in chosen], dtype=np.int64))


def windows_of(documents: HeldOutDocuments, sequence_length: int, num_windows: int, end_of_text: int) -> np.ndarray:
    """Return at most `num_windows` evenly spaced windows, int64 of shape ``(n, sequence_length + 1)``.

    The documents are joined in order after one end-of-text token, so that the first token of each is predicted too.
    """
    joined = np.concatenate([np.asarray([end_of_text], dtype=np.int64), *(tokens.astype(np.int64) for tokens in documents.tokens)])
    available = (len(joined) - 1) // sequence_length
    places = np.unique(np.linspace(0, available - 1, min(num_windows, available)).astype(np.int64)) if available else np.empty(0, np.int64)
    return (
        np.stack([joined[p * sequence_length : (p + 1) * sequence_length + 1] for p in places])
        if len(places)
        else np.empty((0, sequence_length + 1), np.int64)
    )
