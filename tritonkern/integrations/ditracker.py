"""DiTracker (github.com/cvlab-kaist/DiTracker, read at commit 2ed2933, without a licence).

The model is recognised with all of its fusions, also inside its evaluation predictor. Its `forward` runs as it is, and
no line of it is in this file. What changes is what its steps from points to the embedding of the matching costs
compute, per level of the pyramid (B batch, K layers of the transformer, T frames, N points, C channels):

========================================== ==================================== ====================================
step of the model                          unpatched                            patched
========================================== ==================================== ====================================
1. sample patches of the transformer's map `[B K, T, N, 7, 7, C]`, stored       a `Promise` of that shape
2. regroup, correlate with the support     `[B, K, T, N, 7, 7, 7, 7]`, stored   a `Promise` of that shape
3. divide, softmax over the places         the same, twice                      a `Promise` of that shape
4. mean over the layers                    `[B, T, N, 7, 7, 7, 7]`, stored      a `Promise` of that shape
5. the same for the convolutional network  the same                             a `Promise` of that shape
6. fuse: concatenate, mean, or none        `[B T N, 4802]` or `[B T N, 2401]`   a `Promise` of that shape
7. first linear layer, `corr_mlp.fc1`      `[B T N, 384]`                       `local_correlation_linear`
========================================== ==================================== ====================================

Whatever else is done with one of them gets the real tensor, as the cosine that the model has as an alternative to the
softmax of the network's cost. Attention of the refiner runs in a fused form, and the network writes channels last. Of
the last block of the transformer nothing is computed after its queries and keys, as the model reads nothing else.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tritonkern.functional import local_correlation_linear
from tritonkern.integrations import _attention, _recognise
from tritonkern.integrations._patch import Replacement
from tritonkern.integrations._precision import Copies, Precision
from tritonkern.integrations._promise import RESHAPES, Promise
from tritonkern.integrations.cotracker import Patches, encode_channels_last, in_a_corner, promise_patches, renamed
from tritonkern.nn._plain import has_hooks


def _inputs(tracker: Any) -> int:
    volumes = 2 if getattr(tracker, "resnet_fuse_mode", None) == "concat" else 1
    return volumes * (2 * getattr(tracker, "corr_radius", 3) + 1) ** 4


PARTS = (
    *_recognise.methods("get_correlation_feat", "get_track_feat", "get_support_points", "get_pyramid_fmaps"),
    _recognise.child("dit_fnet"),
    _recognise.child("updateformer"),
    _recognise.value("corr_radius", int),
    _recognise.child("corr_mlp.fc1", in_features=_inputs),
)


def replacements(path: str, tracker: Any, precision: Precision) -> Iterator[Replacement]:
    """What `tritonkern.patch` replaces in a model that has `PARTS`."""
    if precision.name != "float32":
        raise ValueError(
            f"precision: {precision.name!r} is not supported for DiTracker, whose costs have the dtype of its maps; "
            "leave precision='float32'"
        )
    prefix = f"{path}." if path else ""
    yield from _attention.replacements(tracker.updateformer, f"{prefix}updateformer")
    patches = partial(promise_patches, _MapPatches, Copies(), precision, "border")
    yield Replacement(path, tracker, "get_correlation_feat", (patches,), in_a_corner)
    if getattr(tracker, "fnet", None) is not None:
        yield Replacement(f"{prefix}fnet", tracker.fnet, "forward", (encode_channels_last,), calls_own=True)
    encoder, blocks = (
        tracker.dit_fnet,
        getattr(getattr(tracker.dit_fnet, "transformer", None), "transformer_blocks", ()),
    )
    last = max(getattr(encoder, "layer_hooks", ()), default=-1)
    if 0 <= last < len(blocks):
        name = next(
            name for name, module in encoder.named_modules(prefix=f"{prefix}dit_fnet") if module is blocks[last]
        )
        function = partial(_until_attention, encoder, last)
        yield Replacement(name, blocks[last], "forward", (function,), _some_tokens, calls_own=True)


class _Attended(Exception):
    """Carries the queries and keys `[B, heads, text and video, D]` of an attention that does not run."""


class _BeforeAttention(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            raise _Attended(*(args[i] if len(args) > i else kwargs[name] for i, name in enumerate(("query", "key"))))
        return function(*args, **kwargs)


def _until_attention(encoder: Any, layer: int, block: Any, own: Any, *args: Any, **kwargs: Any) -> Any:
    """Replaces `forward` of the last block that `encoder` asks for: video, text, queries and keys of the video.

    The video and the text, which only a later block would read, are returned as they came.
    """
    unseen = any(map(has_hooks, list(block.modules())[1:]))  # hooks behind the attention would not run
    if unseen or torch.compiler.is_compiling() or max(encoder.layer_hooks) != layer:
        return own(*args, **kwargs)
    given = inspect.signature(own).bind(*args, **kwargs).arguments
    video, text = given["hidden_states"], given["encoder_hidden_states"]
    try:
        with _BeforeAttention():
            return own(*args, **kwargs)
    except _Attended as attended:
        query, key = (x[:, :, text.shape[1] :] for x in attended.args)
        return video, text, query, key


def _some_tokens(module: Any, own: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
    """Queries and keys of a few tokens of the first video."""
    given = inspect.signature(own).bind(*args, **kwargs).arguments
    few = {name: x[:1, :4] if name.endswith("hidden_states") else x for name, x in given.items()}
    if isinstance(few.get("temb"), Tensor):
        few["temb"] = few["temb"][:1]
    return lambda: function(module, own, **few)[2:], lambda: own(**few)[2:]


class _MapPatches(Patches):
    """Of one map per video, `[B, T, N, 7, 7, C]`, or of K maps, `[B K, T, N, 7, 7, C]`."""

    def shortcut(self, function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if function in RESHAPES:
            shape = self.reshaped(function, args, kwargs)
            if len(shape) == 7 and shape[2:] == self.shape[1:]:
                layers = _LayerPatches.make(shape, lambda *inputs: self.compute(*inputs).reshape(shape), *self.inputs)
                layers.patches = self
                return layers
        return _correlate(self, self, "abcdef,acghf->abcdegh", function, args)


class _LayerPatches(Promise):
    """`[B, K, T, N, 7, 7, C]`"""

    patches: _MapPatches

    def shortcut(self, function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if function in RESHAPES and self.reshaped(function, args, kwargs) == self.shape:
            return self
        return _correlate(self, self.patches, "abcdefg,abdhig->abcdefhi", function, args)


def _correlate(of: Promise, patches: _MapPatches, letters: str, function: Any, args: Sequence[Any]) -> Any:
    """The promise of an einsum of patches `[..., T, N, 7, 7, C]` and supports `[..., N, 7, 7, C]`."""
    if function is not torch.einsum or len(args) != 3 or args[1] is not of or not isinstance(args[2], Tensor):
        return NotImplemented
    equation, _, support = args
    *leading, _, points, side, _, channels = of.shape
    same = support.shape == (*leading, points, side, side, channels) and support.dtype == of.dtype
    if renamed(equation) != letters or not same:
        return NotImplemented

    def compute(fmaps: Tensor, coords: Tensor, support: Tensor) -> Tensor:
        return torch.einsum(equation, of.compute(fmaps, coords), support)

    volume = _Volume.make((*of.shape[:-1], side, side), compute, *of.inputs, support)
    count = leading[1] if len(leading) == 2 else 1
    volume.parts = (tuple(_Term(patches, support, layer, count) for layer in range(count)),)
    volume.leading, volume.side, volume.softened = tuple(of.shape[:-3]), side, False
    return volume


class _Term(NamedTuple):
    """The distributions of one layer, times a factor."""

    patches: _MapPatches
    support: Tensor
    layer: int
    layers: int
    scale: float = 1.0
    factor: float = 1.0

    def of_layer(self, x: Tensor) -> Tensor:
        """Of `[B K, ...]`, whose rows belong to videos and their layers as the model groups them."""
        return x if self.layers == 1 else x.unflatten(0, (-1, self.layers))[:, self.layer]

    def maps(self) -> Tensor:
        """`[B, T, h, w, C]`"""
        return self.of_layer(self.patches.cells())

    def points(self) -> Tensor:
        """`[B, T, N, 2]`"""
        return self.of_layer(self.patches.points())

    def supports(self) -> Tensor:
        """`[B, N, 49, C]`"""
        support = self.support[:, self.layer] if self.support.dim() == 6 else self.support
        return support.flatten(2, 3)


_DIVISIONS = (Tensor.div, Tensor.__truediv__, Tensor.true_divide, torch.div, torch.true_divide)
_ADDITIONS = (Tensor.add, Tensor.__add__, torch.add)
_SOFTMAXES = (F.softmax, torch.softmax, Tensor.softmax)
_MEANS = (Tensor.mean, torch.mean)


class _Volume(Promise):
    """Costs of a point in a frame: 49 places times 49 supports, of any shape in this order.

    They are the products, or with `softened` their distributions; `parts` are concatenated in a row, and each
    of them is a sum of terms. `leading` are the axes before those of the places: `[B, T, N]`, or `[B, K, T, N]` until
    the mean over K.
    """

    parts: tuple[tuple[_Term, ...], ...]
    leading: tuple[int, ...]
    side: int
    softened: bool

    def shortcut(self, function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if function is torch.cat or function in _ADDITIONS:
            return self._joined(function, args, kwargs)
        if args[0] is not self:
            return NotImplemented
        if function in RESHAPES:
            return self._then(function, args, kwargs, self.reshaped(function, args, kwargs))
        if function in _DIVISIONS and not kwargs and isinstance(args[1], (int, float)) and args[1] > 0:
            field = "factor" if self.softened else "scale"
            return self._then(function, args, kwargs, divide=(field, args[1]))
        dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
        if kwargs.get("dtype") is not None or not isinstance(dim, int):
            return self._linear(*args[1:], **kwargs) if function is F.linear else NotImplemented
        dim %= len(self.shape)
        if function in _SOFTMAXES and not self.softened and dim == len(self.leading):
            if self.shape == (*self.leading, self.side**2, self.side, self.side):
                return self._then(function, args, kwargs, softened=True)
        if function in _MEANS and self.softened and dim == 1 and len(self.leading) == 4:
            if self.shape[:4] == self.leading and not kwargs.get("keepdim"):
                volume = self._then(function, args, kwargs, (self.shape[0], *self.shape[2:]), ("factor", self.shape[1]))
                volume.leading = (self.leading[0], *self.leading[2:])
                return volume
        return NotImplemented

    def _then(
        self,
        function: Callable[..., Tensor],
        args: Sequence[Any],
        kwargs: dict[str, Any],
        shape: tuple[int, ...] | None = None,
        divide: tuple[str, float] = ("factor", 1),
        softened: bool = False,
    ) -> Any:
        """The promise of `function` of this one; a field of its terms is divided by a number."""
        options = dict(kwargs)

        def compute(*inputs: Tensor) -> Tensor:
            return function(self.compute(*inputs), *args[1:], **options)

        volume = _Volume.make(self.shape if shape is None else shape, compute, *self.inputs)
        field, number = divide
        volume.parts = tuple(
            tuple(term._replace(**{field: getattr(term, field) / number}) for term in part) for part in self.parts
        )
        volume.leading, volume.side, volume.softened = self.leading, self.side, self.softened or softened
        return volume

    def _joined(self, function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Two volumes concatenated in rows, or their sum."""
        concatenated = function is torch.cat
        given = args[0] if concatenated else args
        fit = len(given) == 2 and all(isinstance(x, _Volume) and x.softened and len(x.leading) == 3 for x in given)
        if not fit or any(x.leading != self.leading or x.side != self.side for x in given):
            return NotImplemented
        first, second = given
        shape: tuple[int, ...]
        if concatenated:
            dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
            if dim not in (-1, 1) or not (first.in_rows() and second.in_rows()):
                return NotImplemented
            parts, shape = first.parts + second.parts, (first.shape[0], first.shape[1] + second.shape[1])
        else:
            if kwargs or first.shape != second.shape or len(first.parts) != len(second.parts):
                return NotImplemented
            parts, shape = tuple(x + y for x, y in zip(first.parts, second.parts, strict=True)), first.shape
        count = len(first.inputs)

        def compute(*inputs: Tensor) -> Tensor:
            x, y = first.compute(*inputs[:count]), second.compute(*inputs[count:])
            return torch.cat([x, y], -1) if concatenated else x + y

        volume = _Volume.make(shape, compute, *first.inputs, *second.inputs)
        volume.parts, volume.leading, volume.side, volume.softened = parts, first.leading, first.side, True
        return volume

    def in_rows(self) -> bool:
        """Whether the shape is `[B T N, 2401]`, or with more parts a multiple of 2401."""
        return self.shape == (math.prod(self.leading), len(self.parts) * self.side**4)

    def _linear(self, weight: Tensor, bias: Tensor | None = None) -> Any:
        terms = [term for part in self.parts for term in part]
        points, scale = terms[0].points(), terms[0].scale
        if not self.softened or not self.in_rows() or len(self.leading) != 3:
            return NotImplemented
        if points.requires_grad or any(x.scale != scale or not torch.equal(x.points(), points) for x in terms[1:]):
            return NotImplemented
        if len(terms) > len(self.parts) or any(term.factor != 1 for term in terms):
            columns = zip(self.parts, weight.split(self.side**4, 1), strict=True)
            weight = torch.cat([term.factor * x for part, x in columns for term in part], 1)
        rows = local_correlation_linear(
            [term.maps() for term in terms],
            [term.supports() for term in terms],
            points,
            weight,
            bias,
            radius=self.side // 2,
            padding="border",
            align_corners=True,
            axis_order="xy",
            softmax=True,
            scale=scale,
        )
        return rows.flatten(0, 2)
