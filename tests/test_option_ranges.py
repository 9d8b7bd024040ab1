"""Options at the ends of their ranges: finite results from finite input, or refused, on every backend."""

import math

import pytest
import torch
from oracle import native_backends

from tritonkern import (
    attention_row_statistics,
    correlation_soft_argmax,
    frame_local_attention,
    query_key_cost,
    query_key_matching,
    soft_argmax_2d,
    temporal_mixer,
    temporal_window_attention,
    track_sample_attention,
    track_splat_attention,
)
from tritonkern.functional._adapter import adapter_in
from tritonkern.functional._full_attention import full_attention

SIZES = (
    5e-324,
    1e-310,
    1e-46,
    1.1e-38,
    1.2e-38,
    1e-30,
    1e-19,
    2.0**20,
    1e19,
    2.0**64,
    1.01 * 2.0**64,
    3.4e38,
    1e39,
    1e170,
    1e300,
)
EVERY = (0.0, *SIZES, *(-size for size in SIZES), math.inf, -math.inf, math.nan)


def window(dtype, backend, scale):
    x = [torch.randn(2, 5, 3, 2, 8, dtype=dtype) for _ in range(3)]
    x[1][:, 1] = x[1][:, 2]  # two largest scores
    return x, lambda *x: temporal_window_attention(*x, 3, scale=scale, backend=backend)


def full(dtype, backend, scale):
    x = [torch.randn(2, 5, 2, 8, dtype=dtype) for _ in range(3)]
    x[1][:, 1] = x[1][:, 2]
    return x, lambda *x: full_attention(*x, scale=scale, backend=backend)


def sample(dtype, backend, **options):
    grid = torch.randn(2, 1, 2, 3, 4, 2, 8, dtype=dtype)
    x = [torch.randn(1, 2, 5, 2, 8, dtype=dtype), *grid, 4 * torch.rand(1, 2, 5, 2, dtype=torch.float64)]
    return x, lambda *x: track_sample_attention(*x, backend=backend, **options)


def splat(dtype, backend, **options):
    tracks = torch.randn(2, 1, 2, 5, 2, 8, dtype=dtype)
    x = [torch.randn(1, 2, 3, 4, 2, 8, dtype=dtype), *tracks, 4 * torch.rand(1, 2, 5, 2, dtype=torch.float64)]
    return x, lambda *x: track_splat_attention(*x, backend=backend, **options)


def sigma_tensor(dtype, backend, sigma):
    """As a tensor, whose value is not checked."""
    tensors, function = sample(dtype, backend)
    return [*tensors, torch.tensor(sigma, dtype=torch.float64)], lambda *x: track_sample_attention(
        *x[:4], sigma=x[4], backend=backend
    )


def mixer(dtype, backend, eps):
    weight, bias = torch.randn(32, 1, 3, dtype=dtype), torch.randn(32, dtype=dtype)
    x = torch.randn(2, 4, 8, dtype=dtype)
    x[0, 1] = 3  # no variance
    return [x, torch.ones(8, dtype=dtype), weight, bias, weight.flip(0), bias], lambda *x: temporal_mixer(
        *x, eps=eps, backend=backend
    )


def adapter(dtype, backend, eps):
    tokens = torch.randn(2, 2, 17, 8, dtype=dtype)
    tokens[0] = 3
    parameters = torch.randn(2, 8, dtype=dtype), torch.randn(4, 8, 3, 3, dtype=dtype), torch.randn(4, dtype=dtype)
    return [tokens, *parameters[0], *parameters[1:]], lambda *x: adapter_in(
        x[0], (4, 4), *x[1:], eps=eps, backend=backend
    )


def query_key(dtype, backend, scale):
    x = [torch.randn(1, 2, 6, 2, 8, dtype=dtype) for _ in range(2)]
    x[1][:, :, 1] = x[1][:, :, 2]

    def call(*x):
        match = query_key_matching(*x, grid=(2, 3), scale=scale, radius=1.5, backend=backend)
        cost = query_key_cost(*x, cells=None, scale=scale, backend=backend)
        return torch.cat([match.peak.flatten(), match.points.flatten(), cost.flatten()])

    return x, call


def radius(dtype, backend, radius):
    x = [torch.randn(1, 2, 6, 2, 8, dtype=dtype) for _ in range(2)]
    return x, lambda *x: query_key_matching(*x, grid=(2, 3), radius=radius, backend=backend).points


def without_gradient(function):
    """As if it had a gradient, of zero."""

    def call(*x):
        with torch.no_grad():
            made = function(*x)
        return made + sum(0 * tensor.sum() for tensor in x).to(made.dtype)

    return call


def row_statistics(dtype, backend, scale):
    x = [torch.randn(1, 5, 2, 8, dtype=dtype) for _ in range(2)]
    x[1][:, 1] = x[1][:, 2]

    def call(*x):
        return torch.stack(attention_row_statistics(*x, [(0, 2), (1, 5)], scale=scale, backend=backend))

    return x, without_gradient(call)


