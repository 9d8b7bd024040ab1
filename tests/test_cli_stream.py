"""`tritonkern track --stream`: sources, the file that grows, signals, frames that are dropped."""

import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from clips import ColourTracker, square_clip, write_clip
from test_cli import assert_one_line_error, call, program  # noqa: F401

from tritonkern.tracking.live import HEADER, GrowingCsv, LiveFrame, LiveFrames
from tritonkern.tracking.stream import StreamOutput

CLIP = square_clip(12)
RAW = ("-", "--raw-size", "96x64")


def start(*arguments, slow=0.0):
    code = program(slow_model=slow).replace("(ColourTracker):", "(ColourTracker):\n    context = 0")
    command = [sys.executable, "-c", code, "track", "--stream", *map(str, arguments)]
    # A shell starts background jobs with Ctrl-C ignored, and tests may run in one.
    heard = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, preexec_fn=heard)


def rows(path):
    """The file, of which every line must be whole."""
    data = path.read_bytes()
    assert data.startswith(HEADER) and len(data) % 64 == 0 and data.count(b"\n") * 64 == len(data)
    return np.genfromtxt(path, delimiter=",", skip_header=1).reshape(-1, 7)


def endless(process, seconds=0.005):
    """Feed raw frames to a process until it ends."""

    def feed():
        number = 0
        try:
            while True:
                process.stdin.write(CLIP[number % 12].tobytes())
                process.stdin.flush()
                number += 1
                time.sleep(seconds)
        except (BrokenPipeError, ValueError):
            pass

    threading.Thread(target=feed, daemon=True).start()


def wait_for(path, lines):
    for _ in range(1200):
        if path.exists() and path.stat().st_size >= 64 * lines:
            return
        time.sleep(0.05)
    raise AssertionError("the file does not grow")


def test_file_and_pipes_give_the_same(tmp_path):
    """A file, the same file through a pipe, and its frames without a container."""
    path = write_clip(tmp_path / "clip.mkv", CLIP)
    frames = list(LiveFrames(str(path)))
    assert [frame.number for frame in frames] == list(range(12)) and frames[5].seconds == pytest.approx(0.5)
    raw = b"".join(frame.image.tobytes() for frame in frames)
    sources = {"file": ((path,), b""), "pipe": (("-",), path.read_bytes()), "raw": (RAW, raw)}
    running = {name: start(*source, "--grid", 3, "--out", tmp_path / name) for name, (source, _) in sources.items()}
    for name, process in running.items():
        out, error = process.communicate(sources[name][1], timeout=300)
        assert process.returncode == 0, error.decode()
        assert b"12 frames, 0 dropped" in out
    found = {name: rows(tmp_path / name / "tracks.csv") for name in sources}
    assert found["file"].shape == (12 * 9, 7) and sorted(set(found["file"][:, 1])) == list(range(12))
    np.testing.assert_array_equal(found["pipe"], found["file"])
    np.testing.assert_array_equal(found["raw"][:, :6], found["file"][:, :6])


@pytest.mark.slow
def test_killed(tmp_path):
    process = start(*RAW, "--grid", 3, "--out", tmp_path, "--buffer", 4)
    endless(process)
    wait_for(tmp_path / "tracks.csv", 200)
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    found = rows(tmp_path / "tracks.csv")
    assert len(found) >= 199 and (np.diff(found[:, 1]) >= 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(tmp_path, number):
    """It ends in order, with the frames that still waited for their lookahead."""
    process = start(*RAW, "--grid", 2, "--out", tmp_path, "--lookahead", 5)
    endless(process)
    wait_for(tmp_path / "tracks.csv", 40)
    process.send_signal(number)
    process.wait(60)
    out, error = process.stdout.read().decode(), process.stderr.read().decode()
    assert process.returncode == 0, error
    assert "Traceback" not in error
    frames = int(out.split(" frames")[0].split("\n")[-1])
    found = rows(tmp_path / "tracks.csv")
    assert len(found) == 4 * frames and found[-1, 1] == frames - 1


@pytest.mark.slow
def test_a_slow_tracker_drops_frames_and_counts_them(tmp_path):
    process = start(*RAW, "--grid", 1, "--out", tmp_path, "--drop", "--buffer", 2, "--max-frames", 15, slow=0.05)
    endless(process)
    process.wait(120)
    out = process.stdout.read().decode()
    dropped = int(out.split("15 frames, ")[1].split(" dropped")[0])
    found = rows(tmp_path / "tracks.csv")
    assert dropped > 0 and len(found) == 15 and found[-1, 1] > 14


def test_the_buffer_is_bounded():
    """Without dropping, the source waits."""
    given = []

    class Counting(LiveFrames):
        def _frames(self):
            for number in range(100):
                given.append(number)
                yield LiveFrame(number, 0.0, CLIP[0])

    frames = Counting("-", buffer=3)
    time.sleep(0.3)
    assert len(given) == 4
    assert [frame.number for frame in frames] == given == list(range(100))
    frames = Counting("-", buffer=3, drop=True)
    time.sleep(0.3)
    assert len(given) == 200 and frames.dropped in (97, 98)
    assert [frame.number for frame in frames][-1] == 99
    frames.stop()


def test_lines_are_never_cut(tmp_path):
    path = tmp_path / "tracks.csv"
    with GrowingCsv(path) as file:
        for number in (0, 123456789):
            xy = np.array([[-99.9994, 5], [123456.789, 0.0004]], np.float32)
            file.append(StreamOutput(0, np.array([0, 9999999]), xy, xy[:, 0] > 0, np.array([0, 1.0])), number, 1e6)
        big = StreamOutput(0, np.array([10**7]), xy[:1], np.array([True]), np.array([1.0]))
        with pytest.raises(ValueError, match="too many digits"):
            file.append(big, 0, 0.0)
    found = rows(path)
    assert found[3].tolist() == pytest.approx([9999999, 123456789, 123456.789, 0, 1, 1, 1e6], rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("no-such.mp4", "--stream"), "no-such.mp4 does not exist"),
        (("/dev/tritonkern-none", "--stream"), "/dev/tritonkern-none cannot be read as a video"),
        (("clip.mp4", "--stream", "--raw-size", "3x4"), "raw_size goes with standard input"),
        (("-", "--stream", "--raw-size", "3"), "--raw-size must be WIDTHxHEIGHT, such as 640x480, got '3'"),
        (("clip.mp4", "--stream", "--resize", "64"), "--resize goes with overlay.mp4"),
        (("clip.mp4", "--drop"), "--drop and --raw-size go with --stream"),
    ],
)
def test_wrong_calls(call, tmp_path, monkeypatch, arguments, message):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ColourTracker, "context", 0)
    assert_one_line_error(call("track", *arguments), message)
    assert not list(tmp_path.rglob("tracks.csv"))
