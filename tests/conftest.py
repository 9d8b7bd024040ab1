"""Every test starts from the same seed and reads NaN wherever a kernel forgot to write."""

import os

# cuBLAS asks for it before its first call, or deterministic mode warns at every matmul.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch


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

    return _backends.report().splitlines()
