"""Token shards: memory-mapped token ids with an index of documents and passages, and streams of windows over them.

A stream gives window ``i`` of a pool of passages as a pure function of (pool, seed, sequence length): each epoch is a
permutation of the passages (Philox keyed by seed and epoch), joined with end-of-text tokens and cut into windows. So a
run resumes at any step without loader state, and a domain's stream is the same whatever share it gets in a mixture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.errors import EmptyInput
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
    """Passages of one domain, in shard order: where each lies and how long it is."""

    tokens: Sequence[np.ndarray]
    """The memory-mapped token files."""
    shard: np.ndarray
    """int64, shape (n,): which of `tokens` each passage lies in."""
    offset: np.ndarray
    """int64, shape (n,): first token."""
    length: np.ndarray
    """int64, shape (n,): number of tokens."""
    end_of_text: int

    @property
    def num_tokens(self) -> int:
        """Tokens of one epoch, one end of text per passage included."""
        return int(self.length.sum() + len(self.length))


@dataclass
class WindowStream:
    """Windows of `sequence_length` + 1 tokens (inputs and their successors) over `pool`, shuffled without replacement per epoch.

    Neighbouring windows share one token, so every token of an epoch is predicted once; the rest that does not fill a
    window is left out of that epoch.

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

    @property
    def windows_per_epoch(self) -> int:
        return (self.pool.num_tokens - 1) // self.sequence_length

    def window(self, number: int) -> np.ndarray:
        """Return window `number` (0-based, counted over epochs) as int64 of shape ``(sequence_length + 1,)``."""
        epoch, place = divmod(number, self.windows_per_epoch)
        order, ends = self._permutation(epoch)
        start = place * self.sequence_length
        return self._read(order, ends, start, start + self.sequence_length + 1)

    def passages_of(self, number: int) -> np.ndarray:
        """Return the passages (rows of the pool) that window `number` touches."""
        epoch, place = divmod(number, self.windows_per_epoch)
        order, ends = self._permutation(epoch)
        start = place * self.sequence_length
        first = np.searchsorted(ends, start, side="right")
        last = np.searchsorted(ends, start + self.sequence_length, side="right")
        return order[first : last + 1]

    def _permutation(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        if self._epoch is None or self._epoch[0] != epoch:
            generator = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
            order = generator.permutation(len(self.pool.length))
            self._epoch = (epoch, order, np.cumsum(self.pool.length[order] + 1))
        return self._epoch[1], self._epoch[2]

    def _read(self, order: np.ndarray, ends: np.ndarray, start: int, stop: int) -> np.ndarray:
        out = np.full(stop - start, self.pool.end_of_text, dtype=np.int64)
        place = int(np.searchsorted(ends, start, side="right"))
        while place < len(order):
            passage = order[place]
            length = int(self.pool.length[passage])
            begin = int(ends[place]) - length - 1
            if begin >= stop:
                break
            low, high = max(start, begin), min(stop, begin + length)
            if low < high:
                source = self.pool.tokens[self.pool.shard[passage]]
                at = int(self.pool.offset[passage]) + low - begin
                out[low - start : high - start] = source[at : at + high - low]
            place += 1
        return out


def passage_pools(selection: Sequence[Member], shards: Sequence[Manifest], end_of_text: int) -> dict[str, PassagePool]:
    """Return the selected passages as one pool per domain, in shard order.

    Args:
        selection: files of a selected_subset artifact, one per role.
        shards: the tokenized_shards artifacts that hold its passages.
    """
    import duckdb

    connection = duckdb.connect()
    connection.register("located", pa.concat_tables(_located(TokenShard(manifest), number) for number, manifest in enumerate(shards)))
    chosen = connection.execute(
        'select s.domain, l.shard, l."offset", l.length from located l join read_parquet($paths) s using (id, passage) '
        'where s.selected and l.length > 0 order by s.domain, l.shard, l."offset"',
        {"paths": [str(member.path) for member in selection]},
    ).fetchnumpy()
    tokens = [TokenShard(manifest).tokens for manifest in shards]
    domains = np.asarray(chosen["domain"]).astype(str)
    pools = {}
    for domain in np.unique(domains):
        mask = domains == domain
        columns = (np.asarray(chosen[name])[mask].astype(np.int64) for name in ("shard", "offset", "length"))
        pools[str(domain)] = PassagePool(tokens, *columns, end_of_text=end_of_text)
    return pools


def _located(shard: TokenShard, number: int) -> pa.Table:
    return shard.passages.append_column("shard", pa.array(np.full(shard.passages.num_rows, number, dtype=np.int32)))


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
    from pipelines.documents import stable_fraction

    table = pq.read_table(decisions.file("decisions.parquet"), columns=["id", "domain", "kept", "split"]).to_pylist()
    domain_of = {row["id"]: row["domain"] for row in table if row["kept"] and row["split"] == "held_out"}
    found: dict[str, list[tuple[float, str, np.ndarray, int]]] = {}
    for manifest in shards:
        shard = TokenShard(manifest)
        for number, (name, size) in enumerate(zip(shard.documents["id"].to_pylist(), shard.documents["bytes"].to_pylist(), strict=True)):
            if name in domain_of:
                found.setdefault(domain_of[name], []).append(
                    (stable_fraction("evaluation", name), name, shard.document_tokens(number), size)
                )
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
