"""Items of a task: columns of a Parquet file, checked, and names for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.errors import EmptyInput, GristmillError, UnknownName


def read_columns(path: Path, names: Sequence[str], *, text: Sequence[str]) -> dict[str, list]:
    """Return columns `names` of the Parquet file `path` as lists.

    Args:
        text: the columns that have to hold a text in every row.

    Raises:
        UnknownName: the file has no such column.
        EmptyInput: it has no row.
        GristmillError: it is no Parquet file, or a row has no text.
    """
    try:
        known = pq.read_schema(path).names
    except pa.ArrowInvalid as error:
        raise GristmillError(f"{path} is not a Parquet file ({error}); give one with a row per item") from error
    for name in names:
        if name not in known:
            raise UnknownName(f"column of {path.name}", name, known)
    table = pq.read_table(path, columns=list(dict.fromkeys(names)))
    if not table.num_rows:
        raise EmptyInput(f"{path} has no item; give a file with a row per item")
    columns = {name: table[name].to_pylist() for name in dict.fromkeys(names)}
    for name in text:
        wrong = next((row for row, value in enumerate(columns[name]) if not isinstance(value, str) or not value), None)
        if wrong is not None:
            raise GristmillError(f"{path.name}: row {wrong} has {columns[name][wrong]!r} in column {name!r}; a text is needed in every row")
    return columns


def numbered(groups: Sequence[str]) -> list[str]:
    """Return the number of each item within its group, from 0, as text: an item keeps it when other groups come or go."""
    seen: Counter[str] = Counter()
    names = []
    for group in groups:
        names.append(str(seen[group]))
        seen[group] += 1
    return names
