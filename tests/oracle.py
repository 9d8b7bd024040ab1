"""What the tests compare with: the textbook loop, the eager form, and the tolerance rule."""

import torch


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


def gradients(function, inputs, grad_out):
    """Output and the gradients of all inputs."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad_out)]


def assert_as_exact_as_eager(actual, eager_result, exact, name=""):
    """Error against the float64 reference at most twice eager PyTorch's own, plus one ulp of the largest value."""
    exact = exact.double()
    if exact.numel() == 0:
        assert actual.shape == exact.shape
        return
    error = (actual.double() - exact).abs().max()
    allowed = 2 * (eager_result.double() - exact).abs().max() + torch.finfo(actual.dtype).eps * exact.abs().max()
    assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"
