"""The temporal block: every backend against a dense mask in float64, the rule of twice eager PyTorch's error."""

import functools
import importlib
import os

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import assert_as_exact_as_eager, native_backends
from torch import nn
from torch.library import opcheck

from tritonkern import TemporalWindowAttention, temporal_block
from tritonkern.ops._contract import DTYPES
from tritonkern.ops.temporal_block import op

NAMES = ("out", "x", "norm_weight", "norm_bias", "qkv_weight", "qkv_bias", "proj_weight", "proj_bias")
# `test_temporal_block_triton.py` runs this file in Triton's interpreter.
INTERPRETED = [pytest.param(("triton", "cpu"), id="triton")] * (os.environ.get("TRITON_INTERPRET") == "1")


@pytest.fixture(params=[*native_backends(op.NAME), *INTERPRETED])
def where(request):
    return request.param


def random_tensors(shape, dtype=torch.float32, device="cpu"):
    """x, the six parameters, and a cotangent."""
    channels = shape[-1]
    sizes = [shape, (channels,), (channels,), (3 * channels, channels), (3 * channels,), (channels, channels)]
    tensors = [torch.randn(size, dtype=torch.float64) for size in [*sizes, (channels,), shape]]
    for at in (3, 5):
        tensors[at] *= channels**-0.5
    return [x.to(device, dtype) for x in tensors]


