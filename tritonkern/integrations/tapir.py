"""TAPIR and BootsTAPIR in PyTorch (github.com/google-deepmind/tapnet, read at commit c2cbab8, Apache-2.0).

The patch replaces the mixing over time in the blocks of the refinement (offline and online), the correlation of each
point with the features around it, and the soft-argmax of the first guess.

The official code divides both coordinates by the height of a feature map before it samples, so that on maps that are
not square its samples are not one cell apart; its own sampling runs there, as results must not change.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tritonkern.functional import local_correlation, soft_argmax_2d, temporal_mixer
from tritonkern.integrations import _compare, _recognise
from tritonkern.integrations._patch import Replacement
from tritonkern.integrations._precision import Precision
from tritonkern.nn._plain import is_plain
from tritonkern.nn.correlation import put_queries, scaled

PARTS = (
    *_recognise.methods("get_feature_grids", "refine_pips", "tracks_from_cost_volume"),
    *(_recognise.child(f"torch_cost_volume_track_mods.{name}") for name in ("hid1", "hid2", "hid3", "hid4", "occ_out")),
    _recognise.child("torch_pips_mixer.blocks", nn.ModuleList),
    _recognise.value("softmax_temperature", int, float),
    _recognise.value("highres_dim", int),
)


def replacements(path: str, tracker: Any, precision: Precision) -> Iterator[Replacement]:
    """What `tritonkern.patch` replaces in a model that has `PARTS`."""
    prefix = f"{path}." if path else ""
    for index, block in enumerate(tracker.torch_pips_mixer.blocks):
        if _is_block(block):
            name = f"{prefix}torch_pips_mixer.blocks.{index}"
            yield Replacement(name, block, "forward", (_block_forward,), _first)
    yield Replacement(path, tracker, "get_feature_grids", (_get_feature_grids,), calls_own=True)
    yield Replacement(path, tracker, "refine_pips", (partial(_refine_pips, precision),), _one_point)
    yield Replacement(path, tracker, "tracks_from_cost_volume", (_tracks_from_cost_volume,), _one_query)


def _is_block(block: Any) -> bool:
    """Whether it has what `temporal_mixer` computes, in plain layers: kernels of 3 frames, each channel made four."""
    norm, first, second = (getattr(block, name, None) for name in ("layer_norm", "mlp1_up", "mlp1_up_1"))
    if not isinstance(norm, nn.LayerNorm) or len(norm.normalized_shape) != 1:
        return False
    (channels,) = norm.normalized_shape
    padding = (0,) if getattr(block, "use_causal_conv", False) else (1,)
    kernel: dict[str, Any] = dict(
        kernel_size=(3,), stride=(1,), padding=padding, padding_mode="zeros", dilation=(1,), out_channels=4 * channels
    )
    return (
        is_plain(norm, nn.LayerNorm)
        and norm.weight is not None
        and norm.bias is None
        and is_plain(first, nn.Conv1d, **kernel, in_channels=channels, groups=channels)
        and is_plain(second, nn.Conv1d, **kernel, in_channels=4 * channels, groups=4 * channels)
        and all(conv.bias is not None for conv in (first, second))
        and all(
            hasattr(block, name) for name in ("layer_norm_1", "conv_channels_mixer", "use_causal_conv", "block_name")
        )
    )


def _block_forward(
    self: Any, own: Any, x: Tensor, causal_context: dict[str, Tensor] | None = None, get_causal_context: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """Replaces `PIPsConvBlock.forward`: `[N, T, C]` -> the same shape, and the state after it."""
    if not _is_block(self):  # no longer
        return own(x, causal_context, get_causal_context)
    parameters = (
        self.layer_norm.weight,
        self.mlp1_up.weight,
        self.mlp1_up.bias,
        self.mlp1_up_1.weight,
        self.mlp1_up_1.bias,
    )
    context: dict[str, Tensor] = {}
    result: Any
    if causal_context is None:
        result = temporal_mixer(x, *parameters, causal=self.use_causal_conv, eps=self.layer_norm.eps)
    else:
        names = [f"{self.block_name}_causal_{i}" for i in (1, 2)]
        state = (causal_context[names[0]], causal_context[names[1]])
        trained = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *parameters, *state))
        # What `temporal_mixer` does not carry on: gradients, and the frames of a mixer that is not causal.
        if trained or not self.use_causal_conv or any(t.shape[-2] != 2 or t.dtype != x.dtype for t in state):
            return own(x, causal_context, get_causal_context)
        result, after = temporal_mixer(x, *parameters, causal=True, state=state, eps=self.layer_norm.eps)
        context = dict(zip(names, after, strict=True))
    return result + self.conv_channels_mixer(self.layer_norm_1(result)), context


def _first(
    module: Any, own: Any, function: Any, x: Tensor, causal_context: dict[str, Tensor] | None = None, *args: Any
) -> Any:
    """The first sequence."""
    context = None if causal_context is None else {name: state[:1] for name, state in causal_context.items()}
    return _compare.arguments(module, own, function, x[:1], context, *args)


def _get_feature_grids(self: Any, own: Any, *args: Any, **kwargs: Any) -> Any:
    """Replaces the method of that name: maps with adjacent channels, which every iteration reads in place."""
    grids = own(*args, **kwargs)
    contiguous: dict[int, Tensor] = {}
    # Resolutions that are equal share their maps.
    for grid in (*grids.lowres, *grids.hires):
        if id(grid) not in contiguous:
            contiguous[id(grid)] = grid.contiguous()
    lowres, hires = (tuple(contiguous[id(grid)] for grid in level) for level in (grids.lowres, grids.hires))
    return grids._replace(lowres=lowres, hires=hires)


def _refine_pips(
    precision: Precision,
    self: Any,
    own: Any,
    target_feature: list[Tensor],
    frame_features: None,
    pyramid: list[Tensor],
    pos_guess: Tensor,
    occ_guess: Tensor,
    expd_guess: Tensor,
    orig_hw: tuple[int, int],
    last_iter: Tensor | None = None,
    mixer_iter: float = 0.0,
    resize_hw: tuple[int, int] | None = None,
    causal_context: dict[str, Tensor] | None = None,
    get_causal_context: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Replaces the method of that name: one iteration of the refinement, `[B, N, T, ...]` throughout."""
    if resize_hw is None or any(grid.shape[2] != grid.shape[3] for grid in pyramid):
        return own(
            target_feature, frame_features, pyramid, pos_guess, occ_guess, expd_guess, orig_hw, last_iter,
            mixer_iter, resize_hw, causal_context, get_causal_context,
        )  # fmt: skip
    batch, points, frames = occ_guess.shape
    correlations = []
    for level, (query, grid) in enumerate(zip(target_feature, pyramid, strict=True)):
        support = query.unsqueeze(-2)
        if last_iter is not None:
            own = last_iter[..., : self.highres_dim] if level == 0 else last_iter[..., self.highres_dim :]
            support = own.unsqueeze(-2)
        coords = _rescaled(pos_guess, orig_hw, grid.shape[2:4]).transpose(1, 2)
        support, options = support.to(grid.dtype), {"padding": "zeros", "align_corners": False, "axis_order": "yx"}
        found = precision(local_correlation, grid, support, coords, **options)
        correlations.append(found.squeeze(-1).transpose(1, 2))
    features = last_iter
    if features is None:
        features = torch.cat(target_feature[:2], -1).unsqueeze(2).expand(-1, -1, frames, -1)
    guesses = (torch.zeros_like(pos_guess), occ_guess[..., None], expd_guess[..., None])
    tokens = torch.cat([*guesses, features, *correlations], -1).flatten(0, 1)
    context = None if causal_context is None else {name: x.flatten(0, 1) for name, x in causal_context.items()}
    result, after = self.torch_pips_mixer(tokens.float(), context, get_causal_context)
    result = result.unflatten(0, (batch, points))
    if get_causal_context:
        after = {name: x.unflatten(0, (batch, points)) for name, x in after.items()}
    moved = pos_guess + _rescaled(result[..., :2], resize_hw, orig_hw)
    return moved, result[..., 2] + occ_guess, result[..., 3] + expd_guess, result[..., 4:] + features, after


