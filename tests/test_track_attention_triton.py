"""The Triton kernels of `track_attention` without a GPU: in the interpreter, and compiled ahead of time."""

from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton")

from aot import (  # noqa: E402
    EVERYTHING,
    TARGETS,
    TRIED_SIBLINGS,
    check_resources,
    compile_only,
    instruction_faults,
    interpret,
    pool,  # noqa: F401
    resources,
)

from tritonkern.ops.track_attention.op import Points  # noqa: E402

DOUBLE, FLOAT, BFLOAT, HALF = torch.float64, torch.float32, torch.bfloat16, torch.float16
# Scalar registers kept in lanes of vector registers on AMD, which is no memory traffic: the kernels' many arguments.
LANES = 96
PRODUCTS = ("fwd_kernel", "bwd_kernel_query", "bwd_kernel_key_value")


class Case(NamedTuple):
    """A call of one direction, forward and backward, whose launchers start all kernels."""

    target: str
    splat: bool
    head_dim: int
    dtype: torch.dtype
    tf32: bool = False


def cases():
    for target in TARGETS:
        for splat in (False, True):
            if EVERYTHING:
                plain = [(head_dim, dtype) for head_dim in range(8, 257, 8) for dtype in (DOUBLE, FLOAT, BFLOAT, HALF)]
            else:
                plain = [(256, BFLOAT), (256, FLOAT)]
                plain += [(64, BFLOAT), (64, FLOAT)] if target == "sm_90" or not splat else []
                plain += [(128, BFLOAT), (24, HALF), (200, BFLOAT)] if target == "sm_90" and splat else []
                plain += [(256, DOUBLE)] if target == "sm_80" else []
                plain += [(144, FLOAT), (192, FLOAT)] if target == "sm_100" and splat else []  # spilled in other tiles
            yield from (Case(target, splat, *choice) for choice in plain)
            if not target.startswith("gfx") and (
                EVERYTHING or target == "sm_90" and splat
            ):  # PyTorch has no TF32 on AMD
                yield from (Case(target, splat, head_dim, FLOAT, tf32=True) for head_dim in (64, 256))
    if not EVERYTHING:
        yield from (Case(target, True, 256, BFLOAT) for target in TRIED_SIBLINGS)


@pytest.mark.slow
def test_kernels_in_the_interpreter():
    interpret("triton_interpreter_track_cases.py")


def launch(kernels, splat, tracked, gridded, points=True):
    query, key = (gridded, tracked) if splat else (tracked, gridded)
    tracks = query.new_zeros((*tracked.shape[:3], 2), dtype=torch.promote_types(query.dtype, torch.float32))
    inputs = query, key, key, Points(tracks, None, tracks.new_ones(()))
    kernels.forward(*inputs, 0.125, splat, True)
    kernels.backward(query, *inputs, 0.125, splat, True, [points, points])


def measure(*case):
    target, splat, head_dim, dtype, tf32 = case
    kernels, compiled = compile_only("track_attention", target, tf32)
    tracked, gridded = (torch.zeros(1, 2, *x, 2, head_dim, dtype=dtype) for x in ((5,), (3, 4)))
    launch(kernels, splat, tracked, gridded)
    return [resources(kernel, target) for kernel in {kernel.hash: kernel for kernel in compiled}.values()]


def other_faults(case, used):
    name = used.kernel.removeprefix("track_attention_")
    # AMD's matrix units take float32 as it is; the widest heads go without TF32 in backward.
    tf32 = case.tf32 and (case.head_dim <= 128 or name == "fwd_kernel")
    tensor_cores = case.dtype.itemsize == 2 or tf32 or case.dtype == FLOAT and case.target.startswith("gfx")
    return instruction_faults(used, case.target, case.dtype, tensor_cores and name in PRODUCTS)


@pytest.mark.slow
def test_no_kernel_spills_or_overflows_shared_memory(pool):  # noqa: F811
    check_resources(pool, measure, cases(), other_faults, lanes=LANES)


def variants(target):
    """Kernels compiled for one head dim and dtype while every other size, stride and option changes."""
    kernels, compiled = compile_only("track_attention", target)
    for B, T, M, h, w, H in [(2, 3, 5, 6, 7, 3), (1, 1, 1, 1, 1, 1), (16, 1, 16, 16, 16, 16), (1, 3, 48, 1, 33, 2)]:
        for splat in (False, True):
            tracked = torch.zeros(B, T, M, H, 32, dtype=torch.float16)
            gridded = torch.zeros(B, T, h * w + 1, H, 32, dtype=torch.float16)[:, :, 1:].unflatten(2, (h, w))
            launch(kernels, splat, tracked, gridded)
            launch(kernels, splat, tracked.mT.contiguous().mT, gridded.mT.contiguous().mT)
    return len({kernel.hash for kernel in compiled}), len(compiled)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_nothing_but_head_dim_dtype_and_direction_recompiles(pool, target):  # noqa: F811
    hashes, launches = pool.submit(variants, target).result()
    # Five kernels for each direction, of which one is another in backward, the order of the tracks, their places with
    # boxes and without, the nearest one, and the lists.
    assert launches == 208 and hashes == 17
