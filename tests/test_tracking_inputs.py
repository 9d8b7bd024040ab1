"""Input that is easily read wrongly: image sequences, deep samples, edit lists, pixel shapes, file objects."""

import io
import os
import struct
import warnings
import zlib
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from clips import ColourTracker, square_clip, write_clip
from PIL import ExifTags, Image, ImageOps

from tritonkern.tracking import PointTracker, VideoReader, write_overlay

COLOURS = [(250, 10, 10), (10, 250, 10), (10, 10, 250), (200, 200, 10)]


def pictures(size=(48, 32)):
    return [Image.new("RGB", size, colour) for colour in COLOURS]


def save_sequence(path, **options):
    first, *rest = pictures()
    first.save(path, save_all=True, append_images=rest, **options)
    return path


def middle(frames):
    return np.stack([frame[16, 24] for frame in frames])


def trimmed(path, clip, *, hidden):
    """An mp4 of all of `clip` whose edit list leaves out the first `hidden` frames, as a lossless cut makes it."""
    whole = write_clip(path.with_name("whole.mp4"), clip)
    with av.open(str(whole)) as source, av.open(str(path), "w") as target:
        stream = source.streams.video[0]
        copy = target.add_stream_from_template(stream)
        frame = int(1 / stream.time_base / stream.average_rate)
        for packet in source.demux(stream):
            if packet.size:
                # A negative time makes the muxer write an edit list.
                packet.pts -= hidden * frame
                packet.dts -= hidden * frame
                packet.stream = copy
                target.mux(packet)
    assert b"elst" in path.read_bytes()
    return path


class TestSequences:
    @pytest.mark.parametrize(
        ("name", "options"),
        [
            ("a.png", {"duration": 100}),
            ("a.apng", {"duration": 100}),
            ("a.webp", {"duration": 100, "lossless": True}),
            ("a.gif", {"duration": 100}),
            ("a.tiff", {}),
            ("a.avif", {"duration": 100, "quality": 100}),
        ],
    )
    @pytest.mark.parametrize("kind", ["path", "file object"])
    def test_all_frames_are_read(self, tmp_path, name, options, kind):
        path = save_sequence(tmp_path / name, **options)
        reader = VideoReader(path if kind == "path" else io.BytesIO(path.read_bytes()))
        assert reader.count_frames(99) == 4
        frames = list(reader.frames())
        assert len(frames) == 4 and frames[0].shape == (32, 48, 3)
        assert np.abs(middle(frames).astype(int) - COLOURS).max() <= 12
        assert reader.fps == pytest.approx(10 if options else 24)
        assert [len(list(reader.frames(n))) for n in (2, 9)] == [2, 4]

    def test_the_default_image_of_an_apng_is_no_frame(self, tmp_path):
        poster, *frames = pictures()
        poster.save(tmp_path / "a.png", save_all=True, append_images=frames, default_image=True)
        reader = VideoReader(tmp_path / "a.png")
        assert reader.frame_count == 3
        np.testing.assert_array_equal(middle(reader.frames()), COLOURS[1:])

    def test_the_previews_of_a_cameras_jpeg_are_no_frames(self, tmp_path):
        save_sequence(tmp_path / "a.mpo")
        (tmp_path / "a.mpo").rename(tmp_path / "a.jpg")
        assert len(list(VideoReader(tmp_path / "a.jpg").frames())) == 1

    def test_a_sequence_among_stills_is_refused(self, tmp_path):
        pictures()[0].save(tmp_path / "0.png")
        save_sequence(tmp_path / "1.webp")
        with pytest.raises(ValueError, match="1.webp holds 4 frames: every file of a folder must hold one"):
            list(VideoReader(tmp_path).frames())

    @pytest.mark.parametrize("name", ["stack", "stack.bin", "large.tif"])
    def test_the_contents_decide_not_the_name(self, tmp_path, name):
        first, *rest = pictures()
        first.save(tmp_path / name, format="TIFF", save_all=True, append_images=rest, big_tiff=name == "large.tif")
        for source in (tmp_path / name, io.BytesIO((tmp_path / name).read_bytes())):
            assert len(list(VideoReader(source).frames())) == 1 + len(rest)

    @pytest.mark.parametrize("orientation", range(1, 9))
    @pytest.mark.parametrize("name", ["a.tif", "a.png", "a.webp"])
    def test_every_orientation(self, tmp_path, name, orientation):
        samples = np.arange(24, dtype=np.uint8).reshape(4, 6) * 10
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        Image.fromarray(samples).save(tmp_path / name, exif=exif, **({"lossless": True} if "webp" in name else {}))
        turned = Image.fromarray(samples)
        turned.getexif()[ExifTags.Base.Orientation] = orientation
        expected = np.asarray(ImageOps.exif_transpose(turned))
        for source in (tmp_path / name, io.BytesIO((tmp_path / name).read_bytes())):
            (frame,) = VideoReader(source).frames()
            np.testing.assert_array_equal(frame[..., 1], expected)

    def test_pages_of_other_sizes(self, tmp_path):
        first = Image.new("RGB", (48, 32))
        first.save(tmp_path / "a.tif", save_all=True, append_images=[Image.new("RGB", (24, 16))])
        with pytest.raises(ValueError, match="frame 1 of .*a.tif is 24x16 where the first one is 48x32"):
            list(VideoReader(tmp_path / "a.tif").frames())


