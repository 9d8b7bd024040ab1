"""The residual sum with its LayerNorm: every backend against float64, the rule of twice eager PyTorch's error."""

import os

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_as_exact_as_eager, native_backends, run_python

from tritonkern.functional import residual_norm
from tritonkern.ops._contract import DTYPES
from tritonkern.ops.residual_norm import op

FWD, BWD = op.residual_norm_fwd, op.residual_norm_bwd
EPS = 1e-6
NAMES = ("total", "normed", "grad x", "grad branch", "grad gamma", "grad weight", "grad bias")
MIXED = [(torch.float32, torch.bfloat16), (torch.float32, torch.float16)]
PAIRS = [(dtype, dtype) for dtype in DTYPES] + MIXED
"""Residual stream and branch."""


# `test_residual_norm_triton.py` runs this file in Triton's interpreter.
INTERPRETED = [pytest.param(("triton", "cpu"), id="triton")] * (os.environ.get("TRITON_INTERPRET") == "1")


@pytest.fixture(params=[*native_backends(op.NAME), *INTERPRETED])
def where(request):
    return request.param


def random_inputs(*shape, dtype=torch.float32, branch_dtype=None, device="cpu"):
    """x, branch, gamma, weight, bias, and the cotangents of total and normed."""
    narrow = branch_dtype or dtype
    kinds = [(shape, dtype), (shape, narrow), *[(shape[-1:], dtype)] * 3, (shape, dtype), (shape, narrow)]
    return [torch.randn(size, dtype=torch.float64).to(device, kind) for size, kind in kinds]


def eager(x, branch, gamma, weight, bias, out_dtype):
    total = x if branch is None else x + (branch if gamma is None else branch * gamma)
    return total, F.layer_norm(total, total.shape[-1:], weight, bias, EPS).to(out_dtype)


def textbook(x, branch, gamma, weight, bias):
    total = x if branch is None else x + (branch if gamma is None else branch * gamma)
    centred = total - total.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt()
    normed = normed if weight is None else normed * weight
    return total, normed if bias is None else normed + bias


