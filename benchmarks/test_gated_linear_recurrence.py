"""TAPNext's recurrence over time against the official code's form, eager with its loop over frames, and compiled."""

import functools

import pytest
import torch
import torch.nn.functional as F

from tritonkern import gated_linear_recurrence

OURS = "tritonkern"
OP = "gated_linear_recurrence"
HEADS = 12
# [sequences, frames, channels]: TAPNext at 256 x 256 with 256 points, in clips and frame by frame.
SHAPES = [(1280, 8, 768), (1280, 24, 768), (1280, 1, 768)]


def official_form(x, conv_weight, conv_bias, weight_i, bias_i, weight_r, bias_r, decay):
    """The convolution and RGLRU of a clip."""
    rows = F.pad(x, (0, 0, 3, 0)).transpose(1, 2)
    u = F.conv1d(rows, conv_weight.t().unsqueeze(1), conv_bias, groups=x.shape[-1]).transpose(1, 2).contiguous()

    def gate(weight, bias):
        return torch.sigmoid((torch.einsum("nthi,hij->nthj", u.unflatten(-1, bias.shape), weight) + bias).flatten(-2))

    log_a = -8.0 * gate(weight_r, bias_r) * F.softplus(decay)
    a, square = torch.exp(log_a), torch.exp(2 * log_a)
    multiplier = torch.sqrt((1 - square).clamp(min=2.5e-7))  # the official gradient is bounded
    reset = (torch.arange(x.shape[1], device=x.device) == 0)[:, None]
    added = u * gate(weight_i, bias_i) * (reset + ~reset * multiplier)
    h, out = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        h = a[:, t] * h + added[:, t]
        out.append(h)
    return torch.stack(out, 1)


def inputs(shape, device):
    """x and the parameters; factors are between 0.9 and 0.999 where the gate is 1, as at the start of training."""
    torch.manual_seed(0)
    channels, width = shape[-1], shape[-1] // HEADS
    gates = [p for _ in range(2) for p in (torch.randn(HEADS, width, width) * width**-0.5, torch.randn(HEADS, width))]
    decay = torch.log(torch.expm1(-torch.log(torch.empty(channels).uniform_(0.9, 0.999)) / 8))
    tensors = (torch.randn(shape), torch.randn(4, channels) / 2, torch.randn(channels) / 2, *gates, decay)
    return [x.to(device) for x in tensors]


def cost(shape, backward):
    """Least bytes: x and the result, the gradient, x, the result and the gradient of x again; FLOPs of the products."""
    sequences, frames, channels = shape
    numbers = sequences * frames * channels
    return (6 if backward else 2) * 4 * numbers, (4 if backward else 1) * numbers * 4 * channels // HEADS


def ours(*tensors):
    return gated_linear_recurrence(*tensors)[0]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward(compare, device, shape):
    tensors = inputs(shape, device)
    calls = {
        OURS: functools.partial(ours, *tensors),
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
        OURS: functools.partial(both, ours),
        "official form, eager": functools.partial(both, official_form),
        "official form, compiled": functools.partial(both, torch.compile(official_form)),
    }
    compare(OP, shape, torch.float32, "forward + backward", calls, *cost(shape, True))
