"""Labelled sets: texts with a class each, from a Parquet file, and which of them are for training and which for testing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from pipelines.errors import GristmillError, UnknownName
from pipelines.files import file_hashes, matching_files
from pipelines.plugins import Settings

TRAIN, TEST = ("train", "validation"), "test"
TEST_SHARE = 0.3
"""Of a set without a split column."""


class LabelledSet(Settings):
    """A Parquet file with a text and a class in each row."""

    name: str = Field(min_length=1)
    """What tables call it."""
    path: str
    """The file; a relative path starts at the project and cannot leave it."""
    text: str = "text"
    """Column of the texts."""
    label: str = "label"
    """Column of the classes: strings, integers or booleans."""
    split: str | None = None
    """Column that says `train`, `validation` (trained on too: each seed draws its own validation part) or `test`; where absent, three
    tenths of each class are drawn for testing."""


@dataclass(frozen=True)
class LabelledTexts:
    """What is read of a labelled set: N texts, of which some are trained on and some tested on."""

    name: str
    texts: tuple[str, ...]
    labels_N: np.ndarray
    """int64: the place in `classes`."""
    classes: tuple[str, ...]
    """Sorted."""
    rows_N: np.ndarray
    """int64: the row of the file, from 0."""
    train: np.ndarray
    """int64: which of the N are for training, ascending."""
    test: np.ndarray
    """int64: which are for testing, ascending."""

    @property
    def num_shared(self) -> int:
        """Test texts that stand among the training texts too, letter for letter."""
        seen = {self.texts[number] for number in self.train}
        return sum(self.texts[number] in seen for number in self.test)


def labelled_hashes(sets: Sequence[LabelledSet], root: Path) -> dict[str, str]:
    """Return the SHA-256 of the files of `sets` by their path.

    Raises:
        GristmillError: a file does not exist, or leaves `root`; or two sets have one name.
    """
    names = [one.name for one in sets]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise GristmillError(f"two labelled sets are called {twice!r}; give each its own name")
    return file_hashes([labelled_file(one, root) for one in sets], root)


def labelled_file(settings: LabelledSet, root: Path) -> Path:
    """Return the file of a labelled set.

    Raises:
        GristmillError: there is none, there are several, or its path leaves `root`.
    """
    found = matching_files(settings.path, root)
    if len(found) > 1:
        raise GristmillError(f"labelled set {settings.name}: {settings.path!r} names {len(found)} files; a set is one file, join them")
    if not Path(settings.path).is_absolute() and not found[0].resolve().is_relative_to(root.resolve()):
        raise GristmillError(f"labelled set {settings.name}: {settings.path!r} is a link out of the project; give its absolute path")
    return found[0]


def read_labelled(settings: LabelledSet, root: Path, *, max_train: int, max_test: int, seed: int) -> LabelledTexts:
    """Read a labelled set; where it has more texts than are asked for, a part that is stratified by class is drawn.

    Raises:
        GristmillError: a column is missing, a text or a label is null, a split is unknown, the training part has one class only, or
            the test part a class that was not trained on.
    """
    table = _read(settings, labelled_file(settings, root))
    names = np.asarray(table["label"].to_pylist(), dtype=str)
    generator = np.random.Generator(np.random.Philox(key=seed))
    tests = _tests(settings, table, names, generator)
    classes, labels = np.unique(names, return_inverse=True)
    _check_classes(settings, names[~tests], names[tests])
    train = _part(labels, np.flatnonzero(~tests), max_train, generator)
    test = _part(labels, np.flatnonzero(tests), max_test, generator)
    rows = np.sort(np.concatenate([train, test]))
    return LabelledTexts(
        name=settings.name,
        texts=tuple(table["text"].take(pa.array(rows)).to_pylist()),
        labels_N=labels[rows].astype(np.int64),
        classes=tuple(map(str, classes)),
        rows_N=rows,
        train=np.searchsorted(rows, train),
        test=np.searchsorted(rows, test),
    )


def drawn(labels_N: np.ndarray, size: int, generator: np.random.Generator) -> np.ndarray:
    """Return `size` places to lay aside, ascending, so that each class gives its share, rounded by largest remainders.

    A class gives one at least and never its last: where that contradicts `size`, there are fewer places.
    """
    counts = np.bincount(labels_N)
    shares, room = size * counts / max(1, len(labels_N)), np.maximum(counts - 1, 0)
    quota = np.clip(np.floor(shares).astype(int), np.minimum(room, 1), room)
    while quota.sum() < min(size, room.sum()):
        quota[np.argmax(np.where(quota < room, shares - quota, -np.inf))] += 1
    while quota.sum() > size:
        quota[np.argmax(quota - shares)] -= 1
    places = [generator.permutation(np.flatnonzero(labels_N == number))[:count] for number, count in enumerate(quota)]
    return np.sort(np.concatenate(places)) if places else np.empty(0, dtype=np.int64)


def _part(labels: np.ndarray, part: np.ndarray, size: int, generator: np.random.Generator) -> np.ndarray:
    """Return `part`, or `size` of it where it is larger; each class keeps one at least."""
    return part if len(part) <= size else np.delete(part, drawn(labels[part], len(part) - size, generator))


def _read(settings: LabelledSet, path: Path) -> pa.Table:
    """Return the columns ``text``, ``label`` and, where there is one, ``split``, all of them strings."""
    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise GristmillError(f"labelled set {settings.name}: {settings.path} is no Parquet file ({error}); convert it to one") from error
    wanted = {"text": settings.text, "label": settings.label, **({"split": settings.split} if settings.split else {})}
    with file:
        for column in wanted.values():
            if column not in file.schema_arrow.names:
                raise UnknownName(f"column of labelled set {settings.name}", column, file.schema_arrow.names)
        table = file.read(columns=list(dict.fromkeys(wanted.values())))
    columns = {}
    for name, column in wanted.items():
        kind = table[column].type
        if not _is_name(kind):
            raise GristmillError(
                f"labelled set {settings.name}: column {column!r} holds {kind}, and a {name} is a string, an integer or a boolean; "
                "write it as a string"
            )
        columns[name] = table[column].cast(pa.string())
        if nulls := columns[name].null_count:
            raise GristmillError(f"labelled set {settings.name}: {nulls} rows have no {name} (column {column!r}); take them out")
    return pa.table(columns)


def _is_name(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    strings = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    return strings or pa.types.is_integer(kind) or pa.types.is_boolean(kind)


def _tests(settings: LabelledSet, table: pa.Table, names: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Return which rows are for testing, bool."""
    if settings.split is None:
        tests = np.zeros(len(names), dtype=bool)
        tests[drawn(np.unique(names, return_inverse=True)[1], round(TEST_SHARE * len(names)), generator)] = True
        return tests
    splits = np.asarray(table["split"].to_pylist(), dtype=str)
    known = (*TRAIN, TEST)
    if unknown := sorted({*splits.tolist()} - {*known}):
        raise GristmillError(f"labelled set {settings.name}: split {unknown[0]!r} is none of {', '.join(known)}; rename it")
    return splits == TEST


def _check_classes(settings: LabelledSet, trained: np.ndarray, tested: np.ndarray) -> None:
    """Check that there is something to tell apart, and that nothing is asked for that was not shown."""
    classes = set(trained.tolist())
    if len(classes) < 2:
        shown = f"the one class {classes.pop()!r}" if classes else "no row"
        raise GristmillError(f"labelled set {settings.name}: the training part has {shown}; a classifier needs two classes or more")
    if not len(tested):
        raise GristmillError(f"labelled set {settings.name}: no row is for testing; mark some as `test`, or leave `split` out")
    if unknown := sorted(set(tested.tolist()) - classes):
        raise GristmillError(
            f"labelled set {settings.name}: the test part has the class {unknown[0]!r}, which the training part has not; add rows of it to "
            "the training part, or take it out"
        )
