"""Which backend can run a call, and the reason where one cannot.

One function per backend decides whether it can run; selection, error messages and `tritonkern doctor` all use it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import pkgutil
import warnings
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch

MODULES = {"cpp": "cpp", "triton": "triton_kernels", "reference": "reference"}
PREFERRED = {"cpu": "cpp", "cuda": "triton"}
# Instinct MI300 and MI350.
_AMD = ("gfx942", "gfx950")


class Obstacle(NamedTuple):
    """Why a backend cannot run, and what to do about it."""

    reason: str
    remedy: str


def check_name(backend: str | None) -> None:
    """Raise unless `backend` is None or names a backend."""
    if backend is not None and not isinstance(backend, str):
        raise TypeError(f"backend must be a string or None, got {type(backend).__name__}")
    if backend is not None and backend not in MODULES:
        raise ValueError(f"backend must be one of {', '.join(MODULES)} or None, got {backend!r}")


@functools.cache
def load(operation: str, device: torch.device, backend: str | None = None) -> ModuleType:
    """The module that runs `operation` on `device`; None chooses the fastest, and warns where that is a slow one.

    Cached, so that a fallback warns once per operation and device, and a call costs one dictionary look-up.
    """
    chosen = _choose(operation, device) if backend is None else backend
    check_name(chosen)
    if unavailable(operation, chosen, device) is not None:
        raise ValueError(
            f"backend={chosen!r} cannot run {operation} on {device}. Backends:\n{_listing(operation, device)}"
        )
    return _module(operation, chosen)


def unavailable(operation: str, backend: str, device: torch.device) -> Obstacle | None:
    """None if `backend` can run `operation` on `device`."""
    if importlib.util.find_spec(_module_name(operation, backend)) is None:
        return Obstacle(f"{operation} is not written for it", "use another backend")
    return _PREDICATES[backend](device)


def missing() -> dict[str, Obstacle]:
    """The fast backends that this machine could run and does not."""
    found = {"C++ kernels for the CPU": _PREDICATES["cpp"](torch.device("cpu"))}
    if has_gpu():
        found["Triton kernels for the GPU"] = _PREDICATES["triton"](torch.device("cuda"))
    return {name: obstacle for name, obstacle in found.items() if obstacle is not None}


def has_gpu() -> bool:
    """Whether this machine has a GPU, also one that PyTorch cannot use."""
    return torch.cuda.is_available() or any(Path(path).exists() for path in ("/dev/nvidia0", "/dev/kfd"))


def report() -> str:
    """The page that `tritonkern doctor` prints: a verdict, what is missing and what to do, what each backend runs."""
    lacks = missing()
    uses = []
    if "C++ kernels for the CPU" not in lacks:
        uses.append(f"C++ kernels ({importlib.import_module('tritonkern._cpp').isa()}) on the CPU")
    if not has_gpu():
        uses.append("no GPU")
    elif "Triton kernels for the GPU" not in lacks:
        uses.append(f"Triton kernels on {torch.cuda.get_device_name()}")
    verdict = "slow: this machine lacks " + " and ".join(lacks) if lacks else "ready"
    lines = ["; ".join([verdict, *uses])]
    lines += [f"  {name}: {obstacle.reason}; {obstacle.remedy}" for name, obstacle in lacks.items()]
    fallback = "raise (TRITONKERN_STRICT=1)" if strict() else "warn once"
    lines += ["", f"torch {torch.__version__}, {torch.get_num_threads()} CPU threads"]
    lines.append(f"calls that fall back to the slow reference {fallback}")

    folders = importlib.import_module("tritonkern.ops").__path__
    operations = [module.name for module in pkgutil.iter_modules(folders) if module.ispkg]
    lines += ["", f"operations: {', '.join(operations)}"]
    for backend, what in _DESCRIPTIONS.items():
        unwritten = [name for name in operations if importlib.util.find_spec(_module_name(name, backend)) is None]
        lines.append(f"  {backend:10}{what}" + (f"; not written for {', '.join(unwritten)}" if unwritten else ""))
    return "\n".join(lines)


def _choose(operation: str, device: torch.device) -> str:
    preferred = PREFERRED.get(device.type)
    if preferred is not None and unavailable(operation, preferred, device) is None:
        return preferred
    message = (
        f"{operation} falls back to the slow eager reference on {device}. Backends:\n{_listing(operation, device)}"
    )
    if strict():
        raise RuntimeError(f"{message}\nPass backend='reference' or unset TRITONKERN_STRICT to allow it.")
    warnings.warn(message, RuntimeWarning, stacklevel=2)
    return "reference"


def strict() -> bool:
    return os.environ.get("TRITONKERN_STRICT", "0") == "1"


def _listing(operation: str, device: torch.device) -> str:
    return "\n".join(f"  {_line(name, unavailable(operation, name, device), 'available')}" for name in MODULES)


def _line(backend: str, obstacle: Obstacle | None, otherwise: str) -> str:
    return f"{backend:10}{otherwise if obstacle is None else f'missing: {obstacle.reason}; {obstacle.remedy}'}"


def _module_name(operation: str, backend: str) -> str:
    return f"tritonkern.ops.{operation}.{MODULES[backend]}"


def _module(operation: str, backend: str) -> ModuleType:
    return importlib.import_module(_module_name(operation, backend))


def _cpp(device: torch.device) -> Obstacle | None:
    try:
        importlib.import_module("tritonkern._cpp")
    except ImportError as error:
        # setup.py leaves the compiler's message there when the package had to be installed without its extension.
        note = Path(__file__).parents[1] / "_cpp_build_error.txt"
        reason = f"its build failed, see {note}" if note.exists() else str(error)
        return Obstacle(
            f"the C++ extension cannot be imported ({reason})",
            "install a C++17 compiler (Debian: apt install g++) and then tritonkern again",
        )
    if device.type != "cpu":
        return Obstacle(f"it runs on CPU tensors, not on {device.type}", "move the tensors to the CPU")
    return None


def _triton(device: torch.device) -> Obstacle | None:
    try:
        triton = importlib.import_module("triton")
    except ImportError as error:
        return Obstacle(f"Triton cannot be imported ({error})", "pip install 'triton>=3.4' (Linux)")
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 4):
        return Obstacle(f"Triton {triton.__version__} is too old", "pip install 'triton>=3.4'")
    if device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") == "1":
            return None
        return Obstacle(
            "it runs CPU tensors in Triton's interpreter only, for debugging",
            "move the tensors to a GPU, or set TRITON_INTERPRET=1 before Python starts",
        )
    if device.type != "cuda":
        return Obstacle(f"it runs on CUDA and ROCm tensors, not on {device.type}", "move the tensors to such a GPU")
    if not torch.cuda.is_available():
        return Obstacle("this PyTorch finds no GPU", "install a GPU build of PyTorch and check the driver")
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return Obstacle(
            f"{torch.cuda.get_device_name(device)} is older than Ampere (sm_80)", "use a newer GPU, or the CPU"
        )
    if torch.version.hip is not None:
        architecture = torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
        if architecture not in _AMD:
            return Obstacle(
                f"{torch.cuda.get_device_name(device)} is {architecture}, and the kernels are compiled without "
                f"register spills for {' and '.join(_AMD)} alone (on gfx1100 ten of them spill)",
                "use backend='reference', or the CPU",
            )
    return None


def _reference(device: torch.device) -> Obstacle | None:
    return None


_DESCRIPTIONS = {
    "cpp": "runs CPU tensors",
    "triton": "runs CUDA and ROCm tensors",
    "reference": "runs everywhere, slowly",
}
_PREDICATES = {"cpp": _cpp, "triton": _triton, "reference": _reference}
