"""The code version of a step: a hash of its module and of every module of this package it reaches.

Comments and docstrings do not count; infrastructure that moves bytes without changing them does not count either.
So a changed rule re-scores that rule alone, and a reworded docstring re-computes nothing.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pipelines.parsed_modules import Parsed, keep, parsed

ROOT = Path(__file__).parents[1]
"""Where the package stands."""
INFRASTRUCTURE = frozenset(
    f"pipelines.{name}"
    for name in (
        "code_version",
        "configuration",
        "engine",
        "errors",
        "files",
        "interruption",
        "manifests",
        "parsed_modules",
        "plugins",
        "progress",
        "ray_shards",
        "recipes",
        "remote_files",
        "remote_store",
        "store",
        "tracking",
        "tracking_database",
    )
)
"""Modules that cannot change an artifact's bytes."""


@cache
def code_version(modules: tuple[str, ...], packages: tuple[str, ...] = ()) -> str:
    """Return 12 hex digits over the code of `modules`, what they import of `pipelines`, and versions of `packages`."""
    digest = hashlib.sha256()
    for module in sorted(_closure(modules)):
        digest.update(f"{module}\n{_read(module).digest}\n".encode())
    keep()
    for package in sorted(packages):
        digest.update(f"{package}=={installed_version(package)}\n".encode())
    return digest.hexdigest()[:12]


def installed_version(package: str) -> str:
    """Return the installed version of `package` without a local part, or ``absent``."""
    try:
        return version(package).partition("+")[0]
    except PackageNotFoundError:
        return "absent"


def _closure(modules: Iterable[str]) -> set[str]:
    pending, seen = list(modules), set()
    while pending:
        module = pending.pop()
        if module in seen or module in INFRASTRUCTURE:
            continue
        seen.add(module)
        pending.extend(imported_modules(module))
    return seen


@cache
def imported_modules(module: str) -> frozenset[str]:
    """Return the modules of `pipelines` that `module` imports anywhere, functions included."""
    found: set[str] = set()
    for name, taken in _read(module).imports:
        if name.startswith("pipelines"):
            found.update(inner if _path(inner) else name for inner in (f"{name}.{one}" for one in taken))
            found.update(() if taken else (name,))
    return frozenset(name for name in found if name != "pipelines")


@cache
def _path(module: str) -> Path | None:
    """Return the file of `module`. Nothing of this package is imported for it: modules of native code ask while they are imported."""
    if module.partition(".")[0] == "pipelines":
        path = ROOT.joinpath(*module.split("."))
        return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        return None
    return Path(spec.origin) if spec and spec.origin else None


@cache
def _read(module: str) -> Parsed:
    path = _path(module)
    return parsed(path.read_text(encoding="utf-8") if path else "")
