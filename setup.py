"""Builds `tritonkern._cpp`, the CPU kernels, with ninja.

Files of csrc/ are compiled for each instruction set, those of its folders once. There is no list of them.

Prints a line per compiled file, which `pip install -v` shows.

Needs a C++17 compiler (GCC >= 9 or clang >= 11), never PyTorch. Where the build is impossible the package installs
without the extension and leaves the reason in `tritonkern/_cpp_build_error.txt`, which `tritonkern doctor` shows.

Environment: CXX chooses the compiler; CXXFLAGS and LDFLAGS are appended; TRITONKERN_WERROR=1 turns warnings into
errors; TRITONKERN_REQUIRE_CPP=1 makes a failed build an error.
"""

import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
ERROR_FILE = "_cpp_build_error.txt"
X86_64 = {
    "baseline": ["-march=x86-64", "-O2", "-DTRITONKERN_VECTOR_BYTES=16"],
    "avx2": ["-mavx2", "-mfma", "-mf16c", "-DTRITONKERN_VECTOR_BYTES=32"],
    "avx512": ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
    + ["-DTRITONKERN_VECTOR_BYTES=64"],
}
OTHER = {"baseline": ["-DTRITONKERN_VECTOR_BYTES=16"]}


def instruction_sets() -> dict[str, list[str]]:
    return X86_64 if platform.machine() in ("x86_64", "AMD64") else OTHER


def kernel_sources() -> list[Path]:
    """Compiled for every instruction set; the name of each file is that of its operation."""
    return sorted((ROOT / "csrc").glob("*.cpp"))


def binding_sources() -> list[Path]:
    """Compiled once, with pybind11."""
    return sorted((ROOT / "csrc").glob("*/*.cpp"))


def find_compiler() -> list[str]:
    """The command of a C++ compiler that exists, CXX first."""
    candidates = [os.environ.get("CXX"), "g++", "clang++", "c++", sysconfig.get_config_var("CXX")]
    for candidate in filter(None, candidates):
        command = shlex.split(candidate)
        if shutil.which(command[0]):
            return command
        if candidate == os.environ.get("CXX"):
            break
    raise RuntimeError(
        f"no C++ compiler: none of {', '.join(filter(None, candidates))} is on PATH. Install g++ (Debian, Ubuntu: "
        "apt install g++; Fedora: dnf install gcc-c++), or set CXX, and install tritonkern again."
    )


