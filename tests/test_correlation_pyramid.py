"""`correlation_pyramid` against the correlations of all pairs of cells, sampled by `grid_sample`."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import tritonkern


def textbook(features, targets, flow, levels, radius, padding):
    (batch, rows, columns, channels), frames = features.shape, targets.shape[1]
    volume = torch.einsum("bijc,bthwc->btijhw", features, targets) / channels**0.5
    volume = volume.flatten(0, 3)[:, None]  # [B * T * h * w, 1, H, W]
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    centres = (flow + torch.stack([x, y], -1)).flatten(0, 3)[:, None, None]
    steps = torch.arange(-radius, radius + 1)
    offsets = torch.stack(torch.meshgrid(steps, steps, indexing="ij"), -1)  # the first axis moves x
    found = []
    for level in range(levels):
        size = torch.tensor(volume.shape[:-3:-1], dtype=volume.dtype)
        at = (centres / 2**level + offsets) * (2 / (size - 1).clamp(min=1)) - 1
        sampled = F.grid_sample(volume, at.to(volume.dtype), padding_mode=padding, align_corners=True)
        found.append(sampled.reshape(batch, frames, rows, columns, -1))
        if level + 1 < levels:
            volume = F.avg_pool2d(volume, 2)
    return torch.cat(found, -1)


def inputs(size=(12, 16), frames=2, channels=8, dtype=torch.float64):
    features = torch.randn(2, 5, 6, channels, dtype=dtype)
    return features, torch.randn(2, frames, *size, channels, dtype=dtype), torch.randn(2, frames, 5, 6, 2).to(dtype) * 3


@pytest.mark.parametrize("padding", ["zeros", "border"])
@pytest.mark.parametrize(("size", "levels"), [((12, 16), 3), ((13, 11), 2), ((9, 8), 1)])
def test_forward_and_backward(size, levels, padding):
    tensors = [x.requires_grad_() for x in inputs(size)]
    expected = textbook(*tensors, levels, 2, padding)
    actual = tritonkern.correlation_pyramid(*tensors, levels, 2, padding=padding)
    assert actual.shape == (2, 2, 5, 6, levels * 25)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    cotangent = torch.randn_like(expected)
    for mine, other in zip(
        torch.autograd.grad(actual, tensors, cotangent), torch.autograd.grad(expected, tensors, cotangent), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(dtype):
    exact = inputs()
    expected = textbook(*exact, 3, 4, "border")
    actual = tritonkern.correlation_pyramid(*(x.to(dtype) for x in exact[:2]), exact[2].float(), 3, 4, padding="border")
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=32 * torch.finfo(dtype).eps)


def test_all_pairs_are_never_stored():
    features, targets = torch.randn(1, 24, 24, 16), torch.randn(1, 2, 24, 24, 16)
    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for x in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(x, torch.Tensor):
                    largest = max(largest, x.numel())
            return result

    tensors = [features.requires_grad_(), targets.requires_grad_(), torch.zeros(1, 2, 24, 24, 2)]
    with Largest():
        result = tritonkern.correlation_pyramid(*tensors, 3, 2)
        result.sum().backward()
    assert largest == result.numel() < 2 * 24**4 / 4


def test_errors():
    features, targets, flow = inputs()
    for call, message in (
        ((features, targets, flow, 5), r"levels must be positive, .* got levels=5"),
        ((features, targets, flow, 0), "got levels=0"),
        ((features[0], targets, flow), "features must have 4 dimensions"),
        ((features, targets[..., 1:], flow), r"targets must be \[2, T, H, W, 8\]"),
        ((features, targets, flow[:, :1]), r"flow must be \[2, 2, 5, 6, 2\]"),
    ):
        with pytest.raises(ValueError, match=message):
            tritonkern.correlation_pyramid(*call)
    with pytest.raises(TypeError, match="flow must be float64, float32"):
        tritonkern.correlation_pyramid(features, targets, flow.long())
    with pytest.raises(TypeError, match="levels must be an int, got float"):
        tritonkern.correlation_pyramid(features, targets, flow, 2.0)
