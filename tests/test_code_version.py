"""The code version: what a step's bytes can depend on changes it, and nothing else does."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.code_version import INFRASTRUCTURE, code_version, imported_modules, installed_version

ROOT = Path(__file__).parents[1]
MODULES = ("pipelines.filters.markup", "pipelines.filters.gopher_quality", "pipelines.cleaning", "pipelines.embedding", "pipelines.mixture")
FILTER = "pipelines/filters/gopher_quality.py"


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a copy of the package."""
    directory = tmp_path_factory.mktemp("copy")
    shutil.copytree(ROOT / "pipelines", directory / "pipelines", ignore=shutil.ignore_patterns("__pycache__"))
    return directory


def versions(package: Path) -> dict[str, str]:
    """Return the code version of each of MODULES as a process sees it that imports the copy in `package`."""
    code = f"from pipelines.code_version import code_version\nfor m in {MODULES}: print(m, code_version((m,)))"
    environment = {**os.environ, "PYTHONPATH": str(package), "PYTHONDONTWRITEBYTECODE": "1"}
    found = subprocess.run([sys.executable, "-c", code], env=environment, cwd=package, capture_output=True, text=True, check=True).stdout
    return dict(line.split() for line in found.splitlines())


@pytest.fixture(scope="module")
def before(package: Path) -> dict[str, str]:
    return versions(package)


def edited(package: Path, edits: dict[str, tuple[str, str]]) -> dict[str, str]:
    """Return the versions after `edits`: path to (old, new), appended where old is empty."""
    originals = {path: (package / path).read_text(encoding="utf-8") for path in edits}
    try:
        for path, (old, new) in edits.items():
            assert old in originals[path]
            (package / path).write_text(originals[path].replace(old, new, 1) if old else originals[path] + new, encoding="utf-8")
        return versions(package)
    finally:
        for path, text in originals.items():
            (package / path).write_text(text, encoding="utf-8")


def changed(package: Path, before: dict[str, str], edits: dict[str, tuple[str, str]]) -> set[str]:
    """Return the modules of MODULES whose version differs after `edits`."""
    return {module for module, version in edited(package, edits).items() if version != before[module]}


def test_a_copy_elsewhere_has_the_same_versions(before: dict[str, str]) -> None:
    assert before == {module: code_version((module,)) for module in MODULES}
    assert len(set(before.values())) == len(MODULES)
    assert all(len(version) == 12 and int(version, 16) >= 0 for version in before.values())


def test_comments_docstrings_and_layout_do_not_count(package: Path, before: dict[str, str]) -> None:
    path = package / FILTER
    first_line = path.read_text(encoding="utf-8").splitlines()[0]
    assert first_line.startswith('"""')
    edits = {
        FILTER: (first_line, f"# a comment\n\n{first_line} In other words."),
        "pipelines/cleaning.py": ("", "\n\n# the end\n"),
        "pipelines/filters/__init__.py": ('"""Base of every filter."""', '"""What filters are made from."""'),
    }
    assert changed(package, before, edits) == set()


def test_a_new_docstring_does_not_count(package: Path, before: dict[str, str]) -> None:
    bare, documented = (
        edited(package, {FILTER: ("", f"\n\nasync def nothing(of: int) -> None:\n    {body}\n")}) for body in ("pass", '"""Do nothing."""')
    )
    assert bare == documented and bare["pipelines.filters.gopher_quality"] != before["pipelines.filters.gopher_quality"]


def test_a_changed_rule_changes_that_plugin_alone(package: Path, before: dict[str, str]) -> None:
    assert changed(package, before, {FILTER: ("", "\nCHANGED = 1\n")}) == {"pipelines.filters.gopher_quality"}


@pytest.mark.parametrize(
    ("path", "reached"),
    [
        ("pipelines/filters/_quality.py", {"pipelines.filters.gopher_quality"}),
        ("pipelines/filters/__init__.py", {"pipelines.filters.markup", "pipelines.filters.gopher_quality"}),
        ("pipelines/documents.py", {"pipelines.cleaning", "pipelines.embedding", "pipelines.mixture"}),
        ("pipelines/embedders/_grid.py", {"pipelines.embedding"}),
        ("pipelines/plots.py", {"pipelines.mixture"}),
    ],
)
def test_a_change_counts_for_whatever_imports_it(package: Path, before: dict[str, str], path: str, reached: set[str]) -> None:
    assert changed(package, before, {path: ("", "\nCHANGED = 1\n")}) == reached


def test_infrastructure_does_not_count(package: Path, before: dict[str, str]) -> None:
    edits = {f"{module.replace('.', '/')}.py": ("", "\nCHANGED = 1\n") for module in INFRASTRUCTURE}
    assert changed(package, before, edits) == set()


@pytest.mark.parametrize("module", sorted(INFRASTRUCTURE))
def test_infrastructure_is_there(module: str) -> None:
    assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), f"{module} is listed in INFRASTRUCTURE and does not exist"


def test_importing_a_name_and_a_module_of_a_package_reaches_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "def step():\n    from pipelines.filters import Filter, _quality\n    import pipelines.documents\n"
    (tmp_path / "reaches_both.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    assert imported_modules("reaches_both") == {"pipelines.filters", "pipelines.filters._quality", "pipelines.documents"}


def test_versions_of_packages_count() -> None:
    module = ("pipelines.cleaning",)
    assert code_version(module) != code_version(module, ("ftfy",)) != code_version(module, ("pyarrow",))
    assert code_version(module, ("ftfy", "pyarrow")) == code_version(module, ("pyarrow", "ftfy"))
    assert installed_version("no-such-package") == "absent" and "+" not in installed_version("torch")
    assert code_version((*MODULES,)) == code_version(tuple(reversed(MODULES)))


KEPT = """
import sys
from pipelines import parsed_modules
from pipelines.code_version import code_version
parsed = []
parse = parsed_modules._parse
parsed_modules._parse = lambda source: parsed.append(source) or parse(source)
print(code_version(("pipelines.mixture",)), len(parsed))
"""


def version_and_parsed(cache: Path) -> tuple[str, int]:
    """Return a code version as a new process finds it, and how many modules it parsed."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    found = subprocess.run([sys.executable, "-c", KEPT], env=environment, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    version, parsed = found.split()
    return version, int(parsed)


def test_a_module_is_parsed_once_and_again_where_what_is_kept_is_damaged_or_cannot_be_kept(tmp_path: Path) -> None:
    kept = tmp_path / "gristmill" / "parsed_modules.json"
    version, parsed = version_and_parsed(tmp_path)
    assert parsed > 5 and kept.is_file()
    assert version_and_parsed(tmp_path) == (version, 0)
    whole = kept.read_text()
    for damage in (whole[: len(whole) // 2], "[1, 2]", '{"a": 1}', ""):
        kept.write_text(damage)
        assert version_and_parsed(tmp_path) == (version, parsed)
        assert kept.read_text() == whole
    (tmp_path / "file").write_text("")
    assert version_and_parsed(tmp_path / "file") == (version, parsed)
