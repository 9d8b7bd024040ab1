"""Public trackers before and after `tritonkern.patch`, end to end and in the replaced steps alone.

Two copies of the authors' model with the same random weights, one of them patched, on the same video. The repositories
are in the folder that TRITONKERN_OFFICIAL_DIR names (see tests/official.py); without it nothing is measured, as the
twins of the tests are too small to stand for them. TRITONKERN_INTEGRATIONS_SHAPE ("8x256") sets frames and points.
"""

import contextlib
import copy
import os
import sys
from pathlib import Path

import measure
import pytest
import torch
import torch._dynamo  # looks for packages while it is imported, and must not find the stand-ins of the tests
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from official import needs_official, official  # noqa: F401
from test_integrations_tapir import tapir  # noqa: F401
from tracker_twins import on_a_cpu

import tritonkern
from tritonkern.integrations import _patch

pytestmark = needs_official
FRAMES, POINTS = (int(x) for x in os.environ.get("TRITONKERN_INTEGRATIONS_SHAPE", "8x256").split("x"))


@pytest.fixture
def pair(request, device):
    """`pair(repository, module, cls, stream=False, **options)`: a patched model and an unpatched copy of it."""
    load, handles = request.getfixturevalue("official"), []

    def build(repository, module, cls, stream=False, **options):
        torch.manual_seed(0)
        theirs = getattr(load(repository, module), cls)(**options).eval().to(device)
        for name, parameter in theirs.named_parameters():
            if name.endswith("layer_scale"):  # 1e-6 in a new AllTracker, whose blocks would then count for nothing
                torch.nn.init.constant_(parameter, 0.1)
        ours = copy.deepcopy(theirs)
        handles.append(tritonkern.patch(ours, stream=stream, verify=not stream))
        return ours, theirs

    yield build
    for handle in handles:
        handle.restore()


