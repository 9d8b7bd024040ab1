"""`tritonkern track --stream`: sources, the file that grows, signals, frames that are dropped."""

import contextlib
import http.server
import importlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from fractions import Fraction

import av
import numpy as np
import pytest
from clips import ColourTracker, square_clip, write_clip
from test_cli import assert_one_line_error, call, program  # noqa: F401

from tritonkern.tracking import live
from tritonkern.tracking.growing_files import HEADER, GrowingCsv, GrowingParquet
from tritonkern.tracking.live import LiveFrame, LiveFrames
from tritonkern.tracking.stream import StreamOutput

CLIP = square_clip(12)
RAW = ("-", "--raw-size", "96x64")


def start(*arguments, slow=0.0, rows=100_000):
    code = program(slow_model=slow).replace("(ColourTracker):", "(ColourTracker):\n    context = 0")
    code = f"import tritonkern.tracking.growing_files as files\nfiles.GrowingParquet.MOST_ROWS = {rows}\n{code}"
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
def test_killed_with_parquet(tmp_path):
    """What was written is a table, without the file that was under way; the next run replaces it."""
    pq = pytest.importorskip("pyarrow.parquet", reason="Parquet needs pyarrow")
    out = tmp_path / "tracks.parquet"
    process = start(*RAW, "--grid", 3, "--out", out, "--buffer", 4, rows=20)
    endless(process)
    for _ in range(1200):
        if len(list(out.glob("part-*"))) >= 5:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    parts = sorted(out.glob("part-*"))
    assert [path.name for path in parts[:2]] == ["part-000001.parquet", "part-000002.parquet"]
    (out / ".tritonkern-1-0.part").write_bytes(b"half")  # of a run that was killed while it wrote
    table = pq.read_table(out)
    assert table.num_rows == 27 * len(parts) >= 5 * 27  # whole frames: three of nine points
    np.testing.assert_array_equal(table["t"], np.arange(3 * len(parts)).repeat(9))
    again = start(*RAW, "--grid", 1, "--out", out)
    again.communicate(CLIP.tobytes(), timeout=300)
    assert again.returncode == 0 and [path.name for path in out.iterdir()] == ["part-000001.parquet"]
    assert pq.read_table(out).num_rows == 12


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


def test_a_named_pipe(tmp_path):
    """Also what a shell puts for <(command)."""
    data = write_clip(tmp_path / "clip.mkv", CLIP).read_bytes()
    os.mkfifo(tmp_path / "pipe")
    threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(data,), daemon=True).start()
    assert [frame.number for frame in LiveFrames(str(tmp_path / "pipe"))] == list(range(12))
    reading, writing = os.pipe()
    with open(writing, "wb") as file:
        file.write(CLIP[:3].tobytes())
    frames = list(LiveFrames(f"/dev/fd/{reading}", raw_size=(96, 64)))
    os.close(reading)
    np.testing.assert_array_equal(np.stack([frame.image for frame in frames]), CLIP[:3])


def output(frame, count=2):
    xy = np.arange(2.0 * count, dtype=np.float32).reshape(count, 2) + frame
    return StreamOutput(frame, np.arange(count), xy, xy[:, 0] > 3, np.full(count, 0.25, np.float32))


def test_parquet(tmp_path, monkeypatch):
    """Parts are written by rows and by time, and read as one table by pyarrow, pandas, DuckDB and Polars."""
    pq = pytest.importorskip("pyarrow.parquet", reason="Parquet needs pyarrow")
    out = tmp_path / "a.parquet"
    monkeypatch.setattr(GrowingParquet, "MOST_ROWS", 5)
    with GrowingParquet(out) as file:
        for frame in range(4):
            file.append(output(frame), 10 + frame, 0.5 * frame)
        file.append(output(4, 0), 14, 2.0)
        assert [path.name for path in out.iterdir()] == ["part-000001.parquet"]
        monkeypatch.setattr(GrowingParquet, "MOST_SECONDS", 0.0)
        file.append(output(5), 15, 2.5)
        assert len(list(out.iterdir())) == 2
        monkeypatch.setattr(GrowingParquet, "MOST_SECONDS", 100.0)
        file.append(output(6), 16, 3.0)
        with pytest.raises(ValueError, match="another run is writing to .*a.parquet"):
            GrowingParquet(out)
    assert sorted(path.name for path in out.iterdir()) == [f"part-00000{n}.parquet" for n in (1, 2, 3)]
    table = pq.read_table(out)
    names = ["point", "t", "x", "y", "visible", "confidence", "seconds_from_the_start_of_stream"]
    assert table.column_names == names == HEADER.decode().strip().split(",")
    assert table["t"].to_pylist() == [t for t in (10, 11, 12, 13, 15, 16) for _ in range(2)]
    assert table["x"].to_pylist()[-2:] == [6, 8] and table["visible"].to_pylist()[:4] == [False, False, False, False]
    assert table["point"].to_pylist() == [0, 1] * 6 and table["seconds_from_the_start_of_stream"][-1].as_py() == 3
    total, readers = sum(table["t"].to_pylist()), {}
    readers["pandas"] = lambda package: package.read_parquet(out).t.sum()
    readers["duckdb"] = lambda package: package.sql(f"SELECT sum(t) FROM '{out}/*.parquet'").fetchall()[0][0]
    readers["polars"] = lambda package: package.read_parquet(f"{out}/*.parquet")["t"].sum()
    for name, read in readers.items():
        with contextlib.suppress(ModuleNotFoundError):
            assert read(importlib.import_module(name)) == total
    (out / "notes.txt").touch()
    with pytest.raises(ValueError, match="a.parquet holds other files, such as notes.txt"):
        GrowingParquet(out)
    assert len(list(out.iterdir())) == 4


