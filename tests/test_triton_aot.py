"""Triton without a GPU, part two: the launchers compile what they would run, for four architectures.

A stand-in for Triton's driver names the architecture and every launch stops after compilation, so that compile keys,
tiles and warps are the real ones. `make aot` (TRITONKERN_AOT=all) does so for every head dim; the default is a choice
that still holds every kernel on every architecture, where it needs most registers, and every dtype, tile size and width
of the head on one. Likewise for the channels of correlation_soft_argmax.
"""

import concurrent.futures
import functools
import importlib
import itertools
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
MATCH_LANES = 96  # of 6400 (100 vector registers of 64 lanes); arguments of the kernels that sum gradients
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


class Match(NamedTuple):
    """A call of correlation_soft_argmax or soft_argmax_2d, whose launchers start several kernels."""

    function: str
    target: str
    channels: int
    dtype: torch.dtype
    cosine: bool = False
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


def compile_only(room, target, tf32=False):
    """The launchers' module, with kernels that compile for `target` and note what they compiled instead of running."""
    import triton

    room = f"tritonkern.ops.{room}"
    launchers = importlib.import_module(f"{room}.triton_kernels")
    configs = importlib.import_module(f"{room}.configs")
    triton.runtime.driver.set_active(Driver(target))
    configs.tf32_allowed = lambda: tf32
    configs.on_amd = lambda: target.startswith("gfx")
    compiled = []
    modules = [module for name, module in sys.modules.items() if name.startswith(f"{room}.triton_")]
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


def launch_match(kernels, function, query, features, cosine, radius=5.0):
    pairs = query.shape[0], query.shape[1], features.shape[1]
    real = query.new_ones(pairs, dtype=torch.promote_types(query.dtype, torch.float32))
    cells, points = real.int(), torch.stack([real, real], -1)
    if function == "forward":
        kernels.forward(query, features, 20.0, radius, cosine, 1e-6)
    elif function == "backward":
        scales = (real.new_ones(x.shape[:-1] if cosine else 0) for x in (query, features))
        saved = points, real, cells, cells, real, *scales
        kernels.backward(points, real, real, real, query, features, *saved, 20.0, radius, cosine, 1e-6)
    elif function == "soft_argmax_forward":
        kernels.soft_argmax_forward(features[..., 0], 20.0, radius)
    else:
        points, real = points[:, 0], real[:, 0]
        kernels.soft_argmax_backward(points, features[..., 0], points, real, real.int(), real, 20.0, radius)


def measure_match(case):
    kernels, compiled = compile_only("correlation_soft_argmax", case.target, case.tf32)
    query = torch.zeros(2, 3, case.channels, dtype=case.dtype)
    features = torch.zeros(2, 5, 6, 7, case.channels, dtype=case.dtype)
    launch_match(kernels, case.function, query, features, case.cosine)
    return [resources(kernel, case.target) for kernel in {kernel.hash: kernel for kernel in compiled}.values()]


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
def pool(tmp_path_factory):
    with workers(tmp_path_factory.mktemp("triton")) as pool:
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


def match_cases():
    """Calls whose launchers start all kernels of the room."""
    everything = os.environ.get("TRITONKERN_AOT") == "all"
    half, single, double = torch.bfloat16, torch.float32, torch.float64
    for target in TARGETS:
        for function in ("forward", "backward"):
            if everything:
                for channels, cosine in itertools.product((8, 24, 32, 64, 768), (False, True)):
                    yield from (Match(function, target, channels, dtype, cosine) for dtype in DTYPES)
            else:
                yield from (Match(function, target, 768, dtype, cosine=True) for dtype in (half, single))
                if target in ("sm_90", "gfx942"):
                    yield Match(function, target, 768, torch.float16)
            if target == "sm_80":
                yield Match(function, target, 768, double, cosine=True)
            if target != "gfx942" and (everything or target == "sm_90"):
                yield Match(function, target, 768, single, cosine=True, tf32=True)
        for function in ("soft_argmax_forward", "soft_argmax_backward"):
            yield from (Match(function, target, 1, dtype) for dtype in (DTYPES if everything else (half,)))


@pytest.mark.slow
def test_no_matching_kernel_spills_or_overflows_shared_memory(pool):
    futures = {case: pool.submit(measure_match, case) for case in match_cases()}
    table, faults = [], []
    for case, future in futures.items():
        for used in future.result():
            row = (
                f"{used.kernel:24} {case.target:6} C={case.channels:<3} {str(case.dtype)[6:]:8} "
                f"cosine={case.cosine:d} tf32={case.tf32:d}: {used.registers:3} registers, "
                f"{used.shared:6} bytes shared, {used.spilled} spilled, {used.lanes} in lanes"
            )
            table.append(row)
            if used.spilled or used.lanes > MATCH_LANES:
                faults.append(row)
            if used.shared > SHARED_KIB[case.target] * 1024:
                faults.append(f"{row}: too much shared memory")
            vectors = used.kernel in ("statistics_kernel", "points_kernel", "query_gradient_kernel")
            if not vectors:
                continue
            if case.dtype.itemsize == 2 and re.search(r"ld\.global\.[bu]16|global_load_[us]short", used.assembly):
                faults.append(f"{row}: vectors are not read as such")
            # AMD's matrix units take float32 as it is.
            tensor_cores = case.dtype.itemsize == 2 or case.tf32
            tensor_cores |= case.dtype == torch.float32 and case.target == "gfx942"
            if bool(re.search(MATRIX[case.target], used.assembly)) != tensor_cores:
                faults.append(f"{row}: tensor cores are {'not ' if tensor_cores else ''}used")
    print("\n".join(table))
    assert not faults, "\n".join(faults)


def match_variants(target):
    """Names of all kernels compiled for one block of channels while every other size, stride and option changes."""
    kernels, compiled = compile_only("correlation_soft_argmax", target)
    sizes = [(2, 3, 5, 6, 7, 48), (1, 1, 1, 1, 1, 64), (1, 16, 16, 16, 16, 40), (16, 48, 1, 64, 2, 33)]
    for (B, N, T, h, w, C), radius in itertools.product(sizes, (0.5, 5.0, float("inf"))):
        query = torch.zeros(B, N, C, dtype=torch.float16)
        features = torch.zeros(B, T, h * w + 1, C, dtype=torch.float16)[:, :, 1:].unflatten(2, (h, w))
        for function in ("forward", "backward", "soft_argmax_forward", "soft_argmax_backward"):
            launch_match(kernels, function, query, features, True, radius)
            launch_match(kernels, function, query, features.mT.contiguous().mT, True, radius)
    names = {kernel.metadata.name for kernel in compiled}
    return len({kernel.hash for kernel in compiled}), len(names), len(compiled)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_nothing_but_channels_dtype_and_cosine_recompile_matching(pool, target):
    hashes, names, launches = pool.submit(match_variants, target).result()
    # The names of the soft-argmax kernels are told apart by nothing but forward and backward.
    assert launches > 200 and hashes == names == 9


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
