"""The command line, mostly in a process of its own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from clips import ColourTracker, square_clip, write_clip, write_cut_clip, write_sound
from typer.testing import CliRunner

from tritonkern import tracking
from tritonkern.cli import app, main
from tritonkern.models import build_model
from tritonkern.ops import _backends
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
def draw_slowly(*arguments, **options):
    print("writing now", flush=True)
    time.sleep({slow_drawing})
    return draw(*arguments, **options)
overlay.draw_points = draw_slowly
build_model = tritonkern.models.build_model
predictor.build_model = lambda name, weights=None: (
    Model() if name == "nano" and weights is None else build_model(name, weights)
)
if {file_limit}:
    resource.setrlimit(resource.RLIMIT_FSIZE, ({file_limit},) * 2)
from tritonkern.cli import main
main()
"""


def program(slow_model=0, slow_drawing=0, file_limit=0):
    tests = str(Path(__file__).parent)
    return _PROGRAM.format(tests=tests, slow_model=slow_model, slow_drawing=slow_drawing, file_limit=file_limit)


def run(*arguments, text=True, **options):
    command = [sys.executable, "-c", program(**options), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=text, timeout=600)


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
        return ColourTracker() if name == "nano" and weights is None else build_model(name, weights)

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
        assert sorted(os.listdir(out)) == ["overlay.mp4", "report.html", "tracks.csv", "tracks.npz"]
        for name in os.listdir(out):
            assert str(out / name) in result.stdout
        assert "16 points, 8 frames; time per frame on cpu: reading" in result.stdout
        tracks = PointTracks.load(out / "tracks.npz")
        assert tracks.tracks.shape == (16, 8, 2)
        assert (tracks.fps, tracks.size) == (10.0, (96, 64))
        assert len((out / "tracks.csv").read_text().splitlines()) == 1 + 16 * 8
        overlay = VideoReader(out / "overlay.mp4")
        assert overlay.size == (96, 64) and len(list(overlay.frames())) == 8

    def test_queries_of_a_file_and_of_earlier_tracks(self, call, tmp_path, video):
        (tmp_path / "points.csv").write_text("t,x,y\n2,24,32\n0,90,5\n")
        first = call("track", video, "--out", tmp_path, "--queries", tmp_path / "points.csv", "--max-frames", 6)
        assert first.returncode == 0, first.stderr
        tracks = PointTracks.load(tmp_path / "tracks.npz")
        np.testing.assert_array_equal(tracks.queries, [[2, 24, 32], [0, 90, 5]])
        assert tracks.tracks.shape == (2, 6, 2)
        # Written over what it was read from.
        second = call("track", video, "--out", tmp_path, "--queries", tmp_path / "tracks.npz")
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

    def test_the_default_folder_is_named_after_the_video(self, call, tmp_path, video, monkeypatch):
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        assert call("track", "../video.mp4", "--grid", 2, "--no-report", "--overlay", "none").returncode == 0
        assert sorted(map(str, Path().glob("*/*"))) == ["video-tracks/tracks.csv", "video-tracks/tracks.npz"]

    def test_what_is_not_written_again_does_not_stay_beside_new_tracks(self, call, tmp_path, video):
        common = ("track", video, "--out", tmp_path / "out", "--grid", 2)
        assert call(*common).returncode == 0
        (tmp_path / "out" / "notes.txt").touch()
        assert call(*common, "--overlay", "none").returncode == 0
        assert sorted(os.listdir(tmp_path / "out")) == ["notes.txt", "report.html", "tracks.csv", "tracks.npz"]

    def test_stride_resize_dots_and_min_confidence(self, call, tmp_path, video):
        options = ("--stride", 3, "--resize", 48, "--overlay", "dots", "--min-confidence", 1)
        result = call("track", video, "--out", tmp_path / "out", "--grid", 2, *options)
        assert result.returncode == 0, result.stderr
        tracks = PointTracks.load(tmp_path / "out" / "tracks.npz")
        assert tracks.tracks.shape == (4, 3, 2) and tracks.size == (96, 64)
        assert tracks.fps == pytest.approx(10 / 3)
        np.testing.assert_array_equal(tracks.visibility, tracks.confidence >= 1)
        overlay = VideoReader(tmp_path / "out" / "overlay.mp4")
        assert overlay.size == (48, 32) and len(list(overlay.frames())) == 3

    def test_names_that_are_not_utf_8(self, tmp_path, video):
        name = os.fsdecode(b"caf\xe9")
        os.rename(video, tmp_path / f"{name}.mp4")
        result = run("track", tmp_path / f"{name}.mp4", "--out", tmp_path / name, "--grid", 2, text=False)
        assert result.returncode == 0, result.stderr
        assert os.fsencode(tmp_path / name / "overlay.mp4") + b"\n" in result.stdout
        assert len(list(VideoReader(tmp_path / name / "overlay.mp4").frames())) == 8
        assert "caf\ufffd.mp4" in (tmp_path / name / "report.html").read_text()


