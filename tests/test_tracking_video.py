"""Every kind of video in, an mp4 out, queries from files, and results that are complete or absent."""

import errno
import os
import re
import struct
import warnings
from contextlib import nullcontext
from types import SimpleNamespace

import av
import numpy as np
import pytest
from clips import rotate_display, square_clip, write_clip, write_cut_clip, write_sound
from PIL import Image

from tritonkern.files import atomic_path
from tritonkern.tracking import PointTracks, VideoReader, VideoWriter, grid_queries, read_queries
from tritonkern.tracking.queries import check_queries


def frames_of(source, **options):
    return np.stack(list(VideoReader(source).frames(**options)))


def assert_alike(frames, expected, tolerance=6):
    assert frames.shape == expected.shape and frames.dtype == np.uint8
    # Compression blurs edges; the areas must agree.
    assert np.median(np.abs(frames.astype(int) - expected)) <= 1
    assert np.mean(np.abs(frames.astype(int) - expected)) < tolerance


class TestReading:
    @pytest.mark.parametrize(
        ("name", "codec", "pix_fmt"),
        [
            ("a.mp4", "libx264", "yuv444p"),
            ("a.mkv", "ffv1", "bgr0"),
            ("a.avi", "mpeg4", "yuv420p"),
            ("a.webm", "libvpx-vp9", "yuv420p"),
            ("a.mov", "png", "rgb24"),
            ("10 bits: 100%03d.mp4", "libx264", "yuv420p10le"),
        ],
    )
    def test_formats(self, tmp_path, name, codec, pix_fmt):
        clip = square_clip()
        path = write_clip(tmp_path / name, clip, codec=codec, pix_fmt=pix_fmt)
        reader = VideoReader(path)
        assert reader.size == (96, 64)
        assert reader.fps == 10
        assert_alike(np.stack(list(reader.frames())), clip)

    def test_reads_from_the_start_every_time(self, tmp_path):
        reader = VideoReader(write_clip(tmp_path / "a.mp4", square_clip()))
        first, second = list(reader.frames()), list(reader.frames())
        assert len(first) == 8
        np.testing.assert_array_equal(first, second)

    def test_max_frames(self, tmp_path):
        path = write_clip(tmp_path / "a.mp4", square_clip())
        np.testing.assert_array_equal(frames_of(path, max_frames=3), frames_of(path)[:3])
        assert len(frames_of(path, max_frames=100)) == 8
        with pytest.raises(ValueError, match="max_frames must be at least 1, got 0"):
            frames_of(path, max_frames=0)

    def test_odd_size(self, tmp_path):
        clip = square_clip(size=(97, 63))
        assert_alike(frames_of(write_clip(tmp_path / "a.mp4", clip)), clip)

    def test_grey(self, tmp_path):
        clip = np.repeat(square_clip()[..., :1], 3, axis=-1)
        assert_alike(frames_of(write_clip(tmp_path / "a.mkv", clip, codec="ffv1", pix_fmt="gray")), clip)

    def test_transparent_pixels_are_black(self, tmp_path):
        clip = np.concatenate([square_clip(), np.full((8, 64, 96, 1), 255, dtype=np.uint8)], axis=-1)
        clip[:, :20, :, 3] = 0
        frames = frames_of(write_clip(tmp_path / "a.mov", clip, codec="png", pix_fmt="rgba"))
        np.testing.assert_array_equal(frames[:, :20], 0)
        np.testing.assert_array_equal(frames[:, 20:], clip[:, 20:, :, :3])

    def test_rotation_metadata(self, tmp_path):
        clip = square_clip()
        path = rotate_display(write_clip(tmp_path / "a.mp4", clip))
        assert VideoReader(path).size == (64, 96)
        # A quarter turn clockwise.
        assert_alike(frames_of(path), np.rot90(clip, -1, axes=(1, 2)))

    def test_variable_frame_rate_gives_the_average(self, tmp_path):
        times = [0, 10, 20, 30, 500, 600, 700, 1400]
        reader = VideoReader(write_clip(tmp_path / "a.mkv", square_clip(), codec="ffv1", pix_fmt="bgr0", times=times))
        assert len(list(reader.frames())) == 8
        assert reader.fps == pytest.approx(7 / 1.4)

    def test_folder_in_natural_order(self, tmp_path):
        clip = square_clip(12)
        for index, image in enumerate(clip):
            Image.fromarray(image).save(tmp_path / f"frame{index}.png")
        (tmp_path / "notes.txt").write_text("not a frame")
        (tmp_path / "._frame0.png").write_text("what macOS leaves on memory sticks")
        reader = VideoReader(tmp_path)
        assert reader.frame_count == 12
        np.testing.assert_array_equal(list(reader.frames()), clip)

    def test_names_with_digits_that_are_no_numbers(self, tmp_path):
        for name in ("1", "1²2", "²"):
            Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
        assert len(frames_of(tmp_path)) == 3

    def test_folder_of_unequal_images(self, tmp_path):
        for index, width in enumerate([40, 40, 42]):
            Image.new("RGB", (width, 30)).save(tmp_path / f"{index}.png")
        with pytest.raises(ValueError, match="frame 2 of .* is 42x30 where the first one is 40x30"):
            frames_of(tmp_path)

    def test_images_of_other_modes(self, tmp_path):
        deep = np.linspace(0, 65535, 64 * 48).reshape(48, 64).astype(np.uint16)
        Image.fromarray(deep).save(tmp_path / "0.png")
        rgba = np.zeros((48, 64, 4), dtype=np.uint8)
        rgba[:, 32:] = (10, 20, 30, 255)
        rgba[:, :32] = (200, 200, 200, 0)
        Image.fromarray(rgba).save(tmp_path / "1.png")
        Image.new("P", (64, 48)).save(tmp_path / "2.png")
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.new("RGB", (48, 64), (9, 9, 9)).save(tmp_path / "3.jpg", exif=exif)
        grey, transparent, palette, turned = VideoReader(tmp_path).frames()
        np.testing.assert_array_equal(grey[..., 0], deep // 256)
        np.testing.assert_array_equal(transparent[0, [0, 63]], [[0, 0, 0], [10, 20, 30]])
        assert palette.shape == turned.shape == (48, 64, 3)

    def test_array(self):
        clip = square_clip()
        reader = VideoReader(clip)
        assert (reader.size, reader.frame_count, reader.fps) == ((96, 64), 8, 24.0)
        np.testing.assert_array_equal(list(reader.frames()), clip)
        with pytest.raises(ValueError, match=r"uint8 RGB frames \[T, H, W, 3\] or \[T, 3, H, W\], got float32"):
            VideoReader(clip.astype(np.float32))


class TestUnreadable:
    def test_missing(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="nope.mp4 does not exist"):
            VideoReader(tmp_path / "nope.mp4")

    @pytest.mark.parametrize("content", [b"", b"these are not pictures" * 100])
    def test_not_a_video(self, tmp_path, content):
        (tmp_path / "a.mp4").write_bytes(content)
        with pytest.raises(ValueError, match="a.mp4 cannot be read as a video"):
            VideoReader(tmp_path / "a.mp4")

    def test_text(self, tmp_path):
        (tmp_path / "a.txt").write_text("FFmpeg shows this on a terminal\n" * 50)
        with pytest.raises(ValueError, match="a.txt is text"):
            VideoReader(tmp_path / "a.txt")

    def test_sound_only(self, tmp_path):
        with pytest.raises(ValueError, match="a.m4a has no video stream"):
            VideoReader(write_sound(tmp_path / "a.m4a"))

    def test_no_frame(self, tmp_path):
        with pytest.raises(ValueError, match="holds no video frame"):
            VideoReader(square_clip()[:0])

    def test_empty_folder(self, tmp_path):
        with pytest.raises(ValueError, match="holds no image"):
            VideoReader(tmp_path)

    def test_broken_image(self, tmp_path):
        Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
        (tmp_path / "1.png").write_bytes(b"\x89PNG")
        with pytest.raises(ValueError, match="1.png cannot be read as an image"):
            frames_of(tmp_path)

    @pytest.mark.parametrize(
        ("suffix", "before", "after"),
        [
            # A pixel chunk that is too short: what follows it is no chunk.
            ("png", b".{4}IDAT", b"\0\0\0\4IDAT"),
            ("bmp", struct.pack("<ii", 8, 8), struct.pack("<ii", 1 << 28, 8)),
            # The entry of the width.
            ("tif", struct.pack("<HHII", 256, 4, 1, 8), struct.pack("<HHII", 256, 4, 1, 1 << 28)),
            ("ppm", b"255", b"2x5"),
        ],
    )
    def test_damaged_image(self, tmp_path, suffix, before, after):
        path = tmp_path / f"0.{suffix}"
        Image.new("RGB", (8, 8), (1, 2, 3)).save(path)
        damaged, count = re.subn(before, after, path.read_bytes(), flags=re.DOTALL)
        assert count == 1
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"0.{suffix} cannot be read as an image"):
            VideoReader(path)

    def test_cut_short(self, tmp_path):
        path = write_cut_clip(tmp_path / "a.mp4")
        with pytest.warns(RuntimeWarning, match=r"a.mp4 announces 20 frames and ends after (\d+)") as warned:
            count = len(frames_of(path))
        assert 0 < count < 20 and str(warned[0].message).split(" and ends after ")[1].startswith(f"{count}:")
        assert warned[0].filename == __file__
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert len(frames_of(path, max_frames=count)) == count

    def test_damaged_in_the_middle(self, tmp_path):
        path = write_clip(tmp_path / "a.mov", square_clip(), codec="png", pix_fmt="rgb24")
        data = path.read_bytes()
        third = [i for i in range(len(data)) if data.startswith(b"\x89PNG", i)][3]
        path.write_bytes(data[:third] + bytes(8) + data[third + 8 :])
        with pytest.raises(ValueError, match="frame 3 of .* cannot be decoded .* --max-frames 3"):
            frames_of(path)
        assert len(frames_of(path, max_frames=3)) == 3

    @pytest.mark.parametrize(
        ("name", "codec", "pix_fmt"),
        [("a.mp4", "libx264", "yuv444p"), ("a.webm", "libvpx-vp9", "yuv420p"), ("", "", "")],
    )
    def test_frames_are_counted_without_decoding(self, tmp_path, monkeypatch, name, codec, pix_fmt):
        clip = square_clip()
        reader = VideoReader(write_clip(tmp_path / name, clip, codec=codec, pix_fmt=pix_fmt) if name else clip)
        monkeypatch.setattr(reader._source, "frames", None)
        assert [reader.count_frames(n) for n in (1, 5, 8, 9, 10**400)] == [1, 5, 8, 8, 8]
        with pytest.raises(ValueError, match="max_frames must be at least 1, got 0"):
            reader.count_frames(0)

    def test_images_are_counted(self, tmp_path):
        for n in range(3):
            Image.new("RGB", (8, 8)).save(tmp_path / f"{n}.png")
        reader = VideoReader(tmp_path)
        assert (reader.count_frames(2), reader.count_frames(9)) == (2, 3)

    def test_a_file_that_breaks_off_counts_as_whole(self, tmp_path, monkeypatch):
        """Where it is damaged is for the reading to say."""
        reader = VideoReader(write_clip(tmp_path / "a.mp4", square_clip()))

        class Damaged:
            def demux(self, stream):
                yield SimpleNamespace(size=1, is_discard=False)
                raise av.InvalidDataError(1, "damaged")

        monkeypatch.setattr(reader._source, "_open", lambda: nullcontext((Damaged(), None)))
        assert reader.count_frames(7) == 7


