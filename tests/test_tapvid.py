"""Reading TAP-Vid pickles in the four published layouts, refusing hostile ones, and the benchmark's queries."""

import io
import os
import pickle
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tritonkern.tracking.restricted_pickle import load_arrays
from tritonkern.tracking.tapvid import TapVidClip, read_tapvid, tapvid_queries


def example(seed=0, frames=3, height=48, width=64, tracks=2):
    rng = np.random.default_rng(seed)
    return {
        "video": rng.integers(0, 256, (frames, height, width, 3), dtype=np.uint8),
        "points": rng.random((tracks, frames, 2)),
        "occluded": rng.random((tracks, frames)) < 0.3,
    }


def write(path, content, protocol=pickle.DEFAULT_PROTOCOL):
    path.write_bytes(pickle.dumps(content, protocol))
    return path


def lanczos(frame):
    return np.asarray(Image.fromarray(frame).resize((256, 256), Image.Resampling.LANCZOS))


def jpeg(frame):
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "JPEG")
    return file.getvalue()


def png(frame):
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "PNG")
    return file.getvalue()


def cut_pixel_chunk(png_bytes):
    """A PNG whose pixel chunk is said to be short, so that what follows it is no chunk."""
    start = png_bytes.index(b"IDAT")
    return png_bytes[: start - 4] + b"\0\0\0\4" + png_bytes[start:]


def assert_reads(clip, source, name):
    assert isinstance(clip, TapVidClip) and clip.name == name
    assert type(clip.video) is type(clip.points) is type(clip.occluded) is np.ndarray
    np.testing.assert_array_equal(clip.video, np.stack([lanczos(frame) for frame in source["video"]]))
    np.testing.assert_array_equal(clip.points, source["points"] * 256)
    np.testing.assert_array_equal(clip.occluded, source["occluded"])


def test_davis_is_a_dict_of_videos(tmp_path):
    videos = {"goat": example(1), "bmx-trees": example(2, frames=2, tracks=5)}
    clips = list(read_tapvid(write(tmp_path / "tapvid_davis.pkl", videos)))
    for clip, (name, source) in zip(clips, videos.items(), strict=True):
        assert_reads(clip, source, name)


def test_rgb_stacking_is_a_list_of_videos(tmp_path):
    videos = [example(1, height=256, width=256), example(2)]
    clips = list(read_tapvid(str(write(tmp_path / "tapvid_rgb_stacking.pkl", videos))))
    for index, (clip, source) in enumerate(zip(clips, videos, strict=True)):
        assert_reads(clip, source, f"tapvid_rgb_stacking[{index}]")
    np.testing.assert_array_equal(clips[0].video, videos[0]["video"])


@pytest.mark.parametrize("store", [np.array, list], ids=["bytes array", "list"])
def test_kinetics_is_a_folder_of_lists_with_jpeg_frames(tmp_path, store):
    videos = [example(seed) for seed in range(3)]
    packed = [video | {"video": store([jpeg(frame) for frame in video["video"]])} for video in videos]
    write(tmp_path / "0001_of_0010.pkl", packed[2:])
    write(tmp_path / "0000_of_0010.pkl", packed[:2])
    (tmp_path / "README.md").write_text("not a shard")
    clips = list(read_tapvid(tmp_path))
    assert [clip.name for clip in clips] == ["0000_of_0010[0]", "0000_of_0010[1]", "0001_of_0010[0]"]
    for clip, source in zip(clips, videos, strict=True):
        decoded = [np.asarray(Image.open(io.BytesIO(jpeg(frame)))) for frame in source["video"]]
        assert_reads(clip, source | {"video": decoded}, clip.name)


def test_a_grey_jpeg_becomes_rgb(tmp_path):
    grey = np.full((32, 32), 90, dtype=np.uint8)
    video = example(frames=1) | {"video": [jpeg(grey)]}
    (clip,) = read_tapvid(write(tmp_path / "shard.pkl", [video]))
    np.testing.assert_array_equal(clip.video, np.full((1, 256, 256, 3), 90))