def results(function, inputs, cotangents):
    """Outputs, and the gradients of the inputs that are there."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
    outputs = function(*leaves)
    grads = torch.autograd.grad(outputs, [x for x in leaves if x is not None], cotangents)
    grads = iter(grads)
    return [x.detach() for x in outputs] + [None if x is None else next(grads) for x in inputs]


def run(where, tensors, absent=()):
    inputs = [None if i in absent else x for i, x in enumerate(tensors[:5])]
    out_dtype = tensors[6].dtype
    return results(lambda *x: residual_norm(*x, EPS, out_dtype=out_dtype, backend=where[0]), inputs, tensors[5:])


def check(where, tensors, absent=()):
    if where == ("triton", "cpu") and torch.bfloat16 in (x.dtype for x in tensors):
        pytest.skip("the interpreter truncates to bfloat16 where a GPU rounds")
    inputs = [None if i in absent else x for i, x in enumerate(tensors[:5])]
    doubles = [None if x is None else x.double() for x in inputs]
    exact = results(textbook, doubles, [x.double() for x in tensors[5:]])
    by_eager = []
    # Eager's sums in other orders: rows, channels or both reversed; one order may be lucky.
    for rows, channels in ((False, False), (True, False), (False, True), (True, True)):

        def turn(x, rows=rows, channels=channels):
            axes = list(range(x.dim() - 1)) * rows + [-1] * channels
            return x.flip(axes)

        turned = [None if x is None else turn(x) for x in inputs]
        flipped = results(lambda *x: eager(*x, tensors[6].dtype), turned, [turn(x) for x in tensors[5:]])
        by_eager.append([None if x is None else turn(x) for x in flipped])
    terms = largest_terms(doubles, *(x.double() for x in tensors[5:]))
    for at, (name, actual, truth) in enumerate(zip(NAMES, run(where, tensors, absent), exact, strict=True)):
        if truth is not None:
            assert_as_exact_as_eager(actual, [one[at] for one in by_eager], truth, terms[at], name)


def largest_terms(inputs, grad_total, grad_normed):
    """Size of what the results are sums of: the gradient of a LayerNorm is a difference that may cancel to nothing."""
    branch, gamma, weight = (torch.ones(1) if x is None else x.abs().max() for x in inputs[1:4])
    total = textbook(*inputs)[0]
    scale = (total.var(-1, correction=0) + EPS).rsqrt().max()
    grad = float(grad_total.abs().max() + scale * weight * grad_normed.abs().max())
    return 0, 0, grad, grad * float(gamma), grad * float(branch), 0, 0


@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
@pytest.mark.parametrize("shape", [(3, 5, 384), (131, 24), (2, 3, 17), (7, 1), (2, 1000), (5, 64)], ids=str)
def test_result_and_gradients(where, shape, dtypes):
    check(where, random_inputs(*shape, dtype=dtypes[0], branch_dtype=dtypes[1], device=where[1]))


@pytest.mark.parametrize("absent", [(1, 2), (2,), (3,), (4,), (2, 3, 4), (1, 2, 3, 4)], ids=str)
@pytest.mark.parametrize("dtypes", [PAIRS[1], PAIRS[2], PAIRS[4]], ids=str)
def test_without_some_inputs(where, absent, dtypes):
    check(where, random_inputs(3, 50, dtype=dtypes[0], branch_dtype=dtypes[1], device=where[1]), absent)


def test_without_a_branch_the_sum_is_x(where):
    x = torch.randn(3, 8, device=where[1])
    assert residual_norm(x, backend=where[0])[0] is x


@pytest.mark.parametrize("offset", [0, 1e3, 1e5])
def test_large_means_do_not_cancel(where, offset):
    tensors = random_inputs(9, 768, device=where[1])
    tensors[0] += offset
    check(where, tensors)


@pytest.mark.parametrize("needed", range(1, 32))
def test_partial_requires_grad(where, needed):
    tensors = random_inputs(2, 9, 24, device=where[1])
    full = run(where, tensors)[2:]
    leaves = [x.detach().requires_grad_(bool(needed >> i & 1)) for i, x in enumerate(tensors[:5])]
    torch.autograd.backward(residual_norm(*leaves, EPS, backend=where[0]), tensors[5:])
    for leaf, expected in zip(leaves, full, strict=True):
        assert (leaf.grad is not None) == leaf.requires_grad
        assert leaf.grad is None or torch.equal(leaf.grad, expected)


@pytest.mark.parametrize("output", [0, 1], ids=["total", "normed"])
def test_gradient_through_one_output(where, output):
    tensors = random_inputs(4, 24, device=where[1])
    leaves = [x.detach().requires_grad_() for x in tensors[:5]]
    grads = torch.autograd.grad(
        residual_norm(*leaves, EPS, backend=where[0])[output], leaves, tensors[5 + output], allow_unused=True
    )
    expected = torch.autograd.grad(
        eager(*leaves, torch.float32)[output], leaves, tensors[5 + output], allow_unused=True
    )
    for actual, truth in zip(grads, expected, strict=True):
        torch.testing.assert_close(
            actual if truth is not None else actual * 1, truth if truth is not None else actual * 0
        )


@pytest.mark.parametrize("shared", [True, False])
def test_gradcheck(where, shared):
    inputs = [x.requires_grad_() for x in random_inputs(3, 7, dtype=torch.float64, device=where[1])[:5]]
    if shared:  # one gradient for x and branch
        inputs[2] = None
    assert torch.autograd.gradcheck(lambda *x: residual_norm(*x, EPS, backend=where[0]), inputs)


def test_frozen_backbone_keeps_the_sum_alone(where):
    x, branch, *parameters = random_inputs(2, 9, 24, device=where[1])[:5]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        total, _ = residual_norm(x.requires_grad_(), branch.requires_grad_(), *parameters, backend=where[0])
    large = [t for t in kept if t.numel() > 24]
    assert len(large) == 1 and large[0].data_ptr() == total.data_ptr()


LAYOUTS = {
    "transposed": lambda x: x.mT.contiguous().mT,
    "sliced": lambda x: (
        torch.cat([x, x], -1)[..., 3 : 3 + x.shape[-1]] if x.dim() == 1 else F.pad(x, (3, 2))[..., 3:-2]
    ),
    "expanded": lambda x: x[..., :1].expand_as(x),
    "misaligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(where, layout):
    change = LAYOUTS[layout]
    tensors = [
        change(x) if x.dim() > 1 or layout != "transposed" else x for x in random_inputs(3, 5, 24, device=where[1])
    ]
    expected = run(where, [x.contiguous() for x in tensors])
    for actual, plain in zip(run(where, tensors), expected, strict=True):
        torch.testing.assert_close(actual, plain)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8)])
def test_empty(where, shape):
    total, normed, *grads = run(where, random_inputs(*shape, device=where[1]))
    assert total.shape == normed.shape == grads[0].shape == grads[1].shape == shape
    assert all(torch.equal(grad, torch.zeros(8, device=where[1])) for grad in grads[2:])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("at", [0, 1, 5, 6], ids=["x", "branch", "grad total", "grad normed"])
@pytest.mark.parametrize("channels", [24, 19])
def test_non_finite_input_stays_in_its_row(where, at, bad, channels):
    """All rows on one thread, so that one row's numbers could meet the next one's."""
    tensors = random_inputs(40, channels, device=where[1])
    clean = run(where, tensors)
    tensors[at][7, 5] = bad
    poisoned = run(where, tensors)
    hit = [0, 1, 2, 3] if at < 2 else [2, 3]
    for index, (before, after) in enumerate(zip(clean[:4], poisoned[:4], strict=True)):
        others = torch.arange(40, device=where[1]) != 7
        assert torch.equal(after[others], before[others])
        if index in hit:
            assert not after[7].isfinite().all()
    if at < 2:
        assert poisoned[1][7].isnan().all()


def test_same_bits_every_time(where):
    tensors = random_inputs(1000, 96, device=where[1])
    first = run(where, tensors)
    for _ in range(3):
        for actual, expected in zip(run(where, tensors), first, strict=True):
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("backend", [p for p in native_backends(op.NAME) if p.values[0][0] == "cpp"])
def test_threads_change_no_bit(backend):
    tensors = random_inputs(3000, 96)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = run(("cpp", "cpu"), tensors)
        torch.set_num_threads(3)
        for actual, plain in zip(run(("cpp", "cpu"), tensors), expected, strict=True):
            assert torch.equal(actual, plain)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_every_instruction_set(isa):
    code = """
        import sys; sys.path.insert(0, "tests")
        import torch, test_residual_norm as t
        from tritonkern import _cpp
        assert _cpp.isa() == "%s"
        for shape in ((5, 384), (9, 19)):
            for dtypes in t.PAIRS:
                t.check(("cpp", "cpu"), t.random_inputs(*shape, dtype=dtypes[0], branch_dtype=dtypes[1]))
    """
    from tritonkern import _cpp

    if isa not in _cpp.isas():
        pytest.skip(f"this machine has no {isa}")
    run_python(code % isa, TRITONKERN_CPU_ISA=isa)


def test_opcheck(where):
    x, branch, gamma, weight, bias, grad_total, grad_normed = random_inputs(3, 5, 24, device=where[1])
    inputs = (x, branch, gamma, weight, bias)
    torch.library.opcheck(FWD, (*(t.requires_grad_() for t in inputs), EPS, torch.float32, where[0]))
    torch.library.opcheck(FWD, (x, None, None, None, None, EPS, torch.bfloat16, where[0]))
    grads = (
        grad_total,
        grad_normed.bfloat16(),
        x.detach(),
        branch.detach().bfloat16(),
        gamma.detach(),
        weight.detach(),
    )
    torch.library.opcheck(BWD, (*grads, EPS, torch.bfloat16, [True] * 5, where[0]))
    torch.library.opcheck(
        BWD, (None, *grads[1:3], None, None, None, EPS, torch.float32, [True] + [False] * 4, where[0])
    )


def test_direct_calls_of_the_operators_are_checked():
    """Kernels take raw pointers, so whoever calls `torch.ops` must not get past the checks either."""
    x, branch, gamma, weight, bias, grad_total, grad_normed = random_inputs(3, 8)
    with pytest.raises(ValueError, match="gamma must"):
        FWD(x, branch, gamma[:4], weight, bias, EPS, x.dtype)
    good = (grad_total, grad_normed, x, branch, gamma, weight, EPS, x.dtype, [True] * 5)
    BWD(*good)
    for at, bad in ((0, grad_total[:1]), (0, grad_total.double()), (1, grad_normed[:1]), (3, branch.bfloat16())):
        with pytest.raises((TypeError, ValueError)):
            BWD(*good[:at], bad, *good[at + 1 :])
    for at, bad in ((3, None), (4, gamma[:4]), (5, weight[:4]), (7, torch.float64), (8, [True])):
        with pytest.raises((TypeError, ValueError)):
            BWD(*good[:at], bad, *good[at + 1 :])


def test_compiled_as_one_graph(where):
    tensors = random_inputs(3, 5, 24, device=where[1])
    torch._dynamo.reset()
    function = lambda *x: residual_norm(*x, EPS, backend=where[0])  # noqa: E731
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(
        results(compiled, tensors[:5], tensors[5:]), results(function, tensors[:5], tensors[5:]), strict=True
    ):
        assert torch.equal(actual, expected)


def test_autocast_gives_what_the_next_layer_takes(where):
    x = torch.randn(3, 24, device=where[1])
    with torch.autocast(where[1], torch.bfloat16):
        total, normed = residual_norm(x, x.bfloat16(), backend=where[0])
        assert residual_norm(x.double(), backend=where[0])[1].dtype == torch.float64
    assert (total.dtype, normed.dtype) == (torch.float32, torch.bfloat16)


def test_second_derivative_is_refused(where):
    x = torch.randn(3, 8, device=where[1], requires_grad=True)
    (grad,) = torch.autograd.grad(residual_norm(x, backend=where[0])[1].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="residual_norm has no second derivative"):
        grad.sum().backward()


X = torch.randn(2, 8)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x must be a torch.Tensor, got list"),
        ({"x": X.int()}, TypeError, "x must be float64.* got torch.int32"),
        ({"x": torch.tensor(1.0)}, ValueError, r"x must have shape \[..., C\]"),
        ({"x": torch.zeros(2, 4097)}, ValueError, "C from 1 to 4096"),
        ({"branch": X[:1]}, ValueError, r"branch must have the shape of x, \(2, 8\), got \(1, 8\)"),
        ({"branch": X.double()}, TypeError, "branch must be torch.float32, bfloat16 or float16.*got torch.float64"),
        ({"x": X.bfloat16(), "branch": X}, TypeError, "branch must be torch.bfloat16, as x is torch.bfloat16"),
        ({"branch": X.to("meta")}, ValueError, "branch must be on the device of x, cpu, got meta"),
        ({"gamma": X[0]}, ValueError, "gamma scales branch, and there is none"),
        ({"weight": X}, ValueError, r"weight must have the shape of x's channels, \[8\], got \(2, 8\)"),
        ({"bias": X[0].to_sparse()}, TypeError, "bias must be a dense"),
        ({"eps": -1.0}, ValueError, "eps must be a number from 0 up"),
        ({"eps": torch.tensor(1.0)}, TypeError, "eps must be a number, got Tensor"),
        ({"out_dtype": torch.float64}, TypeError, "out_dtype must be torch.float32"),
        ({"out_dtype": "half"}, TypeError, "out_dtype must be a torch.dtype or None, got str"),
        ({"backend": "cuda"}, ValueError, "backend must be one of"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        residual_norm(**{"x": X, **arguments})


def test_forward_mode_is_refused_not_silently_zero():
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda x: residual_norm(x)[1], (X,), (X,))
