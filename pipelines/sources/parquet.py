"""Parquet files.

`where` picks the partition's rows: row groups whose statistics exclude it are not read, of the others only the `where`
columns are read until one has a matching row. So one month of one domain is cheap to read from a large file that is
sorted by them.

A file that is cut or damaged is quarantined from where it cannot be read on, and the others are read; where that leaves no
document at all, it is an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from pyarrow.fs import LocalFileSystem
from pydantic import Field

from pipelines.documents import Document, Quarantined, batches_of
from pipelines.errors import GristmillError
from pipelines.files import shown_path
from pipelines.sources._rows import (
    DocumentField,
    FileSource,
    Template,
    expand,
    matching_rows,
    present_columns,
    table_documents,
    typed_conditions,
)

BATCH_ROWS = 256
"""Rows held at a time, fewer where they are long."""


DAMAGED = "not a whole Parquet file: damaged from here to its end"


class Parquet(FileSource):
    """Documents are rows; the locator is ``file:row``, rows counted from 1."""

    where: dict[str, Template] = Field(default_factory=dict)
    """Column -> value that a row must have to belong to the partition; placeholders allowed."""
    columns: dict[DocumentField, str | None] = Field(default_factory=dict)
    """Document field -> column; null leaves the field empty. Fields not named here take the column of their own name."""

    def read(self, domain: str, snapshot: str, *, root: Path) -> Iterator[Document | Quarantined]:
        where = {column: expand(value, domain, snapshot) for column, value in self.where.items()}
        damaged: list[str] = []
        read = 0
        for path in self.files(domain, snapshot, root=root):
            name = shown_path(path, root)
            try:
                for found in self._documents(path, name, where, self.filled(domain, snapshot)):
                    read += isinstance(found, Document)
                    yield found
            except (pa.ArrowException, OSError) as error:
                damaged.append(f"{name} is not a whole Parquet file ({error})")
                yield Quarantined(name, DAMAGED, str(error))
        if damaged and not read:
            raise GristmillError(f"{'; '.join(damaged)}; copy or download it again, or take it out of `paths`")

    def _documents(self, path: Path, name: str, where: dict[str, str], values: dict[str, str]) -> Iterator[Document | Quarantined]:
        with pq.ParquetFile(path) as file:
            columns = present_columns(self.columns, file.schema_arrow.names, name)
            conditions = typed_conditions(where, file.schema_arrow, name)
            starts = np.cumsum([0, *(file.metadata.row_group(g).num_rows for g in range(file.num_row_groups))])
            for group in _possible_groups(path, conditions):
                mask = matching_rows(file.read_row_group(group, columns=list(conditions)), conditions) if conditions else None
                if mask is not None and not mask.any():
                    continue
                row = 0
                for batch in batches_of(file, sorted(set(columns.values())), groups=[group], rows=BATCH_ROWS):
                    rows = np.ones(len(batch), dtype=bool) if mask is None else mask[row : row + len(batch)]
                    yield from table_documents(batch, columns, rows, name=name, first=int(starts[group]) + row + 1, values=values)
                    row += len(batch)


def _possible_groups(path: Path, conditions: dict[str, pa.Scalar]) -> list[int]:
    """Return the row groups of `path` whose statistics do not exclude `conditions`."""
    fragment = ds.ParquetFileFormat().make_fragment(str(path), filesystem=LocalFileSystem())
    if conditions:
        fragment = fragment.subset(filter=reduce(lambda a, b: a & b, (ds.field(c) == value for c, value in conditions.items())))
    return [group.id for group in fragment.row_groups]
