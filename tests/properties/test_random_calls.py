"""Random calls of every public function: shapes, strides, dtypes, options and numbers of threads.

The cases are the same in every run, unless `TRITONKERN_FUZZ_SEED` chooses others. A failure prints a command that
repeats it.
"""

import os
import sys
from pathlib import Path

import pytest

pytest.importorskip("tritonkern._cpp", reason="the C++ extension was not built", exc_type=ImportError)
hypothesis = pytest.importorskip("hypothesis")

sys.path.insert(0, str(Path(__file__).parents[1]))

import cases  # noqa: E402

SEED = os.environ.get("TRITONKERN_FUZZ_SEED")
EVERY = pytest.mark.parametrize("operation", cases.OPERATIONS)
MANY = 600 if SEED else 60  # ten times as many where every run has other cases


def run(check, operation, count):
    """`check` on this number of random cases."""

    @hypothesis.settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=SEED is None,
        phases=[hypothesis.Phase.generate],  # making a case smaller takes minutes
        print_blob=False,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(case=cases.OPERATIONS[operation].random())
    def holds(case):
        try:
            check(case)
        except Exception as error:
            raise AssertionError(
                f"{error}\nTo repeat it, in tests/properties:\n"
                f"PYTHONPATH=../..:.. python -c 'from cases import *; {check.__name__}({case!r})'"
            ) from error

    (hypothesis.seed(int(SEED))(holds) if SEED else holds)()


@EVERY
def test_exact(operation):
    run(cases.check, operation, 10)


@EVERY
def test_compiled(operation):
    run(cases.check_compiled, operation, 4)


@EVERY
def test_exported(operation):
    run(cases.check_exported, operation, 4)


# The adapter convolves 16-bit tensors in larger tiles; PyTorch averages the maps of the pyramid.
ROUNDED_ONCE = sorted(cases.OPERATIONS.keys() - {"temporal_adapter", "correlation_pyramid"})


@pytest.mark.parametrize("operation", ROUNDED_ONCE)
def test_16_bits_are_float32_rounded_once(operation):
    run(cases.check_rounding, operation, 10)


@pytest.mark.slow
@pytest.mark.parametrize("operation", ROUNDED_ONCE)
def test_16_bits_are_float32_rounded_once_in_many_cases(operation):
    run(cases.check_rounding, operation, MANY // 2)


@pytest.mark.slow
@EVERY
def test_exact_in_many_cases(operation):
    run(cases.check, operation, MANY)


@pytest.mark.slow
@EVERY
@pytest.mark.parametrize("check", [cases.check_compiled, cases.check_exported], ids=["compiled", "exported"])
def test_graphs_in_many_cases(check, operation):
    run(check, operation, MANY // 6)
