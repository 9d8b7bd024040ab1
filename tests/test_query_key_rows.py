"""Attention row statistics and frame-local attention: every backend against float64 loops."""

import math

import pytest
import torch
from oracle import assert_as_exact_as_eager, fast_backends, native_backends
from query_key_like import eager_frames, eager_rows, textbook_frames, textbook_rows

from tritonkern import attention_row_statistics, frame_local_attention
from tritonkern.ops._dtypes import DTYPES
from tritonkern.ops.query_key_matching import op

SEGMENTS = [(0, 3), (3, 60), (59, 61), (0, 61)]


@pytest.fixture(params=fast_backends(op.NAME))
def where(request):
    return request.param


@pytest.fixture(params=native_backends(op.NAME))
def any_backend(request):
    return request.param


def random_rows(dtype=torch.float32, B=2, N=35, J=61, H=2, D=9):
    return tuple((2 * torch.randn(B, n, H, D, dtype=torch.float64)).to(dtype) for n in (N, J))


def check_rows(where, rows, key, mask, scale=None, segments=SEGMENTS):
    backend, device = where
    there = None if mask is None else mask.to(device)
    found = attention_row_statistics(
        rows.to(device), key.to(device), segments, mask=there, scale=scale, backend=backend
    )
    factor = rows.shape[-1] ** -0.5 if scale is None else scale
    exact = textbook_rows(rows.double(), key.double(), mask, segments, factor)
    plain = [eager_rows(rows.flip(axes), key.flip(axes), mask, segments, factor) for axes in ((), (-1,), (2,))]
    # A weight is an exponential of a score, whose last digit counts, and so does its own.
    score = 1 + abs(factor) * rows.abs().max().double() * key.abs().max().double() * rows.shape[-1]
    for i, name in enumerate(("maximum", "sum")):
        assert_as_exact_as_eager(found[i].cpu(), [x[i] for x in plain], exact[i], score, name)
        assert found[i].dtype == torch.promote_types(rows.dtype, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_rows(where, dtype, masked):
    rows, key = random_rows(dtype)
    check_rows(where, rows, key, torch.rand(2, 61) < 0.7 if masked else None)


def test_reference_rows_and_scale(any_backend):
    check_rows(any_backend, *random_rows(torch.float64, B=1, N=3), None, scale=-0.4)


def test_rows_of_any_strides(where):
    backend, device = where
    rows, key = (x.to(device) for x in random_rows())
    apart = [torch.stack([x, x * torch.nan], -1)[..., 0] for x in (rows, key)]
    found = attention_row_statistics(*apart, SEGMENTS, backend=backend)
    expected = attention_row_statistics(rows, key, SEGMENTS, backend=backend)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_rows_not_finite_or_masked_out(any_backend):
    backend, device = any_backend
    rows, key = (x.to(device) for x in random_rows())
    clean = attention_row_statistics(rows, key, SEGMENTS, backend=backend)
    rows[0, 5, 1, 2] = torch.nan
    mask = torch.ones(2, 61, dtype=torch.bool, device=device)
    mask[1] = False
    for x, y in zip(attention_row_statistics(rows, key, SEGMENTS, mask=mask, backend=backend), clean, strict=True):
        assert x[0, 5].isnan().all() and x[1].isnan().all()
        assert torch.equal(x[0, :5], y[0, :5]) and torch.equal(x[0, 6:], y[0, 6:])


def test_empty_rows(any_backend):
    backend, device = any_backend
    rows, key = (x.to(device) for x in random_rows(N=0))
    for result in attention_row_statistics(rows, key, SEGMENTS, backend=backend):
        assert result.shape == (2, 0, 4)
    rows, key = (x.to(device) for x in random_rows())
    assert attention_row_statistics(rows, key, [], backend=backend)[0].shape == (2, 35, 0)


def random_frames(dtype=torch.float32, text=5, frames=2, cells=50, B=1, H=2, D=9):
    n = text + frames * cells
    return tuple((1.5 * torch.randn(B, n, 3, H, D, dtype=torch.float64)).to(dtype).unbind(2))


def check_frames(where, tensors, text, frames, text_last, renormalise, scale=None):
    backend, device = where
    options = dict(text=text, frames=frames, text_last=text_last, renormalise=renormalise)
    found = frame_local_attention(*(x.to(device) for x in tensors), **options, scale=scale, backend=backend)
    factor = tensors[0].shape[-1] ** -0.5 if scale is None else scale
    rest = (text, frames, text_last, renormalise, factor)
    exact = textbook_frames(*(x.double() for x in tensors), *rest)
    plain = [eager_frames(*tensors, *rest), eager_frames(*(x.flip(-1) for x in tensors), *rest).flip(-1)]
    score = abs(factor) * tensors[0].abs().max().double() * tensors[1].abs().max().double() * tensors[0].shape[-1]
    assert_as_exact_as_eager(found.cpu(), plain, exact, score * tensors[2].abs().max().double())
    assert found.dtype == tensors[0].dtype and found.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("text_last", [False, True])
def test_frames(where, text_last, renormalise, dtype):
    check_frames(where, random_frames(dtype), 5, 2, text_last, renormalise)


@pytest.mark.parametrize("text, frames, cells", [(0, 3, 7), (40, 1, 4), (3, 2, 0), (1, 5, 1)])
@pytest.mark.parametrize("renormalise", [False, True])
def test_sizes_of_frames(any_backend, text, frames, cells, renormalise):
    tensors = random_frames(torch.float64, text, frames, cells)
    check_frames(any_backend, tensors, text, frames, False, renormalise, scale=0.4)


def test_dropped_is_renormalised_times_the_share_that_is_seen(where):
    backend, device = where
    query, key, value = (x.to(device) for x in random_frames(torch.float64))
    options = dict(text=5, frames=2, backend=backend)
    dropped = frame_local_attention(query, key, value, renormalise=False, **options)
    kept = frame_local_attention(query, key, value, renormalise=True, **options)
    share = frame_local_attention(query, key, torch.ones_like(value), renormalise=False, **options)
    torch.testing.assert_close(dropped, kept * share)
    assert share[:, 5:].max() < 1 and torch.allclose(share[:, :5], torch.ones(()).double().to(device))


@pytest.mark.parametrize("renormalise", [False, True])
def test_broken_value_stays_in_its_frame(any_backend, renormalise):
    backend, device = any_backend
    query, key, value = (x.to(device) for x in random_frames())
    value = value.clone()
    value[0, 60, 0, 0] = torch.nan
    out = frame_local_attention(query, key, value, text=5, frames=2, renormalise=renormalise, backend=backend)
    broken = out.isnan().flatten(2).any(-1)[0]
    assert broken[:5].all() and not broken[5:55].any() and broken[55:].all()


def test_operators(where):
    backend, device = where
    rows, key = (x.to(device) for x in random_rows())
    mask = torch.ones(2, 61, dtype=torch.bool, device=device)
    torch.library.opcheck(op.attention_row_statistics_fwd, (rows, key, mask, [0, 3, 3, 61], 0.3, backend))
    tensors = [x.to(device) for x in random_frames()]
    torch.library.opcheck(op.frame_local_attention_fwd, (*tensors, 5, 2, False, True, 0.3, backend))


def test_compiled_as_one_graph(where):
    backend, device = where
    tensors = [x.to(device) for x in random_frames()]

    def call(query, key, value):
        out = frame_local_attention(query, key, value, text=5, frames=2, renormalise=True, backend=backend)
        return out + attention_row_statistics(query, key, [(0, 5)], backend=backend)[0].sum()

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(*tensors), call(*tensors))