def test_one_csv_has_one_writer(tmp_path):
    with GrowingCsv(tmp_path / "tracks.csv") as file:
        file.append(output(0), 0, 0.0)
        with pytest.raises(ValueError, match="another run is writing to .*tracks.csv"):
            GrowingCsv(tmp_path / "tracks.csv")
    assert len(rows(tmp_path / "tracks.csv")) == 2


@pytest.fixture
def stream(call, monkeypatch):  # noqa: F811
    monkeypatch.setattr(ColourTracker, "context", 0)
    return lambda *arguments: call("track", "--stream", *arguments)


def test_points_of_many_frames(stream, tmp_path):
    """More frames with points than `max_sources` allows by default."""
    clip = write_clip(tmp_path / "clip.mkv", square_clip(36, step=1))
    (tmp_path / "q.csv").write_text("".join(f"{t},5,5\n" for t in range(35)))
    result = stream(clip, "--queries", tmp_path / "q.csv", "--out", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert len(rows(tmp_path / "out" / "tracks.csv")) == sum(range(2, 37))


def test_earlier_results(stream, tmp_path):
    """They stay if the points are wrong; those that would not fit to a new tracks.csv are removed with it."""
    clip = write_clip(tmp_path / "clip.mkv", CLIP)
    for name in ("tracks.csv", "tracks.npz", "overlay.mp4", "notes.txt"):
        (tmp_path / name).write_text("earlier")
    (tmp_path / "q.csv").write_text("0,5,5\n3,97,5\n")
    result = stream(clip, "--queries", tmp_path / "q.csv", "--out", tmp_path)
    assert_one_line_error(result, "q.csv, line 2 (t=3, x=97, y=5) is outside the frame")
    assert (tmp_path / "tracks.csv").read_text() == "earlier" and (tmp_path / "tracks.npz").exists()
    assert stream(clip, "--grid", 1, "--out", tmp_path).returncode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip.mkv", "notes.txt", "q.csv", "tracks.csv"]


class Address(http.server.BaseHTTPRequestHandler):
    """A video at an address. `promised` bytes more are announced than are there."""

    promised = 0

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.server.data) + self.promised))
        self.end_headers()
        self.wfile.write(self.server.data)

    def log_message(self, *_):
        pass


class Broken(Address):
    promised = 100_000


@pytest.fixture(params=[Address, Broken], ids=["whole", "breaks off"])
def address(request, tmp_path):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), request.param) as server:
        server.data = write_clip(tmp_path / "clip.ts", CLIP).read_bytes()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/clip.ts", request.param.promised
        server.shutdown()


def test_an_address(stream, tmp_path, address):
    """Rows stay where the connection breaks off, also of the frames that waited."""
    url, promised = address
    result = stream(url, "--grid", 2, "--out", tmp_path / "out")
    if promised:
        assert_one_line_error(result, f"{url} broke off after ", "frames before are in ", "tracks.csv")
        assert len(rows(tmp_path / "out" / "tracks.csv")) >= 4 * 10
    else:
        assert result.returncode == 0, result.stderr
        assert len(rows(tmp_path / "out" / "tracks.csv")) == 4 * 12


def test_an_address_where_nobody_is(stream, tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        url = f"rtsp://127.0.0.1:{other.getsockname()[1]}/camera"
        assert_one_line_error(stream(url, "--out", tmp_path / "out"), f"{url} cannot be read as a video (")
    assert not (tmp_path / "out").exists()


class FakeContainer:
    """Frames that are grey, and then what a device says that was unplugged."""

    def __init__(self, frames, error):
        self.streams = types.SimpleNamespace(video=[types.SimpleNamespace()])
        self._frames, self._error = frames, error

    def decode(self, stream):
        for number in range(self._frames):
            frame = av.VideoFrame.from_ndarray(np.full((64, 96, 3), 10 * number, np.uint8))
            frame.pts, frame.time_base = 90 + number, Fraction(1, 30)
            yield frame
        if self._error is not None:
            raise self._error

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("/dev/video0", {"format": "v4l2"}),
        ("rtsp://camera/1", {"timeout": (10.0, 30.0), "options": {"rtsp_transport": "tcp"}}),
        ("http://host/a.ts", {"timeout": (10.0, 30.0)}),
    ],
)
def test_cameras_and_addresses(stream, tmp_path, monkeypatch, source, expected):
    """What FFmpeg is asked for, times from the first frame on, and a camera that is unplugged."""
    asked = []

    def opened(*arguments, **options):
        asked.append((arguments, options))
        return FakeContainer(5, av.error.OSError(19, "No such device", source))

    monkeypatch.setattr(live.av, "open", opened)
    result = stream(source, "--grid", 1, "--lookahead", 3, "--out", tmp_path)
    assert_one_line_error(result, f"{source} broke off after 5 frames (No such device)")
    assert asked == [((source, "r"), {"metadata_errors": "ignore", **expected})]
    found = rows(tmp_path / "tracks.csv")
    np.testing.assert_array_equal(found[:, 1], range(5))
    np.testing.assert_allclose(found[:, 6], np.arange(5) / 30, atol=6e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("clip.mp4", "--out", "x.parquet"), "--out x.parquet ends in .parquet, which goes with --stream"),
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
