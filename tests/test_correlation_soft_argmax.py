"""Correlation with soft-argmax: what it computes, in every backend that can run here natively.

The soft-argmax of a given cost volume has its own file, `test_correlation_soft_argmax_2d.py`.
"""

import itertools
import mmap
import warnings

import pytest
import torch
import torch.nn.functional as F
from official import needs_official, official  # noqa: F401
from oracle import (
    assert_as_exact_as_eager,
    fast_backends,
    match_cost,
    match_eager,
    match_textbook,
    native_backends,
    peak_memory,
)

from tritonkern import correlation_soft_argmax
from tritonkern.ops.correlation_soft_argmax import op, reference

FWD = op.correlation_soft_argmax_fwd
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
NAMES = ("points", "mean", "max", "min", "grad_query", "grad_features")


@pytest.fixture(params=fast_backends(op.NAME))
def where(request):
    return request.param


@pytest.fixture(params=native_backends(op.NAME))
def any_backend(request):
    return request.param


def random_inputs(batch, queries, frames, rows, columns, channels, dtype=torch.float32, device="cpu"):
    """Unit vectors, so that at temperature 20 many cells of the disc have weight."""
    shapes = (batch, queries, channels), (batch, frames, rows, columns, channels)
    return [F.normalize(torch.randn(shape, dtype=torch.float64), dim=-1).to(device, dtype) for shape in shapes]


def run(where, query, features, wanted=(True,) * 4, **options):
    """The four results and the gradients of those `wanted`, and the best and the worst cell."""
    leaves = [query.detach().requires_grad_(), features.detach().requires_grad_()]
    results = correlation_soft_argmax(*leaves, backend=where[0], **options)
    grads = differentiate(results, leaves, wanted)
    options = {"temperature": 20.0, "radius": 5.0, "cosine": False, "eps": 1e-6, **options}
    with torch.no_grad():
        best, worst = FWD(query, features, *options.values(), where[0])[4:6]
    return [*(x.detach() for x in results), *grads], best, worst


def differentiate(results, leaves, wanted=(True,) * 4):
    """Gradients of those of the four `results` that are `wanted`, with cotangents that depend on the shapes alone."""
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in results]
    taken = [index for index in range(4) if wanted[index]]
    return torch.autograd.grad(
        [results[index] for index in taken], leaves, [cotangents[index] for index in taken], materialize_grads=True
    )


def eager(query, features, best, worst, wanted, temperature=20.0, radius=5.0, **cosine):
    """The results of the official form, PyTorch's gradients of it, for these extremal cells, and the cost volume."""
    leaves = [query.detach().requires_grad_(), features.detach().requires_grad_()]
    cost = match_cost(*leaves, **cosine)
    results = match_eager(cost, temperature, radius, best, worst)
    grads = differentiate(results, leaves, wanted)
    return [x.detach().double().cpu() for x in (*results, *grads, cost)]


def eager_roundings(query, features, *arguments, **options):
    """Eager in the accumulator's dtype, with the sum over channels in two other orders; one may be lucky."""
    channels = torch.arange(query.shape[-1], device=query.device)
    for order in (channels.flip(0), torch.cat([channels[::2], channels[1::2]])):
        results = eager(*(_accurate(x)[..., order] for x in (query, features)), *arguments, **options)
        back = order.argsort().cpu()
        yield [*results[:4], results[4][..., back], results[5][..., back], results[6]]


def check(where, query, features, wanted=(True,) * 4, **options):
    """Forward and backward against float64, by the rule of `oracle.assert_as_exact_as_eager`.

    Eager runs in float32 for 16-bit inputs: a stricter yardstick than eager in 16 bits. The extremal cells must be
    exact where the two best differ by more than rounding, one of the candidates otherwise; everything else is then held
    to the exact answer for that choice.
    """
    results, best, worst = run(where, query, features, wanted, **options)
    arguments = best.cpu(), worst.cpu(), wanted
    *exact, cost = eager(*(x.detach().double().cpu() for x in (query, features)), *arguments, **options)
    roundings = list(eager_roundings(query, features, best, worst, wanted, **options))
    if cost.numel():
        rounding = max((plain[6] - cost).abs().max() for plain in roundings)
        band = 2 * (2 * rounding + torch.finfo(results[0].dtype).eps * cost.abs().max())  # two cells may be off
        for sign, cell in ((1, best), (-1, worst)):
            cells = (sign * cost).flatten(-2)
            chosen = cells.gather(-1, cell.cpu().long()[..., None])[..., 0]
            assert (chosen >= cells.amax(-1) - band).all()
    terms = largest_terms(query, features, **options)
    for index, (name, result, truth, term) in enumerate(zip(NAMES, results, exact, terms, strict=True)):
        assert result.dtype == (query.dtype if index >= 4 else _accurate(query).dtype)
        assert_as_exact_as_eager(result.cpu(), [plain[index] for plain in roundings], truth, term, name)


