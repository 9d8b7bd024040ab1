"""AllTracker (github.com/aharley/alltracker, read at commit c1ed462, MIT).

`forward`, `forward_sliding` and `forward_window` run as they are, and no line of them is in this file. What changes (N
frames of a window, h x w cells of 8 x 8 pixels, C channels):

- `CorrBlock`, which stores the correlations of all pairs of cells, `[N h w, h w]` and four coarser levels, is another
  class to `forward_window`: it computes the 81 correlations per cell and level that are read, when they are read.
- `get_fmaps` takes frames to the device of the model's parameters instead of the GPU, a few at a time.
- Layers that treat every frame by itself, or every cell, are called for some frames or rows at a time.
- Attention over time runs in a fused form.
- Upsampling stores no products of weights and neighbours; of the predictions of all iterations, those that `forward`
  drops are not computed.
"""

from __future__ import annotations

import inspect
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tritonkern.functional import local_correlation
from tritonkern.integrations import _attention, _compare, _patch, _recognise
from tritonkern.integrations._patch import Replacement
from tritonkern.integrations._precision import Precision
from tritonkern.integrations._promise import RESHAPES, Promise
from tritonkern.nn._plain import has_hooks

CELLS = {"cpu": 4096}
"""How many cells are computed at a time, so that what layers store between them stays small."""
CELLS_ELSEWHERE = 1 << 18


def _correlation_block(tracker: Any) -> str | None:
    function = getattr(_patch._without_patch(type(tracker)), "forward_window", None)
    code = getattr(function, "__code__", None)
    found = code and "CorrBlock" in code.co_names and "CorrBlock" in getattr(function, "__globals__", {})
    return None if found else "a class CorrBlock that its method forward_window calls"


PARTS = (
    *_recognise.methods("forward", "forward_window", "get_fmaps", "upsample_data"),
    _correlation_block,
    *map(_recognise.child, ("update_block.motion_encoder", "update_block.compressor", "update_block.final_conv")),
    _recognise.child("update_block.refine", nn.ModuleList),
    _recognise.child("upsample_weight", nn.Sequential),
    _recognise.child("flow_head"),
    _recognise.child("visconf_head"),
    _recognise.value("corr_radius", int),
    _recognise.value("corr_levels", int),
)


def replacements(path: str, tracker: Any, precision: Precision) -> Iterator[Replacement]:
    """What `tritonkern.patch` replaces in a model that has `PARTS`."""
    if precision.name != "float32":
        raise ValueError(
            f"precision: {precision.name!r} is not supported for AllTracker, whose correlations are float32; leave "
            "precision='float32'"
        )
    prefix = f"{path}." if path else ""
    update, predictions = tracker.update_block, _Predictions()

    def by_frames(name: str) -> Replacement:
        return Replacement(
            f"{prefix}{name}", tracker.get_submodule(name), "forward", (_by_frames,), _first_frame, calls_own=True
        )

    yield from _attention.replacements(update, f"{prefix}update_block")
    yield Replacement(path, tracker, "get_fmaps", (_features,), _first_image, calls_own=True)
    yield Replacement(path, tracker, "forward_window", (predictions.window,), _two_cells)
    yield Replacement(path, tracker, "upsample_data", (predictions.upsample,), _small_map)
    for name in ("forward", "forward_sliding"):
        if callable(getattr(tracker, name, None)):
            yield Replacement(path, tracker, name, (predictions.track,), calls_own=True)
    yield Replacement(
        f"{prefix}upsample_weight", tracker.upsample_weight, "forward", (predictions.weights,), calls_own=True
    )
    yield from map(by_frames, ("flow_head", "visconf_head"))
    yield from (by_frames(f"update_block.{name}") for name in ("motion_encoder", "compressor", "final_conv"))
    for index, block in enumerate(update.refine):
        name = f"update_block.refine.{index}"
        if getattr(block, "dense", False):
            yield Replacement(f"{prefix}{name}", block, "forward", (_by_rows,), _first_row, calls_own=True)
        else:
            yield by_frames(name)


