"""Chrono's temporal adapter against its official form, eager and compiled, and against the convolutions alone."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tritonkern import temporal_block, temporal_window_attention
from tritonkern.nn import TemporalAdapter

OURS = "tritonkern"
OP = "temporal_adapter"
HIDDEN = 128
# [T, 1 + h * w, C]: Chrono-S and Chrono-B on Kubric clips (64 x 64 tokens), and a clip of DAVIS in Chrono-S.
SHAPES = [(24, 64, 384), (24, 64, 768), (48, 64, 384)]
# [B, T, N, hidden]: the transformer block in the middle of these adapters, and that of a clip of TAP-Vid RGB-Stacking.
BLOCK_SHAPES = [(1, 24, 256, HIDDEN), (1, 250, 256, HIDDEN)]
HEADS, WINDOW = 4, 13


class Official(nn.Module):
    """The form of Chrono's adapter and of the hook that runs it, as plain modules around the same parameters."""

    def __init__(self, adapter, side):
        super().__init__()
        self.parts, self.side = adapter, side

    def forward(self, tokens):
        parts, side = self.parts, self.side
        frames, length, channels = tokens.shape
        prefix = length - side**2
        x = tokens[:, prefix:].unflatten(1, (side, side)).permute(3, 0, 1, 2)[None]
        x = parts.norm(x)
        x = F.relu(parts.conv1(x[0].transpose(0, 1)))
        x = F.relu(parts.conv_pool(x))
        rows, columns = x.shape[-2:]
        x = x.permute(2, 3, 0, 1).flatten(0, 1)  # [N, T, hidden]
        attention = parts.attn_temp
        qkv = attention.qkv(parts.norm2(x)).unflatten(-1, (3, attention.num_heads, attention.head_dim))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        at = torch.arange(frames, device=x.device)
        band = (at[:, None] - at[None, :]).abs() <= attention.window[0]
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=band)
        x = x + attention.proj(attended.transpose(1, 2).flatten(-2))
        x = x.unflatten(0, (rows, columns)).permute(2, 3, 0, 1)
        x = parts.conv2(F.relu(parts.conv_upsample(x)))
        update = x.flatten(2).transpose(1, 2)
        return tokens + torch.cat([torch.zeros_like(tokens[:, :prefix]), update], dim=1)


def make(side, channels, dtype, device):
    torch.manual_seed(0)
    adapter = TemporalAdapter(channels, HIDDEN)
    nn.init.normal_(adapter.conv2.weight, std=0.02)
    adapter = adapter.to(device, dtype)
    return adapter, Official(copy.deepcopy(adapter), side)


def ours(adapter, side, tokens):
    return adapter.add_to(tokens[None], (side, side))[0]


