"""One small call of every operation, forward and backward, for `test_strict_interpreter.py`, which runs this file."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks" / "gpu"))
import calls  # noqa: E402

HALF, SINGLE = torch.float16, torch.float32
# The interpreter multiplies bfloat16 wrongly.
TOLERANCE = {HALF: 4e-3, SINGLE: 2e-5}
CASES = [
    (calls.window, (2, 11, 2, 1, 24), (HALF, SINGLE)),
    (calls.match, (21, 2, 9, 11, 40), (HALF, SINGLE)),
    (calls.match_cosine, (5, 2, 7, 9, 24), (SINGLE,)),
    (calls.soft_argmax, (2, 2, 9, 16), (HALF, SINGLE)),
    (calls.sample, (1, 40, 9, 10, 2, 16), (HALF, SINGLE)),
    (calls.splat, (1, 40, 9, 10, 2, 16), (HALF, SINGLE)),
    (calls.local, (2, 3, 6, 5, 9, 24), (HALF, SINGLE)),
    (calls.mixer, (1, 3, 5, 40), (SINGLE,)),
    (calls.recurrence, (1, 3, 19, 2, 24), (SINGLE,)),
    (calls.adapter_first, (2, 8, 24, 16, 4), (SINGLE,)),
    (calls.adapter_last, (2, 8, 24, 16, 4), (SINGLE,)),
]


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(
    ("make", "shape", "dtype"),
    [(make, shape, dtype) for make, shape, dtypes in CASES for dtype in dtypes],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_results_and_gradients(make, shape, dtype, deterministic):
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    torch.manual_seed(0)
    tensors, call = make(shape, dtype, "triton", True)
    found = calls.with_gradients(tensors, call)
    torch.manual_seed(0)
    _, exact_call = make(shape, torch.float64, "reference", True)
    exact = calls.with_gradients([x.detach().double().requires_grad_() for x in tensors], exact_call)
    for actual, expected in zip(found, exact, strict=True):
        assert (actual.double() - expected).norm() <= TOLERANCE[dtype] * expected.norm()
