"""The computations of TAPIR: matching on a filtered map, and refinement by local correlation and mixing along time.

They are functions that call their layers, so that `tritonkern.models` and the patch of the official code share them.
Paper: Doersch et al., "TAPIR: Tracking Any Point with per-frame Initialization and temporal Refinement", ICCV 2023.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tritonkern.functional import local_correlation, soft_argmax_2d, temporal_mixer
from tritonkern.nn._plain import input_dtype, is_plain
from tritonkern.nn.correlation import TrackerOutput, put_queries, scaled


def match_filtered(
    query: Tensor,
    features: Tensor,
    heads: Any,
    temperature: float,
    resolution: tuple[int, int],
    queries: Tensor | None,
) -> TrackerOutput:
    """Where queries `[B, N, C]` are found in maps `[B, T, h, w, C]` whose cost volume two convolutions filter.

    `heads` are the layers "hid1" to "hid4" and "occ_out" by name. In frame round(t) the position is that of `queries`
    `[B, N, 3]` (t, y, x). `resolution` is (height, width) of the raster of positions, in pixels. Positions carry no
    gradient, as in the official code.
    """
    cost = torch.einsum("bnc,bthwc->bnthw", query, features)
    leading, (rows, columns) = cost.shape[:3], cost.shape[3:]
    hidden = heads["hid1"](cost.flatten(0, 2).unsqueeze(1).to(input_dtype(heads["hid1"], cost.dtype))).relu()
    heat = heads["hid2"](hidden).view(cost.shape)
    found = soft_argmax_2d(heat.detach(), temperature=temperature, radius=5.0)
    tracks = scaled(found, resolution[1] / columns, resolution[0] / rows)
    if queries is not None:
        tracks = put_queries(tracks, queries)
    pooled = heads["hid3"](F.pad(hidden, (0, 2, 0, 2))).relu().mean((-2, -1))
    logits = heads["occ_out"](heads["hid4"](pooled).relu()).unflatten(0, leading)
    return TrackerOutput(tracks, logits[..., 0], logits[..., 1])


def refine(
    mix: Callable[[Tensor], tuple[Tensor, Any]],
    pyramid: Sequence[Tensor],
    features: Tensor,
    guess: TrackerOutput,
    raster: tuple[int, int],
    resized: tuple[int, int],
    correlate: Callable[..., Tensor] = local_correlation,
) -> tuple[TrackerOutput, Tensor, Any]:
    """One step of refinement.

    Args:
        mix: from series of tokens `[B * N, T, C]` to corrections (x and y in pixels of the resized frames, two logits,
            then of `features`), and anything else, which is returned.
        pyramid: square maps `[B, T, h, w, C]`: one of C_fine channels, then one or more of C_coarse.
        features: `[B, N, C_fine + C_coarse]` of the queries in the first step, after that what the step before returns.
        guess: positions in pixels of the raster, and logits.
        raster: (height, width) of the raster in pixels.
        resized: (height, width) in pixels of the frames that the maps were computed from.
        correlate: `tritonkern.local_correlation`, or a function with its arguments.

    Returns:
        The better guess, features `[B, N, T, C_fine + C_coarse]`, and what `mix` returned beside the corrections.
    """
    tracks, occlusion, expected_distance = guess
    (height, width), (resized_height, resized_width) = raster, resized
    fine_channels = pyramid[0].shape[-1]
    correlations = []
    for level, grid in enumerate(pyramid):
        own = features[..., :fine_channels] if level == 0 else features[..., fine_channels:]
        rows, columns = grid.shape[2:4]
        coords = scaled(tracks, columns / width, rows / height).transpose(1, 2)
        found = correlate(
            grid, own.unsqueeze(-2).to(grid.dtype), coords, padding="zeros", align_corners=False, axis_order="yx"
        )
        correlations.append(found.squeeze(-1).transpose(1, 2))
    if features.dim() == 3:
        features = features.unsqueeze(2).expand(-1, -1, tracks.shape[2], -1)
    # The official network has inputs for the position, which are zero.
    logits = (occlusion[..., None], expected_distance[..., None])
    tokens = torch.cat([torch.zeros_like(tracks), *logits, features, *correlations], -1)
    update, after = mix(tokens.flatten(0, 1))
    update = update.unflatten(0, tokens.shape[:2])
    moved = tracks + scaled(update[..., :2], width / resized_width, height / resized_height)
    better = TrackerOutput(moved, occlusion + update[..., 2], expected_distance + update[..., 3])
    return better, features + update[..., 4:], after


def is_mixer_block(block: Any, causal: bool) -> bool:
    """Whether it has what `mix_block` reads, in plain layers: kernels of 3 frames, each channel made four."""
    norm, first, second = (getattr(block, name, None) for name in ("layer_norm", "mlp1_up", "mlp1_up_1"))
    if not isinstance(norm, nn.LayerNorm) or len(norm.normalized_shape) != 1:
        return False
    (channels,) = norm.normalized_shape
    kernel: dict[str, Any] = dict(
        kernel_size=(3,),
        stride=(1,),
        padding=(0,) if causal else (1,),
        padding_mode="zeros",
        dilation=(1,),
        out_channels=4 * channels,
    )
    return (
        is_plain(norm, nn.LayerNorm)
        and norm.weight is not None
        and norm.bias is None
        and is_plain(first, nn.Conv1d, **kernel, in_channels=channels, groups=channels)
        and is_plain(second, nn.Conv1d, **kernel, in_channels=4 * channels, groups=4 * channels)
        and all(conv.bias is not None for conv in (first, second))
        and all(hasattr(block, name) for name in ("layer_norm_1", "conv_channels_mixer"))
    )


def mix_block(
    block: Any, x: Tensor, causal: bool, state: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """A block of TAPIR's mixer, for which `is_mixer_block` holds: `[M, T, C]` -> the same shape, and the state after.

    `state`: of `tritonkern.temporal_mixer`, the frames before; of causal blocks only, and without gradients.
    """
    conv1, conv2 = block.mlp1_up, block.mlp1_up_1
    parameters = (block.layer_norm.weight, conv1.weight, conv1.bias, conv2.weight, conv2.bias)
    result: Any = temporal_mixer(x, *parameters, causal=causal, state=state, eps=block.layer_norm.eps)
    mixed, after = (result, None) if state is None else result
    return mixed + block.conv_channels_mixer(block.layer_norm_1(mixed)), after
