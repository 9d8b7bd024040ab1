"""The tests that run on a GPU, on CPU memory that says it is one: no test mixes the two; see pretend_cuda.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# What a pretended device cannot do: derivatives, exports and compiled graphs of its tensor type, autocast and graphs of
# CUDA, and the hidden layer's dtype, which the operators choose by device.
CANNOT = "opcheck or gradcheck or compiled or export or forward_mode or autocast or checkpointing or cuda_graph"
CANNOT_IN = {
    "test_contracts.py": "fakes or strides and adapter and float16",
    "test_gated_linear_recurrence.py": "carried_state and 0-6",  # autograd makes a gradient of no frames itself
    "test_temporal_adapter.py": "test_out and float16",
}
FILES = [
    "test_contracts.py",
    "test_correlation_soft_argmax.py",
    "test_correlation_soft_argmax_2d.py",
    "test_gpu.py",
    "test_gated_linear_recurrence.py",
    "test_local_correlation.py",
    "test_temporal_adapter.py",
    "test_temporal_mixer.py",
    "test_temporal_window_attention.py",
    "test_track_attention.py",
]
MIXED = """
import torch
def test_mix_triton(): torch.ones(2, device="cuda") + torch.ones(2)
def test_index_triton(): torch.ones(2)[torch.tensor([0, 1], device="cuda")]
def test_numpy_triton(): torch.ones(2, device="cuda").numpy()
def test_apart_triton(): assert (torch.ones(2, device="cuda") + torch.ones(2).cuda()).cpu().tolist() == [2, 2]
"""


def run_pretending(file, left_out):
    command = [sys.executable, "-m", "pytest", "-q", "-rf", "-p", "pretend_cuda", "-p", "no:cacheprovider", str(file)]
    command += ["-m", "not slow", "-k", f"(triton or gpu) and not ({left_out})"]
    path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path, "COLUMNS": "300"}, capture_output=True, text=True
    )


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_no_test_mixes_devices(file):
    done = run_pretending(HERE / file, " or ".join(filter(None, [CANNOT, CANNOT_IN.get(file)])))
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_mixed_devices_are_found(tmp_path):
    file = tmp_path / "test_mixed.py"
    file.write_text(MIXED)
    done = run_pretending(file, CANNOT)
    assert done.stdout.count("FAILED") == 3 and "1 passed" in done.stdout, done.stdout
    assert "test_mix_triton - RuntimeError: Expected all tensors" in done.stdout
