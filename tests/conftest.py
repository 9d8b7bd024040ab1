"""Every test starts from the same seed and reads NaN wherever a kernel forgot to write."""

import importlib
import os

# cuBLAS asks for it before its first call, or deterministic mode warns at every matmul.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch

# What the tests of the models' files, of tracking and of training import. A GPU image may have none of it: there
# `make gpu` is about the kernels, and these modules are left out, with a line that says so. CI has all of it.
_TRACKING_PACKAGES = ("av", "typer", "rich", "safetensors", "PIL")
_TRACKING_TESTS = ("chrono", "cli", "evaluation", "example_*", "metrics", "models", "tapvid", "tracking_*", "training")


def _missing() -> list[str]:
    missing = []
    for name in _TRACKING_PACKAGES:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            missing.append(name)
    return missing


collect_ignore_glob = [f"test_{name}.py" for name in _TRACKING_TESTS] if _missing() else []
if collect_ignore_glob and os.environ.get("CI"):
    raise RuntimeError(f"CI must run every test, and {', '.join(_missing())} cannot be imported")


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """In deterministic mode PyTorch fills `torch.empty` with NaN (integers: the largest value)."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def pytest_report_header():
    from tritonkern.ops import _backends

    left_out = [f"left out, as {', '.join(_missing())} cannot be imported: {', '.join(collect_ignore_glob)}"]
    return _backends.report().splitlines() + (left_out if collect_ignore_glob else [])
