"""The parts of a run on a GPU: `python parts.py PART` runs the items of one, see rows.Part and `__main__.py`."""

from __future__ import annotations

import functools
import hashlib
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from calls import BF16, FP16, FP32, FP64, REAL, SMALL, Case, outputs, with_gradients
from rows import Part, append
from timing import CUDA, DEVICE, device_times, host_microseconds
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
BACKEND = "triton" if CUDA or os.environ.get("TRITON_INTERPRET") == "1" else "cpp"
# Norm of the error over norm of the result; float32 without TF32.
TOLERANCE = {BF16: 2e-2, FP16: 4e-3, FP32: 2e-5, FP64: 1e-11}


def versions(part: Part) -> None:
    part.item("versions", _versions)


def source_hash() -> str:
    """Of everything that decides what is measured, so that rows are not filed under another commit."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "tritonkern").rglob("*.py")):
        digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _versions() -> dict:
    row = {"python": sys.version.split()[0], "torch": torch.__version__, "source": source_hash()}
    row["date"] = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())
    try:
        import numpy
        import triton

        row |= {"triton": triton.__version__, "numpy": numpy.__version__}
    except ImportError as error:
        row["triton"] = f"missing: {error}"
    if CUDA:
        properties = torch.cuda.get_device_properties(0)
        row |= {"gpu": properties.name, "multiprocessors": properties.multi_processor_count}
        row |= {"L2": properties.L2_cache_size, "memory": properties.total_memory}
        query = "--query-gpu=driver_version,clocks.sm,clocks.mem,temperature.gpu,power.draw"
        found = subprocess.run(["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True)
        row["nvidia-smi"] = found.stdout.strip()
    return row


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _deterministic(on: bool) -> None:
    """Also fills new memory with NaN, so that an unwritten result is seen."""
    torch.use_deterministic_algorithms(on, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = on


def correct(part: Part) -> None:
    """Every kernel and dtype against float64, and ten times the same bits, with and without deterministic mode."""
    for deterministic in (False, True):
        for case in SMALL:
            for dtype in case.dtypes if not deterministic else (BF16, FP32):
                name = f"{case.name} {_name(dtype)}{' deterministic' if deterministic else ''}"
                part.item(name, functools.partial(_errors, case, dtype, deterministic))
    for case in SMALL:
        part.item(f"{case.name} repeated", functools.partial(_repeated, case))


def _errors(case: Case, dtype: torch.dtype, deterministic: bool) -> dict:
    torch.manual_seed(0)
    _deterministic(deterministic)
    tensors, call = case.make(case.shape, dtype, BACKEND, True)
    found = with_gradients(tensors, call)
    _deterministic(False)
    torch.manual_seed(0)
    _, exact_call = case.make(case.shape, FP64, "reference", True)
    exact = with_gradients([x.detach().double().requires_grad_() for x in tensors], exact_call)
    errors = [_relative(actual, expected) for actual, expected in zip(found, exact, strict=True)]
    worst = max(errors, key=lambda error: math.inf if math.isnan(error) else error)
    good = worst < TOLERANCE[dtype]
    return {"worst": worst, **({} if good else {"failed": f"errors {[f'{error:.1e}' for error in errors]}"})}


def _relative(actual: Tensor, exact: Tensor) -> float:
    difference = actual.double() - exact.double()
    return (difference.norm() / exact.double().norm().clamp(min=1e-300)).item()


def _repeated(case: Case) -> dict:
    torch.manual_seed(0)
    _deterministic(True)
    tensors, call = case.make(case.shape, BF16, BACKEND, True)
    first = with_gradients(tensors, call)
    moved = 0
    for _ in range(9 if CUDA else 1):
        moved += sum(not torch.equal(a, b) for a, b in zip(with_gradients(tensors, call), first, strict=True))
    _deterministic(False)
    return {"moved": moved, **({"failed": f"{moved} results changed"} if moved else {})}


def times(part: Part) -> None:
    """Ceilings of the device, then every operation at the shapes of real models."""
    part.item("copy", _copy)
    for dtype in (BF16, FP32):
        part.item(f"product {_name(dtype)}", functools.partial(_product, dtype))
    for case in REAL:
        for dtype in case.dtypes:
            for backward in (False, True):
                direction = "forward+backward" if backward else "forward"
                part.item(
                    f"{case.name} {_name(dtype)} {direction}", functools.partial(_timed, case, dtype, backward), 4
                )


@torch.no_grad()
def _copy() -> dict:
    source = torch.randn(1 << (29 if CUDA else 20), device=DEVICE).to(BF16)
    target = torch.empty_like(source)
    measured = device_times(lambda: target.copy_(source))
    return measured | {"bytes": 2 * source.nbytes}


@torch.no_grad()
def _product(dtype: torch.dtype) -> dict:
    size = 8192 if CUDA else 128
    x = torch.randn(size, size, device=DEVICE).to(dtype)
    return device_times(lambda: x @ x, 5) | {"flops": 2 * size**3}


def _timed(case: Case, dtype: torch.dtype, backward: bool) -> dict:
    torch.manual_seed(0)
    tensors, call = case.make(case.shape if CUDA else case.tiny, dtype, BACKEND, backward)
    start = time.perf_counter()
    results = outputs(call(*tensors))
    if CUDA:
        torch.cuda.synchronize()
    row = {"op": case.operation, "shape": case.shape, "dtype": _name(dtype), "first_call": time.perf_counter() - start}
    moved = sum(x.nbytes for x in (*tensors, *results))

    def forward_and_backward():
        out = outputs(call(*tensors))[0]
        return torch.autograd.grad(out, tensors, torch.ones_like(out))

    if backward:  # forward; backward reads inputs, results and their gradients, and writes the gradients of the inputs
        moved = 2 * moved + results[0].nbytes + sum(x.nbytes for x in tensors)
    run = forward_and_backward if backward else lambda: call(*tensors)
    del results
    with torch.set_grad_enabled(backward):
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run()
            row["peak_memory"] = torch.cuda.max_memory_allocated() - before
        measured = device_times(run, 10 if backward else 20)
        host = host_microseconds(run, 20)
    return row | measured | {"host_us": host, "bytes": moved, "flops": case.flops[backward]}


def peers(part: Part) -> None:
    """What a user would write instead, on the same shapes."""
    import peers

    peers.run(part)


def models(part: Part) -> None:
    part.item("Chrono ViT-S, 8 frames, 64 queries, bfloat16 autocast", _chrono, 25)


@torch.no_grad()
def _chrono() -> dict:
    from tritonkern.models.chrono import Chrono
    from tritonkern.models.dinov2 import DINOv2Config

    torch.manual_seed(0)
    variant = "vits14" if CUDA else DINOv2Config(dim=32, depth=2, num_heads=2)
    model = Chrono(variant).eval().to(DEVICE)
    if not CUDA:
        model.cells = 8
    frames, count = (8, 64) if CUDA else (2, 2)
    video = torch.rand(1, frames, 256, 256, 3, device=DEVICE) * 2 - 1
    queries = torch.rand(1, count, 3, device=DEVICE) * torch.tensor([frames - 1.0, 256, 256], device=DEVICE)
    with torch.autocast(DEVICE, BF16, cache_enabled=False):
        measured = device_times(lambda: model(video, queries), 5)
        return measured | {"host_us": host_microseconds(lambda: model(video, queries), 3)}


def sweep(part: Part) -> None:
    """Descriptors and other tiles in window attention, with the seconds that are left."""
    from tritonkern.ops.temporal_window_attention import configs

    cases = {case.name: case for case in REAL}
    case = cases["window gpu"]
    choices = {
        "_BACKWARD": [(64, 32, 4, 1), (64, 16, 4, 1), (32, 32, 4, 1), (32, 16, 4, 1), (64, 32, 4, 2), (64, 32, 8, 1)],
        "_FORWARD": [(64, 32, 4, 2), (64, 32, 4, 3), (64, 64, 4, 1), (128, 32, 8, 2), (32, 32, 4, 2), (64, 16, 4, 3)],
    }
    for name in ("window gpu", "window rgb", "window long"):
        part.item(
            f"{name} forward with tensor descriptors", functools.partial(_with_descriptors, configs, cases[name]), 6
        )
    for table, tiles in choices.items():
        for tile in tiles:
            part.item(f"window {table} {tile}", functools.partial(_with_tile, configs, table, tile, case), 6)


def _with_descriptors(configs, case: Case) -> dict:
    """Whether the results agree, and times."""
    tensors, call = case.make(case.shape, BF16, BACKEND)
    expected = outputs(call(*tensors))[0]
    configs.DESCRIPTORS = True
    try:
        torch.testing.assert_close(outputs(call(*tensors))[0], expected, rtol=2e-2, atol=2e-2)
        return _timed(case, BF16, False)
    finally:
        configs.DESCRIPTORS = False


def _with_tile(configs, table: str, tile: tuple, case: Case) -> dict:
    widths = getattr(configs, table)
    kept = widths[64]
    widths[64] = tile
    _forget_launches()
    try:
        return _timed(case, BF16, table == "_BACKWARD")
    finally:
        widths[64] = kept
        _forget_launches()


def _forget_launches() -> None:
    """Launches of window attention are kept, with the tiles that were chosen first."""
    kernels = sys.modules.get("tritonkern.ops.temporal_window_attention.triton_kernels")
    if kernels is not None:
        kernels._launch.cache_clear()


def memcheck(part: Part) -> None:
    """compute-sanitizer on three operations; PyTorch's allocator would hide accesses beyond a tensor."""
    for name in ("window", "match", "sample"):
        part.item(name, functools.partial(_sanitized, name), 20)


