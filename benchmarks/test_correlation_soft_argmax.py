"""Correlation with soft-argmax against the official eager form, its compiled form, and the matrix product alone."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from shapes import CORRELATION_SOFT_ARGMAX, CORRELATION_SOFT_ARGMAX_GPU, SOFT_ARGMAX_2D, MatchingShape

from tritonkern import correlation_soft_argmax, soft_argmax_2d

OURS = "tritonkern"
OP = "correlation_soft_argmax"
TEMPERATURE, RADIUS = 20.0, 5.0
DISC = sum(dx * dx + dy * dy < RADIUS**2 for dx in range(-5, 6) for dy in range(-5, 6))  # 69 cells
# Elements of the cost volume up to which eager, which holds about ten times as many at once, runs here.
EAGER_LIMIT = 26_000_000


def random_inputs(shape, dtype, device, requires_grad=False):
    torch.manual_seed(0)
    sizes = (1, shape.queries, shape.channels), (1, shape.frames, *shape.grid, shape.channels)
    inputs = [F.normalize(torch.randn(size, device=device), dim=-1).to(dtype) for size in sizes]
    return [x.requires_grad_(requires_grad) for x in inputs]


def cost(shape, dtype, backward):
    """Least bytes and FLOPs: each tensor once, the product over all cells, backward three products over discs."""
    cells = shape.frames * math.prod(shape.grid)
    numbers = (shape.queries + cells) * shape.channels
    pairs = shape.queries * shape.frames
    moved = numbers * dtype.itemsize * (3 if backward else 1) + pairs * 5 * 4
    return moved, 2 * shape.queries * cells * shape.channels + (6 * DISC * pairs * shape.channels if backward else 0)


def ours(query, features):
    return tuple(correlation_soft_argmax(query, features, temperature=TEMPERATURE, radius=RADIUS))


def eager_soft_argmax(volume):
    rows, columns = volume.shape[-2:]
    probability = (volume * TEMPERATURE).flatten(-2).softmax(-1)
    y, x = torch.meshgrid(*(torch.arange(n, device=volume.device) + 0.5 for n in (rows, columns)), indexing="ij")
    centres = torch.stack([x, y], -1)
    best = centres.flatten(0, 1)[probability.argmax(-1)]
    kept = (centres - best[..., None, None, :]).square().sum(-1, keepdim=True) < RADIUS**2
    weighted = probability.unflatten(-1, (rows, columns))[..., None] * kept
    return (weighted * centres).sum((-3, -2)) / weighted.sum((-3, -2)).clamp(min=1e-12)


def eager(query, features):
    volume = torch.einsum("bnc,bthwc->bnthw", query, features)
    return eager_soft_argmax(volume), volume.mean((-2, -1)), volume.amax((-2, -1)), volume.amin((-2, -1))


@functools.cache
def compiled(function):
    return torch.compile(function, dynamic=False)


def product_alone(query, features):
    torch.matmul(query[0], features.flatten(0, 3).mT)


def convolution_alone(query, features):
    """The same product as a 1x1 convolution over a channels-last image, which on a CPU is oneDNN's."""
    images = features[0].movedim(-1, 1)
    F.conv2d(images, query[0, :, :, None, None])


def without_points(results):
    """16-bit costs tie, so that eager takes another of the equal cells."""
    return tuple(results)[1:]


def main_dtype(device):
    return torch.bfloat16 if device == "cuda" else torch.float32


def shapes():
    return CORRELATION_SOFT_ARGMAX + ([CORRELATION_SOFT_ARGMAX_GPU] if torch.cuda.is_available() else [])


def peers(shape):
    elements = shape.queries * shape.frames * math.prod(shape.grid)
    if elements > EAGER_LIMIT * (20 if torch.cuda.is_available() else 1):
        return {}
    return {"eager": eager, "eager compiled": compiled(eager)}


