"""What a stretch of work costs: wall time, CPU time of this process and its children, and energy where the machine counts it.

Energy is of the whole machine: other work on it is counted too. It is read from the counters of the processor packages (RAPL, by Linux's
powercap; most systems let root alone read them) and of NVIDIA's driver (NVML, since Volta). Where there is no counter, none is named.
"""

from __future__ import annotations

import ctypes
import resource
import time
from collections.abc import Callable, Mapping
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")
NVML = "libnvidia-ml.so.1"
MICRO, MILLI = 1e-6, 1e-3
Joules = dict[str, tuple[float, float]]
"""Counter -> joules so far, and the value at which it begins anew (infinite where it does not)."""


class Meter:
    """Started when it is made; `spent` says what was used since."""

    def __init__(self, counters: Callable[[], Joules] | None = None) -> None:
        self._counters = counters or machine_joules
        self._joules, self._cpu, self._clock = self._counters(), cpu_seconds(), time.perf_counter()

    def spent(self) -> dict[str, float]:
        """Return ``seconds``, ``cpu_seconds`` and, where a counter stood at both ends, ``energy_joules``."""
        found = {"seconds": round(time.perf_counter() - self._clock, 3), "cpu_seconds": round(cpu_seconds() - self._cpu, 3)}
        joules = used(self._joules, self._counters())
        return found if joules is None else {**found, "energy_joules": round(joules, 1)}


def cpu_seconds() -> float:
    """Return the CPU time of this process and of its children that have ended."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(item.ru_utime + item.ru_stime for item in usage)


def used(before: Mapping[str, tuple[float, float]], after: Mapping[str, tuple[float, float]]) -> float | None:
    """Return the joules between two readings, None where no counter stands in both; one that began anew did so once."""
    shared = [name for name in before if name in after]
    if not shared:
        return None
    total = 0.0
    for name in shared:
        change = after[name][0] - before[name][0]
        total += change if change >= 0 else change + after[name][1]
    return total


def machine_joules() -> Joules:
    """Return the counters of this machine's processor packages and GPUs."""
    return {**package_joules(), **gpu_joules()}


def package_joules(root: Path = POWERCAP) -> Joules:
    """Return the counter of each processor package under `root`; none where they may not be read."""
    found: Joules = {}
    for zone in sorted(root.glob("intel-rapl:*")):
        if zone.name.count(":") > 1:  # a part of a package, which is counted in it
            continue
        try:
            now, end = (float((zone / name).read_text()) * MICRO for name in ("energy_uj", "max_energy_range_uj"))
        except (OSError, ValueError):
            continue
        found[zone.name] = (now, end)
    return found


def gpu_joules(library: str = NVML) -> Joules:
    """Return the counter of each NVIDIA GPU; none without the driver."""
    try:
        nvml = ctypes.CDLL(library)
    except OSError:
        return {}
    if nvml.nvmlInit_v2():
        return {}
    count, found = ctypes.c_uint(), {}
    nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
    for number in range(count.value):
        device, millijoules = ctypes.c_void_p(), ctypes.c_ulonglong()
        if nvml.nvmlDeviceGetHandleByIndex_v2(number, ctypes.byref(device)):
            continue
        if not nvml.nvmlDeviceGetTotalEnergyConsumption(device, ctypes.byref(millijoules)):
            found[f"gpu:{number}"] = (millijoules.value * MILLI, float("inf"))
    nvml.nvmlShutdown()
    return found
