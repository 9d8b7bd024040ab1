"""Derivatives that do not exist are refused, in every mode and for every operation: never a wrong number.

PyTorch takes the tangent of an operator without a forward-mode rule for zero, silently; `ops/_registry.py` refuses it.
"""

import pytest
import torch
from oracle import fast_backends
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from tritonkern import (
    correlation_soft_argmax,
    local_correlation,
    local_correlation_linear,
    query_key_cost,
    query_key_matching,
    soft_argmax_2d,
    temporal_mixer,
    temporal_window_attention,
    track_sample_attention,
    track_splat_attention,
)
from tritonkern.functional._adapter import adapter_in, adapter_out
from tritonkern.ops.correlation_soft_argmax import op as correlation_op
from tritonkern.ops.full_attention import op as full_op
from tritonkern.ops.local_correlation import op as local_op
from tritonkern.ops.query_key_matching import op as query_key_op
from tritonkern.ops.temporal_adapter import op as adapter_op
from tritonkern.ops.temporal_mixer import op as mixer_op
from tritonkern.ops.temporal_window_attention import op as window_op
from tritonkern.ops.track_attention import op as track_op

torch.manual_seed(0)


def window_attention(x, backend):
    return temporal_window_attention(x, x.cos(), x.sin(), 3, backend=backend)


def window_operator(x, backend):
    return window_op.temporal_window_attention_fwd(x, x.cos(), x.sin(), 1, 1, 0.3, backend)[0]


def full_operator(x, backend):
    return full_op.full_attention_fwd(x, x.cos(), x.sin(), 0.3, backend)[0]


def mixer(x, backend):
    weights = x.cos()[:, None, None].expand(32, 1, 3), x, x.sin()[:, None, None].expand(32, 1, 3), x
    return temporal_mixer(x[:8].expand(2, 4, 8), x[:8], *weights, backend=backend)


def adapter(x, backend):
    weight = x[0, 0, :9].mT.reshape(8, 3, 3).expand(8, 8, 3, 3)
    hidden = adapter_in(x, (4, 4), x[0, 0, 0], x[0, 0, 1], weight, backend=backend)
    return adapter_out(hidden, (4, 4), weight, None, x, backend=backend)


def track_attention(x, backend):
    grid = x.cos().expand(1, 2, 3, 4, 2, 8)
    sampled = track_sample_attention(x[:, :, 0], grid, grid, x[:, :, 0, :, 0, :2], backend=backend)
    return track_splat_attention(grid, sampled, sampled, x[:, :, 0, :, 0, :2], sigma=x.sum().exp(), backend=backend)


def correlation(x, backend):
    return correlation_soft_argmax(x[..., 0, 0, :], x, cosine=True, backend=backend).points


def soft_argmax(x, backend):
    return soft_argmax_2d(x, backend=backend)


def correlations(x, backend, function=local_correlation, *layer):
    features, support, coords = x.cos().expand(1, 2, 3, 4, 8), x.expand(1, 3, 2, 8), x.sin()[:2].expand(1, 2, 3, 2)
    return function(features, support, coords, *layer, radius=1, align_corners=True, backend=backend)


def correlations_and_layer(x, backend):
    return correlations(x, backend, local_correlation_linear, x.sum().expand(5, 18), x[:5])


def matches(x, backend):
    cells = torch.tensor([[3, 0]], device=x.device)
    return query_key_matching(x, x.cos(), grid=(2, 2), cells=cells, radius=1.5, backend=backend).points


def match_costs(x, backend):
    return query_key_cost(x, x.cos(), cells=None, backend=backend)


# Per operation: a function of one tensor that needs a gradient, that tensor, the folder of the operation.
CASES = {
    "temporal_window_attention": (window_attention, torch.randn(1, 5, 2, 8), window_op.NAME),
    "temporal_window_attention_fwd": (window_operator, torch.randn(1, 5, 1, 2, 8), window_op.NAME),
    "full_attention_fwd": (full_operator, torch.randn(1, 5, 2, 8), full_op.NAME),
    "correlation_soft_argmax": (correlation, torch.randn(1, 2, 3, 4, 8), correlation_op.NAME),
    "soft_argmax_2d": (soft_argmax, torch.randn(2, 3, 4), correlation_op.NAME),
    "local_correlation": (correlations, torch.randn(8), local_op.NAME),
    "local_correlation_linear": (correlations_and_layer, torch.randn(8), local_op.NAME),
    "temporal_adapter": (adapter, torch.randn(1, 2, 17, 8), adapter_op.NAME),
    "query_key_matching": (matches, torch.randn(1, 2, 4, 2, 8), query_key_op.NAME),
    "query_key_cost": (match_costs, torch.randn(1, 2, 4, 2, 8), query_key_op.NAME),
    "temporal_mixer": (mixer, torch.randn(32), mixer_op.NAME),
    "track_attention": (track_attention, torch.randn(1, 2, 1, 4, 2, 8), track_op.NAME),
}


