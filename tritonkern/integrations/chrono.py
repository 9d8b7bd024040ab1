"""The official repository of Chrono (github.com/cvlab-kaist/Chrono, read at commit 153b2f2, Apache-2.0).

Its model class is still called `LocoTrack`; it is recognised by its parts. The patch replaces the temporal adapters and
the hooks that add them to DINOv2 (their attention, from xformers, has kernels only for float16 and bfloat16 on NVIDIA
GPUs from Ampere on), the matching head with its chunks of queries, and on CPUs the attention of DINOv2.
"""

from __future__ import annotations

import importlib.machinery
import sys
import threading
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from tritonkern.functional import temporal_window_attention
from tritonkern.functional._full_attention import full_attention
from tritonkern.integrations import _compare, _recognise
from tritonkern.integrations._patch import Replacement, in_force, only_calls
from tritonkern.integrations._precision import Precision
from tritonkern.nn import TemporalAdapter, TemporalWindowAttention
from tritonkern.nn._plain import has_hooks
from tritonkern.nn.correlation import find


@contextmanager
def without_xformers() -> Iterator[None]:
    """Let the official code be imported and run where xformers is missing, or has no kernel for the device or dtype.

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


def replacements(path: str, tracker: Any, precision: Precision) -> Iterator[Replacement]:
    """What `tritonkern.patch` replaces in a model that has `PARTS`."""
    if precision.name != "float32":
        raise ValueError(
            f"precision: {precision.name!r} has no meaning for the official Chrono, which has no local correlation "
            "and chooses bfloat16 itself (its argument use_bfloat16); leave precision='float32'"
        )
    prefix = f"{path}." if path else ""
    for index, adapter in enumerate(tracker.adapter):
        name = f"{prefix}adapter.{index}"
        if extras := _extras(adapter.attn_temp):
            raise ValueError(f"{name}.attn_temp has {extras}, which the patch does not replace")
        yield Replacement(name, adapter, "forward", (_adapter_forward,), _few_cells)
    for name, attention in tracker.dino.named_modules(prefix=f"{prefix}dino"):
        if _is_attention(attention):
            # xformers' form of it overrides the eager one.
            known = frozenset({"MemEffAttention"})
            yield Replacement(name, attention, "forward", (_attention_forward,), _few_tokens, overrides=known)
    yield Replacement(path, tracker, "forward_dino", (_forward_dino,), _small_images)
    yield Replacement(path, tracker, "tracks_from_cost_volume", (_tracks_from_cost_volume,), _one_query)
    yield Replacement(path, tracker, "estimate_trajectories", (_estimate_trajectories,), calls_own=True)


_POOL = 4
"""Side, in tokens, of the patches that share one temporal attention sequence."""

PARTS = (
    *_recognise.methods("forward_dino", "get_query_features", "estimate_trajectories", "tracks_from_cost_volume"),
    _recognise.child("dino"),
    _recognise.child("adapter", nn.ModuleList),
    _recognise.child("occ_linear"),
    _recognise.value("softmax_temperature", int, float),
)


def _is_attention(module: nn.Module) -> bool:
    """DINOv2's, and not that of this package, which needs no patch."""
    layers = all(isinstance(getattr(module, name, None), nn.Linear) for name in ("qkv", "proj"))
    own = type(module).__module__.startswith("tritonkern.")
    return layers and isinstance(getattr(module, "num_heads", None), int) and not own and not hasattr(module, "q_norm")


def _extras(attention: Any) -> str | None:
    """What the official class offers, its checkpoints do not use, and ours does not have."""
    norms = [getattr(attention, norm, nn.Identity()) for norm in ("q_norm", "k_norm")]
    dropout = getattr(attention, "proj_drop", nn.Identity())
    if not all(isinstance(norm, nn.Identity) for norm in norms) or getattr(dropout, "p", 0) > 0:
        return "query and key norms or dropout"
    return None


def _twin(adapter: Any, dim: int) -> TemporalAdapter | None:
    """Our adapter for `dim` channels around the layers of an official one, or None if that does more than ours.

    It is made at each call, of the layers that are there then: those of a copy are its own. No constructor runs, as it
    would draw random numbers.
    """
    twin, attention, own = TemporalAdapter.__new__(TemporalAdapter), adapter.attn_temp, TemporalWindowAttention
    parts = [child for name, child in attention.named_children() if name not in ("qkv", "proj")]
    stride, width = getattr(adapter.conv_pool, "stride", ()), getattr(attention.proj, "in_features", 0)
    if _extras(attention) or not only_calls(attention) or any(map(has_hooks, parts)) or not (stride and width):
        return None
    nn.Module.__init__(twin)
    for name in ("norm", "conv1", "conv_pool", "norm2", "conv_upsample", "conv2"):
        setattr(twin, name, getattr(adapter, name))
    twin.dim, twin.pool = dim, stride[0]
    twin.attn_temp = own.__new__(own)
    nn.Module.__init__(twin.attn_temp)
    twin.attn_temp.num_heads = attention.num_heads
    twin.attn_temp.head_dim = width // attention.num_heads
    twin.attn_temp.window = (attention.bias.window_left, attention.bias.window_right)
    twin.attn_temp.qkv, twin.attn_temp.proj = attention.qkv, attention.proj
    for name in ("q_norm", "k_norm", "proj_drop"):  # which do nothing in the official one either
        setattr(twin.attn_temp, name, nn.Identity())
    return twin


