"""Triton without a GPU, part two: the launchers compile what they would run, for four architectures.

A stand-in for Triton's driver names the architecture and every launch stops after compilation, so that compile keys,
tiles and warps are the real ones. `make aot` (TRITONKERN_AOT=all) does so for every head dim; the default is a choice
that still holds every kernel on every architecture, where it needs most registers, and every dtype, tile size and width
of the head on one.
"""

import concurrent.futures
import functools
import importlib
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from oracle import CACHE

pytest.importorskip("triton")

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
SHARED_KIB = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "gfx942": 64}
# Tiles of fewer than 64 rows use the instruction of the first architecture on the others, too.
MATRIX = {"sm_80": "mma.sync", "sm_90": "wgmma|mma.sync", "sm_100": "tcgen05.mma|mma.sync", "gfx942": "v_mfma"}
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
# Scalar registers kept in lanes of vector registers, which is no memory traffic. Masks of heads above 128 that are no
# power of two take them.
LANES = {("backward", "gfx942", head_dim): 16 for head_dim in range(136, 256, 8)}
BUCKETS = (16, 32, 64, 128, 256)
NARROW, WIDE = 13, 201


class Case(NamedTuple):
    """A call of temporal window attention."""

    direction: str
    target: str
    head_dim: int
    dtype: torch.dtype
    window: int = NARROW
    tf32: bool = False


class Resources(NamedTuple):
    kernel: str
    spilled: int  # bytes, or vector registers on AMD
    lanes: int  # scalar registers kept in lanes of vector registers (AMD)
    shared: int  # bytes
    registers: int
    assembly: str


def cases():
    for direction in ("forward", "backward"):
        for target in TARGETS:
            if os.environ.get("TRITONKERN_AOT") == "all":
                plain = [(head_dim, dtype) for head_dim in range(8, 257, 8) for dtype in DTYPES]
                special = BUCKETS
            else:
                plain = [(head_dim, torch.bfloat16) for head_dim in (16, 64, 256)]
                plain += [(64, torch.float32), (256, torch.float32), (256, torch.float64)]
                if target == "sm_90":
                    plain += [(head_dim, torch.bfloat16) for head_dim in (24, 32, 128, 200)] + [(64, torch.float16)]
                    plain += [(16, torch.float32), (16, torch.float64), (64, torch.float64)]
                special = (256,)
            yield from (Case(direction, target, *choice) for choice in plain)
            if direction == "forward":  # backward tiles are the same for every window
                yield from (Case(direction, target, head_dim, torch.bfloat16, window=WIDE) for head_dim in special)
            if target != "gfx942":  # PyTorch has no TF32 there
                yield from (Case(direction, target, head_dim, torch.float32, tf32=True) for head_dim in special)


class Driver:
    """As much of a Triton driver as compilation asks for."""

    def __init__(self, target):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget(*TARGETS[target])

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=0):
        return 0


def compile_only(operation, target, tf32=False):
    """The launchers' module, with kernels that compile for `target` and note what they compiled instead of running."""
    import triton

    folder = f"tritonkern.ops.{operation}"
    launchers = importlib.import_module(f"{folder}.triton_kernels")
    configs = importlib.import_module(f"{folder}.configs")
    triton.runtime.driver.set_active(Driver(target))
    configs.tf32_allowed = lambda: tf32
    configs.on_amd = lambda: target.startswith("gfx")
    compiled = []
    modules = [module for name, module in sys.modules.items() if name.startswith(f"{folder}.triton_")]
    kernels = {x for module in modules for name, x in vars(module).items() if re.search("_kernel(_|$)", name)}
    for kernel in kernels:
        run = type(kernel).run
        kernel.device_caches.clear()
        kernel.run = lambda *args, run=run, kernel=kernel, **options: compiled.append(
            run(kernel, *args, **{**options, "warmup": True})
        )
    return launchers, compiled


def launch(kernels, direction, tensors, window):
    query, key, value = tensors
    half = window // 2
    if direction == "forward":
        kernels.forward(query, key, value, half, half, 0.125)
    else:
        lse = query.new_zeros(query.shape[:-1], dtype=torch.promote_types(query.dtype, torch.float32))
        kernels.backward(value, query, key, value, key, lse, half, half, 0.125)


