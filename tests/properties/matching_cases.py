"""Random calls of the matching operations."""

from __future__ import annotations

import dataclasses
import functools
from math import inf

import test_correlation_pyramid as pyramid_tests
import test_correlation_soft_argmax as match_tests
import test_correlation_soft_argmax_2d as soft_argmax_tests
import test_local_correlation as local_tests
import test_local_correlation_softmax as softmax_tests
import test_query_key_matching as query_key_tests
import torch
from base import DTYPES, WHERE, Case, View, seeds, sizes, views
from hypothesis import strategies as st

import tritonkern


@dataclasses.dataclass(frozen=True)
class MatchCase(Case):
    shape: tuple[int, ...]  # B, N, T, h, w, C
    temperature: float
    radius: float
    cosine: bool
    wanted: tuple[bool, bool, bool, bool]  # which of points, mean, max and min carry a gradient
    dtype: torch.dtype
    views: tuple[View, View]
    seed: int

    def options(self):
        return dict(temperature=self.temperature, radius=self.radius, cosine=self.cosine)

    def tensors(self):
        torch.manual_seed(self.seed)
        made = match_tests.random_inputs(*self.shape, dtype=self.dtype)
        return [v.store(x) for v, x in zip(self.views, made, strict=True)]

    def function(self):
        options = self.options()
        return lambda *x: tuple(tritonkern.correlation_soft_argmax(*x, **options))

    def compare(self):
        match_tests.check(WHERE, *self.tensors(), self.wanted, **self.options())

    @classmethod
    def random(cls) -> st.SearchStrategy[MatchCase]:
        return st.builds(
            cls,
            shape=st.tuples(sizes(2), sizes(20), sizes(3), *(st.integers(1, n) for n in (12, 20, 40))),
            temperature=st.floats(0.1, 100),
            radius=st.floats(0.1, 30) | st.just(inf),
            cosine=st.booleans(),
            wanted=st.tuples(*[st.booleans()] * 4).filter(any),
            dtype=st.sampled_from(DTYPES),
            views=st.tuples(views(3), views(5)),
            seed=seeds,
        )


@dataclasses.dataclass(frozen=True)
class SoftArgmaxCase(Case):
    shape: tuple[int, ...]  # [..., h, w]
    temperature: float
    radius: float
    dtype: torch.dtype
    view: View
    seed: int

    def tensors(self):
        torch.manual_seed(self.seed)
        return [self.view.store(soft_argmax_tests.random_cost(*self.shape, dtype=self.dtype))]

    def function(self):
        return lambda cost: tritonkern.soft_argmax_2d(cost, temperature=self.temperature, radius=self.radius)

    def compare(self):
        soft_argmax_tests.check(WHERE, *self.tensors(), self.temperature, self.radius)

    @classmethod
    def random(cls) -> st.SearchStrategy[SoftArgmaxCase]:
        # Several frames, because the rounding error of eager PyTorch may be lucky in a single one.
        return st.builds(
            cls,
            shape=st.tuples(st.integers(1, 3), st.integers(6, 9), st.integers(1, 40), st.integers(1, 40)),
            temperature=st.floats(0.1, 100),
            radius=st.floats(0.1, 80) | st.just(inf),
            dtype=st.sampled_from(DTYPES),
            view=views(4, expandable=False),
            seed=seeds,
        )


@dataclasses.dataclass(frozen=True)
class LocalCase(Case):
    linear: bool
    per_frame: bool
    shape: tuple[int, ...]  # B, T, N, h, w, C, S
    radius: int
    padding: str
    align_corners: bool
    axis_order: str
    scale: float | None  # of the softmax, if there is one
    dtype: torch.dtype
    views: tuple[View, ...]  # of features, support, coords, the gradient of the output, weight and bias
    seed: int

    def options(self):
        return dict(padding=self.padding, align_corners=self.align_corners, axis_order=self.axis_order)

    def made(self) -> local_tests.Case:
        torch.manual_seed(self.seed)
        B, T, N, h, w, C, S = self.shape
        sizes = dict(B=B, T=T, N=N, grid=(h, w), C=C, S=S, radius=self.radius, dtype=self.dtype)
        case = local_tests.case(**sizes, options=self.options(), linear=self.linear, per_frame=self.per_frame)
        of = [*self.views[:3], *self.views[4:]]
        tensors = [v.store(x) for v, x in zip(of, case.tensors, strict=False)]
        return case.changed(tensors=tensors, grad_out=self.views[3].store(case.grad_out))

    def tensors(self):
        return self.made().tensors

    def function(self):
        function = tritonkern.local_correlation_linear if self.linear else tritonkern.local_correlation
        softmax = {} if self.scale is None else dict(softmax=True, scale=self.scale)
        return functools.partial(function, radius=self.radius, **self.options(), **softmax)

    def compare(self):
        if 0 not in self.shape[:3]:
            case = self.made()
            if self.scale is None:
                local_tests.check(WHERE, case)
            else:
                softmax_tests.check(
                    WHERE, softmax_tests.Cost(1, case.tensors, case.grad_out, case.radius, case.options, self.scale)
                )
            return
        out, *grads = self.results(self.function())  # the rule needs a largest term
        assert out.numel() == 0 and not any(grad.any() for grad in grads[:4])

    @classmethod
    def random(cls) -> st.SearchStrategy[LocalCase]:
        def of(kind):
            linear, per_frame, align_corners = kind
            # The eager form divides by the size less one where corners are aligned.
            cells = st.integers(2 if align_corners else 1, 9)
            ranks = (5, 5 if per_frame else 4, 4, 4 if linear else 5, 2, 1)
            return st.builds(
                cls,
                linear=st.just(linear),
                per_frame=st.just(per_frame),
                shape=st.tuples(sizes(2), sizes(3), sizes(9), cells, cells, st.integers(1, 35), st.integers(1, 27)),
                radius=st.integers(0, 4),
                padding=st.sampled_from(("border", "zeros")),
                align_corners=st.just(align_corners),
                axis_order=st.sampled_from(("xy", "yx")),
                scale=st.sampled_from((None, 0.25, 3.0)),
                dtype=st.sampled_from(DTYPES),
                views=st.tuples(*(views(rank) for rank in ranks)),
                seed=seeds,
            )

        return st.tuples(*[st.booleans()] * 3).flatmap(of)


