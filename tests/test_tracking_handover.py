"""Hand-over to and from other programs: CoTracker's signature, napari, pandas, rerun, supervision."""

import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from clips import ColourTracker, square_clip

from tritonkern.tracking import PointTracker, PointTracks
from tritonkern.tracking.overlay import point_colours


class OtherTracker(torch.nn.Module):
    """A predictor with CoTracker's signature: follows the red square by its centre; pixel centres at whole numbers."""

    def __init__(self, backward=True):
        super().__init__()
        self.calls = []
        if not backward:
            self.forward = lambda video, queries=None, grid_size=0: self._follow(video, queries)

    def forward(self, video, queries=None, segm_mask=None, grid_size=0, grid_query_frame=0, backward_tracking=False):
        self.calls.append(backward_tracking)
        return self._follow(video, queries)

    def _follow(self, video, queries):
        assert video.dtype == torch.float32 and video.shape[2] == 3 and video.max() == 255
        red = video[0, :, 0] > 128
        columns = torch.arange(red.shape[2]).float()
        centre = torch.stack([columns[frame.any(0)].mean() for frame in red])  # [T]
        t, x, y = queries[0].T
        moved = x[None] + centre[:, None] - centre[t.long()]
        tracks = torch.stack([moved, y.expand_as(moved)], -1)
        return tracks[None], (moved < 60)[None]


class TestTheirPredictor:
    def test_tracks_in_our_pixels(self):
        queries = np.array([[0, 16.0, 32.0], [2, 24.5, 30.25]])
        model = OtherTracker()
        tracks = PointTracker(model, device="cpu")(square_clip(), queries=queries)
        expected = queries[:, None, 1] + 4 * (np.arange(8) - queries[:, :1])
        np.testing.assert_allclose(tracks.tracks[..., 0], expected, atol=1e-4)
        np.testing.assert_allclose(tracks.tracks[..., 1], queries[:, 2:].repeat(8, 1), atol=1e-4)
        np.testing.assert_array_equal(tracks.visibility, tracks.confidence == 1)
        assert model.calls == [True]

    def test_an_object_without_backward_tracking(self):
        model = OtherTracker(backward=False)
        tracks = PointTracker(model, device="cpu")(square_clip(), queries=np.array([[2, 24.0, 32.0]]))
        np.testing.assert_allclose(tracks.tracks[0, :, 0], 16 + 4 * np.arange(8), atol=1e-4)

    def test_a_probability_is_the_confidence(self):
        def predictor(video, queries):
            tracks = queries[:, None, :, 1:].expand(-1, video.shape[1], -1, -1)
            return tracks, torch.linspace(0.1, 0.8, video.shape[1])[None, :, None].expand(tracks.shape[:3])

        tracks = PointTracker(predictor, device="cpu")(square_clip(), queries=np.array([[7, 24.0, 32.0]]))
        np.testing.assert_allclose(tracks.confidence[0], [*np.linspace(0.1, 0.8, 8)[:7], 1], atol=1e-6)
        np.testing.assert_array_equal(tracks.visibility[0], [False] * 4 + [True] * 4)

    @pytest.mark.parametrize(
        ("result", "message"),
        [
            (None, "must return tracks and visibility"),
            ((torch.zeros(1, 1, 8, 2), torch.ones(1, 8, 1)), r"must return tracks \[1, 8, 1, 2\]"),
            ((torch.zeros(1, 8, 1, 2), torch.full((1, 8, 1), 3.0)), "bool or a probability"),
        ],
    )
    def test_other_results(self, result, message):
        with pytest.raises(ValueError, match=message):
            PointTracker(lambda video, queries: result, device="cpu")(square_clip(), grid=1)

    def test_not_a_tracker(self):
        with pytest.raises(TypeError, match="model must be a name, a tracker or a predictor, got int"):
            PointTracker(7)


def program_for_cotracker(cotracker, video):
    """What the README of such a program does."""
    cotracker = cotracker.to("cpu")
    by_grid = cotracker(video, grid_size=3)
    queries = torch.tensor([[[0.0, 15.5, 31.5], [2.0, 23.5, 31.5]]])
    return by_grid, cotracker(video, queries=queries, backward_tracking=True)


