"""`make gpu` without a GPU: crashes and hangs, a rehearsal on small shapes, compiled kernels, the table."""

import importlib
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
GPU = ROOT / "benchmarks" / "gpu"


@pytest.fixture
def module(monkeypatch):
    """Imports a module of benchmarks/gpu, whose programs run with that folder as their first path."""
    monkeypatch.syspath_prepend(str(GPU))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and Path(sys.modules[name].__file__).parent == GPU:
            del sys.modules[name]


FAULTY = """
import os, sys, time
sys.path.insert(0, {gpu!r})
from rows import Part
part = Part("faulty")
part.item("first", lambda: {{"value": 1}})
part.item("raises", lambda: 1 // 0)
part.item("dies", lambda: os._exit(7))
part.item("hangs", lambda: time.sleep(100))
part.item("takes too long", lambda: {{"value": 2}}, needs=1000)
part.item("last", lambda: {{"value": 3}})
"""


@pytest.mark.parametrize("shares", [1, 2])
def test_an_item_that_fails_costs_its_own_row_alone(module, tmp_path, shares):
    program = tmp_path / "faulty.py"
    program.write_text(FAULTY.format(gpu=str(GPU)))
    module("runner").run_part("faulty", [sys.executable, str(program)], tmp_path, 30, shares, item_seconds=1.5)
    rows = {row["name"]: row for row in module("rows").read(tmp_path)}
    assert list(sorted(rows)) == sorted(["first", "raises", "dies", "hangs", "takes too long", "last"])
    assert (rows["first"]["value"], rows["last"]["value"]) == (1, 3)
    assert rows["raises"]["error"].startswith("ZeroDivisionError")
    assert rows["dies"]["error"] == "the process ended with status 7"
    assert rows["hangs"]["error"] == "killed: no result after 2 s"
    assert rows["takes too long"]["skipped"] == "no time"
    assert "ZeroDivisionError" in (tmp_path / "errors.txt").read_text()


def test_a_part_ends_with_its_time(module, tmp_path):
    program = tmp_path / "slow.py"
    program.write_text(FAULTY.format(gpu=str(GPU)).replace("time.sleep(100)", "time.sleep(4)"))
    module("runner").run_part("faulty", [sys.executable, str(program)], tmp_path, 3, item_seconds=60)
    rows = {row["name"]: row for row in module("rows").read(tmp_path)}
    assert rows["last"].get("skipped") == "no time" and "error" not in rows["hangs"]


def test_a_process_that_cannot_start_is_a_row(module, tmp_path):
    module("runner").run_part("broken", [sys.executable, "-c", "import nothing_of_this_name"], tmp_path, 30)
    (row,) = module("rows").read(tmp_path)
    assert row == {"part": "broken", "name": "process", "error": "ended with status 1"}
    assert "nothing_of_this_name" in (tmp_path / "log.txt").read_text()


def rehearse(out, *parts, **environment):
    command = [sys.executable, str(GPU), *parts]
    environment = {**os.environ, "OUT": str(out), "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=out)
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    return done, rows


@pytest.mark.slow
def test_rehearsal(tmp_path):
    """Every part but the tests, from another folder, with the C++ kernels on small shapes."""
    parts = ("versions", "correct", "times", "peers", "models", "memcheck", "sweep")
    done, rows = rehearse(tmp_path, *parts)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:] + (tmp_path / "log.txt").read_text()[-2000:]
    assert {row["part"] for row in rows} == {"cache", *parts}
    correct = [row for row in rows if row["part"] == "correct"]
    assert len(correct) == 14 * 4 + 14 * 2 + 14 and not any("failed" in row for row in correct)
    timed = [row for row in rows if row["part"] == "times"]
    assert len(timed) > 40 and all(row["ms"] > 0 for row in timed)
    assert "correct: 98 of 98" in done.stdout and "window chrono float32 forward+backward" in done.stdout


BREAK_THE_SCALE = """
from tritonkern.ops.temporal_window_attention import triton_kernels
run = triton_kernels._run
triton_kernels._run = lambda *arguments: run(*arguments[:-1], 1.01 * arguments[-1])
"""
ONE_CASE = """
import parts
parts.SMALL[:] = parts.SMALL[2:3]
parts._run("correct")
"""