class _Correlation:
    """`CorrBlock` of the model: maps `[N, C, h, w]` and `[N, C, H, W]`, then positions `[N, 2, h, w]` (x, y) in cells.

    Gives `[N, levels (2 radius + 1)^2, h, w]`, in memory with channels last.
    """

    def __init__(self, own: Callable[..., Any], fmap1: Tensor, fmap2: Tensor, corr_levels: int, corr_radius: int):
        self.own = partial(own, fmap1, fmap2, corr_levels, corr_radius)
        self.source, self.radius, self.maps = fmap1, corr_radius, [fmap2.contiguous(memory_format=torch.channels_last)]
        while len(self.maps) < corr_levels:
            # Not `avg_pool2d`: of an odd number of rows the model drops none.
            self.maps.append(F.interpolate(self.maps[-1], scale_factor=0.5, mode="area"))

    def __call__(self, coords: Tensor, *others: Any, **options: Any) -> Tensor:
        if others or options:
            return self.own()(coords, *others, **options)
        if torch.is_grad_enabled():
            return self.of(coords, slice(None))
        shape = (len(coords), len(self.maps) * (2 * self.radius + 1) ** 2, *coords.shape[2:])
        return _Later.of(shape, partial(self.of, coords), coords.float())

    def of(self, coords: Tensor, frames: slice) -> Tensor:
        source, coords = self.source[frames], coords[frames]
        support = (source * source.shape[1] ** -0.5).flatten(2).mT.unsqueeze(2)  # [n, h w, 1, C]
        places = coords.flatten(2).mT.unsqueeze(1)  # [n, 1, h w, 2]
        found = [
            local_correlation(
                level[frames].movedim(1, -1).unsqueeze(1),
                support,
                places / 2**i,
                radius=self.radius,
                padding="border",
                align_corners=True,
            )
            for i, level in enumerate(self.maps)
        ]
        return torch.cat([x[:, 0, ..., 0] for x in found], -1).mT.unflatten(2, coords.shape[2:]).float()