class TestOurPredictor:
    video = torch.from_numpy(square_clip()).permute(0, 3, 1, 2)[None].float()

    def test_a_program_for_cotracker(self):
        tracker = PointTracker(ColourTracker(), device="cpu")
        (grid_tracks, grid_visibility), (tracks, visibility) = program_for_cotracker(tracker.as_predictor(), self.video)
        assert grid_tracks.shape == (1, 8, 9, 2) and grid_visibility.shape == (1, 8, 9)
        assert tracks.shape == (1, 8, 2, 2) and visibility.dtype == torch.bool
        ours = tracker(square_clip(), queries=np.array([[0, 16, 32], [2, 24, 32]]))
        np.testing.assert_allclose(tracks[0].transpose(0, 1), ours.tracks - 0.5, atol=1e-4)
        np.testing.assert_array_equal(visibility[0].T, ours.visibility)

    def test_it_can_go_back_into_a_point_tracker(self):
        tracker = PointTracker(ColourTracker(), device="cpu")
        queries = np.array([[0, 16, 32], [2, 24, 32]])
        again = PointTracker(tracker.as_predictor(), device="cpu")(square_clip(), queries=queries)
        np.testing.assert_allclose(again.tracks, tracker(square_clip(), queries=queries).tracks, atol=1e-3)

    def test_batches_and_a_mask(self):
        predictor = PointTracker(ColourTracker(), device="cpu").as_predictor()
        mask = torch.zeros(1, 1, 64, 96)
        mask[..., :48] = 1
        tracks, _ = predictor(torch.cat([self.video, self.video]), grid_size=4, segm_mask=torch.cat([mask, mask]))
        assert tracks.shape == (2, 8, 8, 2)
        assert tracks[:, 0, :, 0].max() < 48

    def test_wrong_calls(self):
        predictor = PointTracker(ColourTracker(), device="cpu").as_predictor()
        for video, options, message in [
            (self.video[0], {"grid_size": 2}, r"video must be \[B, T, 3, H, W\]"),
            (self.video / 255, {"grid_size": 2}, "multiply it by 255"),
            (self.video, {}, "give either queries or grid_size"),
        ]:
            with pytest.raises(ValueError, match=message):
                predictor(video, **options)

    def test_torch_hub(self):
        predictor = torch.hub.load(str(Path(__file__).parents[1]), "tritonkern_tracker", source="local", device="cpu")
        tracks, visibility = predictor(self.video, grid_size=2)
        assert tracks.shape == (1, 8, 4, 2) and visibility[:, 0].all()


@pytest.fixture
def tracks():
    positions = np.arange(12, dtype=np.float32).reshape(2, 3, 2) + 0.5
    visible = np.array([[True, True, False], [False, True, True]])
    queries = np.array([[0, 0.5, 1.5], [1, 8.5, 9.5]], dtype=np.float32)
    return PointTracks(positions, visible, visible.astype(np.float32), queries, 10.0, (96, 64))


class TestConversions:
    def test_napari(self, tracks):
        data, options, kind = tracks.to_napari()
        assert kind == "tracks"
        # point, t, y, x with pixel centres at whole numbers
        np.testing.assert_array_equal(data[:4], [[0, 0, 1, 0], [0, 1, 3, 2], [0, 2, 5, 4], [1, 0, 7, 6]])
        np.testing.assert_array_equal(options["features"]["visible"], tracks.visibility.ravel())

    def test_pandas(self, tracks, monkeypatch):
        if "pandas" not in sys.modules:
            monkeypatch.setitem(sys.modules, "pandas", types.SimpleNamespace(DataFrame=dict))
        frame = tracks.to_pandas()
        assert list(frame) == ["point", "t", "x", "y", "visible", "confidence"]
        assert list(frame["point"]) == [0, 1] * 3 and list(frame["t"]) == [0, 0, 1, 1, 2, 2]
        np.testing.assert_array_equal(frame["y"], tracks.tracks[..., 1].T.ravel())

    def test_supervision(self, tracks, monkeypatch):
        monkeypatch.setitem(sys.modules, "supervision", types.SimpleNamespace(Detections=types.SimpleNamespace))
        first, second, third = tracks.to_supervision()
        np.testing.assert_array_equal(first.xyxy, [[0.5, 1.5, 0.5, 1.5]])
        assert [list(frame.tracker_id) for frame in (first, second, third)] == [[0], [0, 1], [1]]
        assert {len(frame.confidence) for frame in (second,)} == {2} and list(second.class_id) == [0, 0]

    def test_rerun(self, tracks, monkeypatch):
        log = []
        stand_in = types.SimpleNamespace(
            set_time=lambda timeline, sequence: log.append((timeline, sequence)),
            Points2D=lambda positions, **options: (positions, options),
            log=lambda entity, points: log.append((entity, points)),
        )
        monkeypatch.setitem(sys.modules, "rerun", stand_in)
        tracks.to_rerun("video/tracks")
        assert [item for item in log if item[0] == "frame"] == [("frame", t) for t in range(3)]
        _, (positions, options) = log[3]
        np.testing.assert_array_equal(positions, tracks.tracks[:, 1])
        np.testing.assert_array_equal(options["colors"], point_colours(tracks.queries))
        assert list(options["keypoint_ids"]) == [0, 1]

    @pytest.mark.parametrize(
        ("method", "module", "package"),
        [
            ("to_pandas", "pandas", "pandas"),
            ("to_supervision", "supervision", "supervision"),
            ("to_rerun", "rerun", "rerun-sdk"),
        ],
    )
    def test_missing_packages(self, tracks, monkeypatch, method, module, package):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ModuleNotFoundError, match=f"needs the package {package}: pip install {package}"):
            getattr(tracks, method)()
