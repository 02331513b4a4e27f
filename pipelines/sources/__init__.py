"""Sources: where documents come from.

A source is a frozen settings class. `read` yields every document of one domain and one snapshot, or what could not be
read as `Quarantined`; `files` names the local files it depends on, so that the corpus is addressed by their content.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pipelines.documents import Document, Quarantined
from pipelines.plugins import Plugin


class Source(Plugin):
    """Base of every source."""

    def read(self, domain: str, snapshot: str, *, root: Path) -> Iterator[Document | Quarantined]:
        """Yield the documents of `domain` collected in `snapshot` (a month, ``YYYY-MM-01``), in a stable order.

        Relative paths are taken from `root`, the project's directory. In any string setting, ``{domain}`` and
        ``{snapshot}`` stand for the partition; ``{snapshot:%Y-%m}`` formats the month.
        """
        raise NotImplementedError

    def files(self, domain: str, snapshot: str, *, root: Path) -> list[Path]:
        """Return the local files that `read` opens for this partition, sorted; empty for a remote source.

        Raises:
            GristmillError: a file that the settings name does not exist.
        """
        raise NotImplementedError

    def revision(self, domain: str, snapshot: str, *, root: Path) -> str:
        """Return what identifies a remote source's content (a commit, an ETag); empty where `files` tells all."""
        return ""

    def modules(self) -> tuple[str, ...]:
        """Return the plugin modules of other folders that the settings name: part of the code version of what is read."""
        return ()