def in_tf32(call):
    """Runs the call with matrix products in TF32, which keeps 10 of the 23 bits of a float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        call()
    finally:
        torch.set_float32_matmul_precision(before)


@torch.no_grad()
def measure_both(compare, name, models, call, tolerance, compiled=False, shape=(1, FRAMES, POINTS)):
    """`call(model)` returns tracks in pixels, or values of about one; `compiled`: torch.compile takes it whole."""
    ours, theirs = models
    with FlopCounterMode(display=False) as counter:
        expected = call(theirs)
    difference = (call(ours) - expected).abs().max().item()
    print(f"\n{name}: results differ by at most {difference:.1e}")
    assert difference < tolerance
    # Compared above: positions, and coordinates that grid_sample normalises, differ by more than the last places.
    calls = {"patched": lambda: (call(ours), None)[1], "unpatched": lambda: (call(theirs), None)[1]}
    if compiled:
        torch.compiler.reset()
        step = torch.compile(call)
        calls["unpatched, compiled"] = lambda: (step(theirs), None)[1]
    if expected.is_cuda:
        calls["unpatched, TF32"] = lambda: in_tf32(lambda: call(theirs))
    compare(name, shape, torch.float32, "forward", calls, 0, counter.get_total_flops())


def queries(device, height, width, order):
    columns = {"t": torch.randint(FRAMES, (1, POINTS)), "y": torch.rand(1, POINTS) * height}
    columns["x"] = torch.rand(1, POINTS) * width
    return torch.stack([columns[name] for name in order], -1).float().to(device)


OFFLINE = ("co-tracker", "cotracker.models.core.cotracker.cotracker3_offline", "CoTrackerThreeOffline")
ONLINE = ("co-tracker", "cotracker.models.core.cotracker.cotracker3_online", "CoTrackerThreeOnline")
OFFLINE_OPTIONS = {"stride": 4, "corr_radius": 3, "window_len": 60}
ALLTRACKER = ("alltracker", "nets.alltracker", "Net")
TAPIR = ("tapnet", "tapnet.torch.tapir_model", "TAPIR")
LOCOTRACK = ("locotrack/locotrack_pytorch", "models.locotrack_model", "LocoTrack")


def test_cotracker_offline(compare, pair, device):
    models = pair(*OFFLINE, **OFFLINE_OPTIONS)
    video = torch.rand(1, FRAMES, 3, 384, 512, device=device) * 255
    points = queries(device, 383, 511, "txy")
    measure_both(compare, "CoTracker3 offline", models, lambda m: m(video, points, iters=6)[0], 1e-3)


def second_window(models, device):
    """As a function of the model: the second window of a video, whose first half was in the first one."""
    video = torch.rand(1, 24, 3, 384, 512, device=device) * 255
    points = queries(device, 383, 511, "txy")
    points[..., 0] = 0
    states = {}
    with torch.no_grad():
        for model in models:
            model.init_video_online_processing()
            model(video[:, :16], points, iters=1, is_online=True)
            states[model] = {name: copy.deepcopy(x) for name, x in vars(model).items() if name.startswith("online_")}
    kept = _patch._methods(models[0].fnet)["forward"].function.__self__.kept
    last = getattr(_patch._methods(models[0])["forward"].function.__self__, "_last", {})
    first_window = [(memory, key, memory[key]) for memory in (kept, last) for key in memory]

    def track(model):
        vars(model).update(copy.deepcopy(states[model]))
        for memory, key, value in first_window:
            memory[key] = value
        return model(video[:, 8:], points, iters=6, is_online=True)[0]

    return track


def test_cotracker_online(compare, pair, device):
    models = pair(*ONLINE, stride=4, corr_radius=3, window_len=16)
    measure_both(compare, "CoTracker3 online, a window", models, second_window(models, device), 1e-3)


def test_cotracker_online_stream(compare, pair, device):
    """The faster schedule, whose tracks differ."""
    models = pair(*ONLINE, stream=True, stride=4, corr_radius=3, window_len=16)
    name = "CoTracker3 online, a window, stream=True"
    measure_both(compare, name, models, second_window(models, device), float("inf"))


def correlation_and_first_layer(frames, points, device):
    """As a function of the model: from features of the finest level to what its first layer makes of correlations."""
    features = torch.nn.functional.normalize(torch.randn(1, frames, 96, 128, 128, device=device), dim=-1).movedim(-1, 2)
    places = torch.rand(frames, points, 2, device=device) * 96
    # As the model has it: the points are the last axis but one in memory
    support = torch.randn(1, 7, 7, points, 128, device=device).permute(0, 3, 1, 2, 4)

    def first_layer(model):
        patches = model.get_correlation_feat(features, places)
        volume = torch.einsum("btnhwc,bnijc->btnhwij", patches, support)
        return model.corr_mlp.fc1(volume.reshape(frames * points, 49 * 49))

    return first_layer


def test_cotracker_correlation_and_first_layer(compare, pair, device):
    models, step = pair(*OFFLINE, **OFFLINE_OPTIONS), correlation_and_first_layer(FRAMES, POINTS, device)
    name = "CoTracker3, correlation and first layer, finest level"
    measure_both(compare, name, models, step, 1e-4, compiled=True)


@torch.no_grad()
def test_cotracker_memory(pair, device, capsys):
    """Peak memory beyond the result, of 24 frames and 2,500 points: meant to be at most 2 % of the official code's.

    What that needs is gigabytes and in proportion to the points: it is measured with a tenth of them.
    """
    ours, theirs = pair(*OFFLINE, **OFFLINE_OPTIONS)
    frames, points, fewer = 24, 2500, 250

    def memory(model, count):
        """Of temporaries and of the result, in MiB."""
        step = correlation_and_first_layer(frames, count, device)
        result = step(model).nbytes / 2**20  # and libraries have their workspace from now on
        peak = measure.peak_memory(lambda: step(model), device)
        if peak is None:
            pytest.skip("the system does not tell a process its peak memory")
        return peak / 2**20 - result, result

    (mine, result), (part, _) = memory(ours, points), memory(theirs, fewer)
    scaled = part * points / fewer
    with capsys.disabled():
        print(
            f"\nCoTracker3, correlation and first layer, finest level, T {frames}, N {points}, MiB beside a result of "
            f"{result:.1f}: patched {mine:.1f}, unpatched {scaled:.0f} ({points // fewer} times {part:.1f}, measured "
            f"at N {fewer}): {mine / scaled:.2%}, meant to be at most 2 %"
        )


def test_locotrack(compare, pair, device):
    models = pair(*LOCOTRACK, model_size="base")
    video, points = torch.rand(1, FRAMES, 256, 256, 3, device=device) * 2 - 1, queries(device, 256, 256, "tyx")
    measure_both(compare, "LocoTrack-B", models, lambda m: m(video, points)["tracks"], 1e-3)


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

    measure_both(compare, "LocoTrack-B, cost volume", models, track, 1e-3, compiled=True)


def test_tapir(compare, tapir, pair, device):  # noqa: F811
    models = pair(*TAPIR, pyramid_level=1)
    video, points = torch.rand(1, FRAMES, 256, 256, 3, device=device) * 2 - 1, queries(device, 256, 256, "tyx")
    measure_both(compare, "BootsTAPIR", models, lambda m: m(video, points, query_chunk_size=64)["tracks"], 1e-3)


def test_tapir_mixer_block(compare, tapir, pair, device):  # noqa: F811
    """One of the twelve blocks of an iteration, its linear layers included."""
    models = pair(*TAPIR, pyramid_level=1)
    x = torch.randn(POINTS, FRAMES, models[0].torch_pips_mixer.hidden_dim, device=device)
    name = "BootsTAPIR, a block of the mixer"
    measure_both(compare, name, models, lambda m: m.torch_pips_mixer.blocks[0](x)[0], 1e-4, compiled=True)


@pytest.mark.parametrize("size", [(384, 512)], ids=str)
def test_alltracker(compare, pair, device, size):
    """One window of 16 frames, every pixel tracked."""
    models = pair(*ALLTRACKER, seqlen=16, init_weights=False)
    video = torch.rand(1, 16, 3, *size, device=device) * 255
    with on_a_cpu() if device == "cpu" else contextlib.nullcontext():
        measure_both(compare, "AllTracker", models, lambda m: m(video)[0], 1e-3, shape=video.shape)
