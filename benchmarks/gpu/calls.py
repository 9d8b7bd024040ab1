"""The calls that a run checks and times: odd small shapes for correctness, those of real models for times."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from timing import DEVICE
from torch import Tensor

import tritonkern as tk
from tritonkern.functional._adapter import adapter_in, adapter_out
from tritonkern.ops.temporal_adapter import op as adapter_op

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
EVERY = (BF16, FP16, FP32, FP64)
Call = Callable[..., object]


class Case(NamedTuple):
    """`make(shape, dtype, backend, needs_grad)` returns tensors and the call that takes them."""

    operation: str
    name: str
    make: Callable[..., tuple[list[Tensor], Call]]
    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...] = EVERY
    flops: tuple[float, float] = (0, 0)  # of matrix products: forward, forward and backward
    tiny: tuple[int, ...] = ()  # a small shape whose kernels are compiled the same, for machines without a GPU


def _random(*shape: int, dtype: torch.dtype, needs_grad: bool = False) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype).requires_grad_(needs_grad)


def window(shape, dtype, backend, needs_grad=False):
    """B, T, N, H, D"""
    tensors = [_random(*shape, dtype=dtype, needs_grad=needs_grad) for _ in range(3)]
    return tensors, lambda *x: tk.temporal_window_attention(*x, window=13, backend=backend)


def match(shape, dtype, backend, needs_grad=False, cosine=False):
    """N, T, h, w, C"""
    queries, frames, rows, columns, channels = shape
    tensors = [
        torch.nn.functional.normalize(_random(*size, dtype=FP32), dim=-1).to(dtype).requires_grad_(needs_grad)
        for size in ((1, queries, channels), (1, frames, rows, columns, channels))
    ]
    return tensors, lambda *x: tuple(tk.correlation_soft_argmax(*x, cosine=cosine, backend=backend))


def match_cosine(*arguments):
    return match(*arguments, cosine=True)


def soft_argmax(shape, dtype, backend, needs_grad=False):
    """N, T, h, w"""
    return [_random(*shape, dtype=dtype, needs_grad=needs_grad)], lambda x: tk.soft_argmax_2d(x, backend=backend)


def sample(shape, dtype, backend, needs_grad=False, splat=False):
    """T, M, h, w, H, D"""
    frames, count, rows, columns, *heads = shape
    tracked, grid = (1, frames, count, *heads), (1, frames, rows, columns, *heads)
    sizes = (grid, tracked, tracked) if splat else (tracked, grid, grid)
    tensors = [_random(*size, dtype=dtype, needs_grad=needs_grad) for size in sizes]
    extent = torch.tensor([columns, rows], device=DEVICE, dtype=FP64 if dtype == FP64 else FP32)
    tracks = torch.rand(1, frames, count, 2, device=DEVICE) * extent
    function = tk.track_splat_attention if splat else tk.track_sample_attention
    return tensors, lambda *x: function(*x, tracks.to(torch.promote_types(x[0].dtype, FP32)), backend=backend)


def splat(*arguments):
    return sample(*arguments, splat=True)


def local(shape, dtype, backend, needs_grad=False):
    """T, N, h, w, S, C"""
    frames, points, rows, columns, supports, channels = shape
    sizes = (1, frames, rows, columns, channels), (1, points, supports, channels)
    tensors = [_random(*size, dtype=dtype, needs_grad=needs_grad) for size in sizes]
    coords = torch.rand(1, frames, points, 2, device=DEVICE) * torch.tensor([columns - 1.0, rows - 1], device=DEVICE)
    return tensors, lambda *x: tk.local_correlation(*x, coords, align_corners=True, backend=backend)


def local_softmax(shape, dtype, backend, needs_grad=False):
    tensors, _ = local(shape, dtype, backend, needs_grad)
    frames, points, rows, columns, *_ = shape
    coords = torch.rand(1, frames, points, 2, device=DEVICE) * torch.tensor([columns - 1.0, rows - 1], device=DEVICE)
    return tensors, lambda *x: tk.local_correlation(*x, coords, align_corners=True, softmax=True, backend=backend)


def mixer(shape, dtype, backend, needs_grad=False):
    """B, N, T, C"""
    channels = shape[-1]
    norm = torch.rand(channels) + 0.5
    convolutions = [torch.randn(4 * channels, 1, 3) / 2, torch.randn(4 * channels) / 2]
    parameters = [norm, *convolutions, *(x.clone() / 2 for x in convolutions)]
    parameters = [x.to(DEVICE, FP64 if dtype == FP64 else FP32).requires_grad_(needs_grad) for x in parameters]
    x = _random(*shape, dtype=dtype, needs_grad=needs_grad)
    return [x, *parameters], lambda *x: tk.temporal_mixer(*x, backend=backend)


def recurrence(shape, dtype, backend, needs_grad=False):
    """B, T, N, heads, D"""
    heads, width = shape[3:]
    gates = [p for _ in range(2) for p in (torch.randn(heads, width, width) * width**-0.5, torch.randn(heads, width))]
    parameters = [torch.randn(4, heads * width) / 2, torch.randn(heads * width), *gates, torch.rand(heads * width) - 3]
    parameters = [x.to(DEVICE, FP64 if dtype == FP64 else FP32).requires_grad_(needs_grad) for x in parameters]
    x = _random(*shape[:3], heads * width, dtype=dtype, needs_grad=needs_grad)
    return [x, *parameters], lambda *x: tk.gated_linear_recurrence(*x, backend=backend)[0]


def _adapter(shape, dtype, needs_grad):
    """T, side, C, O, pool -> tokens, and a function that makes parameters."""
    frames, side, channels, *_ = shape
    tokens = _random(1, frames, 1 + side**2, channels, dtype=dtype, needs_grad=needs_grad)
    return tokens, lambda x: x.to(DEVICE, dtype).requires_grad_(needs_grad)


def adapter_first(shape, dtype, backend, needs_grad=False):
    _, side, channels, hidden, pool = shape
    tokens, parameter = _adapter(shape, dtype, needs_grad)
    weight = torch.randn(hidden, channels, 3, 3) / (9 * channels) ** 0.5
    parameters = [torch.rand(channels) + 0.5, torch.rand(channels), weight, torch.rand(hidden)]
    return [tokens, *map(parameter, parameters)], lambda x, *p: adapter_in(
        x, (side, side), *p, pool=pool, backend=backend
    )


def adapter_last(shape, dtype, backend, needs_grad=False):
    frames, side, channels, hidden, pool = shape
    tokens, parameter = _adapter(shape, dtype, needs_grad)
    of_hidden = adapter_op.hidden_dtype(tokens.device, dtype)
    image = _random(1, frames, (side // pool) ** 2, pool**2 * hidden, dtype=of_hidden).relu()
    image = image.requires_grad_(needs_grad)
    weight = torch.randn(channels, hidden, 3, 3) / (9 * hidden) ** 0.5
    tensors = [image, parameter(weight), parameter(torch.rand(channels)), tokens]
    return tensors, lambda h, w, b, x: adapter_out(h, (side, side), w, b, x, pool=pool, backend=backend)


SMALL = [
    Case("temporal_window_attention", "window", window, (2, 37, 5, 4, 32)),
    Case("temporal_window_attention", "window D 256", window, (1, 21, 2, 1, 256)),
    Case("temporal_window_attention", "window D 24", window, (3, 5, 1, 3, 24)),
    Case("correlation_soft_argmax", "match", match, (37, 3, 13, 17, 72)),
    Case("correlation_soft_argmax", "match cosine", match_cosine, (5, 2, 12, 16, 384)),
    Case("correlation_soft_argmax", "soft_argmax_2d", soft_argmax, (3, 2, 13, 22)),
    Case("track_attention", "sample", sample, (2, 40, 17, 9, 3, 64)),
    Case("track_attention", "splat", splat, (2, 40, 17, 9, 3, 64)),
    Case("local_correlation", "local", local, (2, 9, 12, 10, 49, 128)),
    Case("local_correlation", "local softmax", local_softmax, (2, 9, 12, 10, 49, 64)),
    Case("temporal_mixer", "mixer", mixer, (1, 7, 9, 72)),
    Case("gated_linear_recurrence", "recurrence", recurrence, (1, 5, 19, 2, 32)),
    Case("temporal_adapter", "adapter in", adapter_first, (3, 8, 24, 128, 4)),
    Case("temporal_adapter", "adapter out", adapter_last, (3, 8, 24, 128, 4)),
]


def _window_flops(batch, frames, positions, heads, head_dim):
    forward = 4 * batch * frames * positions * heads * head_dim * 13
    return forward, 3.5 * forward


def _real() -> list[Case]:
    window_case = lambda name, shape, dtypes, tiny: Case(  # noqa: E731
        "temporal_window_attention", name, window, shape, dtypes, _window_flops(*shape), tiny
    )
    products = lambda n, t, h, w, c: (2 * n * t * h * w * c,) * 2  # noqa: E731
    track_shape, tiny_tracks = (24, 576, 37, 37, 12, 64), (2, 64, 37, 37, 12, 64)
    conv = 2 * 9 * 24 * 64 * 64 * 384 * 128
    local_flops = 2 * 24 * 1024 * 49 * 49 * 128
    gpu, chrono = (1024, 24, 64, 64, 768), (64, 24, 64, 64, 384)
    return [
        window_case("window gpu", (4096, 64, 1, 8, 64), (BF16,), (2, 64, 1, 8, 64)),
        window_case("window chrono", (1, 24, 256, 4, 32), (BF16, FP32), (1, 24, 2, 4, 32)),
        window_case("window rgb", (1, 250, 256, 4, 32), (BF16, FP32), (1, 250, 2, 4, 32)),
        window_case("window long", (64, 2000, 1, 4, 64), (BF16,), (1, 2000, 1, 4, 64)),
        Case("correlation_soft_argmax", "match gpu", match, gpu, (BF16, FP32), products(*gpu), (16, 2, 16, 16, 768)),
        Case(
            "correlation_soft_argmax", "match chrono-s", match, chrono, (BF16, FP32), products(*chrono),
            (16, 2, 16, 16, 384),
        ),
        Case(
            "correlation_soft_argmax", "soft_argmax_2d", soft_argmax, (256, 24, 64, 64), (BF16, FP32),
            tiny=(2, 2, 64, 64),
        ),
        Case("track_attention", "sample vit-b", sample, track_shape, (BF16, FP32), tiny=tiny_tracks),
        Case("track_attention", "splat vit-b", splat, track_shape, (BF16, FP32), tiny=tiny_tracks),
        Case(
            "local_correlation", "local cotracker", local, (24, 1024, 96, 128, 49, 128), (BF16, FP32),
            (local_flops, 3 * local_flops), (2, 16, 16, 16, 49, 128),
        ),
        Case("temporal_mixer", "mixer tapir", mixer, (1, 256, 24, 512), (BF16, FP32), tiny=(1, 16, 24, 512)),
        Case(
            "gated_linear_recurrence", "recurrence tapnext", recurrence, (1, 24, 1280, 12, 64), (BF16, FP32),
            (260 * 24 * 1280 * 768, 4 * 260 * 24 * 1280 * 768), (1, 24, 16, 12, 64),
        ),
        Case(
            "temporal_adapter", "adapter in chrono-s", adapter_first, (24, 64, 384, 128, 4), (BF16,), (conv, 3 * conv),
            (2, 16, 384, 128, 4),
        ),
        Case(
            "temporal_adapter", "adapter out chrono-s", adapter_last, (24, 64, 384, 128, 4), (BF16,), (conv, 3 * conv),
            (2, 16, 384, 128, 4),
        ),
    ]  # fmt: skip


REAL = _real()


def outputs(result: object) -> list[Tensor]:
    """The floating-point results of a call."""
    result = result if isinstance(result, tuple) else (result,)
    return [x for x in result if isinstance(x, Tensor) and x.is_floating_point() and x.numel()]


def with_gradients(tensors: list[Tensor], call: Call, seed: int = 1) -> list[Tensor]:
    """Results of the call and the gradients of `tensors` for random gradients of all results, the same for a seed."""
    results = [x for x in outputs(call(*tensors)) if x.requires_grad]
    generator = torch.Generator().manual_seed(seed)
    grads = [torch.randn(x.shape, generator=generator, dtype=FP64).to(x.device, x.dtype) for x in results]
    return [*results, *torch.autograd.grad(results, [x for x in tensors if x.requires_grad], grads)]