@pytest.mark.slow
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
        [
            ("0,97,2", "q.csv, line 1 (t=0, x=97, y=2) is outside the frame"),
            ("8,1,2", "q.csv, line 1 (t=8, x=1, y=2) is outside the clip"),
            ("0,one,2", "q.csv, line 1: needs three numbers"),
            ("0,1_0,2", "q.csv, line 1: needs three numbers"),
        ],
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

    @pytest.mark.parametrize("model", ["nano", "chrono-nano", "chrono-vits14"])
    def test_wrong_checkpoint(self, call, tmp_path, video, model):
        (tmp_path / "weights.safetensors").write_text("these are not weights")
        common = ("track", video, "--out", tmp_path / "out", "--model", model, "--weights")
        assert_one_line_error(call(*common, tmp_path / "weights.safetensors"), "weights.safetensors")
        assert_one_line_error(call(*common, tmp_path / "nope.ckpt"), "nope.ckpt")

    def test_unknown_device(self, call, tmp_path, video):
        result = call("track", video, "--out", tmp_path / "out", "--device", "abacus")
        assert_one_line_error(result, "device must be cpu or cuda, got 'abacus'")

    @pytest.mark.parametrize("arguments", [("track", "v.mp4"), ("train",), ("eval", "--synthetic"), ("pick", "v.mp4")])
    def test_an_empty_out(self, call, arguments):
        assert_one_line_error(call(*arguments, "--out", ""), "--out is empty: give a path, or . for the current folder")

    def test_a_result_that_is_a_folder_is_found_before_the_work(self, call, tmp_path, video):
        (tmp_path / "out" / "overlay.mp4").mkdir(parents=True)
        result = call("track", video, "--out", tmp_path / "out", "--grid", 2)
        assert_one_line_error(result, "overlay.mp4", "directory")
        assert "tracking" not in result.stderr
        assert os.listdir(tmp_path / "out") == ["overlay.mp4"]

    def test_an_absurd_grid(self, call, tmp_path, video):
        result = call("track", video, "--out", tmp_path / "out", "--grid", 1_000_000_000)
        assert_one_line_error(result, "grid must be at most 96 for a frame of 96x64")

    @pytest.mark.parametrize("number", ["1_0", "\u0661", "0x10", "2.0", "1e400", "nan", "", "-1", "9" * 30])
    def test_numbers_are_decimal(self, tmp_path, video, number):
        for option in ("--grid", "--max-frames", "--stride", "--query-frame", "--resize"):
            result = CliRunner().invoke(
                app, ["track", str(video), "--out", str(tmp_path / "out"), f"{option}={number}"]
            )
            assert result.exit_code == 2 and f"{number!r} is not a whole number" in result.stderr
        assert not (tmp_path / "out").exists()

    def test_a_url(self, call, tmp_path):
        result = call("track", "https://example.org/a.mp4", "--out", tmp_path / "out")
        assert_one_line_error(result, "https://example.org/a.mp4 is a URL: download the video first")

    def test_unknown_overlay(self, call, tmp_path, video):
        result = call("track", video, "--out", tmp_path / "out", "--overlay", "stars")
        assert_one_line_error(result, "--overlay must be one of none, tails, dots, got 'stars'")

    def test_out_is_a_file(self, call, tmp_path, video):
        assert_one_line_error(call("track", video, "--out", video), "give a folder to --out, not a file")

    @pytest.mark.parametrize("limit", [100, 2100, 12000])
    def test_full_disk(self, tmp_path, video, limit):
        """A limit on the size of files: writing fails within tracks.csv, overlay.mp4 or report.html."""
        out = tmp_path / "out"
        out.mkdir()
        for name in ("overlay.mp4", "tracks.npz"):
            (out / name).write_bytes(b"of an earlier run")
        result = run("track", video, "--out", out, "--grid", 2, file_limit=limit)
        name = {100: "tracks.csv", 2100: "overlay.mp4", 12000: "report.html"}[limit]
        assert_one_line_error(result, f"{out / name}: File too large", "give another folder to --out")
        assert sorted(os.listdir(out)) == ["overlay.mp4", "tracks.npz"]
        assert {(out / name).read_bytes() for name in os.listdir(out)} == {b"of an earlier run"}

    @pytest.mark.parametrize(
        ("stage", "slow", "number", "code", "word"),
        [
            ("tracking", "slow_model", signal.SIGINT, 130, "interrupted"),
            ("writing", "slow_drawing", signal.SIGINT, 130, "interrupted"),
            ("writing", "slow_drawing", signal.SIGTERM, 143, "terminated"),
            ("writing", "slow_drawing", signal.SIGHUP, 129, "terminated"),
        ],
    )
    def test_signals(self, tmp_path, video, stage, slow, number, code, word):
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
        process.send_signal(number)
        _, stderr = process.communicate(timeout=15)
        assert process.returncode == code
        assert stderr.rstrip().splitlines()[-1] == f"tritonkern: {word}: nothing unfinished was kept"
        assert "Traceback" not in stderr
        assert not (tmp_path / "out").exists()

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