def largest_terms(query, features, temperature=20.0, radius=5.0, cosine=False, eps=1e-6):
    """Size of what the six results are sums of, where it may cancel; see `oracle.largest_terms`."""
    if 0 in query.shape[:2] or features.shape[1] == 0:
        return [0] * 6
    lengths = [x.detach().double().norm(dim=-1) for x in (query, features)]
    scales = [1 / length.square().clamp(min=eps).sqrt().min() if cosine else 1 for length in lengths]
    cost = 1 if cosine else lengths[0].max() * lengths[1].max()
    extent = max(features.shape[2:4])
    # A point is a mean of coordinates, with weights that the last bit of a logit moves; a cell's gradient has a
    # difference of coordinates as a factor.
    points = min(radius, extent) * temperature * cost + extent
    grad_cost = 4 * (temperature * extent + 1)
    largest = [1 if cosine else x.detach().double().abs().max() for x in (query, features)]
    grads = [grad_cost * largest[1 - side] * scales[side] for side in (0, 1)]
    return [float(x) for x in (points, cost, cost, cost, *grads)]


def _accurate(x):
    return x.detach().to(torch.promote_types(x.dtype, torch.float32))


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("radius", [0.5, 1.5, 2.0, 100.0])
def test_reference_is_the_textbook_loop(radius, cosine):
    query, features = random_inputs(2, 2, 2, 3, 4, 5, torch.float64)
    query[0, 0] *= 1e-4  # shorter than sqrt(eps)
    results, *_ = run(("reference", "cpu"), query, features, temperature=7.0, radius=radius, cosine=cosine)
    leaves = [query.requires_grad_(), features.requires_grad_()]
    truth = match_textbook(*leaves, 7.0, radius, cosine)
    truth = [*truth, *differentiate(truth, leaves)]
    for result, expected in zip(results, truth, strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("cosine", [False, True], ids=["dot", "cosine"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        (2, 7, 3, 12, 16, 16),
        (1, 1, 1, 64, 64, 16),  # N = 1
        (1, 33, 2, 64, 64, 64),  # Chrono's grid
        (2, 70, 1, 9, 33, 37),  # odd channels
        (1, 3, 5, 1, 1, 3),  # one cell
        (3, 5, 1, 1, 50, 24),  # one row
        (1, 5, 2, 31, 7, 1536),
        (1, 2, 2, 5, 5, 1),
    ],
    ids=str,
)
def test_result_and_gradients(where, shape, dtype, cosine):
    check(where, *random_inputs(*shape, dtype=dtype, device=where[1]), cosine=cosine)


@pytest.mark.parametrize("radius", [0.5, 1.0, 2.5, 5.0, 9.7, 40.0, float("inf")])
def test_radius(where, radius):
    check(where, *random_inputs(1, 9, 2, 20, 13, 16, device=where[1]), radius=radius)


@pytest.mark.parametrize("temperature", [0.01, 1, 20.0, 1000.0])
def test_temperature(where, temperature):
    check(where, *random_inputs(1, 9, 2, 20, 13, 16, device=where[1]), temperature=temperature)


@pytest.mark.parametrize("size", [30.0, 1e5])
def test_large_logits_do_not_overflow(where, size):
    query, features = random_inputs(1, 9, 2, 20, 13, 16, device=where[1])
    check(where, query * size, features)
    check(where, query * size, features * size, cosine=True)


def test_cosine_of_vectors_shorter_than_eps(where):
    query, features = random_inputs(1, 9, 2, 8, 9, 16, device=where[1])
    query[:, ::2] *= 1e-4
    features[:, :, ::3] *= 1e-5
    features[:, :, 1, 1] = 0
    check(where, query, features, cosine=True)
    check(where, query, features, cosine=True, eps=1e-12)


def grid_of(cells, rows=12, columns=9, device="cpu", dtype=torch.float32):
    """A query and features whose correlation is exactly 0 but at the given cells."""
    query = torch.zeros(1, 1, 16, dtype=dtype, device=device)
    query[..., 3] = 2
    features = torch.zeros(1, 1, rows, columns, 16, dtype=dtype, device=device)
    for cell, value in cells.items():
        features[(0, 0, *cell, 3)] = value / 2
    return query, features


@pytest.mark.parametrize(
    ("cells", "best", "worst"),
    [
        ({}, (0, 0), (0, 0)),  # a constant map: the first cell
        ({(3, 4): 1, (9, 2): 1, (3, 5): 1}, (3, 4), (0, 0)),  # ties, near and far
        ({(11, 8): 1, (0, 0): -1, (11, 0): -1}, (11, 8), (0, 0)),
        ({(0, 8): 1, (5, 5): -1, (5, 6): -1}, (0, 8), (5, 5)),
        ({(11, 0): 1, (11, 8): -1}, (11, 0), (11, 8)),
        ({(0, 4): 1, (11, 4): 1 - 2**-20}, (0, 4), (0, 0)),  # a near tie
        ({(0, 4): 1 - 2**-20, (11, 4): 1}, (11, 4), (0, 0)),
        ({(6, 0): 0.125, (6, 8): 0.125, (7, 1): -3, (10, 8): -3}, (6, 0), (7, 1)),
        (dict.fromkeys(itertools.product(range(12), range(9)), -1.0), (0, 0), (0, 0)),  # below zero everywhere
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_first_extremal_cell_wins(where, cells, best, worst, dtype):
    """Numbers whose products are exact, so that the arg max must be."""
    query, features = grid_of(cells, device=where[1], dtype=dtype)
    _, first, last = run(where, query, features)
    assert (first.item(), last.item()) == (best[0] * 9 + best[1], worst[0] * 9 + worst[1])
    check(where, query, features)
    many = query.expand(1, 40, 16), features.expand(1, 3, 12, 9, 16)
    results, first, last = run(where, *many)
    assert first.unique().item() == best[0] * 9 + best[1] and last.unique().item() == worst[0] * 9 + worst[1]
    assert (results[0] == results[0][0, 0, 0]).all()


def test_gradients_of_extrema_go_to_the_first_cell(where):
    query, features = grid_of({(3, 4): 1, (9, 2): 1, (5, 5): -1, (5, 6): -1}, device=where[1])
    features.requires_grad_()
    match = correlation_soft_argmax(query, features, backend=where[0])
    (match.max + 10 * match.min).sum().backward()
    assert features.grad[..., 3].nonzero().tolist() == [[0, 0, 3, 4], [0, 0, 5, 5]]
    assert features.grad[0, 0, 3, 4, 3] == 2 and features.grad[0, 0, 5, 5, 3] == 20


@pytest.mark.parametrize("cell", [-1, 20, 10**9, -(2**31), 2**31 - 1])
def test_cells_outside_of_the_grid_take_no_part(any_backend, cell):
    """The operators are public: best and worst may hold any number. The memory driver watches what is read."""
    query, features = random_inputs(2, 3, 2, 4, 5, 16, device=any_backend[1])
    saved = op.Outputs(*FWD(query, features, 20.0, 2.0, True, 1e-6, any_backend[0]))
    kept = op.Saved(*(getattr(saved, name) for name in op.Saved._fields))
    kept = kept._replace(best=torch.full_like(saved.best, cell), worst=torch.full_like(saved.worst, cell))
    ones = [torch.ones_like(x) for x in saved[:4]]
    # Of four grads the second alone, the mean's, does not depend on these cells.
    results = op.correlation_soft_argmax_bwd(*ones, query, features, *kept, 20.0, 0.5, True, 1e-6, any_backend[0])
    mean = op.correlation_soft_argmax_bwd(
        None, ones[1], None, None, query, features, *kept, 20.0, 0.5, True, 1e-6, any_backend[0]
    )
    for result, expected in zip(results, mean, strict=True):
        torch.testing.assert_close(result, expected)


def test_any_radius_is_strict(where):
    """A cell takes part if its distance is less than the radius, however little."""
    query, features = grid_of({(3, 4): 1}, device=where[1])
    for radius, cells in ((1.0, 1), (1.0 + 1e-15, 5), (2**0.5, 5 if 2**0.5 * 2**0.5 <= 2 else 9), (1.5, 9)):
        weight = FWD(query, features, 1e-30, radius, False, 1e-6, where[0])[6]
        assert weight.item() == cells


@pytest.mark.parametrize("wanted", [w for w in itertools.product((False, True), repeat=4) if any(w)], ids=str)
def test_any_of_the_results_may_carry_a_gradient(where, wanted):
    query, features = random_inputs(2, 5, 2, 6, 7, 16, device=where[1])
    for cosine in (False, True):
        check(where, query, features, wanted, cosine=cosine)


@pytest.mark.parametrize("cosine", [False, True], ids=["dot", "cosine"])
@pytest.mark.parametrize("cell", [(0, 0), (4, 5), (8, 10)], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_cell_stays_in_its_frame(where, bad, cell, cosine):
    query, features = random_inputs(2, 6, 3, 9, 11, 16, device=where[1])
    query = query.abs()  # so that an infinite channel gives a correlation of its sign
    clean, *_ = run(where, query, features, cosine=cosine)
    features[(1, 2, *cell, 7)] = bad
    poisoned, *_ = run(where, query, features, cosine=cosine)
    truth = reference.forward(query.double().cpu(), features.double().cpu(), 20.0, 5.0, cosine, 1e-6)
    for before, result, expected in zip(clean[:4], poisoned[:4], truth[:4], strict=True):
        result, before = result.cpu(), before.cpu()
        assert torch.equal(result[0], before[0]) and torch.equal(result[1, :, :2], before[1, :, :2])
        torch.testing.assert_close(result.double(), expected, rtol=1e-4, atol=1e-4, equal_nan=True)
    assert torch.equal(poisoned[4][0], clean[4][0])
    assert torch.equal(poisoned[5][0], clean[5][0]) and torch.equal(poisoned[5][1, :2], clean[5][1, :2])
    assert not poisoned[4][1].isfinite().all(-1).any()  # every query of the clip met the bad cell, mean at least


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_query_stays_alone(where, bad):
    query, features = random_inputs(2, 6, 3, 9, 11, 16, device=where[1])
    clean, *_ = run(where, query, features)
    query[1, 3, 7] = bad
    poisoned, *_ = run(where, query, features)
    others = [n for n in range(6) if n != 3]
    for before, result in zip(clean[:5], poisoned[:5], strict=True):
        assert torch.equal(result[0], before[0]) and torch.equal(result[1, others], before[1, others])
    assert poisoned[0][1, 3].isnan().all()
    assert torch.equal(poisoned[5][0], clean[5][0])
    assert not poisoned[5][1].isfinite().all((1, 2, 3)).any()


def test_no_cost_volume(where):
    """Its 4000 x 2 x 64 x 64 numbers would take 125 MiB."""
    device = where[1]
    inputs = random_inputs(1, 4000, 2, 64, 64, 16, device=device)
    run(where, inputs[0][:, :100], inputs[1])
    with peak_memory(device) as peak:
        run(where, *inputs)
    assert peak.mebibytes < 25


def test_float32_means_float32(where):
    """No TF32 and no bfloat16 inside: large equal terms cancel to their last bits."""
    query, features = random_inputs(1, 9, 2, 12, 13, 64, device=where[1])
    check(where, query, features + 100 * F.normalize(query.roll(1, -1).sum((0, 1)), dim=0), temperature=1)


@pytest.mark.parametrize("far_axis", [0, 1, 2], ids=["batch", "frames", "rows"])
def test_offsets_beyond_32_bits(where, far_axis):
    query, features = random_inputs(2, 3, 2, 3, 4, 16, dtype=torch.float16, device=where[1])
    strides = list(features.stride())
    strides[far_axis] = 2**31 // (features.shape[far_axis] - 1)
    span = 2**31 + features.numel() + 64
    if where[1] == "cpu":  # 4 GiB of addresses, of which the kernel touches a few pages
        memory = mmap.mmap(-1, 2 * span, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        storage = torch.frombuffer(memory, dtype=torch.float16)
    else:
        storage = torch.zeros(span, dtype=torch.float16, device=where[1])
    check(where, query, storage.as_strided(features.shape, strides).copy_(features))


@needs_official
@pytest.mark.parametrize(
    ("repository", "module"),
    [("Chrono", "models.utils"), ("locotrack/locotrack_pytorch", "models.utils"), ("tapnet", "tapnet.torch.utils")],
    ids=["chrono", "locotrack", "tapir"],
)
def test_official(where, official, repository, module):  # noqa: F811
    """Points and gradients of the three repositories' own functions on a cost volume, in float64 and non-square."""
    utils = official(repository, module)
    query, features = random_inputs(1, 6, 3, 24, 32, 48, torch.float64, where[1])
    leaves = [query.requires_grad_(), features.requires_grad_()]
    points = correlation_soft_argmax(*leaves, backend=where[0]).points
    cost = match_cost(*leaves)
    probability = (cost * 20).flatten(-2).softmax(-1).view_as(cost)
    expected = utils.soft_argmax_heatmap_batched(probability)
    torch.testing.assert_close(points, expected, rtol=1e-12, atol=1e-12)
    cotangent = torch.randn_like(points)
    for ours, theirs in zip(
        *(torch.autograd.grad(x, leaves, cotangent, retain_graph=True) for x in (points, expected)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pixels = utils.heatmaps_to_points(probability.detach(), (1, 3, 96, 128, 3))
    torch.testing.assert_close(points.detach() * 4, pixels, rtol=1e-12, atol=1e-12)
