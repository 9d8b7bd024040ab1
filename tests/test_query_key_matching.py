"""Query-key matching: every backend against float64 loops, the rule of twice eager's error, the boundary rule."""

import math

import pytest
import torch
from oracle import assert_as_exact_as_eager, fast_backends, native_backends
from query_key_like import eager_cost, located, textbook_cost

from tritonkern import query_key_cost, query_key_matching
from tritonkern.ops._dtypes import DTYPES
from tritonkern.ops.query_key_matching import op

# [B, T, S, H, D] and grid: one of everything; ragged blocks of cells and channels; whole ones.
SHAPES = {
    "one": ((1, 2, 1, 1, 1), (1, 1)),
    "small": ((2, 3, 12, 2, 8), (3, 4)),
    "ragged": ((1, 2, 70, 2, 17), (7, 10)),
    "blocks": ((1, 2, 96, 1, 32), (8, 12)),
}


@pytest.fixture(params=fast_backends(op.NAME))
def where(request):
    return request.param


@pytest.fixture(params=native_backends(op.NAME))
def any_backend(request):
    return request.param


def random_pair(shape, dtype=torch.float32, sharp=2.0):
    """query and key with scores large enough for clear peaks; slices of one tensor, as a projection leaves them."""
    B, T, S, H, D = shape
    x = (sharp * torch.randn(B, T, S, 2, H, D, dtype=torch.float64)).to(dtype)
    return x[:, :, :, 0], x[:, :, :, 1]


def some_cells(shape, count=7):
    return torch.randint(0, shape[2], (shape[0], count))


def flips(query, key, cells, grad=None):
    """The same call with sums in another order: channels, heads and cells in reverse."""
    yield lambda x: x, query, key, cells
    yield lambda x: x.flip(-1), query.flip(-1), key.flip(-1), cells
    yield lambda x: x.flip(3), query.flip(3), key.flip(3), cells


def check_cost(where, pair, cells, source=0, scale=None, symmetric=True):
    """Cost and gradients against float64, by the rule of twice eager's error."""
    backend, device = where
    query, key = pair
    factor = query.shape[-1] ** -0.5 if scale is None else scale

    def results(function, query, key, grad):
        leaves = [x.detach().requires_grad_() for x in (query, key)]
        cost = function(*leaves)
        return [cost.detach(), *torch.autograd.grad(cost, leaves, grad.to(cost))]

    def ours(query, key):
        at = None if cells is None else cells.to(device)
        return query_key_cost(query, key, source=source, cells=at, scale=scale, symmetric=symmetric, backend=backend)

    shape = (*query.shape[:2], query.shape[2] if cells is None else cells.shape[1], query.shape[2])
    torch.manual_seed(1)
    grad = torch.randn(shape, dtype=torch.float64)
    if torch.promote_types(query.dtype, torch.float32) == torch.float32:
        grad = grad.float().double()
    found = [x.cpu() for x in results(ours, query.to(device), key.to(device), grad)]
    exact = results(
        lambda q, k: textbook_cost(q, k, source, cells, factor, symmetric), query.double(), key.double(), grad
    )
    plain = []
    for back, q, k, c in flips(query, key, cells):
        cost, *grads = results(lambda q, k, c=c: eager_cost(q, k, source, c, factor, symmetric), q, k, grad)
        plain.append([cost, *(back(x) for x in grads)])
    # A weight is an exponential of a score, whose last digit counts; scores' gradients are differences of such terms.
    score = 1 + abs(factor) * query.abs().max().double() * key.abs().max().double() * query.shape[-1]
    weight = abs(factor) * grad.abs().max() * max(query.abs().max().double(), key.abs().max().double())
    terms = (score, score * weight, score * weight)
    for i, name in enumerate(("cost", "query", "key")):
        assert_as_exact_as_eager(found[i], [x[i] for x in plain], exact[i], terms[i], name)
    assert found[1].dtype == query.dtype and found[0].dtype == torch.promote_types(query.dtype, torch.float32)