def measure(case):
    kernels, compiled = compile_only("temporal_window_attention", case.target, case.tf32)
    launch(
        kernels, case.direction, [torch.zeros(1, case.window, 1, 1, case.head_dim, dtype=case.dtype)] * 3, case.window
    )
    (kernel,) = compiled
    return resources(kernel, case.target)


def resources(kernel, target):
    name = kernel.metadata.name
    if target == "gfx942":
        assembly = kernel.asm["amdgcn"]
        number = lambda field: int(re.search(rf"\.{field}:\s+(\d+)", assembly)[1])  # noqa: E731
        spilled = number("vgpr_spill_count") + number("private_segment_fixed_size")
        return Resources(
            name, spilled, number("sgpr_spill_count"), kernel.metadata.shared, number("vgpr_count"), assembly
        )
    usage = cubin_usage(kernel.asm["cubin"])
    spilled = int(re.search(r"STACK:(\d+)", usage)[1]) + int(re.search(r"LOCAL:(\d+)", usage)[1])
    return Resources(
        name, spilled, 0, kernel.metadata.shared, int(re.search(r"REG:(\d+)", usage)[1]), kernel.asm["ptx"]
    )


def cubin_usage(cubin):
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout


def start_worker(cache):
    os.environ["TRITON_CACHE_DIR"] = cache
    torch.set_num_threads(1)


@functools.cache
def workers(cache):
    """Processes of their own: they change Triton's driver, and compile side by side."""
    context = multiprocessing.get_context("spawn")
    return concurrent.futures.ProcessPoolExecutor(os.cpu_count(), context, start_worker, (str(cache),))


@pytest.fixture(scope="module")
def pool():
    with workers(CACHE / "triton") as pool:
        yield pool


@pytest.mark.slow
def test_no_kernel_spills_or_overflows_shared_memory(pool):
    futures = {case: pool.submit(measure, case) for case in cases()}
    table, faults = [], []
    for case, future in futures.items():
        used = future.result()
        row = (
            f"{case.direction:8} {case.target:6} D={case.head_dim:<3} {str(case.dtype)[6:]:8} window={case.window:<3} "
            f"tf32={case.tf32:d}: {used.registers:3} registers, {used.shared:6} bytes shared, {used.spilled} spilled"
        )
        table.append(row)
        if used.spilled or used.lanes > LANES.get((case.direction, case.target, case.head_dim), 0):
            faults.append(row)
        if used.shared > SHARED_KIB[case.target] * 1024:
            faults.append(f"{row}: too much shared memory")
        if case.dtype.itemsize == 2 and re.search(r"ld\.global\.[bu]16|global_load_[us]short", used.assembly):
            faults.append(f"{row}: rows are not read in vectors")
        tensor_cores = case.dtype.itemsize == 2 or case.tf32
        if bool(re.search(MATRIX[case.target], used.assembly)) != tensor_cores:
            faults.append(f"{row}: tensor cores are {'not ' if tensor_cores else ''}used")
    print("\n".join(table))
    assert not faults, "\n".join(faults)


def variants(direction, target):
    """Names of all kernels compiled for one head dim and dtype while every other size changes."""
    kernels, compiled = compile_only("temporal_window_attention", target)
    for B, T, N, H in [(2, 3, 5, 7), (1, 1, 1, 1), (1, 16, 1, 1), (16, 16, 16, 16), (3, 48, 2, 1), (1, 70, 33, 2)]:
        for window in (1, 13, 31):
            contiguous = torch.zeros(B, T, N, H, 32, dtype=torch.float16)
            packed = torch.zeros(B, T, N, 3, H, 32, dtype=torch.float16).unbind(3)
            launch(kernels, direction, [contiguous] * 3, window)
            launch(kernels, direction, [packed[0], packed[1].clone(), packed[2]], window)
            launch(kernels, direction, [contiguous[:1, :1].expand(B, T, -1, -1, -1)] * 3, window)
    return {kernel.hash for kernel in compiled}, len(compiled)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_nothing_but_head_dim_window_and_dtype_recompiles(pool, direction, target):
    hashes, launches = pool.submit(variants, direction, target).result()
    assert launches == 54 and len(hashes) == 1
