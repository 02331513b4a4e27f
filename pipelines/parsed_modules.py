"""What a module's source says once comments and docstrings are gone, and what it imports: parsed once per source, by any process.

Parsing and printing two hundred modules takes a second, a third of the time that a code location needs to load. What is kept is
addressed by the SHA-256 of the source and by the version of Python, so nothing in it can be out of date; where the file is damaged, or
cannot be written, everything is parsed as ever.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import json
import os
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

MAX_ENTRIES = 4096
"""About a megabyte; beyond it the file begins anew."""


class Parsed(NamedTuple):
    """What is kept of a source."""

    digest: str
    """SHA-256 of its code without comments and docstrings."""
    imports: tuple[tuple[str, tuple[str, ...]], ...]
    """Modules that it imports, wherever in the code, each with the names it takes from them; no names of ``import module``."""


def parsed(source: str) -> Parsed:
    """Return what `source` says, from memory, from the file, or parsed."""
    key = hashlib.sha256(f"{sys.version_info[:2]}\n{source}".encode()).hexdigest()
    known = _known()
    if key not in known:
        known[key] = _parse(source)
        _fresh[key] = known[key]
    return known[key]


def keep() -> None:
    """Write what was parsed since the last time to the file."""
    if not _fresh:
        return
    with contextlib.suppress(OSError, RuntimeError):
        file = _file()
        entries = {**_stored(), **_fresh}
        if len(entries) > MAX_ENTRIES:
            entries = dict(_known())
        file.parent.mkdir(parents=True, exist_ok=True)
        beside = file.with_suffix(f".{os.getpid()}.tmp")
        beside.write_text(json.dumps(entries, sort_keys=True), encoding="utf-8")
        beside.replace(file)
    _fresh.clear()


_fresh: dict[str, Parsed] = {}


@cache
def _known() -> dict[str, Parsed]:
    return _stored()


def _stored() -> dict[str, Parsed]:
    try:
        found = json.loads(_file().read_bytes())
        return {key: Parsed(digest, tuple((module, tuple(names)) for module, names in imports)) for key, (digest, imports) in found.items()}
    except (OSError, RuntimeError, ValueError, TypeError, AttributeError):
        return {}


def _file() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gristmill" / "parsed_modules.json"


def _parse(source: str) -> Parsed:
    tree = ast.parse(source)
    imports: list[tuple[str, tuple[str, ...]]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imports += [(alias.name, ()) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            imports.append((node.module, tuple(alias.name for alias in node.names)))
        elif isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [line for line in node.body if not _is_docstring(line)] or [ast.Pass()]
    return Parsed(hashlib.sha256(ast.unparse(tree).encode()).hexdigest(), tuple(imports))


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
