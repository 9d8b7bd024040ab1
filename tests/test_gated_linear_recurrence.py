"""The gated linear recurrence: every backend against a textbook, the rule of twice eager PyTorch's error."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from functions import recurrence
from oracle import assert_as_exact_as_eager, fast_backends, growth, native_backends

from tritonkern import gated_linear_recurrence
from tritonkern.ops._dtypes import DTYPES, accumulator
from tritonkern.ops.gated_linear_recurrence import op

NAMES = ("out", "hidden", *(f"grad {name}" for name in recurrence()), "grad inputs", "grad before")
STATE = pytest.mark.parametrize("carried", [False, True], ids=["start", "carried"])


@pytest.fixture(params=fast_backends(op.NAME))
def where(request):
    return request.param


def random_inputs(B, T, N, H, D, dtype=torch.float32, device="cpu"):
    """x, the parameters, both tensors of the state before, and the cotangents of the result and the state after."""
    tensors = [*recurrence(B, T, N, H, D).values()]
    tensors += [torch.randn(B, 3, N, H * D), torch.randn(B, N, H * D), torch.randn(B, T, N, H * D)]
    tensors += [torch.randn(B, N, H * D)]
    wide = {9: accumulator(dtype), 11: accumulator(dtype)}
    return [x.double().to(device, wide.get(i, dtype)) for i, x in enumerate(tensors)]


def eager(x, conv_weight, conv_bias, weight_i, bias_i, weight_r, bias_r, decay, inputs, before, carried):
    """As a PyTorch user writes it, in the dtype of x; hidden states are summed up in float32."""
    B, T, N, C = x.shape
    past = inputs if carried else torch.zeros_like(inputs)
    rows = torch.cat([past, x], 1).permute(0, 2, 3, 1).flatten(0, 1)
    u = F.conv1d(rows, conv_weight.mT.unsqueeze(1), conv_bias, groups=C).unflatten(0, (B, N)).permute(0, 3, 1, 2)

    def gate(weight, bias):
        heads = u.unflatten(-1, bias.shape)
        return torch.sigmoid((torch.einsum("btnhi,hij->btnhj", heads, weight) + bias).flatten(-2))

    log_factor = -8.0 * gate(weight_r, bias_r) * F.softplus(decay)
    factor, rest = log_factor.exp(), 1 - (2 * log_factor).exp()
    multiplier = BoundedRoot.apply(rest)
    if not carried:
        multiplier = torch.cat([torch.ones_like(multiplier[:, :1]), multiplier[:, 1:]], 1)
    added = u * gate(weight_i, bias_i) * multiplier
    h = before if carried else torch.zeros_like(before)
    out = []
    for t in range(T):
        h = factor[:, t].to(h.dtype) * h + added[:, t].to(h.dtype)
        out.append(h.to(x.dtype))
    return torch.stack(out, 1), h


class BoundedRoot(torch.autograd.Function):
    """The square root, whose gradient is 1000 at most."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sqrt()

    @staticmethod
    def backward(ctx, grad):
        return grad / (4 * ctx.saved_tensors[0]).clamp(min=1e-6).sqrt()


def textbook(tensors, carried):
    """Results and all gradients, differentiated by hand: one sequence, one head, one frame at a time, in NumPy's long
    double, as float64 is itself among the dtypes to judge."""
    x, cw, cb, wi, bi, wr, br, decay, inputs, before, grad_out, grad_hidden = (
        t.detach().cpu().double().numpy().astype(np.longdouble) for t in tensors
    )
    (B, T, N, _), (H, D) = x.shape, bi.shape
    sigmoid = lambda z: np.exp(-np.logaddexp(0, -z))  # noqa: E731
    softplus, grads = np.log1p(np.exp(decay)), [np.zeros_like(t) for t in (x, cw, cb, wi, bi, wr, br, decay)]
    out, hidden, grad_inputs, grad_before = (np.zeros_like(t) for t in (x, before, inputs, before))
    for b, n, head in itertools.product(range(B), range(N), range(H)):
        c = slice(head * D, head * D + D)
        past = inputs[b, :, n, c] if carried else np.zeros((3, D), np.longdouble)
        frames = np.concatenate([past, x[b, :, n, c]])
        h = before[b, n, c] if carried else np.zeros(D, np.longdouble)
        kept = []
        for t in range(T):
            u = cb[c] + sum(cw[k, c] * frames[t + k] for k in range(4))
            i, r = sigmoid(u @ wi[head] + bi[head]), sigmoid(u @ wr[head] + br[head])
            a = np.exp(-8 * softplus[c] * r)
            rest = -np.expm1(-16 * softplus[c] * r)
            m = np.ones(D, np.longdouble) if t == 0 and not carried else np.sqrt(rest)
            kept.append((u, i, r, a, rest, m, h))
            h = a * h + m * i * u
            out[b, t, n, c] = h
        hidden[b, n, c] = h
        g = grad_hidden[b, n, c]
        of_frames = np.zeros_like(frames)
        for t in reversed(range(T)):
            u, i, r, a, rest, m, earlier = kept[t]
            g = g + grad_out[b, t, n, c]
            of_log = g * earlier * a
            if t > 0 or carried:
                of_log = of_log - 2 * a * a * g * i * u * np.minimum(1 / (2 * np.sqrt(rest)), 1000)
            of_i, of_r = g * m * u * i * (1 - i), of_log * -8 * softplus[c] * r * (1 - r)
            of_u = g * m * i + wi[head] @ of_i + wr[head] @ of_r
            for k in range(4):
                of_frames[t + k] += cw[k, c] * of_u
                grads[1][k, c] += of_u * frames[t + k]
            grads[2][c] += of_u
            grads[3][head] += np.outer(u, of_i)
            grads[4][head] += of_i
            grads[5][head] += np.outer(u, of_r)
            grads[6][head] += of_r
            grads[7][c] += of_log * r * -8 * sigmoid(decay[c])
            g = g * a
        grads[0][b, :, n, c], grad_inputs[b, :, n, c], grad_before[b, n, c] = of_frames[3:], of_frames[:3], g
    grads = [*grads, grad_inputs, grad_before] if carried else grads
    return [torch.from_numpy(np.asarray(t).astype(np.float64)) for t in (out, hidden, *grads)]


