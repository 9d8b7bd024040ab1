"""What the tests run and compare with: native backends, textbook loops, eager forms, the tolerance rule."""

import itertools
import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

from tritonkern.ops import _backends

CACHE = Path(__file__).parents[1] / "build" / "test-cache"
"""What slow tests compile is kept here for the next run; its names depend on what it is compiled from."""


def native_backends(operation):
    """`(backend, device)` of every backend that should run on this machine; a missing one is a visible skip.

    In Triton's interpreter, which the environment chooses for a whole process, Triton's tensors are on the CPU.
    """
    of_triton = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
    for backend, device in (("reference", "cpu"), ("cpp", "cpu"), ("triton", of_triton)):
        if device == "cuda" and not torch.cuda.is_available():
            continue
        obstacle = _backends.unavailable(operation, backend, torch.device(device))
        marks = [] if obstacle is None else [pytest.mark.skip(reason=f"{backend}: {obstacle.reason}")]
        yield pytest.param((backend, device), id=backend, marks=marks)


def fast_backends(operation):
    """As `native_backends`, without the reference: the textbook loop and one gradcheck are what tests that."""
    return [where for where in native_backends(operation) if where.values[0][0] != "reference"]


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


def textbook(query, key, value, left, right, scale, query_offset=0):
    """`[B, T or S, N, H, D]`: one query, one key at a time, as on a blackboard. Differentiable, slow."""
    B, T, N, H, _ = query.shape
    out = []
    for b in range(B):
        for t in range(T):
            for n in range(N):
                for h in range(H):
                    frames = [j for j in range(key.shape[1]) if -left <= j - t - query_offset <= right]
                    scores = torch.stack([scale * (query[b, t, n, h] * key[b, j, n, h]).sum() for j in frames])
                    weights = scores.softmax(0)
                    out.append(sum(weight * value[b, j, n, h] for weight, j in zip(weights, frames, strict=True)))
    return torch.stack(out).view_as(query)


def eager(query, key, value, left, right, scale, query_offset=0):
    """What a PyTorch user writes: a dense `[T, S]` mask, softmax, two matmuls, all in the inputs' dtype."""
    query, key, value = (x.movedim(1, 3) for x in (query, key, value))  # [B, N, H, T, D]
    frames, keys = (torch.arange(x.shape[-2], device=query.device) for x in (query, key))
    distance = keys[None, :] - frames[:, None] - query_offset
    scores = (query @ key.mT) * scale
    scores = scores.masked_fill((distance < -left) | (distance > right), float("-inf"))
    return (scores.softmax(-1) @ value).movedim(3, 1)


def eager_roundings(inputs, grad_out, left, right, scale, query_offset=0):
    """Output and gradients of the eager form, four times: as is, and with frames, channels or both in reverse order.

    All four are the same mathematics with sums in another order, so together they show how large eager's rounding
    error is; a single one may be lucky on a small tensor.
    """
    for axes in ((), (1,), (-1,), (1, -1)):
        call = left, right, scale, query_offset
        if 1 in axes:
            call = right, left, scale, inputs[1].shape[1] - inputs[0].shape[1] - query_offset
        flipped = [x.flip(axes) for x in inputs]
        results = gradients(lambda *x, call=call: eager(*x, *call), flipped, grad_out.flip(axes))
        yield [x.flip(axes) for x in results]


def match_textbook(query, features, temperature, radius, cosine=False, eps=1e-6):
    """Points, mean, max and min of the correlation with soft-argmax, one cell at a time. Differentiable, slow."""
    results = []
    for b in range(query.shape[0]):
        for n in range(query.shape[1]):
            for t in range(features.shape[1]):
                cost = {}
                for row in range(features.shape[2]):
                    for column in range(features.shape[3]):
                        q, f = query[b, n], features[b, t, row, column]
                        if cosine:
                            q = q / q.square().sum().clamp(min=eps).sqrt()
                            f = f / f.square().sum().clamp(min=eps).sqrt()
                        cost[row, column] = (q * f).sum()
                results.append(torch.stack([*soft_argmax_textbook(cost, temperature, radius), *_statistics(cost)]))
    results = torch.stack(results).view(*query.shape[:2], features.shape[1], 5)
    return results[..., :2], *results[..., 2:].unbind(-1)


