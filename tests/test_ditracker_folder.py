"""`DiTracker.from_folder` on small random weights, what it refuses, and the predictor's two kinds of coordinates."""

import ast
import copy
import json
from functools import partial
from pathlib import Path
from typing import Optional  # noqa: UP035

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from official import OFFICIAL_DIR
from PIL import Image
from safetensors.torch import load_file, save_file
from test_cogvideox import SIZES
from test_difftrack import folder as backbone  # noqa: F401
from torch import nn
from typer.testing import CliRunner

from tritonkern.cli import app
from tritonkern.models import CogVideoX, add_low_rank, attention_targets, build_model, ditracker_folder, save_low_rank
from tritonkern.models.ditracker import DiTracker, DiTrackerHead
from tritonkern.models.ditracker_folder import Backbone, _check
from tritonkern.models.ditracker_predictor import DiTrackerPredictor
from tritonkern.models.low_rank import LowRankLinear
from tritonkern.nn.correlation import TrackerOutput

ROOT = Path(OFFICIAL_DIR or ".") / "DiTracker"
SMALL = partial(DiTrackerHead, cost_dims=(12, 8), dim=32, num_heads=2, rounds=1, virtual_tracks=3)


@pytest.fixture(scope="module")
def head_weights():
    torch.manual_seed(0)
    return SMALL().state_dict()


@pytest.fixture
def folder(tmp_path, monkeypatch, backbone, head_weights):  # noqa: F811
    """The published files with a small head, beside a small CogVideoX, which here count as the published ones."""
    monkeypatch.setattr(ditracker_folder, "PUBLISHED", Backbone(2, 32, 3, False, 1, 1))
    monkeypatch.setattr(ditracker_folder, "DiTrackerHead", SMALL)
    inner = tmp_path / "CogVideoX-2b"
    inner.mkdir()
    for path in list(tmp_path.iterdir()):
        if path != inner:
            path.rename(inner / path.name)
    place = tmp_path / "DiTracker"
    place.mkdir()
    torch.save(head_weights, place / "model.pth")
    torch.manual_seed(0)
    model = CogVideoX(**SIZES)
    add_low_rank(model, attention_targets(1), 3)
    save_low_rank(model, place / "pytorch_lora_weights.safetensors")
    return place


def test_the_published_transformer():
    with torch.device("meta"):
        two = CogVideoX()
        five = CogVideoX(48, num_layers=42, use_rotary_positional_embeddings=True)
    _check(two, "2b")
    with pytest.raises(ValueError, match=r"5b .*: num_heads 48 \(needs 30\), layers 42 \(needs 30\), rotary True"):
        _check(five, "5b")


def test_folder(folder, head_weights):
    model = build_model("ditracker", folder)
    assert isinstance(model, DiTracker) and not model.training and model.resolution == (480, 720)
    encoder = model.encoder
    assert (encoder.layer, encoder.head, encoder.timestep, encoder.sample) == (1, 1, 19.0, False)
    assert len(encoder.transformer.transformer_blocks) == 2  # of three
    assert encoder.prompt.shape == (1, 5, 12) and encoder.prompt.abs().sum() > 0
    assert all(torch.equal(x, head_weights[name]) for name, x in model.head.state_dict().items())
    # The command line merges adapters; training does not.
    assert not any(isinstance(x, LowRankLinear) for x in model.modules())
    model = DiTracker.from_folder(folder, official=True)
    assert sum(isinstance(x, LowRankLinear) for x in model.modules()) == 6
    assert model.encoder.sample and model.encoder.vae.use_tiling and model.encoder.vae.use_slicing
    trainable = [x for x in model.encoder.parameters() if x.requires_grad]
    assert len(trainable) == 12 and all(x.requires_grad for x in model.head.parameters())


@pytest.mark.parametrize("place", ["inside", "the same", "named", "named, absolute"])
def test_places_of_the_transformer(folder, place):
    source = folder.parent / "CogVideoX-2b"
    if place == "inside":
        source.rename(folder / "cogvideox-2B")
    elif place == "the same":
        for path in source.iterdir():
            path.rename(folder / path.name)
    else:
        source = source.rename(folder.parent / "other")
        (folder / "ditracker.json").write_text(
            json.dumps({"cogvideox": "../other" if place == "named" else str(source)})
        )
    assert DiTracker.from_folder(folder).encoder.prompt.abs().sum() > 0


class Foreign:
    """What only running code could load."""


def change_head(change):
    def spoil(place, head):
        state = dict(head)
        change(state)
        torch.save(state, place / "model.pth")

    return spoil


def truncate(name, size):
    return lambda place, head: (place / name).write_bytes((place / name).read_bytes()[:size])


def write(name, text):
    return lambda place, head: (place / name).write_text(text)


def change_adapters(place, head):
    path = place / "pytorch_lora_weights.safetensors"
    state = load_file(path)
    state.pop(next(name for name in state if "blocks.0.attn1.to_v.lora_B" in name))
    save_file(state, path)


