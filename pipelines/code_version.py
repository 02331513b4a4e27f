"""The code version of a step: a hash of its module and of every module of this package it reaches.

Comments and docstrings do not count; infrastructure that moves bytes without changing them does not count either.
So a changed rule re-scores that rule alone, and a reworded docstring re-computes nothing.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
from collections.abc import Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

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
        digest.update(f"{module}\n{_normalised_source(module)}\n".encode())
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


def imported_modules(module: str) -> frozenset[str]:
    """Return the modules of `pipelines` that `module` imports anywhere, functions included."""
    return _read(module)[1]


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
def _source(module: str) -> str:
    path = _path(module)
    return path.read_text(encoding="utf-8") if path else ""


def _normalised_source(module: str) -> str:
    return _read(module)[0]


@cache
def _read(module: str) -> tuple[str, frozenset[str]]:
    """Return the code of `module` without comments and docstrings, and what it imports: parsed once, it is half the time of loading."""
    tree = ast.parse(_source(module))
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names if alias.name.startswith("pipelines"))
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("pipelines"):
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            found.update(name if _path(name) else node.module for name in inner)
        elif isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [line for line in node.body if not _is_docstring(line)] or [ast.Pass()]
    return ast.unparse(tree), frozenset(name for name in found if name != "pipelines")


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
