"""The process that `test_guard_pages.py` starts: every operator on tensors that end, or begin, at a forbidden page.

Usage: `python guard_pages.py BACKEND`. Reading or writing next to a tensor ends the process with a signal.
Positions and cells are NaN, infinite, huge and negative; the saved cells that backward operators get are wrong.
"""

import ctypes
import faulthandler
import math
import mmap
import sys

import torch

from tritonkern.ops.correlation_soft_argmax import op as match_op
from tritonkern.ops.full_attention import op as full_op
from tritonkern.ops.gated_linear_recurrence import op as recurrence_op
from tritonkern.ops.local_correlation import op as local_op
from tritonkern.ops.query_key_matching import op as query_key_op
from tritonkern.ops.temporal_adapter import op as adapter_op
from tritonkern.ops.temporal_mixer import op as mixer_op
from tritonkern.ops.temporal_window_attention import op as window_op
from tritonkern.ops.track_attention import op as track_op

PLACES = (math.nan, math.inf, -math.inf, 1e30, -1e30, 2.0**31, -(2.0**31), 2.0**62, -3.0, 1e5, -0.0, 2.5)
CELLS = (-1, 6, 2**31 - 1, -(2**31), 10**9)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_libc = ctypes.CDLL(None, use_errno=True)
_memory = []


def guarded(x, at_end=True, stride_of_one=None):
    """A copy whose last number is just before a page that cannot be read, or whose first one is just behind one."""
    if not isinstance(x, torch.Tensor) or x.numel() == 0:
        return x
    size = x.numel() * x.element_size()
    pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, pages + 2 * mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (address, address + mmap.PAGESIZE + pages):
        if _libc.mprotect(ctypes.c_void_p(page), mmap.PAGESIZE, 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    offset = mmap.PAGESIZE + (pages - size if at_end else 0)
    copy = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=offset).view(x.shape)
    copy.copy_(x)
    _memory.append(memory)
    if stride_of_one is not None:
        strides = [stride_of_one if n == 1 else stride for n, stride in zip(copy.shape, copy.stride(), strict=True)]
        copy = copy.as_strided(copy.shape, strides)
    return copy


def positions(*shape, dtype):
    count = math.prod(shape)
    numbers = torch.tensor(PLACES, dtype=torch.float64).repeat(count)[torch.randperm(12 * count)[:count]]
    return numbers.view(shape).to(torch.promote_types(dtype, torch.float32))


