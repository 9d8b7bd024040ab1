"""CoTracker3 (github.com/facebookresearch/co-tracker, read at commit 82e02e8, CC-BY-NC-4.0), and forks of it.

Offline and online models are recognised, also inside predictors and from torch.hub. Their `forward` runs as it is, and
no line of it is in this file. What changes is what its six steps from points to correlation tokens compute, per level
of the feature pyramid (B batch, T frames, N points, C channels, r = 3):

===================================== =================================================== =============================
step of the model                     unpatched                                           patched
===================================== =================================================== =============================
1. sample a patch around each point   `[B, T, N, 7, 7, C]`, stored                        a `Promise` of that shape
2. arrange the support of the query   `[B, N, 7, 7, C]`                                   the same
3. correlate both by an einsum        `[B, T, N, 7, 7, 7, 7]`, stored                     a `Promise` of that shape
4. reshape to rows                    `[B T N, 2401]`, a copy                             a `Promise` of that shape
5. first linear layer, `corr_mlp.fc1` `[B T N, 384]`                                      `local_correlation_linear`
6. GELU and second linear layer       `[B T N, 256]`                                      the same
===================================== =================================================== =============================

A model that does anything else with the patches or the correlations gets the real tensors. In addition, attention runs
in a fused form, and the online model keeps the features of the frames that two windows share.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tritonkern.functional import local_correlation, local_correlation_linear
from tritonkern.integrations import _attention, _compare, _recognise
from tritonkern.integrations._patch import Replacement
from tritonkern.integrations._precision import Copies, Precision
from tritonkern.integrations._promise import RESHAPES, Promise
from tritonkern.integrations._stream import Stream

PARTS = (
    *_recognise.methods("get_correlation_feat", "get_track_feat", "get_support_points"),
    _recognise.child("fnet"),
    _recognise.child("updateformer"),
    _recognise.value("corr_radius", int),
    _recognise.child("corr_mlp.fc1", in_features=lambda tracker: (2 * getattr(tracker, "corr_radius", 3) + 1) ** 4),
)


def replacements(
    path: str, tracker: Any, precision: Precision, stream: bool = False, verify: bool = True
) -> Iterator[Replacement]:
    """What `tritonkern.patch` replaces in a model that has `PARTS`."""
    prefix = f"{path}." if path else ""
    yield from _attention.replacements(tracker.updateformer, f"{prefix}updateformer")
    copies = Copies()
    # The official code repeats the border of a map; MV-TAP has a setting for zeros.
    paddings = ("border", "zeros")
    functions = tuple(partial(promise_patches, Patches, copies, precision, padding) for padding in paddings)
    yield Replacement(path, tracker, "get_correlation_feat", functions, in_a_corner)
    if callable(getattr(tracker, "init_video_online_processing", None)):
        kept = _KeptFeatures()
        schedule = Stream(kept.track, kept.kept, verify) if stream else kept
        yield Replacement(path, tracker, "forward", (schedule.track,), calls_own=True)
        yield Replacement(path, tracker, "init_video_online_processing", (schedule.forget,), calls_own=True)
        if isinstance(schedule, Stream):
            yield Replacement(f"{prefix}corr_mlp", tracker.corr_mlp, "forward", (schedule.embed,), calls_own=True)
        yield Replacement(f"{prefix}fnet", tracker.fnet, "forward", (kept.encode,), _one_image, calls_own=True)
    else:
        yield Replacement(f"{prefix}fnet", tracker.fnet, "forward", (encode_channels_last,), calls_own=True)


def promise_patches(
    kind: type[Patches], copies: Copies, precision: Precision, padding: str,
    self: Any, own: Any, fmaps: Tensor, queried_coords: Tensor,
) -> Tensor:  # fmt: skip
    """Replaces the method of that name: features `[B, T, C, h, w]`, points `[B * T, N, 2]` (x, y) in cells."""
    if torch.compiler.is_compiling():
        return own(fmaps, queried_coords)
    return kind.at(own, fmaps, queried_coords, 2 * self.corr_radius + 1, copies, precision, padding)


class Patches(Promise):
    """The (2r + 1)^2 samples around every point: `[B, T, N, 2r + 1, 2r + 1, C]`, offsets along x first, then y."""

    copies: Copies
    precision: Precision
    padding: str

    @classmethod
    def at(
        cls, own: Any, fmaps: Tensor, points: Tensor, side: int, copies: Copies, precision: Precision, padding: str
    ) -> Any:
        batch, frames, channels = fmaps.shape[:3]
        patches = cls.make((batch, frames, points.shape[1], side, side, channels), own, fmaps, points)
        patches.copies, patches.precision, patches.padding = copies, precision, padding
        return patches

    def frames_from(self, start: int) -> Patches:
        """The patches in later frames alone."""
        fmaps, points = self.inputs[0][:, start:], self.points()[:, start:].flatten(0, 1)
        return self.at(self.compute, fmaps, points, self.shape[-2], self.copies, self.precision, self.padding)

    def cells(self) -> Tensor:
        """The features as `[B, T, h, w, C]`, with adjacent channels."""
        features = self.precision.rounded(self.inputs[0])
        cells = features.movedim(2, -1)
        if cells.stride(-1) == 1 or cells.requires_grad:
            return cells
        # More frames than the encoder takes at once: the model has concatenated them with channels first.
        return self.copies.of(features, lambda x: x.movedim(2, -1).contiguous())

    def points(self) -> Tensor:
        """`[B, T, N, 2]`."""
        return self.inputs[1].unflatten(0, self.inputs[0].shape[:2])

    def shortcut(self, function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if function is torch.einsum and len(args) == 3 and args[1] is self and isinstance(args[2], Tensor):
            equation, _, support = args
            side, channels = self.shape[-2], self.shape[-1]
            same = support.shape == (self.shape[0], self.shape[2], side, side, channels)
            if renamed(equation) == "abcdef,acghf->abcdegh" and same and support.dtype == self.dtype:
                shape = (*self.shape[:-1], side, side)
                product = _Correlation.make(shape, partial(_product, self.compute), *self.inputs, support)
                product.patches = self
                return product
        return NotImplemented


def renamed(equation: Any) -> str | None:
    """An einsum's equation with its letters renamed to a, b, c ... in the order of their appearance."""
    if not isinstance(equation, str):
        return None
    text, names = equation.replace(" ", ""), dict[str, str]()
    for letter in filter(str.isalpha, text):
        names.setdefault(letter, chr(ord("a") + len(names)))
    return "".join(names.get(letter, letter) for letter in text)