@pytest.mark.parametrize("shape", shapes(), ids=lambda s: s.name)
def test_forward(compare, device, shape):
    dtype = main_dtype(device)
    inputs = random_inputs(shape, dtype, device)
    chosen = (lambda results: results) if dtype == torch.float32 else without_points
    calls = {OURS: lambda: chosen(ours(*inputs))}
    calls |= {name: functools.partial(lambda peer: chosen(peer(*inputs)), peer) for name, peer in peers(shape).items()}
    calls["the product alone"] = functools.partial(product_alone, *inputs)
    if device == "cpu":
        calls["the product as convolution"] = functools.partial(convolution_alone, *inputs)
        halves = [x.bfloat16() for x in inputs]

        def in_bfloat16():
            ours(*halves)

        calls["tritonkern in bfloat16"] = in_bfloat16
    with torch.no_grad():
        compare(OP, shape.size, dtype, "forward", calls, *cost(shape, dtype, False))


@pytest.mark.parametrize("shape", shapes(), ids=lambda s: s.name)
def test_forward_and_backward(compare, device, shape):
    """With a gradient of the points, as trackers train: the statistics carry none."""
    dtype = main_dtype(device)
    inputs = random_inputs(shape, dtype, device, requires_grad=True)
    cotangent = torch.randn(1, shape.queries, shape.frames, 2, device=device)

    def both(function):
        """Gradients are compared below: eager's come from differences of large coordinates, and agree to 1e-4 only."""
        points, *statistics = function(*inputs)
        last[function] = torch.autograd.grad(points, inputs, cotangent.to(points.dtype))
        return (points.detach(),) if dtype == torch.float32 else tuple(x.detach() for x in statistics)

    last = {}
    calls = {OURS: functools.partial(both, ours)}
    calls |= {name: functools.partial(both, peer) for name, peer in peers(shape).items()}
    compare(OP, shape.size, dtype, "forward + backward", calls, *cost(shape, dtype, True))
    if eager in last and dtype == torch.float32:
        for grad, expected in zip(last[ours], last[eager], strict=True):
            assert (grad - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("direction", ["forward", "forward + backward"])
def test_soft_argmax_2d(compare, device, direction):
    shape, backward = SOFT_ARGMAX_2D, direction != "forward"
    torch.manual_seed(0)
    volume = 0.25 * torch.randn(1, shape.queries, shape.frames, *shape.grid, device=device)
    volume.requires_grad_(backward)
    cotangent = torch.randn(1, shape.queries, shape.frames, 2, device=device)

    def run(function):
        points = function(volume)
        if backward:
            (last[function],) = torch.autograd.grad(points, volume, cotangent)
        return points.detach()

    last = {}
    calls = {OURS: functools.partial(run, soft_argmax_2d), "eager": functools.partial(run, eager_soft_argmax)}
    calls["eager compiled"] = functools.partial(run, compiled(eager_soft_argmax))
    moved, flops = volume.numel() * 4 * (2 if backward else 1), volume.numel() * 2
    compare(
        "soft_argmax_2d",
        tuple(volume.shape[1:]),
        torch.float32,
        direction,
        calls,
        moved,
        flops,
    )
    if backward:
        assert (last[soft_argmax_2d] - last[eager_soft_argmax]).norm() < 1e-4 * last[eager_soft_argmax].norm()


SWEEP = [MatchingShape("queries", n, 24, (64, 64), 384, "") for n in (16, 64, 256, 1024, 4096)]
SWEEP += [MatchingShape("grid", 64, 24, (n, n), 384, "") for n in (16, 32, 96, 128)]


@pytest.mark.parametrize("shape", SWEEP, ids=lambda s: f"{s.name}{s.queries if s.name == 'queries' else s.grid[0]}")
def test_sweep(compare, device, shape):
    """Time grows linearly with queries and cells; memory does not grow with the cells. Eager where it fits."""
    dtype = torch.float32
    inputs = random_inputs(shape, dtype, device)
    calls = {OURS: functools.partial(ours, *inputs)}
    if peers(shape):
        calls["eager"] = functools.partial(eager, *inputs)
    with torch.no_grad():
        compare(OP, shape.size, dtype, "forward", calls, *cost(shape, dtype, False))