def ninja_file(output: Path, build_dir: Path) -> str:
    """The text of a build.ninja that makes the extension at `output`."""
    import pybind11

    cxx = find_compiler()
    common = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", f"-I{ROOT / 'csrc'}"]
    common += ["-Wall", "-Wextra", "-Wno-psabi"]
    if os.environ.get("TRITONKERN_WERROR") == "1":
        common.append("-Werror")
    common += shlex.split(os.environ.get("CXXFLAGS", ""))
    # Contraction into fused multiply-adds is off by default under -std=c++17. Floating-point traps are not used.
    kernel = [*common, "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
    includes = [pybind11.get_include(), sysconfig.get_path("include"), sysconfig.get_path("platinclude")]
    bindings = [*common, *(f"-isystem{path}" for path in dict.fromkeys(includes))]
    link = ["-shared", *shlex.split(os.environ.get("LDFLAGS", "")), "-lgomp", "-lpthread"]

    rules = [
        "ninja_required_version = 1.5",
        "rule compile",
        f"  command = {shlex.join(cxx)} -MMD -MF $out.d $flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = $what",
        "rule link",
        f"  command = {shlex.join(cxx)} $in {shlex.join(link)} -o $out",
        "  description = linking",
    ]

    def escape(text: object) -> str:
        return str(text).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    objects = []

    def compile_rule(source: Path, name: str, flags: list[str]) -> None:
        target = build_dir / f"{name}.o"
        objects.append(escape(target))
        rules.append(f"build {escape(target)}: compile {escape(source)}")
        rules.extend([f"  flags = {shlex.join(flags)}", f"  what = compiled {name}"])

    for source in kernel_sources():
        for isa, flags in instruction_sets().items():
            compile_rule(source, f"{source.stem}.{isa}", [*kernel, *flags, f"-DTRITONKERN_ISA={isa}"])
    for source in binding_sources():
        compile_rule(source, f"{source.parent.name}.{source.stem}", bindings)
    rules += [f"build {escape(output)}: link {' '.join(objects)}", f"default {escape(output)}"]
    return "\n".join(rules) + "\n"


def stub(extension: Path) -> str:
    """The text of `_cpp.pyi`, from the signatures that pybind11 writes into docstrings."""
    spec = importlib.util.spec_from_file_location("tritonkern._cpp", extension)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    lines = ['"""The compiled CPU kernels, bound in csrc/*/bindings.cpp. Written by setup.py."""', ""]
    lines += ["from torch import Tensor", ""]
    for name, function in sorted(vars(module).items()):
        if callable(function):
            signature = function.__doc__.splitlines()[0]
            for pattern, kind in (("Int", "int"), ("Float", "float")):
                signature = re.sub(rf"typing\.Supports{pattern}( \| typing\.SupportsIndex)?", kind, signature)
            arguments, result = signature.replace("torch.Tensor", "Tensor | None").split("(", 1)[1].rsplit(") -> ", 1)
            listed = [f"    {argument}," for argument in arguments.split(", ") if argument]
            lines += [f"def {name}(", *listed, f") -> {result}: ..."] if listed else [f"def {name}() -> {result}: ..."]
    return "\n".join(lines) + "\n"


class NinjaBuild(build_ext):
    def run(self) -> None:
        super().run()
        in_source = Path(self.get_ext_fullpath("tritonkern._cpp"))
        if self.inplace and in_source.exists():
            (ROOT / "tritonkern" / "_cpp.pyi").write_text(stub(in_source), encoding="utf-8")

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        packages = [output.parent, *([ROOT / "tritonkern"] if self.editable_mode else [])]
        for package in packages:
            (package / ERROR_FILE).unlink(missing_ok=True)
        try:
            self.run_ninja(output)
        except (RuntimeError, OSError, ImportError) as error:
            if os.environ.get("TRITONKERN_REQUIRE_CPP") == "1":
                raise
            output.unlink(missing_ok=True)
            for package in packages:
                package.mkdir(parents=True, exist_ok=True)
                (package / ERROR_FILE).write_text(f"{error}\n", encoding="utf-8")
            print(f"warning: tritonkern is installed without its C++ kernels: {error}", file=sys.stderr)

    def run_ninja(self, output: Path) -> None:
        if not sys.platform.startswith("linux"):
            raise RuntimeError(f"the C++ kernels are built on Linux only, this is {sys.platform}.")
        import ninja

        # pip gives an editable build a new folder each time, in which everything would be compiled again.
        folder = ROOT / "build" / "editable" if self.editable_mode else Path(self.build_temp).resolve()
        build_dir = folder / "tritonkern_cpp"
        build_dir.mkdir(parents=True, exist_ok=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        (build_dir / "build.ninja").write_text(ninja_file(output, build_dir), encoding="utf-8")
        command = [str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(build_dir)]
        environment = {**os.environ, "NINJA_STATUS": "[%f/%t] "}
        printed = []
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        ) as ninja_process:
            for line in ninja_process.stdout:
                printed.append(line)
                print(line, end="", flush=True)
        if ninja_process.returncode:
            raise RuntimeError(f"the compiler failed:\n{''.join(printed)[-4000:]}")

    def get_outputs(self) -> list[str]:
        outputs = super().get_outputs()
        reasons = [str(Path(name).parent / ERROR_FILE) for name in outputs]
        return [name for name in outputs + reasons if Path(name).exists()]


if __name__ == "__main__":
    setup(ext_modules=[Extension("tritonkern._cpp", sources=[], optional=True)], cmdclass={"build_ext": NinjaBuild})
