"""Triton without a GPU, part one: its interpreter, which has to be switched on before Triton is imported."""

import pytest

pytest.importorskip("triton")

from aot import interpret  # noqa: E402

# At 2**40 the interpreter overflows its own addresses. Gradients of full attention are PyTorch's.
CONTRACTS = "triton and (size_1 and not 1099511627776 or strides and float32 or empty or partial)"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cases", "chosen"),
    [
        ("triton_interpreter_cases.py", None),
        ("triton_interpreter_matching_cases.py", None),
        ("test_contracts.py", CONTRACTS),
    ],
)
def test_kernels_in_the_interpreter(cases, chosen):
    interpret(cases, chosen)
