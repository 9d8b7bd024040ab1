"""Triton without a GPU, part one: its interpreter, which has to be switched on before Triton is imported."""

import pytest

pytest.importorskip("triton")

from aot import interpret  # noqa: E402

STRIDES = "strides and float32 and reversed or size_1 and 7-"
CONTRACTS = f"triton and not opcheck and ({STRIDES} or test_empty or partial)"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cases", "chosen"),
    [
        ("triton_interpreter_cases.py", None),
        ("triton_interpreter_matching_cases.py", None),
        ("test_contracts.py", CONTRACTS),
    ],
    ids=["window", "matching", "contracts"],
)
def test_kernels_in_the_interpreter(cases, chosen):
    interpret(cases, chosen)
