"""Local correlation of CoTracker3, LocoTrack and DiTracker against the eager form of their repositories, from the
formula.
"""

import functools

import pytest
import torch
import torch.nn.functional as F

from tritonkern import local_correlation, local_correlation_linear

OURS, EAGER = "tritonkern", "eager"
OP = "local_correlation"
FRAMES, POINTS = 8, 256
RADIUS, SUPPORTS = 3, 49
COTRACKER = dict(padding="border", align_corners=True, axis_order="xy")
LOCOTRACK = dict(padding="zeros", align_corners=False, axis_order="yx")
COTRACKER_LEVELS = [(96 >> level, 128 >> level, 128) for level in range(4)]  # 384 x 512 pixels, stride 4
LOCOTRACK_LEVELS = [(128, 128, 64), (64, 64, 128), (32, 32, 256)]  # 256 x 256 pixels
OUTPUTS = 384  # of the first layer of CoTracker3's corr_mlp, and of DiTracker's
DITRACKER = dict(points=64, size=(120, 180), channels=64, outputs=256)  # 480 x 720 pixels, stride 4


def random_levels(levels, dtype, device, requires_grad=False):
    """Features, supports and positions of each level; features are channels-last in memory."""
    torch.manual_seed(0)
    for height, width, channels in levels:
        features = torch.randn(1, FRAMES, height, width, channels, device=device).to(dtype)
        support = torch.randn(1, POINTS, SUPPORTS, channels, device=device).to(dtype)
        coords = torch.rand(1, FRAMES, POINTS, 2, device=device) * torch.tensor(
            [width - 1.0, height - 1], device=device
        )
        yield features.requires_grad_(requires_grad), support.requires_grad_(requires_grad), coords


def cost(levels, dtype, linear):
    """Least bytes and FLOPs: each tensor once, 64 cells times 49 supports a point, and the linear layer."""
    rows, cells, flat = FRAMES * POINTS, (2 * RADIUS + 2) ** 2, (2 * RADIUS + 1) ** 2 * SUPPORTS
    numbers = sum(
        FRAMES * h * w * c + POINTS * SUPPORTS * c + rows * (OUTPUTS if linear else flat) for h, w, c in levels
    )
    flops = sum(2 * rows * cells * SUPPORTS * c for _, _, c in levels)
    return numbers * dtype.itemsize, flops + (len(levels) * 2 * rows * flat * OUTPUTS if linear else 0)


def patches(features, coords, align_corners, padding, axis_order, depth):
    """`[B, T, N, 7, 7, C]` by grid_sample, in five dimensions with a depth of one where the repository does so."""
    B, T, height, width, C = features.shape
    steps = torch.arange(-RADIUS, RADIUS + 1, device=coords.device)
    x, y = torch.meshgrid(steps, steps, indexing="ij" if axis_order == "xy" else "xy")
    places = coords[..., None, None, :] + torch.stack([x, y], -1)
    extent = torch.tensor([width, height], device=coords.device) - int(align_corners)
    grid = (2 * places / extent - 1).flatten(0, 1).to(features.dtype)
    images = features.permute(0, 1, 4, 2, 3).reshape(B * T, C, height, width)
    if depth:
        grid = torch.cat([grid, -torch.ones_like(grid[..., :1])], -1)
        images = images.unsqueeze(2)
    else:
        grid = grid.flatten(2, 3)
    sampled = F.grid_sample(images, grid, align_corners=align_corners, padding_mode=padding)
    return sampled.reshape(B, T, C, -1, 7, 7).permute(0, 1, 3, 4, 5, 2)


def eager(features, support, coords, options, depth):
    sampled = patches(features, coords, depth=depth, **options)
    flat = torch.einsum("btnhwc,bnijc->btnhwij", sampled, support.unflatten(2, (7, 7)))
    return flat.flatten(3, 4).flatten(4, 5)


def cotracker(ours, levels, weight, bias):
    outs = []
    for features, support, coords in levels:
        if ours:
            outs.append(local_correlation_linear(features, support, coords, weight, bias, **COTRACKER))
        else:
            outs.append(F.linear(eager(features, support, coords, COTRACKER, True).flatten(-2), weight, bias))
    return tuple(outs)


def locotrack(ours, levels):
    correlate = functools.partial(local_correlation, **LOCOTRACK) if ours else lambda *x: eager(*x, LOCOTRACK, False)
    return tuple(correlate(*level) for level in levels)


