"""Temporal window attention: what it computes, in every backend that can run here natively.

Triton's interpreter has its own process and file, `test_triton_*.py`.
"""

import fractions
import mmap

import numpy
import pytest
import torch
from oracle import (
    assert_as_exact_as_eager,
    eager_roundings,
    fast_backends,
    gradients,
    largest_terms,
    peak_memory,
    random_inputs,
    textbook,
)

from tritonkern import temporal_window_attention
from tritonkern.ops.temporal_window_attention import op, reference

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
NAMES = ("out", "grad_query", "grad_key", "grad_value")


@pytest.fixture(params=fast_backends(op.NAME))
def where(request):
    return request.param


def run(where, tensors, window, scale=None, query_offset=0):
    """Output and gradients of `tensors` = query, key, value, grad_out on a backend."""
    *inputs, grad_out = tensors
    options = dict(scale=scale, query_offset=query_offset, backend=where[0])
    return gradients(lambda *x: temporal_window_attention(*x, window, **options), inputs, grad_out)


def check(where, tensors, window, scale=None, query_offset=0):
    """Forward and backward against the float64 reference, by the rule of `oracle.assert_as_exact_as_eager`."""
    results = run(where, tensors, window, scale, query_offset)
    *inputs, grad_out = (x.detach().unsqueeze(2) if x.dim() == 4 else x.detach() for x in tensors)
    left, right = (window // 2, window // 2) if isinstance(window, int) else window
    scale = inputs[0].shape[-1] ** -0.5 if scale is None else scale
    plain = zip(*eager_roundings(inputs, grad_out, left, right, scale, query_offset), strict=True)
    doubles, grad_out = [x.double().cpu() for x in inputs], grad_out.double().cpu()
    exact = exact_results(doubles, grad_out, left, right, scale, query_offset)
    terms = largest_terms(doubles, grad_out, scale)
    for name, result, simple, truth, term in zip(NAMES, results, plain, exact, terms, strict=True):
        assert result.dtype == inputs[0].dtype
        assert_as_exact_as_eager(result.cpu().view(truth.shape), [x.cpu() for x in simple], truth, term, name)


def exact_results(inputs, grad_out, left, right, scale, query_offset=0):
    """Output and gradients by the reference."""
    out, lse = reference.forward(*inputs, left, right, scale, query_offset)
    return [out, *reference.backward(grad_out, *inputs, out, lse, left, right, scale, query_offset)]


def among_more_keys(before, after, tensors):
    """`tensors` = query, key, value, grad_out, with so many more frames of keys and values on either side."""
    query, key, value, grad_out = tensors
    first, last = (torch.randn(2, len(key), n, *key.shape[2:]).to(key) for n in (before, after))
    longer = [torch.cat([first[i], x, last[i]], 1) for i, x in enumerate((key, value))]
    return [query, *longer, grad_out]


@pytest.mark.parametrize("extent", [(0, 0), (1, 1), (2, 0), (0, 3), (9, 9)])
@pytest.mark.parametrize("around", [(0, 0), (2, 0), (0, 3), (4, 1)])
def test_reference_is_the_textbook_loop(extent, around):
    tensors = random_inputs(2, 6, 2, 2, 8, dtype=torch.float64)
    *inputs, grad_out = among_more_keys(*around, tensors)
    options = *extent, 0.3, around[0]
    truth = gradients(lambda *x: textbook(*x, *options), inputs, grad_out)
    for result, expected in zip(exact_results(inputs, grad_out, *options), truth, strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-13)


def test_lse_is_the_log_of_the_softmax_denominator(where):
    backend, device = where
    query, key, value, _ = random_inputs(1, 5, 1, 2, 8, device=device)
    _, lse = torch.ops.tritonkern.temporal_window_attention_fwd(query, key, value, 1, 1, 0.5, 0, 0, backend)
    scores = 0.5 * torch.einsum("binhd,bjnhd->bnihj", query.double(), key.double())
    for i in range(5):
        expected = scores[:, :, i, :, max(0, i - 1) : i + 2].logsumexp(-1)
        torch.testing.assert_close(lse[:, i].double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "window"),
    [
        ((2, 24, 3, 4, 32), 13),  # Chrono's head
        ((1, 40, 2, 2, 64), 13),
        ((2, 7, 2, 8), (2, 0)),  # [B, T, H, D]
        ((2, 7, 2, 8), (2**30, 2**30)),  # attention over the whole clip
        ((1, 33, 1, 1, 16), (0, 5)),
        ((3, 5, 1, 3, 24), 13),  # shorter than the window
        ((1, 1, 4, 1, 40), 3),
        ((1, 70, 1, 1, 256), (20, 11)),
        ((5, 18, 2, 1, 128), 1),
        ((1, 19, 1, 2, 72), 7),
    ],
    ids=str,
)
def test_result_and_gradients(where, shape, window, dtype):
    check(where, random_inputs(*shape, dtype=dtype, device=where[1]), window)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "around", "window"),
    [
        ((2, 24, 3, 4, 32), (12, 5), 13),
        ((1, 1, 5, 2, 16), (12, 0), (12, 0)),  # one frame of a causal stream
        ((1, 3, 2, 2, 64), (6, 6), 13),
        ((1, 20, 1, 1, 8), (0, 300), (3, 2)),  # tasks whose keys no query sees
        ((2, 5, 1, 2, 8), (400, 150), 13),
        ((2, 7, 2, 8), (1, 0), (2**30, 2**30)),  # [B, T, H, D]
        ((1, 100, 1, 1, 8), (150, 60), (300, 80)),  # the C++ backward pass goes block by block
    ],
    ids=str,
)
def test_keys_of_more_frames(where, shape, around, window, dtype):
    tensors = among_more_keys(*around, random_inputs(*shape, dtype=dtype, device=where[1]))
    check(where, tensors, window, query_offset=around[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [8, 24, 64])
def test_ring(where, head_dim, dtype):
    """A ring gives the bits of the same keys in order, wherever it starts."""
    backend, device = where
    query, key, value, _ = among_more_keys(9, 3, random_inputs(2, 7, 3, 2, head_dim, dtype=dtype, device=device))
    options = dict(window=(8, 3), query_offset=9, backend=backend)
    expected = temporal_window_attention(query, key, value, **options)
    for start in range(key.shape[1]):
        ring = [x.roll(start, 1) for x in (key, value)]
        assert torch.equal(temporal_window_attention(query, *ring, start=start, **options), expected)


def test_a_ring_has_no_derivative(where):
    query, key, value, _ = random_inputs(1, 5, 1, 2, 8, device=where[1])
    options = dict(window=3, start=2, backend=where[0])
    for at in range(3):
        tensors = [x.clone().requires_grad_(i == at) for i, x in enumerate((query, key, value))]
        with pytest.raises(NotImplementedError, match="temporal_window_attention has no derivative with start=2"):
            temporal_window_attention(*tensors, **options)
        with torch.no_grad():
            temporal_window_attention(*tensors, **options)


@pytest.mark.parametrize("window", [13, (9, 0), (2, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_stream_has_the_bits_of_the_clip(window, dtype):
    """Frame by frame from a ring that holds one window, against one call."""
    if "cpp" not in [where.values[0][0] for where in fast_backends(op.NAME) if not where.marks]:
        pytest.skip("the C++ extension was not built")
    query, key, value, _ = random_inputs(1, 40, 5, 2, 32, dtype=dtype)
    left, right = window if isinstance(window, tuple) else (window // 2,) * 2
    whole = temporal_window_attention(query, key, value, window, backend="cpp")
    size = left + 1 + right
    ring = [torch.zeros_like(x[:, :size]) for x in (key, value)]
    for frame in range(40 + right):
        if frame < 40:
            for stored, x in zip(ring, (key, value), strict=True):
                stored[:, frame % size] = x[:, frame]
        t = frame - right
        first, last = max(0, frame - size + 1, t - left), min(frame, 39)
        if t < 0:
            continue
        # Before the ring is full and after the last frame it holds fewer than its size.
        start = first % size
        rows = [x.roll(-start, 1)[:, : last - first + 1] for x in ring]
        if last - first + 1 == size:
            out = temporal_window_attention(
                query[:, t, None], *ring, window, query_offset=t - first, start=start, backend="cpp"
            )
        else:
            out = temporal_window_attention(query[:, t, None], *rows, window, query_offset=t - first, backend="cpp")
        assert torch.equal(out[:, 0], whole[:, t])


@pytest.mark.parametrize("head_dim", range(8, 257, 8))
def test_every_head_dim(where, head_dim):
    check(where, random_inputs(1, 9, 1, 2, head_dim, device=where[1]), 5)


@pytest.mark.parametrize("scale", [0.0, -0.7, 2, 30.0])
def test_scale(where, scale):
    check(where, random_inputs(1, 17, 2, 1, 16, device=where[1]), 5, scale)


@pytest.mark.parametrize("scale", [numpy.float32(0.5), numpy.float64(0.5), numpy.int64(2), fractions.Fraction(1, 2)])
def test_scale_may_be_any_real_number(scale):
    query, key, value, _ = random_inputs(1, 5, 1, 1, 8)
    expected = temporal_window_attention(query, key, value, 3, scale=float(scale))
    assert torch.equal(temporal_window_attention(query, key, value, 3, scale=scale), expected)


def test_scale_that_no_float_can_hold():
    query, key, value, _ = random_inputs(1, 5, 1, 1, 8)
    with pytest.raises(ValueError, match="scale must fit into a float"):
        temporal_window_attention(query, key, value, 3, scale=10**400)
    with pytest.raises(TypeError, match="scale must be a number, got complex"):
        temporal_window_attention(query, key, value, 3, scale=1j)


@pytest.mark.parametrize("size", [300, 1e5])
def test_large_scores_do_not_overflow(where, size):
    """At 1e5 the rounding error of a score alone is far beyond what exp can take."""
    query, key, value, grad_out = random_inputs(1, 20, 1, 2, 32, device=where[1])
    check(where, [query * size, key * size, value, grad_out], 5)


def test_four_axes_equal_five(where):
    tensors = random_inputs(3, 11, 2, 16, device=where[1])
    for four, five in zip(run(where, tensors, 5), run(where, [x.unsqueeze(2) for x in tensors], 5), strict=True):
        assert torch.equal(four, five.squeeze(2))


def test_log_sum_exp_carries_no_gradient():
    query = torch.randn(1, 4, 1, 1, 8, requires_grad=True)
    out, lse = torch.ops.tritonkern.temporal_window_attention_fwd(query, query, query, 1, 1, 0.5, 0, 0, "reference")
    assert out.requires_grad and not lse.requires_grad


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("at", range(4), ids=("query", "key", "value", "grad_out"))
def test_non_finite_input_stays_in_its_windows(where, at, bad):
    """Where the textbook loop, which touches nothing outside a window, stays finite, no bit may change."""
    tensors = random_inputs(2, 37, 2, 2, 16, device=where[1])
    clean = run(where, tensors, (3, 2))
    tensors[at] = tensors[at].clone()
    tensors[at][1, 18, 0, 1, 5] = bad
    poisoned = run(where, tensors, (3, 2))

    touched = [x[1:, :, :1, 1:].double().cpu() for x in tensors]
    truth = gradients(lambda *x: textbook(*x, 3, 2, 16**-0.5), touched[:3], touched[3])
    for name, result, before, expected in zip(NAMES, poisoned, clean, truth, strict=True):
        wrong = torch.zeros(result.shape, dtype=torch.bool)
        wrong[1:, :, :1, 1:] = ~expected.isfinite()
        result, before = result.cpu(), before.cpu()
        assert not result[wrong].isfinite().any(), f"{name} hides the {bad}"
        # What an infinity makes finite (a weight of exactly 0 or 1) is a number to compare, not a bit to keep.
        reach = torch.zeros_like(wrong)
        reach[1, 18 - 8 : 18 + 9, 0, 1] = True
        assert torch.equal(result[~wrong & ~reach], before[~wrong & ~reach]), f"{name} is poisoned too far"
        inside = ~wrong[1, :, 0, 1]
        torch.testing.assert_close(
            result[1, :, 0, 1][inside].double(), expected[0, :, 0, 0][inside], rtol=1e-4, atol=1e-5
        )


def test_long_clip_in_linear_memory(where):
    """A dense `[T, T]` mask would take 100 million entries."""
    backend, device = where
    tensors = random_inputs(1, 10_000, 1, 1, 8, device=device)
    run(where, [x[:, :100] for x in tensors], 13)
    with peak_memory(device) as peak:
        results = run(where, tensors, 13)
    assert peak.mebibytes < 40
    cut = run(where, [x[:, 4900:5100] for x in tensors], 13)
    for whole, part in zip(results, cut, strict=True):
        torch.testing.assert_close(whole[:, 4950:5050], part[:, 50:150])


@pytest.mark.parametrize(("frames", "extent"), [(610, (80, 70)), (230, (300, 0)), (190, (2**30, 2**30))], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_wide_window(where, frames, extent, dtype):
    """The C++ backward pass computes such windows block by block, the first case in two tasks."""
    check(where, random_inputs(1, frames, 1, 1, 8, dtype=dtype, device=where[1]), extent)


def test_window_as_long_as_the_clip_in_linear_memory(where):
    """The weights of all pairs would take 64 million numbers."""
    backend, device = where
    tensors = random_inputs(1, 4000, 1, 1, 8, device=device)
    run(where, [x[:, :100] for x in tensors], 13)
    with peak_memory(device) as peak:
        run(where, tensors, (4000, 4000))
    assert peak.mebibytes < 16 * torch.get_num_threads()


def test_float32_means_float32(where):
    """No TF32 and no bfloat16 inside: large equal terms cancel to their last bits."""
    query, key, value, grad_out = random_inputs(1, 30, 2, 2, 64, device=where[1])
    check(where, [query, key, value + 1000, grad_out], 13)


def test_more_sequences_than_a_grid_axis(where):
    query = torch.randn(1, 3, 70_000, 1, 8, device=where[1])
    out = temporal_window_attention(query, query, query, 3, backend=where[0])
    last = query[:, :, -2:]
    torch.testing.assert_close(out[:, :, -2:], temporal_window_attention(last, last, last, 3, backend=where[0]))


@pytest.mark.parametrize("far_axis", [0, 1], ids=["batch", "frames"])
def test_offsets_beyond_32_bits(where, far_axis):
    shape = (2, 5, 1, 1, 8)
    strides = [40, 8, 8, 8, 1]
    strides[far_axis] = 2**31 // (shape[far_axis] - 1)
    span = 2**31 + 48
    if where[1] == "cpu":  # 4 GiB of addresses, of which the kernel touches a few pages
        memory = mmap.mmap(-1, 2 * span, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        storage = torch.frombuffer(memory, dtype=torch.float16)
    else:
        storage = torch.zeros(span, dtype=torch.float16, device=where[1])
    query, key, value, grad_out = random_inputs(*shape, dtype=torch.float16, device=where[1])
    far = storage.as_strided(shape, strides).copy_(query)
    check(where, [far, key, value, grad_out], 3)
    check(where, [query, far, far, grad_out], 3)
