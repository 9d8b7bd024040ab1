"""Every test starts from the same seed and reads NaN wherever a kernel forgot to write."""

import importlib
import os
import resource
import sys
import time

# cuBLAS asks for it before its first call, or deterministic mode warns at every matmul.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch

# What the tests of the models' files, of tracking and of training import. A GPU image may have none of it: there
# `make gpu` is about the kernels, and these modules are left out, with a line that says so. CI has all of it.
_TRACKING_PACKAGES = ("av", "typer", "rich", "safetensors", "PIL")
_TRACKING_TESTS = (
    "adapting",
    "analysis",
    "baselines",
    "bins",
    "chrono",
    "cli*",
    "cogvideox",
    "difftrack",
    "difftrack_command",
    "difftrack_nano",
    "difftrack_official",
    "ditracker*",
    "evaluation",
    "example_*",
    "fuzz_readers",
    "labels*",
    "low_rank",
    "metrics",
    "models",
    "query_order",
    "refining",
    "stream",
    "tapir",
    "tapvid",
    "tracking_*",
    "training",
    "vot",
)


def _missing() -> list[str]:
    missing = []
    for name in _TRACKING_PACKAGES:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            missing.append(name)
    return missing


_FILES = [f"{folder}test_{name}.py" for folder in ("", "properties/") for name in _TRACKING_TESTS]
collect_ignore_glob = _FILES if _missing() else []
if collect_ignore_glob and os.environ.get("CI"):
    raise RuntimeError(f"CI must run every test, and {', '.join(_missing())} cannot be imported")


# Seconds that a test may take on an idle machine with two cores unless it is marked slow. The smaller of wall-clock and
# CPU time is compared, because other work on a shared machine makes the first grow. It can make the second grow up to
# fourfold as well, so that a test above _QUICK is listed at the end, and fails only above _TOO_SLOW.
_QUICK, _TOO_SLOW = 5.0, 20.0

# Files whose slow tests take minutes, in the order in which they start: the longest ones first (`make test-slow`).
_LONGEST = ("test_triton_aot", "test_cpp_build", "_triton", "test_triton_interpreter", "test_operators")


def pytest_collection_modifyitems(items):
    def place(item):
        name = item.path.name
        return next((i for i, part in enumerate(_LONGEST) if part in name), len(_LONGEST))

    items.sort(key=place)


def _cpu_seconds():
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item):
    wall, cpu, modules = time.perf_counter(), _cpu_seconds(), len(sys.modules)
    outcome = yield
    if len(sys.modules) > modules + 200:
        return  # the first test of a process that compiles imports inductor, which takes seconds
    taken = min(time.perf_counter() - wall, _cpu_seconds() - cpu)
    if taken > _QUICK and outcome.excinfo is None and item.get_closest_marker("slow") is None:
        item.user_properties.append(("seconds", taken))
        if taken > _TOO_SLOW:
            outcome.force_exception(AssertionError(f"took {taken:.1f} s: mark it slow, or make it faster"))


def pytest_terminal_summary(terminalreporter):
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            if name == "seconds":
                terminalreporter.write_line(f"unmarked and slower than {_QUICK:g} s: {value:.1f} s {report.nodeid}")


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """In deterministic mode PyTorch fills `torch.empty` with NaN (integers: the largest value)."""
    torch.manual_seed(0)
    # `torch.use_deterministic_algorithms` does this after it has imported inductor, which takes three seconds.
    torch._C._set_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch._C._set_deterministic_algorithms(False)


def pytest_report_header():
    from tritonkern.ops import _backends

    left_out = [f"left out, as {', '.join(_missing())} cannot be imported: {', '.join(collect_ignore_glob)}"]
    return _backends.report().splitlines() + (left_out if collect_ignore_glob else [])
