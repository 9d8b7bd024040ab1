"""Random calls of the functions: one class and one generator per operation.

A case is a dataclass of plain numbers, so that its `repr` can be pasted: `check(WindowCase(...))`. Its tensors follow
from its seed. Output and gradients are compared with the exact formula by the rule of the operation's own test file.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import threading
from collections.abc import Callable
from math import inf, nan  # noqa: F401  (in the repr of a case)
from typing import NamedTuple

import hypothesis
import test_correlation_pyramid as pyramid_tests
import test_correlation_soft_argmax as match_tests
import test_correlation_soft_argmax_2d as soft_argmax_tests
import test_full_attention as full_tests
import test_local_correlation as local_tests
import test_temporal_adapter as adapter_tests
import test_temporal_mixer as mixer_tests
import test_temporal_window_attention as window_tests
import test_track_attention as track_tests
import torch
from hypothesis import strategies as st

import tritonkern
from tritonkern.functional._adapter import adapter_in, adapter_out
from tritonkern.functional._full_attention import full_attention

WHERE = ("cpp", "cpu")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
THREADS = (1, 2, 3, 8)
RANDOM = threading.RLock()
"""Held while numbers are drawn, as all threads share one generator."""


class View(NamedTuple):
    """How a tensor is stored: NaN fills all memory around its numbers."""

    order: tuple[int, ...]  # axes from the outermost in memory to the innermost
    step: int = 1  # stride of the innermost
    offset: int = 0  # numbers before the first one
    expanded: int | None = None  # an axis of stride 0
    unit_stride: int | None = None  # of the axes of size 1, which have none that matters

    def store(self, x: torch.Tensor) -> torch.Tensor:
        """`x` stored so; with an expanded axis, its first slice repeated."""
        sizes = [min(size, 1) if axis == self.expanded else size for axis, size in enumerate(x.shape)]
        stored = [sizes[axis] for axis in self.order]
        count = math.prod(stored)
        memory = torch.full(
            (self.offset + count * self.step + 1,), nan if x.is_floating_point() else True, dtype=x.dtype
        )
        back = [self.order.index(axis) for axis in range(x.dim())]
        y = memory[self.offset : self.offset + count * self.step].view(*stored, self.step)[..., 0].permute(back)
        y.copy_(x[tuple(slice(size) for size in sizes)])
        if self.unit_stride is not None:
            strides = [
                self.unit_stride if size == 1 else stride for size, stride in zip(sizes, y.stride(), strict=True)
            ]
            y = y.as_strided(y.shape, strides)
        return y.expand(x.shape) if self.expanded is not None else y


def views(rank: int, expandable: bool = True) -> st.SearchStrategy[View]:
    return st.builds(
        View,
        order=st.permutations(range(rank)).map(tuple),
        step=st.integers(1, 3),
        offset=st.integers(0, 5),
        expanded=st.none() | st.integers(0, rank - 1) if expandable else st.none(),
        unit_stride=st.none() | st.sampled_from((0, 1, 7, 2**40)),
    )


class Case:
    """A call of a public function."""

    seed: int

    def tensors(self) -> list[torch.Tensor]:
        """Those that are differentiated."""
        raise NotImplementedError

    def function(self) -> Callable:
        """The public function with all its options, as a function of `tensors`."""
        raise NotImplementedError

    def compare(self) -> None:
        """Raise AssertionError unless output and gradients are exact to rounding."""
        raise NotImplementedError

    def results(self, function: Callable) -> list[torch.Tensor]:
        """Outputs of a function and their gradients for cotangents that depend on the seed alone."""
        with RANDOM:
            leaves = [x.detach().requires_grad_() for x in self.tensors()]
        made = function(*leaves)
        outputs = [made] if isinstance(made, torch.Tensor) else list(made)
        with RANDOM:
            torch.manual_seed(self.seed + 1)
            cotangents = [torch.randn_like(x) for x in outputs]
        grads = torch.autograd.grad(outputs, leaves, cotangents, allow_unused=True, materialize_grads=True)
        return [*(x.detach() for x in outputs), *grads]


@dataclasses.dataclass(frozen=True)
class WindowCase(Case):
    shape: tuple[int, ...]  # [B, T, N, H, D], or [B, T, H, D]
    window: int | tuple[int, int]
    scale: float | None
    dtype: torch.dtype
    views: tuple[View, ...]  # of query, key, value and the gradient of the output
    seed: int

    def all_tensors(self):
        torch.manual_seed(self.seed)
        return [v.store(torch.randn(self.shape, dtype=torch.float64).to(self.dtype)) for v in self.views]

    def tensors(self):
        return self.all_tensors()[:3]

    def function(self):
        return lambda *x: tritonkern.temporal_window_attention(*x, self.window, scale=self.scale)

    def compare(self):
        window_tests.check(WHERE, self.all_tensors(), self.window, self.scale)

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
        return functools.partial(function, radius=self.radius, **self.options())

    def compare(self):
        if 0 not in self.shape[:3]:
            local_tests.check(WHERE, self.made())
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
                dtype=st.sampled_from(DTYPES),
                views=st.tuples(*(views(rank) for rank in ranks)),
                seed=seeds,
            )

        return st.tuples(*[st.booleans()] * 3).flatmap(of)


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


def sizes(largest: int) -> st.SearchStrategy[int]:
    """Of an axis that may be empty, which is rare."""
    return st.sampled_from([*range(1, largest + 1)] * 4 + [0])


seeds = st.integers(0, 2**31 - 1)
OPERATIONS = {
    "temporal_window_attention": WindowCase,
    "track_attention": TrackCase,
    "correlation_soft_argmax": MatchCase,
    "soft_argmax_2d": SoftArgmaxCase,
    "local_correlation": LocalCase,
    "correlation_pyramid": PyramidCase,
    "temporal_mixer": MixerCase,
    "full_attention": FullCase,
    "temporal_adapter": AdapterCase,
}


def on_threads(count: int, function: Callable, *arguments):
    """The result of a call on this number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return function(*arguments)
    finally:
        torch.set_num_threads(before)


