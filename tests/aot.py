"""Ahead-of-time compilation without a GPU: what the launchers would run, for any architecture, with two Tritons.

A stand-in for Triton's driver names the architecture and every launch stops after compilation, so that compile keys,
tiles and warps are the real ones. `make aot` (TRITONKERN_AOT=all) compiles every configuration for every target; the
default is a choice that holds every kernel, and what was found to spill before.
"""

import concurrent.futures
import functools
import importlib
import math
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from oracle import CACHE

EVERYTHING = os.environ.get("TRITONKERN_AOT") == "all"
CORE = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
# Siblings of these, with less shared memory (sm_86, sm_89, sm_120) or more (gfx950).
SIBLINGS = {
    "sm_86": ("cuda", 86, 32),
    "sm_89": ("cuda", 89, 32),
    "sm_120": ("cuda", 120, 32),
    "gfx950": ("hip", "gfx950", 64),
}
TARGETS = {**CORE, **SIBLINGS} if EVERYTHING else CORE
TRIED_SIBLINGS = ("sm_120",)  # that of the least shared memory; `make aot` has all
SHARED_KIB = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99}
SHARED_KIB |= {"gfx942": 64, "gfx950": 160}
# Tiles of fewer than 64 rows use the instruction of the first architecture on the others, too.
MATRIX = {target: "mma.sync" for target in SHARED_KIB} | {"sm_90": "wgmma|mma.sync", "sm_100": "tcgen05.mma|mma.sync"}
MATRIX |= {"gfx942": "v_mfma", "gfx950": "v_mfma"}
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
# The oldest and the newest Triton that the kernels are held to: of PyTorch 2.11, in a folder that the Makefile fills,
# and the one that is installed. With the oldest, the tests compile for one target, `make aot` for all.
OLDER = Path(__file__).resolve().parents[1] / "build" / "triton-3.6"
OLDER_TARGETS = TARGETS if EVERYTHING else ("sm_90",)


class Resources(NamedTuple):
    kernel: str
    spilled: int  # bytes, or vector registers on AMD
    lanes: int  # scalar registers kept in lanes of vector registers (AMD)
    shared: int  # bytes
    registers: int
    seconds: float  # to compile
    assembly: str
    cubin: bytes


class Driver:
    """As much of a Triton driver as compilation asks for."""

    def __init__(self, target):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget(*{**CORE, **SIBLINGS}[target])

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
    for module in (configs, importlib.import_module("tritonkern.ops._triton")):
        module.tf32_allowed = lambda: tf32
        module.on_amd = lambda: target.startswith("gfx")
    configs.on_sm120 = lambda: target == "sm_120"
    compiled = []
    modules = [module for name, module in sys.modules.items() if name.startswith(f"{folder}.triton_")]
    kernels = {x for module in modules for name, x in vars(module).items() if re.search("_kernel(_|$)", name)}
    for module in modules:
        for x in vars(module).values():
            if hasattr(x, "cache_clear"):  # launches of another target
                x.cache_clear()

    def compile_and_note(kernel, run, *arguments, **options):
        start = time.perf_counter()
        result = run(kernel, *arguments, **{**options, "warmup": True})
        result.seconds = time.perf_counter() - start
        compiled.append(result)

    for kernel in kernels:
        kernel.device_caches.clear()
        kernel.run = functools.partial(compile_and_note, kernel, type(kernel).run)
    return launchers, compiled


def resources(kernel, target):
    name, shared = kernel.metadata.name, kernel.metadata.shared
    if target.startswith("gfx"):
        assembly = kernel.asm["amdgcn"]
        number = lambda field: int(re.search(rf"\.{field}:\s+(\d+)", assembly)[1])  # noqa: E731
        spilled = number("vgpr_spill_count") + number("private_segment_fixed_size")
        lanes, registers = number("sgpr_spill_count"), number("vgpr_count")
        return Resources(name, spilled, lanes, shared, registers, kernel.seconds, assembly, b"")
    usage = cubin_usage(kernel.asm["cubin"])
    spilled = int(re.search(r"STACK:(\d+)", usage)[1]) + int(re.search(r"LOCAL:(\d+)", usage)[1])
    registers = int(re.search(r"REG:(\d+)", usage)[1])
    return Resources(name, spilled, 0, shared, registers, kernel.seconds, kernel.asm["ptx"], kernel.asm["cubin"])