def _one_point(
    module: Any,
    own: Any,
    function: Any,
    target_feature: list[Tensor],
    frame_features: None,
    pyramid: list[Tensor],
    pos_guess: Tensor,
    occ_guess: Tensor,
    expd_guess: Tensor,
    orig_hw: tuple[int, int],
    last_iter: Tensor | None = None,
    mixer_iter: float = 0.0,
    resize_hw: tuple[int, int] | None = None,
    causal_context: dict[str, Tensor] | None = None,
    get_causal_context: bool = False,
) -> Any:
    """One point in at most two frames, of which a part of the patch is outside of the maps."""
    frames = min(2, pos_guess.shape[2])
    return _compare.arguments(
        module,
        own,
        function,
        [_compare.random((1, 1, x.shape[-1]), x) for x in target_feature],
        None,
        [_compare.map_of_features((1, frames, *x.shape[2:]), x) for x in pyramid],
        pos_guess.new_tensor([[[[0.7, orig_hw[0] - 3.3], [3.9, orig_hw[0] - 8.6]][:frames]]]),
        _compare.random((1, 1, frames), occ_guess),
        _compare.random((1, 1, frames), expd_guess),
        orig_hw,
        None if last_iter is None else last_iter[:1, :1, :frames],
        mixer_iter,
        resize_hw,
        None if causal_context is None else {name: x[:1, :1] for name, x in causal_context.items()},
        get_causal_context,
    )


