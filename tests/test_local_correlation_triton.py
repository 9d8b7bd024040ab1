"""The Triton kernels of local correlation without a GPU: in the interpreter, and compiled ahead of time."""

import pytest
import torch

pytest.importorskip("triton")

from aot import EVERYTHING, TARGETS, TRIED_SIBLINGS, check_resources, compile_only, interpret, pool, resources  # noqa: E402, F401

from tritonkern.ops.local_correlation.op import Samples  # noqa: E402

HALF, SINGLE, DOUBLE = torch.bfloat16, torch.float32, torch.float64
# (channels, supports, radius, dtype): CoTracker3, LocoTrack, TAPIR, something odd.
CASES = [(128, 49, 3, SINGLE), (128, 49, 3, HALF), (256, 49, 3, torch.float16), (256, 1, 3, HALF), (19, 70, 4, SINGLE)]
CASES += [(64, 49, 3, DOUBLE)]
# Bytes of stack that are no spilled registers: the kernel uses 72 or 80 of 255.
STACK = {(target, "local_correlation_bwd_kernel_support", 49): 8 for target in ("sm_90", "sm_100")}


@pytest.mark.slow
def test_kernels_in_the_interpreter():
    interpret("triton_interpreter_local_cases.py")


def launch(kernels, channels, supports, radius, dtype, points=3, frames=2, grid=(5, 6), own=False, softmax=True):
    torch.use_deterministic_algorithms(False)
    place = torch.promote_types(dtype, torch.float32)
    features = torch.zeros(1, frames, *grid, channels, dtype=dtype)
    support = torch.zeros(
        (1, points, frames, supports, channels) if own else (1, points, supports, channels), dtype=dtype
    )
    position = torch.zeros(1, frames, points, 2, dtype=place)
    samples = Samples(radius, True, False)
    out = kernels.forward(features, support, position, samples, None)
    kernels.backward(out, features, support, position, samples, None, [True] * 3)
    if softmax:
        kernels.forward(features, support, position, samples, 0.1)
        weights = torch.zeros(frames, points, samples.total * supports, dtype=place)
        kernels._softmax_backward_into(weights, weights, samples, 0.1)


def measure(target, *case):
    kernels, compiled = compile_only("local_correlation", target)
    launch(kernels, *case, softmax=EVERYTHING or case[1] == 49 and case[0] < 256)
    return [resources(kernel, target) for kernel in compiled]


def stack(case, used):
    return STACK.get((case[0], used.kernel, case[2]), 0)


@pytest.mark.slow
def test_no_kernel_spills_or_overflows_shared_memory(pool):  # noqa: F811
    chosen = {target: CASES for target in TARGETS} | ({} if EVERYTHING else dict.fromkeys(TRIED_SIBLINGS, CASES[2:3]))
    check_resources(pool, measure, [(target, *case) for target in chosen for case in chosen[target]], stack=stack)


def variants(target):
    kernels, compiled = compile_only("local_correlation", target)
    for points, frames, grid in ((1, 1, (1, 1)), (16, 16, (16, 16)), (3, 5, (7, 64)), (1, 48, (96, 1))):
        launch(kernels, 32, 9, 1, HALF, points, frames, grid)
    return len({kernel.hash for kernel in compiled}), len(compiled)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_other_clips_points_and_maps_do_not_recompile(pool, target):  # noqa: F811
    assert pool.submit(variants, target).result() == (5, 20)
