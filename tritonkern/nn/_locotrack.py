"""The computations of LocoTrack: matching on two maps, and refinement by local 4-D correlation and attention over time.

They are functions that call their layers, so that `tritonkern.models` and the patch of the official code share them.
Paper: Cho et al., "Local All-Pair Correspondence for Point Tracking", ECCV 2024.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from tritonkern.functional import local_correlation, soft_argmax_2d
from tritonkern.nn._plain import input_dtype, is_plain
from tritonkern.nn.correlation import TrackerOutput, put_queries, scaled

_MATCH_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}
"""Maximum bytes of both cost maps of the queries that are matched together."""


def match_two_maps(
    query: Tensor,
    features: Tensor,
    cost_conv: nn.Module,
    occ_linear: nn.Module,
    temperature: float,
    resolution: tuple[int, int],
    fine_query: Tensor,
    fine_features: Tensor,
    queries: Tensor | None,
) -> tuple[TrackerOutput, Tensor]:
    """Where queries `[B, N, C]` are found in coarse and fine maps `[B, T, h, w, C]`, and the coarse cost volume.

    `cost_conv` is a 3 x 3 convolution that keeps the size; it mixes the costs of both maps before the soft-argmax. In
    frame round(t) the position is that of `queries` `[B, N, 3]` (t, y, x). `resolution` is (height, width) of the
    raster of positions, in pixels.
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
        costs = cost_conv(both.to(input_dtype(cost_conv, both.dtype))).view(*leading, rows, columns)
        found.append(soft_argmax_2d(costs, temperature=temperature))
        smallest, largest = both.flatten(2).aminmax(dim=-1)
        statistics.append(torch.cat([both.mean((2, 3)), largest, smallest], -1).unflatten(0, leading))
    tracks = scaled(torch.cat(found, 1), resolution[1] / columns, resolution[0] / rows)
    if queries is not None:
        tracks = put_queries(tracks, queries)
    logits = occ_linear(torch.cat(statistics, 1).to(input_dtype(occ_linear, cost.dtype)))
    return TrackerOutput(tracks, logits[..., 0], logits[..., 1]), cost


def refine(
    encoders: Iterable[Callable[[Tensor], Tensor]],
    mixer: Callable[[Tensor], Tensor],
    pyramid: Sequence[Tensor],
    supports: Sequence[Tensor],
    guess: TrackerOutput,
    raster: tuple[int, int],
    resized: tuple[int, int],
    correlate: Callable[..., Tensor] = local_correlation,
) -> TrackerOutput:
    """One step of refinement.

    Args:
        encoders: for each level a module from correlations `[M, 49, 49]` (patch, support) to tokens `[M, 2C]`, such as
            `encode_correlation` computes.
        mixer: a module from series of tokens `[M, T, C]` to corrections `[M, T, 4 or more]` (x and y in pixels of the
            resized frames, and two logits), such as `mix_over_time` computes.
        pyramid: maps `[B, T, h, w, C]`.
        supports: features `[B, N, 7, 7, C]` (y, x) around the queries, of each map.
        guess: positions in pixels of the raster, and logits.
        raster: (height, width) of the raster in pixels.
        resized: (height, width) in pixels of the frames that the features were computed from.
        correlate: `tritonkern.local_correlation`, or a function with its arguments.
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
        batch, frames, points = correlation.shape[:3]
        encoded = encoder(correlation.flatten(0, 2))
        tokens.append(rearrange(encoded, "(b t n) c -> b n t c", b=batch, t=frames, n=points))
    step = tracks[..., 1:, :] - tracks[..., :-1, :]
    scale = (resized_width / width**2, resized_height / height**2)
    motion = (F.pad(-step, (0, 0, 0, 1)), F.pad(step, (0, 0, 1, 0)))
    tokens.append(_encode_motion(torch.cat([scaled(x, *scale) for x in motion], -1)))

    series = torch.cat(tokens, -1)
    update = mixer(series.flatten(0, 1))[..., :4].unflatten(0, series.shape[:2])
    moved = tracks + scaled(update[..., :2], width / resized_width, height / resized_height)
    return TrackerOutput(moved, occlusion + update[..., 2], expected_distance + update[..., 3])


def mix_over_time(mixer: Any, series: Tensor) -> Tensor:
    """`[M, T, C]` -> `[M, T, 4 or more]` by the layers `input_proj`, `transformer` and `output_proj` of `mixer`.

    The official layer `output_proj` has outputs for features that nothing reads; where it is plain they are skipped.
    """
    hidden = mixer.transformer(mixer.input_proj(series))
    last = mixer.output_proj
    if not is_plain(last, nn.Linear) or last.bias is None:
        return last(hidden)
    return F.linear(hidden, last.weight[:4], last.bias[:4])


def encode_correlation(layers: Iterable[nn.Module], correlation: Tensor) -> Tensor:
    """`layers`, each a convolution, a group norm and a ReLU, on `[M, P, S]` as images of patches and of supports.

    Returns `[M, 2C]`, the means of the two.
    """
    side = math.isqrt(correlation.shape[-1])
    # [M, 49, 7, 7]: the patch as the image and the support as its channels, which are adjacent in memory; and the other
    # way round.
    images = [x.unflatten(2, (side, side)) for x in (correlation.mT, correlation)]
    first, *rest = layers
    if isinstance(first, nn.Sequential) and is_plain(first, nn.Sequential):
        # Neither image is copied. The small convolutions that follow are fastest with channels last.
        x = torch.cat([first[0](image).contiguous(memory_format=torch.channels_last) for image in images])
        rest = [*list(first)[1:], *rest]
    else:
        x = first(torch.cat(images))
    for layer in rest:
        x = layer(x)
    return torch.cat(x.mean((2, 3)).chunk(2), -1)


class SameConv2d(nn.Conv2d):
    """Padded as TensorFlow's SAME: see `convolve_same`."""

    def forward(self, x: Tensor) -> Tensor:
        return convolve_same(self, x)


def convolve_same(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """What `conv.forward` computes if it pads as TensorFlow's SAME: of an odd number of cells, one more at the end."""
    height, width = (
        max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
        for size, kernel, stride in zip(x.shape[-2:], conv.kernel_size, conv.stride, strict=True)
    )
    if x.shape[-2:] == conv.kernel_size and height == width == 0:
        # One output cell: a matrix product, a quarter of the convolution's time on a CPU
        flat, weight = (rearrange(y, "n c h w -> n (h w c)") for y in (x, conv.weight))
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
    query, key, value = (rearrange(x, "m t (h d) -> m h t d", h=len(bias)) for x in (query, key, value))
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias.to(query.dtype))
    return rearrange(mixed, "m h t d -> m t (h d)")


def temporal_bias(num_heads: int, frames: int, device: torch.device) -> Tensor:
    """`[H, T, T]`: half the heads see the past, half the future, both less the farther a frame is away."""
    half = num_heads // 2
    slopes = torch.tensor([24 ** (-(i + 1) / half) for i in range(half)], device=device)[:, None, None]
    # Frames from the query to the key
    time = torch.arange(frames, device=device)
    ahead = (time[None, :] - time[:, None]).float()
    past = torch.where(ahead > 0, -1e9, slopes * ahead)
    future = torch.where(ahead < 0, -1e9, -slopes * ahead)
    return torch.cat([past, future])
