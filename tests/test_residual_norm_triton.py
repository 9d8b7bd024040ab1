"""The Triton kernels of `residual_norm` without a GPU: in the interpreter, and compiled ahead of time."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from test_triton_aot import SHARED_KIB, TARGETS, compile_only, pool, resources  # noqa: E402, F401

FLOAT, DOUBLE, HALF = torch.float32, torch.float64, torch.bfloat16
# (channels, residual stream, branch): ViT-S and ViT-g under autocast, bfloat16, an odd row, the widest, float64.
CASES = [(384, FLOAT, HALF), (1536, FLOAT, HALF), (768, HALF, HALF), (19, FLOAT, FLOAT)]
CASES += [(4096, FLOAT, FLOAT), (384, DOUBLE, DOUBLE), (2048, DOUBLE, DOUBLE)]


@pytest.mark.slow
def test_kernels_in_the_interpreter():
    cases = str(Path(__file__).with_name("test_residual_norm.py"))
    chosen = "triton and not compiled and not opcheck and not every_time"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, cases]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


def launch(kernels, channels, dtypes, rows=3):
    x, branch = (torch.zeros(rows, channels, dtype=dtype) for dtype in dtypes)
    gamma, weight, bias = torch.zeros(3, channels)
    kernels.forward(x, branch, gamma, weight, bias, 1e-6, branch.dtype)
    kernels.forward(x, None, None, weight, bias, 1e-6, branch.dtype)
    frozen = [True, True, False, False, False]
    kernels.backward(x, branch, x, branch, gamma, weight, 1e-6, branch.dtype, [True] * 5)
    kernels.backward(x, branch, x, None, gamma, weight, 1e-6, branch.dtype, frozen)


def measure(target, channels, *dtypes):
    kernels, compiled = compile_only("residual_norm", target)
    launch(kernels, channels, dtypes)
    return [resources(kernel, target) for kernel in compiled]


@pytest.mark.slow
def test_no_kernel_spills_or_overflows_shared_memory(pool):  # noqa: F811
    futures = {(target, *case): pool.submit(measure, target, *case) for target in TARGETS for case in CASES}
    faults = []
    for (target, channels, *dtypes), future in futures.items():
        for used in future.result():
            row = f"{target} C={channels} {dtypes}: {used._replace(assembly='')}"
            if used.spilled or used.shared > SHARED_KIB[target] * 1024:
                faults.append(row)
            if dtypes[0].itemsize == 2 and channels % 8 == 0 and "ld.global.b16" in used.assembly:
                faults.append(f"{row}: rows are not read in vectors")
    assert not faults, "\n".join(faults)


def variants(target):
    kernels, compiled = compile_only("residual_norm", target)
    for rows in (1, 2, 16, 17, 5000):
        launch(kernels, 384, (FLOAT, HALF), rows)
    return len({kernel.hash for kernel in compiled}), len(compiled)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_other_numbers_of_rows_do_not_recompile(pool, target):  # noqa: F811
    assert pool.submit(variants, target).result() == (4, 20)