def assert_equal(first: list[torch.Tensor], second: list[torch.Tensor], what: str) -> None:
    """Raise AssertionError unless all results are equal to the bit, NaN included."""
    for index, (x, y) in enumerate(zip(first, second, strict=True)):
        same = x.shape == y.shape and x.dtype == y.dtype and torch.equal(x.nan_to_num(), y.nan_to_num())
        assert same, f"result {index} differs {what}"


def check(case: Case) -> None:
    """The case against the exact formula, and on several threads against one."""
    case.compare()
    threads = THREADS[case.seed % len(THREADS)]
    function = case.function()
    single = on_threads(1, case.results, function)
    assert_equal(on_threads(threads, case.results, function), single, f"on {threads} threads")


def check_rounding(case: Case) -> None:
    """The results of a case in 16 bits against those in float32, rounded once."""
    changes: dict = {"culling": False} if isinstance(case, TrackCase) else {}
    if case.dtype.itemsize > 2:
        changes["dtype"] = torch.bfloat16 if case.seed % 2 else torch.float16
    case = dataclasses.replace(case, **changes)
    function, tensors = case.function(), case.tensors()

    def results(tensors, like=None):
        leaves = [x.detach().requires_grad_() for x in tensors]
        made = function(*leaves)
        outputs = [made] if isinstance(made, torch.Tensor) else list(made)
        torch.manual_seed(case.seed + 1)
        like = like or outputs
        cotangents = [torch.randn(x.shape).to(y.dtype).to(x.dtype) for x, y in zip(outputs, like, strict=True)]
        grads = torch.autograd.grad(outputs, leaves, cotangents, allow_unused=True, materialize_grads=True)
        return outputs, grads

    outputs, grads = results(tensors)
    full_outputs, full_grads = results([x.float() for x in tensors], outputs)
    rounded = [y.to(x.dtype) for x, y in zip((*outputs, *grads), (*full_outputs, *full_grads), strict=True)]
    assert_equal([x.detach() for x in (*outputs, *grads)], [x.detach() for x in rounded], "from float32, rounded once")


def check_compiled(case: Case) -> None:
    """The case in one compiled graph."""
    torch._dynamo.reset()
    function = case.function()
    compiled = torch.compile(function, backend="eager", fullgraph=True)
    assert_equal(case.results(compiled), case.results(function), "where it is compiled")


def check_exported(case: Case) -> None:
    """The case as an exported program."""
    function = case.function()

    class Module(torch.nn.Module):
        def forward(self, *tensors):
            return function(*tensors)

    tensors = case.tensors()
    program = torch.export.export(Module(), tuple(tensors)).module()
    results = [x if isinstance(x, tuple) else (x,) for x in (program(*tensors), function(*tensors))]
    assert_equal(*map(list, results), "where it is exported")


def drawn(operation: str, count: int) -> list[Case]:
    """The first cases of the generator, the same in every run."""
    found: list[Case] = []

    @hypothesis.settings(
        max_examples=count,
        database=None,
        derandomize=True,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(case=OPERATIONS[operation].random())
    def collect(case):
        found.append(case)

    collect()
    return found
