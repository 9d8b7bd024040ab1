"""One public function an operation: what it computes, argument checks, one call."""

from __future__ import annotations

import numbers
from typing import NamedTuple

import torch
from torch import Tensor

from tritonkern.ops import _backends
from tritonkern.ops._contract import accumulator
from tritonkern.ops.correlation_soft_argmax import op as _match_op
from tritonkern.ops.local_correlation import op as _local_op
from tritonkern.ops.residual_norm import op as _norm_op
from tritonkern.ops.temporal_adapter import op as _adapter_op
from tritonkern.ops.temporal_mixer import op as _mixer_op
from tritonkern.ops.temporal_window_attention import op as _window_op
from tritonkern.ops.track_attention import op as _track_op


def temporal_window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int | tuple[int, int] = 13,
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention over time in which every frame sees only the frames near it.

    Each position n and head h is a sequence of its own along time. Query frame i sees the key frames j with
    ``i - left <= j <= i + right`` that exist in the clip, and the softmax runs over those alone. With T = 6 and
    ``window=3`` (or ``(1, 1)``), and with ``window=(2, 0)`` (causal), query frame i sees the key frames marked 1::

        window=3    j 0 1 2 3 4 5        window=(2, 0)    j 0 1 2 3 4 5
        i = 0         1 1 . . . .        i = 0              1 . . . . .
        i = 1         1 1 1 . . .        i = 1              1 1 . . . .
        i = 2         . 1 1 1 . .        i = 2              1 1 1 . . .
        i = 3         . . 1 1 1 .        i = 3              . 1 1 1 . .
        i = 4         . . . 1 1 1        i = 4              . . 1 1 1 .
        i = 5         . . . . 1 1        i = 5              . . . 1 1 1

    Time and memory grow with T times the window, never with T squared. The first derivative is supported; a second one
    raises RuntimeError.

    Args:
        query, key, value: ``[B, T, H, D]`` or ``[B, T, N, H, D]`` (batch, frames, spatial positions, heads, head
            dimension), all three of one shape, dtype and device; any strides, so no ``permute().contiguous()`` is ever
            needed. float64, float32, bfloat16 or float16; D a multiple of 8 from 8 to 256. Any other size may be 0.
            Sums are kept in float32 (float64 for float64). Under autocast they are cast to the autocast dtype, as
            `torch.nn.functional.scaled_dot_product_attention` does.
        window: odd number of frames in all (13 sees six on each side), or the inclusive counts ``(left, right)`` of
            frames before and after. Windows are cut off, not shifted, at the ends of the clip; longer than it is legal.
        scale: factor on the scores, ``D ** -0.5`` if None.
        backend: ``"cpp"``, ``"triton"`` or ``"reference"``; None chooses by device.

    Returns:
        Contiguous tensor of query's shape, in the inputs' dtype (the autocast dtype under autocast). A NaN or infinity
        in a frame reaches exactly the output frames whose window holds it.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        NotImplementedError: an input carries a forward-mode tangent.
        ValueError: shapes or devices that do not fit together, a window that is even or negative, or a backend that
            cannot run this call (the message lists every backend with its reason and the way out).

    The operation is the temporal attention of Chrono (Kim et al., "Exploring Temporally-Aware Features for Point
    Tracking", CVPR 2025), which is sliding-window attention (Beltagy et al., "Longformer", 2020) along time.
    """
    left, right = window_extent(window)
    _backends.check_name(backend)
    query, key, value = _autocast(query, key, value)
    _window_op.check_tensors(query, key, value)
    if scale is None:
        scale = query.shape[-1] ** -0.5
    else:
        scale = _real("scale", scale)
    _refuse_forward_mode("temporal_window_attention", query, key, value)

    attend = _window_op.temporal_window_attention_fwd
    if query.dim() == 5:
        return attend(query, key, value, left, right, scale, backend)[0]
    query, key, value = query.unsqueeze(2), key.unsqueeze(2), value.unsqueeze(2)
    return attend(query, key, value, left, right, scale, backend)[0].squeeze(2)


class Match(NamedTuple):
    """Where each of N queries is found in each of T frames, and statistics of its correlation with the whole frame."""

    points: Tensor
    """[B, N, T, 2] (x, y) in cells of the feature map; cell i has its centre at i + 0.5."""
    mean: Tensor
    """[B, N, T], as max and min: over all cells of the frame, of the correlation without the temperature."""
    max: Tensor
    min: Tensor


def correlation_soft_argmax(
    query: Tensor,
    features: Tensor,
    *,
    temperature: float = 20.0,
    radius: float = 5.0,
    cosine: bool = False,
    eps: float = 1e-6,
    backend: str | None = None,
) -> Match:
    """Finds every query in every frame of a feature map, without storing the cost volume.

    ``cost[n, t, y, x] = query[n] . features[t, y, x]``; the softmax of ``temperature * cost`` over a frame has its
    largest value at some cell (the first one, where several are equal), and the point is the mean of the centres of the
    cells strictly closer than `radius` to that cell, weighted by the softmax::

        radius=2         . . . . .
                         . x x x .       x: cells that take part, # the best one; those beyond the grid do not exist
                         . x # x .
                         . x x x .
                         . . . . .

    Memory grows with N times T, never with N times the number of cells. The first derivative is supported; a second
    one raises RuntimeError. As the best cell moves in steps, the gradient is that of a fixed set of cells. The
    gradients of `max` and `min` go to the first extremal cell (`torch.amax` shares them out among equal cells).

    Args:
        query: ``[B, N, C]``.
        features: ``[B, T, h, w, C]`` of query's dtype and device, any strides: the patch tokens of a vision transformer
            are used where they lie. float64, float32, bfloat16 or float16; B, N and T may be 0. Sums are kept in
            float32 (float64 for float64). Autocast does not apply: matching in bfloat16 would round the softmax's
            logits to steps of a tenth.
        temperature: factor from correlation to softmax logit, positive.
        radius: in cells, positive; may exceed the grid.
        cosine: whether query and features are divided by ``sqrt(max(sum of squares, eps))`` along C first.
        eps: see `cosine`; without it, unused.
        backend: ``"cpp"``, ``"triton"`` or ``"reference"``; None chooses by device.

    Returns:
        `Match` of float32 tensors (float64 for float64). A NaN or infinity in a frame's features reaches that frame's
        results alone; one in a query that query's alone.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        NotImplementedError: an input carries a forward-mode tangent.
        ValueError: shapes or devices that do not fit together, an option that is not positive, or a backend that cannot
            run this call (the message lists every backend with its reason and the way out).

    It is the matching head of Chrono (Kim et al., CVPR 2025), LocoTrack (Cho et al., ECCV 2024) and TAPIR (Doersch et
    al., ICCV 2023); the disc around the arg max comes from TAPIR.
    """
    _backends.check_name(backend)
    _match_op.check_tensors(query, features)
    temperature, radius, eps = _real("temperature", temperature), _real("radius", radius), _real("eps", eps)
    if not isinstance(cosine, bool):
        raise TypeError(f"cosine must be a bool, got {type(cosine).__name__}")
    _match_op.check_options(temperature, radius, eps)
    _refuse_forward_mode("correlation_soft_argmax", query, features)
    return Match(*_match_op.correlation_soft_argmax_fwd(query, features, temperature, radius, cosine, eps, backend)[:4])


def soft_argmax_2d(
    cost_volume: Tensor, *, temperature: float = 20.0, radius: float = 5.0, backend: str | None = None
) -> Tensor:
    """The softmax-weighted mean position around the maximum of every frame of a given cost volume.

    The second half of `correlation_soft_argmax`, for trackers that filter their cost volume in between (LocoTrack,
    TAPIR). One pass over the cost volume, in place of a softmax, masks and products of its size.

    Args:
        cost_volume: ``[..., h, w]``, any strides; float64, float32, bfloat16 or float16.
        temperature, radius, backend: as in `correlation_soft_argmax`.

    Returns:
        ``[..., 2]`` (x, y) in cells, centres at + 0.5, float32 (float64 for float64). A frame with a NaN, +infinity or
        nothing but -infinity gives NaN.

    Raises:
        TypeError, ValueError, NotImplementedError: as `correlation_soft_argmax`.
    """
    _backends.check_name(backend)
    _match_op.check_cost_volume(cost_volume)
    temperature, radius = _real("temperature", temperature), _real("radius", radius)
    _match_op.check_options(temperature, radius)
    _refuse_forward_mode("soft_argmax_2d", cost_volume)
    return _match_op.soft_argmax_2d_fwd(cost_volume, temperature, radius, backend)[0]


def track_sample_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tracks: Tensor,
    *,
    sigma: float | Tensor = 0.5,
    scale: float | None = None,
    visibility: Tensor | None = None,
    culling: bool = True,
    backend: str | None = None,
) -> Tensor:
    """Every track gathers values from the feature map around it: attention with a bias on distance, frame by frame.

    ``weights[i, j] = softmax over cells j of (scale * query_i . key_j - |track_i - cell_j|^2 / (2 sigma^2))``, and the
    output of track i is the sum of ``weights[i, j] * value_j``. The bias comes from coordinates inside the kernel;
    neither it nor a weight is stored. The first derivative is supported; a second one raises RuntimeError.

    Args:
        query: ``[B, T, M, H, D]`` (batch, frames, tracks, heads, head dimension).
        key, value: ``[B, T, h, w, H, D]``, of query's dtype and device; any strides. float64, float32, bfloat16 or
            float16; D a multiple of 8 from 8 to 256; B, T and M may be 0. Sums are kept in float32 (float64 for
            float64). Under autocast they are cast to the autocast dtype.
        tracks: ``[B, T, M, 2]`` (x, y) in cells of the map, cell i with its centre at i + 0.5; anywhere, also outside
            of it. Taken in float32 (float64 for float64). Gradients reach them where asked.
        sigma: width of the bias in cells, positive, a number or a 0-d tensor (to which gradients flow); infinity means
            no bias, plain cross-attention.
        scale: factor on the products, ``D ** -0.5`` if None.
        visibility: ``[B, T, M]`` bool. A track that is invisible in a frame, or has a NaN or infinite coordinate, gives
            zeros there and takes and passes no gradient.
        culling: whether cells may be skipped that provably change no output by half an ulp of the largest value (a
            bound from the norms of the queries and keys at hand, see the room's README); False visits all of them.
        backend: ``"cpp"``, ``"triton"`` or ``"reference"``; None chooses by device.

    Returns:
        Contiguous ``[B, T, M, H, D]`` in the inputs' dtype.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        NotImplementedError: an input carries a forward-mode tangent.
        ValueError: shapes or devices that do not fit together, a sigma that is not positive, or a backend that cannot
            run this call (the message lists every backend with its reason and the way out).

    It is the attentional sampling of Tracktention (Lai and Vedaldi, "Tracktention: Leveraging Point Tracking to Attend
    Videos Faster and Better", CVPR 2025).
    """
    return _track_attention(False, query, key, value, tracks, sigma, scale, visibility, culling, backend)


def track_splat_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tracks: Tensor,
    *,
    sigma: float | Tensor = 0.5,
    scale: float | None = None,
    visibility: Tensor | None = None,
    culling: bool = True,
    backend: str | None = None,
) -> Tensor:
    """Every cell of the feature map gathers values from the tracks around it; `track_sample_attention` the other way.

    The softmax runs over the visible tracks of the frame: a cell far from all of them attends to the nearest ones.

    Args:
        query: ``[B, T, h, w, H, D]``.
        key, value: ``[B, T, M, H, D]``.
        tracks, sigma, scale, culling, backend: as in `track_sample_attention`.
        visibility: ``[B, T, M]`` bool. Tracks that are invisible in a frame, or have a NaN or infinite coordinate, do
            not take part in it; a frame without any gives zeros and zero gradients.

    Returns:
        Contiguous ``[B, T, h, w, H, D]`` in the inputs' dtype.

    Raises:
        TypeError, ValueError, NotImplementedError: as `track_sample_attention`.
    """
    return _track_attention(True, query, key, value, tracks, sigma, scale, visibility, culling, backend)


def _track_attention(
    splat: bool,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tracks: Tensor,
    sigma: float | Tensor,
    scale: float | None,
    visibility: Tensor | None,
    culling: bool,
    backend: str | None,
) -> Tensor:
    _backends.check_name(backend)
    query, key, value = _autocast(query, key, value)
    _track_op.check_tensors(query, key, value, tracks, splat)
    if visibility is not None and (not isinstance(visibility, Tensor) or visibility.dtype != torch.bool):
        raise TypeError("visibility must be a bool tensor or None; compare probabilities with a threshold first")
    if visibility is not None and (visibility.shape != tracks.shape[:-1] or visibility.device != tracks.device):
        raise ValueError(
            f"visibility must have shape {tuple(tracks.shape[:-1])} on {tracks.device}, "
            f"got {tuple(visibility.shape)} on {visibility.device}"
        )
    if not isinstance(culling, bool):
        raise TypeError(f"culling must be a bool, got {type(culling).__name__}")
    if scale is None:
        scale = query.shape[-1] ** -0.5
    else:
        scale = _real("scale", scale)
    dtype = accumulator(query.dtype)
    if isinstance(sigma, Tensor):
        if sigma.dim() != 0 or not sigma.is_floating_point() or sigma.device != query.device:
            raise ValueError(
                f"sigma must be a number or a 0-d floating-point tensor on {query.device}, got shape "
                f"{tuple(sigma.shape)}, {sigma.dtype} on {sigma.device}"
            )
        precision = (0.5 / sigma.to(dtype).square()).clamp(max=torch.finfo(dtype).max)
    else:
        sigma = _real("sigma", sigma)
        if not sigma > 0:
            raise ValueError(f"sigma must be positive, got {sigma}; float('inf') means no bias")
        precision = query.new_full((), min(0.5 / sigma / sigma, torch.finfo(dtype).max), dtype=dtype)
    _refuse_forward_mode("track attention", query, key, value, tracks, precision)

    tracks = tracks.to(dtype)
    visible = tracks.isfinite().all(-1)
    if visibility is not None:
        visible = visible & visibility
    attend = _track_op.track_attention_fwd
    return attend(query, key, value, tracks, visible, precision, scale, splat, culling, backend)[0]


def local_correlation(
    features: Tensor,
    support: Tensor,
    coords: Tensor,
    *,
    radius: int = 3,
    padding: str = "border",
    align_corners: bool,
    axis_order: str = "xy",
    backend: str | None = None,
) -> Tensor:
    """Dot products of each point's supports with the features on a square of samples around it, frame by frame.

    ``out[b, t, n, p, s] = support[b, n, s] . f(coords[b, t, n] + offset[p])``, where f is the feature map of frame t,
    bilinearly interpolated, and the offsets are the ``(2 radius + 1)^2`` whole steps from -radius to radius in x and y.
    The sampled patches never exist: all samples of a point share one lattice of cells, which is correlated once, and
    the correlations are interpolated. The first derivative is supported; a second one raises RuntimeError.

    Args:
        features: ``[B, T, h, w, C]``, any strides; channels that are adjacent in memory are read in place. float64,
            float32, bfloat16 or float16. Sums are kept in float32 (float64 for float64). Under autocast features and
            support are cast to the autocast dtype.
        support: ``[B, N, S, C]``, S vectors a point (49 in CoTracker3 and LocoTrack, 1 in TAPIR), or
            ``[B, N, T, S, C]`` where each frame has its own; of features' dtype and device.
        coords: ``[B, T, N, 2]`` (x, y) in cells of the map, anywhere, also outside of it. Taken in float32 (float64 for
            float64). Gradients reach them where asked.
        radius: from 0 to 15.
        padding: what lies outside of the map: ``"border"`` repeats its edge, ``"zeros"`` are zeros.
        align_corners: where the centre of cell i lies: at i if True, at i + 0.5 (as everywhere else here) if False. It
            is what the argument of this name does in `torch.nn.functional.grid_sample` when coordinates are divided by
            the size less one (True) or by the size (False).
        axis_order: which of the two axes of offsets comes first in p: ``"xy"`` has
            ``p = (dx + radius) * (2 radius + 1) + dy + radius``, ``"yx"`` has dx and dy exchanged.
        backend: ``"cpp"``, ``"triton"`` or ``"reference"``; None chooses by device.

    Returns:
        Contiguous ``[B, T, N, (2 radius + 1)^2, S]`` in the inputs' dtype. A NaN coordinate gives NaN at its own
        outputs and in the gradients of its own support and coordinates, and none to the features; an infinite one is
        far outside. A NaN feature reaches the samples that interpolate between its cell and others.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        NotImplementedError: an input carries a forward-mode tangent.
        ValueError: shapes, devices or options that do not fit, or a backend that cannot run this call (the message
            lists every backend with its reason and the way out).

    With ``padding="border", align_corners=True, axis_order="xy"`` it is the 4-D correlation of CoTracker3 (Karaev et
    al., 2024), with ``padding="zeros", align_corners=False, axis_order="yx"`` that of LocoTrack (Cho et al., "Local
    All-Pair Correspondence for Point Tracking", ECCV 2024) and, on square maps, the local correlation of TAPIR (Doersch
    et al., ICCV 2023).
    """
    features, support = _autocast(features, support)
    position, options = _local_correlation(features, support, coords, radius, padding, align_corners, axis_order)
    _backends.check_name(backend)
    return _local_op.local_correlation_fwd(features, support, position, *options, backend)


def local_correlation_linear(
    features: Tensor,
    support: Tensor,
    coords: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    radius: int = 3,
    padding: str = "border",
    align_corners: bool,
    axis_order: str = "xy",
    backend: str | None = None,
) -> Tensor:
    """`local_correlation` followed by a linear layer, of which only a block of points is stored at a time.

    ``F.linear(local_correlation(...).flatten(-2), weight, bias)``; the backward pass computes the correlations again.

    Args:
        features, support, coords, radius, padding, align_corners, axis_order, backend: as in `local_correlation`.
        weight: ``[O, (2 radius + 1)^2 S]``, as of `torch.nn.Linear`, of features' dtype and device.
        bias: ``[O]`` or None.

    Returns:
        Contiguous ``[B, T, N, O]`` in the inputs' dtype.

    Raises:
        TypeError, ValueError, NotImplementedError: as `local_correlation`.
    """
    features, support, weight, bias = _autocast(features, support, weight, bias)
    position, options = _local_correlation(features, support, coords, radius, padding, align_corners, axis_order)
    _backends.check_name(backend)
    _local_op.check_linear(features, support, weight, bias, radius)
    _refuse_forward_mode("local_correlation_linear", *(x for x in (weight, bias) if x is not None))
    return _local_op.local_correlation_linear_fwd(features, support, position, weight, bias, *options, backend)


def _local_correlation(
    features: Tensor,
    support: Tensor,
    coords: Tensor,
    radius: int,
    padding: str,
    align_corners: bool,
    axis_order: str,
) -> tuple[Tensor, tuple[int, bool, bool]]:
    """Positions and options as the operators of local correlation take them."""
    _local_op.check_tensors(features, support, coords)
    _local_op.check_radius(radius)
    if padding not in ("border", "zeros"):
        raise ValueError(f"padding must be 'border' or 'zeros', got {padding!r}")
    if axis_order not in ("xy", "yx"):
        raise ValueError(f"axis_order must be 'xy' or 'yx', got {axis_order!r}")
    if not isinstance(align_corners, bool):
        raise TypeError(f"align_corners must be a bool, got {type(align_corners).__name__}")
    _refuse_forward_mode("local_correlation", features, support, coords)
    position = coords.to(accumulator(features.dtype))
    position = position if align_corners else position - 0.5
    return position, (radius, padding == "zeros", axis_order == "yx")


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
    eps = _real("eps", eps)
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")
    if out_dtype is None:
        out_dtype = _autocast_dtype(x)
    elif not isinstance(out_dtype, torch.dtype):
        raise TypeError(f"out_dtype must be a torch.dtype or None, got {type(out_dtype).__name__}")
    _norm_op.check(x, branch, gamma, weight, bias, eps, out_dtype)
    given = [tensor for tensor in (x, branch, gamma, weight, bias) if tensor is not None]
    _refuse_forward_mode("residual_norm", *given)
    total, normed = _norm_op.residual_norm_fwd(x, branch, gamma, weight, bias, eps, out_dtype, backend)
    return x if branch is None else total, normed


def _real(name: str, x: float) -> float:
    """A number as Python's own, those of NumPy included."""
    if isinstance(x, bool) or not isinstance(x, (int, float, numbers.Real)):
        raise TypeError(f"{name} must be a number, got {type(x).__name__}; use .item() on a tensor")
    try:
        return float(x)
    except OverflowError:
        raise ValueError(f"{name} must fit into a float, got an integer of {int(x).bit_length()} bits") from None


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
    zero after the norm. The normalised tokens are never stored. The first derivative is supported; a second one raises
    RuntimeError.

    Args:
        tokens: ``[B, T, prefix + h * w, C]``, class and register tokens before the patches of each frame, row by row;
            any strides. float64, float32, bfloat16 or float16.
        grid: ``(h, w)``, multiples of `pool`.
        norm_weight, norm_bias: ``[C]``.
        weight, bias: ``[O, C, 3, 3]`` and ``[O]``.
        pool: side p of the patches that the result is stored in.
        eps: added to the variance.
        backend: ``"cpp"`` or ``"reference"``; None chooses by device (on a GPU the latter, which is cuDNN).

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
    eps = _real("eps", eps)
    dtype = _adapter_dtype(tokens)
    _adapter_op.check_in(tokens, norm_weight, norm_bias, weight, bias, *grid, pool, dtype)
    _refuse_forward_mode("norm_conv_relu", tokens, norm_weight, norm_bias, weight, bias)
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
    if dtype is None:
        dtype = _adapter_dtype(hidden if tokens is None else tokens)
    _adapter_op.check_out(hidden, weight, bias, tokens, *grid, pool, dtype)
    _refuse_forward_mode("relu_conv_add", hidden, weight, bias, *(() if tokens is None else (tokens,)))
    return _adapter_op.adapter_out_fwd(hidden, weight, bias, tokens, *grid, pool, dtype, backend)


def _adapter_dtype(tokens: Tensor) -> torch.dtype:
    """Of the convolutions; the autocast dtype, unless the tokens have 16 bits already."""
    if not isinstance(tokens, Tensor):
        raise TypeError(f"tokens must be a torch.Tensor, got {type(tokens).__name__}")
    return _autocast_dtype(tokens)


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
    eps = _real("eps", eps)
    if state is not None and not (isinstance(state, tuple | list) and len(state) == 2):
        raise TypeError(f"state must be a pair of tensors or None, got {type(state).__name__}")
    if not isinstance(causal, bool):
        raise TypeError(f"causal must be a bool, got {type(causal).__name__}")
    unbatched = isinstance(x, Tensor) and x.dim() == 3
    past = (None, None) if state is None else tuple(state)
    if unbatched:
        x, past = x.unsqueeze(0), tuple(s.unsqueeze(0) if isinstance(s, Tensor) else s for s in past)
    parameters = (norm_weight, conv1_weight, conv1_bias, conv2_weight, conv2_bias)
    _mixer_op.check(x, *parameters, causal, eps, *past)
    _refuse_forward_mode("temporal_mixer", x, *parameters)
    results = _mixer_op.temporal_mixer_fwd(x, *parameters, causal, eps, *past, backend)
    out, *after = (result.squeeze(0) for result in results) if unbatched else results
    return out if state is None else (out, (after[0], after[1]))


def window_extent(window: int | tuple[int, int]) -> tuple[int, int]:
    """Frames seen before and after a query, both inclusive: 13 -> (6, 6), (6, 0) -> (6, 0).

    Raises:
        TypeError: neither an int nor a pair of ints.
        ValueError: an even or non-positive total, or a negative count.
    """
    if isinstance(window, int) and not isinstance(window, bool):
        if window < 1 or window % 2 == 0:
            raise ValueError(
                f"window must be an odd number of frames, such as 13 for six on each side, got {window}; "
                "use window=(left, right) for sides that differ"
            )
        left = right = window // 2
    elif isinstance(window, (tuple, list)) and [type(count) for count in window] == [int, int]:
        left, right = window
    else:
        raise TypeError(f"window must be an odd int or a pair of ints (left, right), got {window!r}")
    _window_op.check_window(left, right)
    return left, right


def _refuse_forward_mode(operation: str, *tensors: Tensor) -> None:
    """PyTorch takes the tangent of an operator without a forward-mode rule for zero, silently; better no answer."""
    if torch.compiler.is_compiling() or torch.autograd.forward_ad._current_level < 0:
        return
    if any(torch.autograd.forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise NotImplementedError(
            f"{operation} has no forward-mode derivative (jvp); use reverse mode (torch.autograd.grad)"
        )


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The rule PyTorch's own attention follows: everything but float64 goes to the dtype of an active autocast."""
    if not isinstance(tensors[0], Tensor):
        return tensors
    device = tensors[0].device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if isinstance(x, Tensor) and x.dtype in _AUTOCAST_FROM else x for x in tensors)


def _autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a linear layer would cast x to."""
    device = x.device.type
    if x.dtype != torch.float32 or not torch.amp.is_autocast_available(device):
        return x.dtype
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


_AUTOCAST_FROM = (torch.float32, torch.bfloat16, torch.float16)
