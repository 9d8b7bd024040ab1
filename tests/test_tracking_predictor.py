"""Tracks in pixels of the original video, whatever the model's raster, and what the overlay shows of them."""

import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from clips import ColourTracker, square_clip, write_clip
from oracle import growth

from tritonkern.tracking import (
    PointTracker,
    PointTracks,
    TapVidClip,
    VideoReader,
    draw_points,
    evaluate,
    grid_queries,
    write_overlay,
)
from tritonkern.tracking import predictor as predictor_module
from tritonkern.tracking import spans as spans_module
from tritonkern.tracking import stored_tracks as stored_module
from tritonkern.tracking.overlay import point_colours


@pytest.fixture
def tracker():
    return PointTracker(ColourTracker(), device="cpu")


class ShowFrames(ColourTracker):
    """Remembers the video that it gets."""

    def features(self, video):
        self.seen = video
        return super().features(video)


class ShiftTracker(ColourTracker):
    """Looks two frames to either side, as a temporal adapter does, and notes the length of each clip."""

    def __init__(self):
        super().__init__()
        self.lengths = []

    def features(self, video):
        self.lengths.append(video.shape[1])
        padded = torch.cat([video[:, :1]] * 2 + [video] + [video[:, -1:]] * 2, dim=1)
        return super().features(sum(padded[:, i : i + video.shape[1]] for i in range(5)) / 5)


class OwnTrack(ColourTracker):
    """A model that decides about visibility itself: its `track` is not the plain match."""

    def track(self, features, queries):
        return super().track(features, queries)


def look_alike_clip():
    """A red square and an orange one; in frames 4 and later only the orange one is there, as similar as 0.98."""
    clip = np.zeros((8, 64, 64, 3), dtype=np.uint8)
    clip[..., 2] = 255
    clip[:4, 8:24, 8:24] = (255, 0, 0)
    clip[:, 40:56, 40:56] = (250, 50, 0)
    return clip