class _Later(Promise):
    """A tensor that is computed when it is read, of all frames or of some."""

    part: Callable[[slice], Tensor]
    """The numbers of some frames."""

    @classmethod
    def of(cls, shape: Sequence[int], part: Callable[[slice], Tensor], like: Tensor) -> Any:
        """Of the dtype and on the device of `like`."""
        later = cls.make(shape, lambda _: part(slice(None)), like)
        later.part = part
        return later

    def shortcut(self, function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if args[0] is not self or any(isinstance(x, Tensor) for x in args[1:]):
            return NotImplemented
        if function is Tensor.to and args[1:] == (self.dtype,) and not kwargs:
            return self
        if function in _NUMBER_BY_NUMBER:
            result = lambda frames: function(self.part(frames), *args[1:], **kwargs)  # noqa: E731
            return _Later.of(self.shape, result, self.inputs[0])
        if function is Tensor.__getitem__ or function in RESHAPES:
            shape = self.reshaped(function, args, kwargs)
            return _Later.of(
                shape, lambda frames: function(self.numbers(), *args[1:], **kwargs)[frames], self.inputs[0]
            )
        return NotImplemented


_NUMBER_BY_NUMBER = (torch.sigmoid, torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__)


def _some(x: Any, frames: slice) -> Any:
    """Some frames of an argument; what is no tensor is the same for all of them."""
    return x.part(frames) if isinstance(x, _Later) else x[frames] if isinstance(x, Tensor) else x


def _pieces(count: int, cells: int, device: torch.device) -> Iterator[slice]:
    """Slices of `count` frames (or rows) of so many cells."""
    step = max(1, CELLS.get(device.type, CELLS_ELSEWHERE) // cells)
    return (slice(start, start + step) for start in range(0, count, step))


def _whole(module: nn.Module) -> bool:
    """Whether a layer must be called for all frames at once.

    Autograd keeps everything in any case; hooks and random numbers notice the difference.
    """
    inner = list(module.modules())[1:]
    return torch.compiler.is_compiling() or torch.is_grad_enabled() or module.training or any(map(has_hooks, inner))


def _by_frames(self: Any, own: Any, *maps: Any) -> Tensor:
    """Replaces `forward` of layers that treat every frame by itself: maps `[N, C, h, w]` -> `[N, C', h, w]`."""
    if _whole(self):
        return own(*maps)
    result = None
    for frames in _pieces(maps[0].shape[0], maps[0].shape[2:].numel(), maps[0].device):
        part = own(*(_some(x, frames) for x in maps))
        if result is None:
            last = part.is_contiguous(memory_format=torch.channels_last)
            layout = torch.channels_last if last else torch.contiguous_format
            shape = len(maps[0]), *part.shape[1:]
            result = torch.empty(shape, dtype=part.dtype, device=part.device, memory_format=layout)
        result[frames] = part
    return own(*maps) if result is None else result


def _by_rows(self: Any, own: Any, x: Tensor, S: int | None = None) -> Tensor:
    """Replaces `forward` of layers that treat every cell by itself, over time: `[N, C, h, w]` -> the same shape."""
    if _whole(self):
        return own(x, S)
    rows = _pieces(x.shape[2], len(x) * x.shape[3], x.device)
    return torch.cat([own(x[:, :, some], S) for some in rows], 2)


def _features(self: Any, own: Any, images: Tensor, B: int, T: int, sw: Any, is_training: bool) -> Tensor:
    """Replaces `get_fmaps`: `[B * T, 3, H, W]` -> `[B * T, C, h, w]`, on the device of the parameters.

    The model's own method takes frames to the GPU, wherever the parameters are, unless it is training.
    """
    images = images.to(next(self.parameters()).device)
    if _whole(self):
        return own(images, B, T, sw, True)
    pieces = _pieces(len(images), images.shape[2:].numel() // 64, images.device)
    return torch.cat([own(part := images[some], 1, len(part), sw, True) for some in pieces])


class _Predictions(threading.local):
    """The upsampled predictions of the iterations, of which `forward` returns the last alone."""

    lazy = False

    def track(self, tracker: Any, own: Any, *args: Any, **kwargs: Any) -> Any:
        """Replaces `forward` and `forward_sliding`, which only return all predictions for two frames or in training."""
        call = inspect.signature(own).bind(*args, **kwargs)
        call.apply_defaults()
        images, training = (call.arguments.get(name) for name in ("images", "is_training"))
        many = isinstance(images, Tensor) and images.ndim == 5 and images.shape[1] > 2
        before, self.lazy = self.lazy, many and training is False and not _whole(tracker.upsample_weight)
        try:
            return own(*args, **kwargs)
        finally:
            self.lazy = before

    def window(self, tracker: Any, own: Any, *args: Any, **kwargs: Any) -> Any:
        """Replaces `forward_window`: the same code, to which `CorrBlock` is another class."""
        if torch.compiler.is_compiling():
            return own(*args, **kwargs)
        function = own.__func__
        names = {**function.__globals__, "CorrBlock": partial(_Correlation, function.__globals__["CorrBlock"])}
        rebound = types.FunctionType(
            function.__code__, names, function.__name__, function.__defaults__, function.__closure__
        )
        rebound.__kwdefaults__ = function.__kwdefaults__
        flows, visconfs, *rest = rebound(tracker, *args, **kwargs)
        if flows and isinstance(flows[-1], _Upsampled) and isinstance(visconfs[-1], _Upsampled):
            if flows[-1].weights is visconfs[-1].weights:
                maps = torch.cat([flows[-1].maps, visconfs[-1].maps], 1)
                flows[-1], visconfs[-1] = _upsampled(maps, flows[-1].weights).chunk(2, 1)
        return flows, visconfs, *rest

    def weights(self, layers: Any, own: Any, features: Tensor) -> Tensor:
        """Replaces `upsample_weight.forward`: `[N, C, h, w]` -> `[N, 9 * 64, h, w]`."""
        if not self.lazy:
            return _by_frames(layers, own, features)
        shape = (len(features), 9 * 64, *features.shape[2:])
        return _Later.of(shape, lambda frames: own(features[frames]), features)

    def upsample(self, tracker: Any, own: Any, flow: Tensor, mask: Tensor) -> Tensor:
        """Replaces `upsample_data`: `[N, C, h, w]`, weights `[N, 9 * 64, h, w]` -> `[N, C, 8 h, 8 w]`."""
        if torch.compiler.is_compiling():
            return own(flow, mask)
        if not isinstance(mask, _Later):
            return _upsampled(flow, mask)
        shape = (*flow.shape[:2], *(8 * n for n in flow.shape[2:]))
        later = _Upsampled.of(shape, lambda frames: _upsampled(flow, mask)[frames], flow)
        later.maps, later.weights = flow, mask
        return later


class _Upsampled(_Later):
    """`_upsampled(maps, weights)`."""

    maps: Tensor
    weights: Tensor


def _upsampled(maps: Tensor, weights: Tensor) -> Tensor:
    """Every pixel is a convex combination of the nine cells around its own: `[N, C, h, w]` -> `[N, C, 8 h, 8 w]`."""
    pieces = _pieces(len(maps), maps.shape[2:].numel(), maps.device)
    parts = [(maps[some], _some(weights, some)) for some in pieces] if torch.is_grad_enabled() else None
    if parts is not None:
        return torch.cat([checkpoint(_combined, *x, use_reentrant=False, preserve_rng_state=False) for x in parts])
    result = maps.new_empty(*maps.shape[:2], *(8 * n for n in maps.shape[2:]))
    for some in pieces:
        result[some] = _combined(maps[some], _some(weights, some))
    return result


def _combined(maps: Tensor, weights: Tensor) -> Tensor:
    weights = weights.unflatten(1, (1, 9, 8, 8)).softmax(2)  # [n, 1, 9, 8, 8, h, w]
    cells = F.unfold(8 * maps, (3, 3), padding=1).unflatten(2, maps.shape[2:])
    cells = cells.unflatten(1, (-1, 9, 1, 1))  # [n, C, 9, 1, 1, h, w]
    total = weights[:, :, 0] * cells[:, :, 0]
    for i in range(1, 9):
        total.addcmul_(weights[:, :, i], cells[:, :, i])
    return total.permute(0, 1, 4, 2, 5, 3).flatten(4).flatten(2, 3).to(maps.dtype)  # [n, C, 8 h, 8 w]


def _two_cells(tracker: Any, own: Any, function: Any, fmap1_single: Tensor, fmaps2: Tensor, *_: Any, **__: Any) -> Any:
    """Correlations of two cells with a small map, in a corner of it and between four cells."""
    levels, radius, channels = tracker.corr_levels, tracker.corr_radius, fmaps2.shape[2]
    block = own.__func__.__globals__["CorrBlock"]
    source = _compare.random((1, channels, 1, 2), fmaps2)
    target = _compare.random((1, channels, 2**levels, 2**levels + 4), fmaps2)  # an odd size on one of the levels
    coords = fmaps2.new_tensor([[0.3, 9.4], [2**levels - 1.6, 7.7]]).view(1, 2, 1, 2)
    return (
        lambda: _Correlation(block, source, target, levels, radius).of(coords, slice(None)),
        lambda: block(source, target, levels, radius)(coords),
    )


def _small_map(tracker: Any, own: Any, function: Any, flow: Tensor, mask: Tensor) -> Any:
    flow, mask = _compare.random((1, flow.shape[1], 2, 3), flow), _compare.random((1, mask.shape[1], 2, 3), mask)
    return lambda: _upsampled(flow, mask), lambda: own(flow, mask)


def _first_frame(module: Any, own: Any, function: Any, *maps: Any) -> Any:
    """A corner of the first frame by itself, and together with another one."""
    one, two = ([_some(x, slice(n)) for x in maps] for n in (1, 2))
    one, two = ([x[..., :16, :16] if isinstance(x, Tensor) else x for x in xs] for xs in (one, two))
    return lambda: own(*one), lambda: own(*two)[:1]


def _first_row(module: Any, own: Any, function: Any, x: Tensor, S: int | None = None) -> Any:
    return lambda: own(x[:, :, :1, :8], S), lambda: own(x[:, :, :2, :8], S)[:, :, :1]


def _first_image(tracker: Any, own: Any, function: Any, images: Tensor, B: int, T: int, *_: Any) -> Any:
    """A corner of the first image by itself, and together with another one."""
    images = images[:2, :, :64, :64].to(next(tracker.parameters()).device)
    return lambda: own(images[:1], 1, 1, None, True), lambda: own(images, 1, len(images), None, True)[:1]