@pytest.fixture(
    params=[
        pytest.param((name, *where.values[0]), id=f"{name}-{where.values[0][0]}", marks=where.marks)
        for name, case in CASES.items()
        for where in fast_backends(case[2])
        if where.id != "triton" or case[2] != full_op.NAME  # which has no Triton kernel
    ]
)
def case(request):
    name, backend, device = request.param
    function, x, _ = CASES[name]
    return lambda x: function(x, backend), x.to(device)


def jvp(function, x):
    return torch.func.jvp(function, (x,), (torch.ones_like(x),))[1]


def dual(function, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


def total(function):
    return lambda x: function(x).square().sum()


def exported(function, x):
    class Module(torch.nn.Module):
        def forward(self, x):
            return function(x)

    return torch.export.export(Module(), (x,)).module()


FORWARD = {
    "jvp": jvp,
    "dual": dual,
    "dual of a leaf": lambda function, x: dual(function, x.clone().requires_grad_()),
    "jacfwd": lambda function, x: torch.func.jacfwd(function)(x),
    "hessian": lambda function, x: torch.func.hessian(total(function))(x),
    "forward over reverse": lambda function, x: jvp(torch.func.grad(total(function)), x),
    "reverse over forward": lambda function, x: torch.func.grad(lambda x: jvp(function, x).sum())(x),
    "exported": lambda function, x: jvp(exported(function, x), x),
    "dual of an exported program": lambda function, x: dual(exported(function, x), x),
}


@pytest.mark.parametrize("mode", FORWARD)
def test_forward_mode_is_refused(case, mode):
    with pytest.raises(NotImplementedError, match="no forward-mode derivative|torch.func"):
        FORWARD[mode](*case)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("warm", [False, True])
def test_compiled_forward_mode_is_refused(case, backend, warm):
    function, x = case
    torch._dynamo.reset()
    compiled = torch.compile(function, backend=backend)
    if warm:
        compiled(x)
    with pytest.raises(
        Exception, match="forward-mode|functorch"
    ):  # PyTorch itself refuses a jvp of a compiled function
        jvp(compiled, x)
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        dual(compiled, x)
    for fullgraph in (False, True):
        derivative = torch.compile(lambda x: jvp(function, x), backend=backend, fullgraph=fullgraph)
        with pytest.raises(Exception, match="no forward-mode derivative"):
            derivative(x)


def test_second_derivative_is_refused(case):
    function, x = case
    x = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(total(function)(x), x, create_graph=True)
    assert grad.requires_grad
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(grad.sum(), x)


def test_transforms_of_functions_are_refused(case):
    function, x = case
    for derivative, at in (
        (torch.func.grad(total(function)), x),
        (torch.func.grad(lambda x: torch.func.grad(total(function))(x).sum()), x),
        (torch.vmap(torch.func.grad(total(function))), x[None]),
        (torch.func.jacrev(function), x),
    ):
        with pytest.raises(NotImplementedError, match="cannot be differentiated by torch.func"):
            derivative(at)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_transforms_without_a_derivative(case):
    """Batches of calls, which PyTorch makes one by one, and graphs of them."""
    function, x = case
    expected = function(x)
    torch.testing.assert_close(torch.vmap(function)(torch.stack([x, x]))[1], expected)
    torch.testing.assert_close(torch.func.functionalize(function)(x), expected)
    torch.testing.assert_close(make_fx(function, tracing_mode="symbolic")(x)(x), expected)


def test_compiled_second_derivative_is_refused(case):
    function, x = case
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="aot_eager")
    x = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(total(compiled)(x), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward|no second derivative"):
        torch.autograd.grad(grad.sum(), x)
