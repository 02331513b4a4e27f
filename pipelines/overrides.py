"""Which partitions stand at an artifact that is other than its recipe says, since a run overrode settings, and what was made from one.

    <root>/overridden/<asset>/<partition>.json      fingerprint -> label of the artifact whose settings were overridden -> these settings

The record is beside the pointers and not in the artifact: the same artifact may be one recipe's own and another's by an override.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

from pipelines.manifests import Json, Manifest, Member
from pipelines.store import Build, Store


def note(store: Store, build: Build, own: Mapping[str, Json]) -> None:
    """Remember what of `build`, which is about to be made, is `own` override, and what it takes over from its inputs.

    Where there is neither, forget that the artifact was ever made by one. The record of what the partition stands at now is kept: it
    stands there until `build` is done.
    """
    found = inherited(build.inputs) | ({build.label: dict(own)} if own else {})
    path = _path(store.root, build.asset, build.partition)
    before = _read(path)
    if not found and not before:
        return
    there = store.standing(build.asset, build.partition)
    current = there.fingerprint if there else None
    records = {address: record for address, record in before.items() if address == current and address != build.fingerprint()}
    if found:
        records[build.fingerprint()] = found
    if not records:
        path.unlink(missing_ok=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(f".{os.getpid()}.tmp")
    beside.write_text(json.dumps(records, indent=1), encoding="utf-8")
    beside.rename(path)


def standing(manifest: Manifest) -> dict[str, dict[str, Json]]:
    """Return what of the artifact, as its partition stands at it, comes from overrides: its own, and those of what it was made from.

    By the label of the artifact that was overridden, such as ``selected_subset[tiny]``, then by dotted key.
    """
    root = manifest.directory.parents[2]  # <root>/artifacts/<asset>/<fingerprint>
    return _read(_path(root, manifest.asset, manifest.partition)).get(manifest.fingerprint, {})


def inherited(inputs: Mapping[str, object]) -> dict[str, dict[str, Json]]:
    """Return what comes from overrides of the artifacts among `inputs`, as their partitions stand at them."""
    found: dict[str, dict[str, Json]] = {}
    for value in inputs.values():
        for item in value if isinstance(value, tuple) else (value,):
            manifest = item.manifest if isinstance(item, Member) else item
            if isinstance(manifest, Manifest) and manifest.is_stored:
                found |= standing(manifest)
    return found


def _path(root: Path, asset: str, partition: str | None) -> Path:
    return root / "overridden" / asset / f"{quote(partition, safe='') if partition else '_'}.json"


def _read(path: Path) -> dict[str, dict[str, dict[str, Json]]]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
