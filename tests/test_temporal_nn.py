"""The layer against the same layer written with PyTorch's own attention."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tritonkern import TemporalWindowAttention


def official(layer, x, heads, window):
    """Chrono's `LocalAttentionLayer` on `[B, T, C]`, with a dense mask for xformers' local attention."""
    B, T, C = x.shape
    query, key, value = layer.qkv(x).reshape(B, T, 3, heads, C // heads).permute(2, 0, 3, 1, 4).unbind(0)
    query, key = layer.q_norm(query), layer.k_norm(key)
    frames = torch.arange(T)
    mask = (frames[:, None] - frames[None, :]).abs() <= window // 2
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return layer.proj(out.transpose(1, 2).reshape(B, T, C))


@pytest.mark.parametrize(("qkv_bias", "qk_norm"), [(False, False), (True, False), (True, True)])
def test_matches_the_official_layer(qkv_bias, qk_norm):
    layer = TemporalWindowAttention(64, num_heads=4, window_size=7, qkv_bias=qkv_bias, qk_norm=qk_norm).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(3, 20, 64, dtype=torch.float64, requires_grad=True)
    leaves = [x, *layer.parameters()]
    expected, actual = official(layer, x, heads=4, window=7), layer(x)
    torch.testing.assert_close(actual, expected)
    cotangent = torch.randn_like(actual)
    for mine, theirs in zip(
        torch.autograd.grad(actual, leaves, cotangent), torch.autograd.grad(expected, leaves, cotangent), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


def test_state_dict_is_the_official_one():
    shapes = {name: tuple(x.shape) for name, x in TemporalWindowAttention(128, num_heads=4).state_dict().items()}
    assert shapes == {"qkv.weight": (384, 128), "proj.weight": (128, 128), "proj.bias": (128,)}
    full = TemporalWindowAttention(128, num_heads=4, qkv_bias=True, qk_norm=True)
    assert {name: tuple(x.shape) for name, x in full.state_dict().items()} == {
        **shapes,
        "qkv.bias": (384,),
        **{f"{norm}.{kind}": (32,) for norm in ("q_norm", "k_norm") for kind in ("weight", "bias")},
    }


def test_positions_are_independent_sequences():
    layer = TemporalWindowAttention(32, num_heads=2, window_size=5)
    x = torch.randn(2, 9, 3, 32)
    torch.testing.assert_close(layer(x), torch.stack([layer(x[:, :, n]) for n in range(3)], dim=2))


def test_default_window_is_six_frames_each_side():
    layer = TemporalWindowAttention(32, num_heads=2)
    x = torch.randn(1, 20, 32)
    changed = x.clone()
    changed[:, 10] += 1
    moved = (layer(x) != layer(changed)).any(-1)[0].nonzero().flatten().tolist()
    assert moved == list(range(4, 17))


def test_video_layout_needs_no_copy():
    class Operators(TorchDispatchMode):
        names = set()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.names.add(function.__name__.split(".")[0])
            return function(*args, **(kwargs or {}))

    layer = TemporalWindowAttention(32, num_heads=2).requires_grad_(False)
    with Operators() as seen:
        layer(torch.randn(2, 9, 3, 32))
    assert "temporal_window_attention_fwd" in seen.names
    assert not seen.names & {"clone", "copy_", "_to_copy", "cat", "stack", "contiguous"}


def test_projection_dropout_acts_in_training_only():
    layer = TemporalWindowAttention(32, num_heads=2, proj_drop=0.5)
    x = torch.randn(2, 9, 32)
    assert 0.3 < (layer(x) == 0).float().mean() < 0.7
    layer.eval()
    assert (layer(x) != 0).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 65}, "dim must be a multiple of num_heads, got dim=65 and num_heads=8"),
        ({"dim": 64, "num_heads": 0}, "dim must be a multiple of num_heads"),
        ({"dim": 32}, r"multiple of 8 from 8 to 256, got 32 / 8 = 4"),
        ({"dim": 64, "attn_drop": 0.1}, "attn_drop must be 0, got 0.1"),
        ({"dim": 64, "window_size": 12}, "window must be an odd number"),
    ],
)
def test_bad_construction(arguments, message):
    with pytest.raises(ValueError, match=message):
        TemporalWindowAttention(**arguments)


@pytest.mark.parametrize("shape", [(5, 32), (1, 5, 16), (1, 2, 3, 4, 32)])
def test_bad_input(shape):
    with pytest.raises(ValueError, match=r"x must have shape \[B, T, 32\] or \[B, T, N, 32\], got"):
        TemporalWindowAttention(32, num_heads=2)(torch.randn(shape))
