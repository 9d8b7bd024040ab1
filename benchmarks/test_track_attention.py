"""Track attention, both directions, against PyTorch's attention with the bias stored, and flex_attention."""

import functools
import importlib
import math

import pytest
import torch
from shapes import TRACK_ATTENTION, TRACK_ATTENTION_DENSE
from torch.nn.functional import scaled_dot_product_attention

from tritonkern import Tracktention, track_sample_attention, track_splat_attention
from tritonkern.models import DINOv2

OURS = "tritonkern"
OP = "track_attention"
SIGMA = 0.5
# Cells of a track whose weight the norms do not rule out: normal queries and keys of 64 channels, float32.
NEIGHBOURS = 54

BOTH = pytest.mark.parametrize("splat", [False, True], ids=["sample", "splat"])
EVERY_SHAPE = pytest.mark.parametrize("shape", TRACK_ATTENTION, ids=lambda s: s.name)


def random_inputs(shape, splat, dtype, device, requires_grad=False):
    """Queries and keys as LayerNorm leaves them, tracks all over the grid."""
    torch.manual_seed(0)
    of_tracks = (1, shape.frames, shape.tracks, shape.heads, shape.head_dim)
    of_grid = (1, shape.frames, *shape.grid, shape.heads, shape.head_dim)
    sizes = (of_grid, of_tracks, of_tracks) if splat else (of_tracks, of_grid, of_grid)
    inputs = [torch.randn(size, device=device).to(dtype).requires_grad_(requires_grad) for size in sizes]
    height, width = shape.grid
    extent = torch.tensor([width, height], device=device)
    return inputs, torch.rand(1, shape.frames, shape.tracks, 2, device=device) * extent


def cost(shape, dtype, backward):
    """Least bytes and FLOPs: each tensor once, and the products of the pairs that are near each other."""
    channels = shape.heads * shape.head_dim
    cells = math.prod(shape.grid)
    tensors = 2 * (shape.tracks + cells) * (3 if backward else 1)  # query and out, key and value; and gradients
    pairs = shape.frames * shape.tracks * NEIGHBOURS
    return shape.frames * tensors * channels * dtype.itemsize, (14 if backward else 4) * pairs * channels


def ours(splat, query, key, value, tracks):
    return (track_splat_attention if splat else track_sample_attention)(query, key, value, tracks, sigma=SIGMA)


def cells_of(grid, device):
    y, x = torch.meshgrid(*(torch.arange(n, device=device) + 0.5 for n in grid), indexing="ij")
    return torch.stack([x, y], -1).flatten(0, 1)


def frames_first(x):
    """`[1, T, ..., H, D]` -> `[T, H, rows, D]`"""
    return x.flatten(2, -3)[0].transpose(1, 2)


def eager(splat, query, key, value, tracks):
    cells = cells_of((query if splat else key).shape[2:4], tracks.device)
    bias = (tracks[0, :, :, None] - cells).square().sum(-1) / (-2 * SIGMA**2)
    bias = (bias.mT if splat else bias)[:, None].to(query.dtype)
    rows = scaled_dot_product_attention(*map(frames_first, (query, key, value)), attn_mask=bias)
    return rows.transpose(1, 2).reshape(query.shape)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    """Beyond eight kinds of inputs flex_attention would run uncompiled: those of other tests must not count."""
    torch.compiler.reset()


@functools.cache
def compiled_flex():
    flex_attention = importlib.import_module("torch.nn.attention.flex_attention")
    return torch.compile(flex_attention.flex_attention, dynamic=False)


def flex(splat, query, key, value, tracks):
    cells = cells_of((query if splat else key).shape[2:4], tracks.device)

    def near(score, frame, head, row, column):
        track, cell = (column, row) if splat else (row, column)
        dx, dy = (tracks[0, frame, track, i] - cells[cell, i] for i in range(2))
        return score - (dx * dx + dy * dy) / (2 * SIGMA**2)

    rows = compiled_flex()(*map(frames_first, (query, key, value)), score_mod=near)
    return rows.transpose(1, 2).reshape(query.shape)


