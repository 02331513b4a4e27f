"""Datasets of the Hugging Face hub, local dataset folders, and folders written by ``Dataset.save_to_disk``.

Read with the datasets package in Arrow batches, streamed or not. Code that comes with a dataset is never run
(`trust_remote_code` is not passed).
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
from pydantic import Field

from pipelines.documents import Document, Quarantined, bounded
from pipelines.errors import GristmillError
from pipelines.sources import Source
from pipelines.sources._rows import (
    ConstantField,
    DocumentField,
    Template,
    check_conditions,
    expand,
    matching_rows,
    present_columns,
    table_documents,
    typed_conditions,
)

if TYPE_CHECKING:
    import datasets

BATCH_ROWS = 256
"""Rows held at a time, fewer where they are long."""

COMMIT = re.compile(r"[0-9a-f]{40}")


class Hub(Source):
    """The locator is ``path/name/split:row``, rows counted from 1."""

    path: Template
    """``owner/name`` on the hub, or a folder: relative to the project's directory, or absolute. Placeholders allowed."""
    name: Template | None = None
    """The dataset's configuration."""
    split: Template = "train"
    """The dataset's split."""
    git_revision: Template | None = None
    """Branch, tag or commit on the hub (the `revision` of `load_dataset`); a full commit hash needs no look-up."""
    streaming: bool = False
    """Read without a copy of the whole split in the cache of the datasets package."""
    data_dir: Template | None = None
    """Folder of the dataset whose files are read."""
    data_files: tuple[Template, ...] = ()
    """Files of the dataset to read; globs allowed."""
    where: dict[str, Template] = Field(default_factory=dict)
    """Column -> value that a row must have to belong to the partition; placeholders allowed."""
    columns: dict[DocumentField, str | None] = Field(default_factory=dict)
    """Document field -> column; null leaves the field empty. Fields not named here take the column of their own name."""
    values: dict[ConstantField, Template] = Field(default_factory=dict)
    """Values of fields that the dataset leaves empty, such as its licence. Placeholders allowed."""

    def read(self, domain: str, snapshot: str, *, root: Path) -> Iterator[Document | Quarantined]:
        setting = self._expanded(domain, snapshot)
        try:
            yield from self._documents(setting, root, self.revision(domain, snapshot, root=root))
        except GristmillError:
            raise
        except _errors() as error:
            raise _unreadable(setting, error) from error

    def _documents(self, setting: Hub, root: Path, revision: str) -> Iterator[Document | Quarantined]:
        name = "/".join(part for part in (setting.path, setting.name, setting.split) if part)
        row = 1
        with ExitStack() as stack:
            dataset = _saved(setting, root) or _loaded(setting, root, revision, stack)
            if dataset.column_names:  # unknown for some streams until rows come
                columns = present_columns(self.columns, dataset.column_names, name)
                check_conditions(setting.where, dataset.column_names, name)
                dataset = dataset.select_columns(sorted({*columns.values(), *setting.where}))
            for table in dataset.with_format("arrow").iter(batch_size=BATCH_ROWS):
                columns = present_columns(self.columns, table.column_names, name)
                conditions = typed_conditions(setting.where, table.schema, name)
                for batch in (piece for whole in table.to_batches() for piece in bounded(whole)):
                    rows = matching_rows(batch, conditions)
                    yield from table_documents(batch, columns, rows, name=name, first=row, values=setting.values)
                    row += batch.num_rows

    def files(self, domain: str, snapshot: str, *, root: Path) -> list[Path]:
        setting = self._expanded(domain, snapshot)
        folder = _folder(setting, root)
        if folder is None:
            return []
        found = sorted((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.as_posix())
        if not found:
            raise GristmillError(f"dataset folder {setting.path!r} holds no files; put the dataset there or correct `path`")
        return found

    def revision(self, domain: str, snapshot: str, *, root: Path) -> str:
        """Return the commit that `git_revision` stands at; empty for a folder.

        Raises:
            GristmillError: the hub cannot be asked.
        """
        setting = self._expanded(domain, snapshot)
        if _folder(setting, root):
            return ""
        if setting.git_revision and COMMIT.fullmatch(setting.git_revision):
            return setting.git_revision
        import huggingface_hub

        try:
            return huggingface_hub.HfApi().dataset_info(setting.path, revision=setting.git_revision).sha
        except _errors() as error:
            raise _unreadable(setting, error) from error

    def _expanded(self, domain: str, snapshot: str) -> Hub:
        """Return a copy without placeholders."""
        names = ("path", "name", "split", "git_revision", "data_dir")
        values: dict[str, object] = {n: expand(v, domain, snapshot) for n in names if (v := getattr(self, n)) is not None}
        values["data_files"] = tuple(expand(file, domain, snapshot) for file in self.data_files)
        values["values"] = {field: expand(value, domain, snapshot) for field, value in self.values.items()}
        values["where"] = {column: expand(value, domain, snapshot) for column, value in self.where.items()}
        return self.model_copy(update=values)


def _folder(setting: Hub, root: Path) -> Path | None:
    """Return the local folder that `setting` names, or None for a dataset of the hub."""
    folder = root / setting.path
    if folder.is_dir():
        return folder
    if Path(setting.path).is_absolute() or setting.path.startswith(".") or setting.path.count("/") > 1:
        raise GristmillError(f"there is no dataset folder {setting.path!r} (relative paths start at {root}); correct `path`")
    return None


def _saved(setting: Hub, root: Path) -> datasets.Dataset | None:
    """Return the dataset that ``save_to_disk`` wrote, or None where the folder was not written by it."""
    import datasets

    folder = _folder(setting, root)
    if folder is None or not any((folder / mark).exists() for mark in ("dataset_dict.json", "state.json")):
        return None
    found = datasets.load_from_disk(str(folder))
    if isinstance(found, datasets.Dataset):
        return found
    if setting.split not in found:
        raise GristmillError(f"dataset {setting.path!r} has no split {setting.split!r}; it has: {', '.join(sorted(found))}")
    return found[setting.split]


def _loaded(setting: Hub, root: Path, revision: str, stack: ExitStack) -> datasets.Dataset | datasets.IterableDataset:
    """Return `load_dataset`'s answer; what is cached of a folder goes to a temporary directory, of the hub to the usual place."""
    import datasets

    folder = _folder(setting, root)
    cache = stack.enter_context(tempfile.TemporaryDirectory(prefix="gristmill-")) if folder else None
    return datasets.load_dataset(
        str(folder or setting.path),
        setting.name,
        split=setting.split,
        revision=revision or None,
        streaming=setting.streaming,
        data_dir=setting.data_dir,
        data_files=list(setting.data_files) or None,
        cache_dir=cache,
    )


def _errors() -> tuple[type[Exception], ...]:
    """Return what the two packages raise for a dataset that is not there, cannot be reached or cannot be read."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError

    # the first base is the HTTP client's own error (requests or httpx, by version), which connection errors derive from
    return (OSError, ValueError, pa.ArrowException, DatasetsError, *HfHubHTTPError.__bases__)


def _unreadable(setting: Hub, error: Exception) -> GristmillError:
    return GristmillError(
        f"dataset {setting.path!r} (name {setting.name!r}, split {setting.split!r}, revision {setting.git_revision!r}) cannot be read: "
        f"{type(error).__name__}: {error}; check these, that the folder exists or the network reaches the hub, "
        "and HF_TOKEN for a private dataset"
    )