def move(name):
    return lambda place, head: (place.parent / "CogVideoX-2b" / name).rename(place / "gone")


def rotary(place, head):
    path = place.parent / "CogVideoX-2b" / "transformer" / "config.json"
    changed = dict(use_rotary_positional_embeddings=True, num_attention_heads=4)
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


@pytest.mark.parametrize(
    "spoil, error, message",
    [
        (lambda place, head: (place / "model.pth").unlink(), FileNotFoundError, "holds no model.pth; DiTracker"),
        (change_head(lambda x: x.pop("updateformer.virual_tracks")), ValueError, "1 missing: .*virual_tracks"),
        (change_head(lambda x: x.update({"dit_fnet.a": torch.zeros(1)})), ValueError, "1 unexpected: dit_fnet.a"),
        (
            change_head(lambda x: x.update({"corr_mlp.fc1.weight": torch.zeros(12, 2 * 5**4)})),
            ValueError,
            r"corr_mlp.fc1.weight \[12, 1250\] \(needs \[12, 4802\]\)",  # windows of 5 x 5
        ),
        (change_head(lambda x: x.update({"a": Foreign()})), ValueError, "holds Python objects as well as tensors"),
        (truncate("model.pth", 10**5), ValueError, "model.pth is not a readable PyTorch file"),
        (truncate("pytorch_lora_weights.safetensors", 999), ValueError, "is not a readable safetensors file"),
        (change_adapters, ValueError, "1 halves of a pair.*blocks.0.attn1.to_v.lora_A"),
        (write("ditracker.json", "{"), ValueError, "ditracker.json is not readable JSON"),
        (write("ditracker.json", '{"path": "x"}'), ValueError, r'must be {"cogvideox": "PATH"}'),
        (write("ditracker.json", '{"cogvideox": "x"}'), FileNotFoundError, "x, which does not exist"),
        (lambda place, head: (place.parent / "CogVideoX-2b").rename(place.parent / "x"), FileNotFoundError,
         "no folder CogVideoX-2b in .* or beside it, and no .*ditracker.json"),
        (move("transformer"), FileNotFoundError, "holds no transformer: config.json is missing"),
        (move("vae"), FileNotFoundError, "holds no vae/config.json"),
        (move("prompt_embeds.safetensors"), FileNotFoundError, "neither prompt_embeds.safetensors"),
        (rotary, ValueError, r"another transformer .*: num_heads 4 \(needs 2\), rotary True \(needs False\)"),
    ],
    ids=range(16),
)  # fmt: skip
def test_folders_that_do_not_fit(folder, head_weights, spoil, error, message):
    spoil(folder, head_weights)
    with pytest.raises(error, match=message):
        DiTracker.from_folder(folder)


def test_prefixes_of_wrappers(folder, head_weights):
    """As `DistributedDataParallel` and training loops write it."""
    torch.save({"model": {f"module.{name}": x for name, x in head_weights.items()}}, folder / "model.pth")
    found = DiTracker.from_folder(folder).head.state_dict()
    assert all(torch.equal(x, head_weights[name]) for name, x in found.items())


