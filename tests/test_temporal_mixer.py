"""The temporal mixer: every backend against float64, the rule of twice eager PyTorch's error."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracle import assert_as_exact_as_eager, fast_backends, run_python

from tritonkern import temporal_mixer
from tritonkern.ops._dtypes import DTYPES
from tritonkern.ops.temporal_mixer import op

FWD, BWD = op.temporal_mixer_fwd, op.temporal_mixer_bwd
EPS = 1e-5
NAMES = ("out", "grad x", "grad norm", "grad conv1 weight", "grad conv1 bias", "grad conv2 weight", "grad conv2 bias")
CAUSAL = pytest.mark.parametrize("causal", [False, True], ids=["offline", "causal"])


@pytest.fixture(params=fast_backends(op.NAME))
def where(request):
    return request.param


def random_inputs(*shape, dtype=torch.float32, device="cpu"):
    """x, the five parameters, and the cotangent of the result."""
    channels = shape[-1]
    sizes = [shape, (channels,), (4 * channels, 1, 3), (4 * channels,), (4 * channels, 1, 3), (4 * channels,), shape]
    return [torch.randn(size, dtype=torch.float64).to(device, dtype) for size in sizes]


def eager(x, norm_weight, weight1, bias1, weight2, bias2, causal):
    """As a PyTorch user writes it."""
    channels = x.shape[-1]
    padding = (2, 0) if causal else (1, 1)
    hidden = F.layer_norm(x, (channels,), norm_weight, None, EPS).flatten(0, -3).mT
    hidden = F.gelu(F.conv1d(F.pad(hidden, padding), weight1, bias1, groups=channels), approximate="tanh")
    mixed = F.conv1d(F.pad(hidden, padding), weight2, bias2, groups=4 * channels).mT
    return x + (mixed[..., 0::4] + mixed[..., 1::4] + mixed[..., 2::4] + mixed[..., 3::4]).view_as(x)


def textbook(x, norm_weight, weight1, bias1, weight2, bias2, grad_out, causal):
    """The result and all gradients, differentiated by hand: one frame, one tap, one channel of the four at a time, in
    NumPy's long double, as float64 is itself among the dtypes to judge."""
    tensors = (x, norm_weight, weight1, bias1, weight2, bias2, grad_out)
    x, norm, w1, b1, w2, b2, grad = (t.detach().cpu().double().numpy().astype(np.longdouble) for t in tensors)
    frames, before = x.shape[-2], 2 if causal else 1
    w1, w2, b1, b2 = w1.reshape(-1, 4, 3), w2.reshape(-1, 4, 3), b1.reshape(-1, 4), b2.reshape(-1, 4)
    centred = x - x.mean(-1, keepdims=True)
    scale = 1 / np.sqrt((centred**2).mean(-1, keepdims=True) + np.longdouble(EPS))
    standard = centred * scale
    rows = standard * norm

    def taps(t):
        return [(k, t - before + k) for k in range(3) if 0 <= t - before + k < frames]

    hidden, slope = np.zeros((2, *x.shape, 4), np.longdouble)
    for t, j in itertools.product(range(frames), range(4)):
        u = b1[:, j] + sum(w1[:, j, k] * rows[..., s, :] for k, s in taps(t))
        factor = np.sqrt(2 / np.longdouble("3.14159265358979323846264338327950288"))
        bent = np.tanh(factor * (u + np.longdouble("0.044715") * u**3))
        hidden[..., t, :, j] = u * (1 + bent) / 2
        inner = factor * (1 + 3 * np.longdouble("0.044715") * u**2)
        slope[..., t, :, j] = (1 + bent) / 2 + u * (1 - bent**2) * inner / 2
    out = x.copy()
    grad_hidden, grad_rows = np.zeros_like(hidden), np.zeros_like(x)
    grads = [np.zeros_like(p) for p in (w1, b1, w2)]
    over = tuple(range(x.ndim - 2))
    for t, j in itertools.product(range(frames), range(4)):
        out[..., t, :] += b2[:, j]
        for k, s in taps(t):
            out[..., t, :] += w2[:, j, k] * hidden[..., s, :, j]
            grad_hidden[..., s, :, j] += w2[:, j, k] * grad[..., t, :]
            grads[2][:, j, k] += (hidden[..., s, :, j] * grad[..., t, :]).sum(over)
    grad_inner = grad_hidden * slope
    for t, j in itertools.product(range(frames), range(4)):
        grads[1][:, j] += grad_inner[..., t, :, j].sum(over)
        for k, s in taps(t):
            grad_rows[..., s, :] += w1[:, j, k] * grad_inner[..., t, :, j]
            grads[0][:, j, k] += (grad_inner[..., t, :, j] * rows[..., s, :]).sum(over)
    g = grad_rows * norm
    grad_x = grad + scale * (g - g.mean(-1, keepdims=True) - standard * (g * standard).mean(-1, keepdims=True))
    every = tuple(range(x.ndim - 1))
    results = [out, grad_x, (grad_rows * standard).sum(every), *grads, np.repeat(grad.sum(every), 4)]
    results = [torch.from_numpy(np.asarray(result).astype(np.float64)) for result in results]
    return [result.reshape(like.shape) for result, like in zip(results, (tensors[0], *tensors[:6]), strict=True)]


