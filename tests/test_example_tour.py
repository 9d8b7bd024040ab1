"""The cells of examples/tour.ipynb run, one after the other."""

import json
import sys
from pathlib import Path

import pytest
from official import needs_official, official, tapir  # noqa: F401

NOTEBOOK = Path(__file__).parents[1] / "examples" / "tour.ipynb"


def run_cells():
    plt = pytest.importorskip("matplotlib.pyplot")
    pytest.importorskip("skimage")
    plt.switch_backend("Agg")
    names = {}
    notebook = json.loads(NOTEBOOK.read_text())
    assert notebook["nbformat"] == 4
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
            exec(compile("".join(cell["source"]), f"{NOTEBOOK}, {cell['id']}", "exec"), names)
    plt.close("all")
    return names


@pytest.mark.slow
def test_without_a_checkout_of_tapnet(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tapnet", None)
    names = run_cells()
    assert "no tapnet here" in capsys.readouterr().out
    assert names["tracks"].tracks.shape == (64, 12, 2)
    assert names["colours"].shape == (12, 64, 64, 3) and names["colours"].std() > 0.1


@needs_official
@pytest.mark.slow
def test_with_a_checkout_of_tapnet(tapir, capsys):  # noqa: F811
    run_cells()
    assert "15 methods replaced" in capsys.readouterr().out
