"""Operators of `correlation_soft_argmax` and `soft_argmax_2d`: gradients that are not asked for, bad arguments."""

import pytest
import torch
import torch.nn.functional as F
from oracle import fast_backends
from torch.utils._python_dispatch import TorchDispatchMode

import tritonkern
from tritonkern import correlation_soft_argmax, soft_argmax_2d
from tritonkern.ops.correlation_soft_argmax import op

FWD, BWD = op.correlation_soft_argmax_fwd, op.correlation_soft_argmax_bwd


@pytest.fixture(params=fast_backends(op.NAME))
def where(request):
    return request.param


@pytest.fixture
def plain(where):
    with torch.device(where[1]):
        return [F.normalize(torch.randn(shape), dim=-1) for shape in ((2, 3, 16), (2, 3, 4, 5, 16))]


def test_statistics_without_a_gradient_are_not_differentiated(where, plain):
    """A tracker's head uses them detached; the operator must not receive a tensor of zeros for each."""

    class Gradients(TorchDispatchMode):
        seen = None

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is BWD:
                self.seen = [x is None for x in args[:4]]
            return function(*args, **(kwargs or {}))

    query, features = (x.requires_grad_() for x in plain)
    with Gradients() as gradients:
        correlation_soft_argmax(query, features, backend=where[0]).points.sum().backward()
    assert gradients.seen == [False, True, True, True]


def test_cells_and_weights_carry_no_gradient(plain):
    query, features = (x.requires_grad_() for x in plain)
    outputs = FWD(query, features, 20.0, 2.0, True, 1e-6, "reference")
    assert [x.requires_grad for x in outputs] == [True] * 4 + [False] * 5
    outputs = op.soft_argmax_2d_fwd(features, 20.0, 2.0, "reference")
    assert [x.requires_grad for x in outputs] == [True] + [False] * 3


LONG = torch.randn(2, 1, 1, 1, 16).expand(2, 1, 2, 100_000, 16)
QUERY, FEATURES = torch.randn(2, 3, 16), torch.randn(2, 5, 4, 6, 16)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"features": FEATURES.double()}, TypeError, "features must have the dtype of query"),
        ({"query": QUERY[0]}, ValueError, r"query must have shape \[B, N, C\], got \(3, 16\)"),
        ({"features": FEATURES[0]}, ValueError, r"features must have shape \[B, T, h, w, C\]"),
        ({"features": FEATURES[:1]}, ValueError, "features must have the batch size B of query, 2, got 1"),
        ({"query": QUERY[..., :8]}, ValueError, "features must have the number of channels C of query, 8, got 16"),
        ({"query": QUERY[..., :0], "features": FEATURES[..., :0]}, ValueError, "at least one channel"),
        ({"features": FEATURES[:, :, :0]}, ValueError, "features must have at least one cell, got a grid of 0 x 6"),
        ({"temperature": 0}, ValueError, "temperature must be a positive finite number .*, got 0"),
        ({"temperature": float("inf")}, ValueError, "temperature must be a positive finite"),
        ({"temperature": torch.tensor(1.0)}, TypeError, "temperature must be a number, got Tensor"),
        ({"radius": -1.0}, ValueError, "radius must be a positive number, .*, got -1.0"),
        ({"radius": float("nan")}, ValueError, "radius must be a positive number, .*, got nan"),
        ({"radius": "5"}, TypeError, "radius must be a number, got str"),
        ({"eps": 0.0}, ValueError, "eps must be a positive finite number"),
        ({"radius": 50_000.0, "features": LONG}, ValueError, "radius must be at most 46340 cells or cover the whole"),
        ({"cosine": 1}, TypeError, "cosine must be a bool, got int"),
        ({"backend": "cuda"}, ValueError, "backend must be one of cpp, triton, reference or None, got 'cuda'"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        correlation_soft_argmax(**{"query": QUERY, "features": FEATURES, **arguments})


@pytest.mark.parametrize(
    ("cost", "options", "error", "message"),
    [
        (QUERY[0, 0], {}, ValueError, r"cost_volume must have shape \[..., h, w\], got \(16,\)"),
        (QUERY[:, :0], {}, ValueError, "cost_volume must have at least one cell"),
        (QUERY, {"temperature": -2}, ValueError, "temperature must be a positive"),
        (QUERY, {"radius": True}, TypeError, "radius must be a number, got bool"),
        (QUERY, {"backend": 1}, TypeError, "backend must be a string"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_arguments_of_the_soft_argmax(cost, options, error, message):
    with pytest.raises(error, match=message):
        soft_argmax_2d(cost, **options)


def test_compiled_once_for_several_temperatures():
    """torch.compile makes a number that changes a variable of the graph."""
    torch._dynamo.reset()
    query, features, cost = torch.randn(1, 3, 16), torch.randn(1, 2, 5, 6, 16), torch.randn(2, 5, 6)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(temperature):
        match = tritonkern.correlation_soft_argmax(query, features, temperature=temperature)
        return match.points, tritonkern.soft_argmax_2d(cost, temperature=temperature)

    for temperature in (20.0, 10.0, 5.0):
        points, peaks = compiled(temperature)
        assert torch.equal(points, tritonkern.correlation_soft_argmax(query, features, temperature=temperature).points)
        assert torch.equal(peaks, tritonkern.soft_argmax_2d(cost, temperature=temperature))
