"""Query-key matching against step by step, C kept and heads added one after another, and the products alone."""

import functools

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from tritonkern import attention_row_statistics, frame_local_attention, query_key_matching

# [H, h, w, D] of CogVideoX-2B at 480 x 720 pixels.
HEADS, GRID, DIM = 30, (30, 45), 64
CELLS = GRID[0] * GRID[1]


def pair(device, heads=HEADS, frames=2):
    torch.manual_seed(0)
    return torch.randn(2, 1, heads, frames, CELLS, DIM, device=device).permute(0, 1, 3, 4, 2, 5).unbind(0)


def step_by_step(query, key, cells=None, symmetric=True):
    """All heads at once, as published."""
    rows = query[:, 0] if cells is None else query[:, 0][:, cells[0]]
    cost = (torch.einsum("bshd,bthd->bhst", rows, key[:, 1]) * DIM**-0.5).softmax(-1).mean(1)
    if symmetric:
        back = (torch.einsum("bthd,bshd->bhts", query[:, 1], key[:, 0]) * DIM**-0.5).softmax(-1).mean(1).mT
        cost = (cost + (back if cells is None else back[:, cells[0]])) / 2
    return cost.amax(-1)


def kept(query, key):
    """One head after another."""
    cost = query.new_zeros(CELLS, CELLS)
    for n in range(query.shape[3]):
        cost += (query[0, 0, :, n] * DIM**-0.5 @ key[0, 1, :, n].T).softmax(-1)
        cost += (query[0, 1, :, n] * DIM**-0.5 @ key[0, 0, :, n].T).softmax(-1).T
    return (cost / (2 * query.shape[3])).amax(-1)[None]


def products(query, key):
    for n in range(query.shape[3]):
        torch.mm(query[0, 0, :, n], key[0, 1, :, n].T)
        torch.mm(query[0, 1, :, n], key[0, 0, :, n].T)


def timed_only(function, *args):
    function(*args)


def ours(query, key, **options):
    return query_key_matching(query, key, grid=GRID, **options).peak[:, 1]


@torch.no_grad()
def test_all_cells(compare, device):
    query, key = pair(device)
    calls = {
        "tritonkern": functools.partial(ours, query, key),
        "products alone": functools.partial(products, query, key),
        "C kept": functools.partial(kept, query, key),
        "step by step": functools.partial(step_by_step, query, key),
    }
    flops = 4 * HEADS * CELLS**2 * DIM
    compare("query_key_matching", (HEADS, *GRID, DIM), torch.float32, "forward", calls, 16 * query.numel(), flops, 64)


@pytest.mark.parametrize("symmetric", [True, False], ids=["both ways", "one way"])
@torch.no_grad()
def test_200_cells(compare, device, symmetric):
    query, key = pair(device)
    cells = torch.randint(0, CELLS, (1, 200), device=device)
    calls = {
        "tritonkern": functools.partial(ours, query, key, cells=cells, symmetric=symmetric),
        "step by step, these cells": functools.partial(step_by_step, query, key, cells, symmetric),
        # As published; a time to compare with, not the same result.
        "step by step": functools.partial(timed_only, step_by_step, query, key),
    }
    shape = (HEADS, *GRID, DIM, 200, int(symmetric))
    flops = 2 * HEADS * CELLS * DIM * (200 + CELLS * symmetric)
    compare("query_key_matching", shape, torch.float32, "forward", calls, 16 * query.numel(), flops, 64)


def test_peak_with_gradients(compare, device):
    heads = 10
    leaves = [x.contiguous().requires_grad_() for x in pair(device, heads)]

    def gradients(function):
        return torch.autograd.grad(function(*leaves).sum(), leaves)

    calls = {
        "tritonkern": functools.partial(gradients, ours),
        "autograd of step by step": functools.partial(gradients, step_by_step),
    }
    flops = 16 * heads * CELLS**2 * DIM
    shape = (heads, *GRID, DIM)
    compare(
        "query_key_matching", shape, torch.float32, "forward and backward", calls, 64 * leaves[0].numel(), flops, 256
    )


@torch.no_grad()
def test_rows(compare, device):
    torch.manual_seed(0)
    rows, key = torch.randn(1, 400, HEADS, DIM, device=device), torch.randn(1, 17776, HEADS, DIM, device=device)
    segments = [(0, 226), *((226 + i * CELLS, 226 + (i + 1) * CELLS) for i in range(13))]

    def step_by_step():
        mean = (torch.einsum("bnhd,bjhd->bhnj", rows, key) * DIM**-0.5).softmax(-1).mean(1)
        return torch.stack([mean[..., a:b].amax(-1) for a, b in segments], -1)

    def product():
        for n in range(HEADS):
            torch.mm(rows[0, :, n], key[0, :, n].T)

    calls = {
        "tritonkern": lambda: attention_row_statistics(rows, key, segments)[0],
        "products alone": product,
        "step by step": step_by_step,
    }
    flops = 2 * HEADS * 400 * 17776 * DIM
    shape = (HEADS, 400, 17776, DIM)
    compare("attention_row_statistics", shape, torch.float32, "forward", calls, 4 * key.numel(), flops, 64)


@pytest.mark.parametrize("renormalise", [False, True], ids=["dropped", "renormalised"])
@torch.no_grad()
def test_frame_local(compare, device, renormalise):
    torch.manual_seed(0)
    text, frames, cells = 226, 5, 450
    n = text + frames * cells
    query, key, value = torch.randn(3, 1, n, HEADS, DIM, device=device).unbind(0)
    frame = torch.arange(n, device=device).sub(text).div(cells, rounding_mode="floor").clamp(min=-1)
    seen = (frame[:, None] == frame) | (frame[:, None] < 0) | (frame < 0)

    def step_by_step():
        scores = torch.einsum("bihd,bjhd->bhij", query, key) * DIM**-0.5
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1) if renormalise else scores.softmax(-1) * seen
        return torch.einsum("bhij,bjhd->bihd", weights, value)

    def without_mask():  # a time to compare with, not the same result
        scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value)))

    options = dict(text=text, frames=frames, renormalise=renormalise)
    calls = {
        "tritonkern": lambda: frame_local_attention(query, key, value, **options),
        "SDPA without a mask": without_mask,
        "step by step": step_by_step,
    }
    visible = int(seen.sum())
    flops = 2 * HEADS * DIM * (visible + (visible if renormalise else n * n))
    shape = (HEADS, text, frames, cells, DIM, int(renormalise))
    compare("frame_local_attention", shape, torch.float32, "forward", calls, 16 * query.numel(), flops, 64)
