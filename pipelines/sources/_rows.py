"""What the sources share: placeholders, globs, and rows of named values turned into documents.

A row's values become a document's fields through `columns` (document field -> column); a field that `columns` does not
name is taken from the column of its own name, where there is one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import date, datetime
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import AfterValidator, Field

from pipelines.documents import Document, Quarantined
from pipelines.errors import GristmillError, suggestion
from pipelines.files import matching_files
from pipelines.sources import Source

DocumentField = Literal["id", "text", "source", "license", "date", "url", "lang", "title", "metadata"]
"""The fields that a column can fill; the domain is the partition's."""

ConstantField = Literal["source", "license", "date", "url", "lang", "title"]
"""The fields that can have one value for all documents of a source."""

FIELDS: tuple[DocumentField, ...] = ("id", "text", "source", "license", "date", "url", "lang", "title", "metadata")

EXCERPT_CHARACTERS = 200


def expand(template: str, domain: str, snapshot: str) -> str:
    """Replace ``{domain}``, ``{snapshot}`` and ``{snapshot:%Y-%m}`` in `template`; `snapshot` is ``YYYY-MM-DD``.

    Raises:
        GristmillError: another placeholder, or a lone brace.
    """
    month = date.fromisoformat(snapshot)
    try:
        return template.format(domain=domain, snapshot=month)
    except (KeyError, IndexError, AttributeError, ValueError, TypeError) as error:
        raise GristmillError(
            f"{template!r}: the placeholders are {{domain}}, {{snapshot}} and {{snapshot:%Y-%m}} ({error}); write {{{{ and }}}} for braces"
        ) from None


def _checked(template: str) -> str:
    expand(template, "domain", "2026-01-01")
    return template


Template = Annotated[str, AfterValidator(_checked)]
"""A string with placeholders, checked when the settings are built."""


class FileSource(Source):
    """Base of the sources that read files."""

    paths: tuple[Template, ...] = Field(min_length=1)
    """Files; globs (``*``, ``?``, ``**``) and placeholders allowed. Relative to the project's directory, absolute, or URLs
    such as ``s3://bucket/{domain}/*.jsonl.zst``, of which a local copy is kept."""
    values: dict[ConstantField, Template] = Field(default_factory=dict)
    """Values of fields that the input leaves empty, such as the licence of a whole dump. Placeholders allowed."""

    def files(self, domain: str, snapshot: str, *, root: Path) -> list[Path]:
        found = {file for path in self.paths for file in matching_files(expand(path, domain, snapshot), root)}
        return sorted(found, key=lambda file: file.as_posix())

    def filled(self, domain: str, snapshot: str) -> dict[str, str]:
        """Return `values` for one partition."""
        return {field: expand(value, domain, snapshot) for field, value in self.values.items()}


@dataclass(frozen=True)
class Undecodable:
    """A string value whose bytes are not UTF-8."""

    excerpt: str


def excerpt(value: object) -> str:
    """Return the first characters of `value`; bytes that are not UTF-8 are escaped."""
    if isinstance(value, bytes):
        return value[: 4 * EXCERPT_CHARACTERS].decode("utf-8", "backslashreplace")[:EXCERPT_CHARACTERS]
    return "" if value is None else str(value)[:EXCERPT_CHARACTERS]


def as_text(value: object) -> str | None:
    """Return a column's value as the text of a field: dates as ISO 8601, lists and objects as JSON, an empty string as None."""
    if isinstance(value, str):
        return value or None
    if value is None:
        return None
    if isinstance(value, datetime | date):
        return value.isoformat()
    if isinstance(value, bool | dict | list):
        return json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)
    return str(value)


def document(row: Mapping[str, object], locator: str, values: Mapping[str, str]) -> Document | Quarantined:
    """Make a document of `row` (document field -> value); `values` fills fields that are empty."""
    for field, value in row.items():
        if isinstance(value, Undecodable):
            return Quarantined(locator, f"{field} is not UTF-8", value.excerpt)
    text = row.get("text")
    if text is None:
        return Quarantined(locator, "no text", excerpt(row.get("id") or row.get("title")))
    if not isinstance(text, str):
        return Quarantined(locator, f"text is {type(text).__name__}, not a string", excerpt(text))
    fields = {field: as_text(value) for field, value in row.items() if field != "text"}
    return Document(text=text, locator=locator, **{**fields, **{f: v for f, v in values.items() if not fields.get(f)}})