class TestWriting:
    @pytest.mark.parametrize("size", [(96, 64), (97, 63)])
    def test_plays_everywhere(self, tmp_path, size):
        clip = square_clip(size=size)
        with VideoWriter(tmp_path / "a.mp4", 29.97) as writer:
            for frame in clip:
                writer.write(frame)
        with av.open(str(tmp_path / "a.mp4")) as container:
            stream = container.streams.video[0]
            assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
            assert float(stream.average_rate) == pytest.approx(29.97, rel=1e-3)
            assert (stream.width, stream.height) == (size[0] + size[0] % 2, size[1] + size[1] % 2)
        # The index comes first, so that a browser can begin before the end is there.
        data = (tmp_path / "a.mp4").read_bytes()
        assert data.index(b"moov") < data.index(b"mdat")
        assert_alike(frames_of(tmp_path / "a.mp4")[:, : size[1], : size[0]], clip)

    def test_colours_come_back(self, tmp_path):
        colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [0, 0, 0], [200, 100, 50]])
        frame = np.repeat(np.repeat(colours[None].astype(np.uint8), 32, axis=1), 64, axis=0)
        with VideoWriter(tmp_path / "a.mp4", 10) as writer:
            writer.write(frame)
        centres = frames_of(tmp_path / "a.mp4")[0, 32, 16::32]
        assert np.abs(centres.astype(int) - colours).max() <= 6

    def test_full_disk(self):
        with pytest.raises(OSError) as raised, VideoWriter("/dev/full", 10) as writer:
            writer.write(square_clip()[0])
        assert raised.value.errno == errno.ENOSPC