def soft_argmax_textbook(cost, temperature, radius):
    """x and y from a dictionary (row, column) -> cost, in reading order."""
    best = max(cost, key=cost.get)  # the first of several
    near = [cell for cell in cost if math.dist(cell, best) < radius]
    weights = [torch.exp(temperature * (cost[cell] - cost[best].detach())) for cell in near]
    x = sum(weight * (column + 0.5) for weight, (_, column) in zip(weights, near, strict=True))
    y = sum(weight * (row + 0.5) for weight, (row, _) in zip(weights, near, strict=True))
    return x / sum(weights), y / sum(weights)


def _statistics(cost):
    return sum(cost.values()) / len(cost), cost[max(cost, key=cost.get)], cost[min(cost, key=cost.get)]


def match_cost(query, features, cosine=False, eps=1e-6):
    """The cost volume `[B, N, T, h, w]` as a PyTorch user writes it."""
    if cosine:
        query, features = (x / x.square().sum(-1, keepdim=True).clamp(min=eps).sqrt() for x in (query, features))
    return torch.einsum("bnc,bthwc->bnthw", query, features)


def match_eager(cost, temperature, radius, best=None, worst=None):
    """Points, mean, max and min as the official code computes them, in the dtype of the cost volume `[..., h, w]`.

    best, worst: flat cells `[...]` to take for the extremal ones, so that gradients of one choice can be compared.
    """
    rows, columns = cost.shape[-2:]
    probability = (cost * temperature).flatten(-2).softmax(-1)
    best = probability.argmax(-1) if best is None else best.long()
    y, x = (torch.arange(n, device=cost.device) for n in (rows, columns))
    squared = (y[:, None] - (best // columns)[..., None, None]) ** 2 + (x - (best % columns)[..., None, None]) ** 2
    kept = probability.unflatten(-1, (rows, columns)) * (squared < radius * radius)
    centres = torch.stack(torch.broadcast_tensors(x + 0.5, y[:, None] + 0.5), -1).to(cost.dtype)
    points = (kept[..., None] * centres).sum((-3, -2)) / kept.sum((-2, -1)).clamp(min=1e-12)[..., None]
    if worst is None:
        return points, cost.mean((-2, -1)), cost.amax((-2, -1)), cost.amin((-2, -1))
    maximum, minimum = (cost.flatten(-2).gather(-1, cell.long()[..., None])[..., 0] for cell in (best, worst))
    return points, cost.mean((-2, -1)), maximum, minimum


class peak_memory:
    """Peak of the memory in use above what was in use before."""

    def __init__(self, device):
        self.device = device

    def __enter__(self):
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")  # resets VmHWM
        self.before = self.now()
        return self

    def __exit__(self, *_):
        self.mebibytes = (self.now() - self.before) / 2**20

    def now(self):
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated()
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


def growth(prepare, measured):
    """Mebibytes by which the peak of a fresh process grows while it runs `measured`, after `prepare`."""
    lines = textwrap.indent(textwrap.dedent(measured), "    ")
    code = f"from oracle import peak_memory\n{textwrap.dedent(prepare)}\nwith peak_memory('cpu') as peak:\n{lines}\n"
    return float(run_python(f"{code}print(peak.mebibytes)", PYTHONPATH=os.path.dirname(__file__)).split()[-1])


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


def track_textbook(query, key, value, tracks, sigma, *, scale, visible, splat, order=()):
    """Attention between tracks and grid as the paper writes it, frame by frame, over the visible tracks alone, in the
    inputs' dtype: every distance, every weight. `order`: axes along which sums run backwards (1 rows and columns, -1
    channels).
    """
    rows, columns = (query if splat else key).shape[2:4]
    y, x = torch.meshgrid(*(torch.arange(n, device=tracks.device) + 0.5 for n in (rows, columns)), indexing="ij")
    cells = torch.stack([x, y], -1).flatten(0, 1).to(tracks.dtype)
    frames = []
    for index in itertools.product(*map(range, query.shape[:2])):
        seen = visible[index].nonzero()[:, 0]
        points = tracks[index][seen]
        q = query[index].flatten(0, 1) if splat else query[index][seen]
        k, v = (x[index][seen] if splat else x[index].flatten(0, 1) for x in (key, value))
        place, other = (cells, points) if splat else (points, cells)
        if len(k) == 0 or len(q) == 0:
            frames.append(torch.zeros_like(query[index]))
            continue
        if 1 in order:
            q, k, v, place, other = (x.flip(0) for x in (q, k, v, place, other))
        if -1 in order:
            q, k = q.flip(-1), k.flip(-1)
        bias = -(place[:, None] - other).square().sum(-1) / (2 * sigma * sigma)
        weights = (scale * torch.einsum("ihd,jhd->ihj", q, k) + bias[:, None].to(q.dtype)).softmax(-1)
        out = torch.einsum("ihj,jhd->ihd", weights, v)
        out = out.flip(0) if 1 in order else out
        empty = torch.zeros_like(query[index])
        frames.append(out.view_as(empty) if splat else empty.index_copy(0, seen, out))
    return torch.stack(frames).view_as(query) if frames else torch.zeros_like(query)


def track_exact(query, key, value, tracks, sigma, grad_out, *, scale, visible, splat):
    """Output, its gradients (query, key, value, tracks, sigma) and the size of what each is a sum of, all float64.

    The same dense formula in NumPy, in long double where float64 itself is judged, and differentiated by hand. Sizes
    are those of the largest terms, and a score's gradient is the difference of two sums over channels. For tracks and
    sigma, whose few numbers are sums over whole neighbourhoods, they are the sum of the terms' sizes.
    """
    wide = np.longdouble if query.dtype == torch.float64 else np.float64
    query, key, value, tracks, sigma, grad_out = (
        x.detach().cpu().double().numpy().astype(wide) for x in (query, key, value, tracks, sigma, grad_out)
    )
    rows, columns = (query if splat else key).shape[2:4]
    cells = np.stack(np.meshgrid(np.arange(columns), np.arange(rows)), -1).reshape(-1, 2) + wide(0.5)
    results = [np.zeros_like(x) for x in (query, query, key, value, tracks, sigma)]
    terms = [wide(0)] * 6
    channels = query.shape[-2:]
    for index in itertools.product(*map(range, query.shape[:2])):
        seen = visible[index].cpu().numpy()
        q, g, k, v = (x[index] for x in (query, grad_out, key, value))
        q, g, k, v = (q, g, k[seen], v[seen]) if splat else (q[seen], g[seen], k, v)
        if not (q.size and k.size):
            continue
        q, g, k, v = (x.reshape(-1, *channels) for x in (q, g, k, v))
        points = tracks[index][seen]
        offset = (cells[:, None] - points) if splat else (points[:, None] - cells)  # [rows, columns, 2]
        squared = np.square(offset).sum(-1)
        squared -= squared.min(-1, keepdims=True)
        scores = scale * np.einsum("ihd,jhd->ihj", q, k) - (squared / (2 * sigma * sigma))[:, None]
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        out = np.einsum("ihj,jhd->ihd", weights, v)
        grad_weights = np.einsum("ihd,jhd->ihj", g, v)
        mean = (weights * grad_weights).sum(-1, keepdims=True)
        grad_scores = weights * (grad_weights - mean)
        size = np.einsum("ihd,jhd->ihj", abs(g), abs(v))
        size = weights * (size + (weights * size).sum(-1, keepdims=True))
        grad_offset = grad_scores.sum(1)[..., None] * offset / sigma**2
        grads = (
            out,
            scale * np.einsum("ihj,jhd->ihd", grad_scores, k),
            scale * np.einsum("ihj,ihd->jhd", grad_scores, q),
            np.einsum("ihj,ihd->jhd", weights, g),
            grad_offset.sum(0) if splat else -grad_offset.sum(1),
        )
        of_tracks = (False, False, True, True, True) if splat else (True, True, False, False, True)
        for whole, part, tracked in zip(results, grads, of_tracks, strict=False):
            if tracked:
                whole[index][seen] = part
            else:
                whole[index] = part.reshape(whole[index].shape)
        by_sigma = squared[:, None] / sigma**3
        results[5] += (grad_scores * by_sigma).sum()
        score = abs(scale) * size.max()
        pulled = (size.sum(1)[..., None] * abs(offset)).sum(0 if splat else 1).max() / sigma**2
        values = (weights * abs(g).max(-1)[..., None]).max()
        largest = (0, score * abs(k).max(), score * abs(q).max(), values, pulled)
        terms = [*map(max, terms[:5], largest), terms[5] + (size * by_sigma).sum()]
    return [torch.from_numpy(x.astype(np.float64)) for x in map(np.asarray, results)], [float(x) for x in terms]
