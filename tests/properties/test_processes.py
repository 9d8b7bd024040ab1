"""Calls of all operations in several threads and processes, interrupted by signals, and many of them in a row.

Results are compared to the bit with those of the same calls alone.
"""

import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

pytest.importorskip("tritonkern._cpp", reason="the C++ extension was not built", exc_type=ImportError)
pytest.importorskip("hypothesis")

sys.path.insert(0, str(Path(__file__).parents[1]))

import cases  # noqa: E402


@pytest.fixture(scope="module")
def calls():
    """Some cases of every operation with their results."""
    drawn = [case for operation in cases.OPERATIONS for case in cases.drawn(operation, 4)]
    return [(case, cases.on_threads(1, results, case)) for case in drawn]


def results(case):
    with cases.RANDOM:
        function = case.function()
    return cases.own(case, case.results(function))


def compare(case, expected, where):
    cases.assert_equal(results(case), expected, f"{where}: {case!r}")


def test_eight_threads_at_once_while_thread_counts_change(calls):
    def work(seed):
        order = random.Random(seed)
        for case, expected in order.sample(calls, len(calls)):
            torch.set_num_threads(order.choice(cases.THREADS))
            compare(case, expected, "in one of eight threads")

    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(8)))
    finally:
        torch.set_num_threads(before)


def test_thread_counts_change_between_forward_and_backward(calls):
    for case, expected in calls:
        function = case.function()

        def forward(*tensors, function=function):
            torch.set_num_threads(3)
            made = function(*tensors)
            torch.set_num_threads(2)
            return made

        before = torch.get_num_threads()
        try:
            cases.assert_equal(cases.own(case, case.results(forward)), expected, f"on 3 threads, then 2: {case!r}")
        finally:
            torch.set_num_threads(before)


def test_forked_processes(calls):
    """Also a fork of a fork, after calls on several threads, whose OpenMP threads a child does not have."""
    # Part of these is PyTorch's, whose own loops over several threads wait forever in a forked process, as do
    # those that make tensors of so many numbers.
    drawn = [case for case, _ in calls]
    others = (cases.PyramidCase, cases.FullCase, cases.AdapterCase)
    calls = [call for call in calls if not isinstance(call[0], others) and max(map(stored, call[0].tensors())) < 32768]
    assert {type(case) for case, _ in calls} == {type(case) for case in drawn} - set(others)
    for case, _ in calls:
        cases.on_threads(3, results, case)

    def run(depth):
        for case, expected in calls:
            compare(case, expected, f"in a forked process of depth {depth}")
        if depth < 2:
            finished(child(lambda: run(depth + 1)))

    finished(child(lambda: run(1)))


def stored(x):
    return x.untyped_storage().nbytes() // x.element_size()


def child(function):
    """The number of a forked process that runs `function`."""
    process = os.fork()
    if process == 0:
        status = 1
        try:
            function()
            status = 0
        except BaseException as error:
            print(error, file=sys.stderr)
        finally:
            os._exit(status)
    return process


def finished(process):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            assert status == 0
            return
        time.sleep(0.01)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    raise AssertionError("a forked process did not end within 60 s")


def spawned(case):
    return results(case)


@pytest.mark.slow
def test_spawned_processes(calls):
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        found = pool.map_async(spawned, [case for case, _ in calls]).get(timeout=120)
    for (case, expected), actual in zip(calls, found, strict=True):
        cases.assert_equal(actual, expected, f"in a spawned process: {case!r}")


@pytest.fixture
def interruptible():
    """Processes in the background ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_interrupts(calls, interruptible):
    """SIGINT at any time of a call raises KeyboardInterrupt after it, and does no harm to the next one."""
    delays = random.Random(0)
    for case, expected in calls[::2]:
        function = case.function()
        timer = threading.Timer(delays.uniform(0, 0.03), os.kill, (os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            timer.start()
            while True:
                case.results(function)
        timer.join()
        compare(case, expected, "after an interrupt")


@pytest.mark.slow
def test_one_long_call_is_interrupted_at_its_end(interruptible):
    import tritonkern

    x = torch.randn(1, 400, 400, 4, 32)
    expected = tritonkern.temporal_window_attention(x, x, x, 201)
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
        tritonkern.temporal_window_attention(x, x, x, 201)
        time.sleep(5)
    assert time.monotonic() - started < 60
    assert torch.equal(tritonkern.temporal_window_attention(x, x, x, 201), expected)


@pytest.mark.slow
def test_memory_is_flat_over_five_thousand_calls():
    """Forward and backward, of random sizes, strides, options and dtypes."""
    every = [case for operation in cases.OPERATIONS for case in cases.drawn(operation, 130)]
    functions = [(case, case.function()) for case in every]

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

    sizes, count = [], 0
    for seed in range(5):
        for case, function in random.Random(seed).sample(functions, len(functions)):
            case.results(function)
            count += 1
        sizes.append(resident())
    print(f"{count} calls, resident MiB after each fifth: {[round(size) for size in sizes]}")
    assert count >= 5_000
    # The first fifth fills the allocator's free lists.
    assert sizes[-1] - sizes[0] < 16