def present_columns(columns: Mapping[DocumentField, str | None], known: Iterable[str], name: str) -> dict[str, str]:
    """Return document field -> column for a table with columns `known`, named `name` in errors.

    Raises:
        GristmillError: `columns` names a column that is not there, or nothing gives the text.
    """
    known = set(known)
    found = {field: columns.get(field, field) for field in FIELDS}
    for field, column in columns.items():
        if column is not None and column not in known:
            raise GristmillError(f"{name} has no column {column!r} for field {field!r}{suggestion(column, known)}")
    present = {field: column for field, column in found.items() if column in known}
    if "text" not in present:
        raise GristmillError(
            f"{name} has no column 'text'; say which holds it, as in columns: {{text: NAME}}. known: {', '.join(sorted(known))}"
        )
    return present


def check_conditions(where: Mapping[str, str], known: Iterable[str], name: str) -> None:
    """Raise a GristmillError if `where` names a column that is not among `known`."""
    for column in where:
        if column not in known:
            raise GristmillError(f"{name} has no column {column!r} to compare in `where`{suggestion(column, known)}")


def typed_conditions(where: Mapping[str, str], schema: pa.Schema, name: str) -> dict[str, pa.Scalar]:
    """Return the values of `where` (column == value) in the types of `schema`.

    Raises:
        GristmillError: a column is not there, or its type cannot hold the value.
    """
    check_conditions(where, schema.names, name)
    conditions: dict[str, pa.Scalar] = {}
    for column, value in where.items():
        column_type = schema.field(column).type
        value_type = column_type.value_type if pa.types.is_dictionary(column_type) else column_type
        try:
            conditions[column] = pa.scalar(value).cast(value_type)
        except pa.ArrowException as error:
            raise GristmillError(f"{name}: where {column} == {value!r}: the column holds {value_type} ({error})") from None
    return conditions


def matching_rows(table: pa.Table | pa.RecordBatch, conditions: Mapping[str, pa.Scalar]) -> np.ndarray:
    """Return a boolean mask of shape ``(rows,)``: where every column equals its value; null equals nothing."""
    mask = np.ones(table.num_rows, dtype=bool)
    for column, value in conditions.items():
        values = table.column(column)
        values = pc.cast(values, value.type) if pa.types.is_dictionary(values.type) else values
        mask &= pc.fill_null(pc.equal(values, value), False).to_numpy(zero_copy_only=False)
    return mask


def table_documents(
    table: pa.Table | pa.RecordBatch, columns: Mapping[str, str], rows: np.ndarray, *, name: str, first: int, values: Mapping[str, str]
) -> Iterator[Document | Quarantined]:
    """Yield the documents of the rows where mask `rows` is true; a locator is ``name:row``, rows counted from `first`."""
    (numbers,) = np.nonzero(rows)
    taken = table.select(sorted(set(columns.values()))).take(pa.array(numbers, pa.int64()))
    cells = {field: _cells(taken.column(column)) for field, column in columns.items()}
    for position, number in enumerate(numbers.tolist()):
        yield document({field: column[position] for field, column in cells.items()}, f"{name}:{first + number}", values)


def _cells(column: pa.Array | pa.ChunkedArray) -> list[object]:
    """Return the values of `column`; Arrow does not check strings when it reads them, so some may not be UTF-8."""
    try:
        cells = column.to_pylist()
    except UnicodeDecodeError:
        return [_cell(scalar) for scalar in column]
    return [_decoded(cell) if isinstance(cell, bytes) else cell for cell in cells]


def _cell(scalar: pa.Scalar) -> object:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return Undecodable(excerpt(bytes(error.object)))


def _decoded(value: bytes) -> str | Undecodable:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return Undecodable(excerpt(value))