def _sanitized(name: str) -> dict:
    program = [sys.executable, __file__, "one", name]
    command = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9", *program] if CUDA else program
    done = subprocess.run(
        command, env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, capture_output=True, text=True, timeout=90
    )
    return {} if done.returncode == 0 else {"failed": (done.stdout + done.stderr)[-600:]}


def one(name: str) -> None:
    """One small case in bfloat16, under a checker."""
    case = next(case for case in SMALL if case.name == name)
    with_gradients(*case.make(case.shape, BF16, BACKEND, True))


def _run(name: str) -> None:
    compiled = []
    try:
        from triton import knobs

        knobs.compilation.listener = lambda *, cache_hit, times, **_: (
            None if cache_hit else compiled.append(times.total)
        )
    except (ImportError, AttributeError):  # no Triton, or one before 3.4
        pass
    part = Part(name)
    PARTS[name](part)
    if compiled:  # not found in the cache; microseconds
        row = {"part": name, "name": f"compiled in process {part.share}", "kernels": len(compiled)}
        append(part.out, row | {"seconds": round(sum(compiled) / 1e6, 1)})


PARTS = {part.__name__: part for part in (versions, correct, times, peers, models, memcheck, sweep)}

if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    torch.backends.cudnn.allow_tf32 = False  # float32 convolutions of both sides would differ in the fourth digit
    if sys.argv[1] == "one":
        one(sys.argv[2])
    else:
        _run(sys.argv[1])
