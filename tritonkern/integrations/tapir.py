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

from tritonkern.functional import local_correlation
from tritonkern.integrations import _compare, _recognise
from tritonkern.integrations._patch import Replacement
from tritonkern.integrations._precision import Precision
from tritonkern.nn._tapir import is_mixer_block, match_filtered, mix_block, refine
from tritonkern.nn.correlation import TrackerOutput

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
    causal = getattr(block, "use_causal_conv", None)
    return causal is not None and hasattr(block, "block_name") and is_mixer_block(block, causal)


def _block_forward(
    self: Any, own: Any, x: Tensor, causal_context: dict[str, Tensor] | None = None, get_causal_context: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """Replaces `PIPsConvBlock.forward`: `[N, T, C]` -> the same shape, and the state after it."""
    if not _is_block(self):  # no longer
        return own(x, causal_context, get_causal_context)
    if causal_context is None:
        return mix_block(self, x, self.use_causal_conv)[0], {}
    names = [f"{self.block_name}_causal_{i}" for i in (1, 2)]
    state = (causal_context[names[0]], causal_context[names[1]])
    read = (self.layer_norm, self.mlp1_up, self.mlp1_up_1)
    inputs = (x, *state, *(parameter for layer in read for parameter in layer.parameters()))
    trained = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    # What `temporal_mixer` does not carry on: gradients, and the frames of a mixer that is not causal.
    if trained or not self.use_causal_conv or any(t.shape[-2] != 2 or t.dtype != x.dtype for t in state):
        return own(x, causal_context, get_causal_context)
    result, after = mix_block(self, x, True, state)
    return result, dict(zip(names, after or (), strict=True))


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
    batch, points = occ_guess.shape[:2]
    context = None if causal_context is None else {name: x.flatten(0, 1) for name, x in causal_context.items()}

    def mix(tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self.torch_pips_mixer(tokens.float(), context, get_causal_context)

    features = torch.cat(target_feature[:2], -1) if last_iter is None else last_iter
    guess = TrackerOutput(pos_guess, occ_guess, expd_guess)
    correlate = partial(precision, local_correlation)
    better, features, after = refine(mix, pyramid, features, guess, orig_hw, resize_hw, correlate)
    if get_causal_context:
        after = {name: x.unflatten(0, (batch, points)) for name, x in after.items()}
    return (*better, features, after)


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
    # Of the second map and the smaller ones, made of it, the official code has the same features.
    fine, coarse = (_compare.random((1, 1, x.shape[-1]), x) for x in target_feature[:2])
    return _compare.arguments(
        module,
        own,
        function,
        [fine, *[coarse] * (len(target_feature) - 1)],
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


def _tracks_from_cost_volume(
    self: Any, own: Any, interp_feature: Tensor, feature_grid: Tensor, query_points: Tensor | None, im_shp: Any = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Replaces the method of that name: the first guess of points, occlusion and expected distance."""
    heads, temperature = self.torch_cost_volume_track_mods, float(self.softmax_temperature)
    return match_filtered(interp_feature, feature_grid, heads, temperature, (im_shp[2], im_shp[3]), query_points)


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