def results(function, tensors, carried):
    """The result, the hidden state after it, and the gradients of all inputs."""
    leaves = [x.detach().requires_grad_() for x in tensors[: 10 if carried else 8]]
    made = function(*leaves, *tensors[len(leaves) : 10])
    return [*(x.detach() for x in made), *torch.autograd.grad(made, leaves, tensors[10:])]


def run(where, tensors, carried):
    def function(*x):
        out, (_, hidden) = gated_linear_recurrence(*x[:8], state=x[8:] if carried else None, backend=where[0])
        return out, hidden

    return results(function, tensors, carried)


def flipped(tensors, count):
    """Sequences and channels in reverse order; a second turn undoes the first. Of two results, then of the inputs."""
    axes = [(0, -1), (-1,), (-1,), (0, 1, 2), (0, 1), (0, 1, 2), (0, 1), (-1,), *((0, -1),) * 4]
    return [x.flip(of) for x, of in zip(tensors, axes, strict=False)][:count]


def check(where, tensors, carried):
    if where == ("triton", "cpu") and tensors[0].dtype == torch.bfloat16:
        pytest.skip("the interpreter truncates to bfloat16 where a GPU rounds")
    exact = textbook(tensors, carried)
    function = lambda *x: eager(*x, carried)  # noqa: E731
    reverse = results(function, flipped(tensors, 12), carried)
    reverse = [reverse[0].flip(0, -1), reverse[1].flip(0, -1), *flipped(reverse[2:], 10)]
    by_eager = [results(function, tensors, carried), reverse]
    found = run(where, tensors, carried)
    for at, (name, actual, truth) in enumerate(zip(NAMES, found, exact, strict=False)):
        # Sums over all frames and sequences may cancel to nothing.
        term = 0 if name in ("out", "hidden") else float(exact[2].abs().max())
        assert_as_exact_as_eager(actual.cpu(), [one[at].cpu() for one in by_eager], truth, term, name)
    assert [x.dtype for x in found[2:]] == [x.dtype for x in tensors[: len(found) - 2]]


# batch, frames, sequences, heads, channels of a head: one frame; fewer frames than taps; TAPNext's heads; several tiles
# of sequences with a rest; odd channels.
SHAPES = [(1, 1, 2, 1, 16), (2, 2, 3, 2, 5), (1, 5, 2, 2, 64), (3, 4, 9, 1, 19)]


@STATE
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_result_and_gradients(where, shape, dtype, carried):
    check(where, random_inputs(*shape, dtype=dtype, device=where[1]), carried)


def test_many_sequences(where):
    """More tasks than sums of the parameters' gradients."""
    if where[0] == "triton" and where[1] == "cpu":
        pytest.skip("too many numbers for the interpreter")
    check(where, random_inputs(7, 2, 60, 1, 8, device=where[1]), False)


@pytest.mark.parametrize("size", [-12.0, 30.0])
def test_factors_near_one_and_near_zero(where, size):
    """1 - a^2 keeps its digits, and the gradient of its root is bounded: in float64, where eager PyTorch has enough."""
    tensors = random_inputs(1, 3, 2, 1, 8, dtype=torch.float64, device=where[1])
    tensors[7].fill_(size)
    for name, actual, truth in zip(NAMES, run(where, tensors, True), textbook(tensors, True), strict=True):
        torch.testing.assert_close(actual.cpu(), truth, rtol=1e-11, atol=1e-11 * float(truth.abs().max()), msg=name)


