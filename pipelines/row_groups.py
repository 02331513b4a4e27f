"""Row groups of a Parquet file as parallel work inside a step: results in file order, the same whatever the number of processes.

A step that runs alone uses all cores over the row groups of its partition; one that runs beside others, in a worker of the
pool, maps them itself. Little is in flight at a time, so that memory does not grow with the file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.documents import batches_of
from pipelines.engine import Engine, map_shards

Result = TypeVar("Result")

PARALLEL_BYTES = 32 * 1024 * 1024
"""A file with less text is read by one process: starting others would take longer."""
AHEAD = 2
"""Row groups per process that are worked on before the results of earlier ones are taken."""


@dataclass(frozen=True)
class RowGroup:
    """One row group of a Parquet file."""

    path: Path
    number: int

    def batches(self, columns: Iterable[str] | None = None) -> Iterator[pa.RecordBatch]:
        """Yield its record batches, of bounded size."""
        with pq.ParquetFile(self.path) as file:
            yield from batches_of(file, columns, groups=[self.number])


def map_row_groups(function: Callable[[RowGroup], Result], path: Path, engine: Engine | None = None) -> Iterator[Result]:
    """Yield ``function(group)`` for every row group of `path`, in order; `function` has to be picklable.

    Raises:
        Exception: what `function` raised for the first group that failed.
        RuntimeError: a worker process was killed.
    """
    metadata = pq.read_metadata(path)
    groups = [RowGroup(path, number) for number in range(metadata.num_row_groups)]
    size = sum(metadata.row_group(number).total_byte_size for number in range(metadata.num_row_groups))
    engine = engine or Engine()
    if size < PARALLEL_BYTES:
        engine = Engine(kind="serial")
    for mapped in map_shards(function, groups, engine, ahead=AHEAD * engine.num_workers):
        if mapped.error:
            raise mapped.error
        yield mapped.result
