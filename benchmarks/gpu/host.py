"""What a call costs the host, counted without a GPU: kernels compile for sm_90 and do not run.

    python benchmarks/gpu/host.py

Counts are of Triton launches, operators of PyTorch, and function calls of Python; the time is the processor's, as a
multiple of `torch.add` on eight numbers, the driver's launch not included.
"""

from __future__ import annotations

import collections
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]


class Cost(NamedTuple):
    launches: int
    operators: int
    calls: int


def without_a_gpu() -> None:
    """Make the triton backend take CPU tensors and stop where it would start a kernel."""
    import triton
    from compiled import Driver
    from triton.compiler.compiler import CompiledKernel

    from tritonkern.ops import _backends

    class Kernel:
        """Stands in for a compiled kernel."""

        function, packed_metadata, metadata = 0, (), None

        def launch_metadata(self, *arguments):
            return None

        def run(self, *arguments):
            _launched[0] += 1

        __getitem__ = CompiledKernel.__getitem__

        def _init_handles(self):
            pass

    def compile(self, key, signature, device, constexprs, options, attrs, warmup):
        kernel = self.device_caches[device][0][key] = Kernel()
        return kernel

    triton.runtime.driver.set_active(Driver())
    triton.runtime.jit.JITFunction._do_compile = compile
    _backends._PREDICATES["triton"] = lambda device: None


_launched = [0]


def cases() -> dict[str, Callable[[], object]]:
    import torch
    from calls import BF16, FP32, SMALL, outputs

    found: dict[str, Callable[[], object]] = {}
    for case in SMALL:
        dtype = FP32 if case.operation == "temporal_mixer" else BF16
        for backward in (False, True):
            tensors, call = case.make(case.shape, dtype, "triton", backward)

            def both(tensors=tensors, call=call):
                results = [x for x in outputs(call(*tensors)) if x.requires_grad]
                return torch.autograd.grad(results, tensors, [torch.ones_like(x) for x in results])

            run = both if backward else lambda tensors=tensors, call=call: call(*tensors)
            found[f"{case.name} forward{'+backward' if backward else ''}"] = run
    return found


def count(call: Callable[[], object]) -> Cost:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Operators(TorchDispatchMode):
        seen: collections.Counter = collections.Counter()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.seen[function] += 1
            return function(*args, **(kwargs or {}))

    call()
    call()
    _launched[0] = 0
    calls = [0]

    def profile(frame, event, argument):
        calls[0] += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    launches = _launched[0]
    with Operators() as operators:
        operators.seen.clear()
        call()
    return Cost(launches, sum(operators.seen.values()), calls[0])


def processor_seconds(call: Callable[[], object], repeats: int) -> float:
    start = time.process_time()
    for _ in range(repeats):
        call()
    return (time.process_time() - start) / repeats


def main() -> None:
    import torch

    torch.set_num_threads(1)
    without_a_gpu()
    eight = torch.randn(8)
    unit = statistics.median(processor_seconds(lambda: eight + eight, 2000) for _ in range(9))
    for name, call in cases().items():
        cost = count(call)
        taken = statistics.median(processor_seconds(call, 40) for _ in range(9)) / unit
        print(f"{name:36}{cost.launches:4} launches{cost.operators:5} operators{cost.calls:6} calls{taken:7.0f} x add")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
