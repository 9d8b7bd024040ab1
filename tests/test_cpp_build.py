"""The C++ extension as it is built and loaded: threads, instruction sets, sanitizers, and life without a compiler."""

import ast
import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from oracle import CACHE

ROOT = Path(__file__).parents[1]
_cpp = pytest.importorskip("tritonkern._cpp", reason="the C++ extension was not built", exc_type=ImportError)


def run_python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def compiler() -> str:
    found = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if not found:
        pytest.skip("no C++ compiler")
    return found


def test_shares_the_openmp_runtime_of_torch():
    maps = run_python(
        "import torch, tritonkern\n"
        "x = torch.randn(64, 24, 4, 32)\n"
        "torch.set_num_threads(2)\n"
        "x.exp(), tritonkern.temporal_window_attention(x, x, x, backend='cpp')\n"
        "print(open('/proc/self/maps').read())"
    )
    assert "_cpp." in maps
    runtimes = set(re.findall(r"\S*/lib(?:gomp|omp|iomp5)[^/\s]*\.so\S*", maps))
    assert len(runtimes) == 1, runtimes


CHECK = """
import torch
from tritonkern import _cpp
from tritonkern.ops.temporal_window_attention import cpp, reference

assert _cpp.isa() == {isa!r}, _cpp.isa()
torch.manual_seed(0)
for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
    for shape, left, right in (((2, 24, 1, 4, 32), 6, 6), ((1, 7, 3, 2, 24), 6, 2), ((1, 150, 1, 1, 72), 20, 0)):
        query, key, value, grad = (torch.randn(shape).to(dtype) for _ in range(4))
        exact = [x.double() for x in (query, key, value)]
        scale = shape[-1] ** -0.5
        out, lse = cpp.forward(query, key, value, left, right, scale)
        expected, expected_lse = reference.forward(*exact, left, right, scale)
        grads = cpp.backward(grad, query, key, value, out, lse, left, right, scale)
        expected_grads = reference.backward(grad.double(), *exact, expected, expected_lse, left, right, scale)
        bound = 16 * torch.finfo(dtype).eps
        for got, want in zip((out, lse, *grads), (expected, expected_lse, *expected_grads), strict=True):
            error = (got.double() - want).abs().max() / want.abs().max()
            assert error <= bound, (dtype, shape, float(error))
"""


@pytest.mark.parametrize("isa", _cpp.isas())
def test_every_instruction_set_is_right(isa):
    run_python(CHECK.format(isa=isa), TRITONKERN_CPU_ISA=isa)


