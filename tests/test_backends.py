"""Which backend runs a call, and what a user reads when none can."""

import types
import warnings

import pytest
import torch
from oracle import run_python

from tritonkern import temporal_window_attention
from tritonkern.ops import _backends
from tritonkern.ops.temporal_window_attention import op

CPU = torch.device("cpu")
X = torch.randn(1, 5, 2, 8)

# A finder that makes one module impossible to import, as on a machine without it.
BLOCK = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name == {name!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocked())
"""


@pytest.fixture
def blocked(monkeypatch):
    """`blocked(backend)` makes a backend unable to run anything."""
    _backends.load.cache_clear()

    def block(backend):
        obstacle = _backends.Obstacle(f"no {backend} today", f"bring {backend}")
        monkeypatch.setitem(_backends._PREDICATES, backend, lambda device: obstacle)

    yield block
    _backends.load.cache_clear()


def test_import_loads_neither_triton_nor_kernels_nor_a_device():
    output = run_python(
        """
        import sys, torch, tritonkern
        print([name for name in sys.modules if name.split(".")[0] == "triton"], "tritonkern._cpp" in sys.modules)
        print(torch.cuda.is_initialized())
        """
    )
    assert output.split() == ["[]", "False", "False"]


@pytest.mark.parametrize("missing", ["triton", "tritonkern._cpp"])
def test_package_works_without(missing):
    output = run_python(
        BLOCK.format(name=missing)
        + """
import torch, tritonkern
from tritonkern.ops import _backends
x = torch.randn(1, 5, 2, 8, requires_grad=True)
tritonkern.temporal_window_attention(x, x, x, 3).sum().backward()
tritonkern.TemporalWindowAttention(32, num_heads=4)(torch.randn(1, 5, 32))
print(torch.compile(tritonkern.temporal_window_attention, backend="eager", fullgraph=True)(x, x, x).isfinite().all())
_backends.has_gpu = lambda: False
print(_backends.report())
""",
        TRITONKERN_STRICT=None,
    )
    assert output.startswith("tensor(True)")
    if missing == "triton":
        assert "Triton cannot be imported" not in output  # which a machine without a GPU does not need
        assert output.splitlines()[1].startswith("ready; C++ kernels (")
    else:
        assert output.splitlines()[1] == "slow: this machine lacks C++ kernels for the CPU; no GPU"
        assert output.count("the C++ extension cannot be imported") == output.count("install a C++17 compiler") == 1


def test_without_a_compiler_the_first_call_warns_once(blocked):
    blocked("cpp")
    with pytest.warns(RuntimeWarning, match="slow eager reference on cpu(.|\n)*no cpp today; bring cpp"):
        temporal_window_attention(X, X, X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        temporal_window_attention(X, X, X)
        temporal_window_attention(X, X, X, backend="reference")


def test_strict_mode_refuses_to_fall_back(blocked, monkeypatch):
    blocked("cpp")
    monkeypatch.setenv("TRITONKERN_STRICT", "1")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="falls back(.|\n)*no cpp today(.|\n)*backend='reference'"):
            temporal_window_attention(X, X, X)
    temporal_window_attention(X, X, X, backend="reference")


def test_strict_mode_binds_devices_without_a_kernel(blocked, monkeypatch):
    monkeypatch.setenv("TRITONKERN_STRICT", "1")
    with pytest.raises(RuntimeError, match="not on mps; move the tensors to the CPU"):
        _backends.load(op.NAME, torch.device("mps"))
    monkeypatch.delenv("TRITONKERN_STRICT")
    with pytest.warns(RuntimeWarning, match="slow eager reference on mps"):
        assert _backends.load(op.NAME, torch.device("mps")).__name__.endswith(".reference")


@pytest.mark.parametrize(("device", "backend"), [("cpu", "cpp"), ("cuda", "triton")])
def test_default_choice(blocked, monkeypatch, device, backend):
    chosen = []
    monkeypatch.setattr(_backends, "_module", lambda operation, name: chosen.append(name))
    monkeypatch.setattr(_backends, "_PREDICATES", dict.fromkeys(_backends.MODULES, lambda device: None))
    _backends.load(op.NAME, torch.device(device))
    assert chosen == [backend]


def test_a_backend_asked_for_by_name_never_falls_back(blocked):
    blocked("cpp")
    blocked("triton")
    with pytest.raises(ValueError) as error:
        temporal_window_attention(X, X, X, backend="triton")
    assert str(error.value).splitlines() == [
        "backend='triton' cannot run temporal_window_attention on cpu. Backends:",
        "  cpp       missing: no cpp today; bring cpp",
        "  triton    missing: no triton today; bring triton",
        "  reference available",
    ]


def test_triton_takes_cpu_tensors_in_the_interpreter_only(blocked, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="set TRITON_INTERPRET=1 before Python starts"):
        temporal_window_attention(X, X, X, backend="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert _backends.unavailable(op.NAME, "triton", CPU) is None


@pytest.mark.parametrize(
    ("capability", "architecture", "reason"),
    [
        ((7, 5), None, "older than Ampere"),
        ((8, 0), None, None),
        ((9, 4), "gfx942:sramecc+:xnack-", None),
        ((9, 5), "gfx950", None),
        ((11, 0), "gfx1100", "is gfx1100, and the kernels are compiled without register spills for gfx942 and gfx950"),
    ],
)
def test_triton_needs_ampere_or_instinct(monkeypatch, capability, architecture, reason):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(torch.version, "hip", architecture and "6")
    properties = types.SimpleNamespace(gcnArchName=architecture)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    obstacle = _backends.unavailable(op.NAME, "triton", torch.device("cuda"))
    assert obstacle is None if reason is None else reason in obstacle.reason


@pytest.mark.parametrize(("version", "runs"), [("3.3.1", False), ("3.4.0", True), ("3.10.0+git1", True), ("4.0", True)])
def test_triton_version(monkeypatch, version, runs):
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton, "__version__", version)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert (_backends.unavailable(op.NAME, "triton", CPU) is None) == runs


def test_a_failed_build_is_reported_with_its_log(blocked, monkeypatch, tmp_path):
    (tmp_path / "_cpp_build_error.txt").write_text("no C++ compiler")
    monkeypatch.setattr(_backends, "__file__", str(tmp_path / "ops" / "_backends.py"))
    monkeypatch.setitem(__import__("sys").modules, "tritonkern._cpp", None)
    obstacle = _backends.unavailable(op.NAME, "cpp", CPU)
    assert f"its build failed, see {tmp_path / '_cpp_build_error.txt'}" in obstacle.reason
    assert "compiler" in obstacle.remedy
