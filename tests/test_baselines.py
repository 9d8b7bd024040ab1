import numpy as np
import pytest
import torch

from tritonkern.models.matching import MatchingTracker, TrackerOutput
from tritonkern.tracking.baselines import CycleChecked, DenseFlow, FlowThenMatches, LucasKanade
from tritonkern.tracking.evaluation import jump_share

pytest.importorskip("cv2")

FRAMES, STEP = 6, np.array([3.0, 2.0])


def sliding(hidden=()):
    """A smooth texture that moves by `STEP` pixels a frame, `[1, T, 256, 256, 3]` in [-1, 1]; another one hides it."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, 60, 60, generator=generator) * 2 - 1
    picture = torch.nn.functional.interpolate(coarse, size=(320, 320), mode="bicubic")[0].clamp(-1, 1).movedim(0, -1)
    frames = [picture[32 - 2 * t : 288 - 2 * t, 32 - 3 * t : 288 - 3 * t] for t in range(FRAMES)]
    return torch.stack([-f.flip(0, 1) if t in hidden else f for t, f in enumerate(frames)])[None]


def points(frame):
    return torch.tensor([[[frame, 100.0, 120.0], [frame, 60.5, 180.25], [frame, 150.0, 80.0]]])


def truth(queries):
    time = torch.arange(FRAMES) - queries[..., :1]
    return queries[:, :, None, [2, 1]] + time[..., None] * torch.tensor(STEP).float()


@pytest.mark.parametrize("tracker", [LucasKanade(), DenseFlow()])
@pytest.mark.parametrize("frame", [0.0, 3.0, 5.0])
def test_classical_trackers_follow_a_sliding_texture_both_ways(tracker, frame):
    queries = points(frame)
    output = tracker(sliding(), queries)
    assert output.visible.all()
    assert (output.tracks - truth(queries)).norm(dim=-1).max() < 0.3


@pytest.mark.parametrize("tracker", [LucasKanade(), DenseFlow()])
def test_a_point_that_was_lost_stays_lost(tracker):
    output = tracker(sliding(hidden=[3]), points(1.0))
    assert output.visible[..., :3].all() and not output.visible[..., 3:].any()


def test_dense_flow_loses_what_leaves_the_frame():
    output = DenseFlow()(sliding(), torch.tensor([[[0.0, 100.0, 247.0]]]))
    assert output.visible[0, 0].tolist() == [True, True, True, False, False, False]


class Painted(MatchingTracker):
    """Features are given; the positions that it finds in `wrong` frames are 40 pixels off."""

    resolution = (256, 256)

    def __init__(self, wrong=()):
        super().__init__()
        self.wrong = wrong

    def features(self, video):
        generator = torch.Generator().manual_seed(2)
        first = torch.nn.functional.normalize(torch.randn(64, 64, 32, generator=generator), dim=-1)
        return first.expand(1, video.shape[1], -1, -1, -1)

    def track(self, features, queries):
        tracks = queries[:, :, None, [2, 1]].repeat(1, 1, features.shape[1], 1)
        tracks[:, :, list(self.wrong)] += 40
        certain = torch.full(tracks.shape[:3], -9.0)
        return TrackerOutput(tracks, certain, certain)


def test_cycle_check_hides_what_does_not_lead_back():
    tracker = CycleChecked(Painted(wrong=[2, 4]))
    output = tracker(sliding(), points(0.0))
    assert output.visible[0].all(0).tolist() == [True, True, False, True, False, True]
    assert torch.equal(output.tracks, Painted(wrong=[2, 4])(sliding(), points(0.0)).tracks)


def test_matches_take_over_where_the_flow_is_lost():
    tracker = FlowThenMatches(Painted(wrong=[5]))
    queries = points(0.0)
    output = tracker(sliding(hidden=[3]), queries)
    still = queries[:, :, None, [2, 1]].expand(-1, -1, FRAMES, -1)
    assert (output.tracks - truth(queries))[:, :, :3].norm(dim=-1).max() < 0.3
    torch.testing.assert_close(output.tracks[:, :, 3:5], still[:, :, 3:5])
    assert output.visible[0].all(0).tolist() == [True, True, True, True, True, False]


def test_jumps_by_hand():
    tracks = np.zeros((3, 4, 2))
    tracks[0, 2:, 0] = 13 * 2  # 13 px of the raster in a video of 512 x 256 pixels
    tracks[1, 2:, 1] = 13  # as far, but hidden in the frame before
    tracks[2, 2:, 0] = 11.9 * 2
    visible = np.ones((3, 4), dtype=bool)
    visible[1, 1] = False
    assert jump_share(tracks, visible, (512, 256)) == pytest.approx(1 / 3)
    visible[1, 1] = True
    assert jump_share(tracks, visible, (512, 256)) == pytest.approx(2 / 3)
    assert np.isnan(jump_share(tracks[:0], visible[:0], (512, 256)))
