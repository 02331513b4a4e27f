"""Records that are read while somebody else writes them: one JSON object a line."""

from __future__ import annotations

import json
import os
from pathlib import Path

from pipelines.manifests import Json


class GrowingRecords:
    """A file of records that somebody appends to, or puts back as it was at an earlier step."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inode = 0
        self.position = 0
        """Where the unread begins."""

    def unread(self) -> tuple[list[dict[str, Json]], int]:
        """Return the whole records that were not read yet, all of a file that was replaced; and where they end."""
        try:
            file = self._path.open("rb")
        except FileNotFoundError:
            return [], 0
        with file:
            status = os.fstat(file.fileno())
            if status.st_ino != self._inode or status.st_size < self.position:
                self._inode, self.position = status.st_ino, 0
            file.seek(self.position)
            content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        return [json.loads(line) for line in whole.splitlines()], self.position + len(whole)
