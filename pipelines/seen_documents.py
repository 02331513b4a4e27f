"""Which steps of a training run read which documents, from its manifest: the order of the data is a function of seed and step.

    step -> batch (or the spare one that a rewind put in its place) -> sequences -> windows of domains -> passages -> documents

The run is laid out again, nothing of it is trained, and what it read is counted from where passages lie in an epoch: a window of T
positions shows tokens ``w * T`` to ``w * T + T`` of its epoch and predicts all but the first of them. A step sees a document whose
token, or whose end of text, a window of it shows. Steps whose update a guard left out count for nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa

from pipelines.data_order import DataOrder, DomainMixture
from pipelines.encoders import special_tokens
from pipelines.errors import GristmillError
from pipelines.guards import MAX_REPORTS
from pipelines.manifests import InputReference, Json, Manifest, Member
from pipelines.plan import Plan, TrainingSettings
from pipelines.reselection import read_selection
from pipelines.run_records import EVENTS, read_records
from pipelines.shards import PassagePool, WindowStream, passage_pools, split_pool
from pipelines.shares import role_shares

Find = Callable[[InputReference], Manifest]
"""Opens the artifact that a reference names."""
WHOLE = -1
"""The round of what is read of all passages."""


@dataclass(frozen=True)
class Reading:
    """One pass over some of a document's tokens."""

    step: int
    """0-based."""
    epoch: int
    """0-based, of the passages of the domain, or of those that the round selected."""
    round: int | None
    """The round of a selecting phase; None where all passages are read."""
    passage: int
    """Number of the passage within the document."""
    tokens: int
    """Tokens of it that the step was trained to predict, its end of text included; 0 where it was only looked at."""


class ReplayedOrder(DataOrder):
    """An order whose readings can be asked for."""

    @property
    def plan(self) -> Plan:
        """The plan that is laid out: the run's, shortened where limits ended it."""
        return self._plan

    def reading(self, number: int, domain: int) -> tuple[WindowStream, int]:
        """Return the stream that round `number` reads of domain `domain`, and the position that is its first window."""
        stream, first = self._readings_of(number)[domain]
        return stream, first


