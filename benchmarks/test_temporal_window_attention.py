"""Temporal window attention against PyTorch's attention, the specialised libraries that are installed, and a copy."""

import functools
import importlib
import importlib.util

import pytest
import torch
from shapes import TEMPORAL_WINDOW_ATTENTION, TEMPORAL_WINDOW_ATTENTION_GPU, TEMPORAL_WINDOW_VIDEO, WINDOW
from torch.nn.functional import scaled_dot_product_attention

from tritonkern import temporal_window_attention

OURS = "tritonkern"
OP = "temporal_window_attention"
HALF = WINDOW // 2


def random_qkv(shape, dtype, device, requires_grad=False):
    torch.manual_seed(0)
    return [torch.randn(shape, device=device).to(dtype).requires_grad_(requires_grad) for _ in range(3)]


def cost(shape, dtype, backward):
    """Least bytes and FLOPs: q, k, v, out once each, and backward q, k, v, grad_out, dq, dk, dv as well."""
    frames, head_dim = shape[1], shape[-1]
    numel = torch.Size(shape).numel()
    pairs = sum(min(frames, i + HALF + 1) - max(0, i - HALF) for i in range(frames)) * numel // (frames * head_dim)
    tensors, products = (11, 7) if backward else (4, 2)
    return tensors * numel * dtype.itemsize, products * 2 * pairs * head_dim


@functools.cache
def band(frames, device):
    at = torch.arange(frames, device=device)
    return (at[:, None] - at[None, :]).abs() <= HALF


def ours(query, key, value):
    return temporal_window_attention(query, key, value, WINDOW)


def sdpa(query, key, value):
    views = (x.transpose(1, 2) for x in (query, key, value))
    return scaled_dot_product_attention(*views, attn_mask=band(query.shape[1], query.device)).transpose(1, 2)


def eager(query, key, value):
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    scores = (query @ key.mT) * query.shape[-1] ** -0.5
    scores = scores.masked_fill(~band(query.shape[-2], query.device), float("-inf"))
    return (scores.softmax(-1) @ value).transpose(1, 2)


@functools.cache
def _flex(frames, device):
    flex_attention = importlib.import_module("torch.nn.attention.flex_attention")
    mask = flex_attention.create_block_mask(
        lambda b, h, i, j: (i - j).abs() <= HALF, None, None, frames, frames, device=device
    )
    return torch.compile(flex_attention.flex_attention, dynamic=False), mask


def flex(query, key, value):
    attention, mask = _flex(query.shape[1], query.device.type)
    views = (x.transpose(1, 2) for x in (query, key, value))
    return attention(*views, block_mask=mask).transpose(1, 2)


def flash_attn(query, key, value):
    from flash_attn import flash_attn_func

    return flash_attn_func(query, key, value, window_size=(HALF, HALF))


def xformers(query, key, value):
    from xformers.ops import fmha, memory_efficient_attention

    mask = fmha.attn_bias.LocalAttentionFromBottomRightMask(window_left=HALF, window_right=HALF)
    return memory_efficient_attention(query, key, value, attn_bias=mask)


def peers(device, frames):
    """Those that are installed. NATTEN is none of them: it shifts its window at the borders, another function."""
    found = {"SDPA + mask": sdpa, "flex_attention compiled": flex}
    if frames <= 256:
        found["eager"] = eager
    if device == "cuda":
        libraries = {"flash_attn": flash_attn, "xformers": xformers}
        found |= {name: call for name, call in libraries.items() if importlib.util.find_spec(name)}
    return found


def shapes(device):
    return TEMPORAL_WINDOW_ATTENTION + ([TEMPORAL_WINDOW_ATTENTION_GPU] if device == "cuda" else [])


EVERY_SHAPE = pytest.mark.parametrize(
    "shape", shapes("cuda" if torch.cuda.is_available() else "cpu"), ids=lambda s: s.name
)


def main_dtype(device):
    return torch.bfloat16 if device == "cuda" else torch.float32


@EVERY_SHAPE
def test_forward(compare, device, shape):
    dtype = main_dtype(device)
    inputs = random_qkv(shape.query, dtype, device)
    calls = {OURS: functools.partial(ours, *inputs)}
    calls |= {name: functools.partial(peer, *inputs) for name, peer in peers(device, shape.query[1]).items()}
    # Two tensors read and two written: as many bytes as query, key, value and out.
    # Written before, as pages that were never written are all one page of zeros, and never leave the cache.
    source, target = (torch.ones(2, *shape.query, dtype=dtype, device=device) for _ in range(2))

    def copy():
        target.copy_(source)

    def fill():
        torch.empty(shape.query, dtype=dtype, device=device).fill_(1.0)

    calls["copy of the same bytes"] = copy
    # What whoever returns a new tensor pays at least: on a CPU its pages come from the system one by one.
    calls["a fresh result, filled"] = fill
    if device == "cpu":
        halves = [x.bfloat16() for x in inputs]
        calls["tritonkern in bfloat16"] = functools.partial(ours, *halves)
    compare(OP, shape.query, dtype, "forward", calls, *cost(shape.query, dtype, False))


@EVERY_SHAPE
def test_forward_and_backward(compare, device, shape):
    if device == "cpu" and shape.name == "long":
        pytest.skip("SDPA's backward pass at 2000 frames takes minutes")
    dtype = main_dtype(device)
    inputs = random_qkv(shape.query, dtype, device, requires_grad=True)
    grad_out = torch.randn(shape.query, device=device).to(dtype)

    def both(attention):
        out = attention(*inputs)
        return (out.detach(), *torch.autograd.grad(out, inputs, grad_out))

    calls = {OURS: lambda: both(ours)}
    calls |= {name: functools.partial(both, peer) for name, peer in peers(device, shape.query[1]).items()}
    compare(OP, shape.query, dtype, "forward + backward", calls, *cost(shape.query, dtype, True))


def test_video_layout(compare, device):
    """`[B, T, N, H, D]` as it is stored; the peer permutes and copies first, as its callers must."""
    dtype = main_dtype(device)
    inputs = random_qkv(TEMPORAL_WINDOW_VIDEO, dtype, device)

    def permuted():
        b, t, n, h, d = TEMPORAL_WINDOW_VIDEO
        rows = (x.transpose(1, 2).reshape(b * n, t, h, d) for x in inputs)
        return sdpa(*rows).reshape(b, n, t, h, d).transpose(1, 2).contiguous()

    calls = {OURS: functools.partial(ours, *inputs), "permute + SDPA + mask": permuted}
    compare(OP, TEMPORAL_WINDOW_VIDEO, dtype, "forward", calls, *cost(TEMPORAL_WINDOW_VIDEO, dtype, False))


@pytest.mark.parametrize("frames", [16, 64, 256, 1024, 4096, 16384])
def test_growth_with_frames(compare, device, frames):
    """The same number of frames in all, in longer and longer clips: a linear operation stays as fast."""
    dtype = main_dtype(device)
    shape = (16384 // frames, frames, 4, 32)
    inputs = random_qkv(shape, dtype, device)
    calls = {OURS: functools.partial(ours, *inputs)}
    if frames <= 1024:
        calls["SDPA + mask"] = functools.partial(sdpa, *inputs)
    compare(OP, shape, dtype, "forward", calls, *cost(shape, dtype, False))