def window(dtype, n):
    x = [torch.randn(1, n, 2, 1, 24).to(dtype) for _ in range(3)]
    out = window_op.temporal_window_attention_fwd
    query = x[0][:, n // 2 :]
    for inputs, offset in ((x, 0), ((query, *x[1:]), n // 2)):
        call = *inputs, 2, 1, 0.3, offset
        yield out, (*call, 0)
        yield out, (*call, max(n - 1, 0))
        made = out(*call, 0, "reference")
        yield window_op.temporal_window_attention_bwd, (inputs[0], *inputs, *made, 2, 1, 0.3, offset)


def full(dtype, n):
    x = [torch.randn(1, n, 1, 5).to(dtype) for _ in range(3)]
    yield full_op.full_attention_fwd, (*x, 0.3)
    made = full_op.full_attention_fwd(*x, 0.3, "reference")
    yield full_op.full_attention_bwd, (x[0], *x, *made, 0.3)


def track(dtype, n):
    of_tracks, of_grid = (torch.randn(shape).to(dtype) for shape in ((1, 2, n, 1, 8), (1, 2, 3, 5, 1, 8)))
    real = torch.promote_types(dtype, torch.float32)
    for splat in (False, True):
        row, column = (of_grid, of_tracks) if splat else (of_tracks, of_grid)
        for visible in (None, torch.ones(1, 2, n, dtype=torch.bool)):
            for inverse_variance in (2.0, math.nan, -1.0):
                points = positions(1, 2, n, 2, dtype=dtype), visible, torch.tensor(inverse_variance, dtype=real)
                for culling in (True, False):
                    options = (0.3, splat, culling)
                    yield track_op.track_attention_fwd, (row, column, column, *points, *options)
                    yield track_op.track_attention_bwd, (row, row, column, column, *points, *options, [True, True])


def local(dtype, n):
    features, support = torch.randn(1, 2, 3, 4, 5).to(dtype), torch.randn(1, n, 3, 5).to(dtype)
    weight, bias = torch.randn(7, 27).to(dtype), torch.randn(7).to(dtype)
    for zeros in (False, True):
        for supports in (support, support[:, :, None].repeat(1, 1, 2, 1, 1)):
            call = features, supports, positions(1, 2, n, 2, dtype=dtype)
            geometry, scale = (1, zeros, zeros), 0.4 if zeros else None
            yield local_op.local_correlation_fwd, (*call, *geometry, scale)
            grad = torch.randn(1, 2, n, 9, 3).to(dtype)
            yield local_op.local_correlation_bwd, (grad, *call, *geometry, scale, [True] * 3)
            of_linear, options = ([features], [supports], call[2]), (*geometry, [scale] if zeros else [])
            yield local_op.local_correlation_linear_fwd, (*of_linear, weight, bias, *options)
            grad = torch.randn(1, 2, n, 7).to(dtype)
            yield local_op.local_correlation_linear_bwd, (grad, *of_linear, weight, *options, [True] * 5)


def match(dtype, n):
    query, features = torch.randn(1, n, 5).to(dtype), torch.randn(1, 2, 2, 3, 5).to(dtype)
    query[0, 0, 0], features[0, 1, 1, 2, 0] = math.nan, math.inf
    for radius, cosine in ((1.5, True), (math.inf, False)):
        options = (20.0, radius, cosine, 1e-6)
        yield match_op.correlation_soft_argmax_fwd, (query, features, *options)
        made = match_op.Outputs(*match_op.correlation_soft_argmax_fwd(query, features, *options, "reference"))
        for cell in CELLS:
            wrong = made._replace(best=torch.full_like(made.best, cell), worst=torch.full_like(made.worst, cell))
            saved = [getattr(wrong, name) for name in match_op.Saved._fields]
            yield match_op.correlation_soft_argmax_bwd, (*made[:4], query, features, *saved, *options)
        cost = torch.randn(2, n, 3).to(dtype)
        cost[0, 0, 0] = math.nan
        yield match_op.soft_argmax_2d_fwd, (cost, 20.0, radius)
        points, maximum, best, weight = match_op.soft_argmax_2d_fwd(cost, 20.0, radius, "reference")
        for cell in CELLS:
            saved = points, maximum, torch.full_like(best, cell), weight
            yield match_op.soft_argmax_2d_bwd, (points, cost, *saved, 20.0, radius)


def query_key(dtype, n):
    query, key = torch.randn(2, 1, 2, 6, 2, 5).to(dtype)
    key[0, 1, 3, 1, 2] = math.nan
    for cells in (None, torch.arange(n)[None] % 6, *(torch.full((1, n), cell) for cell in CELLS)):
        for symmetric, radius in ((True, 1.5), (False, 0.0)):
            options = (0, 2, 3, 0.3, symmetric, radius)
            yield query_key_op.query_key_matching_fwd, (query, key, cells, *options)
            count = 6 if cells is None else n
            grads = torch.randn(1, 2, count).to(torch.promote_types(dtype, torch.float32))
            points = torch.randn(1, 2, count, 2).to(grads.dtype)
            for index in CELLS:
                saved = torch.full((1, 2, count), index), points, grads
                call = (grads, points, query, key, cells, *saved, *options)
                yield query_key_op.query_key_matching_bwd, call
            yield query_key_op.query_key_cost_fwd, (query, key, cells, 0, 0.3, symmetric)
            grad = torch.randn(1, 2, count, 6).to(grads.dtype)
            yield query_key_op.query_key_cost_bwd, (grad, query, key, cells, 0, 0.3, symmetric)


def rows(dtype, n):
    x, key = torch.randn(1, n, 2, 5).to(dtype), torch.randn(1, 7, 2, 5).to(dtype)
    for mask in (None, torch.zeros(1, 7, dtype=torch.bool), torch.ones(1, 7, dtype=torch.bool)):
        yield query_key_op.attention_row_statistics_fwd, (x, key, mask, [0, 7, 6, 7], 0.3)
    for last, renormalise in ((False, True), (True, False)):
        call = [torch.randn(1, 1 + 2 * n, 2, 5).to(dtype) for _ in range(3)]
        yield query_key_op.frame_local_attention_fwd, (*call, 1, 2, last, renormalise, 0.3)


def mixer(dtype, n):
    real = torch.promote_types(dtype, torch.float32)
    x, weights = torch.randn(1, 2, n, 5).to(dtype), [torch.randn(20, 1, 3, dtype=real) for _ in range(2)]
    parameters = torch.ones(5, dtype=real), weights[0], weights[0][:, 0, 0], weights[1], weights[1][:, 0, 0]
    state = torch.randn(1, 2, 2, 5, dtype=real), torch.randn(1, 2, 2, 20, dtype=real)
    for before, causal in (((None, None), False), (state, True)):
        yield mixer_op.temporal_mixer_fwd, (x, *parameters, causal, 1e-5, *before)
    yield mixer_op.temporal_mixer_bwd, (x, x, *parameters[:4], True, 1e-5, [True] * 6)


def recurrence(dtype, n):
    real = torch.promote_types(dtype, torch.float32)
    x, gate = torch.randn(1, n, 2, 6).to(dtype), (torch.randn(2, 3, 3, dtype=real), torch.randn(2, 3, dtype=real))
    parameters = torch.randn(4, 6, dtype=real), gate[1].flatten(), *gate, *gate, gate[1].flatten()
    state = torch.randn(1, 3, 2, 6).to(dtype), torch.randn(1, 2, 6, dtype=real)
    for before in ((None, None), state):
        yield recurrence_op.gated_linear_recurrence_fwd, (x, *parameters, *before)
        needs_grad = [True] * 8 + [before is state] * 2
        yield recurrence_op.gated_linear_recurrence_bwd, (x, state[1], x, *parameters, *before, x, needs_grad)


def adapter(dtype, n):
    tokens, weight = torch.randn(1, 2, 1 + 4 * n, 5).to(dtype), torch.randn(3, 5, 3, 3).to(dtype)
    norm, bias = torch.ones(5, dtype=dtype), torch.ones(3, dtype=dtype)
    grid = (2, 2 * n, 2)
    yield adapter_op.adapter_in_fwd, (tokens, norm, norm, 1e-5, weight, bias, *grid, dtype, None)
    made = adapter_op.adapter_in_fwd(tokens, norm, norm, 1e-5, weight, bias, *grid, dtype, None, "reference")
    call = (tokens, norm, norm, 1e-5, weight, *made, *grid, dtype)
    yield adapter_op.adapter_in_bwd, (made[0], *call, [True] * 3)
    hidden, back = made[0], torch.randn(5, 3, 3, 3).to(dtype)
    yield adapter_op.adapter_out_fwd, (hidden, back, norm, tokens, *grid, dtype)
    yield adapter_op.adapter_out_bwd, (tokens, hidden, back, *grid, dtype, [True] * 2)


FAMILIES = (window, full, track, local, match, query_key, rows, mixer, recurrence, adapter)


def main(backend):
    for family in FAMILIES:
        print(family.__name__, flush=True)
        count = refused = 0
        for dtype in DTYPES:
            for n in (1, 4):
                torch.manual_seed(n)
                for operator, arguments in family(dtype, n):
                    for at_end, stride in ((True, None), (False, 2**40), (True, 1)):
                        given = [
                            [guarded(y, at_end, stride) for y in x]
                            if isinstance(x, list)
                            else guarded(x, at_end, stride)
                            for x in arguments
                        ]
                        try:
                            operator(*given, backend)
                        except ValueError as error:
                            if "cells must be" not in str(error):
                                raise
                            refused += 1
                        count += 1
                        given = None
                        del _memory[:]
        print(count, refused, flush=True)


if __name__ == "__main__":
    faulthandler.enable()
    main(*sys.argv[1:])
