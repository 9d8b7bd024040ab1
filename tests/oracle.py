"""What the tests run and compare with: native backends, the textbook loop, the eager form, the tolerance rule."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch

from tritonkern.ops import _backends


def native_backends(operation):
    """`(backend, device)` of every backend that should run on this machine; a missing one is a visible skip."""
    for backend, device in (("reference", "cpu"), ("cpp", "cpu"), ("triton", "cuda")):
        if device == "cuda" and not torch.cuda.is_available():
            continue
        obstacle = _backends.unavailable(operation, backend, torch.device(device))
        marks = [] if obstacle is None else [pytest.mark.skip(reason=f"{backend}: {obstacle.reason}")]
        yield pytest.param((backend, device), id=backend, marks=marks)


def random_inputs(*shape, dtype=torch.float32, device="cpu"):
    """query, key, value and a cotangent."""
    return [torch.randn(shape, dtype=torch.float64).to(device, dtype) for _ in range(4)]


def run_python(code, **environment):
    """Run `code` in a fresh interpreter and return what it printed; a value of None unsets a variable."""
    environment = {name: value for name, value in {**os.environ, **environment}.items() if value is not None}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def textbook(query, key, value, left, right, scale):
    """`[B, T, N, H, D]`: one query, one key at a time, as on a blackboard. Differentiable, slow."""
    B, T, N, H, _ = query.shape
    out = []
    for b in range(B):
        for t in range(T):
            for n in range(N):
                for h in range(H):
                    frames = [j for j in range(T) if t - left <= j <= t + right]
                    scores = torch.stack([scale * (query[b, t, n, h] * key[b, j, n, h]).sum() for j in frames])
                    weights = scores.softmax(0)
                    out.append(sum(weight * value[b, j, n, h] for weight, j in zip(weights, frames, strict=True)))
    return torch.stack(out).view_as(query)


def eager(query, key, value, left, right, scale):
    """What a PyTorch user writes: a dense `[T, T]` mask, softmax, two matmuls, all in the inputs' dtype."""
    query, key, value = (x.movedim(1, 3) for x in (query, key, value))  # [B, N, H, T, D]
    frames = torch.arange(query.shape[-2], device=query.device)
    distance = frames[None, :] - frames[:, None]
    scores = (query @ key.mT) * scale
    scores = scores.masked_fill((distance < -left) | (distance > right), float("-inf"))
    return (scores.softmax(-1) @ value).movedim(3, 1)


def eager_roundings(inputs, grad_out, left, right, scale):
    """Output and gradients of the eager form, four times: as is, and with frames, channels or both in reverse order.

    All four are the same mathematics with sums in another order, so together they show how large eager's rounding
    error is; a single one may be lucky on a small tensor.
    """
    for axes in ((), (1,), (-1,), (1, -1)):
        extent = (right, left) if 1 in axes else (left, right)
        flipped = [x.flip(axes) for x in inputs]
        results = gradients(lambda *x, extent=extent: eager(*x, *extent, scale), flipped, grad_out.flip(axes))
        yield [x.flip(axes) for x in results]


def gradients(function, inputs, grad_out):
    """Output and the gradients of all inputs."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad_out)]


def largest_terms(inputs, grad_out, scale):
    """Size of what the four results are sums of. A score's gradient is a difference that may cancel to nothing, so its
    rounding error is one of the terms, not of the result."""
    query, key, value = inputs
    if query.numel() == 0:
        return 0, 0, 0, 0
    score_grad = abs(scale) * torch.einsum("binhd,bjnhd->bnhij", grad_out, value).abs().max()
    return 0, score_grad * key.abs().max(), score_grad * query.abs().max(), 0


def assert_as_exact_as_eager(actual, eager_results, exact, term=0, name=""):
    """Error against the float64 reference at most twice eager PyTorch's own, plus one ulp of the largest value, plus
    one ulp of the accumulator (float32, or float64 for float64) of the largest term."""
    assert actual.shape == exact.shape
    if exact.numel() == 0:
        return
    error = (actual.double() - exact).abs().max()
    eager_error = max((result.double() - exact).abs().max() for result in eager_results)
    accumulator = torch.promote_types(actual.dtype, torch.float32)
    ulps = torch.finfo(actual.dtype).eps * exact.abs().max() + torch.finfo(accumulator).eps * term
    allowed = 2 * eager_error + ulps
    assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}, eager's {eager_error:.3e}"
