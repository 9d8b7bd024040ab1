"""Parts of network blocks whose time is memory traffic."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonkern.functional._arguments import autocast_dtype, real, refuse_forward_mode
from tritonkern.functional.attention import window_extent
from tritonkern.ops import _backends
from tritonkern.ops._contract import DTYPES
from tritonkern.ops.residual_norm import op as _norm_op
from tritonkern.ops.temporal_adapter import op as _adapter_op
from tritonkern.ops.temporal_block import op as _block_op
from tritonkern.ops.temporal_mixer import op as _mixer_op


def residual_norm(
    x: Tensor,
    branch: Tensor | None = None,
    gamma: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    *,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The residual sum of a pre-norm transformer block and the LayerNorm of it, in one pass over memory.

    ``total = x + gamma * branch``, ``normed = (total - mean) / sqrt(variance + eps) * weight + bias`` with mean and
    variance over the channels of each token. The first derivative is supported, for the tensors that require it; a
    second one raises RuntimeError. Nothing is saved for it but the sum.

    Args:
        x: residual stream ``[..., C]`` with C from 1 to 4096 (2048 in float64); float64, float32, bfloat16 or float16.
            Sums are kept in float32 (float64 for float64). Rows that are not adjacent in memory are copied first.
        branch: what attention or the feed-forward adds, of x's shape, in x's dtype or, beside float32, bfloat16 or
            float16 (the float32 residual stream of autocast). None adds nothing.
        gamma: factor ``[C]`` on branch (LayerScale); None is 1.
        weight, bias: ``[C]`` of the LayerNorm; None is 1 and 0.
        eps: added to the variance, not negative.
        out_dtype: of normed, under the rule for branch; None takes the autocast dtype under autocast (what the next
            linear layer would cast to), otherwise x's.
        backend: ``"cpp"``, ``"triton"`` or ``"reference"``; None chooses by device.

    Returns:
        total (x itself without a branch), in x's dtype, and normed. normed is computed from total as it is rounded to
        x's dtype. A NaN or infinity reaches the row (token) that holds it alone.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        NotImplementedError: an input carries a forward-mode tangent.
        ValueError: shapes or devices that do not fit together, gamma without a branch, or a backend that cannot run
            this call (the message lists every backend with its reason and the way out).

    LayerNorm: Ba et al., 2016; LayerScale: Touvron et al., "Going deeper with Image Transformers", ICCV 2021.
    """
    _backends.check_name(backend)
    eps = real("eps", eps)
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")
    if out_dtype is None:
        out_dtype = autocast_dtype(x)
    elif not isinstance(out_dtype, torch.dtype):
        raise TypeError(f"out_dtype must be a torch.dtype or None, got {type(out_dtype).__name__}")
    _norm_op.check(x, branch, gamma, weight, bias, eps, out_dtype)
    given = [tensor for tensor in (x, branch, gamma, weight, bias) if tensor is not None]
    refuse_forward_mode("residual_norm", *given)
    total, normed = _norm_op.residual_norm_fwd(x, branch, gamma, weight, bias, eps, out_dtype, backend)
    return x if branch is None else total, normed