@pytest.mark.slow
@pytest.mark.parametrize("isa", _cpp.isas()[1:])
@pytest.mark.parametrize("file", ["test_correlation_soft_argmax.py", "test_track_attention.py"])
def test_other_instruction_sets_pass_the_tests_of_the_best(file, isa):
    """The tests of these operations run on the best set that the machine has; float32 and float64 on the others too."""
    command = [
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        str(ROOT / "tests" / file),
        "-k",
        "cpp and (float32 or float64)",
    ]
    done = subprocess.run(
        [sys.executable, *command], env={**os.environ, "TRITONKERN_CPU_ISA": isa}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert re.search(r"\d\d+ passed", done.stdout), done.stdout[-1000:]


def test_unknown_instruction_set_names_the_usable_ones():
    code = "from tritonkern import _cpp\ntry:\n    _cpp.isa()\nexcept RuntimeError as error:\n    print(error)"
    message = run_python(code, TRITONKERN_CPU_ISA="sse9")
    assert "sse9" in message and "baseline" in message


def test_float16_conversion_is_exact_without_instructions_for_it(tmp_path):
    """All halves widened, and floats around every rounding boundary narrowed, against the hardware's conversion."""
    source = tmp_path / "conversion.cpp"
    source.write_text(
        r"""
#include "common/dtype.h"
#include <cmath>
#include <cstdio>
using namespace tritonkern::TRITONKERN_ISA;
int main() {
    std::FILE* out = std::fopen("halves.bin", "wb");
    for (uint32_t bits = 0; bits < 65536; ++bits) {
        const float wide = widen(Float16{uint16_t(bits)});
        const float next = widen(Float16{uint16_t(bits + 1)});
        const float middle = 0.5f * wide + 0.5f * next;
        const float tests[] = {wide, middle, std::nextafter(middle, wide), std::nextafter(middle, next)};
        for (float x : tests) {
            Float16 half;
            narrow(x, &half);
            std::fwrite(&x, 4, 1, out);
            std::fwrite(&half, 2, 1, out);
        }
    }
    std::fclose(out);
}
"""
    )
    flags = ["-std=c++17", "-O1", f"-I{ROOT / 'csrc'}", "-DTRITONKERN_ISA=baseline"]
    subprocess.run([compiler(), *flags, str(source), "-o", str(tmp_path / "conversion")], check=True)
    subprocess.run([str(tmp_path / "conversion")], check=True, cwd=tmp_path)

    import numpy as np

    rows = np.fromfile(tmp_path / "halves.bin", dtype=np.dtype([("wide", "<f4"), ("half", "<f2")]))
    halves = np.arange(65536, dtype=np.uint16).view(np.float16)
    with np.errstate(over="ignore", invalid="ignore"):
        assert np.array_equal(rows["wide"][::4], halves.astype(np.float32), equal_nan=True)
        assert np.array_equal(rows["half"], rows["wide"].astype(np.float16), equal_nan=True)
        assert np.array_equal(np.signbit(rows["half"]), np.signbit(rows["wide"]))


DRIVERS = {path.name.removesuffix("_memory_driver.cpp"): path for path in Path(__file__).parent.glob("*_driver.cpp")}
EVERYTHING = os.environ.get("TRITONKERN_AOT") == "all"


def names_in_setup():
    names = {"__name__": "setup", "__file__": str(ROOT / "setup.py")}
    exec(compile((ROOT / "setup.py").read_text(), "setup.py", "exec"), names)
    return names


def test_every_kernel_file_has_a_memory_driver():
    assert sorted(DRIVERS) == [path.stem for path in names_in_setup()["kernel_sources"]()]


def test_the_stub_declares_what_is_bound():
    """Builds in place write `_cpp.pyi`; each function in it exists, with these argument names and tensors."""
    declared = {}
    for node in ast.parse((ROOT / "tritonkern" / "_cpp.pyi").read_text()).body:
        if isinstance(node, ast.FunctionDef):
            is_tensor = [ast.unparse(a.annotation) in ("Tensor", "Tensor | None") for a in node.args.args]
            declared[node.name] = list(zip([a.arg for a in node.args.args], is_tensor, strict=True))
    bound = {}
    for name, function in vars(_cpp).items():
        if callable(function) and not isinstance(function, type):
            signature = function.__doc__.splitlines()[0].partition("(")[2].rpartition(") ->")[0]
            names = re.findall(r"(?:^|, )(\w+): ", signature)
            bound[name] = [(x, bool(re.search(rf"\b{x}: torch.Tensor", signature))) for x in names]
    assert declared == bound


@pytest.mark.slow
@pytest.mark.parametrize("isa", _cpp.isas() if EVERYTHING else _cpp.isas()[:1])
@pytest.mark.parametrize("operation", sorted(DRIVERS))
def test_sanitizers_find_nothing(operation, isa, tmp_path):
    """On the best instruction set of this machine, or, in `make aot` (TRITONKERN_AOT=all), on every one."""
    command = [compiler(), "-std=c++17", "-O0", "-g1", "-Wno-psabi", f"-I{ROOT / 'csrc'}", f"-DTRITONKERN_ISA={isa}"]
    command += [
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
        *names_in_setup()["instruction_sets"]()[isa],
    ]
    sources = [ROOT / "csrc" / f"{operation}.cpp", DRIVERS[operation]]
    version = subprocess.run([compiler(), "--version"], capture_output=True).stdout
    contents = [path.read_bytes() for path in (*sources, *sorted((ROOT / "csrc").rglob("*.h")))]
    key = hashlib.sha256(b"\0".join([repr(command).encode(), version, *contents])).hexdigest()
    driver = CACHE / "sanitizers" / f"{operation}.{isa}.{key[:16]}"
    if not driver.exists():
        built = subprocess.run(
            [*command, *map(str, sources), "-lgomp", "-o", str(tmp_path / "driver")], capture_output=True, text=True
        )
        if built.returncode and re.search(r"cannot find .*(asan|ubsan)", built.stderr):
            pytest.skip("the compiler has no sanitizers")
        assert built.returncode == 0, built.stderr
        driver.parent.mkdir(parents=True, exist_ok=True)
        for old in driver.parent.glob(f"{operation}.{isa}.*"):
            old.unlink()
        shutil.move(tmp_path / "driver", driver)
    # The pool of threads of OpenMP lives until the process ends; between calls it would spin where cores are rare.
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run([str(driver)], capture_output=True, text=True, env=environment, timeout=500)
    assert done.returncode == 0, done.stderr
    assert "calls" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("isa", _cpp.isas()[:1])
def test_exp_and_log_keep_their_bounds(isa, tmp_path):
    """Those that csrc/common/simd.h states; over all floats, which takes a minute, in `make aot`."""
    flags = names_in_setup()["instruction_sets"]()[isa]
    command = [compiler(), "-std=c++17", "-O2", "-Wno-psabi", f"-I{ROOT / 'csrc'}", f"-DTRITONKERN_ISA={isa}", *flags]
    source = Path(__file__).with_name("simd_accuracy.cpp")
    built = subprocess.run([*command, str(source), "-o", str(tmp_path / "accuracy")], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    command = [str(tmp_path / "accuracy"), "all" if EVERYTHING else "sampled"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    print(done.stdout)
    found = re.findall(r"^(float|double) exp (\S+) log (\S+) edges wrong 0$", done.stdout, re.MULTILINE)
    assert [name for name, *_ in found] == ["float", "double"]
    for _, exp, log in found:
        assert float(exp) <= 2 and float(log) <= 2


@pytest.mark.slow
def test_no_name_stands_for_two_things(tmp_path):
    """Link-time optimisation compares the types and functions of all files that share a name (one definition rule)."""
    version = subprocess.run([compiler(), "--version"], capture_output=True, text=True).stdout
    if "Free Software Foundation" not in version:
        pytest.skip("only GCC has -Wodr")
    setup = names_in_setup()
    output = tmp_path / "_cpp.so"
    flags = "-O1 -flto -flto-partition=none -Wodr -Wlto-type-mismatch -Werror=odr -Werror=lto-type-mismatch"
    environment = {"CXX": compiler(), "CXXFLAGS": flags, "LDFLAGS": flags}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        (tmp_path / "build.ninja").write_text(setup["ninja_file"](output, tmp_path))
    ninja = pytest.importorskip("ninja")
    done = subprocess.run([f"{ninja.BIN_DIR}/ninja", "-C", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    assert output.exists()


def test_a_line_per_compiled_file(tmp_path):
    """With a compiler that does nothing."""
    pytest.importorskip("ninja")
    command = [sys.executable, "setup.py", "build_ext", "--build-temp", str(tmp_path), "--build-lib", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "CXX": "true"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = re.findall(r"^\[(\d+)/(\d+)\] (compiled \S+|linking)$", done.stdout, re.MULTILINE)
    assert [int(count) for count, _, _ in lines] == list(range(1, int(lines[0][1]) + 1))
    assert "compiled temporal_mixer.baseline" in [text for _, _, text in lines] and lines[-1][2] == "linking"


def test_installs_without_a_compiler(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    source = tmp_path / "source"
    names = ("csrc", "tritonkern", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
    for name in names:
        entry = ROOT / name
        if entry.is_dir():
            shutil.copytree(entry, source / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "_cpp_build*"))
        elif entry.exists():
            shutil.copy(entry, source / name)
    environment = {**os.environ, "CXX": str(tmp_path / "no-such-compiler")}
    environment.pop("TRITONKERN_REQUIRE_CPP", None)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*command, "--wheel-dir", str(tmp_path), str(source)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names_inside = wheel.namelist()
        assert not [name for name in names_inside if name.endswith(".so")]
        reason = wheel.read("tritonkern/_cpp_build_error.txt").decode()
    assert "no-such-compiler" in reason and "install" in reason.lower()
