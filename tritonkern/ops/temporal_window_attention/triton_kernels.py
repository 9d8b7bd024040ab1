"""The launchers of temporal window attention's Triton kernels.

Time is flattened (triton_rows.py): a program owns BLOCK_ROWS consecutive rows of all clips, which follow each other, so
that several short clips fill a tile and a long clip is cut into pieces. It reads only the rows that share a window with
its own. Neighbouring programs read neighbouring addresses, as head and position are the fastest axes of a video.

Output and gradients are computed in one of two ways. On tensor cores ("by tile"), rows are multiplied with tiles of
other rows, and a mask removes what is outside the window. There zero times NaN is NaN, so that one bad frame would
spread over its tile, far beyond its window: a program whose result is not finite discards it and goes the other way.
"By distance", a row takes one frame distance after the other and nothing outside its window. float64 and exact float32
are always computed this way, since not every architecture has tensor cores for them.

Scores are kept in natural units, not powers of two: where a row has one weight only, backward finds exactly 1 for it.
"""

import functools

import torch
import triton
from torch import Tensor

from tritonkern.ops._dtypes import accumulator
from tritonkern.ops._triton import Launch, aligned, block_size, readable
from tritonkern.ops.temporal_window_attention import configs
from tritonkern.ops.temporal_window_attention import triton_rows as flat
from tritonkern.ops.temporal_window_attention import triton_tma as tma
from tritonkern.ops.temporal_window_attention.triton_backward import temporal_window_attention_bwd_kernel
from tritonkern.ops.temporal_window_attention.triton_forward import temporal_window_attention_fwd_kernel


@functools.lru_cache(maxsize=1024)
def _launch(backward: bool, shape, dtype, tf32: bool, strides, left: int, right: int, scale: float) -> Launch:
    """`tf32` is what the choice of tiles looks up."""
    B, T, N, H, D = shape
    rows = B * T * N * H
    if rows * D >= configs.MAX_ELEMENTS or T >= configs.MAX_FRAMES:
        raise ValueError(
            f"query must have fewer than 2**34 elements and 2**29 frames on the triton backend, got {(B, T, N, H, D)}; "
            "split the batch or the positions over several calls"
        )
    left, right = min(left, T - 1), min(right, T - 1)
    tiles = (configs.backward_tiles if backward else configs.forward_tiles)(D, left + right + 1, dtype)
    sizes = (*flat.divisor(T), *flat.divisor(N), *flat.divisor(H), rows, left, right, scale)
    return Launch(
        temporal_window_attention_bwd_kernel if backward else temporal_window_attention_fwd_kernel,
        triton.cdiv(rows, tiles.block_rows), *sizes, *(stride for units in strides for stride in units),
        D=D, BLOCK_D=block_size(D), TENSOR_CORES=tiles.tensor_cores, BLOCK_ROWS=tiles.block_rows,
        BLOCK_OTHERS=tiles.block_others, ROWS=tiles.rows, STAGES=tiles.num_stages,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip


def _run(backward: bool, inputs, saved, outputs, left: int, right: int, scale: float) -> None:
    """Run a kernel on inputs of any strides, contiguous saved tensors and contiguous outputs."""
    like = outputs[0]
    if not like.numel():
        return
    inputs, strides = zip(*[readable(x, configs.MAX_ELEMENTS) for x in inputs], strict=True)
    if configs.DESCRIPTORS and not backward and configs.has_descriptors() and tma.suits(inputs, strides, left, right):
        tma.forward(inputs, strides, outputs, left, right, scale, tma.programs_of(like.device))
        return
    tf32 = like.dtype == torch.float32 and configs.tf32_allowed()
    launch = _launch(backward, like.shape, like.dtype, tf32, strides, left, right, scale)
    launch(*inputs, *[aligned(x) for x in saved], *outputs)


def forward(query: Tensor, key: Tensor, value: Tensor, left: int, right: int, scale: float) -> tuple[Tensor, Tensor]:
    """`[B, T, N, H, D]` three times -> out `[B, T, N, H, D]` and the log-sum-exp of the scores `[B, T, N, H]`."""
    out = query.new_empty(query.shape)
    lse = query.new_empty(query.shape[:-1], dtype=accumulator(query.dtype))
    _run(False, (query, key, value), (), (out, lse), left, right, scale)
    return out, lse


def backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    left: int,
    right: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, each `[B, T, N, H, D]`; out and lse are what `forward` returned."""
    grads = query.new_empty(query.shape), query.new_empty(query.shape), query.new_empty(query.shape)
    _run(True, (grad_out, query, key, value), (out, lse), grads, left, right, scale)
    return grads