def norm_conv_relu(
    tokens: Tensor,
    grid: tuple[int, int],
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    pool: int = 1,
    eps: float = 1e-5,
    backend: str | None = None,
) -> Tensor:
    """What a temporal adapter begins with: GroupNorm over the whole clip, 3x3 convolution, ReLU.

    The norm has one group: its statistics are taken over all frames, patches and channels of a batch entry. Padding is
    zero after the norm. On the CPU the normalised tokens are never stored. The first derivative is supported; a second
    one raises RuntimeError.

    Args:
        tokens: ``[B, T, prefix + h * w, C]``, class and register tokens before the patches of each frame, row by row;
            any strides. float64, float32, bfloat16 or float16.
        grid: ``(h, w)``, multiples of `pool`.
        norm_weight, norm_bias: ``[C]``.
        weight, bias: ``[O, C, 3, 3]`` and ``[O]``.
        pool: side p of the patches that the result is stored in.
        eps: added to the variance.
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
    _backends.check_name(backend)
    eps = real("eps", eps)
    dtype = _adapter_dtype(tokens)
    _check_patches(grid, pool)
    if not eps > 0:
        raise ValueError(f"eps must be positive, got {eps}")
    _adapter_op.check_in(tokens, norm_weight, norm_bias, weight, bias, *grid, pool, dtype)
    refuse_forward_mode("norm_conv_relu", tokens, norm_weight, norm_bias, weight, bias)
    call = (tokens, norm_weight, norm_bias, eps, weight, bias, *grid, pool, dtype, backend)
    return _adapter_op.adapter_in_fwd(*call)[0]


def relu_conv_add(
    hidden: Tensor,
    grid: tuple[int, int],
    weight: Tensor,
    bias: Tensor,
    tokens: Tensor | None = None,
    *,
    pool: int = 1,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """What a temporal adapter ends with: ReLU, 3x3 convolution, sum with the tokens.

    Args:
        hidden: ``[B, T, h/p * w/p, p * p * O]``, an image as `norm_conv_relu` returns it, and of the dtype it returns.
        grid, pool, backend: as in `norm_conv_relu`.
        weight, bias: ``[C, O, 3, 3]`` and ``[C]``.
        tokens: ``[B, T, prefix + h * w, C]``; the first `prefix` of each frame are copied as they are.
        dtype: what the convolution is to be as precise as; None takes that of tokens, or the autocast dtype.

    Returns:
        New tokens in their shape and dtype, contiguous; without tokens ``[B, T, h * w, C]`` in `dtype`.

    Raises:
        TypeError, ValueError, NotImplementedError: as `norm_conv_relu`.
    """
    _backends.check_name(backend)
    _check_patches(grid, pool)
    if dtype is None:
        dtype = _adapter_dtype(hidden if tokens is None else tokens)
    elif dtype not in DTYPES:
        raise TypeError(f"dtype must be float64, float32, bfloat16, float16 or None, got {dtype}")
    _adapter_op.check_out(hidden, weight, bias, tokens, *grid, pool, dtype)
    refuse_forward_mode("relu_conv_add", hidden, weight, bias, *(() if tokens is None else (tokens,)))
    return _adapter_op.adapter_out_fwd(hidden, weight, bias, tokens, *grid, pool, dtype, backend)


def _check_patches(grid: tuple[int, int], pool: int) -> None:
    if not isinstance(grid, tuple | list | torch.Size) or len(grid) != 2:
        raise TypeError(f"grid must be a pair (h, w), got {grid!r}")
    if any(isinstance(x, bool | float) for x in (*grid, pool)):
        raise TypeError(f"grid and pool must be whole numbers, got {grid} and {pool!r}")


def _adapter_dtype(tokens: Tensor) -> torch.dtype:
    """Of the convolutions; the autocast dtype, unless the tokens have 16 bits already."""
    if not isinstance(tokens, Tensor):
        raise TypeError(f"tokens must be a torch.Tensor, got {type(tokens).__name__}")
    return autocast_dtype(tokens)


def temporal_block(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    num_heads: int,
    window: int | tuple[int, int] = 13,
    *,
    eps: float = 1e-5,
    backend: str | None = None,
) -> Tensor:
    """A pre-norm transformer block over time as one kernel: LayerNorm, window attention with its projections, residual.

    ::

        n = LayerNorm(x; norm_weight, norm_bias, eps)
        query, key, value = n @ qkv_weight.T + qkv_bias            rows of qkv_weight: (3, heads, C / heads)
        a = temporal_window_attention(query, key, value, window)   every position on its own, scale (C / heads) ** -0.5
        out = x + a @ proj_weight.T + proj_bias

    Made for few channels: one read of x, one write of the result. The Triton kernel holds 16-bit tensors of up to 128
    channels in heads of up to 32, and windows of up to 49 frames (25 before sm_90); whatever else comes to a GPU,
    float32 and float64 included, goes through the steps one after the other. The first derivative is supported, for the
    tensors that require it; a second one raises RuntimeError. Only x and the parameters are saved for it: the backward
    pass computes the steps again.

    Args:
        x: ``[B, T, N, C]`` (batch, frames, spatial positions, channels), any strides; float64, float32, bfloat16 or
            float16; C up to 2048; B, T and N may be 0. Sums are kept in float32 (float64 for float64). On a GPU 16-bit
            intermediate results are rounded to x's dtype, on a CPU not. Autocast does not apply.
        norm_weight, norm_bias: ``[C]``, of any of these dtypes, as the other parameters are.
        qkv_weight, qkv_bias: ``[3 C, C]`` and ``[3 C]`` or None.
        proj_weight, proj_bias: ``[C, C]`` and ``[C]`` or None.
        num_heads: heads of C / num_heads channels, a multiple of 8 up to 256.
        window: odd number of frames in all, or the inclusive counts ``(left, right)``; as `temporal_window_attention`.
        eps: added to the variance, not negative.
        backend: ``"cpp"``, ``"triton"`` or ``"reference"``; None chooses by device.

    Returns:
        Contiguous tensor of x's shape and dtype. A NaN or infinity in a frame reaches exactly the frames whose window
        holds it, at its own position.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        NotImplementedError: an input carries a forward-mode tangent.
        ValueError: shapes or devices that do not fit together, a window that is even or negative, or a backend that
            cannot run this call.

    Paper: Kim et al., "Exploring Temporally-Aware Features for Point Tracking", CVPR 2025.
    """
    left, right = window_extent(window)
    _backends.check_name(backend)
    eps = real("eps", eps)
    if not isinstance(num_heads, int) or isinstance(num_heads, bool):
        raise TypeError(f"num_heads must be an int, got {type(num_heads).__name__}")
    call = (x, norm_weight, norm_bias, qkv_weight, qkv_bias, proj_weight, proj_bias, num_heads, left, right, eps)
    _block_op.check(*call)
    refuse_forward_mode("temporal_block", *(tensor for tensor in call[:7] if tensor is not None))
    return _block_op.temporal_block_fwd(*call, backend)


def temporal_mixer(
    x: Tensor,
    norm_weight: Tensor,
    conv1_weight: Tensor,
    conv1_bias: Tensor,
    conv2_weight: Tensor,
    conv2_bias: Tensor,
    *,
    causal: bool = False,
    state: tuple[Tensor, Tensor] | None = None,
    eps: float = 1e-5,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor]]:
    """TAPIR's mixing over time: LayerNorm, depthwise convolution to four channels each, GELU, another, sum, residual.

    ::

        h = LayerNorm(x) * norm_weight
        v = gelu(conv1(h))                    channel 4 c + j of v belongs to channel c of x; GELU in its tanh form
        out[c] = x[c] + sum over j of conv2(v)[4 c + j]

    Both convolutions run along time alone, with kernels of 3 frames and zeros beyond the clip: frames t - 1 to t + 1,
    or t - 2 to t where the mixer is causal. A causal mixer can carry on from clip to clip: given the state after the
    frames before, the results are those of one long clip.

    Args:
        x: ``[N, T, C]`` or ``[B, N, T, C]`` (batch, tracks, frames, channels), any strides; float64, float32, bfloat16
            or float16; C up to 4096. Sums are kept in float32 (float64 for float64). Autocast does not apply.
        norm_weight: ``[C]``, of any of these dtypes, as the other parameters are.
        conv1_weight, conv1_bias: ``[4 C, 1, 3]`` and ``[4 C]``, those of ``nn.Conv1d(C, 4 * C, 3, groups=C)``.
        conv2_weight, conv2_bias: the same shapes, those of ``nn.Conv1d(4 * C, 4 * C, 3, groups=4 * C)``.
        causal: whether a frame sees no later ones.
        state: the two frames before x (causal only): LayerNorm's ``[..., N, 2, C]`` and v's ``[..., N, 2, 4 C]``,
            float32 (float64 for float64). Zeros stand for the start of a clip. There is no gradient with a state.
        eps: of the LayerNorm.
        backend: ``"cpp"``, ``"triton"`` or ``"reference"``; None chooses by device.

    Returns:
        Contiguous tensor of x's shape and dtype; with a state the pair of it and the state after x. A NaN or infinity
        in a frame reaches exactly the frames that see it, through both convolutions: t - 2 to t + 2, or t to t + 4.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        NotImplementedError: an input carries a forward-mode tangent.
        ValueError: shapes or devices that do not fit together, a state without `causal`, or a backend that cannot run
            this call.
        RuntimeError: at the backward pass, with a state.

    Paper: Doersch et al., "TAPIR: Tracking Any Point with per-frame Initialization and temporal Refinement", ICCV 2023.
    """
    _backends.check_name(backend)
    eps = real("eps", eps)
    if state is not None and not (isinstance(state, tuple | list) and len(state) == 2):
        raise TypeError(f"state must be a pair of tensors or None, got {type(state).__name__}")
    if not isinstance(causal, bool):
        raise TypeError(f"causal must be a bool, got {type(causal).__name__}")
    unbatched = isinstance(x, Tensor) and x.dim() == 3
    past: list[Tensor | None] = [None, None] if state is None else list(state)
    if unbatched:
        x, past = x.unsqueeze(0), [s.unsqueeze(0) if isinstance(s, Tensor) else s for s in past]
    parameters = (norm_weight, conv1_weight, conv1_bias, conv2_weight, conv2_bias)
    _mixer_op.check(x, *parameters, causal, eps, *past)
    refuse_forward_mode("temporal_mixer", x, *parameters)
    results: tuple[Tensor, ...] = _mixer_op.temporal_mixer_fwd(x, *parameters, causal, eps, *past, backend)
    out, *after = (result.squeeze(0) for result in results) if unbatched else results
    return out if state is None else (out, (after[0], after[1]))
