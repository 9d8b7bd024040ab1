"""The soft-argmax of a given cost volume, in every backend that can run here natively."""

import pytest
import torch
from oracle import (
    assert_as_exact_as_eager,
    fast_backends,
    match_eager,
    peak_memory,
    soft_argmax_textbook,
)

from tritonkern import soft_argmax_2d
from tritonkern.ops.correlation_soft_argmax import op, reference

FWD, BWD = op.soft_argmax_2d_fwd, op.soft_argmax_2d_bwd
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=fast_backends(op.NAME))
def where(request):
    return request.param


def random_cost(*shape, dtype=torch.float32, device="cpu"):
    """As wide as cosines; in 16 bits many cells of a frame tie."""
    return (0.25 * torch.randn(shape, dtype=torch.float64)).to(device, dtype)


def with_gradient(function, cost):
    """Points, and the gradient of the cost volume for a cotangent that depends on the shape alone."""
    leaf = cost.detach().requires_grad_()
    points = function(leaf)
    cotangent = torch.randn(points.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (grad,) = torch.autograd.grad(points, leaf, cotangent.to(points))
    return points.detach().cpu(), grad.cpu()


def check(where, cost, temperature=20.0, radius=5.0):
    """The arg max of given numbers is exact; the rest is held to `oracle.assert_as_exact_as_eager`, eager in float32
    for 16-bit inputs."""
    options = {"temperature": temperature, "radius": radius}
    points, grad = with_gradient(lambda x: soft_argmax_2d(x, backend=where[0], **options), cost)
    best = FWD(cost, temperature, radius, where[0])[2]
    cells = cost.detach().cpu().double().flatten(-2)
    assert torch.equal(best.cpu().long(), (cells == cells.amax(-1, keepdim=True)).int().argmax(-1))

    def official(x):
        return match_eager(x, temperature, radius, best.to(x.device))[0]

    def turned(x):
        """Its sums in reverse order; a single one may be lucky."""
        rows, columns = x.shape[-2:]
        last = rows * columns - 1 - best.to(x.device)
        return x.new_tensor([columns, rows]) - match_eager(x.flip((-2, -1)), temperature, radius, last)[0]

    accurate = cost.detach().to(torch.promote_types(cost.dtype, torch.float32))
    assert (points.dtype, grad.dtype) == (accurate.dtype, cost.dtype)
    exact_points, exact_grad = with_gradient(official, cost.detach().cpu().double())
    plain_points, plain_grads = zip(*(with_gradient(form, accurate) for form in (official, turned)), strict=True)
    # A point is a mean of coordinates, with weights that the last bit of a logit moves; a gradient has a difference of
    # coordinates as a factor.
    extent = max(cost.shape[-2:])
    largest = temperature * cells.abs().max() if cells.numel() else 0
    assert_as_exact_as_eager(points, plain_points, exact_points, min(radius, extent) * largest + extent, "points")
    assert_as_exact_as_eager(grad, plain_grads, exact_grad, 4 * temperature * (extent + largest), "grad")


@pytest.mark.parametrize("radius", [0.5, 1.5, 2.0, 100.0])
def test_reference_is_the_textbook_loop(radius):
    cost = random_cost(3, 4, 5, dtype=torch.float64)

    def textbook(x):
        cells = [{(i // 5, i % 5): frame.flatten()[i] for i in range(20)} for frame in x]
        return torch.stack([torch.stack(soft_argmax_textbook(frame, 7.0, radius)) for frame in cells])

    results = with_gradient(lambda x: soft_argmax_2d(x, temperature=7.0, radius=radius, backend="reference"), cost)
    for result, expected in zip(results, with_gradient(textbook, cost), strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(64, 64), (3, 12, 17), (2, 3, 5, 9, 33), (4, 1, 1), (2, 1, 50), (2, 50, 1)], ids=str)
def test_result_and_gradient(where, shape, dtype):
    check(where, random_cost(*shape, dtype=dtype, device=where[1]))


@pytest.mark.parametrize("radius", [0.5, 1.0, 2.5, 9.7, 40.0, float("inf")])
def test_radius(where, radius):
    check(where, random_cost(6, 20, 13, device=where[1]), radius=radius)


@pytest.mark.parametrize("temperature", [0.01, 1, 1000.0])
def test_temperature(where, temperature):
    check(where, random_cost(6, 20, 13, device=where[1]), temperature=temperature)


def test_large_costs_do_not_overflow(where):
    check(where, 1e6 * random_cost(6, 20, 13, device=where[1]))


@pytest.mark.parametrize("cell", [(0, 0), (0, 12), (19, 0), (19, 12), (0, 5), (9, 0), (9, 6)], ids=str)
def test_peaks_and_ties(where, cell):
    cost = torch.zeros(2, 20, 13, device=where[1])
    cost[0][cell] = 1
    check(where, cost)
    later = cell[0] * 13 + cell[1] + 1
    cost.flatten(1)[:, later:] += 1  # the same peak again in every cell after it
    check(where, cost)


@pytest.mark.parametrize("cell", [-1, 63, 10**9, -(2**31), 2**31 - 1])
def test_cells_outside_of_the_grid_take_no_part(where, cell):
    """The operators are public: best may hold any number. The memory driver watches what is read."""
    cost = random_cost(3, 7, 9, device=where[1])
    points, maximum, best, weight = FWD(cost, 20.0, 0.5, where[0])
    saved = points, maximum, torch.full_like(best, cell), weight
    assert not BWD(torch.ones_like(points), cost, *saved, 20.0, 0.5, where[0]).any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("cell", [(0, 0), (4, 5), (8, 10)], ids=str)
def test_non_finite_cell_stays_in_its_frame(where, bad, cell):
    cost = random_cost(5, 9, 11, device=where[1])
    clean = with_gradient(lambda x: soft_argmax_2d(x, backend=where[0]), cost)
    cost[(3, *cell)] = bad
    points, grad = with_gradient(lambda x: soft_argmax_2d(x, backend=where[0]), cost)
    others = [0, 1, 2, 4]
    assert torch.equal(points[others], clean[0][others]) and torch.equal(grad[others], clean[1][others])
    expected = reference.soft_argmax_2d_forward(cost.cpu().double(), 20.0, 5.0)[0]
    assert expected[3].isnan().all() == (bad != float("-inf"))
    torch.testing.assert_close(points.double(), expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert grad[3].isfinite().all() == (bad == float("-inf"))


def test_nothing_but_minus_infinity_is_nan(where):
    cost = torch.full((2, 4, 5), float("-inf"), device=where[1])
    cost[1] = 0
    points = soft_argmax_2d(cost, backend=where[0])
    assert points[0].isnan().all() and points[1].isfinite().all()


def test_memory_is_that_of_the_gradient(where):
    """The official form keeps several temporaries of the cost volume's size, and one of twice that."""
    backend, device = where
    cost = random_cost(2000, 64, 64, device=device)  # 31 MiB
    soft_argmax_2d(cost[:10], backend=backend)
    with peak_memory(device) as peak:
        soft_argmax_2d(cost, backend=backend)
    assert peak.mebibytes < 4
