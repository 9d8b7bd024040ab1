"""What a GPU alone has: CUDA graphs, and kernels with atomics, which run outside of deterministic mode.

Needs nothing but PyTorch, Triton and pytest.
"""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

GPU = Path(__file__).resolve().parents[1] / "benchmarks" / "gpu"
sys.path.append(str(GPU))
from calls import BF16, FP32, SMALL, outputs  # noqa: E402

import tritonkern as tk  # noqa: E402

ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
on_gpu = lambda test: ON_GPU[0](ON_GPU[1](test))  # noqa: E731
WHERE = ("triton", "cuda")


@pytest.fixture
def atomics():
    torch.use_deterministic_algorithms(False)


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_local_correlation_outside_of_deterministic_mode(atomics, dtype):
    import test_local_correlation as local

    for sizes in (dict(N=7, T=3), dict(N=3, T=2, S=49, radius=3, C=128)):
        for options in (local.COTRACKER, local.LOCOTRACK):
            local.check(WHERE, local.case(dtype=dtype, options=options, device="cuda", **sizes))


@on_gpu
@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_correlation_outside_of_deterministic_mode(atomics, dtype, cosine):
    import test_correlation_soft_argmax as matching

    inputs = matching.random_inputs(2, 33, 5, 9, 18, 40, dtype=dtype, device="cuda")
    matching.check(WHERE, *inputs, cosine=cosine)


def more_calls(dtype, device):
    """Names, tensors and calls of what `SMALL` leaves out, because its kernels take long to compile."""
    random = lambda *shape: torch.randn(shape, device=device).to(dtype).requires_grad_()  # noqa: E731
    vectors = [random(1, 3, 30, 2, 32), random(1, 3, 30, 2, 32)]
    cells = torch.tensor([[3, 7, 29]], device=device)
    tokens = [random(1, 90, 2, 32).detach() for _ in range(3)]
    maps = [random(1, 2, 9, 8, 16), random(1, 5, 9, 16), random(4, 81), random(4)]  # 9 samples of 9 vectors
    coords = torch.rand(1, 2, 5, 2, device=device) * 7
    segments = [(0, 20), (20, 40), (40, 60), (60, 80), (80, 90)]
    grid = dict(grid=(5, 6), backend="triton")
    around = dict(align_corners=True, radius=1, backend="triton")
    return [
        ("query-key, all cells", vectors, lambda q, k: tk.query_key_matching(q, k, radius=2.0, **grid)),
        ("query-key, some cells", vectors, lambda q, k: tk.query_key_matching(q, k, cells=cells, **grid)),
        ("query-key cost", vectors, lambda q, k: tk.query_key_cost(q, k, cells=cells, backend="triton")),
        ("row statistics", tokens[:2], lambda q, k: tk.attention_row_statistics(q, k, segments, backend="triton")),
        (
            "frame-local attention", tokens,
            lambda *x: tk.frame_local_attention(*x, text=0, frames=3, renormalise=True, backend="triton"),
        ),
        (
            "local correlation, linear", maps,
            lambda f, s, w, b: tk.local_correlation_linear(f, s, coords, w, b, **around),
        ),
        (
            "local correlation, softmax of two pairs", maps,
            lambda f, s, w, b: tk.local_correlation_linear(
                [f, f], [s, s], coords, torch.cat([w, w], 1), b, softmax=True, **around
            ),
        ),
    ]  # fmt: skip


def run_both_ways(tensors, call):
    results = outputs(call(*tensors))
    differentiable = [x for x in results if x.requires_grad]
    if not differentiable:
        return results
    grads = torch.autograd.grad(differentiable, tensors, [torch.ones_like(x) for x in differentiable])
    return [*results, *grads]