def damaged_archives(folder, **arrays):
    """One file for each way in which reading an archive fails."""
    path = folder / "damaged.npz"
    np.savez_compressed(path, **arrays)
    whole = path.read_bytes()
    central, end = whole.rindex(b"PK\x01\x02"), whole.rindex(b"PK\x05\x06")
    first = whole.index(b"PK\x01\x02")
    local = 30 + struct.unpack_from("<H", whole, 26)[0] + struct.unpack_from("<H", whole, 28)[0]
    changes = {
        "zlib.error": (local, b"\xff\xff\xff"),
        "NotImplementedError": (first + 10, b"\x63\x00"),
        "BadZipFile": (central, b"XXXX"),
        "OSError": (end + 16, b"\xff\xff\xff\x0f"),
    }
    for offset, data in changes.values():
        path.write_bytes(whole[:offset] + data + whole[offset + len(data) :])
        yield path
    with open(path, "wb") as file:
        np.save(file, np.zeros((1, 3)))
    yield path


class TestQueries:
    def test_grid(self):
        queries = grid_queries(3, (640, 320), frame=2)
        expected = [[2, x, y] for y in (10, 160, 310) for x in (10, 320, 630)]
        np.testing.assert_allclose(queries, expected)
        np.testing.assert_allclose(grid_queries(1, (640, 321)), [[0, 320, 160.5]])
        with pytest.raises(ValueError, match="grid must be at least 1, got 0"):
            grid_queries(0, (640, 320))

    @pytest.mark.parametrize("size", [(1, 1), (2, 500), (500, 2)])
    def test_grid_lies_inside_any_frame(self, size):
        check_queries(grid_queries(5, size), size, 1)

    @pytest.mark.parametrize("header", ["", "t,x,y\n", "\ufeffT, X, Y\r\n", "\n"])
    def test_csv(self, tmp_path, header):
        (tmp_path / "q.csv").write_text(header + "0,1.5,2\n\n3, 4e1 ,5.25\n", encoding="utf-8")
        np.testing.assert_array_equal(read_queries(tmp_path / "q.csv"), [[0, 1.5, 2], [3, 40, 5.25]])

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("t,x,y\n0,1,2\n0,1\n", "line 3: needs three numbers t,x,y, got '0,1'"),
            ("0,1,2\n0,one,2\n", "line 2: .* got '0,one,2'"),
            ("x,y,t\n0,1,2\n", "line 1: .* got 'x,y,t'"),
            ("0;1;2\n", "line 1: .* got '0;1;2'"),
            ("0,1,2,3\n", "line 1"),
        ],
    )
    def test_bad_csv(self, tmp_path, content, message):
        (tmp_path / "q.csv").write_text(content)
        with pytest.raises(ValueError, match=message):
            read_queries(tmp_path / "q.csv")

    def test_npz(self, tmp_path):
        np.savez(tmp_path / "q.npz", queries=[[0, 1.5, 2]], other=3)
        np.testing.assert_array_equal(read_queries(tmp_path / "q.npz"), [[0, 1.5, 2]])
        np.savez(tmp_path / "bad.npz", points=[[0, 1.5, 2]])
        with pytest.raises(ValueError, match="bad.npz does not hold an array named queries"):
            read_queries(tmp_path / "bad.npz")
        (tmp_path / "text.npz").write_text("0,1,2")
        with pytest.raises(ValueError, match="text.npz does not hold"):
            read_queries(tmp_path / "text.npz")

    def test_damaged_npz(self, tmp_path):
        for path in damaged_archives(tmp_path, queries=[[0, 1.5, 2]]):
            with pytest.raises(ValueError, match=f"{path.name} does not hold an array named queries"):
                read_queries(path)

    def test_other_files(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="q.csv does not exist"):
            read_queries(tmp_path / "q.csv")
        (tmp_path / "q.txt").touch()
        with pytest.raises(ValueError, match="q.txt is neither .csv nor .npz"):
            read_queries(tmp_path / "q.txt")
        (tmp_path / "q.csv").write_bytes(bytes(range(256)))
        with pytest.raises(ValueError, match="q.csv is not a text file"):
            read_queries(tmp_path / "q.csv")

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ([8, 1, 1], r"query 2 of 2 \(t=8, x=1, y=1\) is outside the clip: t must be 0 to 7"),
            ([-1, 1, 1], "outside the clip"),
            ([float("nan"), 1, 1], "outside the clip"),
            ([0.5, 1, 1], "between frames"),
            ([0, 96.5, 1], r"query 2 of 2 .* is outside the frame: x must be 0 to 96 and y 0 to 64"),
            ([0, 1, -0.1], "outside the frame"),
            ([0, float("nan"), 1], "outside the frame"),
        ],
    )
    def test_outside(self, row, message):
        with pytest.raises(ValueError, match=message):
            check_queries(np.array([[0, 96, 64], row]), (96, 64), 8)

    @pytest.mark.parametrize("queries", [[[0, 1]], [0, 1, 2], [["a", "b", "c"]]])
    def test_wrong_shape(self, queries):
        with pytest.raises(ValueError, match=r"queries must be real numbers \[N, 3\]"):
            check_queries(np.array(queries), (96, 64), 8)

    def test_none(self):
        with pytest.raises(ValueError, match="there is no query"):
            check_queries(np.empty((0, 3)), (96, 64), 8)


