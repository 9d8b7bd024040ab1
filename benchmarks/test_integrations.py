"""Public trackers before and after `tritonkern.patch`, end to end and in the replaced steps alone.

Two copies of the authors' model with the same random weights, one of them patched, on the same video. The repositories
lie in the folder that TRITONKERN_OFFICIAL_DIR names (see tests/official.py); without it nothing is measured, as the
twins of the tests are too small to stand for them. TRITONKERN_INTEGRATIONS_SHAPE ("8x256") sets frames and points.
"""

import copy
import os
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from official import needs_official, official  # noqa: F401

import tritonkern

pytestmark = needs_official
FRAMES, POINTS = (int(x) for x in os.environ.get("TRITONKERN_INTEGRATIONS_SHAPE", "8x256").split("x"))
END_TO_END, STEP = 1.25, 4.0


@pytest.fixture
def pair(request, device):
    """`pair(repository, module, cls, **options)`: a patched model and an unpatched copy of it."""
    load, handles = request.getfixturevalue("official"), []

    def build(repository, module, cls, **options):
        torch.manual_seed(0)
        theirs = getattr(load(repository, module), cls)(**options).eval().to(device)
        ours = copy.deepcopy(theirs)
        handles.append(tritonkern.patch(ours))
        return ours, theirs

    yield build
    for handle in handles:
        handle.restore()


@torch.no_grad()
def measure_both(compare, name, models, call, target, tolerance):
    """`call(model)` returns tracks in pixels, or values of about one."""
    ours, theirs = models
    with FlopCounterMode(display=False) as counter:
        expected = call(theirs)
    difference = (call(ours) - expected).abs().max().item()
    print(f"\n{name}: results differ by at most {difference:.1e}")
    assert difference < tolerance
    # Compared above: positions, and coordinates that grid_sample normalises, differ by more than the last places.
    calls = {"patched": lambda: (call(ours), None)[1], "unpatched": lambda: (call(theirs), None)[1]}
    shape = (1, FRAMES, POINTS)
    compare(name, shape, torch.float32, "forward", calls, 0, counter.get_total_flops(), {"unpatched": target})


def queries(device, height, width, order):
    columns = {"t": torch.randint(FRAMES, (1, POINTS)), "y": torch.rand(1, POINTS) * height}
    columns["x"] = torch.rand(1, POINTS) * width
    return torch.stack([columns[name] for name in order], -1).float().to(device)


OFFLINE = ("co-tracker", "cotracker.models.core.cotracker.cotracker3_offline", "CoTrackerThreeOffline")
ONLINE = ("co-tracker", "cotracker.models.core.cotracker.cotracker3_online", "CoTrackerThreeOnline")
LOCOTRACK = ("locotrack/locotrack_pytorch", "models.locotrack_model", "LocoTrack")


def test_cotracker_offline(compare, pair, device):
    models = pair(*OFFLINE, stride=4, corr_radius=3, window_len=60)
    video = torch.rand(1, FRAMES, 3, 384, 512, device=device) * 255
    points = queries(device, 383, 511, "txy")
    measure_both(compare, "CoTracker3 offline", models, lambda m: m(video, points, iters=6)[0], END_TO_END, 1e-3)


def test_cotracker_online(compare, pair, device):
    """The second window of a video, whose first half was in the first one."""
    models = pair(*ONLINE, stride=4, corr_radius=3, window_len=16)
    video = torch.rand(1, 24, 3, 384, 512, device=device) * 255
    points = queries(device, 383, 511, "txy")
    points[..., 0] = 0
    states = {}
    with torch.no_grad():
        for model in models:
            model.init_video_online_processing()
            model(video[:, :16], points, iters=1, is_online=True)
            states[model] = {name: copy.deepcopy(x) for name, x in vars(model).items() if name.startswith("online_")}
    kept = vars(models[0].fnet)["forward"].__func__.__self__
    first_window = kept.kept[models[0].fnet]

    def second_window(model):
        vars(model).update(copy.deepcopy(states[model]))
        kept.kept[models[0].fnet] = first_window
        return model(video[:, 8:], points, iters=6, is_online=True)[0]

    measure_both(compare, "CoTracker3 online, a window", models, second_window, 1.3, 1e-3)


def test_cotracker_correlation_and_first_layer(compare, pair, device):
    models = pair(*OFFLINE, stride=4, corr_radius=3, window_len=60)
    features = torch.nn.functional.normalize(torch.randn(1, FRAMES, 96, 128, 128, device=device), dim=-1).movedim(-1, 2)
    places = torch.rand(FRAMES, POINTS, 2, device=device) * 96
    # As the model has it: the points are the last axis but one in memory
    support = torch.randn(1, 7, 7, POINTS, 128, device=device).permute(0, 3, 1, 2, 4)

    def first_layer(model):
        patches = model.get_correlation_feat(features, places)
        volume = torch.einsum("btnhwc,bnijc->btnhwij", patches, support)
        return model.corr_mlp.fc1(volume.reshape(FRAMES * POINTS, 49 * 49))

    measure_both(compare, "CoTracker3, correlation and first layer, finest level", models, first_layer, STEP, 1e-4)


def test_locotrack(compare, pair, device):
    models = pair(*LOCOTRACK, model_size="base")
    video, points = torch.rand(1, FRAMES, 256, 256, 3, device=device) * 2 - 1, queries(device, 256, 256, "tyx")
    measure_both(compare, "LocoTrack-B", models, lambda m: m(video, points)["tracks"], END_TO_END, 1e-3)


def test_locotrack_cost_volume(compare, pair, device):
    models = pair(*LOCOTRACK, model_size="base")
    fine, coarse = (
        torch.randn(1, FRAMES, 64, 64, 128, device=device),
        torch.randn(1, FRAMES, 32, 32, 256, device=device),
    )
    fine, coarse = (torch.nn.functional.normalize(x, dim=-1) for x in (fine, coarse))
    own = torch.randint(32, (POINTS,))
    query, query_fine = coarse[:, 0, own, own], fine[:, 0, own, own]
    image = (1, FRAMES, 256, 256, 3)

    def track(model):
        return model.tracks_from_cost_volume(query, query_fine, coarse, fine, None, im_shp=image)[0]

    measure_both(compare, "LocoTrack-B, cost volume", models, track, None, 1e-3)