class TestPointTracker:
    def test_queries_are_txy_here_and_tyx_in_models(self):
        asked = []

        class Noting(OwnTrack):
            def track(self, features, queries):
                asked.append(queries.clone())
                return super().track(features, queries)

        # 192x64 pixels on a raster of 64x64.
        PointTracker(Noting(), device="cpu")(square_clip(size=(192, 64)), queries=np.array([[3, 30, 20]]))
        np.testing.assert_array_equal(asked[0], [[[3, 20, 10]]])

    def test_confidence_is_the_models_where_the_match_leads_back(self, tracker):
        clip = square_clip(size=(64, 64))
        queries = np.array([[0, 16.0, 32.0], [5, 36.0, 32.0]])
        video = torch.from_numpy(clip).float()[None] / 127.5 - 1
        output = tracker.model(video, torch.from_numpy(queries[:, [0, 2, 1]]).float()[None])
        expected = ((1 - output.occlusion.sigmoid()) * (1 - output.expected_distance.sigmoid()))[0].detach().numpy()
        expected[[0, 1], [0, 5]] = 1
        tracks = tracker(clip, queries=queries)
        assert tracks.confidence.dtype == np.float32 and tracks.confidence.shape == (2, 8)
        np.testing.assert_allclose(tracks.confidence, expected, atol=1e-5)
        np.testing.assert_array_equal(tracks.visibility, tracks.confidence >= 0.5)

    def test_a_match_that_does_not_lead_back_is_hidden(self):
        queries = np.array([[0, 16, 16], [0, 48, 48], [6, 48, 48]])
        tracks = PointTracker(ColourTracker(), device="cpu")(look_alike_clip(), queries=queries)
        # The red point is matched with the orange square, whose own match in frame 0 is itself.
        assert np.abs(tracks.tracks[0, 4:] - 48).max() < 9
        np.testing.assert_array_equal(tracks.confidence[0, 4:], 0)
        np.testing.assert_array_equal(tracks.visibility[0], [True] * 4 + [False] * 4)
        assert tracks.visibility[1:].all()

    def test_a_model_with_a_track_of_its_own_is_not_followed_back(self):
        tracks = PointTracker(OwnTrack(), device="cpu")(look_alike_clip(), queries=np.array([[0, 16, 16]]))
        assert (tracks.confidence[0] > 0.5).all() and tracks.visibility.all()

    @pytest.mark.parametrize("model", [ColourTracker, OwnTrack])
    def test_min_confidence(self, model):
        clip = look_alike_clip()
        options = {"queries": np.array([[0, 16, 16], [5, 48, 48]])}
        tracks = PointTracker(model(), device="cpu")(clip, **options)
        level = float(np.median(tracks.confidence))
        strict = PointTracker(model(), device="cpu")(clip, min_confidence=level, **options)
        np.testing.assert_array_equal(strict.confidence, tracks.confidence)
        np.testing.assert_array_equal(strict.visibility, tracks.confidence >= level)
        assert PointTracker(model(), device="cpu")(clip, min_confidence=0, **options).visibility.all()
        with pytest.raises(ValueError, match="min_confidence must be 0 to 1, got 1.5"):
            PointTracker(model())(clip, min_confidence=1.5)

    def test_many_queries_are_tracked_in_chunks(self, monkeypatch):
        clip = square_clip()
        queries = np.concatenate([grid_queries(4, (96, 64), 2), grid_queries(3, (96, 64), 0)])
        whole = {
            model: PointTracker(model(), device="cpu")(clip, queries=queries) for model in (ColourTracker, OwnTrack)
        }
        monkeypatch.setattr(spans_module, "_CHUNK", 3)
        monkeypatch.setattr(spans_module, "_CHUNK_OWN_TRACK", 3)
        monkeypatch.setattr(spans_module, "_CYCLE_BYTES", 1)
        sizes = []
        match = ColourTracker.match
        monkeypatch.setattr(
            ColourTracker,
            "match",
            lambda self, query, features: (sizes.append(query.shape), match(self, query, features))[1],
        )
        for model, expected in whole.items():
            tracks = PointTracker(model(), device="cpu")(clip, queries=queries)
            np.testing.assert_allclose(tracks.tracks, expected.tracks, atol=1e-4)
            np.testing.assert_allclose(tracks.confidence, expected.confidence, atol=1e-5)
        assert max(shape[1] for shape in sizes) == 8  # the way back of one point in eight frames

    def test_too_many_points_for_the_memory(self, tracker, monkeypatch):
        clip = np.broadcast_to(np.uint8(0), (40, 200, 200, 3))
        monkeypatch.setattr(predictor_module.os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 4096}.get)
        read = []
        with pytest.raises(ValueError, match=r"40000 points in 40 frames .* at most 5242 points \(a grid of 72\)"):
            tracker(clip, grid=200, progress=lambda *call: read.append(call))
        assert not read
        with pytest.raises(ValueError, match="grid must be at most 200 for a frame of 200x200"):
            tracker(clip, grid=1_000_000_000)

    def test_queries_of_a_file(self, tracker, tmp_path):
        (tmp_path / "q.csv").write_text("t,x,y\n2,24,32\n\n0,97,5\n")
        with pytest.raises(ValueError, match=r"q.csv, line 4 \(t=0, x=97, y=5\) is outside the frame"):
            tracker(square_clip(), queries=tmp_path / "q.csv")
        (tmp_path / "q.csv").write_text("2,24,32\n")
        np.testing.assert_array_equal(tracker(square_clip(), queries=str(tmp_path / "q.csv")).queries, [[2, 24, 32]])

    @pytest.mark.slow
    def test_reading_needs_little_more_than_the_clip(self):
        prepare = """
import numpy as np
from tritonkern.tracking import VideoReader
from tritonkern.tracking.predictor import _whole_clip
reader = VideoReader(np.broadcast_to(np.uint8(7), (400, 256, 256, 3)))
_whole_clip(reader.frames(8), reader.size)
"""
        size = 400 * 256 * 256 * 3 / 2**20
        assert 0.8 * size < growth(prepare, "_whole_clip(reader.frames(), reader.size)") < 1.1 * size

    @pytest.mark.parametrize("kind", ["read-only", "memory-mapped", "mirrored"])
    def test_arrays_of_every_kind_without_a_warning(self, tracker, tmp_path, kind):
        clip = square_clip()
        expected = tracker(clip, grid=2).tracks
        if kind == "memory-mapped":
            np.save(tmp_path / "clip.npy", clip)
            given = np.load(tmp_path / "clip.npy", mmap_mode="r")
        elif kind == "mirrored":
            given = np.ascontiguousarray(clip[:, :, ::-1])[:, :, ::-1]
        else:
            given = clip.copy()
            given.flags.writeable = False
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            np.testing.assert_array_equal(tracker(given, grid=2).tracks, expected)

    def test_follows_the_square_in_original_pixels(self, tracker):
        # 96x64 pixels on a raster of 64x64: x shrinks, y does not.
        tracks = tracker(square_clip(), queries=np.array([[2, 24, 32], [0, 90, 5]]))
        assert tracks.tracks.dtype == np.float32 and tracks.tracks.shape == (2, 8, 2)
        assert tracks.visibility.dtype == bool and tracks.visibility.shape == (2, 8)
        assert tracks.queries.dtype == np.float32
        np.testing.assert_array_equal(tracks.queries, [[2, 24, 32], [0, 90, 5]])
        assert (tracks.fps, tracks.size) == (24.0, (96, 64))
        # The whole square looks alike: anywhere in it is right.
        centre = np.stack([16 + 4 * np.arange(8), np.full(8, 32)], axis=1)
        assert np.abs(tracks.tracks[0] - centre).max() <= 9
        assert tracks.visibility[0].all()

    def test_equals_the_model_and_pure_scaling(self, tracker):
        clip = square_clip(size=(64, 64))
        queries = np.array([[0, 16.0, 32.0], [5, 40.25, 30.5]])
        video = torch.from_numpy(clip).float()[None] / 127.5 - 1
        expected = tracker.model(video, torch.from_numpy(queries[:, [0, 2, 1]]).float()[None])
        tracks = tracker(clip, queries=queries)
        np.testing.assert_allclose(tracks.tracks, expected.tracks[0].detach(), atol=1e-4)
        # Each pixel four times as wide and twice as high: the same frames on the raster, scaled tracks.
        large = clip.repeat(2, axis=1).repeat(4, axis=2)
        scaled = tracker(large, queries=queries * [1, 4, 2])
        np.testing.assert_allclose(scaled.tracks / [4, 2], tracks.tracks, atol=1e-2)
        np.testing.assert_array_equal(scaled.visibility, tracks.visibility)

    def test_frames_reach_the_model_without_a_shift(self):
        # A ramp stays a ramp: its value at the centre of model pixel i is the position (i + 0.5) * W / W_model.
        ramp = np.broadcast_to(np.arange(192, dtype=np.uint8)[None, None, :, None], (1, 128, 192, 3)).copy()
        model = ShowFrames()
        PointTracker(model)(ramp, grid=1)
        row = (model.seen[0, 0, 32, :, 0] + 1) * 127.5
        expected = (np.arange(64) + 0.5) * 3 - 0.5
        np.testing.assert_allclose(row[2:-2], expected[2:-2], atol=0.51)

    def test_own_frame_is_the_query_and_visible(self, tracker):
        queries = np.array([[3, 1.25, 2.5], [7, 95.9, 63.9]])
        tracks = tracker(square_clip(), queries=queries)
        np.testing.assert_array_equal(tracks.tracks[[0, 1], [3, 7]], queries[:, 1:].astype(np.float32))
        assert tracks.visibility[[0, 1], [3, 7]].all()

    def test_visibility(self, tracker):
        clip = square_clip()
        clip[4:] = (0, 0, 255)
        tracks = tracker(clip, queries=np.array([[0, 16, 32]]))
        np.testing.assert_array_equal(tracks.visibility[0], [True] * 4 + [False] * 4)

    def test_grid_and_max_frames(self, tracker, tmp_path):
        path = write_clip(tmp_path / "a.mp4", square_clip())
        tracks = tracker(path, grid=3, query_frame=2, max_frames=5)
        assert tracks.tracks.shape == (9, 5, 2)
        np.testing.assert_allclose(tracks.queries, grid_queries(3, (96, 64), 2))
        assert tracks.fps == 10
        assert len(tracker(path).queries) == 100

    def test_long_clips_are_tracked_in_spans(self, monkeypatch):
        clip = square_clip(21, size=(128, 64))
        queries = np.array([[0, 16, 32], [11, 60, 32], [20, 96, 32], [11, 5, 5]])
        whole = PointTracker(ShiftTracker())(clip, queries=queries)
        monkeypatch.setattr(ShiftTracker, "span", 9)
        monkeypatch.setattr(ShiftTracker, "context", 2)
        monkeypatch.setattr(spans_module, "_QUERY_FRAMES", 2)
        model = ShiftTracker()
        spans = PointTracker(model)(clip, queries=queries)
        assert max(model.lengths) == 9
        # Two frames of context are all that this model needs, so the result is the same.
        np.testing.assert_allclose(spans.tracks, whole.tracks, atol=1e-3)
        np.testing.assert_array_equal(spans.visibility, whole.visibility)

    @pytest.mark.parametrize(("model", "span", "context"), [(OwnTrack, 8, 2), (ColourTracker, 6, 0), (OwnTrack, 7, 3)])
    def test_spans_are_tracked_while_the_video_is_read(self, monkeypatch, model, span, context):
        """The first ones are there long before its end; its frames are neither kept nor read twice without need."""
        monkeypatch.setattr(model, "span", span)
        monkeypatch.setattr(model, "context", context)
        tracker, clip = PointTracker(model(), device="cpu"), square_clip(20, size=(128, 64))
        for query_frame, passes in ((0, 1), (11, 2)):
            read, options = [], {"grid": 3, "query_frame": query_frame}
            spans = tracker.spans(clip, **options, progress=lambda *call, read=read: read.append(call))
            assert read == []
            first, tracks = next(spans)
            inner = span - 2 * context
            assert (first, tracks.tracks.shape) == (0, (9, inner, 2))
            done = [frames for stage, frames, _ in read if stage == "reading"]
            assert done[-1] <= span + 1 and done.count(1) == passes
            parts = [(first, tracks), *spans]
            assert [first for first, _ in parts] == list(range(0, 20, inner))
            assert [call[1] for call in read if call[0] == "tracking"][-1] == 20
            whole = tracker(clip, **options)
            for name in ("tracks", "visibility", "confidence"):
                joined = np.concatenate([getattr(part, name) for _, part in parts], axis=1)
                np.testing.assert_array_equal(getattr(whole, name), joined)

    def test_a_span_without_room(self, monkeypatch):
        monkeypatch.setattr(ShiftTracker, "span", 9)
        monkeypatch.setattr(ShiftTracker, "context", 5)
        assert PointTracker(ShiftTracker())(square_clip(9), grid=1).tracks.shape[1] == 9
        with pytest.raises(ValueError, match="more than twice its context, got 9 and 5"):
            PointTracker(ShiftTracker())(square_clip(10), grid=1)

    def test_long_tracks_are_stored_in_files(self, monkeypatch, tmp_path):
        """Their arrays are as those in memory, may be changed, and survive a way through files."""
        random = np.random.default_rng(0)
        parts = [
            PointTracks(
                random.random((3, frames, 2), dtype=np.float32),
                random.random((3, frames)) < 0.5,
                random.random((3, frames), dtype=np.float32),
                np.zeros((3, 3), np.float32),
                fps,
                (9, 7),
            )
            for frames, fps in ((4, 1.0), (1, 2.0), (6, 3.0))
        ]
        found = []
        for limit in (1 << 20, 100):
            monkeypatch.setattr(stored_module, "_IN_MEMORY", limit)
            stored = stored_module.StoredTracks()
            for part in parts:
                stored.append(part)
            found.append(stored.tracks())
        assert [x.fps for x in found] == [3.0, 3.0]
        found[1].save_npz(tmp_path / "a.npz")
        for tracks in (*found, PointTracks.load(tmp_path / "a.npz")):
            for name in ("tracks", "visibility", "confidence"):
                expected = np.concatenate([getattr(part, name) for part in parts], 1)
                actual = getattr(tracks, name)
                assert type(actual) is np.ndarray and actual.dtype == expected.dtype
                np.testing.assert_array_equal(actual, expected)
        found[1].tracks[0, 0] = 5
        assert found[1].frames(0, 2).tracks[0, 0].tolist() == [5, 5] and found[1].frames(2, 4).tracks.shape == (3, 2, 2)

    def test_what_leaves_the_frame_is_not_visible(self):
        class Leaving(OwnTrack):
            """16 pixels to the right in each frame, certain of everything."""

            def track(self, features, queries):
                output = super().track(features, queries)
                ahead = torch.arange(output.tracks.shape[2])[None, None] - queries[..., :1]
                tracks = queries[:, :, None, [2, 1]] + ahead[..., None] * torch.tensor([16.0, 0.0])
                certain = torch.full_like(output.occlusion, -9.0)
                return output._replace(tracks=tracks, occlusion=certain, expected_distance=certain)

        model = Leaving()
        model.context = 0
        clip, queries = square_clip(6, size=(64, 64)), np.array([[0, 32.0, 8.0]])
        tracks = PointTracker(model, device="cpu")(clip, queries=queries, min_confidence=0)
        np.testing.assert_array_equal(tracks.tracks[0, :, 0], 32 + 16 * np.arange(6))
        np.testing.assert_array_equal(tracks.visibility[0], [True, True, True, False, False, False])
        stream = PointTracker(model, device="cpu").stream(lookahead=0, min_confidence=0)
        stream.add(queries[:, 1:])
        assert [bool(stream.step(frame).visible[0]) for frame in clip[:1]] == [True]
        # In the evaluation, too, whose truth hides points outside the frame.
        truth = TapVidClip("clip", clip, tracks.tracks.astype(np.float64), ~tracks.visibility)
        assert evaluate(model, [truth], "first")["first"].mean["OA"] == 100

    @pytest.mark.slow
    @pytest.mark.parametrize(("frames", "gigabytes"), [(60, 0.8), (200, 1.0)])
    def test_memory(self, frames, gigabytes):
        """nano on a clip of 480p, measured in a process of its own."""
        program = f"""
import numpy as np
from tritonkern.tracking import PointTracker
picture = np.random.default_rng(0).integers(0, 256, (480, 854, 3), dtype=np.uint8)
tracks = PointTracker("nano", device="cpu")(np.broadcast_to(picture, ({frames}, 480, 854, 3)), grid=10)
assert tracks.tracks.shape == (100, {frames}, 2)
print(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])  # since `exec`, in KiB
"""
        result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        # 241 MiB of it are the imported packages.
        assert int(result.stdout) * 1024 < gigabytes * 1e9

    def test_a_short_clip_is_encoded_once(self):
        model = ShiftTracker()
        PointTracker(model)(square_clip(), queries=np.array([[0, 16, 32], [5, 60, 32]]))
        assert model.lengths == [8]

    def test_progress(self, tracker, tmp_path):
        calls = []
        path = write_clip(tmp_path / "a.mp4", square_clip())
        tracker(path, max_frames=3, progress=lambda *call: calls.append(call))
        assert calls == [("reading", n, 3) for n in (1, 2, 3)] + [("tracking", n, 3) for n in (0, 3)]

    def test_outside(self, tracker):
        with pytest.raises(ValueError, match=r"query 1 of 1 \(t=5, .* t must be 0 to 4"):
            tracker(square_clip(), queries=np.array([[5, 1, 1]]), max_frames=5)
        with pytest.raises(ValueError, match="query 1 of 4 .* outside the clip"):
            tracker(square_clip(), grid=2, query_frame=8)

    @pytest.mark.parametrize("kind", ["a.mp4", "a.mkv", "array"])
    @pytest.mark.parametrize(
        ("query", "options", "message"),
        [
            ([8, 1, 1], {}, "t must be 0 to 7"),
            ([1e300, 1, 1], {}, "t must be 0 to 7"),
            ([9, 1, 1], {"max_frames": 9}, "t must be 0 to 7"),
            ([5, 1, 1], {"max_frames": 5}, "t must be 0 to 4"),
            ([float("inf"), 1, 1], {}, "outside the clip"),
            ([0, 97, 1], {}, "outside the frame"),
            ([0, 1, 1], {"max_frames": 0}, "max_frames must be at least 1, got 0"),
        ],
    )
    def test_outside_is_found_before_a_frame_is_read(self, tracker, tmp_path, kind, query, options, message):
        reader = VideoReader(square_clip() if kind == "array" else write_clip(tmp_path / kind, square_clip()))
        read = []
        with pytest.raises(ValueError, match=message):
            tracker(reader, queries=np.array([query]), progress=lambda *call: read.append(call), **options)
        assert not read

    def test_bad_arguments(self, tracker):
        with pytest.raises(ValueError, match="either grid or queries"):
            tracker(square_clip(), grid=2, queries=np.array([[0, 1, 1]]))
        with pytest.raises(ValueError, match="device must be cpu or cuda, got 'tpu9'"):
            PointTracker(ColourTracker(), device="tpu9")
        for device in ("meta", "mps", torch.device("xpu")):
            with pytest.raises(ValueError, match=f"device must be cpu or cuda, got '{device}'"):
                PointTracker(ColourTracker(), device=device)
        with pytest.raises(ValueError, match="weights goes with the name"):
            PointTracker(ColourTracker(), weights="a.safetensors")
        with pytest.raises(ValueError, match="nonsense"):
            PointTracker("nonsense")

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_no_gpu(self):
        with pytest.raises(ValueError, match="device cuda: this PyTorch finds no GPU; use cpu"):
            PointTracker(ColourTracker(), device="cuda")

    def test_damaged_weights(self):
        model = ColourTracker()
        model.features = lambda video: torch.full((1, video.shape[1], 16, 16, 3), torch.nan)
        with pytest.raises(ValueError, match="not finite"):
            PointTracker(model)(square_clip())

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
    def test_gpu(self):
        queries = np.array([[2, 24, 32], [0, 90, 5]])
        cpu = PointTracker(ColourTracker(), device="cpu")(square_clip(), queries=queries)
        gpu = PointTracker(ColourTracker(), device="cuda")(square_clip(), queries=queries)
        np.testing.assert_allclose(gpu.tracks, cpu.tracks, atol=1e-2)


