"""What LocoTrack is made of: matching on two maps, and refinement by local 4-D correlation and attention over time.

Functions on its layers, so that they serve our own modules and those of the official code (same names of parameters).
Paper: Cho et al., "Local All-Pair Correspondence for Point Tracking", ECCV 2024.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tritonkern.functional import local_correlation, soft_argmax_2d
from tritonkern.nn.correlation import TrackerOutput, put_queries, scaled

_MATCH_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}
"""Of both maps of the queries that are matched at a time."""


def match_two_maps(
    query: Tensor,
    features: Tensor,
    cost_conv: nn.Conv2d,
    occ_linear: nn.Linear,
    temperature: float,
    resolution: tuple[int, int],
    fine_query: Tensor,
    fine_features: Tensor,
    queries: Tensor | None,
) -> tuple[TrackerOutput, Tensor]:
    """Where queries `[B, N, C]` are found in coarse and fine maps `[B, T, h, w, C]`, and the coarse cost volume.

    The costs of both maps are mixed by a 3 x 3 convolution before the soft-argmax; in frame round(t) the position is
    that of `queries` `[B, N, 3]` (t, y, x). `resolution` is (height, width) of the raster of positions.
    """
    cost = torch.einsum("bnc,bthwc->bnthw", query, features)
    rows, columns = size = fine_features.shape[2:4]
    # Some queries at a time: what is computed of the maps of all of them does not fit into a cache.
    of_a_query = 2 * features.shape[0] * features.shape[1] * rows * columns * cost.element_size()
    few = max(1, _MATCH_BYTES.get(cost.device.type, _MATCH_BYTES["cuda"]) // of_a_query)
    found, statistics = [], []
    for coarse, fine in zip(cost.split(few, 1), fine_query.split(few, 1), strict=True):
        leading = coarse.shape[:3]
        # [B * n * T, 2, h, w]; the parts are not named, so that they are freed at once.
        both = torch.stack(
            [
                F.interpolate(coarse.flatten(0, 1), size, mode="bilinear", align_corners=False).flatten(0, 1),
                torch.einsum("bnc,bthwc->bnthw", fine, fine_features).flatten(0, 2),
            ],
            1,
        )
        mixed = F.conv2d(both, cost_conv.weight, cost_conv.bias, padding=1)
        found.append(soft_argmax_2d(mixed.view(*leading, rows, columns), temperature=temperature))
        smallest, largest = both.flatten(2).aminmax(dim=-1)
        statistics.append(torch.cat([both.mean((2, 3)), largest, smallest], -1).unflatten(0, leading))
    tracks = scaled(torch.cat(found, 1), resolution[1] / columns, resolution[0] / rows)
    if queries is not None:
        tracks = put_queries(tracks, queries)
    logits = occ_linear(torch.cat(statistics, 1))
    return TrackerOutput(tracks, logits[..., 0], logits[..., 1]), cost


def refine(
    encoders: Iterable[Any],
    mixer: Any,
    pyramid: Sequence[Tensor],
    supports: Sequence[Tensor],
    guess: TrackerOutput,
    raster: tuple[int, int],
    resized: tuple[int, int],
    correlate: Callable[..., Tensor] = local_correlation,
) -> TrackerOutput:
    """One step of refinement.

    Args:
        encoders: a `CorrelationEncoder` for each level.
        mixer: a `TemporalMixer`.
        pyramid: maps `[B, T, h, w, C]`.
        supports: features `[B, N, 7, 7, C]` (y, x) around the queries, of each map.
        guess: positions in pixels of the raster, and logits.
        raster: (height, width) of it.
        resized: (height, width) of the frames that the features are of.
        correlate: `tritonkern.local_correlation`, or a function that stands for it.
    """
    tracks, occlusion, expected_distance = guess
    (height, width), (resized_height, resized_width) = raster, resized
    tokens = [occlusion[..., None], expected_distance[..., None]]
    for encoder, grid, support in zip(encoders, pyramid, supports, strict=False):
        rows, columns = grid.shape[2:4]
        # [B, T, N, 49, 49]: patch, support
        correlation = correlate(
            grid,
            support.flatten(2, 3),
            scaled(tracks, columns / width, rows / height).transpose(1, 2),
            radius=support.shape[2] // 2,
            padding="zeros",
            align_corners=False,
            axis_order="yx",
        )
        encoded = encode_correlation(encoder.conv, correlation.flatten(0, 2))
        tokens.append(encoded.unflatten(0, correlation.shape[:3]).transpose(1, 2))
    step = tracks[..., 1:, :] - tracks[..., :-1, :]
    scale = (resized_width / width**2, resized_height / height**2)
    motion = (F.pad(-step, (0, 0, 0, 1)), F.pad(step, (0, 0, 1, 0)))
    tokens.append(_encode_motion(torch.cat([scaled(x, *scale) for x in motion], -1)))

    series = torch.cat(tokens, -1)
    hidden = mixer.transformer(mixer.input_proj(series.flatten(0, 1)))
    # The official layer has outputs for features that nothing reads; they are not computed.
    update = F.linear(hidden, mixer.output_proj.weight[:4], mixer.output_proj.bias[:4]).unflatten(0, series.shape[:2])
    moved = tracks + scaled(update[..., :2], width / resized_width, height / resized_height)
    return TrackerOutput(moved, occlusion + update[..., 2], expected_distance + update[..., 3])


def encode_correlation(layers: Iterable[Any], correlation: Tensor) -> Tensor:
    """Convolution, group norm and ReLU of each of `layers` over `[M, P, S]`, as images of patches and of supports.

    Returns `[M, 2C]`, the means of the two.
    """
    side = math.isqrt(correlation.shape[-1])
    # [M, 49, 7, 7]: the patch as the image and the support as its channels, which lie last in memory; the other way
    # round. Channels last from the first convolution on, where the small convolutions that follow are fastest.
    images = [x.unflatten(2, (side, side)) for x in (correlation.mT, correlation)]
    (conv, norm, relu), *rest = layers
    x = torch.cat([convolve_same(conv, image).contiguous(memory_format=torch.channels_last) for image in images])
    x = relu(norm(x))
    for conv, norm, relu in rest:
        x = relu(norm(convolve_same(conv, x)))
    return torch.cat(x.mean((2, 3)).chunk(2), -1)


def convolve_same(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """`conv` padded as TensorFlow's SAME: of an odd number of cells the larger half lies behind."""
    height, width = (
        max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
        for size, kernel, stride in zip(x.shape[-2:], conv.kernel_size, conv.stride, strict=True)
    )
    if x.shape[-2:] == conv.kernel_size and height == width == 0:
        # One output cell: a matrix product, a quarter of the convolution's time on a CPU
        flat, weight = (y.movedim(1, -1).flatten(1) for y in (x, conv.weight))
        return F.linear(flat, weight, conv.bias)[..., None, None]
    if height % 2 or width % 2:
        x = F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))
        height = width = 0
    return F.conv2d(x, conv.weight, conv.bias, conv.stride, (height // 2, width // 2))


def _encode_motion(step: Tensor) -> Tensor:
    """`[..., 4]` -> `[..., 84]`: itself, then its sines and cosines at ten octaves."""
    phase = torch.cat([step * 2**octave for octave in range(10)], -1)
    return torch.cat([step, phase.sin(), (phase + 0.5 * math.pi).sin()], -1)


def attend_over_time(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """Attention of `[M, T, H * D]` with `bias` `[H, T, T]` from `temporal_bias`."""
    query, key, value = (x.unflatten(-1, (len(bias), -1)).transpose(1, 2) for x in (query, key, value))
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias.to(query.dtype))
    return mixed.transpose(1, 2).flatten(2)


def temporal_bias(heads: int, frames: int, device: torch.device) -> Tensor:
    """`[H, T, T]`: half the heads see the past, half the future, both less the farther a frame is away."""
    half = heads // 2
    slopes = torch.tensor([24 ** (-(i + 1) / half) for i in range(half)], device=device)[:, None, None]
    # How far the key lies ahead of the query
    time = torch.arange(frames, device=device)
    ahead = (time[None, :] - time[:, None]).float()
    past = torch.where(ahead > 0, -1e9, slopes * ahead)
    future = torch.where(ahead < 0, -1e9, -slopes * ahead)
    return torch.cat([past, future])
