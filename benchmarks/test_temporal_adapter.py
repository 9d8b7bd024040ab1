"""Chrono's temporal adapter against its official form, eager and compiled, and against the convolutions alone."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tritonkern.nn import TemporalAdapter

OURS = "tritonkern"
OP = "temporal_adapter"
HIDDEN = 128
# [T, 1 + h * w, C]: Chrono-S and Chrono-B on Kubric clips (64 x 64 tokens), and a clip of DAVIS in Chrono-S.
SHAPES = [(24, 64, 384), (24, 64, 768), (48, 64, 384)]
# [B, T, N, hidden]: the transformer block in the middle of these adapters, and that of a clip of TAP-Vid RGB-Stacking.


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
        compare(OP, shape, dtype, "forward", calls, *cost(shape, dtype, False))


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
    compare(OP, shape, dtype, "forward + backward", calls, *cost(shape, dtype, True))
