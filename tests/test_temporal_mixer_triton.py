"""The Triton kernels of `temporal_mixer` without a GPU: in the interpreter, and compiled ahead of time."""

import pytest
import torch

pytest.importorskip("triton")

from aot import EVERYTHING, TARGETS, TRIED_SIBLINGS, check_resources, compile_only, interpret, pool, resources  # noqa: E402, F401

from tritonkern.ops.temporal_mixer.op import Conv, State  # noqa: E402

# TAPIR's channels in two dtypes, an odd number, the widest rows.
CASES = [(512, torch.float32), (512, torch.bfloat16), (19, torch.float32), (4096, torch.float64)]


@pytest.mark.slow
def test_kernels_in_the_interpreter():
    slow = "sets or float64 or 1030 or 512 or 70 or 33 or 40 or inf or with_a_state"
    interpret("test_temporal_mixer.py", f"triton and not ({slow})")


def launch(kernels, channels, dtype, tracks=3, frames=5):
    x = torch.zeros(1, tracks, frames, channels, dtype=dtype)
    weight, bias = torch.zeros(4 * channels, 1, 3), torch.zeros(4 * channels)
    norm, conv = torch.zeros(channels), Conv(weight, bias)
    states = [
        x.new_zeros(1, tracks, 2, c, dtype=torch.promote_types(dtype, torch.float32)) for c in (channels, 4 * channels)
    ]
    kernels.forward(x, norm, conv, conv, False, 1e-5, State(None, None))
    kernels.forward(x, norm, conv, conv, True, 1e-5, State(*states))
    kernels.backward(x, x, norm, conv, weight, False, 1e-5, [True] * 6)
    kernels.backward(x, x, norm, conv, weight, False, 1e-5, [True] + [False] * 5)


def measure(target, channels, dtype):
    kernels, compiled = compile_only("temporal_mixer", target)
    launch(kernels, channels, dtype)
    return [resources(kernel, target) for kernel in {kernel.hash: kernel for kernel in compiled}.values()]


def stack(case, used):
    """Bytes of stack without a shortage of registers (56 of 255 are used): Triton 3.9 keeps one number across the
    subroutine of a 64-bit division, outside of loops."""
    return 8 * ((case, used.kernel) == (("sm_80", 19, torch.float32), "temporal_mixer_bwd_kernel_norm"))


@pytest.mark.slow
def test_no_kernel_spills_or_overflows_shared_memory(pool):  # noqa: F811
    chosen = {target: CASES for target in TARGETS} | ({} if EVERYTHING else dict.fromkeys(TRIED_SIBLINGS, CASES[:2]))
    check_resources(pool, measure, [(target, *case) for target in chosen for case in chosen[target]], stack=stack)


def variants(target):
    kernels, compiled = compile_only("temporal_mixer", target)
    for tracks, frames in ((1, 1), (2, 16), (16, 17), (5000, 8)):
        launch(kernels, 64, torch.float32, tracks, frames)
    return len({kernel.hash for kernel in compiled}), len(compiled)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_other_numbers_of_tracks_and_frames_do_not_recompile(pool, target):  # noqa: F811
    kinds, launches = pool.submit(variants, target).result()
    assert launches == 4 * 16 and kinds == 1 + 2 + 2 * 4 + 1
