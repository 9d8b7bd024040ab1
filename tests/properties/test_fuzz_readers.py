"""Every reader of files is given damaged ones: a `ValueError` or a result, no other error, no hang, no half a result.

`TRITONKERN_FUZZ_SEED` chooses other cases than the usual ones. A failure names the case; `fuzz_readers.py` repeats it.
"""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from clips import square_clip, write_clip

from tritonkern.tracking import PointTracker, PointTracks  # noqa: F401  (imports the readers' packages)

SEED = int(os.environ.get("TRITONKERN_FUZZ_SEED", 0))


def write_corpus(folder):
    """One small valid file of each kind."""
    clip = square_clip(4, size=(48, 32))
    for name, codec, pix_fmt in [
        ("a.mp4", "libx264", "yuv420p"),
        ("a.mov", "png", "rgb24"),
        ("a.mkv", "ffv1", "bgr0"),
        ("a.webm", "libvpx-vp9", "yuv420p"),
        ("a.avi", "mpeg4", "yuv420p"),
    ]:
        write_clip(folder / name, clip, codec=codec, pix_fmt=pix_fmt)
    first, *rest = [Image.fromarray(frame) for frame in clip]
    for name in ("a.apng", "a.webp", "a.gif", "a.tif", "a.avif"):
        first.save(folder / name, save_all=True, append_images=rest)
    for name in ("a.png", "a.jpg", "a.bmp", "a.ppm"):
        first.save(folder / name)
    deep = [Image.fromarray(frame[..., 0].astype(np.uint16) * 16) for frame in clip]
    deep[0].save(folder / "deep.tif", save_all=True, append_images=deep[1:])
    (folder / "queries.csv").write_text("t,x,y\n0,1.5,2\n3,4e1,5.25\n")
    visible = np.ones((2, 4), dtype=bool)
    positions = np.ones((2, 4, 2), np.float32)
    queries = np.ones((2, 3), np.float32)
    PointTracks(positions, visible, visible.astype(np.float32), queries, 10.0, (48, 32)).save_npz(folder / "tracks.npz")
    video = {"video": clip, "points": positions.astype(np.float64), "occluded": ~visible}
    (folder / "arrays.pkl").write_bytes(pickle.dumps({"goat": video}))
    jpeg = (folder / "a.jpg").read_bytes()
    (folder / "jpegs.pkl").write_bytes(pickle.dumps([video | {"video": [jpeg] * 4}], protocol=2))


@pytest.mark.parametrize("cases", [120, pytest.param(3000, marks=pytest.mark.slow)])
def test_damaged_files(tmp_path, cases):
    write_corpus(tmp_path)
    script = Path(__file__).with_name("fuzz_readers.py")
    root = str(Path(__file__).parents[2])
    result = subprocess.run(
        [sys.executable, str(script), str(tmp_path), str(cases), str(SEED)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": root},
    )
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert result.returncode == 0, f"ended with {result.returncode} in case {lines[-1:]}\n{result.stderr[-2000:]}"
    assert [line for line in lines if "wrong" in line] == []
    summary = lines[-1]
    assert sum(summary["answers"].values()) == cases
    # Both kinds of answers occur, or the damage is too little or too much.
    assert min(summary["answers"].values()) > cases / 20
    assert summary["peak_MiB"] < 2000
    print(summary)