@dataclasses.dataclass(frozen=True)
class PyramidCase(Case):
    shape: tuple[int, ...]  # B, T, h, w, C
    targets: tuple[int, int]  # their h and w
    levels: int
    radius: int
    padding: str
    views: tuple[View, View, View]  # of features, targets and flow
    seed: int

    def tensors(self):
        torch.manual_seed(self.seed)
        B, T, h, w, C = self.shape
        shapes = (B, h, w, C), (B, T, *self.targets, C), (B, T, h, w, 2)
        made = (
            factor * torch.randn(shape, dtype=torch.float64) for factor, shape in zip((1, 1, 3), shapes, strict=True)
        )
        return [v.store(x) for v, x in zip(self.views, made, strict=True)]

    def function(self):
        return lambda *x: tritonkern.correlation_pyramid(*x, self.levels, self.radius, padding=self.padding)

    def compare(self):
        def textbook(*x):
            return pyramid_tests.textbook(*x, self.levels, self.radius, self.padding)

        for x, y in zip(self.results(self.function()), self.results(textbook), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)

    @classmethod
    def random(cls) -> st.SearchStrategy[PyramidCase]:
        return st.builds(
            cls,
            shape=st.tuples(*(st.integers(1, n) for n in (2, 2, 4, 4, 12))),
            # The textbook form divides by the size less one, of the coarsest level too.
            targets=st.tuples(st.integers(8, 14), st.integers(8, 14)),
            levels=st.integers(1, 3),
            radius=st.integers(0, 3),
            padding=st.sampled_from(("border", "zeros")),
            views=st.tuples(views(4), views(5), views(5)),
            seed=seeds,
        )


@dataclasses.dataclass(frozen=True)
class QueryKeyCase(Case):
    cost: bool  # the cost itself, or the matches
    shape: tuple[int, ...]  # B, T, h, w, H, D
    source: int  # modulo T
    chosen: int  # how many cells of the source frame are matched; 0: all of them
    scale: float | None
    symmetric: bool
    radius: float | None
    dtype: torch.dtype
    views: tuple[View, View]  # of query and key
    seed: int

    def tensors(self):
        torch.manual_seed(self.seed)
        B, T, h, w, H, D = self.shape
        pair = query_key_tests.random_pair((B, T, h * w, H, D), self.dtype)
        return [v.store(x) for v, x in zip(self.views, pair, strict=True)]

    def cells(self):
        torch.manual_seed(self.seed + 2)
        B, _, h, w, *_ = self.shape
        return torch.randint(0, h * w, (B, self.chosen)) if self.chosen else None

    def options(self):
        cells = self.cells()
        return dict(source=self.source % self.shape[1], cells=cells, scale=self.scale, symmetric=self.symmetric)

    def function(self):
        options = self.options()
        if self.cost:
            return lambda *x: tritonkern.query_key_cost(*x, **options)
        options |= dict(grid=self.shape[2:4], radius=self.radius)
        return lambda *x: tritonkern.query_key_matching(*x, **options)[1:]

    def compare(self):
        if self.cost:
            query_key_tests.check_cost(WHERE, self.tensors(), **self.options())
        else:
            query_key_tests.check_match(WHERE, self.tensors(), self.shape[2:4], **self.options(), radius=self.radius)

    @classmethod
    def random(cls) -> st.SearchStrategy[QueryKeyCase]:
        # Where all cells are equal, gradients are 0: what is found is the rounding of terms that cancel.
        differ = views(5).filter(lambda view: view.expanded != 2)
        return st.builds(
            cls,
            cost=st.booleans(),
            shape=st.tuples(*(st.integers(*ends) for ends in ((1, 2), (2, 3), (1, 4), (1, 5), (1, 3), (1, 20)))),
            source=st.integers(0, 5),
            chosen=st.integers(0, 5),
            scale=st.none() | st.floats(-1, 1),
            symmetric=st.booleans(),
            radius=st.none() | st.floats(0.1, 6) | st.just(inf),
            dtype=st.sampled_from(DTYPES),
            views=st.tuples(differ, differ),
            seed=seeds,
        )
