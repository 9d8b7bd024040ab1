"""Chrono end to end against the official form, and where the time goes.

The official form is eager PyTorch: the authors' repository where TRITONKERN_OFFICIAL_DIR names the folder that holds
it, otherwise a structural twin, whose DINOv2 is ours. The twin's window attention is `without_xformers`, because
xformers has no CPU kernel. `-s` prints the table of stages. TRITONKERN_CHRONO_FRAMES sets the length of the clip.
"""

import contextlib
import functools
import os
import sys
import time
from pathlib import Path

import measure
import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from chrono_like import Tracker
from official import OFFICIAL_DIR, official  # noqa: F401

from tritonkern.integrations.chrono import without_xformers
from tritonkern.models.chrono import Chrono

DIM, DEPTH, CELLS, QUERIES = 384, 12, 64, 64
FRAMES = int(os.environ.get("TRITONKERN_CHRONO_FRAMES", 8 if torch.cuda.is_available() else 2))


@pytest.fixture
def models(request, monkeypatch, device):
    """Ours and the official one, ViT-S/14, with the same random weights, adapters included."""
    torch.manual_seed(0)
    with contextlib.ExitStack() as stack:
        if OFFICIAL_DIR:
            load = request.getfixturevalue("official")
            hub = load("dinov2", "dinov2.hub.backbones")
            monkeypatch.setattr(torch.hub, "load", lambda repo_or_dir, model: getattr(hub, model)(pretrained=False))
            theirs = load("Chrono", "models.locotrack_model").LocoTrack(dino_size="small")
        else:
            stack.enter_context(without_xformers())  # the twin imports it in each call
            theirs = Tracker(DIM, DEPTH, CELLS, hidden=128, grid=37)
        for adapter in theirs.adapter:
            torch.nn.init.normal_(adapter.conv2.weight, std=0.02)
        ours = Chrono("vits14")
        ours.load_state_dict(theirs.state_dict())
        yield ours.eval().to(device), theirs.eval().to(device)


def clip(device):
    video = torch.rand(1, FRAMES, 256, 256, 3, device=device) * 2 - 1
    scale = torch.tensor([FRAMES - 1.0, 256, 256])
    return video, (torch.rand(1, QUERIES, 3) * scale).to(device)


def matrix_flops():
    """Linear layers, attention and 3 x 3 convolutions of the adapters, which are nearly all."""
    tokens = 1 + CELLS**2
    block = 24 * tokens * DIM**2 + 4 * tokens**2 * DIM
    return FRAMES * (DEPTH * block + (DEPTH - 1) * 2 * 2 * CELLS**2 * 9 * DIM * 128)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_chrono_end_to_end(compare, models, device, dtype):
    ours, theirs = models
    video, queries = clip(device)

    @torch.no_grad()
    def timed(model, autocast=dtype != torch.float32):
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            output = model(video, queries)
        return output["tracks"] if isinstance(output, dict) else output.tracks

    calls = {"tritonkern": lambda: timed(ours), "official form": lambda: timed(theirs)}
    shape = (1, FRAMES, QUERIES)
    difference = (timed(ours) - timed(theirs)).abs().max().item()
    print(f"\npoints differ by at most {difference:.2e} pixels")
    # Compared above: an arg max may take another cell where rounding decides.
    silent = {name: lambda call=call: (call(), None)[1] for name, call in calls.items()}
    if dtype == torch.float32:
        assert difference < 1e-3

        @torch.no_grad()
        def backbone():
            images = F.interpolate(video[0].movedim(-1, 1), size=(14 * CELLS, 14 * CELLS), mode="bilinear")
            ours.dino.get_intermediate_layers(images[None])

        silent["our DINOv2 alone"] = backbone
    compare("chrono", shape, dtype, "forward", silent, 0, matrix_flops())


def test_training_step(compare, models, device):
    """One step as the authors train: DINOv2 frozen, gradients for adapters and head, bfloat16 on a GPU."""
    video, queries = clip(device)
    half = device == "cuda"
    target = torch.rand(1, QUERIES, FRAMES, 2, device=device) * 256

    def step(model):
        model.dino.requires_grad_(False)
        model.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=half):
            output = model(video, queries)
        fields = [output[x] for x in ("tracks", "occlusion")] if isinstance(output, dict) else output[:2]
        F.huber_loss(fields[0], target).add(fields[1].square().mean()).backward()

    ours, theirs = models
    calls = {"tritonkern": functools.partial(step, ours), "official form": functools.partial(step, theirs)}
    # A gradient cannot agree to the last digits: rounding decides about a ReLU, and about the cell of an arg max.
    dtype = torch.bfloat16 if half else torch.float32
    compare("chrono", (1, FRAMES, QUERIES), dtype, "training step", calls, 0, 2 * matrix_flops())


@contextlib.contextmanager
def stopwatch(monkeypatch, theirs):
    """Seconds by stage, taken around the functions that do the work, on the CPU."""
    import tritonkern.models.vit as vit
    import tritonkern.nn.correlation as correlation
    from tritonkern.nn import TemporalAdapter

    seconds, inside = {}, []

    def watch(owner, name, stage):
        function = getattr(owner, name)

        def timed(*args, **kwargs):
            start = time.perf_counter()
            inside.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                taken = time.perf_counter() - start
                seconds[stage] = seconds.get(stage, 0.0) + taken - inside.pop()
                if inside:
                    inside[-1] += taken

        monkeypatch.setattr(owner, name, timed)

    watch(vit, "full_attention", "attention")
    watch(F, "scaled_dot_product_attention", "attention")
    watch(F, "linear", "linear layers")
    watch(F, "gelu", "GELU")
    watch(F, "layer_norm", "norm, scale, residual")
    watch(TemporalAdapter, "add_to", "adapters")
    watch(type(theirs.adapter[0]), "forward", "adapters")
    watch(correlation, "correlation_soft_argmax", "matching")
    watch(type(theirs), "tracks_from_cost_volume", "matching")
    yield seconds
    monkeypatch.undo()


def test_stages(models, monkeypatch, device):
    if device != "cpu":
        pytest.skip("a stopwatch on the host sees no GPU")
    video, queries = clip(device)
    for name, model in zip(("tritonkern", "official form"), models, strict=True):
        with stopwatch(monkeypatch, models[1]) as seconds, torch.no_grad():
            start = time.perf_counter()
            model(video, queries)
            total = time.perf_counter() - start
        seconds["the rest: copies, images, hooks"] = total - sum(seconds.values())
        print(f"\n{name}: {total:.2f} s, {measure.matmul_rate(device, torch.float32) / 1e9:.0f} GFLOP/s in matmuls")
        for stage, taken in sorted(seconds.items(), key=lambda item: -item[1]):
            print(f"  {stage:32}{taken:8.2f} s{taken / total:8.1%}")
