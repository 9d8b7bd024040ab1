"""The process that `test_fuzz_readers.py` starts: reads damaged copies of small files, and reports each wrong answer.

Usage: `python fuzz_readers.py FOLDER CASES SEED`, where FOLDER holds the valid files. A line of JSON on stdout says
which case comes next; one that hangs is ended by an alarm, so that the last line names it.
"""

import contextlib
import io
import json
import os
import random
import resource
import signal
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from clips import ColourTracker
from typer.testing import CliRunner

from tritonkern.cli import app
from tritonkern.tracking import PointTracks, VideoReader, predictor, read_queries, read_tapvid

SECONDS = 10
_BYTES = 6 << 30


def damage(content, rng):
    """`content` with flipped bits, a cut, a hole of zeros, a doubled or a moved block, or several of them."""
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 5])):
        kind = rng.choice(["bits", "bits", "bytes", "cut", "hole", "double", "number"])
        start = rng.randrange(max(1, len(data)))
        length = rng.randrange(1, 64)
        if kind == "bits":
            for _ in range(rng.choice([1, 3, 20])):
                if data:
                    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        elif kind == "bytes":
            data[start : start + length] = rng.randbytes(length)
        elif kind == "cut":
            del data[start:]
        elif kind == "hole":
            data[start : start + length] = bytes(len(data[start : start + length]))
        elif kind == "double":
            data[start:start] = data[start : start + length]
        else:
            # Sizes and offsets are mostly four bytes.
            data[start : start + 4] = rng.choice([b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\1", b"\0\0\0\0"])
    return bytes(data)


def read_video(path):
    reader = VideoReader(path)
    reader.count_frames(50)
    for _ in reader.frames(50):
        pass


def read_video_object(path):
    read_video(io.BytesIO(path.read_bytes()))


def track(path):
    """The whole command. It ends with complete results and code 0, or with one line and no results."""
    out = path.parent / "out"
    options = ["--out", str(out), "--grid", "2", "--max-frames", "8", "--no-report"]
    result = CliRunner().invoke(app, ["track", str(path), *options])
    left = sorted(os.listdir(out)) if out.exists() else []
    for name in left:
        (out / name).unlink()
    if out.exists():
        out.rmdir()
    complete = ["overlay.mp4", "tracks.csv", "tracks.npz"]
    if (result.exit_code, left) not in ((0, complete), (2, [])):
        raise AssertionError(f"exit code {result.exit_code}, files {left}: {result.exception!r} {result.output[-300:]}")


def readers_of(path):
    if path.suffix == ".csv":
        return [read_queries]
    if path.suffix == ".npz":
        return [read_queries, PointTracks.load]
    if path.suffix == ".pkl":
        return [lambda path: list(read_tapvid(path))]
    return [read_video, read_video_object, track]


def main(folder, cases, seed):
    predictor.build_model = lambda name, weights=None: ColourTracker()
    resource.setrlimit(resource.RLIMIT_AS, (_BYTES, _BYTES))
    warnings.simplefilter("ignore")
    files = sorted(path for path in folder.iterdir() if path.is_file())
    work = folder / "work"
    work.mkdir()
    answers = {"read": 0, "refused": 0}
    for number in range(cases):
        rng = random.Random(f"{seed}/{number}")
        path = files[number % len(files)]
        damaged = work / f"damaged{path.suffix}"
        damaged.write_bytes(damage(path.read_bytes(), rng))
        readers = readers_of(path)
        # The whole command takes longest.
        reader = rng.choice(readers) if rng.random() < 0.2 else readers[0]
        print(json.dumps({"case": number, "file": path.name}), flush=True)
        signal.alarm(SECONDS)
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                reader(damaged)
            answers["read"] += 1
        except ValueError as error:
            answers["refused"] += 1
            if not str(error):
                print(json.dumps({"wrong": "a ValueError without a message", "case": number}), flush=True)
        except BaseException as error:
            wrong = f"{type(error).__name__}: {error}"
            print(json.dumps({"wrong": wrong, "case": number, "file": path.name}), flush=True)
        signal.alarm(0)
    peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) // 1024  # since `exec`
    print(json.dumps({"answers": answers, "peak_MiB": peak}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