def check_match(where, pair, grid, cells=None, source=0, scale=None, symmetric=True, radius=None):
    """Matches and gradients of peak and points for the best cells found, which must be best up to rounding."""
    backend, device = where
    query, key = pair
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    options = dict(grid=grid, source=source, scale=scale, symmetric=symmetric, radius=radius, backend=backend)
    at = None if cells is None else cells.to(device)

    def results(function, query, key, grads):
        leaves = [x.detach().requires_grad_() for x in (query, key)]
        peak, points = function(*leaves)
        outputs = [(x, g.to(x)) for x, g in zip((peak, points), grads, strict=True) if x.requires_grad]
        made, cotangents = zip(*outputs, strict=True)
        found = torch.autograd.grad(made, leaves, cotangents)
        return [peak.detach(), points.detach(), *found]

    match = query_key_matching(query.to(device), key.to(device), cells=at, **options)
    index = match.index.cpu()
    exact_cost = textbook_cost(query.double(), key.double(), source, cells, factor, symmetric)
    others = [t for t in range(query.shape[1]) if t != source]
    # The boundary rule: another cell than the best may be found only inside of eager's rounding error.
    band = max(
        (eager_cost(q, k, source, c, factor, symmetric).double() - exact_cost).abs().max()
        for _, q, k, c in flips(query, key, cells)
    )
    lost = exact_cost.amax(-1) - exact_cost.gather(-1, index[..., None])[..., 0]
    rounding = torch.finfo(torch.promote_types(query.dtype, torch.float32)).eps
    assert lost[:, others].max() <= 2 * band + 8 * rounding

    every = torch.arange(query.shape[2]).expand(len(query), -1) if cells is None else cells
    assert torch.equal(index[:, source], every)
    torch.manual_seed(1)
    grads = torch.randn(index.shape).double(), torch.randn(*index.shape, 2).double()

    def of_cost(cost):
        peak, points = located(cost, index, grid, radius)
        own = torch.zeros_like(peak, dtype=torch.bool)
        own[:, source] = True
        centre = located(cost, index, grid, None)[1]
        return torch.where(own, 1.0, peak), torch.where(own[..., None], centre.to(points), points)

    def ours(query, key):
        made = query_key_matching(query, key, cells=at, **options)
        assert torch.equal(made.index.cpu(), index)
        return made.peak, made.points

    found = [x.cpu() for x in results(ours, query.to(device), key.to(device), grads)]
    exact = results(
        lambda q, k: of_cost(textbook_cost(q, k, source, cells, factor, symmetric)), query.double(), key.double(), grads
    )
    plain = []
    for back, q, k, c in flips(query, key, cells):
        *first, dq, dk = results(lambda q, k, c=c: of_cost(eager_cost(q, k, source, c, factor, symmetric)), q, k, grads)
        plain.append([*first, back(dq), back(dk)])
    score = 1 + abs(factor) * query.abs().max().double() * key.abs().max().double() * query.shape[-1]
    slope = max(grid) if radius else 1.0
    weight = abs(factor) * 4 * slope * max(query.abs().max().double(), key.abs().max().double())
    for i, name in enumerate(("peak", "points", "query", "key")):
        term = score * (slope, slope, weight, weight)[i]
        assert_as_exact_as_eager(found[i], [x[i] for x in plain], exact[i], term, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_cost_and_gradients(where, shape, dtype):
    size = SHAPES[shape][0]
    check_cost(where, random_pair(size, dtype), some_cells(size), source=size[1] - 1)


@pytest.mark.parametrize("options", [dict(symmetric=False), dict(scale=-0.3), dict(scale=0.0)], ids=str)
def test_cost_of_all_cells(where, options):
    check_cost(where, random_pair(SHAPES["small"][0]), None, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("radius", [None, 1.5, math.inf], ids=str)
def test_matches_and_gradients(where, radius, dtype):
    size, grid = SHAPES["small"]
    check_match(where, random_pair(size, dtype), grid, radius=radius, source=1)


@pytest.mark.parametrize("options", [dict(), dict(symmetric=False, radius=2.0), dict(scale=0.2)], ids=str)
@pytest.mark.parametrize("shape", ["one", "ragged", "blocks"])
def test_matches_of_some_cells(where, shape, options):
    size, grid = SHAPES[shape]
    check_match(where, random_pair(size), grid, cells=some_cells(size), **options)


def test_reference_is_the_textbook():
    size, grid = SHAPES["small"]
    check_cost(("reference", "cpu"), random_pair(size, torch.float64), some_cells(size))
    check_match(("reference", "cpu"), random_pair(size, torch.float64), grid, radius=2.0)


def test_heads_averaged_before_the_softmax(any_backend):
    backend, device = any_backend
    query, key = (x.to(device) for x in random_pair(SHAPES["small"][0], torch.float64))
    flat = [x.flatten(-2)[..., None, :] for x in (query, key)]
    found = query_key_cost(*flat, cells=None, scale=0.3 / 2, backend=backend).cpu()
    mean = torch.einsum("bshd,btjhd->btsj", query[:, 0], key).cpu() * (0.3 / 2)
    back = torch.einsum("btjhd,bshd->btsj", query, key[:, 0]).cpu() * (0.3 / 2)
    torch.testing.assert_close(found, (mean.softmax(-1) + back.softmax(-2)) / 2)


def test_views_of_text_and_video_together(where):
    backend, device = where
    joined = torch.randn(2, 3, 5 + 2 * 6, 8, device=device)  # [B, H, text + T * S, D]
    view = joined[:, :, 5:].unflatten(2, (2, 6)).permute(0, 2, 3, 1, 4)
    match = query_key_matching(view, view, grid=(2, 3), backend=backend)
    plain = query_key_matching(view.contiguous(), view.contiguous(), grid=(2, 3), backend=backend)
    assert all(torch.equal(x, y) for x, y in zip(match, plain, strict=True))


def test_ties_go_to_the_lowest_cell(any_backend):
    backend, device = any_backend
    query = torch.zeros(1, 2, 70, 2, 8, device=device)
    match = query_key_matching(query, query, grid=(7, 10), radius=math.inf, backend=backend)
    assert match.index[0, 1].tolist() == [0] * 70
    torch.testing.assert_close(match.points[0, 1], torch.tensor([5.0, 3.5], device=device).expand(70, 2))
    key = query.clone()
    query[..., 0] = 1
    key[:, 1, [33, 64], :, 0] = 5
    assert query_key_matching(query, key, grid=(7, 10), backend=backend).index[0, 1].tolist() == [33] * 70


def test_scores_far_apart(any_backend):
    """The largest scores come last: what was summed before them must decay to nothing."""
    backend, device = any_backend
    query, key = (torch.zeros(1, 2, 100, 1, 8, device=device) for _ in range(2))
    query[..., 0] = 10
    key[0, 1, :, 0, 0] = torch.arange(100.0)
    match = query_key_matching(query, key, grid=(10, 10), scale=1.0, symmetric=False, backend=backend)
    assert match.index[0, 1].tolist() == [99] * 100
    # From log-sum-exps, weights have a relative error of one ulp of the score.
    error = torch.finfo(torch.float32).eps * (990 if backend == "triton" else 4)
    torch.testing.assert_close(match.peak[0, 1].cpu(), torch.full((100,), 1 / (1 + math.exp(-10))), rtol=error, atol=0)


@pytest.mark.parametrize("tensor", [0, 1], ids=["query", "key"])
@pytest.mark.parametrize("frame", [0, 1, 2])
@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
def test_non_finite_input_stays_in_its_pairs(any_backend, tensor, frame, bad):
    backend, device = any_backend
    size, grid = (1, 3, 70, 2, 8), (7, 10)
    pair = [x.to(device) for x in random_pair(size)]
    clean = query_key_matching(*pair, grid=grid, radius=2.0, backend=backend)
    pair[tensor] = pair[tensor].clone()
    pair[tensor][0, frame, 37, 1, 3] = bad
    match = query_key_matching(*pair, grid=grid, radius=2.0, backend=backend)
    # Source frame 0: one of its cells, if its query is bad, or all of the pair.
    touched = torch.zeros(3, 70, dtype=torch.bool)
    if frame == 0 and tensor == 0:
        touched[1:, 37] = True
    else:
        touched[[1, 2] if frame == 0 else [frame]] = True
    index, peak, points = (x[0].cpu() for x in match)
    reached = touched.clone()
    if not math.isnan(bad):  # a score of -infinity is a weight of 0
        touched &= query_key_matching(*(x.cpu() for x in pair), grid=grid, backend="reference").index[0] == -1
        assert tensor or touched.any()
    assert (index[touched] == -1).all() and peak[touched].isnan().all() and points[touched].isnan().all()
    assert not points[~touched].isnan().any()
    for x, y in zip((index, peak, points), clean, strict=True):
        assert torch.equal(x[~reached], y[0].cpu()[~reached])


def test_a_cell_alone_gets_what_it_gets_beside_others():
    query, key = random_pair((1, 3, 100, 3, 16))
    every = query_key_matching(query, key, grid=(10, 10), radius=3.0, backend="cpp")
    alone = query_key_matching(query, key, grid=(10, 10), radius=3.0, cells=torch.tensor([[57]]), backend="cpp")
    assert all(torch.equal(x, y[:, :, 57:58]) for x, y in zip(alone, every, strict=True))


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(query=torch.zeros(1, 2, 6, 8)), ValueError, r"query must be \[B, T, S, H, D\]"),
        (dict(key=torch.zeros(1, 2, 6, 2, 8, dtype=torch.float64)), TypeError, "key must have the dtype of query"),
        (dict(key=torch.zeros(1, 2, 6, 2, 9)), ValueError, "key must have the shape of query"),
        (dict(grid=(2, 4)), ValueError, r"grid must be \(h, w\) with h \* w = S = 6"),
        (dict(grid=6), TypeError, "grid must be a pair of ints"),
        (dict(source=2), ValueError, "source must be a frame from 0 to 1, got 2"),
        (dict(source=-1), ValueError, "source must be a frame"),
        (dict(source=0.0), TypeError, "source must be an int"),
        (dict(cells=torch.zeros(1, 2)), TypeError, "cells must be int64"),
        (dict(cells=torch.zeros(2, dtype=torch.int64)), ValueError, r"cells must be \[B, M\]"),
        (dict(cells=torch.tensor([[0, 6]])), ValueError, "cells must be from 0 to 5 in frames of 6 cells, got 6"),
        (dict(cells=torch.tensor([[-1]])), ValueError, "cells must be from 0 to 5"),
        (dict(scale="1"), TypeError, "scale must be a number"),
        (dict(scale=math.inf), ValueError, "scale must be from"),
        (dict(radius=0), ValueError, "radius must be a positive number or None, got 0"),
        (dict(radius=math.nan), ValueError, "radius must be a positive number"),
        (dict(symmetric=1), TypeError, "symmetric must be a bool"),
        (dict(backend="cuda"), ValueError, "backend must be one of"),
    ],
    ids=str,
)
def test_bad_arguments(change, error, message):
    query = torch.zeros(1, 2, 6, 2, 8)
    arguments = dict(query=query, key=query, grid=(2, 3)) | change
    with pytest.raises(error, match=message):
        query_key_matching(arguments.pop("query"), arguments.pop("key"), **arguments)


