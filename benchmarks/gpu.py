"""Everything to do on a machine with a GPU, in one command that ends well inside ten minutes: `make gpu`.

The test suite with the Triton kernels running natively, then the benchmark suites with their table of achieved
bandwidth and FLOP/s against what the card can do; rows are appended to benchmarks/results/<gpu>.jsonl. Needs the torch,
Triton and pytest of the image and nothing else: the package runs from the checkout.

    python benchmarks/gpu.py [OPERATION ...]      all operations, or only those named
"""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TEST_SECONDS, BENCHMARK_SECONDS = 300, 210


def main(operations: list[str]) -> int:
    import torch

    if not torch.cuda.is_available():
        print(f"make gpu needs a GPU, and torch {torch.__version__} finds none; for a CPU: make test, make bench")
        return 2
    known = sorted(path.parent.name for path in ROOT.glob("tritonkern/ops/*/op.py"))
    unknown = sorted(set(operations) - set(known))
    if unknown:
        print(f"no operation called {', '.join(unknown)}; there are: {', '.join(known)}")
        return 2

    tests, suites = ["tests"], ["benchmarks"]
    if operations:
        tests = ["tests/test_operators.py", "tests/test_backends.py", *_files("tests", operations)]
        suites = _files("benchmarks", operations)
    parallel = ["-n", "8"] if importlib.util.find_spec("xdist") else []
    tested = _pytest([*tests, "-q", "--continue-on-collection-errors", "--durations=10", *parallel], TEST_SECONDS)
    measured = _pytest([*suites, "-q", "--record"], BENCHMARK_SECONDS)
    print(f"tests: {'passed' if tested == 0 else 'FAILED'}; benchmarks: {'done' if measured == 0 else 'FAILED'}")
    return tested or measured


def _files(folder: str, operations: list[str]) -> list[str]:
    return sorted(
        str(path.relative_to(ROOT))
        for path in (ROOT / folder).glob("test_*.py")
        if any(operation in path.name for operation in operations)
    )


def _pytest(arguments: list[str], seconds: int) -> int:
    """Exit status of pytest, interrupted at the limit so that it still reports what it has done."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    print(f"$ pytest {' '.join(arguments)}", flush=True)
    start = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", *arguments], cwd=ROOT, env={**os.environ, "PYTHONPATH": path}
    )
    try:
        status = process.wait(seconds)
    except subprocess.TimeoutExpired:
        print(f"interrupted after {seconds} s", flush=True)
        process.send_signal(signal.SIGINT)
        try:
            status = process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            status = process.wait()
    print(f"{time.monotonic() - start:.0f} s", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
