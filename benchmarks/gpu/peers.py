"""What a user would write in place of the operations: SDPA with a mask or a stored bias, flex_attention, a product.

For the correlation pyramid, the package localcorr where it is installed.
"""

from __future__ import annotations

import functools
import time

import torch
from calls import BF16, REAL, Case
from rows import Part
from timing import CUDA, DEVICE, device_times, host_microseconds
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from tritonkern import correlation_pyramid

WINDOWS = ("window gpu", "window chrono", "window rgb")


def run(part: Part) -> None:
    cases = {case.name: case for case in REAL}
    for name in WINDOWS:
        part.item(f"{name} SDPA with a mask", functools.partial(_masked, cases[name]))
    for name in ("sample vit-b", "splat vit-b"):
        part.item(f"{name} SDPA with a stored bias", functools.partial(_biased, cases[name]))
    part.item("match gpu, the product alone", functools.partial(_product, cases["match gpu"]))
    for peer in (False, True):
        name = "localcorr's Triton kernel" if peer else "tritonkern"
        part.item(f"correlation pyramid, AllTracker at 384 x 512, {name}", functools.partial(_pyramid, peer))
    part.item("window gpu varlen_attn", functools.partial(_varlen, cases["window gpu"]))
    part.item("window gpu flex_attention", functools.partial(_flex, cases["window gpu"]), 40)


def _tensors(case: Case) -> list[Tensor]:
    return case.make(case.shape if CUDA else case.tiny, BF16, "reference")[0]


@torch.no_grad()
def _masked(case: Case) -> dict:
    query, key, value = (x.movedim(1, 3).flatten(0, 1) for x in _tensors(case))  # [B * N, H, T, D]
    frame = torch.arange(query.shape[2], device=DEVICE)
    band = (frame[:, None] - frame).abs() <= 6
    call = functools.partial(sdpa, query, key, value, attn_mask=band)
    return device_times(call) | {"host_us": host_microseconds(call)}


@torch.no_grad()
def _biased(case: Case) -> dict:
    # [T, H, rows, D]: the cells of a frame in one row.
    query, key, value = (x.flatten(2, -3)[0].transpose(1, 2) for x in _tensors(case))
    bias = torch.randn(query.shape[0], 1, query.shape[2], key.shape[2], device=DEVICE).to(BF16)
    return device_times(functools.partial(sdpa, query, key, value, attn_mask=bias))


@torch.no_grad()
def _product(case: Case) -> dict:
    query, features = _tensors(case)
    call = functools.partial(torch.matmul, query[0], features.flatten(0, 3).mT)
    return device_times(call, 5) | {"flops": case.flops[0]}


@torch.no_grad()
def _pyramid(peer: bool) -> dict:
    """All five levels of 16 frames, each cell somewhere near its own place; localcorr has zeros outside of a map."""
    frames, rows, columns, channels, levels = (16, 48, 64, 256, 5) if CUDA else (1, 4, 4, 8, 2)
    maps = torch.randn(2, frames, rows, columns, channels, device=DEVICE)
    flow = torch.randn(frames, 1, rows, columns, 2, device=DEVICE) * 3
    ours = functools.partial(correlation_pyramid, maps[0], maps[1].unsqueeze(1), flow, levels, 4)
    if not peer:
        return device_times(ours, 5)
    try:
        from localcorr import get_localcorr_block
    except ImportError:
        return {"skipped": "localcorr is not installed"}
    if not CUDA:
        return {"skipped": "its kernels need a GPU"}
    y, x = torch.meshgrid(torch.arange(rows, device=DEVICE), torch.arange(columns, device=DEVICE), indexing="ij")
    coords = (flow[:, 0] + torch.stack([x, y], -1)).movedim(-1, 1).contiguous()
    call = functools.partial(get_localcorr_block(*maps.movedim(-1, 2), levels, 4, "localcorr_triton"), coords)
    # It multiplies in the dtype of its inputs, perhaps in TF32.
    torch.testing.assert_close(call(), ours()[:, 0].movedim(-1, 1), rtol=1e-2, atol=1e-2)
    return device_times(call, 5)


@torch.no_grad()
def _varlen(case: Case) -> dict:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return {"skipped": f"torch {torch.__version__} has no varlen_attn"}
    query, key, value = (x.flatten(0, 2) for x in _tensors(case))  # one position: clips follow each other
    frames = case.shape[1] if CUDA else case.tiny[1]
    starts = torch.arange(0, len(query) + 1, frames, device=DEVICE, dtype=torch.int32)
    call = functools.partial(varlen_attn, query, key, value, starts, starts, frames, frames, window_size=(6, 6))
    try:
        call()
    except (TypeError, NotImplementedError) as error:
        return {"skipped": str(error)}
    return device_times(call) | {"host_us": host_microseconds(call)}


@torch.no_grad()
def _flex(case: Case) -> dict:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if not CUDA:
        return {"skipped": "compiled for a GPU only"}
    frames = case.shape[1]
    mask = create_block_mask(lambda b, h, i, j: (i - j).abs() <= 6, None, None, frames, frames, device=DEVICE)
    query, key, value = (x.movedim(1, 3).flatten(0, 1) for x in _tensors(case))
    call = functools.partial(torch.compile(flex_attention, dynamic=False), query, key, value, block_mask=mask)
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    first = time.perf_counter() - start
    return device_times(call) | {"first_call": first}
