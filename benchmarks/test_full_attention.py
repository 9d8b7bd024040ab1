"""Attention of all tokens of an image to each other against PyTorch's `scaled_dot_product_attention`."""

import functools

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from tritonkern.functional._full_attention import full_attention

# [B, L, H, D]: one frame of ViT-S/14 at 64 x 64 and at 37 x 37 patches.
SHAPES = [(1, 4097, 6, 64), (1, 1370, 6, 64)]


def pytorch(query, key, value):
    return scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value))).transpose(1, 2)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward(compare, device, shape):
    if device != "cpu":
        pytest.skip("on a GPU both are the same call")
    torch.manual_seed(0)
    batch, length, heads, dim = shape
    tensors = torch.randn(batch, length, 3, heads, dim).unbind(2)  # as a projection leaves them
    calls = {
        "tritonkern": functools.partial(full_attention, *tensors, backend="cpp"),
        "PyTorch": functools.partial(pytorch, *tensors),
    }
    numbers = batch * length * heads
    with torch.no_grad():
        compare(
            "full_attention", shape, torch.float32, "forward", calls, 16 * numbers * dim, 4 * numbers * length * dim
        )
