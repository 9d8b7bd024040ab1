"""The Triton kernels of `correlation_soft_argmax` and `soft_argmax_2d`, compiled ahead of time without a GPU."""

import itertools
import re
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton")

from aot import (  # noqa: E402
    DTYPES,
    EVERYTHING,
    TARGETS,
    TRIED_SIBLINGS,
    check_resources,
    compile_only,
    instruction_faults,
    pool,  # noqa: F401
    resources,
)

from tritonkern.ops.correlation_soft_argmax.op import NAME, Grads, Outputs2d, Saved  # noqa: E402

# Scalar registers kept in lanes of vector registers, of 6400 (100 vector registers of 64 lanes): arguments of the
# kernels that sum gradients.
LANES = 96


class Case(NamedTuple):
    """A call, whose launcher starts several kernels."""

    target: str
    function: str
    channels: int
    dtype: torch.dtype
    cosine: bool = False
    tf32: bool = False


def launch(kernels, function, query, features, cosine, radius=5.0):
    pairs = query.shape[0], query.shape[1], features.shape[1]
    real = query.new_ones(pairs, dtype=torch.promote_types(query.dtype, torch.float32))
    cells, points = real.int(), torch.stack([real, real], -1)
    if function == "forward":
        kernels.forward(query, features, 20.0, radius, cosine, 1e-6)
    elif function == "backward":
        inverse_norms = (real.new_ones(x.shape[:-1] if cosine else 0) for x in (query, features))
        saved = Saved(points, real, cells, cells, real, *inverse_norms)
        kernels.backward(Grads(points, real, real, real), query, features, saved, 20.0, radius, cosine, 1e-6)
    elif function == "soft_argmax_2d_forward":
        kernels.soft_argmax_2d_forward(features[..., 0], 20.0, radius)
    else:
        saved = Outputs2d(points[:, 0], real[:, 0], cells[:, 0], real[:, 0])
        kernels.soft_argmax_2d_backward(points[:, 0], features[..., 0], saved, 20.0, radius)


def measure(*case):
    target, function, channels, dtype, cosine, tf32 = case
    kernels, compiled = compile_only(NAME, target, tf32)
    query = torch.zeros(2, 3, channels, dtype=dtype)
    features = torch.zeros(2, 5, 6, 7, channels, dtype=dtype)
    launch(kernels, function, query, features, cosine)
    return [resources(kernel, target) for kernel in {kernel.hash: kernel for kernel in compiled}.values()]


def cases():
    """Calls whose launchers start all kernels of the operation; `make aot` (TRITONKERN_AOT=all) has more of them."""
    half, single, double = torch.bfloat16, torch.float32, torch.float64
    for target in TARGETS:
        for function in ("forward", "backward"):
            if EVERYTHING:
                for channels, cosine in itertools.product((8, 24, 32, 64, 768), (False, True)):
                    yield from (Case(target, function, channels, dtype, cosine) for dtype in DTYPES)
            else:
                yield from (Case(target, function, 768, dtype, cosine=True) for dtype in (half, single))
                if target in ("sm_90", "gfx942"):
                    yield Case(target, function, 768, torch.float16)
            if target == "sm_80":
                yield Case(target, function, 768, double, cosine=True)
            if not target.startswith("gfx") and (EVERYTHING or target == "sm_90"):
                yield Case(target, function, 768, single, cosine=True, tf32=True)
        for function in ("soft_argmax_2d_forward", "soft_argmax_2d_backward"):
            yield from (Case(target, function, 1, dtype) for dtype in (DTYPES if EVERYTHING else (half,)))
    if not EVERYTHING:
        for target, function in itertools.product(TRIED_SIBLINGS, ("forward", "backward")):
            yield Case(target, function, 768, half, cosine=True)
        yield Case("sm_90", "forward", 384, single, cosine=True)  # spilled in Triton 3.6


def other_faults(case, used):
    if not used.kernel.endswith(("_statistics", "_points", "_query")):
        return []
    # AMD's matrix units take float32 as it is.
    single = case.dtype == torch.float32 and (case.tf32 or case.target.startswith("gfx"))
    return instruction_faults(used, case.target, case.dtype, case.dtype.itemsize == 2 or single)


@pytest.mark.slow
def test_no_kernel_spills_or_overflows_shared_memory(pool):  # noqa: F811
    check_resources(pool, measure, cases(), other_faults, lanes=LANES)


def variants(target):
    """Names of all kernels compiled for one block of channels while every other size, stride and option changes."""
    kernels, compiled = compile_only(NAME, target)
    sizes = [(2, 3, 5, 6, 7, 48), (1, 1, 1, 1, 1, 64), (1, 16, 16, 16, 16, 40), (16, 48, 1, 64, 2, 33)]
    for (B, N, T, h, w, C), radius in itertools.product(sizes, (0.5, 5.0, float("inf"))):
        query = torch.zeros(B, N, C, dtype=torch.float16)
        features = torch.zeros(B, T, h * w + 1, C, dtype=torch.float16)[:, :, 1:].unflatten(2, (h, w))
        for function in ("forward", "backward", "soft_argmax_2d_forward", "soft_argmax_2d_backward"):
            launch(kernels, function, query, features, True, radius)
            launch(kernels, function, query, features.mT.contiguous().mT, True, radius)
    names = {kernel.metadata.name for kernel in compiled}
    return len({kernel.hash for kernel in compiled}), len(names), len(compiled)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_nothing_but_channels_dtype_and_cosine_recompiles(pool, target):  # noqa: F811
    hashes, names, launches = pool.submit(variants, target).result()
    # soft_argmax_2d has kernels of its own for rows that start on 16 bytes.
    assert launches > 200 and names == 13 and hashes == names + 2


def measure_rows(target, dtype):
    kernels, compiled = compile_only(NAME, target)
    launch(kernels, "soft_argmax_2d_forward", *cost_volumes(dtype))
    launch(kernels, "soft_argmax_2d_backward", *cost_volumes(dtype))
    return [resources(kernel, target) for kernel in compiled]


def cost_volumes(dtype):
    """A query, and features of which the cost volume is the first channel: rows of 64 adjacent numbers."""
    features = torch.zeros(1, 2, 8, 1, 64, dtype=dtype).mT
    return torch.zeros(1, 2, 1, dtype=dtype), features, False


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_aligned_rows_of_cost_volumes_move_in_vectors(pool, target):  # noqa: F811
    for used in pool.submit(measure_rows, target, torch.bfloat16).result():
        single = re.findall(r"(?:ld|st)\.global\.[bu]16|global_(?:load|store)_[us]?short", used.assembly)
        # The disc of forward begins anywhere: two of its 256 numbers per thread.
        assert len(single) <= (2 if used.kernel == "soft_argmax_2d_fwd_kernel" else 0), f"{used.kernel}: {single}"