@pytest.mark.slow
def test_command_line(folder, tmp_path):
    first, *rest = (Image.fromarray(np.full((32, 48, 3), 40 * t, dtype=np.uint8)) for t in range(2))
    first.save(tmp_path / "video.png", save_all=True, append_images=rest)
    options = "--grid", "1", "--overlay", "none", "--model", "ditracker", "--weights"
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["track", str(tmp_path / "video.png"), *options, str(folder), "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert "1 points, 2 frames" in result.stdout
    (folder / "model.pth").unlink()
    result = CliRunner().invoke(app, ["track", str(tmp_path / "video.png"), *options, str(folder), "--out", str(out)])
    assert result.exit_code == 2 and "holds no model.pth" in result.stderr


class Watched(DiTracker):
    """Queries come back as tracks; keeps what it was given."""

    def __init__(self, resolution):
        nn.Module.__init__(self)
        self.resolution = resolution

    def features(self, video):
        self.video = video
        return (video,)

    def track(self, features, queries):
        self.queries = queries
        tracks = queries[:, :, None, [2, 1]].expand(-1, -1, features[0].shape[1], -1)
        logit = torch.linspace(-1, 1, queries.shape[1])[None, :, None].expand(tracks.shape[:-1])
        return TrackerOutput(tracks, logit, torch.full_like(logit, -9))


def test_coordinates():
    model = Watched((48, 72))
    video = torch.rand(1, 3, 3, 25, 33) * 255
    queries = torch.tensor([[[0.0, 0.0, 0.0], [1.0, 32.0, 24.0], [2.0, 16.0, 6.0]]])
    tracks, visible = DiTrackerPredictor(model, official=True)(video, queries)
    torch.testing.assert_close(tracks, queries[:, None, :, 1:].expand(1, 3, 3, 2))
    assert visible[0].tolist() == 3 * [[True, False, False]]
    # Corner pixels are corner pixels: (n - 1) / (m - 1), and the raster has pixel centres at i + 0.5.
    expected = torch.tensor([[0, 0.5, 0.5], [1, 47.5, 71.5], [2, 6 * 47 / 24 + 0.5, 35.5 + 0.5]])
    torch.testing.assert_close(model.queries[0], expected)
    resized = F.interpolate(video[0], (48, 72), mode="bilinear", align_corners=True)
    torch.testing.assert_close(model.video[0], resized.permute(0, 2, 3, 1) / 127.5 - 1)

    found = copy.copy(model.video)
    tracks, _ = DiTrackerPredictor(model)(video, queries)
    torch.testing.assert_close(tracks, queries[:, None, :, 1:].expand(1, 3, 3, 2))
    # Borders are borders: n / m.
    expected = torch.tensor([[0, 0.5 * 48 / 25, 0.5 * 72 / 33], [1, 24.5 * 48 / 25, 32.5 * 72 / 33]])
    torch.testing.assert_close(model.queries[0, :2], expected)
    assert (model.video - found).abs().max() > 0.01
    # In pixels of the video the two differ by half a pixel at most.
    difference = (expected[:, 1:] - torch.tensor([[0.5, 0.5], [47.5, 71.5]])) * torch.tensor([25 / 48, 33 / 72])
    assert 0.2 < difference.abs().max() < 0.5


@pytest.mark.parametrize(
    "video, queries, message",
    [
        ((1, 3, 25, 33, 3), [[0.0, 1, 1]], r"video must be \[B, T, 3, H, W\]"),
        ((1, 3, 3, 25, 1), [[0.0, 1, 1]], r"video must be \[B, T, 3, H, W\]"),
        ((1, 3, 3, 25, 33), [[3.0, 1, 1]], "queries must be finite, with t from 0 to 2"),
        ((1, 3, 3, 25, 33), [[0.0, float("nan"), 1]], "queries must be finite, with t from 0 to 2"),
        ((1, 3, 3, 25, 33), [[0.0, 1]], r"queries must be \[1, N, 3\], got \[1, 1, 2\]"),
    ],
    ids=str,
)
def test_bad_arguments_of_the_predictor(video, queries, message):
    with pytest.raises(ValueError, match=message):
        DiTrackerPredictor(Watched((48, 72)))(torch.zeros(video), torch.tensor([queries]))


class Recorded(Watched):
    """A tracker whose refiner gives back the queries, with logits by their number."""

    support, threshold = 5, 0.6

    def refine(self, features, queries):
        self.queries = queries
        tracks = queries[:, :, None, [2, 1]].expand(-1, -1, features[0].shape[1], -1)
        logits = torch.linspace(-2, 4, queries.shape[1])[None, :, None].expand(tracks.shape[:-1])
        return [TrackerOutput(tracks, -logits, -logits)]

    track = DiTracker.track


@pytest.mark.skipif(not ROOT.is_dir(), reason="TRITONKERN_OFFICIAL_DIR has no DiTracker")
def test_same_as_the_published_predictor():
    """Frames, queries, the points beside them, results and visibility."""
    scope = {"torch": torch, "F": F, "np": np, "Tuple": tuple, "Optional": Optional, "CoTrackerThreeOffline": None}
    for file, name in (
        ("core/model_utils.py", "get_points_on_a_grid"),
        ("evaluation_predictor.py", "EvaluationPredictor"),
    ):
        text = (ROOT / "cotracker/models" / file).read_text()
        node = next(x for x in ast.parse(text).body if getattr(x, "name", None) == name)
        exec(ast.get_source_segment(text, node), scope)
    seen = {}

    class Stub(nn.Module):
        def forward(self, video, queries, iters):
            seen.update(video=video, queries=queries.clone(), iters=iters)
            tracks = queries[:, None, :, 1:].repeat(1, video.shape[1], 1, 1)
            p = torch.linspace(-2, 4, queries.shape[1]).sigmoid().expand(tracks.shape[:-1])
            return tracks, p, p, None

    video = torch.rand(1, 3, 3, 25, 33) * 255
    queries = torch.cat([torch.zeros(1, 40, 1), torch.rand(1, 40, 2) * torch.tensor([32.0, 24.0])], -1)
    theirs = scope["EvaluationPredictor"](Stub(), (480, 720), grid_size=5, single_point=False, n_iters=6)
    expected, product = theirs(video, queries)
    model = Recorded((480, 720))
    tracks, visible = DiTrackerPredictor(model, official=True)(video, queries)
    torch.testing.assert_close((model.video + 1) * 127.5, seen["video"].permute(0, 1, 3, 4, 2), atol=1e-3, rtol=0)
    torch.testing.assert_close(model.queries[..., [0, 2, 1]] - torch.tensor([0, 0.5, 0.5]), seen["queries"])
    torch.testing.assert_close(tracks, expected)
    assert torch.equal(visible, product > 0.6) and 0 < visible.float().mean() < 1 and seen["iters"] == 6
