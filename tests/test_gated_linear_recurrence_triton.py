"""The Triton kernels of `gated_linear_recurrence` without a GPU: in the interpreter, and compiled ahead of time."""

import pytest
import torch

pytest.importorskip("triton")

from aot import EVERYTHING, TARGETS, check_resources, compile_only, interpret, pool, resources  # noqa: E402, F401

from tritonkern.ops.gated_linear_recurrence.op import Conv, Gate, State  # noqa: E402

# TAPNext's heads; in another dtype, and an odd number of channels, on one target.
USUAL = (64, torch.bfloat16)
OTHERS = [(64, torch.float32), (19, torch.float32)]


@pytest.mark.slow
def test_kernels_in_the_interpreter():
    slow = "opcheck or float64 or float16 and (carried or 64) or 19 and carried or flat or alive or inf or large"
    interpret("test_gated_linear_recurrence.py", f"triton and not ({slow})")


def launch(kernels, width, dtype, frames=5, sequences=3):
    wide, heads = torch.promote_types(dtype, torch.float32), 2
    x, bias = torch.zeros(1, frames, sequences, heads * width, dtype=dtype), torch.zeros(heads * width, dtype=wide)
    conv = Conv(torch.zeros(4, heads * width, dtype=wide), bias)
    gate = Gate(torch.zeros(heads, width, width, dtype=wide), bias.view(heads, width))
    state = State(torch.zeros_like(x[:, :1]).expand(-1, 3, -1, -1), torch.zeros_like(x[:, 0], dtype=wide))
    for before in (state, State(None, None)) if EVERYTHING else (state,):
        carried = before is state
        kernels.forward(x, conv, gate, gate, bias, before)
        needs_grad = [True] * 8 + [carried] * 2
        kernels.backward(x, before.hidden, x, conv, gate, gate, bias, before, x, needs_grad)


def measure(target, width, dtype):
    kernels, compiled = compile_only("gated_linear_recurrence", target)
    launch(kernels, width, dtype)
    return [resources(kernel, target) for kernel in {kernel.hash: kernel for kernel in compiled}.values()]


def stack(case, used):
    """Bytes that the backward kernel keeps in memory, for which registers are too few; the README names them."""
    if not used.kernel.endswith("bwd_kernel"):
        return 0
    return {("sm_80", *USUAL): 700, ("gfx942", *USUAL): 224}.get(case, 96)


@pytest.mark.slow
def test_no_kernel_spills_or_overflows_shared_memory(pool):  # noqa: F811
    chosen = [(target, *case) for target in TARGETS for case in [USUAL, *(OTHERS if EVERYTHING else [])]]
    chosen += [("sm_90", *case) for case in OTHERS] if not EVERYTHING else []
    check_resources(pool, measure, chosen, stack=stack)


def variants(target):
    kernels, compiled = compile_only("gated_linear_recurrence", target)
    for frames, sequences in ((1, 1), (16, 2), (17, 500)):
        launch(kernels, 32, torch.float32, frames, sequences)
    return len({kernel.hash for kernel in compiled}), len(compiled)


@pytest.mark.slow
def test_other_numbers_of_frames_and_sequences_do_not_recompile(pool):  # noqa: F811
    kinds, launches = pool.submit(variants, "sm_90").result()
    assert launches == 3 * kinds and kinds == (6 if EVERYTHING else 3)
