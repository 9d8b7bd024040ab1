"""A pytest plugin that makes Triton's interpreter strict: `TRITON_INTERPRET=1 pytest -p strict_interpreter`.

Programs run in random order (STRICT_SEED, 0 unless set). Every address is held against the tensors that the launch was
given, and every access against those of the other programs: a test whose kernels leave their tensors, or race, fails.
STRICT_HARDWARE=1 rounds as NVIDIA GPUs do where the interpreter is more exact: products are fused into sums, exp is
ex2.approx, quotients are products with a reciprocal, and maxima and minima pass over NaN.
"""

import collections
import inspect
import os
import random

import numpy as np
import pytest
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle

Builder = interpreter.InterpreterBuilder
findings = collections.Counter()
_order = random.Random(int(os.environ.get("STRICT_SEED", "0")))
NOBODY, SEVERAL = -1, -2


class Memory:
    """One tensor of a launch: who has written, read or added to each of its numbers."""

    def __init__(self, name, tensor):
        self.name, self.size = name, tensor.element_size()
        span = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
        self.start = tensor.data_ptr()
        self.stop = self.start + (span + 1) * self.size
        self.writer, self.reader = (np.full(span + 1, NOBODY, np.int64) for _ in range(2))
        self.added = np.zeros(span + 1, bool)


