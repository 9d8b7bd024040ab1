"""Operators, called directly, read and write nothing next to their tensors, whatever positions and cells they get.

The memory drivers (`*_memory_driver.cpp`) let AddressSanitizer watch the C++ kernels; here pages that cannot be read
are around the tensors of every operator, on every backend that runs on this machine.
"""

import os
import subprocess
import sys
from pathlib import Path

import guard_pages
import pytest
import torch
from oracle import native_backends

ROOT = Path(__file__).parents[1]
BACKENDS = [
    pytest.param(backend, id=backend, marks=[*where.marks, *[pytest.mark.slow] * (backend == "reference")])
    for where in native_backends("track_attention")
    for backend, device in where.values
    if device == "cpu"
]


@pytest.mark.skipif(sys.platform != "linux", reason="uses mprotect")
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_operator_stays_inside_of_its_tensors(backend):
    command = [sys.executable, str(ROOT / "tests" / "guard_pages.py"), backend]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.returncode}\n{done.stdout[-200:]}\n{done.stderr[-3000:]}"
    lines = done.stdout.splitlines()
    found = {name: tuple(map(int, counts.split())) for name, counts in zip(lines[::2], lines[1::2], strict=True)}
    assert list(found) == [family.__name__ for family in guard_pages.FAMILIES]
    assert all(count > 20 for count, _ in found.values())
    assert [name for name, (_, refused) in found.items() if refused] == ["query_key"]


@pytest.mark.parametrize(("at_end", "offset"), [(True, 60), (False, -1)])
def test_the_guards_are_noticed(at_end, offset):
    code = f"""
import ctypes, guard_pages, torch
x = guard_pages.guarded(torch.zeros(3, 5), {at_end})
ctypes.string_at(x.data_ptr(), 60), print("inside", flush=True)
ctypes.string_at(x.data_ptr() + {offset}, 1)
"""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode < 0 and done.stdout == "inside\n"


def test_operators_have_a_case():
    covered = {operator.name() for family in guard_pages.FAMILIES for operator, _ in family(torch.float32, 2)}
    assert covered == {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("tritonkern::")}
