"""The official repository of CoTracker3 (github.com/facebookresearch/co-tracker, read at commit 82e02e8, CC-BY-NC-4.0).

Offline and online model, also inside its predictors and from torch.hub. No line of it is in this file: its `forward`
stays and runs. The method that samples the patches around the points returns a promise instead of them; when the
promise has been correlated with the support patches and reaches the first linear layer, one operation computes what
that layer returns. Beside this, attention runs in PyTorch's fused form, and the online model keeps the features of the
frames that two windows share.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from tritonkern.functional import local_correlation_linear
from tritonkern.integrations._precision import Copies, Precision


def replacements(model: nn.Module, precision: Precision) -> Iterator[tuple[str, nn.Module, str, Any]]:
    """What `tritonkern.patch` replaces in `model`: path, module, method, function."""
    for path, tracker in model.named_modules():
        if not _is_tracker(tracker):
            continue
        prefix = f"{path}." if path else ""
        for name, module in tracker.updateformer.named_modules():
            if _is_attention(module):
                yield f"{prefix}updateformer.{name}", module, "forward", _attention
        yield path, tracker, "get_correlation_feat", _promise_patches(Copies(), precision)
        if callable(getattr(tracker, "init_video_online_processing", None)):
            kept = _KeptFeatures()
            yield path, tracker, "forward", kept.track
            yield path, tracker, "init_video_online_processing", kept.forget
            yield f"{prefix}fnet", tracker.fnet, "forward", kept.encode
        else:
            yield f"{prefix}fnet", tracker.fnet, "forward", _encode


def _is_tracker(module: nn.Module) -> bool:
    methods = ("get_correlation_feat", "get_track_feat", "get_support_points")
    radius, mlp = getattr(module, "corr_radius", None), getattr(module, "corr_mlp", None)
    return (
        all(callable(getattr(module, name, None)) for name in methods)
        and all(isinstance(getattr(module, name, None), nn.Module) for name in ("fnet", "updateformer"))
        and isinstance(radius, int)
        and isinstance(getattr(mlp, "fc1", None), nn.Linear)
        and mlp.fc1.in_features == (2 * radius + 1) ** 4  # type: ignore[union-attr]
    )


def _is_attention(module: nn.Module) -> bool:
    layers = {name: layer for name, layer in module.named_children() if isinstance(layer, nn.Linear)}
    return layers.keys() == {"to_q", "to_kv", "to_out"} and hasattr(module, "heads") and hasattr(module, "scale")


def _attention(self: Any, x: Tensor, context: Tensor | None = None, attn_bias: Tensor | None = None) -> Tensor:
    """Takes the place of `Attention.forward`: softmax(q k^T scale + bias) v, `[B, N, C]` -> the same shape."""
    source = x if context is None else context
    query = self.to_q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
    key, value = self.to_kv(source).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
    bias = None if attn_bias is None else attn_bias.to(query.dtype)
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=self.scale)
    return self.to_out(mixed.transpose(1, 2).flatten(2))


def _promise_patches(copies: Copies, precision: Precision) -> Any:
    def get_correlation_feat(self: Any, fmaps: Tensor, queried_coords: Tensor) -> _Patches:
        """Takes the place of the method of that name: features `[B, T, C, h, w]`, points `[B * T, N, 2]`."""
        return _Patches(self, fmaps, queried_coords, copies, precision)

    return get_correlation_feat


class _Promise:
    """What has not been computed yet. A method or function other than the expected next one gets the real tensor."""

    def tensor(self) -> Tensor:
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tensor(), name)

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = tree_map(lambda x: x.tensor() if isinstance(x, _Promise) else x, (args, kwargs or {}))
        return function(*args, **kwargs)


class _Patches(_Promise):
    """The (2r + 1)^2 samples around every point: `[B, T, N, 2r + 1, 2r + 1, C]`, offsets along x first, then y."""

    def __init__(self, tracker: Any, features: Tensor, points: Tensor, copies: Copies, precision: Precision) -> None:
        self.tracker, self.features, self.points = tracker, features, points
        self.copies, self.precision = copies, precision

    def cells(self) -> Tensor:
        """The features as `[B, T, h, w, C]`, one after another for each cell."""
        features = self.precision.rounded(self.features)
        cells = features.movedim(2, -1)
        if cells.stride(-1) == 1 or cells.requires_grad:
            return cells
        # More frames than fit through the encoder at once: put together by the model, channels first.
        return self.copies.of(features, lambda x: x.movedim(2, -1).contiguous())

    def tensor(self) -> Tensor:
        return type(self.tracker).get_correlation_feat(self.tracker, self.features, self.points)

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is torch.einsum and len(args) == 3 and not kwargs:
            equation, patches, support = args
            if equation == "btnhwc,bnijc->btnhwij" and isinstance(patches, _Patches) and isinstance(support, Tensor):
                return _Correlation(patches, support)
        return super().__torch_function__(function, types, args, kwargs)


class _Correlation(_Promise):
    """Every sample of a patch times every sample of the support `[B, N, 2r + 1, 2r + 1, C]` of its point.

    `[B, T, N, 2r + 1, 2r + 1, 2r + 1, 2r + 1]`, or as `shape` says.
    """

    def __init__(self, patches: _Patches, support: Tensor, shape: tuple[int, ...] | None = None) -> None:
        self.patches, self.support, self.asked = patches, support, shape

    def tensor(self) -> Tensor:
        product = torch.einsum("btnhwc,bnijc->btnhwij", self.patches.tensor(), self.support)
        return product if self.asked is None else product.reshape(self.asked)

    def reshape(self, *shape: Any) -> Any:
        batch, frames, (_, points) = *self.patches.features.shape[:2], self.patches.points.shape[:2]
        side = self.support.shape[-2]
        if shape == (batch * frames * points, side**4):
            return _Correlation(self.patches, self.support, shape)
        return self.tensor().reshape(*shape)

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is F.linear and len(args) == 3 and not kwargs and isinstance(args[0], cls) and args[0].asked:
            return args[0].linear(*args[1:])
        return super().__torch_function__(function, types, args, kwargs)

    def linear(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        cells = self.patches.cells()
        # In the repository's order x moves first, in patch and support alike, and its pixel i has its centre at i.
        result = self.patches.precision(
            local_correlation_linear,
            cells,
            self.support.flatten(2, 3),
            self.patches.points.unflatten(0, cells.shape[:2]),
            weight,
            bias,
            radius=math.isqrt(self.support.shape[2] * self.support.shape[3]) // 2,
            padding="border",
            align_corners=True,
            axis_order="xy",
        )
        return result.flatten(0, 2)


def _encode(self: Any, images: Tensor) -> Tensor:
    """Takes the place of `fnet.forward`: the same features, channels last, as the correlation reads them."""
    return type(self).forward(self, images).contiguous(memory_format=torch.channels_last)


class _KeptFeatures:
    """Features of the frames that the next window of the online model will see again.

    They are used where the next window begins with the very same numbers, and forgotten when a new video starts. The
    encoder normalises every frame by itself, so that they are what it would return again. A copy of a patched model has
    the same methods but an encoder of its own.
    """

    def __init__(self) -> None:
        self._batch: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
        self.kept: WeakKeyDictionary[nn.Module, tuple[Tensor, Tensor]] = WeakKeyDictionary()

    def forget(self, tracker: Any) -> None:
        """Takes the place of `init_video_online_processing`."""
        self.kept.pop(tracker.fnet, None)
        type(tracker).init_video_online_processing(tracker)

    def track(self, tracker: Any, *args: Any, **kwargs: Any) -> Any:
        """Takes the place of the online model's `forward`, whose windows overlap by one half in online mode."""
        forward = type(tracker).forward
        call = inspect.signature(forward).bind(tracker, *args, **kwargs).arguments
        if call.get("is_online"):
            self._batch[tracker.fnet] = call["video"].shape[0]
        try:
            return forward(tracker, *args, **kwargs)
        finally:
            self._batch.pop(tracker.fnet, None)

    def encode(self, encoder: Any, images: Tensor) -> Tensor:
        """Takes the place of `fnet.forward`: `[B * T, 3, H, W]` -> `[B * T, C, h, w]`, channels last."""
        batch = self._batch.get(encoder)
        if batch is None or torch.is_grad_enabled():
            return _encode(encoder, images)
        clip, shared, parts = images.unflatten(0, (batch, -1)), 0, []
        if encoder in self.kept:
            before, features = self.kept[encoder]
            start = clip[:, : before.shape[1]]
            if start.shape == before.shape and start.device == before.device and torch.equal(start, before):
                shared, parts = before.shape[1], [features]
        # [B, t, h, w, C], a layout that torch.cat keeps
        fresh = _encode(encoder, clip[:, shared:].flatten(0, 1)).movedim(1, -1).unflatten(0, (batch, -1))
        features = torch.cat([*parts, fresh], 1)
        step = clip.shape[1] // 2
        self.kept[encoder] = clip[:, step:].clone(), features[:, step:].clone()
        return features.movedim(-1, 2).flatten(0, 1)
