"""Random calls of the attention operations, the temporal mixer and the temporal adapters."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from math import inf

import test_full_attention as full_tests
import test_query_key_rows as row_tests
import test_temporal_adapter as adapter_tests
import test_temporal_mixer as mixer_tests
import test_temporal_window_attention as window_tests
import test_track_attention as track_tests
import torch
from base import DTYPES, WHERE, Case, View, seeds, sizes, views
from hypothesis import strategies as st

import tritonkern
from tritonkern.functional._adapter import adapter_in, adapter_out
from tritonkern.functional._full_attention import full_attention


@dataclasses.dataclass(frozen=True)
class WindowCase(Case):
    shape: tuple[int, ...]  # [B, T, N, H, D], or [B, T, H, D]
    around: tuple[int, int]  # frames of keys and values before and after those of the queries
    window: int | tuple[int, int]
    scale: float | None
    dtype: torch.dtype
    views: tuple[View, ...]  # of query, key, value and the gradient of the output
    seed: int

    def all_tensors(self):
        torch.manual_seed(self.seed)
        B, T, *rest = self.shape
        longer = B, T + sum(self.around), *rest
        shapes = self.shape, longer, longer, self.shape
        made = (torch.randn(shape, dtype=torch.float64).to(self.dtype) for shape in shapes)
        return [v.store(x) for v, x in zip(self.views, made, strict=True)]

    def tensors(self):
        return self.all_tensors()[:3]

    def function(self):
        options = dict(scale=self.scale, query_offset=self.around[0])
        return lambda *x: tritonkern.temporal_window_attention(*x, self.window, **options)

    def compare(self):
        window_tests.check(WHERE, self.all_tensors(), self.window, self.scale, self.around[0])

    @classmethod
    def random(cls) -> st.SearchStrategy[WindowCase]:
        head_dim = st.integers(1, 9).map(lambda x: 8 * x)
        shapes = st.one_of(
            st.tuples(sizes(2), sizes(40), sizes(3), sizes(3), head_dim),
            st.tuples(sizes(2), sizes(40), sizes(3), head_dim),
        )
        windows = st.integers(0, 12).map(lambda x: 2 * x + 1) | st.tuples(st.integers(0, 50), st.integers(0, 50))
        return shapes.flatmap(
            lambda shape: st.builds(
                cls,
                shape=st.just(shape),
                around=st.just((0, 0)) | st.tuples(st.integers(0, 30), st.integers(0, 30)),
                window=windows,
                scale=st.none() | st.floats(-2, 2),
                dtype=st.sampled_from(DTYPES),
                views=st.tuples(*[views(len(shape))] * 4),
                seed=seeds,
            )
        )


@dataclasses.dataclass(frozen=True)
class TrackCase(Case):
    splat: bool
    shape: tuple[int, ...]  # B, T, M, h, w, H, D
    dtype: torch.dtype
    sigma: float
    scale: float | None
    hidden: float | None  # fraction of invisible tracks; None: no visibility is passed
    culling: bool
    views: tuple[View, ...]  # of query, key, value, tracks, the gradient of the output and the visibility
    seed: int

    def made(self) -> track_tests.Case:
        torch.manual_seed(self.seed)
        B, T, M, h, w, H, D = self.shape
        options = dict(B=B, T=T, M=M, grid=(h, w), H=H, D=D, dtype=self.dtype, sigma=self.sigma, scale=self.scale)
        case = track_tests.case(self.splat, **options)
        *tensors, grad_out = (v.store(x) for v, x in zip(self.views, [*case.tensors[:4], case.grad_out], strict=False))
        visibility = None
        if self.hidden is not None:
            visibility = self.views[5].store(torch.rand(B, T, M) >= self.hidden)
        new = dict(grad_out=grad_out, visibility=visibility, culling=self.culling)
        return dataclasses.replace(case, tensors=[*tensors, case.tensors[4]], **new)

    def tensors(self):
        return self.made().tensors

    def function(self):
        return functools.partial(self.made().attend, None)

    def compare(self):
        track_tests.check(WHERE, self.made())

    @classmethod
    def random(cls) -> st.SearchStrategy[TrackCase]:
        splat = st.booleans()
        shape = st.tuples(
            sizes(2),
            sizes(2),
            sizes(30),
            st.integers(1, 12),
            st.integers(1, 12),
            sizes(3),
            st.integers(1, 5).map(lambda x: 8 * x),
        )

        def of(splat):
            ranks = (6, 5, 5, 4, 6, 3) if splat else (5, 6, 6, 4, 5, 3)
            return st.builds(
                cls,
                splat=st.just(splat),
                shape=shape,
                dtype=st.sampled_from(DTYPES),
                sigma=st.sampled_from((0.05, 0.3, 0.5, 1.7, 30.0, inf)),
                scale=st.none() | st.floats(-2, 2),
                hidden=st.none() | st.floats(0, 1),
                culling=st.booleans(),
                views=st.tuples(*map(views, ranks)),
                seed=seeds,
            )

        return splat.flatmap(of)


@dataclasses.dataclass(frozen=True)
class MixerCase(Case):
    shape: tuple[int, ...]  # [B, N, T, C] or [N, T, C]
    causal: bool
    dtype: torch.dtype
    views: tuple[View, ...]  # of x, the five parameters and the gradient of the output
    seed: int

    def all_tensors(self):
        torch.manual_seed(self.seed)
        made = mixer_tests.random_inputs(*self.shape, dtype=self.dtype)
        return [v.store(x) for v, x in zip(self.views, made, strict=True)]

    def tensors(self):
        return self.all_tensors()[:6]

    def function(self):
        return lambda *x: tritonkern.temporal_mixer(*x, causal=self.causal)

    def compare(self):
        mixer_tests.check(WHERE, self.all_tensors(), self.causal)

    @classmethod
    def random(cls) -> st.SearchStrategy[MixerCase]:
        shapes = st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 8), st.integers(1, 20))
        ranks = (1, 3, 1, 3, 1)

        def of(shape):
            # Equal channels have variance 0, where LayerNorm magnifies the rounding of their mean by 1 / sqrt(eps).
            channels = len(shape) - 1
            views_of_x = views(len(shape)).filter(lambda view: view.expanded != channels)
            return st.builds(
                cls,
                shape=st.just(shape),
                causal=st.booleans(),
                dtype=st.sampled_from(DTYPES),
                views=st.tuples(views_of_x, *map(views, ranks), views(len(shape))),
                seed=seeds,
            )

        return (shapes | shapes.map(lambda shape: shape[1:])).flatmap(of)


@dataclasses.dataclass(frozen=True)
class FullCase(Case):
    shape: tuple[int, ...]  # B, L, S, H, D
    dtype: torch.dtype
    views: tuple[View, ...]  # of query, key, value and the gradient of the output
    seed: int

    def all_tensors(self):
        torch.manual_seed(self.seed)
        made = full_tests.random_inputs(self.shape, self.dtype, 2.0)
        return [v.store(x) for v, x in zip(self.views, made, strict=True)]

    def tensors(self):
        return self.all_tensors()[:3]

    def function(self):
        return lambda *x: full_attention(*x, backend="cpp")

    def compare(self):
        full_tests.check("cpp", self.all_tensors())

    @classmethod
    def random(cls) -> st.SearchStrategy[FullCase]:
        # Where all keys or all values are equal, gradients are 0: what is found is the rounding of terms that cancel.
        differ = views(4).filter(lambda view: view.expanded != 1)
        return st.builds(
            cls,
            shape=st.tuples(*(st.integers(*n) for n in ((1, 2), (1, 60), (2, 60), (1, 3), (1, 40)))),
            dtype=st.sampled_from(DTYPES),
            views=st.tuples(views(4), differ, differ, views(4)),
            seed=seeds,
        )


@dataclasses.dataclass(frozen=True)
class AdapterCase(Case):
    last: bool  # the end that is added to the tokens, or the one that reads them
    shape: tuple[int, ...]  # B, T, C of the tokens, prefix, channels of the other side
    patches: tuple[int, int]  # of pool x pool cells
    pool: int
    bias: bool
    tokens: bool  # whether the update is added to them
    dtype: torch.dtype
    views: tuple[View, ...]  # of tokens or hidden, weight, the gradient of the output and tokens that are added to
    seed: int

    @property
    def grid(self) -> tuple[int, int]:
        return self.pool * self.patches[0], self.pool * self.patches[1]

    def tensors(self):
        B, T, C, prefix, inner = self.shape
        if self.last:
            made = adapter_tests.out_tensors((B, T, inner), self.grid, self.pool, prefix, C, self.dtype)
            hidden, weight, bias, tokens = made
            made = [self.views[0].store(hidden), self.views[1].store(weight)]
            return made + [bias] * self.bias + [self.views[3].store(tokens)] * self.tokens
        tokens, *norm, weight, bias = adapter_tests.in_tensors((B, T, C), self.grid, prefix, inner, self.dtype)
        return [self.views[0].store(tokens), *norm, self.views[1].store(weight)] + [bias] * self.bias

    def call(self, function: Callable) -> Callable:
        """`function(tensor, grid, parameters ..., bias or None[, tokens or None])` as a function of `tensors`."""

        def run(first, *rest, **options):
            rest = list(rest)
            if not self.bias:
                rest.insert(1 if self.last else 3, None)
            if self.last and not self.tokens:
                rest.append(None)
            return function(first, self.grid, *rest, **options)

        return run

    def function(self):
        if self.last:
            return self.call(functools.partial(adapter_out, pool=self.pool, dtype=self.dtype))
        return self.call(functools.partial(adapter_in, pool=self.pool))

    def compare(self):
        def plain_out(hidden, grid, weight, bias, tokens, backwards=False):
            return adapter_tests.plain_out(hidden.to(weight.dtype), grid, weight, bias, tokens, self.pool, backwards)

        def plain_in(*x, backwards=False):
            return adapter_tests.plain_in(*x, self.pool, backwards=backwards)

        tensors, function = self.tensors(), self.function()
        torch.manual_seed(self.seed)
        grad_out = torch.randn_like(function(*tensors), dtype=torch.float64).to(self.dtype)
        adapter_tests.check(
            function, self.call(plain_out if self.last else plain_in), tensors, self.views[2].store(grad_out)
        )

    @classmethod
    def random(cls) -> st.SearchStrategy[AdapterCase]:
        # Equal tokens have a variance of 0, where a norm magnifies the rounding of their mean.
        return st.builds(
            cls,
            last=st.booleans(),
            shape=st.tuples(*(st.integers(*ends) for ends in ((1, 2), (1, 3), (2, 40), (0, 3), (1, 24)))),
            patches=st.tuples(st.integers(1, 4), st.integers(2, 5)),
            pool=st.integers(1, 3),
            bias=st.booleans(),
            tokens=st.booleans(),
            dtype=st.sampled_from(DTYPES),
            views=st.tuples(*(views(4, expandable) for expandable in (False, True, True, True))),
            seed=seeds,
        )


@dataclasses.dataclass(frozen=True)
class RowsCase(Case):
    shape: tuple[int, ...]  # B, N, J, H, D
    segments: tuple[tuple[float, float], ...]  # two places between 0 and J each, as fractions
    masked: bool
    scale: float | None
    dtype: torch.dtype
    views: tuple[View, View, View]  # of rows, key and mask
    seed: int
    differentiable = False

    def all_tensors(self):
        torch.manual_seed(self.seed)
        B, N, J, H, D = self.shape
        made = row_tests.random_rows(self.dtype, B, N, J, H, D)
        rows, key = (v.store(x) for v, x in zip(self.views, made, strict=False))
        mask = torch.rand(B, J) < 0.7
        mask[:, 0] = True
        return rows, key, self.views[2].store(mask) if self.masked else None

    def bounds(self):
        last = self.shape[2] - 1
        return [(int(min(pair) * last), int(max(pair) * last) + 1) for pair in self.segments]

    def tensors(self):
        return list(self.all_tensors()[:2])

    def function(self):
        mask, bounds = self.all_tensors()[2], self.bounds()
        return lambda *x: tritonkern.attention_row_statistics(*x, bounds, mask=mask, scale=self.scale)

    def compare(self):
        row_tests.check_rows(WHERE, *self.all_tensors(), self.scale, self.bounds())

    @classmethod
    def random(cls) -> st.SearchStrategy[RowsCase]:
        places = st.floats(0, 1)
        return st.builds(
            cls,
            shape=st.tuples(*(st.integers(*ends) for ends in ((1, 2), (1, 40), (1, 70), (1, 3), (1, 20)))),
            segments=st.lists(st.tuples(places, places), min_size=1, max_size=3).map(tuple),
            masked=st.booleans(),
            scale=st.none() | st.floats(-1, 1),
            dtype=st.sampled_from(DTYPES),
            views=st.tuples(views(4), views(4), views(2)),
            seed=seeds,
        )


@dataclasses.dataclass(frozen=True)
class FramesCase(Case):
    shape: tuple[int, ...]  # B, H, D
    text: int
    frames: int
    cells: int  # of a frame
    text_last: bool
    renormalise: bool
    scale: float | None
    dtype: torch.dtype
    views: tuple[View, View, View]  # of query, key and value
    seed: int
    differentiable = False

    def tensors(self):
        torch.manual_seed(self.seed)
        made = row_tests.random_frames(self.dtype, self.text, self.frames, self.cells, *self.shape)
        return [v.store(x) for v, x in zip(self.views, made, strict=True)]

    def function(self):
        options = dict(text=self.text, frames=self.frames, text_last=self.text_last, renormalise=self.renormalise)
        return lambda *x: tritonkern.frame_local_attention(*x, **options, scale=self.scale)

    def compare(self):
        options = (self.text, self.frames, self.text_last, self.renormalise, self.scale)
        row_tests.check_frames(WHERE, self.tensors(), *options)

    @classmethod
    def random(cls) -> st.SearchStrategy[FramesCase]:
        return st.builds(
            cls,
            shape=st.tuples(*(st.integers(*ends) for ends in ((1, 2), (1, 3), (1, 20)))),
            text=st.integers(1, 20),
            frames=st.integers(1, 4),
            cells=st.integers(0, 20),
            text_last=st.booleans(),
            renormalise=st.booleans(),
            scale=st.none() | st.floats(-1, 1),
            dtype=st.sampled_from(DTYPES),
            views=st.tuples(*[views(4)] * 3),
            seed=seeds,
        )