def _product(own: Any, fmaps: Tensor, points: Tensor, support: Tensor) -> Tensor:
    return torch.einsum("btnhwc,bnijc->btnhwij", own(fmaps, points), support)


class _Correlation(Promise):
    """Every sample of a patch times every sample of the support of its point.

    `[B, T, N, 2r + 1, 2r + 1, 2r + 1, 2r + 1]`, or `[B * T * N, (2r + 1)^4]`.
    """

    patches: Patches

    def frames_from(self, start: int) -> Tensor:
        """Of rows: those of later frames, `[B * (T - start) * N, (2r + 1)^4]`."""
        volume = torch.einsum("btnhwc,bnijc->btnhwij", self.patches.frames_from(start), self.inputs[2])
        return volume.reshape(-1, self.shape[1])

    def shortcut(self, function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        rows = (math.prod(self.patches.shape[:3]), self.patches.shape[-2] ** 4)
        if function in RESHAPES and args[0] is self and self.reshaped(function, args, kwargs) == rows:
            flat = type(self).make(rows, lambda *inputs: self.compute(*inputs).reshape(rows), *self.inputs)
            flat.patches = self.patches
            return flat
        if function is F.linear and args[0] is self and self.shape == rows:
            return self._linear(*args[1:], **kwargs)
        return NotImplemented

    def _linear(self, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        support = self.inputs[2]
        tensors = (self.patches.cells(), support.flatten(2, 3), self.patches.points(), weight, bias)
        # In the repository's order x moves first, in patch and support alike, and its pixel i has its centre at i.
        result = self.patches.precision(
            local_correlation_linear,
            *tensors,
            radius=support.shape[2] // 2,
            padding=self.patches.padding,
            align_corners=True,
            axis_order="xy",
        )
        return result.flatten(0, 2)


def in_a_corner(module: Any, own: Any, function: Any, fmaps: Tensor, queried_coords: Tensor) -> Any:
    """Correlations of one point in one frame, of which a part of the patch is outside of the map."""
    features = _compare.random((1, 1, *fmaps.shape[2:]), fmaps)
    point = queried_coords.new_tensor([0.3, fmaps.shape[-2] - 1.6]).view(1, 1, 2)
    side = 2 * module.corr_radius + 1
    support = _compare.random((1, 1, side, side, fmaps.shape[2]), fmaps)

    def ours() -> Tensor:
        patches = function(module, own, features, point)
        return local_correlation(
            patches.cells().to(features.dtype),
            support.flatten(2, 3),
            patches.points(),
            radius=module.corr_radius,
            padding=patches.padding,
            align_corners=True,
            axis_order="xy",
        ).flatten()

    return ours, lambda: _product(own, features, point, support).flatten()


def encode_channels_last(self: Any, own: Any, images: Tensor) -> Tensor:
    """Replaces `fnet.forward`: the same features, channels last, as the correlation reads them."""
    return own(images).contiguous(memory_format=torch.channels_last)


def _one_image(module: Any, own: Any, function: Any, images: Tensor) -> Any:
    """One image by itself, and together with another one: are its features the same?"""
    return lambda: own(images[:1]), lambda: own(images[:2])[:1]


class _KeptFeatures:
    """Features of the frames that the next window of the online model will see again.

    They are used where the next window begins with exactly the same pixels, and dropped when a new video starts. The
    encoder normalises every frame by itself, so that it would compute the same ones again (see `_one_image`). A copy of
    a patched model shares this object but has an encoder of its own.
    """

    def __init__(self) -> None:
        self._batch: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
        self.kept: WeakKeyDictionary[nn.Module, tuple[Tensor, Tensor]] = WeakKeyDictionary()

    def forget(self, tracker: Any, own: Any) -> None:
        """Replaces `init_video_online_processing`."""
        self.kept.pop(tracker.fnet, None)
        own()

    def track(self, tracker: Any, own: Any, *args: Any, **kwargs: Any) -> Any:
        """Replaces the online model's `forward`, whose windows overlap by one half in online mode."""
        call = inspect.signature(own).bind(*args, **kwargs).arguments
        if call.get("is_online"):
            self._batch[tracker.fnet] = call["video"].shape[0]
        try:
            return own(*args, **kwargs)
        finally:
            self._batch.pop(tracker.fnet, None)

    def encode(self, encoder: Any, own: Any, images: Tensor) -> Tensor:
        """Replaces `fnet.forward`: `[B * T, 3, H, W]` -> `[B * T, C, h, w]`, channels last."""
        batch = self._batch.get(encoder)
        if batch is None or torch.is_grad_enabled():
            return encode_channels_last(encoder, own, images)
        clip, shared, parts = images.unflatten(0, (batch, -1)), 0, []
        if encoder in self.kept:
            before, features = self.kept[encoder]
            start = clip[:, : before.shape[1]]
            if start.shape == before.shape and start.device == before.device and torch.equal(start, before):
                shared, parts = before.shape[1], [features]
        # [B, t, h, w, C], a layout that torch.cat keeps
        fresh = (
            encode_channels_last(encoder, own, clip[:, shared:].flatten(0, 1)).movedim(1, -1).unflatten(0, (batch, -1))
        )
        features = torch.cat([*parts, fresh], 1)
        step = clip.shape[1] // 2
        self.kept[encoder] = clip[:, step:].clone(), features[:, step:].clone()
        return features.movedim(-1, 2).flatten(0, 1)
