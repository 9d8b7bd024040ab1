"""Derivatives that do not exist are refused, in every mode and for every operation: never a wrong number.

PyTorch takes the tangent of an operator without a forward-mode rule for zero, silently; `ops/_registry.py` refuses it.
"""

import pytest
import torch
from functions import FUNCTIONS, on, outputs, prepare
from oracle import fast_backends
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

# Without those that call the same operators as another.
NAMES = FUNCTIONS.keys() - {
    "correlation_soft_argmax-cosine", "local_correlation-softmax", "temporal_mixer-causal",
    "temporal_window_attention-offset",
}  # fmt: skip
pytestmark = pytest.mark.parametrize(("name", "where"), on(fast_backends, sorted(NAMES)))


@pytest.fixture
def case(name, where):
    """A function of one number, by which all tensors are multiplied, and that number."""
    call, tensors = prepare(name, where)

    def function(x):
        return outputs(call(*(x * tensor if tensor.is_floating_point() else tensor for tensor in tensors)))[0]

    return function, torch.ones((), device=where[1])


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
    torch.testing.assert_close(make_fx(function, tracing_mode="symbolic", _allow_non_fake_inputs=True)(x)(x), expected)


def test_compiled_second_derivative_is_refused(case):
    function, x = case
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="aot_eager")
    x = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(total(compiled)(x), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward|no second derivative"):
        torch.autograd.grad(grad.sum(), x)