def test_gradients_are_refused():
    rows, key = random_rows()
    with pytest.raises(NotImplementedError, match="rows requires one; call it under torch.no_grad"):
        attention_row_statistics(rows.requires_grad_(), key, SEGMENTS)
    tensors = random_frames()
    tensors[2].requires_grad_()
    with pytest.raises(NotImplementedError, match="value requires one; call it under torch.no_grad"):
        frame_local_attention(*tensors, text=5, frames=2, renormalise=True)
    with torch.no_grad():
        frame_local_attention(*tensors, text=5, frames=2, renormalise=True)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(rows=torch.zeros(2, 3, 4)), ValueError, r"rows must be \[B, N, H, D\]"),
        (dict(key=torch.zeros(2, 5, 2, 8)), ValueError, "key must be"),
        (dict(key=torch.zeros(2, 5, 2, 9).double()), TypeError, "key must have the dtype of rows"),
        (dict(segments=[(3, 3)]), ValueError, r"segments must be \(start, stop\) with 0 <= start < stop <= J = 61"),
        (dict(segments=[(0, 62)]), ValueError, "segments must be"),
        (dict(segments=[0, 5]), TypeError, "segments must be a list of pairs"),
        (dict(mask=torch.zeros(2, 61)), TypeError, "mask must be bool"),
        (dict(mask=torch.zeros(2, 60, dtype=torch.bool)), ValueError, r"mask must have shape \(2, 61\)"),
        (dict(scale=math.nan), ValueError, "scale must be from"),
    ],
    ids=str,
)
def test_bad_rows(change, error, message):
    rows, key = random_rows()
    arguments = dict(rows=rows, key=key, segments=SEGMENTS) | change
    with pytest.raises(error, match=message):
        attention_row_statistics(arguments.pop("rows"), arguments.pop("key"), arguments.pop("segments"), **arguments)


def test_segments_of_the_operator_are_pairs():
    rows, key = random_rows()
    with pytest.raises(ValueError, match="segments must be start, stop, start, stop, ..., got 3 numbers"):
        op.attention_row_statistics_fwd(rows, key, None, [0, 3, 4], 0.3)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(text=-1), ValueError, "text must be from 0 to n = 105"),
        (dict(frames=0), ValueError, "frames must be a number from 1 up that divides n - text = 100"),
        (dict(frames=3), ValueError, "frames must be"),
        (dict(frames=2.0), TypeError, "frames must be an int"),
        (dict(renormalise=None), TypeError, "renormalise must be a bool"),
        (dict(value=torch.zeros(1, 105, 2, 8)), ValueError, "value must have the shape of query"),
    ],
    ids=str,
)
def test_bad_frames(change, error, message):
    query, key, value = random_frames()
    arguments = dict(query=query, key=key, value=value, text=5, frames=2, renormalise=True) | change
    tensors = [arguments.pop(name) for name in ("query", "key", "value")]
    with pytest.raises(error, match=message):
        frame_local_attention(*tensors, **arguments)
