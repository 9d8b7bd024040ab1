"""Random calls of the functions: one class and one generator per operation.

A case is a dataclass of plain numbers, so that its `repr` can be pasted: `check(WindowCase(...))`. Its tensors follow
from its seed. Output and gradients are compared with the exact formula by the rule of the operation's own test file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from math import inf, nan  # noqa: F401  (in the repr of a case)

import hypothesis
import torch
from attention_cases import (
    AdapterCase,
    FramesCase,
    FullCase,
    MixerCase,
    RowsCase,
    TrackCase,
    WindowCase,
)
from base import RANDOM, THREADS, Case, View  # noqa: F401  (`View` is in the repr of a case)
from matching_cases import LocalCase, MatchCase, PyramidCase, QueryKeyCase, SoftArgmaxCase

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
    "query_key_matching": QueryKeyCase,
    "attention_row_statistics": RowsCase,
    "frame_local_attention": FramesCase,
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


def own(case: Case, results: list[torch.Tensor]) -> list[torch.Tensor]:
    """Those of the results that do not depend on threads: the gradients of full attention are PyTorch's."""
    return results[:1] if isinstance(case, FullCase) else results


def check(case: Case) -> None:
    """The case against the exact formula, and on several threads against one."""
    case.compare()
    threads = THREADS[case.seed % len(THREADS)]
    function = case.function()
    single, several = (own(case, on_threads(count, case.results, function)) for count in (1, threads))
    assert_equal(several, single, f"on {threads} threads")


def check_rounding(case: Case) -> None:
    """The results of a case in 16 bits against those in float32, rounded once."""
    changes: dict = {"culling": False} if isinstance(case, TrackCase) else {}
    if case.dtype.itemsize > 2:
        changes["dtype"] = torch.bfloat16 if case.seed % 2 else torch.float16
    case = dataclasses.replace(case, **changes)
    function, tensors = case.function(), case.tensors()

    def results(tensors, like=None):
        leaves = [x.detach().requires_grad_(case.differentiable) for x in tensors]
        made = function(*leaves)
        outputs = [made] if isinstance(made, torch.Tensor) else list(made)
        if not case.differentiable:
            return outputs, []
        torch.manual_seed(case.seed + 1)
        like = like or outputs
        cotangents = [torch.randn(x.shape).to(y.dtype).to(x.dtype) for x, y in zip(outputs, like, strict=True)]
        grads = torch.autograd.grad(outputs, leaves, cotangents, allow_unused=True, materialize_grads=True)
        return outputs, grads

    outputs, grads = results(tensors)
    full_outputs, full_grads = results([x.float() for x in tensors], outputs)
    if isinstance(case, FullCase):  # PyTorch computes its gradients
        grads = full_grads = []
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