def compared(compare, op, dtype, direction, call, moved, flops, device):
    """`call(ours)` is one of the two; sums of 128 channels or 2401 samples in other orders differ by some units."""
    calls = {OURS: functools.partial(call, True), EAGER: functools.partial(call, False)}
    compare(op, (FRAMES, POINTS, SUPPORTS), dtype, direction, calls, moved, flops, ulps=256)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "both"])
def test_cotracker(compare, device, backward):
    dtype = torch.float32
    levels = list(random_levels(COTRACKER_LEVELS, dtype, device, backward))
    flat = (2 * RADIUS + 1) ** 2 * SUPPORTS
    weight = (torch.randn(OUTPUTS, flat, device=device) * flat**-0.5).requires_grad_(backward)
    bias = torch.randn(OUTPUTS, device=device)
    leaves = [weight, *(x for level in levels for x in level[:2])]

    def call(ours):
        outs = cotracker(ours, levels, weight, bias)
        if not backward:
            return outs
        return torch.autograd.grad(outs, leaves, [torch.ones_like(x) for x in outs])

    moved, flops = cost(COTRACKER_LEVELS, dtype, True)
    direction = "cotracker3 + linear" + " + backward" * backward
    compared(compare, f"{OP}_linear", dtype, direction, call, moved, flops * (4 if backward else 1), device)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "both"])
def test_locotrack(compare, device, backward):
    dtype = torch.float32
    levels = list(random_levels(LOCOTRACK_LEVELS, dtype, device, backward))
    leaves = [x for level in levels for x in level[:2]]

    def call(ours):
        outs = locotrack(ours, levels)
        if not backward:
            return outs
        return torch.autograd.grad(outs, leaves, [torch.ones_like(x) for x in outs])

    moved, flops = cost(LOCOTRACK_LEVELS, dtype, False)
    direction = "locotrack" + " + backward" * backward
    compared(compare, OP, dtype, direction, call, moved, flops * (3 if backward else 1), device)


def ditracker(form, maps, supports, coords, first, second):
    """The embedding of DiTracker's two matching costs on one level: ours, the same with `local_correlation` and
    PyTorch's softmax and linear layer ("composition"), or step by step."""
    if form == OURS:
        hidden = local_correlation_linear(maps, supports, coords, *first, **COTRACKER, softmax=True)
    else:
        flat = []
        for features, support in zip(maps, supports, strict=True):
            if form == "composition":
                volume = local_correlation(features, support, coords, **COTRACKER)
            else:
                volume = eager(features, support, coords, COTRACKER, True)
            flat.append((volume * features.shape[-1] ** -0.5).softmax(-2).flatten(-2))
        hidden = F.linear(torch.cat(flat, -1), *first)
    return F.linear(F.gelu(hidden), *second)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "both"])
def test_ditracker(compare, device, backward):
    dtype, points, channels = torch.float32, DITRACKER["points"], DITRACKER["channels"]
    torch.manual_seed(0)
    height, width = DITRACKER["size"]
    tensor = lambda *shape: torch.randn(shape, device=device).requires_grad_(backward)  # noqa: E731
    maps = [tensor(1, FRAMES, height, width, channels) for _ in range(2)]
    supports = [tensor(1, points, SUPPORTS, channels) for _ in range(2)]
    coords = torch.rand(1, FRAMES, points, 2, device=device) * torch.tensor([width - 1.0, height - 1], device=device)
    flat, outputs = 2 * (2 * RADIUS + 1) ** 2 * SUPPORTS, DITRACKER["outputs"]
    sizes = ((OUTPUTS, flat), (outputs, OUTPUTS))
    layers = [[(torch.randn(o, i, device=device) * i**-0.5).requires_grad_(backward), tensor(o)] for o, i in sizes]
    leaves = [*maps, *supports, *layers[0], *layers[1]]

    def call(form):
        out = ditracker(form, maps, supports, coords, *layers)
        return torch.autograd.grad(out, leaves, torch.ones_like(out)) if backward else out

    rows, cells = FRAMES * points, (2 * RADIUS + 2) ** 2
    flops = 2 * rows * (2 * cells * SUPPORTS * channels + flat * OUTPUTS + OUTPUTS * outputs)
    moved = (sum(x.numel() for x in leaves) + rows * outputs) * dtype.itemsize
    calls = {form: functools.partial(call, form) for form in (OURS, "composition", EAGER)}
    direction = "ditracker, one level" + " + backward" * backward
    # Gradients of maps are sums of differences, which cancel.
    compare(
        f"{OP}_linear", (FRAMES, points, SUPPORTS), dtype, direction, calls, moved, flops * (4 if backward else 1), 4096
    )