def moving_points(visibility, size=(160, 120)):
    """A point moving 5 pixels a frame at y = 60, and one that stands at (30, 20)."""
    frames = len(visibility)
    moving = np.stack([40.5 + 5 * np.arange(frames), np.full(frames, 60.5)], axis=1)
    tracks = np.stack([moving, np.tile([30.5, 20.5], (frames, 1))]).astype(np.float32)
    queries = np.concatenate([np.zeros((2, 1)), tracks[:, 0]], axis=1).astype(np.float32)
    visible = np.stack([visibility, [True] * frames])
    return PointTracks(tracks, visible, visible.astype(np.float32), queries, 10.0, size)


class TestOverlay:
    grey = np.full((120, 160, 3), 128, dtype=np.uint8)

    def test_visible_points_are_filled_with_their_colour(self):
        tracks = moving_points([True] * 6)
        colours = point_colours(tracks.queries)
        frame = draw_points(self.grey, tracks, 5)
        np.testing.assert_array_equal(frame[60, 65], colours[0])
        np.testing.assert_array_equal(frame[20, 30], colours[1])
        assert (self.grey == 128).all()

    def test_points_are_centred(self):
        frame = draw_points(self.grey, moving_points([True]), 0)
        marked = np.argwhere((frame != 128).any(axis=-1) & (np.arange(120) < 40)[:, None])
        np.testing.assert_allclose(marked.mean(axis=0), [20, 30], atol=0.26)

    def test_hidden_points_are_hollow(self):
        frame = draw_points(self.grey, moving_points([True] * 5 + [False]), 5)
        np.testing.assert_array_equal(frame[60, 65], [128, 128, 128])
        ring = frame[56:65, 61:70].reshape(-1, 3).astype(int)
        colour = point_colours(moving_points([True]).queries)[0].astype(int)
        assert np.abs(ring - colour).max(axis=1).min() < 100
        assert (ring != 128).any()

    def test_tails_fade(self):
        tracks = moving_points([True] * 16)
        frame = draw_points(self.grey, tracks, 15).astype(int)
        row = np.abs(frame[60] - 128).sum(axis=-1)
        # The tail has twelve frames: nothing at x = 40, then brighter towards the point at x = 115.
        assert row[42] == 0
        samples = row[60:108:8]
        assert (np.diff(samples) > 0).all() and samples[0] > 0

    def test_no_tail_through_hidden_frames(self):
        frame = draw_points(self.grey, moving_points([True, True, False, False, False, True]), 5)
        np.testing.assert_array_equal(frame[60, 48:60], 128)
        assert (frame[60, 42] != 128).any()

    def test_no_tail_across_a_jump_of_which_the_tracker_is_unsure(self):
        tracks = moving_points([True] * 6)
        tracks.tracks[0, 3:, 0] += 40
        sure = draw_points(self.grey, tracks, 5)
        assert (sure[60, 60:85] != 128).any(axis=-1).all()
        tracks.confidence[0, 3] = 0.7
        unsure = draw_points(self.grey, tracks, 5)
        np.testing.assert_array_equal(unsure[60, 60:85], 128)
        # The smooth steps of the same tail stay.
        assert (unsure[60, 42:49] != 128).any() and (unsure[60, 97:103] != 128).any()

    def test_dots_have_no_tail(self):
        frame = draw_points(self.grey, moving_points([True] * 6), 5, tails=False)
        np.testing.assert_array_equal(frame[60, 36:58], 128)
        assert (frame[60, 65] != 128).any()

    def test_points_at_and_beyond_the_border(self):
        tracks = moving_points([True])
        for position in ([0, 0], [160, 120], [-50, 60], [1e6, -1e6]):
            tracks.tracks[0, 0] = position
            assert draw_points(self.grey, tracks, 0).shape == self.grey.shape

    @pytest.mark.parametrize("size", [(32, 24), (320, 240), (1920, 1080)])
    def test_readable_at_every_size(self, size):
        tracks = PointTracks(
            np.array([[[size[0] / 2, size[1] / 2]]], dtype=np.float32),
            np.array([[True]]),
            np.array([[1.0]], dtype=np.float32),
            np.array([[0, size[0] / 2, size[1] / 2]], dtype=np.float32),
            10.0,
            size,
        )
        frame = draw_points(np.zeros((size[1], size[0], 3), dtype=np.uint8), tracks, 0)
        diameter = np.count_nonzero(frame[size[1] // 2].any(axis=-1))
        assert max(3, size[1] / 100) <= diameter <= max(6, size[1] / 20)

    def test_colours_tell_positions_apart(self):
        colours = point_colours(grid_queries(8, (640, 480))).astype(int).reshape(8, 8, 3)
        assert len(np.unique(colours.reshape(-1, 3), axis=0)) == 64
        across = np.abs(colours[:, -1] - colours[:, 0]).sum(axis=-1)
        neighbours = np.abs(np.diff(colours, axis=1)).sum(axis=-1)
        assert across.min() > 200 and neighbours.max() < 250
        assert point_colours(np.array([[0, 5, 5]], dtype=np.float32)).shape == (1, 3)

    @pytest.mark.parametrize("size", [(160, 120), (161, 121)])
    def test_overlay(self, tmp_path, size):
        clip = np.full((8, size[1], size[0], 3), 128, dtype=np.uint8)
        tracks = moving_points([True] * 8, size)
        calls = []
        write_overlay(tmp_path / "overlay.mp4", clip, tracks, lambda *call: calls.append(call))
        assert calls == [("writing", n, 8) for n in range(1, 9)]
        reader = VideoReader(tmp_path / "overlay.mp4")
        frames = list(reader.frames())
        assert len(frames) == 8 and reader.fps == 10
        # yuv420p halves the resolution of colour, so a small point is a little pale.
        first, colour = point_colours(tracks.queries).astype(int)
        for index, frame in enumerate(frames):
            place = frame[60, 40 + 5 * index].astype(int)
            assert np.abs(place - first).sum() < np.abs(place - 128).sum()
            assert np.abs(frame[20, 30] - colour).max() < 110
            assert np.abs(frame[20, 30] - colour).sum() < np.abs(frame[20, 30].astype(int) - 128).sum()
            assert np.abs(frame[100, 140].astype(int) - 128).max() <= 3

    def test_smaller_overlay(self, tmp_path):
        clip = np.full((2, 120, 160, 3), 128, dtype=np.uint8)
        tracks = moving_points([True] * 2)
        write_overlay(tmp_path / "overlay.mp4", clip, tracks, longer_side=80)
        frame = next(VideoReader(tmp_path / "overlay.mp4").frames())
        assert frame.shape == (60, 80, 3)
        assert np.abs(frame[10, 15].astype(int) - 128).sum() > 60
        write_overlay(tmp_path / "overlay.mp4", clip, tracks, longer_side=1000)
        assert VideoReader(tmp_path / "overlay.mp4").size == (160, 120)
        with pytest.raises(ValueError, match="style must be one of tails, dots, got 'stars'"):
            write_overlay(tmp_path / "overlay.mp4", clip, tracks, style="stars")

    def test_overlay_of_another_video(self, tmp_path):
        tracks = moving_points([True] * 8)
        with pytest.raises(ValueError, match="the tracks come from a video of"):
            write_overlay(tmp_path / "overlay.mp4", square_clip(), tracks)
        with pytest.raises(ValueError, match="ends after 7 frames, the tracks have 8"):
            write_overlay(tmp_path / "overlay.mp4", np.repeat(self.grey[None], 7, axis=0), tracks)
        assert list(tmp_path.iterdir()) == []