def test_robotap_is_a_folder_of_dicts(tmp_path):
    videos = {f"robot{index}": example(index) for index in range(3)}
    names = list(videos)
    for split, members in enumerate([names[:1], names[1:]]):
        write(tmp_path / f"robotap_split{split}.pkl", {name: videos[name] for name in members})
    for clip, (name, source) in zip(read_tapvid(tmp_path), videos.items(), strict=True):
        assert_reads(clip, source, name)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_pickle_protocol_and_array_kind(tmp_path, protocol):
    content = {
        "big-endian": np.arange(6, dtype=">f4").reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "half": np.arange(3, dtype=np.float16),
        "bytes": np.array([b"\xff\xd8a", b"bc"]),
        "objects": np.array([b"a", [1, 2], None], dtype=object),
        "scalars": [np.float32(1.5), np.bool_(True), np.int64(-3)],
        "plain": [(1, 2.5, "text", b"raw", None, True)],
    }
    read = load_arrays(write(tmp_path / "all.pkl", content, protocol))
    assert read.keys() == content.keys()
    for name in ("big-endian", "fortran", "half", "bytes"):
        assert read[name].dtype.newbyteorder("=") == content[name].dtype.newbyteorder("=")
        np.testing.assert_array_equal(read[name], content[name])
    assert read["objects"].tolist() == content["objects"].tolist()
    assert read["scalars"] == content["scalars"] and read["plain"] == content["plain"]