@dataclass(frozen=True)
class Replay:
    """The steps of one run, laid out again.

    Raises:
        GristmillError: the artifact is no run, or an input of it is gone.
    """

    checkpoint: Manifest
    find: Find

    def __post_init__(self) -> None:
        if "phases" not in self.checkpoint.settings:
            raise GristmillError(f"{self.checkpoint.label} was taken as it is, not trained here: what it has read is not known")

    def _inputs(self, name: str) -> list[Manifest]:
        return [self.find(reference) for reference in self.checkpoint.inputs.get(name, ())]

    @cached_property
    def num_steps(self) -> int:
        """Steps that were trained."""
        return int(self.checkpoint.counts["steps"])

    @cached_property
    def settings(self) -> TrainingSettings:
        """The settings of the run."""
        known = {name: value for name, value in self.checkpoint.settings.items() if name in TrainingSettings.model_fields}
        return TrainingSettings.model_validate(known)

    @cached_property
    def selection(self) -> tuple[Member, ...]:
        """The selected passages that were read, a file a role."""
        references = self.checkpoint.inputs["selection"]
        return tuple(Member(manifest=self.find(reference), name=str(reference.member)) for reference in references)

    @cached_property
    def pools(self) -> dict[str, PassagePool]:
        """The passages of each domain, without those set aside for validation."""
        end_of_text = special_tokens(self._inputs("tokenizer")[0].directory).end_of_text
        pools = passage_pools(self.selection, self._inputs("shards"), end_of_text)
        fraction = self.settings.validation.fraction
        return {domain: split_pool(pool, fraction)[0] for domain, pool in pools.items()} if fraction else pools

    @cached_property
    def order(self) -> ReplayedOrder:
        """The order of the data.

        Raises:
            GristmillError: it differs from what the run wrote down: the code that lays it out is another now.
        """
        order = self._laid_out(self.settings)
        if order.num_steps != Plan(self.settings).num_steps:  # limits end the run; spare batches lie behind that end
            tokens = order.num_steps * Plan(self.settings).tokens_per_step
            order = self._laid_out(self.settings.model_copy(update={"max_tokens": tokens}))
        recorded = self.checkpoint.outcome.tables.get("domains", [])
        if recorded != order.table():
            raise GristmillError(
                f"{self.checkpoint.label}: laid out again, its domains are {order.table()}; the run wrote {recorded}. The code of "
                f"the order has changed since (code version {self.checkpoint.code_version}); trace it with the project as it was then"
            )
        for path in sorted(self.checkpoint.directory.glob("selection/round-*.parquet")):
            number = int(path.stem.partition("-")[2])
            order.select(number, read_selection(self.checkpoint.directory, number))
        return order

    def _laid_out(self, settings: TrainingSettings) -> ReplayedOrder:
        return ReplayedOrder(Plan(settings), self._shares, self.pools)

    @cached_property
    def _shares(self) -> Mapping[str, float] | DomainMixture:
        if "mixture" in self.checkpoint.inputs:
            return DomainMixture.read(self._inputs("mixture")[0])
        return role_shares(self.selection)[str(self.checkpoint.settings["role"])]

    @cached_property
    def _interventions(self) -> tuple[dict[int, int], set[int]]:
        """Return the batches that rewinds put in the place of others, by step, and the steps whose updates were left out."""
        events = read_records(self.checkpoint.directory / EVENTS)
        if len(events) >= MAX_REPORTS:
            raise GristmillError(f"{self.checkpoint.label} stopped writing events at {MAX_REPORTS}, so what it read after is not known")
        guards, replaced, skipped = self.settings.guards, {}, set()
        spares = self.order.plan.num_steps
        for event in events:
            step = int(event["step"])
            if event["action"] == "skip":
                skipped.add(step)
            if event["action"] == "rewind":
                bad = range(max(0, step + 1 - guards.replaced_batches), step + 1)
                spare = max(replaced.values(), default=spares - 1) + 1
                replaced |= {one: spare + number for number, one in enumerate(bad)}
                point = bad[0] // guards.rewind_every * guards.rewind_every  # from here on steps were done again
                skipped = {one for one in skipped if one < point}
        return replaced, skipped

    @cached_property
    def steps(self) -> np.ndarray:
        """The steps whose updates were made, int64, rising."""
        skipped = self._interventions[1]
        return np.asarray([step for step in range(self.num_steps) if step not in skipped], dtype=np.int64)

    @cached_property
    def _sequences(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the sequences that were read, their steps, and the rounds that they were read in (`WHOLE` where none)."""
        replaced, size = self._interventions[0], self.settings.batch_sequences
        batches = np.asarray([replaced.get(step, step) for step in self.steps.tolist()], dtype=np.int64)
        rounds = [self.order.plan.round_at(step) for step in self.steps.tolist()]
        numbered = np.asarray([WHOLE if one is None else one for one in rounds], dtype=np.int64)
        sequences = (batches[:, None] * size + np.arange(size)).reshape(-1)
        return sequences, np.repeat(self.steps, size), np.repeat(numbered, size)

    def _windows(self, domain: int) -> Iterator[tuple[int, WindowStream, np.ndarray, np.ndarray]]:
        """Yield, for each round that reads `domain`, its number, its stream, the windows that were read and their steps."""
        sequences, steps, rounds = self._sequences
        mine = self.order.assignment[sequences] == domain
        for number in np.unique(rounds[mine]).tolist():
            chosen = mine & (rounds == number)
            stream, first = self.order.reading(number, domain)
            yield number, stream, self.order.positions[sequences[chosen]] - first, steps[chosen]

    def readings(self, document: str) -> list[Reading]:
        """Return every reading of `document`, in the order of the steps; none where the run did not read it."""
        located = _located([str(path) for path in next(iter(self.pools.values())).indexes], document)
        found = [
            Reading(int(step), int(epoch), None if number == WHOLE else number, passage, int(tokens))
            for domain, name in enumerate(self.order.domains)
            for row, passage in _passages_in(self.pools[name], located)
            for number, stream, windows, steps in self._windows(domain)
            for step, epoch, tokens in _shown(stream, _row_of(self.pools[name], stream.pool, row), windows, steps)
        ]
        return sorted(found, key=lambda one: (one.step, one.passage, one.epoch))

    def documents(self) -> Iterator[tuple[str, pa.RecordBatch]]:
        """Yield, by domain, the passages of the run: ``id, tokens, tokens_read, first_step, last_step``, -1 where it was not read."""
        for domain, name in enumerate(self.order.domains):
            pool = self.pools[name]
            read = np.zeros(len(pool), dtype=np.int64)
            first, last = np.full(len(pool), np.iinfo(np.int64).max), np.full(len(pool), -1)
            for _, stream, windows, steps in self._windows(domain):
                rows = _rows_of(pool, stream.pool)
                for passages, tokens, when in _pieces(stream, windows, steps):
                    np.add.at(read, rows[passages], tokens)
                    np.minimum.at(first, rows[passages], when)
                    np.maximum.at(last, rows[passages], when)
            first[last < 0] = -1
            for passages, names in pool.name_batches():
                columns = [names.column("id"), pool.length[passages].astype(np.int64) + 1, read[passages], first[passages], last[passages]]
                yield name, pa.record_batch(dict(zip(COLUMNS, map(pa.array, columns), strict=True)))


COLUMNS = ("id", "tokens", "tokens_read", "first_step", "last_step")
_BY_DOCUMENT = """
SELECT domain, id, sum(tokens)::BIGINT AS tokens, sum(tokens_read)::BIGINT AS tokens_read,
    round(sum(tokens_read) / sum(tokens), 4) AS times_read,
    min(first_step) FILTER (last_step >= 0) AS first_step, max(last_step) AS last_step
FROM passages GROUP BY domain, id HAVING max(last_step) >= 0
"""


def document_table(replay: Replay, path: Path) -> list[dict[str, Json]]:
    """Write the documents that a run has seen to the Parquet file `path`; return, by domain, how many and how many tokens of them.

    Columns: `domain`, `id`, `tokens` (of its selected passages, their ends of text included), `tokens_read`, `times_read` (their
    ratio), `first_step`, `last_step`.
    """
    schema = pa.schema([("domain", pa.string()), ("id", pa.string()), *((name, pa.int64()) for name in COLUMNS[1:])])
    batches = (
        pa.record_batch([pa.array([domain] * batch.num_rows, pa.string()), *batch.columns], schema=schema)
        for domain, batch in replay.documents()
    )
    with duckdb.connect() as connection:
        connection.register("passages", pa.RecordBatchReader.from_batches(schema, batches))
        connection.sql(f"{_BY_DOCUMENT} ORDER BY domain, id").write_parquet(str(path), compression="zstd")
    query = """SELECT domain, count(*) AS documents, sum(tokens)::BIGINT AS tokens, sum(tokens_read)::BIGINT AS tokens_read,
        round(sum(tokens_read) / sum(tokens), 3) AS times_read FROM read_parquet($path) GROUP BY domain ORDER BY domain"""
    with duckdb.connect() as connection:
        return connection.sql(query, params={"path": str(path)}).to_arrow_table().to_pylist()


def _located(indexes: list[str], document: str) -> list[tuple[int, int, int]]:
    """Return the shard, the row of its index and the number of each passage of `document`."""
    query = """SELECT file_index::BIGINT, file_row_number::BIGINT, passage::BIGINT
        FROM read_parquet($indexes, file_row_number = true) WHERE id = $document ORDER BY ALL"""
    with duckdb.connect() as connection:
        return connection.execute(query, {"indexes": indexes, "document": document}).fetchall()


def _passages_in(pool: PassagePool, located: list[tuple[int, int, int]]) -> Iterator[tuple[int, int]]:
    """Yield the rows of `pool` that are among `located`, with the numbers of the passages."""
    for shard, row, passage in located:
        yield from ((int(place), passage) for place in np.flatnonzero((pool.shard == shard) & (pool.row == row)))


def _rows_of(whole: PassagePool, part: PassagePool) -> np.ndarray:
    """Return the row of `whole` that each row of `part`, a subset of it, is; both are in shard order."""
    if len(part) == len(whole):
        return np.arange(len(whole))
    keys = [pool.shard.astype(np.int64) << 40 | pool.row.astype(np.int64) for pool in (whole, part)]
    order = np.argsort(keys[0], kind="stable")
    return order[np.searchsorted(keys[0][order], keys[1])]


def _row_of(whole: PassagePool, part: PassagePool, row: int) -> int | None:
    """Return the row of `part` that row `row` of `whole` is, or None where `part` does not hold it."""
    if len(part) == len(whole):
        return row
    found = np.flatnonzero((part.shard == whole.shard[row]) & (part.row == whole.row[row]))
    return int(found[0]) if len(found) else None


def _shown(stream: WindowStream, row: int | None, windows: np.ndarray, steps: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """Yield the step, the epoch and the predicted tokens of each of `windows` that shows passage `row`."""
    if row is None or not len(windows):
        return
    length, per_epoch = stream.sequence_length, stream.windows_per_epoch
    for epoch in range(int(windows.min()) // per_epoch, int(windows.max()) // per_epoch + 1):
        order = stream.order(epoch)
        place = int(np.flatnonzero(order == row)[0])
        begin = int(stream.pool.length[order[:place]].sum(dtype=np.int64)) + place
        end = begin + int(stream.pool.length[row]) + 1
        low, high = max(0, -(-(begin - length) // length)), min(per_epoch - 1, (end - 1) // length)
        for at in np.flatnonzero((windows >= epoch * per_epoch + low) & (windows <= epoch * per_epoch + high)):
            start = (int(windows[at]) - epoch * per_epoch) * length
            yield int(steps[at]), epoch, max(0, min(end, start + length + 1) - max(begin, start + 1))


def _pieces(stream: WindowStream, windows: np.ndarray, steps: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield, for each epoch, the passages that its windows show (one entry a window and passage), predicted tokens, and steps."""
    length = stream.sequence_length
    epochs, inside = np.divmod(windows, stream.windows_per_epoch)
    for epoch in np.unique(epochs).tolist():
        order = stream.order(epoch).astype(np.int64)
        ends = np.cumsum(stream.pool.length[order].astype(np.int64) + 1)
        chosen = epochs == epoch
        starts, when = inside[chosen] * length, steps[chosen]
        first = np.searchsorted(ends, starts, side="right")
        counts = np.searchsorted(ends, starts + length, side="right") - first + 1
        which = np.repeat(np.arange(len(starts)), counts)
        rank = np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts) + first[which]
        begins = ends[rank] - stream.pool.length[order[rank]] - 1
        tokens = np.minimum(ends[rank], starts[which] + length + 1) - np.maximum(begins, starts[which] + 1)
        yield order[rank], np.maximum(tokens, 0), when[which]
