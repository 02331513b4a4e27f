"""Compiled code is kept by what went into it: a constant of another file that changed compiles everything anew."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from pipelines import native
from pipelines.code_version import code_version, imported_modules
from pipelines.native import native_modules

ROOT = Path(__file__).parents[1]
PROGRAM = """
from scale import FACTOR
from pipelines.native import KERNEL

@KERNEL
def scaled(value):
    return value * FACTOR

if __name__ == "__main__":
    print(scaled(2), sum(scaled.stats.cache_hits.values()))
"""


def run(folder: Path) -> list[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(folder)]), "NUMBA_CACHE_DIR": str(folder / "cache")}
    done = subprocess.run([sys.executable, "-m", "program"], cwd=folder, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_compiled_code_is_taken_from_the_cache_the_second_time(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "scale.py").write_text("FACTOR = 3\n")
    assert [run(tmp_path), run(tmp_path)] == [["6", "0"], ["6", "1"]]


def test_the_directory_is_named_by_everything_that_native_code_imports() -> None:
    modules = native_modules()
    assert {"pipelines.words._spacy_english", "pipelines.filters._lines", "pipelines.minhash_kernels"} <= set(modules)
    read = set().union(*map(imported_modules, modules))
    assert {"pipelines.words._characters", "pipelines.filters._punctuation"} <= read  # constants stand there, and no native code
    assert native.config.CACHE_DIR.endswith(f"native-{code_version(modules)}")


def test_native_code_is_compiled_in_one_way() -> None:
    """What is compiled otherwise would be kept by another name, or not at all."""
    for path in (ROOT / "pipelines").rglob("*.py"):
        assert path.name == "native.py" or "njit" not in path.read_text(encoding="utf-8"), path
