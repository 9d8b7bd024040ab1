"""What the random calls of all operations have in common: how tensors are stored, and what a case is."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from math import nan
from typing import NamedTuple

import torch
from hypothesis import strategies as st

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


def sizes(largest: int) -> st.SearchStrategy[int]:
    """Of an axis that may be empty, which is rare."""
    return st.sampled_from([*range(1, largest + 1)] * 4 + [0])


seeds = st.integers(0, 2**31 - 1)


class Case:
    """A call of a public function."""

    seed: int
    differentiable = True

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
            leaves = [x.detach().requires_grad_(self.differentiable) for x in self.tensors()]
        made = function(*leaves)
        outputs = [made] if isinstance(made, torch.Tensor) else list(made)
        if not self.differentiable:
            return outputs
        with RANDOM:
            torch.manual_seed(self.seed + 1)
            cotangents = [torch.randn_like(x) for x in outputs]
        grads = torch.autograd.grad(outputs, leaves, cotangents, allow_unused=True, materialize_grads=True)
        return [*(x.detach() for x in outputs), *grads]
