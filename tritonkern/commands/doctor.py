"""`tritonkern doctor`: the state of the installation. It needs the standard library only, and survives a broken one."""

import os
import platform
import shlex
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

_PACKAGES = ("tritonkern", "torch", "triton", "numpy", "einops", "av", "pillow", "safetensors", "typer", "rich")
_FEATURES = (
    "sse4_2",
    "avx",
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512dq",
    "avx512vl",
    "avx512_bf16",
    "asimd",
)


def doctor(strict: bool = False) -> int:
    """Show whether this machine has its fast backends, what is missing, and what to do.

    Returns 1 if `strict` and a fast backend is missing or nothing can be said about them, or if nothing can be written
    to standard output, else 0.
    """
    page, complete = _backends()
    lines = [page, "", _processor(), _compiler(), f"python {sys.version.split()[0]}"]
    lines += [f"{package} {version(package)}" for package in _PACKAGES]
    written = _written("\n".join(lines) + "\n")
    return int(not written or (strict and not complete))


def _written(page: str) -> bool:
    """Whether the page went to standard output, which may be closed, full or a narrow encoding."""
    try:
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="backslashreplace")
        sys.stdout.write(page)
        sys.stdout.flush()
    except Exception as error:
        if sys.stderr is not None:
            sys.stderr.write(f"tritonkern: the page cannot be written ({type(error).__name__}: {error})\n")
        if isinstance(error, OSError):
            # Or Python tries again, and fails, when it ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return False
    return True


def _backends() -> tuple[str, bool]:
    try:
        from tritonkern.ops._backends import missing, report

        return report(), not missing()
    # Whatever is broken must not keep the rest of the page from the user, who runs this command because of it.
    except Exception as error:
        text = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return f"broken: the backends cannot be listed: {text}", False


def _processor() -> str:
    """The CPU, and which of the instruction sets it has that the kernels or PyTorch make use of."""
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
    except (OSError, ValueError):
        fields = {}
    fields = {name.strip(): value.strip() for name, value in fields.items()}
    has = fields.get("flags", fields.get("Features", "")).split()
    name = fields.get("model name", platform.machine())
    features = " ".join(feature for feature in _FEATURES if feature in has) or "features unknown"
    return f"CPU: {name}, {os.cpu_count()} logical cores, {features}"


def _compiler() -> str:
    """The C++ compiler that setup.py would take."""
    for candidate in filter(None, (os.environ.get("CXX"), "g++", "clang++", "c++")):
        try:
            command = shlex.split(candidate)
            if command and shutil.which(command[0]):
                result = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=20)
                return f"C++ compiler: {candidate}, {result.stdout.splitlines()[0]}"
        except Exception as error:
            return f"C++ compiler: {candidate}, which does not run ({type(error).__name__})"
    return "C++ compiler: none on PATH (Debian: apt install g++)"


def version(package: str) -> str:
    """The installed version of `package`, or what is wrong with it."""
    try:
        return metadata.version(package)
    except Exception as error:
        missing = isinstance(error, metadata.PackageNotFoundError)
        return "not installed" if missing else f"damaged ({type(error).__name__}: {error})"