@pytest.mark.parametrize("wrong", [-1, 6, 2**40])
@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_operators_refuse_cells_that_do_not_exist(backend, wrong):
    """Those of a compiled graph reach them unchecked; on GPUs see triton_interpreter_query_cases.py."""
    query, key = random_pair((1, 2, 6, 2, 8))
    cells, options = torch.tensor([[0, wrong]]), (0, 2, 3, 0.3, True, 1.5, backend)
    peak, points, index, weight = op.query_key_matching_fwd(query, key, torch.tensor([[0, 1]]), *options)
    of_cost = (0, 0.3, True, backend)
    compiled = torch.compile(lambda *x: query_key_cost(*x, cells=cells, backend=backend), backend="aot_eager")
    for call, arguments in (
        (op.query_key_matching_fwd, (query, key, cells, *options)),
        (op.query_key_matching_bwd, (peak, points, query, key, cells, index, points, weight, *options)),
        (op.query_key_cost_fwd, (query, key, cells, *of_cost)),
        (op.query_key_cost_bwd, (torch.zeros(1, 2, 2, 6), query, key, cells, *of_cost)),
        (compiled, (query, key)),
    ):
        torch._dynamo.reset()
        with pytest.raises(ValueError, match=f"cells must be from 0 to 5.*, got {wrong}"):
            call(*arguments)


def test_cells_out_of_range_in_a_graph():
    """Whose inputs they are."""
    query = torch.randn(1, 2, 6, 2, 8)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, cells: query_key_cost(x, x, cells=cells), fullgraph=True, backend="aot_eager")
    assert compiled(query, torch.tensor([[0, 5]])).shape == (1, 2, 2, 6)
    with pytest.raises(ValueError, match="cells must be from 0 to 5"):
        compiled(query, torch.tensor([[0, 6]]))


def test_memory_does_not_grow_with_heads_and_frames():
    from oracle import peak_memory

    torch.set_num_threads(1)
    query = torch.randn(1, 3, 1024, 16, 8)
    query_key_matching(query, query, grid=(32, 32), backend="cpp")
    with peak_memory("cpu") as used:
        query_key_matching(query, query, grid=(32, 32), backend="cpp")
    assert used.mebibytes < 8  # one C is 4 MiB; weights of all heads would be 64 MiB