_DOCTOR = "import sys; sys.argv = ['tritonkern', 'doctor']; {}; from tritonkern.cli import main; main()"


@pytest.mark.parametrize(
    ("damage", "environment", "part"),
    [
        ("pass", {}, "temporal_window_attention"),
        ("pass", {"TRITONKERN_CPU_ISA": "sse9"}, "TRITONKERN_CPU_ISA is 'sse9'"),
        ("sys.modules['triton'] = None", {}, "temporal_window_attention"),
        ("sys.path.insert(0, 'broken')", {}, "torch "),
        ("sys.modules['typer'] = sys.modules['rich'] = sys.modules['av'] = None", {}, "temporal_window_attention"),
        ("pass", {"CXX": "'g++"}, "C++ compiler: 'g++, which does not run (ValueError)"),
        ("pass", {"CXX": " "}, "C++ compiler: "),
        ("pass", {"PYTHONIOENCODING": "ascii", "CXX": "caf\xe9 '"}, "C++ compiler: caf\\xe9 ', which does not run"),
        ("pass", {"TRITON_CACHE_DIR": "/proc/none", "TORCHINDUCTOR_CACHE_DIR": "/proc/none"}, "temporal_window"),
    ],
    ids=[
        "whole",
        "instruction set",
        "no Triton",
        "broken Triton",
        "no extras",
        "quote",
        "space",
        "ASCII",
        "unreadable cache",
    ],
)
def test_doctor_survives(tmp_path, damage, environment, part):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "triton.py").write_text("raise AttributeError('half an installation')")
    root = str(Path(tracking.__file__).parents[2])
    result = subprocess.run(
        [sys.executable, "-c", _DOCTOR.format(damage)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": root} | environment,
    )
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    assert part in result.stdout
    assert f"python {sys.version.split()[0]}" in result.stdout


@pytest.mark.parametrize("output", ["/dev/full", None])
def test_doctor_without_an_output(output):
    code = _DOCTOR.format("sys.stdout = None" if output is None else "pass")
    with open(output or os.devnull, "w") as stdout:
        result = subprocess.run(
            [sys.executable, "-c", code],
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
            env=os.environ | {"PYTHONPATH": str(Path(tracking.__file__).parents[2])},
        )
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1 and "the page cannot be written" in result.stderr


def test_doctor_says_first_what_is_missing_and_may_fail(call, monkeypatch):
    result = call("doctor", "--strict")
    assert result.returncode == 0 and result.stdout.startswith("ready; C++ kernels (")
    for part in ("CPU: ", "C++ compiler: ", "operations: correlation_soft_argmax, "):
        assert f"\n{part}" in result.stdout
    monkeypatch.setattr(_backends, "has_gpu", lambda: True)
    absent = _backends.Obstacle("no Triton today", "bring it")
    monkeypatch.setitem(_backends._PREDICATES, "triton", lambda device: absent)
    result = call("doctor")
    assert result.returncode == 0
    assert result.stdout.startswith("slow: this machine lacks Triton kernels for the GPU; C++ kernels (")
    assert result.stdout.count("no Triton today; bring it") == 1
    assert call("doctor", "--strict").returncode == 1


def test_version(call):
    result = call("--version")
    assert result.returncode == 0 and result.stdout.startswith("tritonkern ")
