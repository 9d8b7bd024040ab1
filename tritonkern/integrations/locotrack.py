"""The official repository of LocoTrack (github.com/cvlab-kaist/locotrack, PyTorch, read at commit 3385a23, Apache-2.0).

Base and small models are recognised by their parts. The patch replaces the refinement step, whose sampled 7 x 7 patches
of every point, frame and level are not stored and whose unused outputs are not computed; the soft-argmax of the cost
volume, which makes no copies; the attention over time, whose bias is built once; and the padding of convolutions, which
makes no copy where it is the same on both sides.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from tritonkern.functional import local_correlation
from tritonkern.integrations import _compare, _recognise
from tritonkern.integrations._patch import Replacement, only_calls
from tritonkern.integrations._precision import Precision
from tritonkern.nn._locotrack import (
    attend_over_time,
    convolve_same,
    encode_correlation,
    match_two_maps,
    mix_over_time,
    refine,
    temporal_bias,
)
from tritonkern.nn._plain import has_hooks
from tritonkern.nn.correlation import TrackerOutput

PARTS = (
    *_recognise.methods("get_feature_grids", "get_query_features", "refine_pips", "tracks_from_cost_volume"),
    _recognise.child("cmdtop", nn.ModuleList),
    _recognise.child("cost_conv", kernel_size=(3, 3)),
    _recognise.child("occ_linear"),
    _recognise.child("torch_pips_mixer"),
    _recognise.child("resnet_torch"),
    _recognise.value("softmax_temperature", int, float),
)


def replacements(path: str, tracker: Any, precision: Precision) -> Iterator[Replacement]:
    """What `tritonkern.patch` replaces in a model that has `PARTS`."""
    attend = partial(_attention, {})
    for name, module in tracker.named_modules(prefix=path):
        if _is_attention(module):
            yield Replacement(name, module, "forward", (attend,), _first)
        elif _pads_like_tensorflow(module):
            yield Replacement(name, module, "forward", (_convolve,), _first)
    yield Replacement(path, tracker, "tracks_from_cost_volume", (_tracks_from_cost_volume,), _one_query)
    yield Replacement(path, tracker, "refine_pips", (partial(_refine_pips, precision),), _one_point)


def _is_attention(module: nn.Module) -> bool:
    layers = ("query_proj", "key_proj", "value_proj", "final_proj")
    return all(isinstance(getattr(module, name, None), nn.Module) for name in layers) and hasattr(module, "num_heads")


def _pads_like_tensorflow(module: Any) -> bool:
    """Convolutions that copy their input into a larger one with zeros around it, even where both sides get as many."""
    return (
        isinstance(module, nn.Conv2d)
        and callable(getattr(module, "calc_same_pad", None))
        and module.groups == 1
        and module.dilation == (1, 1)
    )


def _first(module: Any, own: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
    """The first sequence or image."""

    def first(x: Any) -> Any:
        return x[:1] if isinstance(x, Tensor) else x

    args, kwargs = tuple(map(first, args)), {name: first(x) for name, x in kwargs.items()}
    return _compare.arguments(module, own, function, *args, **kwargs)


def _convolve(self: Any, own: Any, x: Tensor) -> Tensor:
    """Replaces the `forward` of convolutions that pad like TensorFlow."""
    return convolve_same(self, x)


def _attention(
    biases: dict[Any, Tensor], self: Any, own: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any = None
) -> Tensor:
    """Replaces `MultiHeadAttention.forward`: `[B * N, T, C]` -> the same shape."""
    of = (self.num_heads, query.shape[1], query.device)
    bias = biases.get(of)
    if bias is None:
        # An inference tensor could not be used in training afterwards.
        with torch.inference_mode(False):
            bias = temporal_bias(*of)
        biases.clear()
        biases[of] = bias
    projections = (self.query_proj(query), self.key_proj(key), self.value_proj(value))
    return self.final_proj(attend_over_time(*projections, bias))


def _refine_pips(
    precision: Precision,
    self: Any,
    own: Any,
    target_feature: Any,
    support_feature: Sequence[Tensor],
    frame_features: Any,
    pyramid: Sequence[Tensor],
    pos_guess: Tensor,
    occ_guess: Tensor,
    expd_guess: Tensor,
    orig_hw: tuple[int, int],
    last_iter: Any = None,
    mixer_iter: Any = 0.0,
    resize_hw: tuple[int, int] = (256, 256),
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor, Tensor, None, None]:
    """Replaces the method of that name: positions `[B, N, T, 2]` and logits `[B, N, T]`, one step better.

    The official code passes features from step to step that nothing reads; they are None here.
    """
    correlate = partial(precision, local_correlation)
    guess = TrackerOutput(pos_guess, occ_guess, expd_guess)
    encoders = [partial(_encode, encoder) for encoder in self.cmdtop]
    mixer = self.torch_pips_mixer
    mix = partial(mix_over_time, mixer) if only_calls(mixer) else mixer
    return (*refine(encoders, mix, pyramid, support_feature, guess, orig_hw, resize_hw, correlate), None, None)


def _encode(encoder: Any, correlation: Tensor) -> Tensor:
    """`CMDTop` of correlations `[M, 49, 49]` (patch, support)."""
    # Its layers take patches and supports together, where the official code calls them twice: hooks would see that.
    if only_calls(encoder) and not any(map(has_hooks, encoder.modules())):
        return encode_correlation(encoder.conv, correlation)
    side = math.isqrt(correlation.shape[-1])
    return encoder(rearrange(correlation, "m (h w) (i j) -> m h w i j", h=side, i=side))


def _one_point(
    module: Any,
    own: Any,
    function: Any,
    target_feature: Sequence[Tensor],
    support_feature: Sequence[Tensor],
    frame_features: Any,
    pyramid: Sequence[Tensor],
    pos_guess: Tensor,
    occ_guess: Tensor,
    expd_guess: Tensor,
    orig_hw: tuple[int, int],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """One point in two frames, of which a part of the patch is outside of the maps, refined for the first time."""
    rest = dict(zip(("last_iter", "mixer_iter", "resize_hw"), args, strict=False)) | kwargs | {"last_iter": None}
    call = (
        [_compare.random((1, 1, x.shape[-1]), x) for x in target_feature],
        [_compare.map_of_features((1, 1, *x.shape[2:]), x) for x in support_feature],
        None,
        [_compare.map_of_features((1, 2, *x.shape[2:]), x) for x in pyramid],
        pos_guess.new_tensor([[[[0.7, orig_hw[0] - 3.3], [3.9, orig_hw[0] - 8.6]]]]),
        _compare.random((1, 1, 2), occ_guess),
        _compare.random((1, 1, 2), expd_guess),
        orig_hw,
    )
    return lambda: function(module, own, *call, **rest)[:3], lambda: own(*call, **rest)[:3]


def _tracks_from_cost_volume(
    self: Any,
    own: Any,
    interp_feature: Tensor,
    interp_feature_hires: Tensor,
    feature_grid: Tensor,
    feature_grid_hires: Tensor,
    query_points: Tensor | None,
    im_shp: Any = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Replaces the method of that name: points, occlusion and expected distance logits, coarse costs."""
    if has_hooks(self.cost_conv):  # which is called for a few queries at a time
        return own(interp_feature, interp_feature_hires, feature_grid, feature_grid_hires, query_points, im_shp=im_shp)
    match, cost = match_two_maps(
        interp_feature,
        feature_grid,
        self.cost_conv,
        self.occ_linear,
        float(self.softmax_temperature),
        (im_shp[2], im_shp[3]),
        interp_feature_hires,
        feature_grid_hires,
        query_points,
    )
    return (*match, cost)


def _one_query(
    module: Any,
    own: Any,
    function: Any,
    interp_feature: Tensor,
    interp_feature_hires: Tensor,
    feature_grid: Tensor,
    feature_grid_hires: Tensor,
    query_points: Tensor | None,
    im_shp: Any = None,
) -> Any:
    """One query in one frame, with one best match and others nearly as good."""
    grids = [_compare.map_of_features((1, 1, *x.shape[2:]), x) for x in (feature_grid, feature_grid_hires)]
    features = [grid[:, 0, -2, 1:2] for grid in grids]
    # Asked for in another frame
    points = None if query_points is None else query_points.new_tensor([[[9.0, 1.0, 2.0]]])
    return _compare.arguments(module, own, function, *features, *grids, points, (1, 1, *im_shp[2:]))
