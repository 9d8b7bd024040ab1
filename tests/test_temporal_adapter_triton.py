"""The Triton kernels of `temporal_adapter` without a GPU: in the interpreter, and compiled ahead of time."""

import pytest
import torch

pytest.importorskip("triton")

from aot import EVERYTHING, TARGETS, TRIED_SIBLINGS, check_resources, compile_only, interpret, pool, resources  # noqa: E402, F401

from tritonkern.ops.temporal_adapter import op  # noqa: E402

FLOAT, DOUBLE, HALF = torch.float32, torch.float64, torch.bfloat16
# Channels of the tokens and of hidden, pool, dtype of the tokens, of the convolutions: Chrono-S in bfloat16, Chrono-B
# under autocast, odd numbers, float64. The first for every target; the others for all of them in `make aot`.
CASES = [
    (384, 128, 4, HALF, HALF),
    (768, 128, 4, FLOAT, HALF),
    (19, 13, 1, FLOAT, FLOAT),
    (384, 128, 2, DOUBLE, DOUBLE),
]


@pytest.mark.slow
def test_kernels_in_the_interpreter():
    slow = "gradcheck or shape3 or (shape5 and True) or (float16 and not shape0) or (float64 and not shape2)"
    interpret("test_temporal_adapter.py", f"triton and not ({slow})")


def launch(kernels, channels, inner, side, tokens_dtype, dtype, size=(1, 1, 4, 4), prefix=1):
    """Every kernel in every form. `size` is B, T, h, w."""
    kernels.hidden_dtype = lambda device, dtype: dtype  # as on a GPU
    batch, frames, rows, columns = size
    tokens = torch.zeros(batch, frames, prefix + rows * columns, channels, dtype=tokens_dtype)
    norm, bias = torch.zeros(2, channels, dtype=tokens_dtype).unbind(), torch.zeros(inner, dtype=tokens_dtype)
    norm = [x.clone() for x in norm]
    weight = torch.zeros(inner, channels, 3, 3, dtype=tokens_dtype)
    norm, options = op.Norm(*norm, 1e-5), (op.Grid(rows, columns, side), dtype)
    hidden, mean, rstd = kernels.adapter_in_forward(tokens, norm, op.Conv(weight, bias), *options)
    kernels.adapter_in_backward(hidden, tokens, norm, weight, hidden, mean, rstd, *options, [True] * 3)
    conv = op.Conv(weight.transpose(0, 1).contiguous(), norm.weight)
    kernels.adapter_out_forward(hidden, conv, tokens, *options)
    update = kernels.adapter_out_forward(hidden, conv, None, *options)
    kernels.adapter_out_backward(tokens, hidden, conv.weight, *options, [True, True])
    kernels.adapter_out_backward(update, hidden, conv.weight, *options, [True, True])


def measure(target, *case):
    kernels, compiled = compile_only("temporal_adapter", target)
    launch(kernels, *case)
    return [resources(kernel, target) for kernel in {kernel.hash: kernel for kernel in compiled}.values()]


def rows_not_in_vectors(case, used):
    target, channels, *_, dtype = case
    vectors = channels % 8 == 0 and not used.kernel.endswith("moments") and dtype.itemsize < 8
    missing = vectors and not target.startswith("gfx") and "ld.global.v" not in used.assembly
    return ["rows are not read in vectors"] if missing else []


@pytest.mark.slow
def test_no_kernel_spills_or_overflows_shared_memory(pool):  # noqa: F811
    few = {
        "sm_80": CASES[1:2],
        "sm_90": CASES[1:3],
        "sm_100": CASES[3:],
        "gfx942": [],
        **dict.fromkeys(TRIED_SIBLINGS, []),
    }
    chosen = dict.fromkeys(TARGETS, CASES[1:]) if EVERYTHING else few
    cases = [(target, *case) for target in chosen for case in [CASES[0], *chosen[target]]]
    check_resources(pool, measure, cases, rows_not_in_vectors)


def variants(target):
    kernels, compiled = compile_only("temporal_adapter", target)
    sizes = [((1, 1, 4, 4), 1), ((2, 3, 8, 4), 0), ((1, 16, 16, 16), 5), ((17, 2, 4, 12), 1)]
    for size, prefix in sizes:
        launch(kernels, 384, 32, 4, FLOAT, HALF, size, prefix)
    return len({kernel.hash for kernel in compiled}), len(compiled) / len(sizes)


@pytest.mark.slow
def test_other_sizes_do_not_recompile(pool):  # noqa: F811
    for future in [pool.submit(variants, target) for target in ("sm_90", "gfx942")]:
        assert future.result() == (14, 19)
