"""Interleaved timing, peak memory, agreement, and what the machine can do at best."""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Result = Tensor | tuple[Tensor, ...] | None


class Timing(NamedTuple):
    """Seconds."""

    median: float
    p20: float
    p80: float


def interleaved(calls: dict[str, Callable[[], Result]], device: str, seconds: float = 1.5) -> dict[str, Timing]:
    """Time every call in turn, round after round, so that all of them have the same disturbances.

    Runs at least 5 rounds and at most 200, and stops after about `seconds` for each call.
    """
    for call in calls.values():
        seconds_of(call, device)
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds * len(calls)
    for done in range(200):
        if done >= 5 and time.perf_counter() > end:
            break
        for name, call in calls.items():
            times[name].append(seconds_of(call, device))
    return {name: Timing(statistics.median(ts), _quantile(ts, 0.2), _quantile(ts, 0.8)) for name, ts in times.items()}


def assert_agree(results: dict[str, Result], ulps: int = 16) -> None:
    """Every result equals the first one, up to some units in the last place of its coarser dtype."""
    (name, expected), *others = results.items()
    for other, result in others:
        for x, y in zip(_tensors(expected), _tensors(result), strict=False):
            eps = max(torch.finfo(x.dtype).eps, torch.finfo(y.dtype).eps)
            error, size = (x.double() - y.double()).abs().max().item(), x.abs().max().item()
            if not error <= ulps * eps * size:
                raise AssertionError(f"{name} and {other} differ by {error:.2e} where values reach {size:.2e}")


@functools.cache
def copy_bandwidth(device: str) -> float:
    """Bytes a second, read plus written, of a copy far larger than any cache."""
    source = torch.ones((1 << 30) if device == "cuda" else (1 << 27), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / interleaved({"copy": lambda: target.copy_(source)}, device, 1.0)["copy"].median


@functools.cache
def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product (float32: without TF32)."""
    n = 8192 if device == "cuda" else 1536
    x = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n**3 / interleaved({"matmul": lambda: x @ x}, device, 1.0)["matmul"].median


def allocator() -> str:
    """ "tuned" where glibc is set to keep large blocks (docs/backends.md), otherwise "default"."""
    return "tuned" if "mmap_threshold" in os.environ.get("GLIBC_TUNABLES", "") else "default"


def device_name(device: str) -> str:
    """A name for files: ``nvidia-h200``, ``amd-epyc-2-threads-avx2``."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        name = platform.processor() or platform.machine()
        try:
            with open("/proc/cpuinfo") as file:
                name = next(line.split(":")[1] for line in file if line.startswith("model name"))
        except (OSError, StopIteration):
            pass
        isa = importlib.import_module("tritonkern._cpp").isa()
        name = f"{name.strip()} {torch.get_num_threads()} threads {isa}"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _tensors(result: Result) -> tuple[Tensor, ...]:
    """What takes part in the comparison; a copy returns nothing to compare."""
    return () if result is None else (result,) if isinstance(result, Tensor) else result


def seconds_of(call: Callable[[], Result], device: str) -> float:
    """Time of one call, to its end on the device."""
    if device == "cpu":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    _cache_filler().zero_()  # empties the L2 cache, and keeps the GPU busy while the call is being queued
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


@functools.cache
def _cache_filler() -> Tensor:
    return torch.empty(1 << 28, dtype=torch.uint8, device="cuda")


def peak_memory(call: Callable[[], Result], device: str) -> int | None:
    """Bytes that one call needs above what was in use before it, its result included; None where it cannot be seen."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # gives freed memory back, or the call would reuse it unseen
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # resets the high-water mark
        before = _high_water_mark()
        call()
        return _high_water_mark() - before
    except (OSError, AttributeError):  # another system than Linux with glibc
        return None


def _high_water_mark() -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


def _quantile(values: list[float], share: float) -> float:
    return sorted(values)[round(share * (len(values) - 1))]
