"""The Triton kernel of `temporal_block` without a GPU: in the interpreter (float16; float32 goes step by step), and
compiled ahead of time."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from test_triton_aot import MATRIX, SHARED_KIB, TARGETS, compile_only, pool, resources  # noqa: E402, F401

HALF = torch.bfloat16
# (channels, heads, dtype): Chrono's, odd heads.
CASES = [(128, 4, HALF), (72, 3, torch.float16)]


@pytest.mark.slow
def test_kernel_in_the_interpreter():
    cases = str(Path(__file__).with_name("test_temporal_block.py"))
    # What is not float16 goes step by step, with kernels that have tests of their own.
    chosen = "triton and float16 and not bfloat16 and (nan or inf or gradients) and not 128"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, cases]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


def launch(kernels, channels, heads, dtype, shape=(1, 9, 2), window=(6, 6), spread=False):
    x = torch.zeros(*shape, 2 * channels, dtype=dtype)[..., :channels]
    norm, bias = torch.zeros(channels), torch.zeros(3 * channels)
    qkv, proj = torch.zeros(3 * channels, channels), torch.zeros(channels, channels)
    kernels.forward(x if spread else x.contiguous(), norm, norm, qkv, bias, proj, norm, heads, *window, 1e-5)


def compiled_for(target):
    kernels, compiled = compile_only("temporal_block", target)
    kernels.configs.before_hopper = lambda: target == "sm_80"
    return kernels, compiled


def measure(target, *case):
    kernels, compiled = compiled_for(target)
    launch(kernels, *case)
    (kernel,) = compiled
    return resources(kernel, target)


@pytest.mark.slow
def test_the_kernel_neither_spills_nor_overflows_shared_memory(pool):  # noqa: F811
    futures = {(target, *case): pool.submit(measure, target, *case) for target in TARGETS for case in CASES}
    faults = []
    for (target, *case), future in futures.items():
        used = future.result()
        row = f"{target} {case}: {used._replace(assembly='')}"
        if used.spilled or used.shared > SHARED_KIB[target] * 1024:
            faults.append(row)
        if not re.search(MATRIX[target], used.assembly):
            faults.append(f"{row}: tensor cores are not used")
    assert not faults, "\n".join(faults)


def variants(target):
    kernels, compiled = compiled_for(target)
    for shape in [(2, 3, 5), (1, 1, 1), (1, 16, 1), (16, 16, 16), (3, 48, 2), (1, 70, 33)]:
        for window in [(0, 0), (6, 6), (16, 3)]:
            launch(kernels, 32, 2, torch.float16, shape, window)
            launch(kernels, 32, 2, torch.float16, shape, window, spread=True)
    return len({kernel.hash for kernel in compiled}), len(compiled)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_other_sizes_and_windows_do_not_recompile(pool, target):  # noqa: F811
    assert pool.submit(variants, target).result() == (1, 36)