@pytest.fixture
def tracks():
    generator = np.random.default_rng(0)
    return PointTracks(
        tracks=generator.uniform(0, 64, (3, 5, 2)).astype(np.float32),
        visibility=generator.random((3, 5)) < 0.5,
        confidence=generator.random((3, 5)).astype(np.float32),
        queries=np.array([[0, 1, 2], [1, 3, 4], [2, 5.5, 6]], dtype=np.float32),
        fps=29.97,
        size=(96, 64),
    )


class TestResults:
    def test_npz(self, tmp_path, tracks):
        tracks.save_npz(tmp_path / "tracks.npz")
        with np.load(tmp_path / "tracks.npz") as archive:
            assert {name: (archive[name].dtype.name, archive[name].shape) for name in archive} == {
                "tracks": ("float32", (3, 5, 2)),
                "visibility": ("bool", (3, 5)),
                "confidence": ("float32", (3, 5)),
                "queries": ("float32", (3, 3)),
                "fps": ("float64", ()),
                "size": ("int64", (2,)),
            }
        again = PointTracks.load(tmp_path / "tracks.npz")
        for name in ("tracks", "visibility", "confidence", "queries"):
            np.testing.assert_array_equal(getattr(again, name), getattr(tracks, name))
        assert (again.fps, again.size) == (tracks.fps, tracks.size)

    def test_csv(self, tmp_path, tracks):
        tracks.save_csv(tmp_path / "tracks.csv")
        lines = (tmp_path / "tracks.csv").read_text().splitlines()
        assert lines[0] == "point,t,x,y,visible,confidence"
        # Frame by frame, as a stream writes it
        table = np.loadtxt(lines[1:], delimiter=",").reshape(5, 3, 6).swapaxes(0, 1)
        np.testing.assert_array_equal(table[..., 0], np.arange(3)[:, None].repeat(5, 1))
        np.testing.assert_array_equal(table[..., 1], np.arange(5)[None].repeat(3, 0))
        np.testing.assert_allclose(table[..., 2:4], tracks.tracks, atol=5.1e-4)
        np.testing.assert_array_equal(table[..., 4], tracks.visibility)
        np.testing.assert_allclose(table[..., 5], tracks.confidence, atol=5.1e-4)

    def test_damaged(self, tmp_path, tracks):
        fields = {
            name: getattr(tracks, name) for name in ("tracks", "visibility", "confidence", "queries", "fps", "size")
        }
        for path in damaged_archives(tmp_path, **fields):
            with pytest.raises(ValueError, match="damaged.npz is not a tracks file"):
                PointTracks.load(path)

    def test_not_tracks(self, tmp_path):
        np.savez(tmp_path / "a.npz", tracks=1)
        with pytest.raises(ValueError, match="a.npz is not a tracks file"):
            PointTracks.load(tmp_path / "a.npz")

    @pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
    def test_an_unfinished_file_leaves_no_trace(self, tmp_path, error):
        (tmp_path / "tracks.npz").write_bytes(b"before")
        with pytest.raises(type(error)), atomic_path(tmp_path / "tracks.npz") as part:
            part.write_bytes(b"half")
            raise error
        assert os.listdir(tmp_path) == ["tracks.npz"]
        assert (tmp_path / "tracks.npz").read_bytes() == b"before"

    def test_permissions_follow_the_umask(self, tmp_path, tracks):
        tracks.save_npz(tmp_path / "tracks.npz")
        (tmp_path / "plain").touch()
        assert (tmp_path / "tracks.npz").stat().st_mode == (tmp_path / "plain").stat().st_mode
