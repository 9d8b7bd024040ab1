"""TAPIR's mixing over time against the official block's form, eager and compiled."""

import functools

import pytest
import torch
import torch.nn.functional as F

from tritonkern import temporal_mixer

OURS = "tritonkern"
OP = "temporal_mixer"
# [tracks, frames, channels]: BootsTAPIR on short and on Kubric clips, its default chunk of queries, one frame online.
SHAPES = [(256, 8, 512), (256, 24, 512), (64, 24, 512), (256, 1, 512)]


def official_form(x, norm_weight, weight1, bias1, weight2, bias2):
    """The first half of PIPsConvBlock."""
    channels = x.shape[-1]
    hidden = F.layer_norm(x, (channels,), norm_weight).permute(0, 2, 1)
    hidden = F.gelu(F.conv1d(hidden, weight1, bias1, padding=1, groups=channels), approximate="tanh")
    hidden = F.conv1d(hidden, weight2, bias2, padding=1, groups=4 * channels).permute(0, 2, 1)
    return x + (hidden[..., 0::4] + hidden[..., 1::4] + hidden[..., 2::4] + hidden[..., 3::4])


def inputs(shape, device):
    """x and the parameters, of the sizes that PyTorch initialises them with."""
    torch.manual_seed(0)
    channels = shape[-1]
    first = torch.nn.Conv1d(channels, 4 * channels, 3, groups=channels)
    second = torch.nn.Conv1d(4 * channels, 4 * channels, 3, groups=4 * channels)
    parameters = (torch.rand(channels) + 0.5, *first.parameters(), *second.parameters())
    return [x.detach().to(device) for x in (torch.randn(shape), *parameters)]


def cost(shape, backward):
    """Least bytes: x and the result, gradients and x again; FLOPs with 20 for each GELU."""
    tracks, frames, channels = shape
    numbers = tracks * frames * channels
    return (5 if backward else 2) * 4 * numbers, (4 if backward else 1) * numbers * (8 + 48 + 80)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward(compare, device, shape):
    tensors = inputs(shape, device)
    calls = {
        OURS: functools.partial(temporal_mixer, *tensors),
        "official form, eager": functools.partial(official_form, *tensors),
        "official form, compiled": functools.partial(torch.compile(official_form), *tensors),
    }
    with torch.no_grad():
        compare(OP, shape, torch.float32, "forward", calls, *cost(shape, False))


@pytest.mark.parametrize("shape", SHAPES[:1], ids=str)
def test_forward_and_backward(compare, device, shape):
    tensors = [x.requires_grad_() for x in inputs(shape, device)]
    grad_out = torch.randn(shape, device=device)

    def both(function):
        out = function(*tensors)
        torch.autograd.grad(out, tensors, grad_out)
        return out.detach()

    calls = {
        OURS: functools.partial(both, temporal_mixer),
        "official form, eager": functools.partial(both, official_form),
        "official form, compiled": functools.partial(both, torch.compile(official_form)),
    }
    compare(OP, shape, torch.float32, "forward + backward", calls, *cost(shape, True))
