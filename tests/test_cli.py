"""The command line as its users meet it, mostly in a process of its own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from clips import ColourTracker, square_clip, write_clip, write_cut_clip, write_sound

from tritonkern import tracking
from tritonkern.cli import main
from tritonkern.models import build_model
from tritonkern.tracking import PointTracks, VideoReader, predictor

# The command with a tracker that needs no weights; `slow` makes it wait where a test wants to interrupt it.
_PROGRAM = """
import resource, sys, time
sys.path.insert(0, {tests!r})
from clips import ColourTracker
import tritonkern.tracking.predictor as predictor
import tritonkern.tracking.overlay as overlay
import tritonkern.models
class Model(ColourTracker):
    def features(self, video):
        print("tracking now", flush=True)
        time.sleep({slow_model})
        return super().features(video)
draw = overlay.draw_points
def draw_slowly(*arguments):
    print("writing now", flush=True)
    time.sleep({slow_drawing})
    return draw(*arguments)
overlay.draw_points = draw_slowly
build_model = tritonkern.models.build_model
predictor.build_model = lambda name, weights=None: (
    Model() if name == "chrono-nano" and weights is None else build_model(name, weights)
)
if {file_limit}:
    resource.setrlimit(resource.RLIMIT_FSIZE, ({file_limit},) * 2)