def captured(run):
    """Runs once, then captures; returns the results, which a replay writes again, and the replay."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    return results, graph.replay


@on_gpu
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_cuda_graph(case, dtype):
    """Forward and backward in one graph, replayed with other inputs."""
    check_graph(*case.make(case.shape, dtype, "triton", True))


@on_gpu
@pytest.mark.slow
@pytest.mark.parametrize("number", range(6))
def test_cuda_graph_of_other_operations(number):
    check_graph(*more_calls(BF16, "cuda")[number][1:])


def check_graph(tensors, call):
    run = lambda: run_both_ways(tensors, call)  # noqa: E731
    results, replay = captured(run)
    with torch.no_grad():
        for x in tensors:
            x.copy_(torch.randn_like(x).sign() * x)
    expected = run()
    replay()
    for actual, plain in zip(results, expected, strict=True):
        assert torch.equal(actual, plain)


@on_gpu
@pytest.mark.parametrize("autocast", [False, True])
def test_cuda_graph_of_chrono(monkeypatch, autocast):
    from tritonkern.models.chrono import Chrono
    from tritonkern.models.dinov2 import DINOv2Config

    monkeypatch.setattr(Chrono, "cells", 8)
    model = Chrono(DINOv2Config(dim=64, depth=3, num_heads=1), hidden=32).eval().cuda()
    clips = [(torch.rand(1, 3, 256, 256, 3) * 2 - 1, torch.rand(1, 5, 3) * torch.tensor([2.0, 256, 256])) for _ in "ab"]
    (video, queries), other = ([x.cuda() for x in clip] for clip in clips)
    with torch.no_grad(), torch.autocast("cuda", BF16, enabled=autocast, cache_enabled=False):
        expected = model(*other)
        output, replay = captured(lambda: model(video, queries))
        video.copy_(other[0])
        queries.copy_(other[1])
        replay()
    for actual, plain in zip(output, expected, strict=True):
        torch.testing.assert_close(actual, plain)


WITHOUT_A_GPU = """
import torch, triton
from aot import Driver
from calls import SMALL
from test_gpu import more_calls, run_both_ways
from test_chrono import NothingMadeOfNumbers, NothingReadBack
from triton.runtime.jit import JITFunction
from tritonkern.ops import _backends
from tritonkern.ops.query_key_matching import op as query_key

query_key.check_range = lambda *arguments: None  # as while a graph is captured
triton.runtime.driver.set_active(Driver("sm_90"))
JITFunction.run = lambda *arguments, **options: None  # results are whatever memory holds
_backends._PREDICATES["triton"] = lambda device: None
for deterministic in (False, True):
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    for case in SMALL:
        tensors, call = case.make(case.shape, torch.bfloat16, "triton", True)
        with NothingMadeOfNumbers(), NothingReadBack():
            run_both_ways(tensors, call)
        print(case.name)
    for name, tensors, call in more_calls(torch.bfloat16, "cpu"):
        with NothingMadeOfNumbers(), NothingReadBack():
            run_both_ways(tensors, call)
        print(name)
"""


@pytest.mark.slow
def test_launchers_read_nothing_back():
    """What a CUDA graph needs, without a GPU: no value decides what is launched, no number is copied to the device."""
    pytest.importorskip("triton")
    paths = [Path(__file__).parent, GPU, Path(__file__).resolve().parents[1]]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    command = [sys.executable, "-c", textwrap.dedent(WITHOUT_A_GPU)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    names = [case.name for case in SMALL] + [name for name, *_ in more_calls(BF16, "cpu")]
    assert done.stdout.split() == " ".join(2 * names).split()


# Triton launches and, at most, function calls of Python per call: measured with 10 % to spare.
HOST_COST = {
    "window forward": (1, 77),
    "window forward+backward": (2, 270),
    "match forward": (3, 99),
    "match forward+backward": (10, 500),
    "sample forward": (5, 150),
    "sample forward+backward": (12, 460),
    "splat forward": (6, 161),
    "splat forward+backward": (14, 486),
    "local forward": (1, 90),
    "mixer forward": (2, 105),
}
COUNT = """
import json, sys
import host
host.without_a_gpu()
cases = host.cases()
print(json.dumps({name: host.count(cases[name]) for name in sys.argv[1:]}))
"""


@pytest.mark.slow
def test_what_a_call_costs_the_host():
    pytest.importorskip("triton")
    paths = [GPU, Path(__file__).resolve().parents[1]]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    command = [sys.executable, "-c", COUNT, *HOST_COST]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    for name, (launches, _, calls) in json.loads(done.stdout.splitlines()[-1]).items():
        assert (launches, calls <= HOST_COST[name][1]) == (HOST_COST[name][0], True), (name, launches, calls)
