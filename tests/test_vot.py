"""VOT toolkit's folder protocol of point tracking, on a folder that the test makes as the toolkit does."""

import os
import subprocess
import sys

import numpy as np
import pytest
import typer
from clips import ColourTracker, square_clip
from PIL import Image

from tritonkern import vot
from tritonkern.tracking import PointTracker
from tritonkern.vot import track_sequence


@pytest.fixture
def folder(tmp_path):
    """Six frames elsewhere, named in another order than that of time; two points: the red square, the background."""
    images = tmp_path / "images"
    images.mkdir()
    names = [f"{'fbdace'[t]}.png" for t in range(6)]
    for name, frame in zip(names, square_clip(6), strict=True):
        Image.fromarray(frame).save(images / name)
    run = tmp_path / "run"
    run.mkdir()
    absolute = [str(images / name) for name in names[:3]]
    relative = [f"../images/{name}" for name in names[3:]]
    (run / "frames_color.txt").write_text("\n".join(absolute + relative) + "\n")
    (run / "frames_depth.txt").write_text("nothing.png\n")
    (run / "query_obj0.txt").write_text("2\n24.0,32.0\nname=square\n")
    (run / "query_obj10.txt").write_text("0\n90.5,4.25\n")
    return run


def outputs(folder, name):
    return [(folder / f"output_{name}.txt").read_text(), (folder / f"output_{name}_visible.txt").read_text()]


def test_a_sequence(folder):
    tracks = track_sequence(folder, PointTracker(ColourTracker()))
    np.testing.assert_array_equal(tracks.queries, [[2, 24, 32], [0, 90.5, 4.25]])
    points, visible = (text.splitlines() for text in outputs(folder, "obj0"))
    assert points[:3] == ["0", "0", "24.000,32.000"] and visible == ["0", "0", "1", "1", "1", "1"]
    found = np.array([line.split(",") for line in points[2:]], dtype=float)
    # The square moves 4 pixels per frame; a cell of the tracker is 6 x 4 pixels.
    np.testing.assert_allclose(found, [[24 + 4 * t, 32] for t in range(4)], atol=6)
    np.testing.assert_allclose(found, tracks.tracks[0, 2:], atol=6e-4)
    points, visible = (text.splitlines() for text in outputs(folder, "obj10"))
    assert points[0] == "90.500,4.250" and len(points) == len(visible) == 6


def test_as_the_toolkit_runs_it(folder):
    """`python -m tritonkern.vot` in the folder, with the default tracker."""
    (folder / "query_obj10.txt").unlink()
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    environment, command = os.environ | {"PYTHONPATH": root}, [sys.executable, "-m", "tritonkern.vot"]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0 and result.stdout == "1 points, 6 frames\n", result.stderr
    points, visible = (text.splitlines() for text in outputs(folder, "obj0"))
    assert points[:3] == ["0", "0", "24.000,32.000"] and len(points) == len(visible) == 6


def test_an_error_is_one_line(folder, capsys):
    (folder / "query_obj0.txt").write_text("6\n24.0,32.0\n")
    with pytest.raises(typer.Exit) as ended:
        vot._command(folder)
    assert ended.value.exit_code == 2
    assert (
        capsys.readouterr().err == f"tritonkern: {folder}/query_obj0.txt, line 1: needs a frame from 0 to 5, got '6'\n"
    )


@pytest.mark.parametrize(
    "name, text, error, message",
    [
        ("frames_color.txt", None, FileNotFoundError, "holds no frames_color.txt: run this in the folder"),
        ("frames_color.txt", "\n", ValueError, "names no frame"),
        ("frames_color.txt", "../images/f.png\ngone.png\n", FileNotFoundError, r"gone.png as frame 2 of 2, which does"),
        ("query_obj0.txt", "2\n", ValueError, "must hold the query's frame in line 1 and x,y in line 2, got 1 lines"),
        ("query_obj0.txt", "2.5\n1,2\n", ValueError, "query_obj0.txt, line 1: needs a frame from 0 to 5, got '2.5'"),
        (
            "query_obj0.txt",
            "2\n1,2,3,4\n",
            ValueError,
            "line 2: needs a point x,y, got '1,2,3,4'; this tracker follows",
        ),
        ("query_obj0.txt", "2\n0\n", ValueError, "line 2: needs a point x,y, got '0'"),
        ("query_obj0.txt", "2\n97,2\n", ValueError, "x=97, y=2.* is outside the frame: x must be 0 to 96"),
        ("query_obj0.txt", b"\xff\xfe", ValueError, "query_obj0.txt is not a text file in UTF-8"),
        ("query_obj10_visible.txt", "2\n1,2\n", ValueError, "would write one output twice"),
        ("../images/e.png", "no image", ValueError, "e.png cannot be read as an image"),
    ],
)
def test_errors_leave_no_output(folder, name, text, error, message):
    (folder / "output_obj0.txt").write_text("earlier")
    if text is None:
        (folder / name).unlink()
    elif isinstance(text, bytes):
        (folder / name).write_bytes(text)
    else:
        (folder / name).write_text(text)
    with pytest.raises(error, match=message):
        track_sequence(folder, PointTracker(ColourTracker()))
    assert [path.name for path in folder.glob("*output*")] == ["output_obj0.txt"]
    assert (folder / "output_obj0.txt").read_text() == "earlier"
    assert not list(folder.glob(".*"))


def test_no_query(folder):
    for file in folder.glob("query_*"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match="holds no query_ID.txt"):
        track_sequence(folder, PointTracker(ColourTracker()))