@pytest.mark.slow
@pytest.mark.parametrize("broken", [False, True])
def test_correctness_in_the_interpreter(tmp_path, broken):
    """One case through Triton's kernels, as they are and with a scale that is 1 % too large."""
    environment = {"PYTHONPATH": os.pathsep.join([str(GPU), str(ROOT)]), "TRITON_INTERPRET": "1", "OUT": str(tmp_path)}
    environment |= {"PART_SHARE": "0", "PART_SHARES": "1", "PART_DEADLINE": "1e12"}
    command = [sys.executable, "-c", BREAK_THE_SCALE * broken + ONE_CASE]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    exact = [row for row in rows if "float32" in row["name"] or "float64" in row["name"]]
    assert len(exact) == 3 and all(("failed" in row) == broken for row in exact), rows


def archive(path, key, files=()):
    path.parent.mkdir(parents=True)
    with tarfile.open(path, "w:xz") as target:
        for name, text in (("key.json", json.dumps({"key": key})), *files):
            member = tarfile.TarInfo(name)
            member.size = len(text)
            target.addfile(member, io.BytesIO(text.encode()))


def test_compiled_kernels_are_used_by_the_triton_they_were_made_for(module, tmp_path, monkeypatch):
    triton = pytest.importorskip("triton")
    from triton.runtime.cache import triton_key

    compiled = module("compiled")
    assert compiled.key_of(Path(triton.__file__).parent) == triton_key()
    monkeypatch.setattr(compiled, "ROOT", tmp_path)
    monkeypatch.setattr(compiled, "ARCHIVE", tmp_path / "build" / "cache.tar.xz")
    monkeypatch.setattr(compiled, "FOLDER", tmp_path / "cache")
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    assert "there is no build/cache.tar.xz" in compiled.unpack()["skipped"]

    archive(compiled.ARCHIVE, "another key", [("ABC/kernel.cubin", "code")])
    assert "another Triton" in compiled.unpack()["skipped"]
    assert not compiled.FOLDER.exists() and "TRITON_CACHE_DIR" not in os.environ

    compiled.ARCHIVE.unlink()
    compiled.ARCHIVE.parent.rmdir()
    archive(compiled.ARCHIVE, triton_key(), [("ABC/kernel.cubin", "code")])
    monkeypatch.setenv("TRITON_CACHE_DIR", "restored after the test")
    assert compiled.unpack() == {"kernels": 1}
    assert os.environ["TRITON_CACHE_DIR"] == str(compiled.FOLDER)


ROWS = [
    {"part": "versions", "name": "versions", "gpu": "Some GPU 80GB", "torch": "2.11", "triton": "3.6", "date": "today"},
    {"part": "times", "name": "copy", "ms": 2.0, "how": "graph", "bytes": 6e9},
    {"part": "times", "name": "product bfloat16", "ms": 1.0, "how": "graph", "flops": 5e11},
    {"part": "times", "name": "window bfloat16 forward", "op": "window", "shape": [1, 2], "dtype": "bfloat16"}
    | {"ms": 1.0, "p20": 0.9, "p80": 1.1, "how": "graph", "bytes": 1.5e9, "flops": 1e11, "host_us": 50.0}
    | {"first_call": 0.2, "peak_memory": 1000},
    {"part": "correct", "name": "window", "worst": 1e-3},
    {"part": "correct", "name": "match", "worst": 1.0, "failed": "errors"},
    {"part": "peers", "name": "flex", "error": "RuntimeError: no"},
]  # fmt: skip


def test_table_and_results(module):
    """1.5 GB at 3 TB/s take 0.5 ms, 100 GFLOP at 500 TFLOP/s 0.2 ms: half of the ceiling in 1 ms."""
    record = module("record")
    table = "\n".join(record.lines(ROWS))
    assert "copy: 3 TB/s product bfloat16: 500 TFLOP/s" in table
    assert " 50.0%" in next(line for line in table.splitlines() if "window bfloat16 forward" in line)
    assert "correct: 1 of 2" in table and "failed: correct: match: errors" in table
    assert "error: peers: flex: RuntimeError: no" in table
    (row,) = record.results(ROWS, "abc")
    assert row["median"] == 1e-3 and row["floor"] == 0.5e-3 and row["direction"] == "forward"
    assert row["commit"] == "abc" and row["torch"] == "2.11"


HIDE = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("av", "typer", "rich", "safetensors", "PIL", "pyarrow"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hidden())
import pytest
sys.exit(pytest.main(["-q", "--collect-only", "-p", "no:cacheprovider", "tests"]))
"""


@pytest.mark.slow
def test_files_of_kernels_are_collected_on_a_bare_image():
    """One file that cannot be imported would end the tests of `make gpu` before they begin."""
    root = Path(__file__).resolve().parents[1]
    environment = {name: value for name, value in os.environ.items() if name != "CI"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    done = subprocess.run([sys.executable, "-c", HIDE], cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "tests/test_contracts.py" in done.stdout and "tests/test_vot.py" not in done.stdout