class Launch:
    """The accesses of the programs of one kernel."""

    def __init__(self, kernel, arguments):
        self.kernel, self.program = kernel, 0
        tensors = [(name, x) for name, x in arguments.items() if hasattr(x, "data_ptr") and x.numel()]
        self.memories = sorted((Memory(name, x) for name, x in tensors), key=lambda memory: memory.start)

    def find(self, fault, memory=None):
        findings[f"{fault} in {self.kernel}{'' if memory is None else ': ' + memory.name}"] += 1

    def numbers(self, pointers, mask, size, access):
        """Yields (memory, numbers accessed in it). Where arguments share memory the first of them counts."""
        left = pointers[np.broadcast_to(mask, pointers.shape).astype(bool)].astype(np.uint64)
        for memory in self.memories:
            inside = (left >= memory.start) & (left + np.uint64(size) <= memory.stop)
            if inside.any():
                yield memory, ((left[inside] - np.uint64(memory.start)) // np.uint64(memory.size)).astype(np.int64)
                left = left[~inside]
        if left.size:
            self.find(f"{access} out of bounds")

    def load(self, *where):
        for memory, at in self.numbers(*where, "load"):
            writer, reader = memory.writer[at], memory.reader[at]
            if ((writer != NOBODY) & (writer != self.program)).any():
                self.find("race: load of what another program stores", memory)
            if (writer == self.program).any():
                self.find("load of what the same program has stored", memory)
            if memory.added[at].any():
                self.find("race: load of what atomics add to", memory)
            alone = (reader == NOBODY) | (reader == self.program)
            memory.reader[at] = np.where(alone, self.program, SEVERAL)

    def store(self, *where):
        for memory, at in self.numbers(*where, "store"):
            writer, reader = memory.writer[at], memory.reader[at]
            if ((writer != NOBODY) & (writer != self.program)).any():
                self.find("race: two programs store to one place", memory)
            if (writer == self.program).any() or len(np.unique(at)) != len(at):
                self.find("the same program stores twice to one place", memory)
            if ((reader != NOBODY) & (reader != self.program)).any():
                self.find("race: store to what another program loads", memory)
            if memory.added[at].any():
                self.find("race: store to what atomics add to", memory)
            memory.writer[at] = self.program

    def atomic(self, *where):
        for memory, at in self.numbers(*where, "atomic access"):
            if (memory.writer[at] != NOBODY).any() or (memory.reader[at] != NOBODY).any():
                self.find("race: atomic access to what is also stored or loaded", memory)
            memory.added[at] = True


_launch = None


def _bytes(pointers):
    return pointers.get_element_ty().primitive_bitwidth // 8 or 1


def _checked(name, access, mask_position):
    """The builder's method, after `access` of the launch has seen pointers and mask."""
    method = getattr(Builder, name)

    def run(self, *arguments, **options):
        pointers, mask = arguments[0 if name != "create_atomic_rmw" else 1], arguments[mask_position]
        if _launch is not None:
            getattr(_launch, access)(pointers.data, getattr(mask, "data", mask), _bytes(pointers))
        return method(self, *arguments, **options)

    setattr(Builder, name, run)


def _run_in_random_order(self, *arguments, **options):
    global _launch
    names = inspect.getfullargspec(self.fn)
    options = {key: value for key, value in options.items() if key in names.args or key in names.kwonlyargs}
    scope = interpreter._patch_lang(self.fn)
    try:
        given = inspect.getcallargs(self.fn, *arguments, **options)
        passed = {
            name: x if name in self.constexprs else interpreter._implicit_cvt(int(x) if isinstance(x, bool) else x)
            for name, x in given.items()
        }
        grid = self.grid(passed) if callable(self.grid) else self.grid
        programs, *rest = grid
        assert all(n == 1 for n in rest), "every launch of this package has one axis"
        interpreter.interpreter_builder.set_grid_dim(programs, 1, 1)
        _launch = Launch(self.fn.__qualname__, given)
        for program in _order.sample(range(programs), programs):
            _launch.program = program
            interpreter.interpreter_builder.set_grid_idx(program, 0, 0)
            self.fn(**passed)
    finally:
        _launch = None
        scope.restore()


def _products_are_fused():
    """A sum with a product of float32 numbers rounds once. LLVM fuses the left operand if both are products."""

    def multiply(self, a, b):
        result = self.binary_op(a, b, np.multiply)
        if a.data.dtype == np.float32:
            result.exact = np.multiply(a.data, b.data, dtype=np.float64)
        return result

    def add(sign):
        def run(self, a, b):
            left, right = (getattr(x, "exact", None) for x in (a, b))
            if a.data.dtype != np.float32 or (left is None and right is None):
                return self.binary_op(a, b, np.add if sign > 0 else np.subtract)
            if left is None:
                left = a.data.astype(np.float64)
            else:
                right = b.data.astype(np.float64)
            return TensorHandle((left + sign * right).astype(np.float32), a.dtype.scalar)

        return run

    def kept(name, function):
        method = getattr(Builder, name)

        def run(self, x, *rest):
            result = method(self, x, *rest)
            if getattr(x, "exact", None) is not None:
                result.exact = function(x.exact, *rest)
            return result

        setattr(Builder, name, run)

    Builder.create_fmul, Builder.create_fadd, Builder.create_fsub = multiply, add(1.0), add(-1.0)
    kept("create_expand_dims", np.expand_dims)
    kept("create_broadcast", np.broadcast_to)


def _functions_are_approximate():
    exponential = Builder.create_exp

    def exp(self, x):
        if x.data.dtype != np.float32:
            return exponential(self, x)
        power = (x.data * np.float32(1.4426950408889634)).astype(np.float64)
        return TensorHandle(np.exp2(power).astype(np.float32), x.dtype.scalar)

    def divide(self, a, b):
        result = self.binary_op(a, b, np.divide)
        if a.data.dtype != np.float32:
            return result
        product = a.data * (np.float32(1) / b.data)
        usual = np.isfinite(product) & np.isfinite(result.data)
        return TensorHandle(np.where(usual, product, result.data), a.dtype.scalar)

    Builder.create_exp, Builder.create_fdiv = exp, divide
    Builder.create_maxnumf = lambda self, a, b: self.binary_op(a, b, np.fmax)
    Builder.create_minnumf = lambda self, a, b: self.binary_op(a, b, np.fmin)


def pytest_configure(config):
    _checked("create_masked_load", "load", 1)
    _checked("create_masked_store", "store", 2)
    _checked("create_atomic_rmw", "atomic", 3)
    interpreter.GridExecutor.__call__ = _run_in_random_order
    if os.environ.get("STRICT_HARDWARE") == "1":
        _products_are_fused()
        _functions_are_approximate()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item):
    findings.clear()
    with np.errstate(all="ignore"):  # of lanes that a mask leaves out
        outcome = yield
    if findings and outcome.excinfo is None:
        outcome.force_exception(AssertionError("; ".join(f"{n} x {text}" for text, n in findings.items())))


def pytest_report_header():
    return f"strict interpreter: seed {os.environ.get('STRICT_SEED', '0')}"
