"""How fast a machine multiplies matrices, so that a run's speed can be given as a share of it (model FLOP utilisation)."""

from __future__ import annotations

import time
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

PUBLISHED_TFLOPS = {"H200": 989.4, "H100": 989.4, "A100": 312.0, "L40S": 362.0, "RTX 4090": 165.2}
"""Dense bfloat16 of NVIDIA's data sheets, by a part of the device's name."""
CPU_SIZE, GPU_SIZE = 1024, 8192
PROBE_SECONDS = 0.5


def peak_flops(device: torch.device, *, half: bool) -> tuple[float, str]:
    """Return the operations per second that `device` can do, and where the figure is from: a data sheet, or a measurement."""
    import torch

    if device.type == "cuda" and half:
        name = torch.cuda.get_device_name(device)
        for part, tflops in PUBLISHED_TFLOPS.items():
            if part in name:
                return tflops * 1e12, f"data sheet of {part}, dense bfloat16"
    return measured_matmul_flops(device.type, device.index, half=half, threads=torch.get_num_threads()), "matrix product, measured"


@cache
def measured_matmul_flops(kind: str, index: int | None, *, half: bool, threads: int) -> float:
    """Return the operations per second of the best of many square matrix products on a device."""
    import torch

    device = torch.device(kind, index) if index is not None else torch.device(kind)
    size = GPU_SIZE if kind == "cuda" else CPU_SIZE
    left = torch.randn(size, size, device=device, dtype=torch.bfloat16 if half else torch.float32)
    right, best, until = left.clone(), float("inf"), time.perf_counter() + PROBE_SECONDS
    while time.perf_counter() < until:
        started = time.perf_counter()
        left @ right
        if kind == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2.0 * size**3 / best