def test_the_names_of_numpy_1_are_read(tmp_path):
    numpy_2 = pickle.dumps([example()], protocol=2)
    path = tmp_path / "old.pkl"
    path.write_bytes(numpy_2.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert_reads(next(read_tapvid(path)), example(), "old[0]")


class Call:
    """Pickles as a call of `function(*arguments)` followed by `__setstate__(state)`."""

    def __init__(self, function, *arguments, state=None):
        self.reduced = (function, arguments, state) if state is not None else (function, arguments)

    def __reduce__(self):
        return self.reduced


def as_bytes(dtype):
    """An array of `dtype` whose state holds raw bytes: with objects inside, these would be pointers."""
    reconstruct, arguments, state = np.zeros(1, dtype).__reduce__()
    return Call(reconstruct, *arguments, state=(*state[:4], b"A" * 8))


@pytest.mark.parametrize(
    "payload, message",
    [
        (lambda target: Call(os.mkdir, str(target)), r"asks for posix\.mkdir"),
        (
            lambda target: Call(eval, f"__import__('os').mkdir({str(target)!r})"),
            r"asks for (builtins|__builtin__)\.eval",
        ),
        (lambda target: Call(np.ndarray, (1,), np.dtype(object), b"A" * 8), "not a readable pickle"),
        (lambda target: as_bytes(object), "not a readable pickle"),
        (lambda target: np.zeros(1, [("field", object)]), "refused"),
        (lambda target: Call(np.load, str(target)), r"asks for numpy\.load"),
        (lambda target: Call(__import__("_codecs").encode, "x", "rot13"), "encoding 'rot13' is refused"),
        (lambda target: TapVidClip("a", None, None, None), r"asks for copyreg\._reconstructor|TapVidClip"),
    ],
    ids=["mkdir", "eval", "ndarray of pointers", "state of pointers", "record", "np.load", "codec", "class"],
)
@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
def test_a_pickle_that_asks_for_more_than_arrays_is_refused(tmp_path, payload, message, protocol):
    target = tmp_path / "made-by-the-pickle"
    content = {"goat": example() | {"points": payload(target)}}
    path = write(tmp_path / "hostile.pkl", content, protocol)
    with pytest.raises(ValueError, match=message) as error:
        list(read_tapvid(path))
    assert str(path) in str(error.value)
    assert not target.exists()


def nested_key():
    """A dictionary whose key, a tuple of tuples, takes 2 ** 60 steps to hash."""
    pairs = b"K\x01q\x00" + b"".join(b"h%ch%c\x86q%c0" % (i, i, i + 1) for i in range(60))
    return b"\x80\x04" + pairs.replace(b"K\x01q\x00", b"K\x01q\x000", 1) + b"}h\x3cK\x01s."


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x80\x04Nr\xff\xff\xff\x7f.", None),
        (b"\x80\x05\x96" + (1 << 34).to_bytes(8, "little") + b".", "not a readable pickle"),
        (b"\x80\x04\x8e" + (1 << 60).to_bytes(8, "little") + b".", ""),
        (nested_key(), "a dictionary key of tuple is refused"),
        (b"\x80\x04\x8f.", "not a readable pickle"),
        (
            b"\x80\x04cnumpy.core.multiarray\n_reconstruct\nN}\x8c\x0c__defaults__K\x01s\x86b.",
            "the state of a function",
        ),
    ],
    ids=["memo index", "byte array", "bytes", "nested key", "set", "state of a function"],
)
def test_a_small_pickle_takes_little_memory_and_time(tmp_path, content, message):
    """Measured in a process of its own: ten bytes can ask the unpickler of the C library for 16 GB."""
    (tmp_path / "small.pkl").write_bytes(content)
    program = f"""
import time
from pathlib import Path
from tritonkern.tracking.restricted_pickle import load_arrays
def peak():  # since `exec`; ru_maxrss would begin with that of the process that started this one
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
before, start = peak(), time.process_time()
try:
    print(load_arrays(Path({str(tmp_path / "small.pkl")!r})))
except ValueError as error:
    print(error)
assert time.process_time() - start < 2
assert peak() - before < 50_000
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "None\n" if message is None else re.search(message, result.stdout)


def opcodes(name):
    """A hand-written pickle that tries to reach memory behind the arrays that it builds itself."""

    def function(module, attribute):
        return f"c{module}\n{attribute}\n".encode()

    def text(value):
        return b"\x8c" + bytes([len(value)]) + value.encode()

    def state(dtype, contents):
        made = function("numpy", "dtype") + text(dtype) + b"\x85R"
        return b"(K\x01K\x04\x85" + made + b"\x89" + contents + b"t"

    empty = function("numpy.core.multiarray", "_reconstruct") + function("numpy", "ndarray") + b"K\x00\x85C\x01b\x87R"
    objects = empty + state("O", b"](" + b"".join(map(text, "abcd")) + b"e") + b"bq\x00"
    numbers = empty + state("u8", b"C\x20" + b"A" * 32) + b"bq\x00"
    again = b"h\x00" + state("u8", b"C\x20" + b"B" * 32) + b"b"
    dtype = function("numpy", "dtype") + text("u8") + b"\x85R"
    view = function("numpy.core.numeric", "_frombuffer") + b"(h\x00" + dtype + b"K\x04\x85" + text("C") + b"tR"
    scalar = function("numpy.core.multiarray", "scalar") + dtype + b"h\x00\x86R"
    return (
        b"\x80\x04]"
        + {
            "leak a pointer": objects + b"a" + view + b"a",
            "leak one in a scalar": objects + b"a" + scalar + b"a",
            "write a pointer": objects + b"a" + view + b"K\x00K\x01sa",
            "use after free": numbers + b"a" + view + b"a" + again + b"a" + objects + b"a",
            "fill twice": numbers + b"a" + again + b"a",
        }[name]
        + b"."
    )


@pytest.mark.parametrize(
    "name, message",
    [
        ("leak a pointer", "the contents of an array must be bytes, got _Array"),
        ("leak one in a scalar", "the contents of an array must be bytes, got _Array"),
        ("write a pointer", "the contents of an array must be bytes, got _Array"),
        ("use after free", "the contents of an array must be bytes, got _Array"),
        ("fill twice", "an array is filled twice"),
    ],
)
def test_a_pickle_cannot_reach_the_memory_of_its_arrays(tmp_path, name, message):
    path = tmp_path / "hostile.pkl"
    path.write_bytes(opcodes(name))
    with pytest.raises(ValueError, match=re.escape(f"{path}: not a readable pickle of arrays: {message}")):
        load_arrays(path)


def test_damaged_files_are_named(tmp_path):
    whole = pickle.dumps([example()])
    for index, content in enumerate([b"", whole[: len(whole) // 2], b"\x89PNG\r\n", b"version https://git-lfs"]):
        path = tmp_path / f"{index}.pkl"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=re.escape(f"{path}: not a readable pickle")):
            next(read_tapvid(path))


def test_missing_and_empty_places_say_what_to_give(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file; give"):
        next(read_tapvid(tmp_path / "nothing.pkl"))
    with pytest.raises(FileNotFoundError, match=r"holds no \.pkl file"):
        next(read_tapvid(tmp_path))
    with pytest.raises(ValueError, match="holds no video"):
        next(read_tapvid(write(tmp_path / "empty.pkl", [])))
    with pytest.raises(ValueError, match="a dict or a list of videos, got str"):
        next(read_tapvid(write(tmp_path / "text.pkl", "hello")))


GOOD = example()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"video": None}, "field 'video': must be uint8"),
        ({"video": []}, "field 'video': holds no frame"),
        ({"video": np.uint8(1)}, "field 'video': must be uint8"),
        ({"video": GOOD["video"].astype(np.float32)}, "field 'video', frame 0: must be uint8"),
        ({"video": GOOD["video"][..., 0]}, r"field 'video', frame 0: .* got uint8 \[48, 64\]"),
        (
            {"video": [jpeg(GOOD["video"][0]), b"junk"]},
            "field 'video', frame 1: the JPEG bytes cannot be decoded",
        ),
        (
            {"video": [jpeg(GOOD["video"][0])[:700]] * 3},
            "field 'video', frame 0: the JPEG bytes cannot be decoded",
        ),
        (
            {"video": [cut_pixel_chunk(png(GOOD["video"][0]))] * 3},
            "field 'video', frame 0: the JPEG bytes cannot be decoded",
        ),
        ({"occluded": GOOD["occluded"].astype(np.uint8)}, "field 'occluded': must be bool, got uint8"),
        ({"occluded": GOOD["occluded"][:, :2]}, r"field 'occluded': must have shape \[N, 3\]"),
        ({"points": GOOD["points"][:1]}, r"field 'points': must have shape \[2, 3, 2\]"),
        ({"points": np.zeros((2, 3, 2), int)}, "field 'points': must be floating point, got int64"),
        ({"points": GOOD["points"] * 256}, "field 'points': must be fractions of width and height"),
        ({"points": GOOD["points"] * np.nan}, "field 'points': a visible point is not finite"),
    ],
)
def test_errors_name_file_video_and_field(tmp_path, change, message):
    path = write(tmp_path / "davis.pkl", {"camel": GOOD | change})
    with pytest.raises(ValueError, match=re.escape(f"{path}, video 'camel', ") + message):
        next(read_tapvid(path))


def test_a_missing_field_and_a_video_that_is_no_dict(tmp_path):
    without = {name: GOOD[name] for name in ("video", "points")}
    with pytest.raises(ValueError, match="video 'a': field 'occluded' is missing, found"):
        next(read_tapvid(write(tmp_path / "missing.pkl", {"a": without})))
    with pytest.raises(ValueError, match=r"video 'list\[0\]': must be a dict"):
        next(read_tapvid(write(tmp_path / "list.pkl", [1])))


def test_occluded_points_may_be_anything(tmp_path):
    video = example() | {"points": np.full((2, 3, 2), np.nan), "occluded": np.ones((2, 3), dtype=bool)}
    (clip,) = read_tapvid(write(tmp_path / "hidden.pkl", [video]))
    assert clip.occluded.all()


# Three tracks over seven frames; the strided queries are in frames 0 and 5.
#   track 0: visible from frame 2 on    track 1: never visible    track 2: visible in frames 0 and 5 only
HIDDEN = np.ones((3, 7), dtype=bool)
HIDDEN[0, 2:] = False
HIDDEN[2, [0, 5]] = False
POINTS = np.arange(42.0).reshape(3, 7, 2)
CLIP = TapVidClip("by hand", np.zeros((7, 256, 256, 3), dtype=np.uint8), POINTS, HIDDEN)


def test_first_queries_by_hand():
    # POINTS[n, t] = (14 n + 2 t, 14 n + 2 t + 1): track 0 at frame 2 is (4, 5), track 2 at frame 0 is (28, 29).
    queries, tracks = tapvid_queries(CLIP, "first")
    np.testing.assert_array_equal(queries, [[2, 5, 4], [0, 29, 28]])
    np.testing.assert_array_equal(tracks, [0, 2])


def test_strided_queries_by_hand():
    # Frame 0: track 2 at (28, 29). Frame 5: track 0 at (10, 11) and track 2 at (38, 39).
    queries, tracks = tapvid_queries(CLIP, "strided")
    np.testing.assert_array_equal(queries, [[0, 29, 28], [5, 11, 10], [5, 39, 38]])
    np.testing.assert_array_equal(tracks, [2, 0, 2])


@pytest.mark.parametrize("mode", ["first", "strided"])
def test_a_clip_without_visible_points_has_no_queries(mode):
    queries, tracks = tapvid_queries(TapVidClip("dark", CLIP.video, POINTS, np.ones_like(HIDDEN)), mode)
    assert queries.shape == (0, 3) and tracks.shape == (0,)


def test_unknown_mode():
    with pytest.raises(ValueError, match="mode must be one of first, strided, got 'last'"):
        tapvid_queries(CLIP, "last")