def _rescaled(points: Tensor, size: Any, new_size: Any) -> Tensor:
    """(x, y) in a raster of one (height, width) -> in another."""
    return points if tuple(size) == tuple(new_size) else scaled(points, new_size[1] / size[1], new_size[0] / size[0])


def _tracks_from_cost_volume(
    self: Any, own: Any, interp_feature: Tensor, feature_grid: Tensor, query_points: Tensor | None, im_shp: Any = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Replaces the method of that name: the first guess of points, occlusion and expected distance."""
    heads = self.torch_cost_volume_track_mods
    cost = torch.einsum("bnc,bthwc->tbnhw", interp_feature, feature_grid)
    frames, batch, points, rows, columns = cost.shape
    hidden = heads["hid1"](cost.flatten(0, 2).unsqueeze(1)).relu()
    heat = heads["hid2"](hidden).view(frames, batch, points, rows, columns).permute(1, 2, 0, 3, 4)
    # The official points carry no gradient either.
    found = soft_argmax_2d(heat.detach(), temperature=float(self.softmax_temperature), radius=5.0)
    found = _rescaled(found, (rows, columns), im_shp[2:4])
    if query_points is not None:
        found = put_queries(found, query_points)
    hidden = heads["hid3"](nn.functional.pad(hidden, (0, 2, 0, 2))).relu().mean((-2, -1))
    logits = heads["occ_out"](heads["hid4"](hidden).relu()).view(frames, batch, points, 2).permute(3, 1, 2, 0)
    return found, logits[0], logits[1]


def _one_query(
    module: Any,
    own: Any,
    function: Any,
    interp_feature: Tensor,
    feature_grid: Tensor,
    query_points: Tensor | None,
    im_shp: Any = None,
) -> Any:
    """One query in one frame."""
    grid = _compare.map_of_features((1, 1, *feature_grid.shape[2:]), feature_grid)
    # Asked for in another frame
    points = None if query_points is None else query_points.new_tensor([[[9.0, 1.0, 2.0]]])
    return _compare.arguments(module, own, function, grid[:, 0, -2, 1:2], grid, points, (1, 1, *im_shp[2:]))