def test_gates_of_large_logits(where):
    """Sigmoids far beyond where they are 0 or 1, and e^z beyond float32."""
    tensors = random_inputs(1, 3, 2, 1, 16, device=where[1])
    tensors[3] *= 1e4
    for name, actual, truth in zip(NAMES[:2], run(where, tensors, False), textbook(tensors, False), strict=False):
        torch.testing.assert_close(actual.cpu().double(), truth, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("pieces", [(1,) * 6, (2, 4), (5, 1), (0, 6)], ids=lambda pieces: "-".join(map(str, pieces)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_carried_state_gives_what_one_clip_gives(where, pieces, dtype):
    """To the bit in C++: results, state, and the gradients that pass through it."""
    if where == ("triton", "cpu") and (dtype == torch.bfloat16 or len(pieces) > 2):
        pytest.skip("the interpreter is slow, and truncates to bfloat16")
    x, *parameters = random_inputs(1, 6, 3, 2, 8, dtype=dtype, device=where[1])[:8]
    cotangent = torch.randn(1, 6, 3, 16, device=where[1]).to(dtype)

    def both(pieces):
        leaf, state, parts = x.clone().requires_grad_(), None, []
        for piece in leaf.split(pieces, 1):
            if piece.shape[1] or state is not None:
                part, state = gated_linear_recurrence(piece, *parameters, state=state, backend=where[0])
                parts.append(part)
        out = torch.cat(parts, 1)
        loss = (out * cotangent).sum() + state[0].square().sum() + state[1].square().sum()
        return [out.detach(), *(s.detach() for s in state), *torch.autograd.grad(loss, [leaf])]

    whole, parts = both((6,)), both(pieces)
    assert whole[1].dtype == dtype and torch.equal(whole[1], x[:, -3:])
    assert torch.equal(whole[2].to(dtype), whole[0][:, -1])
    rounding = 0.0 if where[0] == "cpp" else 1e-5
    torch.testing.assert_close(parts[:3], whole[:3], rtol=rounding, atol=rounding)
    # The gradient of a frame is rounded once per part that adds to it.
    rounding = 1e-4 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(parts[3], whole[3], rtol=rounding, atol=rounding)


def test_without_a_batch_of_sequences(where):
    """`[B, T, C]` is one sequence per clip."""
    x, *parameters, inputs, before = random_inputs(3, 2, 1, 2, 8, device=where[1])[:10]
    flat = gated_linear_recurrence(x[:, :, 0], *parameters, state=(inputs[:, :, 0], before[:, 0]), backend=where[0])
    full = gated_linear_recurrence(x, *parameters, state=(inputs, before), backend=where[0])
    assert torch.equal(flat[0], full[0][:, :, 0]) and flat[0].is_contiguous()
    assert torch.equal(flat[1][0], full[1][0][:, :, 0]) and torch.equal(flat[1][1], full[1][1][:, 0])


def test_the_state_keeps_no_clip_alive(where):
    x, *parameters = random_inputs(1, 5, 2, 1, 8, device=where[1])[:8]
    _, state = gated_linear_recurrence(x, *parameters, backend=where[0])
    assert [s.untyped_storage().nbytes() for s in state] == [3 * 2 * 8 * 4, 2 * 8 * 4]


def test_memory_is_that_of_the_result():
    """Of 47 MiB; one frame of them is 1.2 MiB."""
    pytest.importorskip("tritonkern._cpp", exc_type=ImportError)
    prepare = """
        import torch
        from functions import recur, recurrence
        small, large = recurrence(1, 2, 600, 4, 64), recurrence(1, 40, 600, 8, 64)
        torch.set_grad_enabled(False), recur(*small.values())
    """
    assert 46 < growth(prepare, "out = recur(*large.values())") < 52


@pytest.mark.parametrize("backend", list(native_backends(op.NAME)))
def test_gradcheck_through_the_state(backend):
    if backend == ("triton", "cpu"):
        pytest.skip("the interpreter is slow")
    tensors = random_inputs(1, 2, 1, 1, 3, dtype=torch.float64, device=backend[1])[:10]

    def function(*x):
        out, state = gated_linear_recurrence(*x[:8], state=x[8:], backend=backend[0])
        return out, *state

    assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in tensors])


def test_opcheck_with_a_state(where):
    tensors = random_inputs(2, 2, 2, 1, 8, device=where[1])
    arguments = (*(x.detach().requires_grad_() for x in tensors[:10]), where[0])
    torch.library.opcheck(op.gated_linear_recurrence_fwd, arguments)
    backward = (tensors[10], tensors[11], *tensors[:10], tensors[10], [True] * 10, where[0])
    torch.library.opcheck(op.gated_linear_recurrence_bwd, backward, test_utils=["test_schema", "test_faketensor"])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_input_stays_in_its_head(where, bad):
    tensors = random_inputs(1, 5, 3, 2, 8, device=where[1])
    clean = run(where, tensors, True)
    tensors[0][0, 2, 1, 3] = bad
    out, _, grad_x = run(where, tensors, True)[:3]
    touched = torch.zeros_like(out, dtype=torch.bool)
    touched[0, 2:, 1, :8] = True
    assert not out[touched].isfinite().any() or bad == float("inf")
    assert not out[0, 2:, 1, 3].isfinite().any()
    assert torch.equal(out[~touched], clean[0][~touched])
    # A gradient passes through the gates of later frames, and through the convolution to three earlier ones.
    touched[0, :, 1, :8] = True
    assert torch.equal(grad_x[~touched], clean[2][~touched])


def test_parameters_of_another_dtype(where):
    tensors = random_inputs(1, 3, 2, 1, 8, device=where[1])
    half = [tensors[0].half(), *tensors[1:8]]
    actual, _ = gated_linear_recurrence(*half, backend=where[0])
    expected, _ = gated_linear_recurrence(half[0].float(), *tensors[1:8], backend=where[0])
    assert actual.dtype == torch.float16
    torch.testing.assert_close(actual, expected.half())


def test_the_binding_names_the_argument():
    _cpp = pytest.importorskip("tritonkern._cpp", exc_type=ImportError)
    x, *parameters, inputs, before, grad, carry = random_inputs(2, 3, 2, 2, 4)
    names = ("conv_weight", "conv_bias", "input_gate_weight", "input_gate_bias", "decay_gate_weight", "decay_gate_bias")
    good = dict(
        x=x, **dict(zip((*names, "rate"), parameters, strict=True)), inputs=inputs, hidden=before, num_threads=1
    )
    made = [torch.empty_like(t) for t in (x, *parameters, inputs, before)]
    good |= dict(grad_out=grad, grad_new_hidden=carry, out=grad)
    good |= dict(zip((f"grad_{n}" for n in ("x", *names, "rate", "inputs", "hidden")), made, strict=True))
    _cpp.gated_linear_recurrence_backward(**good)
    for name, bad, error in (
        ("x", x.mT.contiguous().mT, ValueError),
        ("x", x[:0], ValueError),
        ("grad_out", grad.double(), TypeError),
        ("conv_weight", parameters[0][1:], ValueError),
        ("input_gate_weight", parameters[2][:1], ValueError),
        ("decay_gate_weight", parameters[4].half(), TypeError),
        ("inputs", inputs[:, 1:], ValueError),
        ("hidden", None, ValueError),
        ("grad_hidden", torch.empty(1, 8), ValueError),
        ("grad_x", torch.empty_like(x).mT.contiguous().mT, ValueError),
    ):
        with pytest.raises(error, match=name):
            _cpp.gated_linear_recurrence_backward(**{**good, name: bad})


X, *PARAMETERS = random_inputs(2, 3, 2, 2, 4)[:8]
GOOD = dict(zip(recurrence(), [X, *PARAMETERS], strict=True))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": X[0, 0]}, ValueError, r"x must have shape \[B, T, C\] or \[B, T, N, C\] with C of 1 or more"),
        ({"conv_weight": PARAMETERS[0][:3]}, ValueError, r"conv_weight must have shape \[4, 8\], as x .* got \[3, 8\]"),
        ({"input_gate_weight": torch.randn(4, 4, 4)}, ValueError, r"\[H, D, D\] with H \* D = 8, .* got \[4, 4, 4\]"),
        ({"x": torch.randn(1, 1, 65), "input_gate_weight": torch.randn(1, 65, 65)}, ValueError, "D up to 64"),
        ({"decay_gate_weight": torch.randn(4, 2, 2)}, ValueError, r"decay_gate_weight must have shape \[2, 4, 4\]"),
        ({"decay": PARAMETERS[-1][:4]}, ValueError, r"decay must have shape \[8\]"),
        ({"decay": PARAMETERS[-1].long()}, TypeError, "decay must be float64, float32, bfloat16 or float16"),
        ({"state": X}, TypeError, "state must be a pair of tensors or None, got Tensor"),
        ({"state": (X, X)}, ValueError, r"the second state must have shape \[2, 2, 8\]"),
        ({"state": (X[:, :1], X[:, 0])}, ValueError, r"the first state must have shape \[2, 3, 2, 8\]"),
        ({"state": (X, X[:, 0].double())}, TypeError, "the second state must be torch.float32, as x is torch.float32"),
        ({"backend": "cuda"}, ValueError, "backend must be one of"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        gated_linear_recurrence(**{**GOOD, **arguments})
