"""The official repository of Chrono (github.com/cvlab-kaist/Chrono, read at commit 153b2f2, Apache-2.0).

Its model class is still called `LocoTrack`; it is recognised by its parts. Replaced are the temporal attention of the
adapters (xformers' has float16 and bfloat16 kernels for NVIDIA GPUs from Ampere on, nothing else), the way of the video
through DINOv2 and the adapters, and the matching head with its chunks of queries.
"""

from __future__ import annotations

import importlib.machinery
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tritonkern.functional import correlation_soft_argmax, temporal_window_attention


@contextmanager
def without_xformers() -> Iterator[None]:
    """Lets the official code be imported and run where xformers is missing, or has no kernel for the device or dtype.

    ::

        with tritonkern.integrations.chrono.without_xformers():
            from models.locotrack_model import LocoTrack

    Inside, the two names that the official file takes from `xformers.ops` are a stand-in around
    `tritonkern.temporal_window_attention`: any device, any floating dtype. What was imported keeps it; other code sees
    the real xformers, or its absence, again afterwards. DINOv2 itself finds the stand-in incomplete and uses PyTorch's
    attention.
    """
    ops = types.ModuleType("xformers.ops")
    ops.memory_efficient_attention = _memory_efficient_attention  # type: ignore[attr-defined]
    ops.fmha = types.SimpleNamespace(  # type: ignore[attr-defined]
        attn_bias=types.SimpleNamespace(LocalAttentionFromBottomRightMask=_LocalMask)
    )
    package = types.ModuleType("xformers")
    package.ops = ops  # type: ignore[attr-defined]
    stand_ins = {"xformers": package, "xformers.ops": ops}
    for name, module in stand_ins.items():
        module.__spec__ = importlib.machinery.ModuleSpec(name, loader=None)
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "xformers"}
    for name in before:
        del sys.modules[name]
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        for name in stand_ins:
            sys.modules.pop(name, None)
        sys.modules.update(before)


class _LocalMask(NamedTuple):
    """Frames that a query sees before and after itself."""

    window_left: int
    window_right: int


def _memory_efficient_attention(query: Tensor, key: Tensor, value: Tensor, attn_bias: _LocalMask) -> Tensor:
    """`[B, T, H, D]`, the layout of xformers and ours."""
    return temporal_window_attention(query, key, value, (attn_bias.window_left, attn_bias.window_right))


def replacements(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Any]]:
    """What `tritonkern.patch` replaces in `model`: path, module, method, function."""
    for path, tracker in model.named_modules():
        if not _is_tracker(tracker):
            continue
        for name, layer in tracker.adapter.named_modules(prefix=f"{path}.adapter" if path else "adapter"):
            if _is_attention(layer):
                yield name, layer, "forward", _attention_forward
        yield path, tracker, "tracks_from_cost_volume", _tracks_from_cost_volume
        yield path, tracker, "estimate_trajectories", _estimate_trajectories


def _is_tracker(module: nn.Module) -> bool:
    methods = ("forward_dino", "get_query_features", "estimate_trajectories", "tracks_from_cost_volume")
    children = {"dino": nn.Module, "adapter": nn.ModuleList, "occ_linear": nn.Linear}
    return (
        all(callable(getattr(module, name, None)) for name in methods)
        and all(isinstance(getattr(module, name, None), kind) for name, kind in children.items())
        and isinstance(getattr(module, "softmax_temperature", None), (int, float))
    )


def _is_attention(module: nn.Module) -> bool:
    names = ("qkv", "q_norm", "k_norm", "proj", "proj_drop")
    return all(isinstance(getattr(module, name, None), nn.Module) for name in names) and hasattr(
        getattr(module, "bias", None), "window_left"
    )


def _attention_forward(self: Any, x: Tensor) -> Tensor:
    """Takes the place of `LocalAttentionLayer.forward`: `[B, T, C]` -> the same shape."""
    query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
    window = (self.bias.window_left, self.bias.window_right)
    out = temporal_window_attention(self.q_norm(query), self.k_norm(key), value, window)
    return self.proj_drop(self.proj(out.flatten(-2)))


def _estimate_trajectories(
    self: Any,
    video_size: tuple[int, int],
    is_training: bool,
    feature_grids: Any,
    query_features: Any,
    query_points_in_video: Tensor | None,
    query_chunk_size: int | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Takes the place of the method of that name: all queries at once, as no cost volume is stored."""
    queries = max(1, query_features.lowres[0].shape[1])
    return type(self).estimate_trajectories(
        self, video_size, is_training, feature_grids, query_features, query_points_in_video, queries, *args, **kwargs
    )


def _tracks_from_cost_volume(
    self: Any, interp_feature: Tensor, feature_grid: Tensor, query_points: Tensor | None, im_shp: Any = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Takes the place of the method of that name: points, occlusion and expected distance logits.

    The products are summed in float32 under autocast as well, where the official code rounds them to bfloat16.
    """
    frames, rows, columns = feature_grid.shape[1:4]
    match = correlation_soft_argmax(
        interp_feature.to(feature_grid.dtype), feature_grid, temperature=float(self.softmax_temperature)
    )
    # Factor by factor: a tensor of them would have to be copied to the GPU at every call.
    x, y = match.points.unbind(-1)
    points = torch.stack([x * (im_shp[3] / columns), y * (im_shp[2] / rows)], -1)
    if query_points is not None:
        own_frame = query_points[..., :1].detach().round() == torch.arange(frames, device=points.device)
        points = torch.where(own_frame[..., None], query_points[:, :, None, 1:].flip(-1).to(points.dtype), points)
    statistics = torch.stack([match.mean, match.max, match.min], -1).detach()
    logits = self.occ_linear(statistics.to(self.occ_linear.weight.dtype))
    return points, logits[..., 0], logits[..., 1]
