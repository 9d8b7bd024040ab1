"""The Triton kernels of query-key matching without a GPU: in the interpreter, and compiled ahead of time."""

import pytest
import torch

pytest.importorskip("triton")

from aot import EVERYTHING, TARGETS, check_resources, compile_only, interpret, pool, resources  # noqa: E402, F401

HALF, SINGLE, DOUBLE = torch.bfloat16, torch.float32, torch.float64
# (channels, dtype): CogVideoX, HunyuanVideo, two layers side by side, something odd.
CASES = [(64, HALF), (128, torch.float16), (64, SINGLE), (128, HALF), (19, SINGLE), (64, DOUBLE)]


@pytest.mark.slow
def test_kernels_in_the_interpreter():
    interpret("triton_interpreter_query_cases.py")


def launch(kernels, channels, dtype, frames=2, grid=(5, 6), heads=3, cells=7):
    count = grid[0] * grid[1]
    query = torch.zeros(1, frames, count, heads, channels, dtype=dtype)
    chosen = torch.zeros(1, cells, dtype=torch.int64)
    for at, symmetric in ((chosen, True), (None, True), (None, False)):
        peak, points, index, weight = kernels.forward(query, query, at, 0, *grid, 0.1, symmetric, 2.0)
        kernels.backward(peak, points, query, query, at, index, points, weight, 0, *grid, 0.1, symmetric, 2.0)
        cost = kernels.cost_forward(query, query, at, 0, 0.1, symmetric)
        kernels.cost_backward(cost, query, query, at, 0, 0.1, symmetric)
    tokens = query.flatten(1, 2)
    kernels.row_statistics(tokens, tokens, torch.ones(1, tokens.shape[1], dtype=torch.bool), [0, 5, 5, 9], 0.1)
    for renormalise in (True, False):
        kernels.frame_local_attention(tokens, tokens, tokens, 0, frames, False, renormalise, 0.1)


def measure(target, *case):
    kernels, compiled = compile_only("query_key_matching", target)
    launch(kernels, *case)
    unique = {kernel.hash: kernel for kernel in compiled}
    return [resources(kernel, target) for kernel in unique.values()]


@pytest.mark.slow
def test_no_kernel_spills_or_overflows_shared_memory(pool):  # noqa: F811
    # Its kernels take minutes to compile: `make aot` does all.
    targets, chosen = (TARGETS, CASES) if EVERYTHING else (("sm_90", "gfx942"), CASES[:1])
    check_resources(pool, measure, [(target, *case) for target in targets for case in chosen])


def variants(target):
    kernels, compiled = compile_only("query_key_matching", target)
    counts = []
    for frames, grid, heads, cells in ((2, (5, 6), 3, 7), (16, (4, 4), 1, 16), (3, (1, 1), 16, 1)):
        launch(kernels, 32, HALF, frames, grid, heads, cells)
        counts.append(len({kernel.hash for kernel in compiled}))
    return counts


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_other_sizes_do_not_recompile(pool, target):  # noqa: F811
    counts = pool.submit(variants, target).result()
    assert counts[0] == counts[1] == counts[2]
