"""The launchers of temporal window attention's Triton kernels.

Time is flattened (triton_rows.py): a program owns BLOCK_ROWS consecutive rows of all clips, which follow each other, so
that several short clips fill a tile and a long clip is cut into pieces. It reads only the rows that share a window with
its own. Neighbouring programs read neighbouring addresses, as head and position are the fastest axes of a video.

Output and gradients are computed in one of two ways. On tensor cores ("by tile"), rows are multiplied with tiles of
other rows, and a mask removes what is outside the window. There zero times NaN is NaN, so that one bad frame would
spread over its tile, far beyond its window: a program whose result is not finite discards it and goes the other way.
"By distance", a row takes one frame distance after the other and nothing outside its window. float64 and exact float32
are always computed this way, since not every architecture has tensor cores for them.

Where keys and values have other frames than the queries ("continued"), rows of the two sides are numbered differently
and the kernels are compiled once more: the plain case pays nothing. Backward is then launched for each side.

Scores are kept in natural units, not powers of two: where a row has one weight only, backward finds exactly 1 for it.
"""

import functools
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from tritonkern.ops._dtypes import accumulator
from tritonkern.ops._triton import Launch, aligned, block_size, readable, register_limit
from tritonkern.ops.temporal_window_attention import configs
from tritonkern.ops.temporal_window_attention import triton_rows as flat
from tritonkern.ops.temporal_window_attention import triton_tma as tma
from tritonkern.ops.temporal_window_attention.triton_backward import temporal_window_attention_bwd_kernel
from tritonkern.ops.temporal_window_attention.triton_forward import temporal_window_attention_fwd_kernel


class _Clip(NamedTuple):
    """What the frames of queries and keys have to do with each other; see op.py."""

    keys: int
    query_offset: int
    start: int

    def continues(self, frames: int) -> bool:
        """Whether keys are not just those of the queries' frames."""
        return self != (frames, 0, 0)


@functools.lru_cache(maxsize=1024)
def _launch(side: str, shape, dtype, tf32: bool, strides, clip: _Clip, left: int, right: int, scale: float) -> Launch:
    """`shape` of query; `side` is "forward", or which gradients backward computes. `tf32`: what the choice of tiles
    looks up."""
    B, T, N, H, D = shape
    S, query_offset, start = clip
    if B * S * N * H * D >= configs.MAX_ELEMENTS or S >= configs.MAX_FRAMES:
        raise ValueError(
            f"query and key must have fewer than 2**34 elements and 2**29 frames on the triton backend, got "
            f"{(B, T, N, H, D)} and {(B, S, N, H, D)}; split the batch or the positions over several calls"
        )
    rows = B * (S if side == "keys" else T) * N * H
    left, right = min(left, query_offset + T - 1), min(right, S - 1 - query_offset)
    forward, continued = side == "forward", clip.continues(T)
    tiles = (configs.forward_tiles if forward else configs.backward_tiles)(D, left + right + 1, dtype)
    tensor_cores = tiles.tensor_cores and (not continued or T >= configs.TILE_FRAMES)
    of_keys = (*flat.divisor(S), query_offset, *((start,) if forward else ()))
    sizes = (*flat.divisor(T), *flat.divisor(N), *flat.divisor(H), *of_keys, rows, left, right, scale)
    return Launch(
        temporal_window_attention_fwd_kernel if forward else temporal_window_attention_bwd_kernel,
        triton.cdiv(rows, tiles.block_rows), *sizes, *(stride for units in strides for stride in units),
        D=D, BLOCK_D=block_size(D), TENSOR_CORES=tensor_cores, BLOCK_ROWS=tiles.block_rows,
        BLOCK_OTHERS=tiles.block_others, ROWS=tiles.rows, STAGES=tiles.num_stages,
        **({"CONTINUED": continued} if forward else {"SIDE": side}), **(register_limit() if continued else {}),
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip


def _run(sides: tuple[str, ...], inputs, saved, outputs, clip: _Clip, left: int, right: int, scale: float) -> None:
    """Run a kernel for each of `sides`, on inputs of any strides, contiguous saved tensors and contiguous outputs."""
    like = outputs[0]
    inputs, strides = zip(*[readable(x, configs.MAX_ELEMENTS) for x in inputs], strict=True)
    descriptors = configs.DESCRIPTORS and sides == ("forward",) and configs.has_descriptors()
    if descriptors and not clip.continues(like.shape[1]) and tma.suits(inputs, strides, left, right):
        tma.forward(inputs, strides, outputs, left, right, scale, tma.programs_of(like.device))
        return
    tf32 = like.dtype == torch.float32 and configs.tf32_allowed()
    saved = [aligned(x) for x in saved]
    for side in sides:
        _launch(side, like.shape, like.dtype, tf32, strides, clip, left, right, scale)(*inputs, *saved, *outputs)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    left: int,
    right: int,
    scale: float,
    query_offset: int = 0,
    start: int = 0,
) -> tuple[Tensor, Tensor]:
    """`[B, T, N, H, D]`, twice `[B, S, N, H, D]` -> out `[B, T, N, H, D]`, log-sum-exp of the scores `[B, T, N, H]`."""
    out = query.new_empty(query.shape)
    lse = query.new_empty(query.shape[:-1], dtype=accumulator(query.dtype))
    if out.numel():
        clip = _Clip(key.shape[1], query_offset, start)
        _run(("forward",), (query, key, value), (), (out, lse), clip, left, right, scale)
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
    query_offset: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, in their shapes; out and lse are what `forward` returned."""
    if not query.numel():  # no query sees any key
        return query.new_empty(query.shape), query.new_zeros(key.shape), query.new_zeros(key.shape)
    grads = query.new_empty(query.shape), query.new_empty(key.shape), query.new_empty(key.shape)
    clip = _Clip(key.shape[1], query_offset, 0)
    sides = ("queries", "keys") if clip.continues(query.shape[1]) else ("both",)
    _run(sides, (grad_out, query, key, value), (out, lse), grads, clip, left, right, scale)
    return grads
