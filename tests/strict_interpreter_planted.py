"""Kernels with planted faults, one per test: under the plugin all but the first test must fail.

`test_strict_interpreter.py` runs this file.
"""

import torch
import triton
import triton.language as tl

PROGRAMS, BLOCK = 8, 4


@triton.jit
def add_one(x, out, n, LAST_LANE: tl.constexpr, BLOCK: tl.constexpr):
    """LAST_LANE: also the number after the last one is loaded."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at, mask=at < n + LAST_LANE, other=0.0) + 1, mask=at < n)


@triton.jit
def store_past_the_end(out, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, at.to(tl.float32))


@triton.jit
def overlapping_stores(out, BLOCK: tl.constexpr):
    at = tl.program_id(0) * (BLOCK - 1) + tl.arange(0, BLOCK)
    tl.store(out + at, at.to(tl.float32))


@triton.jit
def running_sum(out):
    """Each program adds one to the result of the one before it."""
    program = tl.program_id(0)
    before = tl.load(out + program - 1, mask=program > 0, other=0.0)
    tl.store(out + program, before + 1)


@triton.jit
def plain_and_atomic(out):
    tl.atomic_add(out, 1.0)
    tl.store(out + 1, tl.load(out))


@triton.jit
def tickets(counter, out):
    """The order in which programs arrive: no race, but another result in every order."""
    ticket = tl.atomic_add(counter, 1)
    tl.store(out + tl.program_id(0), ticket)


def test_without_a_fault():
    x, out = torch.rand(30), torch.empty(30)
    add_one[(PROGRAMS,)](x, out, 30, 0, BLOCK)
    assert torch.equal(out, x + 1)


def test_load_out_of_bounds():
    memory, out = torch.rand(31), torch.empty(30)
    add_one[(PROGRAMS,)](memory[:30], out, 30, 1, BLOCK)
    assert torch.equal(out, memory[:30] + 1)


def test_store_out_of_bounds():
    memory = torch.empty(PROGRAMS * BLOCK)
    store_past_the_end[(PROGRAMS,)](memory[:-1], BLOCK)
    assert torch.equal(memory, torch.arange(PROGRAMS * BLOCK).float())


def test_stores_race():
    out = torch.empty(PROGRAMS * BLOCK)
    overlapping_stores[(PROGRAMS,)](out, BLOCK)


def test_load_races_with_store():
    running_sum[(PROGRAMS,)](torch.zeros(PROGRAMS))


def test_atomic_races_with_load():
    plain_and_atomic[(PROGRAMS,)](torch.zeros(2))


def test_order_dependence():
    out = torch.empty(PROGRAMS, dtype=torch.int32)
    tickets[(PROGRAMS,)](torch.zeros(1, dtype=torch.int32), out)
    assert torch.equal(out, torch.arange(PROGRAMS, dtype=torch.int32))


@triton.jit
def multiply_add(x, out):
    value = tl.load(x)
    tl.store(out, value * value - tl.load(x + 1))


def test_hardware_fuses_products():
    """x * x - round(x * x) is zero unless the product keeps its last bits."""
    x = torch.tensor([1 + 2.0**-12, (1 + 2.0**-12) ** 2])
    out = torch.empty(1)
    multiply_add[(1,)](x, out)
    assert out.item() == 0
