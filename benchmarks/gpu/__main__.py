"""Everything to do on a machine with a GPU, in one command of about 450 seconds: `make gpu`.

    OUT=/tmp/out python benchmarks/gpu [PART ...]

Results are lines of $OUT/rows.jsonl, each written as soon as it is known; `record.py` turns them into a table and into
benchmarks/results/. Needs the torch, Triton, pytest and C++ compiler of the image. Without a GPU the same program runs
on small shapes, as a rehearsal.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import compiled
import record
from rows import append, read
from runner import run_part

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


class Step(NamedTuple):
    """A part and its seconds; `shares` processes divide its items among them."""

    part: str
    seconds: float
    shares: int = 1


# Parts of one line run side by side, those of different lines one after the other. Whatever is timed runs alone.
PLAN = [
    [Step("versions", 15)],
    [Step("correct", 75, shares=6)],
    [Step("times", 115)],
    [Step("peers", 45)],
    [Step("models", 45)],
    [Step("tests", 100), Step("memcheck", 100)],
    [Step("sweep", 55)],
]


def main(chosen: list[str]) -> int:
    out = Path(os.environ.get("OUT", ROOT / "build" / "gpu"))
    out.mkdir(parents=True, exist_ok=True)
    unknown = sorted(set(chosen) - {step.part for line in PLAN for step in line})
    if unknown:
        print(f"no part called {', '.join(unknown)}; there are: {', '.join(s.part for line in PLAN for s in line)}")
        return 2
    start = time.monotonic()
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), str(HERE), os.environ.get("PYTHONPATH")]))
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "8")
    append(out, {"part": "cache", "name": "compiled kernels", **compiled.unpack()})
    for line in PLAN:
        steps = [step for step in line if not chosen or step.part in chosen]
        threads = [threading.Thread(target=_run, args=(step, out)) for step in steps]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for step in steps:
            print(f"{time.monotonic() - start:6.1f} s  {step.part}", flush=True)
    rows = read(out)
    print("\n".join(record.lines(rows)))
    return 1 if any("error" in row or "failed" in row for row in rows) else 0


def _run(step: Step, out: Path) -> None:
    if step.part == "tests":
        run_part("tests", _pytest(), out, step.seconds, item_seconds=step.seconds)
    else:
        run_part(step.part, [sys.executable, str(HERE / "parts.py"), step.part], out, step.seconds, step.shares)


def _pytest() -> list[str]:
    """The quick tests that run on the device."""
    command = [sys.executable, "-m", "pytest", str(ROOT / "tests"), "-q", "-p", "pytest_rows", "-m", "not slow"]
    command += ["-k", "triton or cuda or gpu", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    return command + (["-n", "8"] if importlib.util.find_spec("xdist") else [])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
