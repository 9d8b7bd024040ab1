"""The official repository of LocoTrack (github.com/cvlab-kaist/locotrack, PyTorch, read at commit 3385a23, Apache-2.0).

Recognised by its parts, base and small. Replaced are the refinement step, whose sampled 7 x 7 patches of every point,
frame and level are no longer stored, and whose unused outputs are no longer computed; the cost volume, which is no
longer softmaxed, masked and summed in copies; the attention over time, whose bias is built once; and the padding of
convolutions, which is no copy where it is the same on both sides.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tritonkern.functional import local_correlation
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
from tritonkern.nn.correlation import TrackerOutput


def replacements(model: nn.Module, precision: Precision) -> Iterator[tuple[str, nn.Module, str, Any]]:
    """What `tritonkern.patch` replaces in `model`: path, module, method, function."""
    for path, tracker in model.named_modules():
        if not _is_tracker(tracker):
            continue
        biases: dict[Any, Tensor] = {}
        for name, module in tracker.named_modules(prefix=path):
            if _is_attention(module):
                yield name, module, "forward", _attention(biases)
            elif _pads_like_tensorflow(module):
                yield name, module, "forward", convolve_same
        yield path, tracker, "tracks_from_cost_volume", _tracks_from_cost_volume
        yield path, tracker, "refine_pips", partial(_refine_pips, precision=precision)


def _is_tracker(module: Any) -> bool:
    methods = ("get_feature_grids", "get_query_features", "refine_pips", "tracks_from_cost_volume")
    children = {"cmdtop": nn.ModuleList, "cost_conv": nn.Conv2d, "occ_linear": nn.Linear}
    children |= {"torch_pips_mixer": nn.Module, "resnet_torch": nn.Module}
    return (
        all(callable(getattr(module, name, None)) for name in methods)
        and all(isinstance(getattr(module, name, None), kind) for name, kind in children.items())
        and module.cost_conv.kernel_size == (3, 3)
        and isinstance(getattr(module, "softmax_temperature", None), (int, float))
    )


def _is_attention(module: nn.Module) -> bool:
    layers = ("query_proj", "key_proj", "value_proj", "final_proj")
    return all(isinstance(getattr(module, name, None), nn.Linear) for name in layers) and hasattr(module, "num_heads")


def _pads_like_tensorflow(module: Any) -> bool:
    """Convolutions that copy their input into a larger one with zeros around it, even where both sides get as many."""
    return (
        isinstance(module, nn.Conv2d)
        and callable(getattr(module, "calc_same_pad", None))
        and module.groups == 1
        and module.dilation == (1, 1)
    )


def _attention(biases: dict[Any, Tensor]) -> Any:
    def forward(self: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any = None) -> Tensor:
        """Takes the place of `MultiHeadAttention.forward`: `[B * N, T, C]` -> the same shape."""
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

    return forward


def _refine_pips(
    self: Any,
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
    precision: Precision,
    **kwargs: Any,
) -> tuple[Tensor, Tensor, Tensor, None, None]:
    """Takes the place of the method of that name: positions `[B, N, T, 2]` and logits `[B, N, T]`, one step better.

    The features that the official code hands from step to step are read by nobody, and are None here.
    """
    correlate = partial(precision, local_correlation)
    guess = TrackerOutput(pos_guess, occ_guess, expd_guess)
    encoders = [partial(encode_correlation, encoder.conv) for encoder in self.cmdtop]
    mixer = partial(mix_over_time, self.torch_pips_mixer)
    better = refine(encoders, mixer, pyramid, support_feature, guess, orig_hw, resize_hw, correlate)
    return (*better, None, None)


def _tracks_from_cost_volume(
    self: Any,
    interp_feature: Tensor,
    interp_feature_hires: Tensor,
    feature_grid: Tensor,
    feature_grid_hires: Tensor,
    query_points: Tensor | None,
    im_shp: Any = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Takes the place of the method of that name: points, occlusion and expected distance logits, coarse costs."""
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