def cost(shape, dtype, backward):
    """Least bytes, and the FLOPs of direct convolutions; backward repeats every product twice."""
    frames, side, channels = shape
    pixels = frames * side**2
    convolutions = 2 * 2 * pixels * 9 * channels * HIDDEN
    flops = convolutions + 2 * 2 * pixels * HIDDEN**2 + 2 * pixels // 16 * 4 * HIDDEN**2
    tensors = 3 if not backward else 8
    return tensors * pixels * channels * dtype.itemsize, flops * (3 if backward else 1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward(compare, device, shape):
    frames, side, channels = shape
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    adapter, official = make(side, channels, dtype, device)
    tokens = torch.randn(frames, 1 + side**2, channels, device=device).to(dtype)
    image = tokens[:, 1:].unflatten(1, (side, side)).movedim(-1, 1)
    hidden = torch.randn(frames, side, side, HIDDEN, device=device).to(dtype).movedim(-1, 1)

    def convolutions():
        adapter.conv1(image), adapter.conv2(hidden)

    calls = {
        OURS: functools.partial(ours, adapter, side, tokens),
        "official form, eager": functools.partial(official, tokens),
        "official form, compiled": functools.partial(torch.compile(official), tokens),
        "the two 3x3 convolutions": convolutions,
    }
    if device == "cpu":
        half, half_official = make(side, channels, torch.bfloat16, device)
        calls["tritonkern in bfloat16"] = functools.partial(ours, half, side, tokens.bfloat16())
        if torch.ops.mkldnn._is_mkldnn_bf16_supported():  # elsewhere one call takes minutes
            calls["eager in bfloat16"] = functools.partial(half_official, tokens.bfloat16())
    with torch.no_grad():
        compare(OP, shape, dtype, "forward", calls, *cost(shape, dtype, False), {"official form, eager": 1.8})


@pytest.mark.parametrize("shape", SHAPES[:1], ids=str)
def test_forward_and_backward(compare, device, shape):
    frames, side, channels = shape
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    adapter, official = make(side, channels, dtype, device)
    tokens = torch.randn(frames, 1 + side**2, channels, device=device).to(dtype).requires_grad_()
    grad_out = torch.randn_like(tokens)

    def both(function, parameters):
        out = function(tokens)
        # Gradients alone cannot agree to the last digits: a hidden value within rounding of 0 passes one ReLU only.
        torch.autograd.grad(out, [tokens, *parameters], grad_out)
        return out.detach()

    compiled = torch.compile(official)
    mine, theirs = list(adapter.parameters()), list(official.parameters())
    calls = {
        OURS: lambda: both(functools.partial(ours, adapter, side), mine),
        "official form, eager": lambda: both(official, theirs),
        "official form, compiled": lambda: both(compiled, theirs),
    }
    compare(OP, shape, dtype, "forward + backward", calls, *cost(shape, dtype, True), {"official form, eager": 1.7})


def attended_by_a_mask(query, key, value):
    """`[B, T, N, H, D]` through PyTorch's attention with a mask over time."""
    at = torch.arange(query.shape[1], device=query.device)
    band = (at[:, None] - at[None, :]).abs() <= WINDOW // 2
    query, key, value = (x.permute(0, 2, 3, 1, 4) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=band).permute(0, 3, 1, 2, 4)


def steps(x, norm_weight, norm_bias, qkv_weight, qkv_bias, proj_weight, proj_bias, attend):
    normed = F.layer_norm(x, norm_weight.shape, norm_weight, norm_bias)
    qkv = F.linear(normed, qkv_weight, qkv_bias).unflatten(-1, (3, HEADS, -1))
    return x + F.linear(attend(*qkv.unbind(-3)).flatten(-2), proj_weight, proj_bias)


def block_case(shape, device):
    """The calls of the block, its tensors, and the bytes and FLOPs of a forward pass."""
    dtype, channels = torch.bfloat16 if device == "cuda" else torch.float32, shape[-1]
    sizes = [shape, (channels,), (channels,), (3 * channels, channels), (3 * channels,)]
    tensors = [torch.randn(size, device=device) for size in [*sizes, (channels, channels), (channels,)]]
    tensors = [x.mul_(channels**-0.5 if x.dim() == 2 else 1).to(dtype) for x in tensors]
    ours = functools.partial(temporal_window_attention, window=WINDOW)
    calls = {
        OURS: lambda *x: temporal_block(*x, HEADS, WINDOW),
        "steps, SDPA with a mask": functools.partial(steps, attend=attended_by_a_mask),
        "steps, our attention": functools.partial(steps, attend=ours),
    }
    rows = tensors[0].numel() // channels
    return calls, tensors, 2 * tensors[0].nbytes, rows * (8 * channels**2 + 4 * channels * WINDOW)


@pytest.mark.parametrize("shape", BLOCK_SHAPES, ids=str)
def test_block_forward(compare, device, shape):
    calls, tensors, moved, flops = block_case(shape, device)
    calls = {name: functools.partial(call, *tensors) for name, call in calls.items()}
    with torch.no_grad():
        compare("temporal_block", shape, tensors[0].dtype, "forward", calls, moved, flops)


@pytest.mark.parametrize("shape", BLOCK_SHAPES[:1], ids=str)
def test_block_forward_and_backward(compare, device, shape):
    calls, tensors, moved, flops = block_case(shape, device)
    tensors = [x.requires_grad_() for x in tensors]
    grad_out = torch.randn_like(tensors[0])

    def both(call):
        out = call(*tensors)
        return out.detach(), *torch.autograd.grad(out, tensors, grad_out)

    calls = {name: functools.partial(both, call) for name, call in calls.items()}
    # Parameters' gradients are sums over thousands of rows, in another order.
    compare("temporal_block", shape, tensors[0].dtype, "forward + backward", calls, 2 * moved, 3 * flops, ulps=256)
