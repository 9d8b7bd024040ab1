"""Temporal window attention in Triton without a GPU: compiled ahead of time for every target, see aot.py."""

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
    triton_version,
)

# Scalar registers kept in lanes of vector registers, which is no memory traffic. Masks of heads above 128 that are no
# power of two take them.
LANES = {("backward", target, d): 16 for target in ("gfx942", "gfx950") for d in range(136, 256, 8)}
# Of kernels whose keys have other frames than the queries, which take the sizes of both.
LANES_CONTINUED = 40
BUCKETS = (16, 32, 64, 128, 256)
NARROW, WIDE = 13, 201


class Case(NamedTuple):
    """A call of temporal window attention."""

    target: str
    direction: str
    head_dim: int
    dtype: torch.dtype
    window: int = NARROW
    tf32: bool = False
    more: int = 0  # frames of keys than of queries


def cases():
    for direction in ("forward", "backward"):
        for target in TARGETS:
            if EVERYTHING:
                plain = [(head_dim, dtype) for head_dim in range(8, 257, 8) for dtype in DTYPES]
                special = BUCKETS
            else:
                plain = [(head_dim, torch.bfloat16) for head_dim in (16, 64, 256)]
                plain += [(64, torch.float32), (256, torch.float32), (256, torch.float64)]
                if target == "sm_90":
                    plain += [(head_dim, torch.bfloat16) for head_dim in (24, 32, 128, 200)] + [(64, torch.float16)]
                    plain += [(16, torch.float32), (16, torch.float64), (64, torch.float64)]
                special = (256,)
            yield from (Case(target, direction, *choice) for choice in plain)
            if direction == "forward":  # backward tiles are the same for every window
                yield from (Case(target, direction, head_dim, torch.bfloat16, window=WIDE) for head_dim in special)
            if not target.startswith("gfx"):  # PyTorch has no TF32 there
                yield from (Case(target, direction, head_dim, torch.float32, tf32=True) for head_dim in special)
            if EVERYTHING or target in ("sm_90", "sm_100"):
                continued = [(64, torch.bfloat16), (256, torch.bfloat16), (32, torch.float32)]
                yield from (Case(target, direction, *choice, more=30) for choice in continued)
        if not EVERYTHING:
            yield from (Case(target, direction, d, torch.bfloat16) for target in TRIED_SIBLINGS for d in (64, 256))


def launch(kernels, direction, tensors, window):
    query, key, value = tensors
    half, offset = window // 2, key.shape[1] - query.shape[1]
    if direction == "forward":
        kernels.forward(query, key, value, half, half, 0.125, offset)
    else:
        lse = query.new_zeros(query.shape[:-1], dtype=torch.promote_types(query.dtype, torch.float32))
        kernels.backward(query, query, key, value, query, lse, half, half, 0.125, offset)


def measure(*case):
    target, direction, head_dim, dtype, window, tf32, more = case
    kernels, compiled = compile_only("temporal_window_attention", target, tf32)
    frames = window + 3 * (more > 0)  # of 16 frames on, tiles are used
    query, key = (torch.zeros(1, n, 1, 1, head_dim, dtype=dtype) for n in (frames, frames + more))
    launch(kernels, direction, [query, key, key], window)
    assert len(compiled) == (2 if more and direction == "backward" else 1)
    return [resources(kernel, target) for kernel in compiled]


def other_faults(case, used):
    faults = instruction_faults(used, case.target, case.dtype, case.dtype.itemsize == 2 or case.tf32)
    allowed = LANES_CONTINUED if case.more else LANES.get((case.direction, case.target, case.head_dim), 0)
    if used.lanes > allowed:
        faults.append("scalar registers in lanes")
    return faults


@pytest.mark.slow
def test_no_kernel_spills_or_overflows_shared_memory(pool):  # noqa: F811
    check_resources(pool, measure, cases(), other_faults)


def measure_descriptors(target, head_dim, frames, dtype):
    kernels, compiled = compile_only("temporal_window_attention", target)
    kernels.configs.DESCRIPTORS, kernels.configs.has_descriptors = True, lambda: True
    kernels.tma.programs_of = lambda device: 528
    try:
        launch(kernels, "forward", [torch.zeros(2, frames, 3, 2, head_dim, dtype=dtype)] * 3, NARROW)
    finally:
        kernels.configs.DESCRIPTORS = False
    (kernel,) = compiled
    assert kernel.metadata.name.endswith("_tma")
    return [resources(kernel, target)]


def without_descriptors(case, used):
    return [] if "cp.async.bulk.tensor" in used.assembly else ["tiles are not loaded by descriptors"]


@pytest.mark.slow
def test_tensor_descriptors(pool):  # noqa: F811
    if pool.submit(triton_version).result().startswith("3.6"):
        pytest.skip("Triton 3.6 fails inside its passes; the kernel is off")
    choices = [(64, 64, torch.bfloat16), (64, 200, torch.bfloat16), (32, 24, torch.bfloat16)]
    if EVERYTHING:
        choices += [(d, t, torch.float16) for d in (8, 16, 24, 32, 64, 96, 128) for t in (5, 24, 40, 64, 200)]
    cases = [(target, *choice) for target in ("sm_90", "sm_100", "sm_120") for choice in choices]
    check_resources(pool, measure_descriptors, cases, without_descriptors)


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
def test_nothing_but_head_dim_window_and_dtype_recompiles(pool, direction, target):  # noqa: F811
    hashes, launches = pool.submit(variants, direction, target).result()
    assert launches == 54 and len(hashes) == 1
