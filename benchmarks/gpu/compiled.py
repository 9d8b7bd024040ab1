"""Kernels compiled on a machine without a GPU, for one that has it.

    PYTHONPATH=<folder with the Triton of the GPU machine> python benchmarks/gpu/compiled.py [<its wheel, unpacked>]

writes build/triton-cache.tar.xz, which travels with the tree; `unpack` puts it where that machine's Triton finds it.
The wheel is needed where that machine has another version of Python: Triton's cache keys are hashes of its own files,
of which `libtriton.so` differs by Python. The archive holds these hashes, and is not used where they do not fit.
"""

from __future__ import annotations

import io
import json
import os
import sys
import tarfile
import time
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ARCHIVE = ROOT / "build" / "triton-cache.tar.xz"
# Triton's cache names its files by absolute path, so the folder must be the same on both machines.
FOLDER = Path("/tmp/tritonkern-triton-cache")
CAPABILITY = 90


def unpack() -> dict:
    """Use the archive if it was made for this machine's Triton. Returns a row that says so."""
    if not ARCHIVE.exists():
        return {"skipped": f"there is no {ARCHIVE.relative_to(ROOT)}; kernels are compiled here"}
    try:
        from triton.runtime.cache import triton_key
    except ImportError as error:
        return {"skipped": f"Triton cannot be imported: {error}"}
    with tarfile.open(ARCHIVE) as archive:
        member = archive.extractfile("key.json")
        assert member is not None
        if json.load(member)["key"] != triton_key():
            return {"skipped": "it was made for another Triton or Python; kernels are compiled here"}
        # Pythons before 3.10.12 and 3.11.4 have no filters; `make gpu-kernels` made the archive.
        archive.extraction_filter = getattr(tarfile, "data_filter", None)
        archive.extractall(FOLDER)
    os.environ["TRITON_CACHE_DIR"] = str(FOLDER)
    return {"kernels": len(list(FOLDER.glob("*/*.cubin")))}


def key_of(package: Path) -> str:
    """What `triton_key` returns where Triton is installed in `package`, in the version that is imported here."""
    from triton.runtime import cache

    function = getattr(cache.triton_key, "__wrapped__", cache.triton_key)
    return types.FunctionType(function.__code__, {**vars(cache), "__file__": str(package / "runtime" / "cache.py")})()


class Driver:
    """As much of Triton's driver as compilation asks for."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", CAPABILITY, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


def compile_all() -> int:
    """Compile what the parts launch, on small shapes. Returns the number of kernels."""
    import torch
    import triton
    from calls import BF16, FP32, REAL, SMALL, with_gradients
    from triton.runtime.jit import JITFunction

    from tritonkern.ops import _backends
    from tritonkern.ops.temporal_adapter import op as adapter_op
    from tritonkern.ops.temporal_adapter import triton_kernels as adapter

    triton.runtime.driver.set_active(Driver())
    run, kernels = JITFunction.run, set()
    JITFunction.run = lambda self, *arguments, **options: kernels.add(
        run(self, *arguments, **{**options, "warmup": True}).hash
    )
    _backends._PREDICATES["triton"] = lambda device: None
    adapter.hidden_dtype = adapter_op.hidden_dtype = lambda device, dtype: dtype  # as on a GPU
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic, warn_only=True)
        jobs = [(case, case.shape) for case in SMALL] + [(case, case.tiny) for case in REAL] * (not deterministic)
        for case, shape in jobs:
            for dtype in (BF16, FP32) if deterministic else case.dtypes:
                with_gradients(*case.make(shape, dtype, "triton", True))
                print(f"{len(kernels):4} kernels: {case.name} {dtype}", flush=True)
    return len(kernels)


def pack(key: str) -> None:
    """Cubins and their descriptions; the other stages are ten times their size and are not read."""
    ARCHIVE.parent.mkdir(exist_ok=True)
    with tarfile.open(ARCHIVE, "w:xz") as archive:
        text = json.dumps({"key": key}).encode()
        information = tarfile.TarInfo("key.json")
        information.size = len(text)
        archive.addfile(information, io.BytesIO(text))
        for path in sorted(FOLDER.glob("*/*")):
            if path.suffix in (".cubin", ".json"):
                archive.add(path, path.relative_to(FOLDER))


def main(package: str | None) -> None:
    import triton
    from triton.runtime import cache

    own = Path(triton.__file__).parent
    key = key_of(Path(package) / "triton" if package else own)
    assert key_of(own) == cache.triton_key()
    cache.triton_key = lambda: key  # `get_cache_key` looks it up there
    start = time.monotonic()
    count = compile_all()
    pack(key)
    print(f"{count} kernels in {time.monotonic() - start:.0f} s, {ARCHIVE.stat().st_size / 2**20:.1f} MiB: {ARCHIVE}")


if __name__ == "__main__":
    os.environ["TRITON_CACHE_DIR"] = str(FOLDER)
    sys.path.insert(0, str(ROOT))
    main(sys.argv[1] if len(sys.argv) > 1 else None)
