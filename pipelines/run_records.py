"""What a run writes down along the way, a JSON object a line: metrics, validation losses and samples, by step."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TextIO

from pipelines.manifests import Json

METRICS, VALIDATION, SAMPLES, EVENTS = "metrics.jsonl", "validation.jsonl", "samples.jsonl", "events.jsonl"
RECORDS = (METRICS, VALIDATION, SAMPLES)
"""What grows along the run."""
SECONDS_UNSHOWN = 2.0


class Lines:
    """One file of records."""

    def __init__(self, path: Path, *, writes: bool) -> None:
        self._path, self._writes = path, writes
        self._file: TextIO | None = None

    def append(self, record: Mapping[str, Json]) -> None:
        """Add a record."""
        if not self._writes:
            return
        if self._file is None:
            self._file = self._path.open("a", encoding="utf-8")
        self._file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def extend(self, records: Iterable[Mapping[str, Json]]) -> None:
        """Add records."""
        for record in records:
            self.append(record)

    def flush(self) -> None:
        """Hand everything to the file system."""
        if self._file:
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file:
            self._file.close()
            self._file = None


class Records:
    """The files of a run's records."""

    def __init__(self, out: Path, *, writes: bool = True) -> None:
        self.metrics, self.validation, self.samples = (Lines(out / name, writes=writes) for name in RECORDS)
        self._shown = time.monotonic()

    def __enter__(self) -> Records:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files; the next record opens its file again."""
        for lines in self._all:
            lines.close()

    @property
    def _all(self) -> tuple[Lines, ...]:
        return self.metrics, self.validation, self.samples

    def flush(self) -> None:
        """Hand everything to the file system."""
        for lines in self._all:
            lines.flush()

    def show(self) -> None:
        """Hand everything to the file system now and then, for those who follow the run; `flush` tells where the disk is full."""
        if time.monotonic() - self._shown < SECONDS_UNSHOWN:
            return
        self._shown = time.monotonic()
        with contextlib.suppress(OSError):
            self.flush()


def read_records(path: Path) -> list[dict[str, Json]]:
    """Return the records of a file; none where there is none."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
