"""The example that upgrades image networks: it runs, and its measures mean what they say."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

SCRIPT = Path(__file__).parents[1] / "examples" / "tracktention.py"


@pytest.fixture(scope="module")
def example():
    return runpy.run_path(str(SCRIPT))


@pytest.mark.parametrize("task", [pytest.param("depth", marks=pytest.mark.slow), "colour"])
def test_runs(task, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tracktention.py", task, "--quick", "--out", str(tmp_path / "out.png")])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    output = capsys.readouterr().out
    rows = [line for line in output.splitlines() if line.startswith(("| image", "| with Tracktention"))]
    assert len(rows) == 3
    assert all(np.isfinite([float(x) for x in row.split("|")[2:4]]).all() for row in rows)
    assert Image.open(tmp_path / "out.png").size[0] > 4 * 64


def test_flicker_is_the_change_along_tracks(example):
    """A ramp that moves with its track does not flicker; one that stands still while the track moves does."""
    x = (torch.arange(64.0) + 0.5).expand(1, 64, 64)
    tracks = torch.tensor([[[20.0, 30.0]], [[23.0, 30.0]], [[26.0, 30.0]]])
    visible = torch.ones(3, 1, dtype=torch.bool)
    still = torch.stack([x, x, x])
    moving = torch.stack([x, x - 3, x - 6])
    assert example["flicker"](moving, tracks, visible) == pytest.approx(0, abs=1e-4)
    assert example["flicker"](still, tracks, visible) == pytest.approx(3, abs=1e-4)
    jump = torch.stack([x, x - 3, x])
    visible[2] = False
    assert example["flicker"](jump, tracks, visible) == pytest.approx(0, abs=1e-4)


def test_scenes_hold_what_they_promise(example):
    """Depth is the layer that shows; colour leaves the brightness to the texture alone."""
    sample = example["make_sample"]("depth", (1, 2), frames=3, points=20)
    assert sample.target.shape == (3, 1, 64, 64) and sample.tracks.shape == (3, 20, 2)
    assert set((sample.target * 6).round().unique().tolist()) <= set(range(1, 7))
    grey = example["coloured_by_roughness"](np.random.default_rng(0), 64)
    luma = (grey * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(0)
    assert luma.mean().item() == pytest.approx(0.5, abs=0.02)
    assert (grey[0] - luma).std() < 0.02 and (grey[2] - luma).std() < 0.02