from tritonkern.cli import main
main()
"""


def program(slow_model=0, slow_drawing=0, file_limit=0):
    tests = str(Path(__file__).parent)
    return _PROGRAM.format(tests=tests, slow_model=slow_model, slow_drawing=slow_drawing, file_limit=file_limit)


def run(*arguments, **options):
    command = [sys.executable, "-c", program(**options), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def assert_one_line_error(result, *parts, code=2):
    assert result.returncode == code, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    # Progress bars may stand above; the error is the last line, and there is no traceback.
    assert lines[-1].startswith("tritonkern: ")
    assert "Traceback" not in result.stderr
    for part in parts:
        assert part in lines[-1]


@pytest.fixture
def call(monkeypatch, capsys):
    """The same in this process, where no module needs to be loaded again."""

    def stand_in(name, weights=None):
        return ColourTracker() if name == "chrono-nano" and weights is None else build_model(name, weights)

    monkeypatch.setattr(predictor, "build_model", stand_in)

    def call_main(*arguments):
        monkeypatch.setattr(sys, "argv", ["tritonkern", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            main()
        streams = capsys.readouterr()
        return subprocess.CompletedProcess(arguments, exit.value.code, streams.out, streams.err)

    return call_main


@pytest.fixture
def video(tmp_path):
    return write_clip(tmp_path / "video.mp4", square_clip())


class TestTrack:
    def test_writes_everything(self, tmp_path, video):
        result = run("track", video, "--out", tmp_path / "new" / "out", "--grid", 4)
        assert result.returncode == 0, result.stderr
        out = tmp_path / "new" / "out"
        assert sorted(os.listdir(out)) == ["overlay.mp4", "tracks.csv", "tracks.npz"]
        for name in os.listdir(out):
            assert str(out / name) in result.stdout
        assert "16 points, 8 frames; time per frame on cpu: reading" in result.stdout
        tracks = PointTracks.load(out / "tracks.npz")
        assert tracks.tracks.shape == (16, 8, 2)
        assert (tracks.fps, tracks.size) == (10.0, (96, 64))
        assert len((out / "tracks.csv").read_text().splitlines()) == 1 + 16 * 8
        overlay = VideoReader(out / "overlay.mp4")
        assert overlay.size == (96, 64) and len(list(overlay.frames())) == 8

    def test_queries_of_a_file_and_of_earlier_tracks(self, tmp_path, video):
        (tmp_path / "points.csv").write_text("t,x,y\n2,24,32\n0,90,5\n")
        first = run("track", video, "--out", tmp_path, "--queries", tmp_path / "points.csv", "--max-frames", 6)
        assert first.returncode == 0, first.stderr
        tracks = PointTracks.load(tmp_path / "tracks.npz")
        np.testing.assert_array_equal(tracks.queries, [[2, 24, 32], [0, 90, 5]])
        assert tracks.tracks.shape == (2, 6, 2)
        # Written over what it was read from.
        second = run("track", video, "--out", tmp_path, "--queries", tmp_path / "tracks.npz")
        assert second.returncode == 0, second.stderr
        assert PointTracks.load(tmp_path / "tracks.npz").tracks.shape == (2, 8, 2)

    def test_a_warning_is_one_line(self, tmp_path):
        result = run("track", write_cut_clip(tmp_path / "cut.mp4"), "--out", tmp_path / "out", "--grid", 2)
        assert result.returncode == 0, result.stderr
        (line,) = (line for line in result.stderr.splitlines() if "warn" in line.lower())
        assert line.startswith("tritonkern: warning: ") and "cut.mp4 announces 20 frames and ends after " in line

    def test_query_frame(self, tmp_path, video):
        result = run("track", video, "--out", tmp_path, "--grid", 2, "--query-frame", 5)
        assert result.returncode == 0, result.stderr
        np.testing.assert_array_equal(PointTracks.load(tmp_path / "tracks.npz").queries[:, 0], 5)


def test_train_writes_weights_that_load(tmp_path):
    out = tmp_path / "nano.safetensors"
    result = run("train", "--out", out, "--steps", 1)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(out)
    assert not build_model("chrono-nano", out).training
    assert sorted(path.name for path in tmp_path.iterdir()) == ["nano.checkpoint", "nano.safetensors"]


def test_train_wants_safetensors(call, tmp_path):
    assert_one_line_error(call("train", "--out", tmp_path / "nano.pth"), "--out", ".safetensors")


class TestErrors:
    def test_missing_video(self, call, tmp_path):
        result = call("track", tmp_path / "nope.mp4", "--out", tmp_path / "out")
        assert_one_line_error(result, "nope.mp4 does not exist", "give the path of a video")
        assert not (tmp_path / "out").exists()

    def test_not_a_video(self, call, tmp_path):
        (tmp_path / "a.mp4").write_text("not a video")
        assert_one_line_error(call("track", tmp_path / "a.mp4", "--out", tmp_path), "cannot be read as a video")

    def test_empty_video(self, call, tmp_path):
        (tmp_path / "a.mp4").touch()
        assert_one_line_error(call("track", tmp_path / "a.mp4", "--out", tmp_path), "cannot be read as a video")

    def test_sound_only(self, call, tmp_path):
        result = call("track", write_sound(tmp_path / "a.m4a"), "--out", tmp_path / "out")
        assert_one_line_error(result, "has no video stream")

    @pytest.mark.parametrize(
        ("row", "part"),
        [("0,97,2", "outside the frame"), ("8,1,2", "outside the clip"), ("0,one,2", "line 1: needs three numbers")],
    )
    def test_bad_queries(self, call, tmp_path, video, row, part):
        (tmp_path / "q.csv").write_text(row)
        result = call("track", video, "--out", tmp_path / "out", "--queries", tmp_path / "q.csv")
        assert_one_line_error(result, part)
        assert "reading" not in result.stderr
        assert not (tmp_path / "out").exists()

    def test_folders_that_were_there_stay(self, call, tmp_path, video):
        (tmp_path / "q.csv").write_text("8,1,2")
        (tmp_path / "there").mkdir()
        for out in ("there", "there/new/out"):
            result = call("track", video, "--out", tmp_path / out, "--queries", tmp_path / "q.csv")
            assert_one_line_error(result, "outside the clip")
            assert list((tmp_path / "there").iterdir()) == []
        result = call("eval", "--tapvid", tmp_path / "nope.pkl", "--out", tmp_path / "there" / "new" / "scores.json")
        assert_one_line_error(result, "nope.pkl")
        assert list((tmp_path / "there").iterdir()) == []

    def test_contradicting_options(self, call, tmp_path, video):
        (tmp_path / "q.csv").write_text("0,1,2")
        common = ("track", video, "--out", tmp_path / "out", "--queries", tmp_path / "q.csv")
        assert_one_line_error(call(*common, "--grid", 3), "--grid and --queries exclude each other")
        assert_one_line_error(call(*common, "--query-frame", 3), "--query-frame goes with --grid")

    def test_unknown_model(self, call, tmp_path, video):
        result = call("track", video, "--out", tmp_path / "out", "--model", "chrome")
        assert_one_line_error(result, "'chrome'", "chrono-nano")

    @pytest.mark.parametrize("model", ["chrono-nano", "chrono-vits14"])
    def test_wrong_checkpoint(self, call, tmp_path, video, model):
        (tmp_path / "weights.safetensors").write_text("these are not weights")
        common = ("track", video, "--out", tmp_path / "out", "--model", model, "--weights")
        assert_one_line_error(call(*common, tmp_path / "weights.safetensors"), "weights.safetensors")
        assert_one_line_error(call(*common, tmp_path / "nope.ckpt"), "nope.ckpt")

    def test_unknown_device(self, call, tmp_path, video):
        result = call("track", video, "--out", tmp_path / "out", "--device", "abacus")
        assert_one_line_error(result, "device must be cpu or cuda, got 'abacus'")

    def test_out_is_a_file(self, call, tmp_path, video):
        assert_one_line_error(call("track", video, "--out", video), "give a folder to --out, not a file")

    @pytest.mark.parametrize("limit", [100, 3000])
    def test_full_disk(self, tmp_path, video, limit):
        """A limit on the size of files: writing fails within tracks.npz, or within overlay.mp4 only."""
        out = tmp_path / "out"
        out.mkdir()
        (out / "overlay.mp4").write_bytes(b"of an earlier run")
        result = run("track", video, "--out", out, "--grid", 2, file_limit=limit)
        assert_one_line_error(result, "File too large", "give another folder to --out")
        assert (out / "overlay.mp4").read_bytes() == b"of an earlier run"
        complete = [] if limit == 100 else ["tracks.csv", "tracks.npz"]
        assert sorted(os.listdir(out)) == ["overlay.mp4", *complete]

    @pytest.mark.parametrize(("stage", "slow"), [("tracking", "slow_model"), ("writing", "slow_drawing")])
    def test_interrupt(self, tmp_path, video, stage, slow):
        command = [sys.executable, "-c", program(**{slow: 20}), "track", str(video), "--out", str(tmp_path / "out")]
        # A shell starts background jobs with Ctrl-C ignored, and tests may run in one.
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        while f"{stage} now" not in process.stdout.readline():
            assert process.poll() is None
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=15)
        assert process.returncode == 130
        assert stderr.rstrip().splitlines()[-1] == "tritonkern: interrupted: nothing unfinished was kept"
        assert "Traceback" not in stderr
        complete = [] if stage == "tracking" else ["tracks.csv", "tracks.npz"]
        assert sorted(path.name for path in tmp_path.glob("out/*")) == complete
        assert (tmp_path / "out").exists() == bool(complete)

    @pytest.mark.parametrize("package", ["av", "PIL", "rich", "typer"])
    def test_missing_extra(self, tmp_path, package):
        code = f"import sys; sys.modules[{package!r}] = None; from tritonkern.cli import main; main()"
        result = subprocess.run(
            [sys.executable, "-c", code, "track", "a.mp4", "--out", "x"], capture_output=True, text=True, cwd=tmp_path
        )
        assert result.returncode == 2
        assert result.stderr.startswith("tritonkern: ")
        # Nothing is published: a name from a package index would be somebody else's.
        assert package in result.stderr and 'pip install ".[track]" in a checkout of tritonkern' in result.stderr
        assert len(result.stderr.splitlines()) == 1


def test_help_needs_no_torch():
    code = f"""
import sys, types
package = sys.modules["tritonkern"] = types.ModuleType("tritonkern")
package.__path__ = [{str(Path(tracking.__file__).parents[1])!r}]
sys.modules["torch"] = None
from tritonkern.cli import main
main()
"""
    for arguments in (["--help"], ["track", "--help"]):
        result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
    assert "--query-frame" in result.stdout


def test_doctor():
    result = subprocess.run(
        [sys.executable, "-m", "tritonkern.cli", "doctor"], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert "temporal_window_attention" in result.stdout
    assert f"python {sys.version.split()[0]}" in result.stdout
