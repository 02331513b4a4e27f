"""The README tells the truth: its commands exist, and the first stands where a newcomer looks first."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from assets_defs.cli import app
from assets_defs.resources import load_recipes

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CODE = "\n".join(re.findall(r"```(?:sh|console)\n(.*?)```", README, flags=re.DOTALL)) + "\n".join(re.findall(r"`([^`\n]+)`", README))


def test_the_first_command_stands_within_the_first_sixty_words() -> None:
    first_words = " ".join(README.split()[:60])
    assert "make run" in first_words


def test_every_make_target_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z-]+)", CODE))
    assert {"run", "test", "ui"} <= named <= targets


def test_every_subcommand_exists() -> None:
    commands = {command.name or command.callback.__name__ for command in app.registered_commands}
    commands |= {group.name for group in app.registered_groups}
    named = set(re.findall(r"\bgristmill ([a-z]+)", CODE))
    assert named and named <= commands


def test_every_benchmark_exists() -> None:
    for name in re.findall(r"python -m benchmarks\.(\w+)", README):
        assert (ROOT / "benchmarks" / f"{name}.py").exists()


def test_every_recipe_and_file_that_is_named_exists() -> None:
    for name in re.findall(r"RECIPE=([\w-]+)", README) + re.findall(r"--recipe ([\w-]+)", README):
        assert name in load_recipes()
    for path in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / path).exists(), path


def test_ci_calls_the_test_command() -> None:
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_the_definitions_validate() -> None:
    """Dagster's own command loads the code location; nothing that it warns of is ours."""
    command = [sys.executable, "-m", "dagster", "definitions", "validate"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-3000:]
    warned = [line for line in output.splitlines() if "Warning" in line and ("assets_defs" in line or "pipelines" in line)]
    assert not warned, warned