def peers():
    """On a CPU flex_attention has no backward pass; the table says so."""
    return {"SDPA + stored bias": eager, "flex_attention compiled": flex}


def main_dtype(device):
    return torch.bfloat16 if device == "cuda" else torch.float32


@BOTH
@EVERY_SHAPE
def test_forward(compare, device, shape, splat):
    dtype = main_dtype(device)
    inputs, tracks = random_inputs(shape, splat, dtype, device)
    calls = {OURS: functools.partial(ours, splat, *inputs, tracks)}
    calls |= {name: functools.partial(peer, splat, *inputs, tracks) for name, peer in peers().items()}
    direction = "splat" if splat else "sample"
    compare(OP, shape.size, dtype, direction, calls, *cost(shape, dtype, False))


@BOTH
@EVERY_SHAPE
def test_forward_and_backward(compare, device, shape, splat):
    dtype = main_dtype(device)
    inputs, tracks = random_inputs(shape, splat, dtype, device, requires_grad=True)
    grad_out = torch.randn_like(inputs[0])

    def both(attention):
        out = attention(splat, *inputs, tracks)
        return (out.detach(), *torch.autograd.grad(out, inputs, grad_out))

    calls = {OURS: functools.partial(both, ours)}
    calls |= {name: functools.partial(both, peer) for name, peer in peers().items()}
    direction = "splat + backward" if splat else "sample + backward"
    compare(OP, shape.size, dtype, direction, calls, *cost(shape, dtype, True))


GROWTH = [TRACK_ATTENTION_DENSE._replace(tracks=tracks) for tracks in (144, 576, 2304, 4096)]
GROWTH += [TRACK_ATTENTION_DENSE._replace(tracks=576, grid=(side, side)) for side in (16, 32, 96, 128)]


@BOTH
@pytest.mark.parametrize("shape", GROWTH, ids=lambda s: f"{s.tracks} tracks, {s.grid[0]} x {s.grid[1]} cells")
def test_growth(compare, device, splat, shape):
    """Up to a track a cell, and 28 cells a track: cost follows the pairs that are near each other."""
    dtype = main_dtype(device)
    inputs, places = random_inputs(shape, splat, dtype, device)
    calls = {OURS: functools.partial(ours, splat, *inputs, places)}
    calls |= {name: functools.partial(peer, splat, *inputs, places) for name, peer in peers().items()}
    direction = "splat" if splat else "sample"
    # Of a few tracks the nearest may be far: SDPA then adds biases of -100 and more to its scores, and rounds.
    compare(OP, shape.size, dtype, direction, calls, *cost(shape, dtype, False), ulps=64)


def test_layer_beside_a_block(compare, device):
    """One Tracktention layer against a block of the ViT-B that it is inserted into.

    It adds 100 / (12 ratio) percent to the time of the 12 blocks.
    """
    dtype, shape = main_dtype(device), TRACK_ATTENTION[0]
    if device == "cpu":
        shape = shape._replace(frames=4)
    dim, cells = shape.heads * shape.head_dim, math.prod(shape.grid)
    layer = Tracktention(dim, shape.heads).to(device, dtype)
    block = DINOv2("vitb14").blocks[0].to(device, dtype)
    features = torch.randn(1, shape.frames, *shape.grid, dim, device=device, dtype=dtype)
    tracks = torch.rand(1, shape.frames, shape.tracks, 2, device=device) * shape.grid[0]
    tokens = features[0].flatten(1, 2)
    # Linear layers of the layer: three on cells, 27 times C^2 on tracks. A block has 12 on cells, and attention.
    flops = 2 * shape.frames * dim**2 * (3 * cells + 27 * shape.tracks)
    # Two different things: nothing to compare but the time.
    calls = {OURS: lambda: (layer(features, tracks), None)[1], "a ViT-B block": lambda: (block(tokens), None)[1]}
    with torch.no_grad():
        compare("tracktention", shape.size, dtype, "forward", calls, 0, flops)
