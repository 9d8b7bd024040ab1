"""Time on the device alone, and time that the host needs to start a call."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


def device_times(call: Callable[[], object], repeats: int = 20) -> dict:
    """Median, 20 % and 80 % of a call in milliseconds, the caches flushed before each.

    A CUDA graph of the call is replayed where it can be captured. Otherwise the device is kept busy while the host
    queues the call, so that the host's time does not count.
    """
    if not CUDA:
        times = [_wall_ms(call) for _ in range(3)]
        return _row(times, "wall clock")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    how, replay = "graph", None
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        replay = graph.replay
    except Exception as error:
        how = f"events, as the capture failed: {type(error).__name__}: {str(error)[:120]}"
        torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        _larger_than_caches().zero_()
        if replay is None:
            torch.cuda._sleep(4_000_000)  # about 2 ms
        start.record()
        (replay or call)()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return _row(times, how)


def host_microseconds(call: Callable[[], object], calls: int = 50) -> float:
    """What the host pays per call while the device keeps up with it: the time to queue `calls` of them."""
    for _ in range(3):
        call()
    if CUDA:
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    taken = time.perf_counter() - start
    if CUDA:
        torch.cuda.synchronize()
    return taken / calls * 1e6


def _row(times: list[float], how: str) -> dict:
    ordered = sorted(times)
    low, high = (ordered[round(share * (len(ordered) - 1))] for share in (0.2, 0.8))
    return {"ms": statistics.median(ordered), "p20": low, "p80": high, "how": how}


def _wall_ms(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


@functools.cache
def _larger_than_caches() -> Tensor:
    return torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
