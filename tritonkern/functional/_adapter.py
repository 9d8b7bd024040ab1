"""The two ends of a temporal adapter. Private: `tritonkern.nn.TemporalAdapter` is the public layer."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonkern.functional._arguments import autocast_dtype, check_types, real
from tritonkern.ops._dtypes import DTYPES
from tritonkern.ops.temporal_adapter.op import Conv, Grid, Norm, adapter_in_fwd, adapter_out_fwd


def adapter_in(
    tokens: Tensor,
    grid: tuple[int, int],
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    pool: int = 1,
    eps: float = 1e-5,
    statistics: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The first end: GroupNorm over the whole clip, 3 x 3 convolution, ReLU.

    The norm has one group: its statistics are taken over all frames, patches and channels of a batch entry. Padding is
    zero after the norm. On the CPU the normalised tokens are never stored. Only first-order reverse-mode derivatives
    exist.

    Args:
        tokens: ``[B, T, prefix + h * w, C]``, class and register tokens before the patches of each frame, row by row;
            any strides. float64, float32, bfloat16 or float16.
        grid: ``(h, w)``, multiples of `pool`.
        norm_weight, norm_bias: ``[C]``.
        weight, bias: ``[O, C, 3, 3]`` and ``[O]`` or None.
        pool: side p of the patches that the result is stored in.
        eps: added to the variance, positive, at least the smallest normal number of the type of sums.
        statistics: ``[2, B]`` float64, mean and ``1 / sqrt(variance + eps)`` to normalise with in place of the tokens'
            own; forward only.
        backend: ``"cpp"``, ``"triton"`` (around cuDNN's convolutions) or ``"reference"``; None chooses by device.

    Returns:
        ``[B, T, h/p * w/p, p * p * O]``: pixel (y, x) of channel o of the image is in row (y / p, x / p) at
        ``((y % p) * p + x % p) * O + o``, so that a convolution of kernel and stride p is a linear layer. Convolutions
        of float64 and float32 are as exact as PyTorch's. For 16-bit tokens, and under autocast, they have the precision
        of 16-bit numbers; the result then is float32 on the CPU, which computes in it, and 16-bit on a GPU.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        NotImplementedError: an input carries a forward-mode tangent.
        ValueError: shapes or devices that do not fit together, or a backend that cannot run this call.

    Paper: Kim et al., "Exploring Temporally-Aware Features for Point Tracking", CVPR 2025; the convolution is computed
    by Winograd's algorithm (Lavin and Gray, CVPR 2016).
    """
    parameters = {"norm_weight": norm_weight, "norm_bias": norm_bias, "weight": weight}
    check_types(backend, tokens=tokens, **parameters, **({} if bias is None else {"bias": bias}))
    norm = Norm(norm_weight, norm_bias, real("eps", eps))
    dtype = autocast_dtype(tokens)
    return adapter_in_fwd(tokens, *norm, *Conv(weight, bias), *_grid(grid, pool), dtype, statistics, backend)[0]


def adapter_out(
    hidden: Tensor,
    grid: tuple[int, int],
    weight: Tensor,
    bias: Tensor | None = None,
    tokens: Tensor | None = None,
    *,
    pool: int = 1,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """The second end: ReLU, 3 x 3 convolution, sum with the tokens.

    Args:
        hidden: ``[B, T, h/p * w/p, p * p * O]``, an image as `adapter_in` returns it, and of the dtype it returns.
        grid, pool, backend: as in `adapter_in`.
        weight, bias: ``[C, O, 3, 3]`` and ``[C]`` or None.
        tokens: ``[B, T, prefix + h * w, C]``; the first `prefix` of each frame are copied unchanged.
        dtype: precision of the convolution; None takes that of tokens, or the autocast dtype.

    Returns:
        New tokens in their shape and dtype, contiguous; without tokens ``[B, T, h * w, C]`` in `dtype`.

    Raises:
        TypeError, ValueError, NotImplementedError: as `adapter_in`.
    """
    optional = {name: x for name, x in (("bias", bias), ("tokens", tokens)) if x is not None}
    check_types(backend, hidden=hidden, weight=weight, **optional)
    if dtype is None:
        dtype = autocast_dtype(hidden if tokens is None else tokens)
    elif dtype not in DTYPES:
        raise TypeError(f"dtype must be float64, float32, bfloat16, float16 or None, got {dtype}")
    return adapter_out_fwd(hidden, *Conv(weight, bias), tokens, *_grid(grid, pool), dtype, backend)


def _grid(grid: tuple[int, int], pool: int) -> Grid:
    if not isinstance(grid, tuple | list | torch.Size) or len(grid) != 2:
        raise TypeError(f"grid must be a pair (h, w), got {grid!r}")
    if any(isinstance(x, bool | float) for x in (*grid, pool)):
        raise TypeError(f"grid and pool must be whole numbers, got {grid} and {pool!r}")
    return Grid(*grid, pool)
