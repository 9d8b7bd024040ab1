"""The forward kernel of temporal window attention with tensor descriptors, for GPUs of compute capability 9 and above.

The hardware (the tensor memory accelerator) computes the addresses of whole tiles, which are half of the instructions
of the other kernel, fills what is outside of a clip with zeros, and drops what is stored there. A program takes one
tile after the other, so that the loads of the next one overlap with the products of this one. A tile has FRAMES frames
of HEADS heads of one position: short clips fill a tile together.

No GPU has run it: `configs.DESCRIPTORS` is off until it has been measured.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonkern.ops._triton import block_size, register_limit
from tritonkern.ops.temporal_window_attention import configs
from tritonkern.ops.temporal_window_attention import triton_rows as flat
from tritonkern.ops.temporal_window_attention.triton_forward import _forward_by_distance, poisoned

_NUMBERS = "T N H left right scale tiles head_blocks cuts"
_NUMBERS += "".join(f" stride_{x}{axis}" for x in "qkv" for axis in "btnh")
_NUMBERS += "".join(f" {size}_{part}" for size in "TNH" for part in ("multiplier", "shift"))


# lse and out as in triton_forward.py
@triton.jit(do_not_specialize=_NUMBERS.split())
def temporal_window_attention_fwd_kernel_tma(
    query_tiles, key_tiles, value_tiles, out_tiles, query, key, value, out, lse,
    T: tl.int32, T_multiplier: tl.uint32, T_shift: tl.uint32, N: tl.int32, N_multiplier: tl.uint32, N_shift: tl.uint32,
    H: tl.int32, H_multiplier: tl.uint32, H_shift: tl.uint32, left: tl.int32, right: tl.int32, scale: tl.float64,
    tiles: tl.int32, head_blocks: tl.int32, cuts: tl.int32,
    stride_qb: tl.int32, stride_qt: tl.int32, stride_qn: tl.int32, stride_qh: tl.int32,  # in UNITs
    stride_kb: tl.int32, stride_kt: tl.int32, stride_kn: tl.int32, stride_kh: tl.int32,
    stride_vb: tl.int32, stride_vt: tl.int32, stride_vn: tl.int32, stride_vh: tl.int32,
    D: tl.constexpr, BLOCK_D: tl.constexpr, HEADS: tl.constexpr, FRAMES: tl.constexpr, HALO: tl.constexpr,
    OTHERS: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`..._tiles` are descriptors of `[B, N, H, T, D]`. A tile takes OTHERS frames, from HALO before its first on."""
    scale = tl.full([], scale, tl.float32)
    lane, other_lane = tl.arange(0, HEADS * FRAMES), tl.arange(0, HEADS * OTHERS)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=STAGES):
        cut = tile % cuts
        position = tile // cuts // head_blocks
        h0 = tile // cuts % head_blocks * HEADS
        b, n, t0 = position // N, position % N, cut * FRAMES
        q = query_tiles.load([b, n, h0, t0, 0]).reshape([HEADS * FRAMES, BLOCK_D])
        k = key_tiles.load([b, n, h0, t0 - HALO, 0]).reshape([HEADS * OTHERS, BLOCK_D])
        v = value_tiles.load([b, n, h0, t0 - HALO, 0]).reshape([HEADS * OTHERS, BLOCK_D])
        t, other_t = t0 + lane % FRAMES, t0 - HALO + other_lane % OTHERS
        distance = other_t[None, :] - t[:, None]
        seen = (distance >= -left) & (distance <= right) & ((other_t >= 0) & (other_t < T))[None, :]
        if HEADS > 1:
            seen = seen & (other_lane // OTHERS == (lane // FRAMES)[:, None])
        score = tl.where(seen, tl.dot(q, tl.trans(k)) * scale, float("-inf"))
        # Finite, so that no exponent is -inf - -inf in rows beyond the clip.
        highest = tl.maximum(tl.max(score, 1), -3.4028234663852886e38)
        weight = tl.exp(score - highest[:, None])
        total = tl.sum(weight, 1)
        result = tl.dot(weight.to(v.dtype), v)
        # Zero times NaN is NaN: a tile with a bad frame goes the other way, which keeps it inside its window.
        if not poisoned(result):
            rounded = (result * (1.0 / total)[:, None]).to(v.dtype)
            out_tiles.store([b, n, h0, t0, 0], rounded.reshape([1, 1, HEADS, FRAMES, BLOCK_D]))
            of_lane = h0 + lane // FRAMES
            at = ((b.to(tl.int64) * T + t) * N + n) * H + of_lane
            tl.store(lse + at, highest + tl.log(total), mask=(t < T) & (of_lane < H))
        else:
            divisor_t, divisor_n = (T, T_multiplier, T_shift), (N, N_multiplier, N_shift)
            divisor_h = (H, H_multiplier, H_shift)
            tensors = (
                (query, stride_qb, stride_qt, stride_qn, stride_qh), (key, stride_kb, stride_kt, stride_kn, stride_kh),
                (value, stride_vb, stride_vt, stride_vn, stride_vh), flat.contiguous(out, T, N, H, D), lse,
            )  # fmt: skip
            count = tl.minimum(T - t0, FRAMES)
            for h in tl.range(h0, tl.minimum(h0 + HEADS, H), num_stages=1):
                first, place = flat.origin((position * H + h) * T + t0, divisor_t, divisor_n, divisor_h)
                for begin in tl.range(0, count, ROWS, num_stages=1):
                    row = first + begin + tl.arange(0, ROWS)
                    clips = (place, place, 0, 0)
                    _forward_by_distance(
                        tensors, row, row < first + count, clips, left, right, scale, D, BLOCK_D, False
                    )


def suits(tensors: tuple[Tensor, ...], strides: tuple[tuple[int, ...], ...], left: int, right: int) -> bool:
    """Whether the kernel can run: 16 bits, windows and heads of the sizes it has tiles for, no expanded axes."""
    T, D = tensors[0].shape[1], tensors[0].shape[-1]
    fits = T <= configs.TMA_FRAMES or max(left, right) <= configs.TMA_HALO
    expanded = any(
        stride == 0 < size - 1
        for x, units in zip(tensors, strides, strict=True)
        for size, stride in zip(x.shape, units, strict=False)
    )
    return tensors[0].dtype.itemsize == 2 and fits and D <= 128 and not expanded


def forward(tensors, strides, outputs, left: int, right: int, scale: float, programs: int) -> None:
    """`tensors` are query, key and value as `readable` returns them; `programs`: as many as fill the GPU."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    out, lse = outputs
    B, T, N, H, D = out.shape
    frames = min(configs.TMA_FRAMES, block_size(T))
    heads, halo = configs.TMA_FRAMES // frames, 0 if T <= frames else configs.TMA_HALO
    others, width = frames + 2 * halo, block_size(D)
    head_blocks, cuts = triton.cdiv(H, heads), triton.cdiv(T, frames)
    count = B * N * head_blocks * cuts

    def described(x: Tensor, length: int) -> TensorDescriptor:
        view = x.permute(0, 2, 3, 1, 4)
        # Axes of size 1 may have any stride; the hardware wants multiples of 16 bytes.
        sizes = [stride if n > 1 else width for n, stride in zip(view.shape, view.stride(), strict=True)]
        return TensorDescriptor(x, [*view.shape[:-1], D], [*sizes[:-1], 1], [1, 1, heads, length, width])

    query, key, value = tensors
    temporal_window_attention_fwd_kernel_tma[(min(programs, count),)](
        described(query, frames), described(key, others), described(value, others), described(out, frames),
        query, key, value, out, lse, *flat.divisor(T), *flat.divisor(N), *flat.divisor(H), min(left, T - 1),
        min(right, T - 1), scale, count, head_blocks, cuts, *(stride for units in strides for stride in units),
        D=D, BLOCK_D=width, HEADS=heads, FRAMES=frames, HALO=halo, OTHERS=others, ROWS=1024 // width, STAGES=2,
        num_warps=4, **register_limit(),
    )  # fmt: skip


def programs_of(device: torch.device) -> int:
    """Programs that run at the same time."""
    return 4 * torch.cuda.get_device_properties(device).multi_processor_count
