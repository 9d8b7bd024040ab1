"""Models take queries as (t, y, x), files and `tritonkern.tracking` as t, x, y; a swap of x and y fails here."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tritonkern.models import TAPIR, Chrono, ChronoNano, LocoTrackRefiner, Nano, TAPIRFeatures
from tritonkern.models.dinov2 import DINOv2Config
from tritonkern.models.locotrack import LocoTrackFeatures
from tritonkern.models.nano import make_maps
from tritonkern.tracking import PointTracker

FRAMES, Y, X = 3, 58.0, 210.0


def still(cells, channels):
    """Unit-norm features of a clip whose frames are all equal, and whose cells all differ."""
    grid = F.normalize(torch.randn(1, 1, cells, cells, channels), dim=-1)
    return grid.expand(1, FRAMES, -1, -1, -1)


def chrono():
    return Chrono(DINOv2Config(dim=64, depth=2, num_heads=1, grid=3), hidden=32), still(64, 64)


def chrono_nano():
    return ChronoNano(32, 2, 2, 16, 64), still(64, 64)


def nano():
    return Nano(32, 2, 2, 16, 128), make_maps(still(128, 32), still(64, 128))


def pass_on(*convolutions):
    """Random weights would mix the costs of neighbouring cells."""
    with torch.no_grad():
        for conv in convolutions:
            conv.bias.zero_()
            conv.weight.zero_()
            conv.weight[..., 1, 1] = 0.5


def locotrack():
    model = LocoTrackRefiner("small", steps=0)
    pass_on(model.cost_conv)
    return model, LocoTrackFeatures.of(still(64, 64))


def tapir():
    model = TAPIR()
    model.steps = 0
    pass_on(model.torch_cost_volume_track_mods["hid1"], model.torch_cost_volume_track_mods["hid2"])
    return model, TAPIRFeatures(still(64, 128), still(32, 256))


@pytest.mark.parametrize("build", [chrono, chrono_nano, nano, locotrack, tapir])
def test_models_take_t_y_x(build):
    model, features = build()
    model.features = lambda video: features
    with torch.no_grad():
        tracks = model(torch.zeros(1, FRAMES, 256, 256, 3), torch.tensor([[[1.0, Y, X]]])).tracks[0, 0]
    assert tracks[1].tolist() == [X, Y]
    torch.testing.assert_close(tracks, torch.tensor([X, Y]).expand(FRAMES, 2), atol=12, rtol=0)


def test_tracking_takes_t_x_y():
    model, features = chrono_nano()
    model.features = lambda video: features
    queries = np.array([[1.0, X, Y]], dtype=np.float32)
    tracks = PointTracker(model)(np.zeros((FRAMES, 256, 256, 3), np.uint8), queries=queries).tracks[0]
    np.testing.assert_allclose(tracks, np.broadcast_to([X, Y], (FRAMES, 2)), atol=12)