def results(function, tensors):
    """The output, and the gradients of all inputs."""
    leaves = [x.detach().requires_grad_() for x in tensors[:6]]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, tensors[6])]


def run(where, tensors, causal=False):
    return results(lambda *x: temporal_mixer(*x, causal=causal, eps=EPS, backend=where[0]), tensors)


def turned(tensors, channels):
    """Tracks, channels and the four of each channel in reverse order; a second turn undoes the first."""

    def turn(x, per_channel):
        if x.shape[-1] == channels and x.dim() > 1 and per_channel == 1:
            return x.flip(0, -1)
        return x.unflatten(0, (channels, per_channel)).flip(0, 1).flatten(0, 1)

    return [turn(x, 4 if i in (2, 3, 4, 5) else 1) for i, x in enumerate(tensors)]


def check(where, tensors, causal):
    if where == ("triton", "cpu") and tensors[0].dtype == torch.bfloat16:
        pytest.skip("the interpreter truncates to bfloat16 where a GPU rounds")
    exact = textbook(*tensors, causal)
    function = lambda *x: eager(*x, causal)  # noqa: E731
    channels = tensors[0].shape[-1]
    flipped = results(function, turned(tensors, channels))
    flipped = [flipped[0].flip(0, -1), *turned(flipped[1:], channels)]
    by_eager = [results(function, tensors), flipped]
    terms = largest_terms(*(x.double() for x in tensors))
    for at, (name, actual, truth) in enumerate(zip(NAMES, run(where, tensors, causal), exact, strict=True)):
        assert_as_exact_as_eager(actual.cpu(), [one[at].cpu() for one in by_eager], truth, terms[at], name)


def largest_terms(x, norm_weight, weight1, bias1, weight2, bias2, grad):
    """Sizes of what the results are sums of, as products of the largest factors: each sum may cancel to nothing."""
    scale = float((x.var(-1, correction=0) + EPS).rsqrt().max())
    norm, weight1, bias1, weight2, grad = (float(t.abs().max()) for t in (norm_weight, weight1, bias1, weight2, grad))
    standard = float((x - x.mean(-1, keepdim=True)).abs().max()) * scale
    inner, hidden = weight2 * grad, 3 * standard * norm * weight1 + bias1
    of_x, of_norm, of_conv1 = scale * norm * weight1 * inner, standard * weight1 * inner, standard * norm * inner
    return 0, of_x, of_norm, of_conv1, inner, hidden * grad, grad


# (tracks, frames, channels): clips shorter than the kernels; of several stretches; odd channels; TAPIR's; many. The
# last two in float32 alone: PyTorch's convolution of so many groups, which errors are compared with, takes seconds.
SHAPES = [(5, 1, 24), (5, 2, 24), (2, 3, 19), (3, 70, 24), (2, 33, 5), (4, 6, 1)]
CALLS = [*itertools.product(SHAPES, DTYPES), ((3, 8, 512), torch.float32), ((1, 20, 1030), torch.float32)]


@pytest.fixture(scope="module")
def warm_convolutions():
    """PyTorch's first convolution in 16 bits takes seconds."""
    for dtype in (torch.bfloat16, torch.float16):
        results(lambda *x: eager(*x, False), random_inputs(1, 2, 8, dtype=dtype))


@CAUSAL
@pytest.mark.parametrize(("shape", "dtype"), CALLS, ids=str)
def test_result_and_gradients(where, shape, dtype, causal, warm_convolutions):
    check(where, random_inputs(*shape, dtype=dtype, device=where[1]), causal)


@CAUSAL
@pytest.mark.parametrize("offset", [1e3, 1e5])
def test_large_means_do_not_cancel(where, offset, causal):
    tensors = random_inputs(3, 9, 64, device=where[1])
    tensors[0] += offset
    check(where, tensors, causal)


@pytest.mark.parametrize("size", [1e2, 1e4])
def test_large_hidden_values(where, size):
    """Far beyond where GELU is the identity or nothing, and where e^z overflows."""
    tensors = random_inputs(3, 9, 24, device=where[1])
    tensors[2] *= size
    out = run(where, tensors)[0]
    exact = textbook(*tensors, False)[0]
    torch.testing.assert_close(out.cpu().double(), exact, rtol=1e-5, atol=1e-5 * exact.abs().max().item())


