"""The strict interpreter finds planted faults, and none in the kernels of this package."""

import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).parent
OUT_OF_BOUNDS = {"test_load_out_of_bounds": "load out of bounds", "test_store_out_of_bounds": "store out of bounds"}
RACES = {
    "test_stores_race": "race: two programs store to one place",
    "test_load_races_with_store": "race: (load of what another program stores|store to what another program loads)",
    "test_atomic_races_with_load": "race: (load of what atomics add to|atomic access to what is also)",
}


def pytest_strict(file, **environment):
    command = [sys.executable, "-m", "pytest", "-q", "-rf", "-p", "strict_interpreter", "-p", "no:cacheprovider"]
    command.append(str(HERE / file))
    path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path, "COLUMNS": "300", **environment}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("hardware", ["0", "1"])
def test_planted_faults_are_found(hardware):
    done = pytest_strict("strict_interpreter_planted.py", STRICT_HARDWARE=hardware)
    failed = set(re.findall(r"^FAILED \S+::(\w+)", done.stdout, re.MULTILINE))
    expected = {*OUT_OF_BOUNDS, *RACES, "test_order_dependence"} | (
        {"test_hardware_fuses_products"} if hardware == "1" else set()
    )
    assert failed == expected, done.stdout
    for name, finding in {**OUT_OF_BOUNDS, **RACES}.items():
        assert re.search(rf"FAILED \S+::{name}\b.*{finding}", done.stdout), (name, done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("hardware", ["0", "1"])
def test_no_kernel_leaves_its_tensors_or_races(hardware):
    """Once in the order of seed 0, once in a random order and with the arithmetic of a GPU."""
    seed = "0" if hardware == "0" else str(random.SystemRandom().randrange(2**31))
    print(f"STRICT_SEED={seed} STRICT_HARDWARE={hardware}")
    done = pytest_strict("strict_interpreter_cases.py", STRICT_SEED=seed, STRICT_HARDWARE=hardware)
    assert done.returncode == 0, f"seed {seed}\n{done.stdout[-6000:]}{done.stderr[-2000:]}"