def check_resources(
    pool, measure, cases, other_faults=lambda case, used: [], stack=lambda case, used: 0, lanes=math.inf
):
    """Compile all cases, tuples that begin with a target, and raise if a kernel spills or overflows shared memory.

    Args:
        pool: the fixture.
        measure: called as ``measure(*case)`` in one of its processes; returns the resources of the case's kernels.
        other_faults: what else is wrong with a kernel, in words.
        stack: bytes of stack that a kernel has without a spill.
        lanes: scalar registers of AMD that may be kept in lanes.
    """
    targets = OLDER_TARGETS if pool.older else SHARED_KIB
    futures = {case: pool.submit(measure, *case) for case in cases if case[0] in targets}
    table, faults = [], []
    for case, future in futures.items():
        for used in future.result():
            row = f"{used.kernel:44} {' '.join(map(str, case))}: {used._replace(kernel='', assembly='', cubin=b'')}"
            table.append(row)
            wrong = other_faults(case, used) if other_faults else []
            wrong += ["spills"] if used.spilled > stack(case, used) or used.lanes > lanes else []
            wrong += ["too much shared memory"] if used.shared > SHARED_KIB[case[0]] * 1024 else []
            faults += [f"{row}: {fault}" for fault in wrong]
    print("\n".join(table))
    assert not faults, "\n".join(faults)


def instruction_faults(used, target, dtype, tensor_cores):
    """Whether 16-bit rows are not read in vectors, and tensor cores not used as they should be."""
    faults = []
    if dtype.itemsize == 2 and re.search(r"ld\.global\.[bu]16|global_load_[us]short", used.assembly):
        faults.append("vectors are not read as such")
    if bool(re.search(MATRIX[target], used.assembly)) != tensor_cores:
        faults.append(f"tensor cores are {'not ' if tensor_cores else ''}used")
    return faults


def interpret(file, chosen=None):
    """Run a file of tests, or those chosen as by `-k`, in Triton's interpreter, which a process has or has not."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__).with_name(file))]
    command += [] if chosen is None else ["-k", chosen]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


def cubin_usage(cubin):
    return cubin_tool("cuobjdump", "-res-usage", cubin)


def cubin_tool(tool, option, cubin):
    """What a program of the CUDA toolkit, which Triton's wheel carries, prints about a compiled kernel."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([path, option, file.name], check=True, capture_output=True, text=True).stdout


def start_worker(cache, folder):
    os.environ["TRITON_CACHE_DIR"] = cache
    if folder is not None:
        sys.path.insert(0, folder)
    torch.set_num_threads(1)


@functools.cache
def workers(cache, folder, owner):
    """Processes of their own: they change Triton's driver, and compile side by side."""
    context = multiprocessing.get_context("spawn")
    return concurrent.futures.ProcessPoolExecutor(os.cpu_count(), context, start_worker, (str(cache), folder))


@pytest.fixture(scope="module", params=["triton 3.6", "triton installed"])
def pool(request, tmp_path_factory):
    older = request.param == "triton 3.6"
    if older and not OLDER.exists():
        pytest.skip(f"pip install --no-deps --target {OLDER} 'triton==3.6.*'")
    cache = tmp_path_factory.mktemp("triton") if EVERYTHING else CACHE / "triton"  # `make aot` shows compile times
    # Kept for the next file that runs in this process, unless this one changes kernels in another way.
    owner = request.module.__name__ if getattr(request.module, "OWN_PROCESSES", False) else None
    processes = workers(cache, str(OLDER) if older else None, owner)
    processes.older = older
    assert processes.submit(triton_version).result().startswith("3.6") == older
    return processes


def triton_version():
    import triton

    return triton.__version__
