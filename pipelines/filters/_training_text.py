"""What fitted filters learn from: training documents of domains, and files of the user's, bounded, in halves that never meet.

A document is scored by a model that has not seen it: documents fall into folds by a hash of their text, and the model of a
fold is fitted on the others. Otherwise a document of the sample would be scored by what it taught itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa

from pipelines.documents import read_batches, stable_fraction
from pipelines.errors import EmptyInput, GristmillError
from pipelines.files import matching_files
from pipelines.filters import Sample

TEXT = "text"
SUFFIXES = (".parquet", ".jsonl")


def fold_of(text: str, folds: int) -> int:
    """Return the fold that `text` falls into, by its content alone."""
    return int(stable_fraction("fold", text) * folds)


def named_files(patterns: Sequence[str], root: Path) -> list[Path]:
    """Return the files that `patterns` name, each once, in order of name.

    Raises:
        GristmillError: a pattern names no file, leaves the project by ``..``, or names something else than Parquet or JSON Lines.
    """
    found = sorted({path for pattern in patterns for path in matching_files(pattern, root)})
    for path in found:
        if path.suffix not in SUFFIXES:
            raise GristmillError(f"{path.name} is not read as training text; give .parquet or .jsonl with a column {TEXT!r}")
    return found


def training_texts(
    sample: Sample, domains: Sequence[str], files: Sequence[Path], *, max_characters: int, what: str
) -> Iterator[tuple[str, str]]:
    """Yield ``(origin, text)`` of the documents of `domains`, then of `files`; of more than `max_characters`, a stable share.

    The share is of documents, by their id (in a file, by its row), so about as many characters come, from every origin
    alike. The text is read twice.

    Raises:
        EmptyInput: there is no text.
    """
    total = sum(len(text) for _, _, text in _documents(sample, domains, files))
    if not total:
        named = ", ".join([*domains, *(path.name for path in files)]) or "no domain and no file"
        raise EmptyInput(f"{what}: no training text in {named}; check `fit_on` and the split in project.yaml, or name another source")
    share = min(1.0, max_characters / total)
    for origin, name, text in _documents(sample, domains, files):
        if share == 1 or stable_fraction("training text", origin, name) < share:
            yield origin, text


def _documents(sample: Sample, domains: Sequence[str], files: Sequence[Path]) -> Iterator[tuple[str, str, str]]:
    """Yield ``(origin, id, text)``; the origin is a domain, or a file's name."""
    for domain in domains:
        yield from ((domain, name, text) for name, text in sample.documents(domain))
    for path in files:
        yield from ((path.name, str(row), text) for row, text in enumerate(_file_texts(path)))


def _file_texts(path: Path) -> Iterator[str]:
    reader = _parquet_texts if path.suffix == ".parquet" else _json_texts
    for row, text in enumerate(reader(path), start=1):
        if not isinstance(text, str):
            raise GristmillError(f"{path.name}: row {row} holds no string under {TEXT!r}; training text needs one in every row")
        yield text


def _parquet_texts(path: Path) -> Iterator[object]:
    try:
        for batch in read_batches(path, (TEXT,)):
            yield from batch[TEXT].to_pylist()
    except (pa.ArrowException, KeyError) as error:
        raise GristmillError(f"{path.name} is not a Parquet file with a column {TEXT!r} ({error})") from error


def _json_texts(path: Path) -> Iterator[object]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line) if line.strip() else {TEXT: ""}
            except ValueError as error:
                raise GristmillError(f"{path.name}: line {number} is not JSON ({error})") from error
            yield row.get(TEXT) if isinstance(row, dict) else None
