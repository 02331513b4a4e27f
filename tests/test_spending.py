"""What work costs: CPU time of a process and its children, and energy counters that begin anew, may not be read, or are not there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.spending import Joules, Meter, gpu_joules, package_joules, used


def package(root: Path, name: str, microjoules: str, largest: int = 1_000_000_000) -> None:
    (root / name).mkdir()
    (root / name / "energy_uj").write_text(microjoules)
    (root / name / "max_energy_range_uj").write_text(str(largest))


def test_packages_are_counted_once_and_in_joules(tmp_path: Path) -> None:
    package(tmp_path, "intel-rapl:0", "2500000\n")
    package(tmp_path, "intel-rapl:1", "500000\n")
    package(tmp_path, "intel-rapl:0:0", "900000\n")  # the cores of package 0
    assert package_joules(tmp_path) == {"intel-rapl:0": (2.5, 1000.0), "intel-rapl:1": (0.5, 1000.0)}


def test_a_counter_that_cannot_be_read_is_left_out(tmp_path: Path) -> None:
    package(tmp_path, "intel-rapl:0", "no number")
    (tmp_path / "intel-rapl:1").mkdir()
    assert package_joules(tmp_path) == {}
    assert package_joules(tmp_path / "absent") == {}
    assert gpu_joules("libnone-of-that-name.so") == {}


def test_a_counter_that_began_anew_is_continued() -> None:
    assert used({"a": (990.0, 1000.0), "b": (1.0, 1000.0)}, {"a": (15.0, 1000.0), "b": (4.0, 1000.0)}) == pytest.approx(28.0)
    assert used({"a": (1.0, 10.0)}, {"b": (1.0, 10.0)}) is None


def test_a_meter_counts_children_and_energy() -> None:
    readings: list[Joules] = [{"gpu:0": (100.0, float("inf"))}, {"gpu:0": (142.5, float("inf"))}]
    meter = Meter(lambda: readings.pop(0))
    subprocess.run([sys.executable, "-c", "while __import__('time').process_time() < 0.3: pass"], check=True)
    spent = meter.spent()
    assert spent["energy_joules"] == 42.5
    assert spent["cpu_seconds"] >= 0.3 and spent["seconds"] > 0


def test_without_a_counter_no_energy_is_named() -> None:
    assert set(Meter(dict).spent()) == {"seconds", "cpu_seconds"}