def stack(path, *arrays):
    first, *rest = [Image.fromarray(array) for array in arrays]
    first.save(path, save_all=True, append_images=rest)
    return path


def write_deep_png(path, colours):
    with av.open(str(path), "w", format="image2", options={"update": "1"}) as container:
        stream = container.add_stream("png")
        stream.height, stream.width, stream.pix_fmt = *colours.shape[:2], "rgb48be"
        frame = av.VideoFrame.from_ndarray(colours, format="rgb48le").reformat(format="rgb48be")
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


class TestDeepSamples:
    ramp = np.arange(4096, dtype=np.uint16).reshape(64, 64)

    def test_16_bits(self, tmp_path):
        deep = self.ramp * np.uint16(16) + np.uint16(15)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            (frame,) = VideoReader(stack(tmp_path / "a.tif", deep)).frames()
        np.testing.assert_array_equal(frame[..., 1], deep >> 8)

    def test_12_bits_in_16_have_one_scale_that_is_stated(self, tmp_path):
        dark = self.ramp // 8
        with pytest.warns(UserWarning, match="a.tif has samples .* largest is 4095: they are read as 12-bit samples"):
            frames = list(VideoReader(stack(tmp_path / "a.tif", dark, self.ramp)).frames())
        np.testing.assert_array_equal(frames[0][..., 0], dark >> 4)
        np.testing.assert_array_equal(frames[1][..., 2], self.ramp >> 4)
        assert len(np.unique(frames[1])) == 256

    def test_one_scale_for_a_folder(self, tmp_path):
        Image.fromarray(self.ramp // 8).save(tmp_path / "0.png")
        Image.fromarray(self.ramp).save(tmp_path / "1.png")
        with pytest.warns(UserWarning, match="12-bit"):
            frames = list(VideoReader(tmp_path).frames())
        np.testing.assert_array_equal(frames[0][..., 0], self.ramp // 8 >> 4)

    def test_float_in_0_to_1(self, tmp_path):
        values = np.linspace(0, 1, 4096, dtype=np.float32).reshape(64, 64)
        first, second = VideoReader(stack(tmp_path / "a.tif", values / 2, values)).frames()
        np.testing.assert_array_equal(first[..., 0], np.rint(values / 2 * 255))
        np.testing.assert_array_equal(second[..., 0], np.rint(values * 255))

    @pytest.mark.parametrize(
        ("array", "message"),
        [
            (np.float32([[0, 255]]), "float samples from 0 to 255, and only 0..1"),
            (np.float32([[0, np.nan]]), "float samples from nan"),
            (np.int32([[-1, 5]]), "integer samples from -1 to 5"),
            (np.int32([[0, 70000]]), "integer samples from 0 to 70000"),
        ],
    )
    def test_samples_without_a_brightness_are_refused(self, tmp_path, array, message):
        with pytest.raises(ValueError, match=f"a.tif has {message}"):
            VideoReader(stack(tmp_path / "a.tif", array))

    def test_int32_within_16_bits(self, tmp_path):
        (frame,) = VideoReader(stack(tmp_path / "a.tif", self.ramp.astype(np.int32) * 16 + 15)).frames()
        np.testing.assert_array_equal(frame[..., 0], self.ramp >> 4)

    @pytest.mark.parametrize("largest", [65535, 4095])
    def test_16_bit_colours(self, tmp_path, largest):
        colours = np.random.default_rng(0).integers(0, largest, (32, 48, 3), dtype=np.uint16, endpoint=True)
        colours[0, 0] = largest
        write_deep_png(tmp_path / "a.png", colours)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            (frame,) = VideoReader(tmp_path / "a.png").frames()
        np.testing.assert_array_equal(frame, colours >> (8 if largest == 65535 else 4))

    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_16_bit_colours_are_turned(self, tmp_path, orientation):
        colours = np.random.default_rng(0).integers(0, 65535, (4, 6, 3), dtype=np.uint16)
        write_deep_png(tmp_path / "a.png", colours)
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        body = b"eXIf" + exif.tobytes()[6:]
        chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
        data = (tmp_path / "a.png").read_bytes()
        place = data.index(b"IDAT") - 4
        (tmp_path / "a.png").write_bytes(data[:place] + chunk + data[place:])
        (frame,) = VideoReader(tmp_path / "a.png").frames()
        image = Image.fromarray((colours >> 8).astype(np.uint8))
        image.getexif()[ExifTags.Base.Orientation] = orientation
        np.testing.assert_array_equal(frame, np.asarray(ImageOps.exif_transpose(image)))

    @pytest.mark.parametrize(("pix_fmt", "codec"), [("gray16le", "ffv1"), ("rgb48le", "ffv1"), ("gray16le", "png")])
    def test_16_bit_videos(self, tmp_path, pix_fmt, codec):
        """Of which FFmpeg would drop eight bits, whatever they hold."""
        path = tmp_path / ("a.mov" if codec == "png" else "a.mkv")
        shape = (64, 64) if pix_fmt.startswith("gray") else (64, 64, 3)
        dark, full = (
            np.zeros(shape, np.uint16) + (x if len(shape) == 2 else x[..., None]) for x in (self.ramp // 8, self.ramp)
        )
        with av.open(str(path), "w") as container:
            stream = container.add_stream(codec, rate=10)
            stream.width, stream.height, stream.pix_fmt = 64, 64, "gray16be" if codec == "png" else pix_fmt
            for samples in (dark, full):
                frame = av.VideoFrame.from_ndarray(samples, format=pix_fmt).reformat(format=stream.pix_fmt)
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        with pytest.warns(UserWarning, match="a.m.. has samples .* largest is 4095: they are read as 12-bit samples"):
            frames = list(VideoReader(path).frames())
        for frame, samples in zip(frames, (self.ramp // 8, self.ramp), strict=True):
            np.testing.assert_array_equal(frame, np.repeat((samples >> 4)[..., None], 3, -1))

    def test_float_and_integer_pages(self, tmp_path):
        Image.fromarray(self.ramp).save(tmp_path / "0.tif")
        Image.fromarray(np.zeros((64, 64), dtype=np.float32)).save(tmp_path / "1.tif")
        with pytest.raises(ValueError, match="mixes float and integer samples"):
            VideoReader(tmp_path)


class TestEditLists:
    @pytest.mark.parametrize("name", ["a.mp4", "a.mov"])
    def test_a_lossless_cut(self, tmp_path, name):
        path = trimmed(tmp_path / name, square_clip(20, size=(128, 64)), hidden=6)
        reader = VideoReader(path)
        assert reader.frame_count == 14 and reader.count_frames(99) == 14
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            frames = list(reader.frames())
        assert len(frames) == 14
        # The square of frame 6, which comes first, has its left edge at 8 + 4 * 6.
        red = frames[0][32, :, 0] > 128
        assert np.flatnonzero(red)[0] == pytest.approx(32, abs=1)


class TestPixelShape:
    def test_the_overlay_has_the_shape_of_the_video(self, tmp_path):
        path = tmp_path / "wide.mp4"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=10)
            stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv444p"
            stream.codec_context.sample_aspect_ratio = Fraction(16, 11)
            for image in square_clip():
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(stream.encode(None))
        reader = VideoReader(path)
        assert reader.size == (96, 64) and reader.pixel_aspect == Fraction(16, 11)
        tracks = PointTracker(ColourTracker(), device="cpu")(reader, grid=2)
        write_overlay(tmp_path / "overlay.mp4", reader, tracks)
        overlay = VideoReader(tmp_path / "overlay.mp4")
        assert overlay.size == (96, 64) and overlay.pixel_aspect == Fraction(16, 11)

    def test_square_pixels(self, tmp_path):
        assert VideoReader(write_clip(tmp_path / "a.mp4", square_clip())).pixel_aspect == 1
        assert VideoReader(square_clip()).pixel_aspect == 1


class TestInMemory:
    clip = square_clip()

    @pytest.mark.parametrize(
        "convert",
        [
            torch.from_numpy,
            lambda clip: torch.from_numpy(clip).permute(0, 3, 1, 2),
            lambda clip: clip.transpose(0, 3, 1, 2),
            list,
            tuple,
            lambda clip: [torch.from_numpy(frame).permute(2, 0, 1) for frame in clip],
            lambda clip: [Image.fromarray(frame) for frame in clip],
        ],
        ids=["torch", "torch channels first", "channels first", "list", "tuple", "list of tensors", "list of images"],
    )
    def test_arrays_tensors_and_lists(self, convert):
        reader = VideoReader(convert(self.clip))
        np.testing.assert_array_equal(list(reader.frames()), self.clip)
        assert reader.frame_count == reader.count_frames(99) == 8

    @pytest.mark.parametrize(
        ("video", "message"),
        [
            (np.zeros((8, 64, 96, 3)), r"got float64 of shape \[8, 64, 96, 3\]; convert with \(video \* 255\)"),
            (torch.zeros(1, 8, 3, 64, 96, dtype=torch.uint8), r"one video, .* give video\[0\]"),
            (np.zeros((8, 64, 96), np.uint8), r"got uint8 of shape \[8, 64, 96\]"),
            (np.zeros((8, 0, 96, 3), np.uint8), r"got uint8 of shape \[8, 0, 96, 3\]"),
            ([np.zeros((64, 0, 3), np.uint8)], r"got uint8 of shape \[64, 0, 3\]"),
            (
                torch.zeros(8, 64, 96, 3, dtype=torch.uint8, device="meta"),
                "dense and with data, got torch.strided on meta",
            ),
            (
                torch.zeros(8, 64, 96, 3, dtype=torch.uint8).to_sparse(),
                "dense and with data, got torch.sparse_coo on cpu",
            ),
            ([torch.zeros(64, 96, 3, device="meta")], "frame 0 of the list `video` is a Tensor: give arrays"),
            ([np.zeros((64, 96), np.uint8)], r"frame 0 of the list `video` must be uint8 RGB .* got uint8 of shape"),
            (["0.png", "1.png"], r"^0.png cannot be read as an image \(.*No such file"),
            (["0.png", None], "frame 0 of the list `video` is a str: give arrays, .* or the path of a folder"),
            ([], "the list `video` holds no video frame"),
            ("https://example.org/a.mp4", "is a URL: download the video first, and give the path of the file"),
            (io.StringIO("text"), "open as text: open it in binary mode"),
        ],
    )
    def test_what_is_refused(self, video, message):
        with pytest.raises(ValueError, match=message):
            VideoReader(video)

    def test_images_in_memory_are_those_of_files(self):
        """Turned, and black where they are transparent; of more than 8 bits they are refused."""
        image = Image.fromarray(np.dstack([self.clip[0], np.zeros((64, 96), np.uint8)]))
        assert not next(VideoReader([image]).frames()).any()
        image = Image.fromarray(self.clip[0])
        image.getexif()[ExifTags.Base.Orientation] = 6
        np.testing.assert_array_equal(next(VideoReader([image]).frames()), np.rot90(self.clip[0], -1))
        for mode in ("I;16", "I", "F"):
            with pytest.raises(ValueError, match=f"frame 0 of the list `video` is an image of mode {mode}: convert it"):
                VideoReader([Image.new(mode, (4, 4))])

    @pytest.mark.parametrize("name", ["pipe.mp4", "/dev/zero"])
    def test_pipes_and_devices_are_refused(self, tmp_path, name):
        if name == "pipe.mp4":
            os.mkfifo(tmp_path / name)
        with pytest.raises(ValueError, match="is a pipe or a device, which cannot be read twice"):
            VideoReader(tmp_path / name)

    def test_other_objects(self):
        with pytest.raises(TypeError, match="video must be a path, .* got int"):
            VideoReader(7)

    def test_a_pipe_is_refused(self):
        class Pipe(io.BytesIO):
            def seekable(self):
                return False

        with pytest.raises(ValueError, match=r"cannot be read twice: give io.BytesIO\(file.read\(\)\)"):
            VideoReader(Pipe(b"video"))

    def test_file_objects(self, tmp_path):
        path = write_clip(tmp_path / "a.mp4", self.clip)
        expected = list(VideoReader(path).frames())
        with open(path, "rb") as file:
            for source in (file, io.BytesIO(path.read_bytes())):
                source.seek(100)
                reader = VideoReader(source)
                assert reader.count_frames(99) == 8 and reader.fps == 10
                for _ in range(2):
                    np.testing.assert_array_equal(list(reader.frames()), expected)

    @pytest.mark.parametrize("number", [2.5, True, "3", np.float32(2)])
    def test_numbers_of_frames_are_whole(self, number):
        reader = VideoReader(self.clip)
        with pytest.raises(TypeError, match="max_frames must be a whole number"):
            list(reader.frames(number))
        with pytest.raises(TypeError, match="max_frames must be a whole number"):
            PointTracker(ColourTracker(), device="cpu")(self.clip, max_frames=number)
        with pytest.raises(TypeError, match="stride must be a whole number"):
            VideoReader(self.clip, number)
        assert len(list(reader.frames(np.int64(2)))) == 2

    def test_stride(self, tmp_path):
        for source in (self.clip, write_clip(tmp_path / "a.mp4", self.clip)):
            whole = list(VideoReader(source).frames())
            reader = VideoReader(source, stride=3)
            np.testing.assert_array_equal(list(reader.frames()), whole[::3])
            np.testing.assert_array_equal(list(reader.frames(2)), whole[:6:3])
            assert reader.frame_count == reader.count_frames(99) == 3 and reader.count_frames(2) == 2
            assert reader.fps == pytest.approx(VideoReader(source).fps / 3)