def frame_local(dtype, backend, scale):
    x = [torch.randn(1, 5, 2, 8, dtype=dtype) for _ in range(3)]
    x[1][:, 1] = x[1][:, 2]

    def call(*x):
        parts = (
            frame_local_attention(*x, text=1, frames=2, renormalise=flag, scale=scale, backend=backend)
            for flag in (True, False)
        )
        return torch.cat(list(parts))

    return x, without_gradient(call)


def match(dtype, backend, **options):
    query, features = torch.randn(1, 9, 16, dtype=dtype), torch.randn(1, 2, 6, 7, 16, dtype=dtype)
    features[:, :, 0, 0] = features[:, :, 1, 1]  # two best cells for some queries
    query[0, 0] = features[0, 0, 1, 1]
    query[0, 1] *= 1e-20
    return [query, features], lambda *x: correlation_soft_argmax(*x, cosine=True, backend=backend, **options)


def cost(dtype, backend, **options):
    cost = torch.randn(3, 7, 9, dtype=dtype)
    cost[0, 2, 3] = cost[0, 2, 4] = 10  # two best cells
    cost[1] = 0
    return [cost], lambda cost: soft_argmax_2d(cost, backend=backend, **options)


def within_scale(dtype, scale):
    return abs(scale) <= 2.0**64


def within_smaller_scale(dtype, scale):
    return abs(scale) <= 2.0**20


def within_floats(dtype, x):
    return 1.2e-38 <= x <= 1e30


def normal(dtype, eps):
    return eps >= torch.finfo(torch.promote_types(dtype, torch.float32)).tiny


# Name -> (operation, a call, its option, what is accepted)
CASES = {
    "temporal_window_attention": ("temporal_window_attention", window, "scale", within_scale),
    "full_attention": ("full_attention", full, "scale", within_smaller_scale),
    "track_sample_attention-scale": ("track_attention", sample, "scale", within_scale),
    "track_splat_attention-scale": ("track_attention", splat, "scale", within_scale),
    "track_sample_attention-sigma": ("track_attention", sample, "sigma", lambda dtype, sigma: sigma > 0),
    "track_splat_attention-sigma": ("track_attention", splat, "sigma", lambda dtype, sigma: sigma > 0),
    "sigma-tensor": ("track_attention", sigma_tensor, "sigma", lambda dtype, sigma: True),
    "query_key_matching-scale": ("query_key_matching", query_key, "scale", within_scale),
    "query_key_matching-radius": ("query_key_matching", radius, "radius", lambda dtype, radius: radius > 0),
    "attention_row_statistics": ("query_key_matching", row_statistics, "scale", within_scale),
    "frame_local_attention": ("query_key_matching", frame_local, "scale", within_scale),
    "temporal_mixer": ("temporal_mixer", mixer, "eps", normal),
    "adapter_in": ("temporal_adapter", adapter, "eps", normal),
    "correlation-temperature": ("correlation_soft_argmax", match, "temperature", within_floats),
    "correlation-radius": ("correlation_soft_argmax", match, "radius", lambda dtype, radius: radius >= 1.2e-38),
    "correlation-eps": ("correlation_soft_argmax", match, "eps", within_floats),
    "soft_argmax-temperature": ("correlation_soft_argmax", cost, "temperature", within_floats),
    "soft_argmax-radius": ("correlation_soft_argmax", cost, "radius", lambda dtype, radius: radius >= 1.2e-38),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("name", "where"),
    [
        pytest.param(name, where.values[0], id=f"{name}-{where.values[0][0]}", marks=where.marks)
        for name, case in CASES.items()
        for where in native_backends(case[0])
        if where.values[0][1] == "cpu" or case[0] != "full_attention"  # which has no Triton kernel
    ],
)
def test_finite_or_refused(name, where, dtype):
    _, case, option, accepted = CASES[name]
    backend, device = where
    faults = []
    for size in EVERY:
        if option == "sigma" and name == "sigma-tensor" and math.isnan(size):
            continue  # not finite input
        torch.manual_seed(0)
        tensors, function = case(dtype, backend, **{option: size})
        leaves = [x.to(device).requires_grad_() for x in tensors]
        try:
            out = function(*leaves)
        except ValueError as error:
            if accepted(dtype, size) or option not in str(error):
                faults.append(f"{size}: {error}")
            continue
        if not accepted(dtype, size):
            faults.append(f"{size}: accepted")
            continue
        outputs = [out] if isinstance(out, torch.Tensor) else list(out)
        results = [*outputs, *torch.autograd.grad(outputs, leaves, [torch.randn_like(x) for x in outputs])]
        wrong = [index for index, x in enumerate(results) if not x.isfinite().all()]
        if wrong:
            faults.append(f"{size}: results {wrong} are not finite")
    assert not faults, "\n".join(faults)
