"""The base class of trackers: its video, its errors, its state dict."""

import pytest
import torch
import torch.nn.functional as F

from tritonkern.models.matching import MatchingTracker


class Tracker(MatchingTracker):
    resolution = (48, 64)

    def features(self, video):
        return F.normalize(F.avg_pool2d(video.flatten(0, 1).movedim(-1, 1), 8).movedim(1, -1), dim=-1).unflatten(
            0, video.shape[:2]
        )


def test_forward_tracks_features_of_the_video():
    model = Tracker()
    video = torch.rand(1, 2, 48, 64, 3) * 2 - 1
    queries = torch.tensor([[[1.0, 20.0, 30.0]]])
    expected = model.track(model.features(video), queries)
    assert torch.equal(model(video, queries).tracks, expected.tracks)


def test_state_dict_is_the_linear_layer_alone():
    assert list(Tracker().state_dict()) == ["occ_linear.weight", "occ_linear.bias"]


@pytest.mark.parametrize(
    "video, queries, error, match",
    [
        (torch.zeros(1, 2, 64, 48, 3), torch.zeros(1, 1, 3), ValueError, r"resize the frames to 48x64"),
        (torch.zeros(1, 0, 48, 64, 3), torch.zeros(1, 1, 3), ValueError, r"T >= 1"),
        (torch.zeros(1, 2, 48, 64, 3, dtype=torch.uint8), torch.zeros(1, 1, 3), TypeError, "video / 127.5 - 1"),
    ],
)
def test_errors(video, queries, error, match):
    with pytest.raises(error, match=match):
        Tracker()(video, queries)