def _attention_forward(self: Any, own: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Replaces the attention of DINOv2's blocks on a CPU in evaluation: `[N, L, C]` -> the same shape."""
    if args or kwargs or self.training or x.device.type != "cpu":
        return own(x, *args, **kwargs)
    query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
    return self.proj(full_attention(query, key, value).flatten(2))


def _few_tokens(module: Any, own: Any, function: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    return _compare.arguments(module, own, function, x[:1, :64], *args, **kwargs)


def _adapter_forward(self: Any, own: Any, x: Tensor) -> Tensor:
    """Replaces `TemporalAdapter.forward`: `[B, C, T, h, w]` -> the same shape."""
    twin = _twin(self, x.shape[1])
    return own(x) if twin is None else twin(x.movedim(1, -1)).movedim(-1, 1)


def _few_cells(module: Any, own: Any, function: Any, x: Tensor) -> Any:
    """Two frames of the patches of two queries of the temporal attention."""
    return _compare.arguments(module, own, function, _compare.random((1, x.shape[1], 2, _POOL, 2 * _POOL), x))


def _forward_dino(self: Any, own: Any, video: Tensor, use_bfloat16: bool = True, img_mult: int = 64) -> Any:
    """Replaces the method of that name: `[B, T, H, W, 3]` in [-1, 1] -> unit-norm features."""
    # Like the official code, which reads the attribute and not the argument.
    batch, frames, cells = *video.shape[:2], self.img_mult
    grid = (cells, cells)
    mean, std = (_channels(values, video) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    images = rearrange(((video + 1) / 2 - mean) / std, "b t h w c -> (b t) c h w")
    images = F.interpolate(images, size=(14 * cells, 14 * cells), mode="bilinear", align_corners=False)

    hooks, thread = [], threading.get_ident()
    try:
        for block, adapter in zip(self.dino.blocks, self.adapter, strict=False):

            def hook(module: nn.Module, args: Any, output: Tensor, adapter: Any = adapter) -> Tensor | None:
                if threading.get_ident() != thread:  # of another call, which has hooks of its own
                    return None
                return _add(adapter, output.unflatten(0, (batch, frames)), grid).flatten(0, 1)

            hooks.append(block.register_forward_hook(hook))
        with torch.autocast("cuda", torch.bfloat16, enabled=use_bfloat16 and video.is_cuda):
            tokens = self.dino.get_intermediate_layers(images, n=1, return_class_token=False)[-1]
    finally:
        for handle in hooks:
            handle.remove()
    tokens = rearrange(tokens, "(b t) (h w) c -> b t h w c", t=frames, h=cells)
    tokens = tokens / tokens.square().sum(-1, keepdim=True).clamp(min=1e-6).sqrt()
    # The repository's own tuple, whatever the name under which its file was imported.
    files = (sys.modules[base.__module__] for base in type(self).__mro__)
    grids = next(file.FeatureGrids for file in files if hasattr(file, "FeatureGrids"))
    return grids((tokens,), (), (), ((256, 256),))


def _add(adapter: Any, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """All tokens `[B, T, prefix + h * w, C]` of a block, with what the adapter adds to the patches."""
    twin = _twin(adapter, tokens.shape[-1]) if in_force(adapter, "forward") else None
    if twin is not None:
        return twin.add_to(tokens, grid)
    prefix, patches = tokens.split((tokens.shape[2] - grid[0] * grid[1], grid[0] * grid[1]), 2)
    update = adapter(rearrange(patches, "b t (h w) c -> b c t h w", h=grid[0]))
    return torch.cat([prefix, patches + rearrange(update, "b c t h w -> b t (h w) c")], 2)


def _small_images(module: Any, own: Any, function: Any, video: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Two frames of 8 x 8 tokens; each of the two computations has the adapters that are in force for it."""
    module.__dict__["img_mult"] = 2 * _POOL
    return _compare.arguments(module, own, function, _compare.random((1, 2, 32, 32, 3), video), *args, **kwargs)


def _channels(values: tuple[float, ...], video: Tensor) -> Tensor:
    """One number per channel, without a copy from the CPU, which a CUDA graph could not hold."""
    return torch.stack([video.new_full((), value) for value in values])


def _estimate_trajectories(
    self: Any,
    own: Any,
    video_size: tuple[int, int],
    is_training: bool,
    feature_grids: Any,
    query_features: Any,
    query_points_in_video: Tensor | None,
    query_chunk_size: int | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Replaces the method of that name: all queries at once, as no cost volume is stored."""
    queries = max(1, query_features.lowres[0].shape[1])
    return own(video_size, is_training, feature_grids, query_features, query_points_in_video, queries, *args, **kwargs)


def _tracks_from_cost_volume(
    self: Any, own: Any, interp_feature: Tensor, feature_grid: Tensor, query_points: Tensor | None, im_shp: Any = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Replaces the method of that name: points, occlusion and expected distance logits.

    The products are summed in float32 under autocast as well, where the official code rounds them to bfloat16.
    """
    resolution, temperature = (im_shp[2], im_shp[3]), float(self.softmax_temperature)
    return tuple(find(interp_feature, feature_grid, query_points, self.occ_linear, resolution, temperature))  # type: ignore[return-value]


def _one_query(
    module: Any,
    own: Any,
    function: Any,
    interp_feature: Tensor,
    feature_grid: Tensor,
    query_points: Tensor | None,
    im_shp: Any = None,
) -> Any:
    """One query in one frame, with one best match and others nearly as good."""
    grid = _compare.map_of_features((1, 1, *feature_grid.shape[2:]), feature_grid)
    query = grid[:, 0, -2, 1:2].to(interp_feature.dtype)
    # Asked for in another frame
    points = None if query_points is None else query_points.new_tensor([[[9.0, 1.0, 2.0]]])
    return _compare.arguments(module, own, function, query, grid, points, (1, 1, *im_shp[2:]))
