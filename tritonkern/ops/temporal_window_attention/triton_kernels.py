"""The launchers of temporal window attention's Triton kernels.

Time is flattened (triton_rows.py): a program owns BLOCK_ROWS consecutive rows of all clips, which follow each other, so
that several short clips fill a tile and a long clip is cut into pieces. It meets only the rows that share a window with
its own. Neighbouring programs read neighbouring addresses, as head and position are the fastest axes of a video.

Output and gradients are computed in one of two ways. On tensor cores ("by tile"), rows meet tiles of other rows, and a
mask removes what is outside the window. There zero times NaN is NaN, so that one bad frame would spread over its tile,
far beyond its window: a program whose result is not finite discards it and goes the other way. "By distance", a row
meets one frame distance after the other and nothing outside its window. float64 and exact float32 are always computed
this way, since not every architecture has tensor cores for them.

Scores are kept in natural units, not powers of two: where a row has one weight only, backward finds exactly 1 for it.
"""

import triton
from torch import Tensor

from tritonkern.ops._dtypes import accumulator
from tritonkern.ops._triton import aligned, block_size, launch, readable
from tritonkern.ops.temporal_window_attention import configs
from tritonkern.ops.temporal_window_attention import triton_rows as flat
from tritonkern.ops.temporal_window_attention.triton_backward import temporal_window_attention_bwd_kernel
from tritonkern.ops.temporal_window_attention.triton_forward import temporal_window_attention_fwd_kernel


def _launch(kernel, inputs, saved, outputs, choose, left: int, right: int, scale: float) -> None:
    """Run a kernel on inputs of any strides, contiguous saved tensors and contiguous outputs."""
    B, T, N, H, D = outputs[0].shape
    rows = B * T * N * H
    if rows == 0:
        return
    if rows * D >= configs.MAX_ELEMENTS or T >= configs.MAX_FRAMES:
        raise ValueError(
            f"query must have fewer than 2**34 elements and 2**29 frames on the triton backend, got {(B, T, N, H, D)}; "
            "split the batch or the positions over several calls"
        )
    left, right = min(left, T - 1), min(right, T - 1)
    inputs, strides = zip(*(readable(x, configs.MAX_ELEMENTS) for x in inputs), strict=True)
    tiles = choose(D, left + right + 1, inputs[0].dtype)
    sizes = (*flat.divisor(T), *flat.divisor(N), *flat.divisor(H), rows, left, right, scale)
    launch(
        kernel, triton.cdiv(rows, tiles.block_rows),
        *inputs, *(aligned(x) for x in saved), *outputs, *sizes, *(stride for unit in strides for stride in unit),
        D=D, BLOCK_D=block_size(D), TENSOR_CORES=tiles.tensor_cores, BLOCK_ROWS=tiles.block_rows,
        BLOCK_OTHERS=tiles.block_others, ROWS=tiles.rows, STAGES=tiles.num_stages,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip


def forward(query: Tensor, key: Tensor, value: Tensor, left: int, right: int, scale: float) -> tuple[Tensor, Tensor]:
    """`[B, T, N, H, D]` three times -> out `[B, T, N, H, D]` and the log-sum-exp of the scores `[B, T, N, H]`."""
    out = query.new_empty(query.shape)
    lse = query.new_empty(query.shape[:-1], dtype=accumulator(query.dtype))
    _launch(
        temporal_window_attention_fwd_kernel,
        (query, key, value),
        (),
        (out, lse),
        configs.forward_tiles,
        left,
        right,
        scale,
    )
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
    inputs = (grad_out, query, key, value)
    _launch(temporal_window_attention_bwd_kernel, inputs, (out, lse), grads, configs.backward_tiles, left, right, scale)
    return grads
