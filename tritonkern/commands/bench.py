"""`tritonkern bench`: run the benchmarks of a checkout."""

import subprocess
import sys
from importlib import util
from pathlib import Path

import typer

from tritonkern._optional import how_to_install
from tritonkern.commands._terminal import one_line_errors


def bench(context: typer.Context) -> None:
    """Run the benchmarks of a checkout; further arguments go to pytest."""
    with one_line_errors():
        benchmarks = Path(__file__).parents[2] / "benchmarks"
        if not benchmarks.is_dir():
            raise ValueError(
                "the benchmarks are not part of the installed package: clone the repository, "
                "and run `pip install -e .[test]` and `tritonkern bench` there"
            )
        if util.find_spec("pytest_benchmark") is None:
            raise ValueError(f"the benchmarks need pytest-benchmark: {how_to_install('test')}")
        command = [sys.executable, "-m", "pytest", str(benchmarks), "--benchmark-only", *context.args]
        raise typer.Exit(subprocess.run(command).returncode)
