"""Refusals: which partitions had a last attempt that failed its audit, and what they stand at meanwhile.

    <root>/refused/<asset>/<partition>.json     written when an attempt is rejected, removed when one is published or found

The pointer of such a partition still names the artifact of before. Who reads on asks here first: what it builds would be of older
content than what was asked for, or of less.
"""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import quote

from pipelines.errors import GristmillError
from pipelines.manifests import Frozen


class RefusedInput(GristmillError):
    """What is asked for reads an artifact whose successor failed its audit."""


class Refusal(Frozen):
    """The last attempt at a partition, which failed its audit."""

    asset: str
    partition: str | None
    fingerprint: str
    """Of the attempt; its files lie under ``rejected/``."""
    standing: str | None
    """Fingerprint of the artifact that the partition still stands at; None where it never had one."""
    failed: tuple[str, ...]
    """``check: finding`` of every blocking audit that failed."""

    @property
    def label(self) -> str:
        """``asset[partition]`` or ``asset``."""
        return f"{self.asset}[{self.partition}]" if self.partition else self.asset

    def remedy(self) -> str:
        """Return what is wrong and what to do, as the end of a sentence."""
        partition = f" '{self.partition}'" if self.partition else ""
        stands = "; to go on with the artifact of before" if self.standing else "; to go on without it"
        return (
            f"the last attempt at {self.label} failed its audit ({'; '.join(self.failed)}). Mend or take back what changed and "
            f"materialize {self.label} again{stands}: gristmill refusals --dismiss {self.asset}{partition}"
        )


def record(root: Path, refused: Refusal) -> None:
    """Remember that the last attempt at a partition was refused."""
    path = _path(root, refused.asset, refused.partition)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(f".{os.getpid()}.tmp")
    beside.write_text(refused.model_dump_json(), encoding="utf-8")
    beside.rename(path)


def clear(root: Path, asset: str, partition: str | None) -> bool:
    """Forget the refusal of a partition; return whether there was one."""
    path = _path(root, asset, partition)
    there = path.exists()
    path.unlink(missing_ok=True)
    return there


def refusals(root: Path) -> tuple[Refusal, ...]:
    """Return the partitions whose last attempt failed its audit, by asset and partition."""
    found = []
    for path in sorted((root / "refused").glob("*/*.json")):
        try:
            found.append(Refusal.model_validate_json(path.read_bytes()))
        except FileNotFoundError:  # published meanwhile
            continue
    return tuple(found)


def _path(root: Path, asset: str, partition: str | None) -> Path:
    return root / "refused" / asset / f"{quote(partition, safe='') if partition else '_'}.json"