@pytest.mark.parametrize("pieces", [(1,) * 9, (2, 3, 4), (8, 1), (0, 9), (40, 1, 30)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_carried_state_gives_what_one_clip_gives(where, pieces, dtype):
    if where == ("triton", "cpu") and dtype == torch.bfloat16:
        pytest.skip("the interpreter truncates to bfloat16 where a GPU rounds")
    x, *parameters, _ = random_inputs(3, sum(pieces), 20, dtype=dtype, device=where[1])
    whole = temporal_mixer(x, *parameters, causal=True, backend=where[0])
    accurate = torch.promote_types(dtype, torch.float32)
    state = tuple(torch.zeros(3, 2, c, dtype=accurate, device=where[1]) for c in (20, 80))
    parts = []
    for piece in x.split(pieces, 1):
        part, state = temporal_mixer(piece, *parameters, causal=True, state=state, backend=where[0])
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    normed = F.layer_norm(x.to(accurate), (20,), parameters[0].to(accurate))[:, -2:]
    torch.testing.assert_close(state[0], normed)
    again = temporal_mixer(x[:, -2:].repeat(1, 2, 1), *parameters, causal=True, state=state, backend=where[0])[0]
    longer = torch.cat([x, x[:, -2:], x[:, -2:]], 1)
    expected = temporal_mixer(longer, *parameters, causal=True, backend=where[0])[:, -4:]
    torch.testing.assert_close(again, expected)


def test_state_has_no_gradient(where):
    x, *parameters, _ = random_inputs(2, 3, 8, device=where[1])
    state = tuple(torch.zeros(2, 2, c, device=where[1]) for c in (8, 32))
    out, _ = temporal_mixer(x.requires_grad_(), *parameters, causal=True, state=state, backend=where[0])
    with pytest.raises(RuntimeError, match="carried state has no gradient; run it under torch.no_grad"):
        out.sum().backward()


def test_reference_is_the_textbook():
    for causal in (False, True):
        tensors = random_inputs(2, 4, 5, dtype=torch.float64)
        for actual, exact in zip(run(("reference", "cpu"), tensors, causal), textbook(*tensors, causal), strict=True):
            torch.testing.assert_close(actual, exact, rtol=1e-12, atol=1e-12)


def test_parameters_of_another_dtype(where):
    tensors = random_inputs(2, 5, 24, device=where[1])
    tensors[0], tensors[6] = tensors[0].half(), tensors[6].half()
    actual = run(where, tensors)
    expected = run(where, [x.float() for x in tensors])
    assert [x.dtype for x in actual] == [torch.float16] * 2 + [torch.float32] * 5
    for x, truth in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, truth.to(x.dtype))


def test_no_frames_leave_the_state(where):
    x, *parameters, _ = random_inputs(3, 0, 8, device=where[1])
    state = tuple(torch.randn(3, 2, c, device=where[1]) for c in (8, 32))
    _, after = temporal_mixer(x, *parameters, causal=True, state=state, backend=where[0])
    assert all(torch.equal(*pair) for pair in zip(after, state, strict=True))


@CAUSAL
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("at", [0, 6], ids=["x", "grad out"])
def test_non_finite_input_stays_with_the_frames_that_see_it(where, at, bad, causal):
    # For C++ beside the seam of two stretches; the interpreter is slow.
    frames, center = (12, 6) if where[0] == "triton" else (40, 33)
    tensors = random_inputs(3, frames, 19, device=where[1])
    clean = run(where, tensors, causal)
    tensors[at][2, center, 5] = bad
    poisoned = run(where, tensors, causal)
    back, ahead = (0, 4) if causal else (2, 2)
    seen = {"out": (back, ahead), "grad": (ahead, back)} if at else {"out": (back, ahead), "grad": (4, 4)}
    for name, before, after in zip(seen, clean, poisoned, strict=False):
        touched = slice(center - seen[name][0], center + seen[name][1] + 1)
        hit = torch.zeros(3, frames, dtype=torch.bool, device=where[1])
        hit[2, touched] = name == "grad" or at == 0
        assert torch.equal(after[~hit], before[~hit])
        if at == 0 and name == "out":
            assert after[hit].isnan().all(-1).all()
        if at == 6 and name == "grad":
            assert (~after[hit].isfinite()).any(-1).all()
    if at == 6:
        others = torch.arange(19, device=where[1]) != 5
        for after, before, per_channel in zip(poisoned[2:], clean[2:], (1, 4, 4, 4, 4), strict=True):
            after, before = (x.unflatten(0, (19, per_channel)) for x in (after, before))
            assert torch.equal(after[others], before[others])
            assert not after[5].isfinite().all()


def inputs_with_a_state(device, tracks):
    *inputs, _ = random_inputs(1, tracks, 3, 7, device=device)
    return inputs, [torch.randn(1, tracks, 2, c, device=device) for c in (7, 28)]


def test_opcheck_with_a_state(where):
    inputs, states = inputs_with_a_state(where[1], 3)
    torch.library.opcheck(FWD, (*inputs, True, EPS, *states, where[0]))


def test_operator_with_a_state(where):
    inputs, states = inputs_with_a_state(where[1], 700)
    call = lambda *states: FWD(*inputs, True, EPS, *states, where[0])  # noqa: E731
    expected, before = call(*states), torch.get_num_threads()
    odd = call(*(x.as_strided(x.shape, (3, *x.stride()[1:])) for x in states))  # an axis of size 1
    assert all(map(torch.equal, odd, expected))
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        assert all(map(torch.equal, call(*states), expected))
    torch.set_num_threads(before)
    with pytest.raises(ValueError, match="state must have two tensors"):
        call(states[0], None)


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_every_instruction_set(isa):
    code = """
        import sys; sys.path.insert(0, "tests")
        import test_temporal_mixer as t
        from tritonkern import _cpp
        assert _cpp.isa() == "%s"
        for shape in ((2, 9, 72), (2, 40, 19)):
            for dtype in t.DTYPES:
                for causal in (False, True):
                    t.check(("cpp", "cpu"), t.random_inputs(*shape, dtype=dtype), causal)
    """
    from tritonkern import _cpp

    if isa not in _cpp.isas():
        pytest.skip(f"this machine has no {isa}")
    run_python(code % isa, TRITONKERN_CPU_ISA=isa)


def test_the_binding_names_the_argument():
    _cpp = pytest.importorskip("tritonkern._cpp", exc_type=ImportError)
    x, norm, weight1, bias1, weight2, _, grad = random_inputs(2, 3, 5, 8)
    good = dict(grad_out=grad, x=x, norm_weight=norm, conv1_weight=weight1, conv1_bias=bias1, conv2_weight=weight2)
    good |= dict(causal=False, eps=EPS, num_threads=1, grad_x=torch.empty_like(x), sums=torch.empty(30, 8))
    _cpp.temporal_mixer_backward(**good)
    for name, bad, error in (
        ("x", x.mT.contiguous().mT, ValueError),
        ("x", x[:0], ValueError),
        ("grad_out", grad.double(), TypeError),
        ("conv1_bias", bias1[1:], ValueError),
        ("conv2_weight", weight2.half(), TypeError),
        ("sums", torch.empty(29, 8), ValueError),
        ("grad_x", torch.empty_like(x).mT.contiguous().mT, ValueError),
    ):
        with pytest.raises(error, match=name):
            _cpp.temporal_mixer_backward(**{**good, name: bad})


X, NORM, W1, B1, W2, B2, _ = random_inputs(3, 4, 8)
STATE = torch.zeros(3, 2, 8), torch.zeros(3, 2, 32)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": X[0]}, ValueError, r"x must have shape \[N, T, C\] or \[B, N, T, C\]"),
        ({"x": torch.zeros(1, 1, 4097)}, ValueError, "C from 1 to 4096"),
        ({"norm_weight": NORM[:4]}, ValueError, r"norm_weight must have shape \[8\], as x has 8 channels, got \[4\]"),
        ({"conv1_weight": W1[:, 0]}, ValueError, r"conv1_weight must have shape \[32, 1, 3\].*got \[32, 3\]"),
        ({"state": STATE}, ValueError, "state is for a causal mixer; pass causal=True"),
        ({"state": STATE[0], "causal": True}, TypeError, "state must be a pair of tensors or None, got Tensor"),
        (
            {"state": (STATE[0], None), "causal": True},
            TypeError,
            "the second state must be a torch.Tensor, got NoneType",
        ),
        ({"state": STATE[::-1], "causal": True}, ValueError, r"the first state must have shape \[1, 3, 2, 8\]"),
        (
            {"state": [s.double() for s in STATE], "causal": True},
            TypeError,
            "the first state must be torch.float32, as x is torch.float32, got torch.float64",
        ),
        ({"causal": 1}, TypeError, "causal must be a bool, got int"),
        ({"eps": -1.0}, ValueError, "eps must be a positive number"),
        ({"state": (STATE[0], torch.tensor(1.0)), "causal": True}, ValueError, "the second state must have shape"),
        ({"eps": "small"}, TypeError, "eps must be a number, got str"),
        ({"backend": "cuda"}, ValueError, "backend must be one of"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_arguments(arguments, error, message):
    good = {"x": X, "norm_weight": NORM, "conv1_weight": W1, "conv1_bias": B1, "conv2_weight": W2, "conv2_bias": B2}
    with pytest.raises(error, match=message):
        temporal_mixer(**{**good, **arguments})