def plain(x, norm_weight, norm_bias, qkv_weight, qkv_bias, proj_weight, proj_bias, heads, left, right, order=()):
    """What a PyTorch user writes, a dense mask over time; `order`: axes along which sums run backwards (1 frames, -1
    channels)."""
    channels = x.shape[-1]
    if 1 in order:
        x, left, right = x.flip(1), right, left
    if -1 in order:
        x, norm_weight, norm_bias, proj_bias = (
            y if y is None else y.flip(-1) for y in (x, norm_weight, norm_bias, proj_bias)
        )
        # Heads and the channels inside them are reversed as well.
        turn = lambda y: y.unflatten(0, (3, channels)).flip(1).flatten(0, 1)  # noqa: E731
        qkv_weight, qkv_bias = turn(qkv_weight).flip(1), None if qkv_bias is None else turn(qkv_bias)
        proj_weight = proj_weight.flip(0, 1)
    normed = F.layer_norm(x, (channels,), norm_weight, norm_bias)
    qkv = normed @ qkv_weight.mT + (0 if qkv_bias is None else qkv_bias)
    query, key, value = qkv.unflatten(-1, (3, heads, channels // heads)).permute(3, 0, 2, 4, 1, 5)  # [B, N, H, T, D]
    frames = torch.arange(x.shape[1], device=x.device)
    distance = frames[None, :] - frames[:, None]
    scores = (query @ key.mT) * (channels // heads) ** -0.5
    weights = scores.masked_fill((distance < -left) | (distance > right), float("-inf")).softmax(-1)
    attended = (weights @ value).permute(0, 3, 1, 2, 4).flatten(-2)
    return (x + F.linear(attended, proj_weight, proj_bias)).flip(order)


def results(function, tensors, grad_out):
    """The output, and the gradients of the inputs that are there."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in tensors]
    out = function(*leaves)
    grads = iter(torch.autograd.grad(out, [x for x in leaves if x is not None], grad_out))
    return [out.detach(), *(None if x is None else next(grads) for x in leaves)]


def run(where, tensors, heads, window):
    return results(lambda *x: temporal_block(*x, heads, window, backend=where[0]), tensors[:7], tensors[7])


def check(where, tensors, heads, window):
    """Float64 has no better judge than itself: there the truth is the mean over eager's orders of summation, and its
    errors are also those of float32, times the ratio of their ulps."""
    form = functools.partial(plain, heads=heads, left=window[0], right=window[1])

    def in_all_orders(tensors):
        for order in ((), (1,), (-1,), (1, -1)):
            yield results(functools.partial(form, order=order), tensors[:7], tensors[7])

    by_eager = list(in_all_orders(tensors))
    doubles, singles = ([None if x is None else x.to(dtype) for x in tensors] for dtype in (torch.double, torch.float))
    exact = results(form, doubles[:7], doubles[7])
    if tensors[0].dtype == torch.float64:
        exact = [None if orders[0] is None else sum(orders) / 4 for orders in zip(*by_eager, strict=True)]
        rounded = [None if x is None else x.double() for x in singles]
        truth = results(form, rounded[:7], rounded[7])
        for one in in_all_orders(singles):
            pairs = zip(one, truth, exact, strict=True)
            by_eager.append([None if x is None else z + (x - y) * 2.0**-29 for x, y, z in pairs])
    largest = largest_score(*doubles[:5], heads)
    actual = run(where, tensors, heads, window)
    for at, name in enumerate(NAMES):
        if exact[at] is not None:
            term = largest * exact[at].abs().max() if at and exact[at].numel() else 0
            assert_as_exact_as_eager(actual[at], [one[at] for one in by_eager], exact[at], term, name)


def largest_score(x, norm_weight, norm_bias, qkv_weight, qkv_bias, heads):
    """Weights of the backward pass are exp(score - log-sum-exp), whose rounding is relative to the score."""
    if x.numel() == 0:
        return 0
    qkv = F.linear(F.layer_norm(x, norm_weight.shape, norm_weight, norm_bias), qkv_weight, qkv_bias)
    query, key, _ = qkv.unflatten(-1, (3, heads, -1)).unbind(-3)
    return torch.einsum("binhd,bjnhd->bnhij", query, key).abs().max() * query.shape[-1] ** -0.5


# [B, T, N, C], heads, window: several clips of one task, heads that no vector divides, one frame, a window longer than
# the clip, clips that are cut in time, Chrono's channels
CASES = [
    ((2, 24, 7, 32), 4, (6, 6)),
    ((1, 9, 2, 72), 3, (2, 0)),
    ((2, 1, 3, 16), 1, (6, 6)),
    ((1, 5, 1, 40), 5, (9, 1)),
    ((1, 150, 2, 24), 1, (20, 3)),
    ((1, 26, 5, 128), 4, (6, 6)),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "heads", "window"), CASES, ids=str)
def test_result_and_gradients(where, shape, heads, window, dtype):
    if where == ("triton", "cpu") and dtype == torch.bfloat16:
        pytest.skip("the interpreter computes bfloat16 products wrongly")
    check(where, random_tensors(shape, dtype, where[1]), heads, window)


@settings(deadline=None, max_examples=15, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_shape(where, data):
    draw = lambda *choice: data.draw(st.integers(*choice))  # noqa: E731
    heads = draw(1, 3)
    shape = (draw(1, 2), draw(1, 30), draw(0, 4), heads * 8 * draw(1, 3))
    tensors = random_tensors(shape, data.draw(st.sampled_from([torch.float32, torch.float16])), where[1])
    for at in (4, 6):
        if data.draw(st.booleans()):
            tensors[at] = None
    check(where, tensors, heads, (draw(0, 35), draw(0, 9)))


def test_is_the_block_of_its_layers(where):
    norm, attention = nn.LayerNorm(32).double(), TemporalWindowAttention(32, 4, window_size=5, qkv_bias=True).double()
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 9, 3, 32, dtype=torch.float64)
    expected = (x + attention(norm(x))).to(where[1])
    parameters = [*norm.parameters(), *attention.qkv.parameters(), *attention.proj.parameters()]
    actual = temporal_block(*(p.to(where[1]) for p in (x, *parameters)), 4, 5, backend=where[0])
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_results_on_the_cpu_are_those_of_float32_rounded_once(dtype):
    tensors = random_tensors((2, 24, 5, 64), dtype)[:7]
    expected = temporal_block(*(x.float() for x in tensors), 4, backend="cpp").to(dtype)
    assert torch.equal(temporal_block(*tensors, 4, backend="cpp"), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_frames_stay_in_their_windows(where, bad, dtype):
    left, right, frame = 3, 1, 9
    tensors = random_tensors((1, 20, 2, 32), dtype, where[1])
    clean = run(where, tensors, 2, (left, right))
    tensors[0][0, frame, 1, 4] = bad
    out, grad_x, *_ = run(where, tensors, 2, (left, right))
    hit = torch.zeros(20, 2, dtype=torch.bool)
    hit[frame - right : frame + left + 1, 1] = True
    assert out[0, hit].isnan().all()
    torch.testing.assert_close(out[0, ~hit], clean[0][0, ~hit])
    # A gradient reaches a frame from the outputs that see it, each of which depends on its whole window.
    hit[frame - right - left : frame + left + right + 1, 1] = True
    assert grad_x[0, hit].isnan().all()
    # In Triton, 16-bit frames that share a tile with a NaN take another way (docs/numerics.md).
    rounding = 8 * torch.finfo(dtype).eps * clean[1].abs().max().item()
    torch.testing.assert_close(grad_x[0, ~hit], clean[1][0, ~hit], rtol=0, atol=rounding)


LAYOUTS = {
    "frames inside positions": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "channels apart": lambda x: torch.stack([x, x], -1)[..., 0],
    "expanded": lambda x: x[:1, :, :1].expand_as(x),
    "sliced": lambda x: F.pad(x, (3, 2, 1, 0))[:, :, 1:, 3:-2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(where, layout):
    tensors = random_tensors((2, 7, 3, 16), device=where[1])
    tensors[0], tensors[7] = LAYOUTS[layout](tensors[0]), LAYOUTS[layout](tensors[7])
    tensors[3], tensors[5] = tensors[3].mT.contiguous().mT, LAYOUTS["channels apart"](tensors[5])
    expected = run(where, [x.contiguous() for x in tensors], 2, 3)
    for actual, truth in zip(run(where, tensors, 2, 3), expected, strict=True):
        torch.testing.assert_close(actual, truth)
    assert temporal_block(*tensors[:7], 2, 3, backend=where[0]).is_contiguous()


def test_same_bits_for_any_number_of_threads():
    tensors = random_tensors((1, 300, 4, 64))
    threads, runs = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            runs.append(temporal_block(*tensors[:7], 4, backend="cpp"))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])


def test_same_bits_every_time(where):
    tensors = random_tensors((1, 24, 9, 64), device=where[1])
    first = run(where, tensors, 4, 13)
    assert all(torch.equal(x, y) for x, y in zip(run(where, tensors, 4, 13), first, strict=True))


def test_gradcheck(where):
    inputs = [x.requires_grad_() for x in random_tensors((1, 4, 2, 8), torch.float64, where[1])[:7]]
    form = lambda *x: temporal_block(*x, 1, (2, 1), backend=where[0])  # noqa: E731
    assert torch.autograd.gradcheck(form, inputs, fast_mode=True)


@pytest.mark.parametrize(("shape", "window"), [((1, 3, 1, 520), 3), ((1, 200, 1, 8), (150, 0))], ids=str)
def test_wide_and_long_calls_go_step_by_step(monkeypatch, shape, window):
    cpp = importlib.import_module("tritonkern.ops.temporal_block.cpp")
    monkeypatch.setattr(cpp._cpp, "temporal_block_forward", None)
    tensors = random_tensors(shape)[:7]
    steps = temporal_block(*tensors, 1 if shape[-1] == 8 else 13, window, backend="cpp")
    expected = temporal_block(*tensors, 1 if shape[-1] == 8 else 13, window, backend="reference")
    torch.testing.assert_close(steps, expected)


@pytest.mark.parametrize("needed", [1 << at for at in range(7)] + [0b1010101])
def test_partial_requires_grad(where, needed):
    tensors = random_tensors((1, 5, 2, 16), device=where[1])
    full = run(where, tensors, 2, 3)[1:]
    leaves = [x.detach().requires_grad_(bool(needed >> at & 1)) for at, x in enumerate(tensors[:7])]
    temporal_block(*leaves, 2, 3, backend=where[0]).backward(tensors[7])
    for leaf, expected in zip(leaves, full, strict=True):
        assert (leaf.grad is not None) == leaf.requires_grad
        assert leaf.grad is None or torch.equal(leaf.grad, expected)


def test_parameters_may_have_other_dtypes(where):
    tensors = random_tensors((1, 5, 2, 16), device=where[1])
    others = [tensors[0], *(x.half() for x in tensors[1:7])]
    out, *grads = run(where, [*others, tensors[7]], 2, 3)
    expected, *same = run(where, [x.float() for x in others] + [tensors[7]], 2, 3)
    torch.testing.assert_close(out, expected)
    for grad, truth, leaf in zip(grads, same, others, strict=True):
        assert grad.dtype == leaf.dtype
        torch.testing.assert_close(grad, truth.to(grad.dtype))


def test_saves_nothing_but_its_inputs(where):
    tensors = [x.requires_grad_() for x in random_tensors((1, 5, 2, 16), device=where[1])[:7]]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        temporal_block(*tensors, 2, backend=where[0])
    used = [*tensors[:6]]  # the projection's bias is in no gradient
    assert sorted(t.data_ptr() for t in kept) == sorted(t.data_ptr() for t in used)


@pytest.mark.parametrize("shape", [(0, 3, 2, 16), (2, 0, 2, 16), (2, 3, 0, 16)], ids=str)
def test_empty(where, shape):
    out, *grads = run(where, random_tensors(shape, device=where[1]), 2, 3)
    assert out.shape == grads[0].shape == shape
    assert not any(grad.any() for grad in grads)


def test_opcheck(where):
    *tensors, grad_out = random_tensors((1, 3, 2, 16), device=where[1])
    tensors[0] = tensors[0].transpose(1, 2).contiguous().transpose(1, 2)
    options = (2, 1, 0, 1e-5)
    opcheck(op.temporal_block_fwd, (*(x.clone().requires_grad_() for x in tensors), *options, where[0]))
    opcheck(op.temporal_block_fwd, (*tensors[:4], None, tensors[5], None, *options, where[0]))
    for needed in ([True] * 7, [False, True] + [False] * 5):
        opcheck(op.temporal_block_bwd, (grad_out, *tensors[:6], *options, needed, where[0]))


def test_compiled(where):
    tensors = random_tensors((1, 5, 2, 16), device=where[1])
    form = lambda *x: temporal_block(*x, 2, 3, backend=where[0]) * 2  # noqa: E731
    compiled = torch.compile(form, fullgraph=True, backend="aot_eager")
    expected = results(form, tensors[:7], tensors[7])
    for actual, truth in zip(results(compiled, tensors[:7], tensors[7]), expected, strict=True):
        torch.testing.assert_close(actual, truth)


GOOD = dict(zip(NAMES[1:], random_tensors((1, 3, 2, 16))[:7], strict=True)) | {"num_heads": 2, "window": 3}


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"x": torch.zeros(3, 2, 16)}, ValueError, r"x must have shape \[B, T, N, C\]"),
        ({"x": torch.zeros(1, 3, 2, 16).int()}, TypeError, "x must be float64"),
        ({"x": None}, TypeError, "x must be a torch.Tensor"),
        ({"norm_bias": None}, TypeError, "norm_bias must be a torch.Tensor"),
        ({"norm_weight": torch.zeros(8)}, ValueError, r"norm_weight must have shape \[16\]"),
        ({"qkv_weight": torch.zeros(16, 48)}, ValueError, r"qkv_weight must have shape \[48, 16\]"),
        ({"qkv_bias": torch.zeros(16)}, ValueError, r"qkv_bias must have shape \[48\]"),
        ({"proj_weight": torch.zeros(16, 8)}, ValueError, r"proj_weight must have shape \[16, 16\]"),
        ({"proj_bias": torch.zeros(16, device="meta")}, ValueError, "proj_bias must be on the device of x"),
        ({"num_heads": 3}, ValueError, "num_heads must divide"),
        ({"num_heads": 4}, ValueError, "multiple of 8 channels"),
        ({"num_heads": 0}, ValueError, "num_heads must divide"),
        ({"num_heads": 2.0}, TypeError, "num_heads must be an int"),
        ({"window": 4}, ValueError, "window must be an odd number"),
        ({"eps": -1.0}, ValueError, "eps must be a number from 0 up"),
        ({"eps": "small"}, TypeError, "eps must be a number"),
        ({"backend": "cuda"}, ValueError, "backend must be one of"),
    ],
)
def test_errors(change, error, match):
    with pytest.raises(error, match=match):
        temporal_block(**(GOOD | change))


def test_direct_calls_of_the_operators_are_checked():
    """Kernels take raw pointers, so whoever calls `torch.ops` must not get past the checks either."""
    *tensors, grad_out = random_tensors((1, 3, 2, 16))
    options, needed = (2, 1, 0, 1e-5), [True] * 7
    with pytest.raises(ValueError, match="left count"):
        op.temporal_block_fwd(*tensors, 2, -1, 0, 1e-5)
    with pytest.raises(ValueError, match="qkv_weight must have shape"):
        op.temporal_block_fwd(*tensors[:3], tensors[5], *tensors[4:], *options)
    for bad in (grad_out[:, :2], grad_out.double()):
        with pytest.raises(ValueError, match="grad_out must be"):
            op.temporal_block_bwd(bad, *tensors[:6], *options, needed)
    with pytest.raises(ValueError, match="needed must be"):
        op.temporal_block_bwd(grad_out, *tensors[:6], *options, needed[:6])


def test_derivatives_that_are_not_there():
    x = GOOD["x"].clone().requires_grad_()
    (grad,) = torch.autograd.grad(temporal_block(**(GOOD | {"x": x})).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        temporal_block(**(GOOD | {"x": torch.autograd.forward_ad.make_dual(GOOD["x"], GOOD["x"])}))
