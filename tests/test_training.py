import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open

from tritonkern.models.chrono_nano import ChronoNano
from tritonkern.training import loop
from tritonkern.training.held_out import photo_clips
from tritonkern.training.loop import GeneratedClips, TrainingPlan, train
from tritonkern.training.losses import cell_targets, tracking_loss
from tritonkern.training.synthetic import Layer, Motion, generate_clip, render, true_tracks

SIZE = 96
PLAN = TrainingPlan(steps=4, frames=3, points=16, bfloat16=False)


def coordinate_layer(rng, frames):
    """A layer painted with its own coordinates: red is x / width, green is y / height."""
    side = 2 * SIZE
    centres = (torch.arange(side) + 0.5) / side
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    middle = torch.full((2,), side / 2, dtype=torch.float64)
    motion = Motion(rng, frames, middle, torch.full((2,), SIZE / 2, dtype=torch.float64), 0.5)
    return Layer(torch.stack([x, y, torch.zeros_like(x), torch.ones_like(x)]), motion), side


def deforming_layer(frames):
    for seed in range(100):
        layer, side = coordinate_layer(np.random.default_rng(seed), frames)
        if layer.motion.deforms:
            return layer, side
    raise AssertionError("no seed deforms")


def test_forward_inverts_inverse():
    layer, side = deforming_layer(frames=20)
    texture = torch.rand(50, 2, dtype=torch.float64) * side
    screen = layer.motion.forward(texture)
    torch.testing.assert_close(layer.motion.inverse(screen), texture.expand(20, -1, -1), atol=1e-8, rtol=0)


def test_tracks_agree_with_the_picture():
    """The colour at a visible track is the texture coordinate it started from, in every frame, to a fraction of a
    pixel.
    """
    layer, side = deforming_layer(frames=8)
    colour, shown = render([layer], 8, SIZE)
    points, occluded = true_tracks([layer], shown, 200, np.random.default_rng(1))
    assert occluded.mean() < 0.9
    reads = [[] for _ in points]
    for n, t in zip(*np.nonzero(~occluded), strict=True):
        place = torch.from_numpy(points[n, t]) / SIZE * 2 - 1
        sample = torch.nn.functional.grid_sample(colour[t : t + 1], place.view(1, 1, 1, 2), align_corners=False)
        # Half a pixel from the border the picture's own interpolation is clipped.
        if ((points[n, t] > 0.5) & (points[n, t] < SIZE - 0.5)).all():
            reads[n].append(sample[0, :2, 0, 0].numpy() * side)
    spread = [np.ptp(r, axis=0).max() for r in reads if len(r) > 1]
    assert len(spread) > 100
    assert np.quantile(spread, 0.9) < 0.05


def test_visibility_agrees_with_the_layer_that_shows():
    rng = np.random.default_rng(3)
    ground, _ = coordinate_layer(rng, 10)
    side = SIZE // 2
    opaque = torch.ones(4, side, side)
    middle = torch.full((2,), side / 2, dtype=torch.float64)
    opaque[3, 0] = opaque[3, -1] = 0
    near = Layer(opaque, Motion(rng, 10, middle, torch.full((2,), SIZE / 2, dtype=torch.float64), 1.0))
    _, shown = render([ground, near], 10, SIZE)
    points, occluded = true_tracks([ground, near], shown, 400, rng)
    inside = ((points >= 1) & (points < SIZE - 1)).all(-1)
    pixel = np.clip(points.astype(int), 0, SIZE - 1)
    layer = shown.numpy()[np.arange(10), pixel[..., 1], pixel[..., 0]]
    owner = np.array([layer[n][~occluded[n]].min(initial=9) for n in range(len(points))])
    hidden = inside & occluded
    assert hidden.sum() > 100
    assert (layer[hidden] == 1).mean() > 0.97
    assert set(owner) <= {0, 1}


def test_clips_are_a_function_of_their_seed():
    first, again, other = (generate_clip(seed, frames=3, size=64, points=8) for seed in ((0, 1), (0, 1), (0, 2)))
    assert np.array_equal(first.video, again.video) and np.array_equal(first.points, again.points)
    assert not np.array_equal(first.video, other.video)
    assert first.video.shape == (3, 64, 64, 3) and first.points.shape == (8, 3, 2) and first.depth.shape == (3, 64, 64)
    assert (~first.occluded).any(1).all()


def test_photo_clips_move():
    pytest.importorskip("skimage")
    (clip,) = photo_clips(1, frames=4, points=32)
    travelled = np.linalg.norm(clip.points[:, -1] - clip.points[:, 0], axis=-1)
    assert np.median(travelled) > 2


def test_cell_targets_average_to_the_point():
    points = torch.rand(500, 2) * torch.tensor([7.0, 5.0]) + 0.5
    cells, weights = cell_targets(points, height=6, width=8)
    centres = torch.stack([cells % 8 + 0.5, cells // 8 + 0.5], -1)
    torch.testing.assert_close((centres * weights[..., None]).sum(-2), points)
    cells, weights = cell_targets(torch.tensor([[-3.0, 0.2], [20.0, 20.0]]), height=6, width=8)
    assert cells.min() >= 0 and cells.max() < 48
    assert cells[0][weights[0].argmax()] == 0 and cells[1][weights[1].argmax()] == 47


def small_model():
    torch.manual_seed(0)
    return ChronoNano(dim=32, depth=2, num_heads=2, local_dim=16, out_dim=16)


def test_every_parameter_learns():
    model = small_model()
    for module in (*model.adapter, model.local_adapter):
        torch.nn.init.normal_(module.conv2.weight, std=0.05)
    video, queries, points, occluded = (tensor[None] for tensor in GeneratedClips(PLAN)[0])
    losses = tracking_loss(model, model.features(video), queries, points, occluded)
    losses["total"].backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []


def test_perfect_features_have_a_small_loss():
    """One-hot features of a still scene: the loss of the right tracks is near zero, that of shifted ones is not."""
    model = small_model()
    features = torch.eye(64 * 64)[None, None].view(1, 1, 64, 64, 4096).expand(1, 2, -1, -1, -1)
    queries = torch.tensor([[[0.0, 102.0, 202.0]]])
    still = torch.tensor([202.0, 102.0]).expand(1, 1, 2, 2)
    occluded = torch.zeros(1, 1, 2, dtype=torch.bool)
    right = tracking_loss(model, features, queries, still, occluded)
    wrong = tracking_loss(model, features, queries, still + torch.tensor([8.0, 0.0]), occluded)
    assert right["cells"] < 1e-4 and right["points"] < 1e-4 and right["within4"] == 1
    assert wrong["cells"] > 10 and wrong["points"] > 5 and wrong["within4"] == 0


@pytest.mark.slow
def test_an_interrupted_run_resumes_to_the_same_weights(tmp_path):
    def stop(step, losses):
        if step == 3:
            raise KeyboardInterrupt

    whole = small_model()
    train(whole, tmp_path / "whole.safetensors", PLAN)
    with pytest.raises(KeyboardInterrupt):
        train(small_model(), tmp_path / "parts.safetensors", PLAN, save_every=2, report=stop)
    assert not (tmp_path / "parts.safetensors").exists()
    resumed, steps = small_model(), []
    train(resumed, tmp_path / "parts.safetensors", PLAN, report=lambda step, losses: steps.append(step))
    assert steps == [3, 4]
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    with safe_open(tmp_path / "parts.safetensors", "pt") as file:
        assert json.loads(file.metadata()["plan"])["steps"] == 4
    with pytest.raises(ValueError, match="another plan"):
        train(small_model(), tmp_path / "parts.safetensors", replace(PLAN, steps=5))


def test_a_damaged_checkpoint_says_to_delete_it(tmp_path):
    train(small_model(), tmp_path / "nano.safetensors", replace(PLAN, steps=1))
    checkpoint = tmp_path / "nano.checkpoint"
    whole = checkpoint.read_bytes()
    for content in (b"", whole[: len(whole) // 2], b"not a checkpoint\n"):
        checkpoint.write_bytes(content)
        with pytest.raises(ValueError, match="nano.checkpoint is damaged, .* delete it"):
            train(small_model(), tmp_path / "nano.safetensors", PLAN)
    checkpoint.write_bytes(whole)
    saved = torch.load(checkpoint)
    for name, other in (("model", {}), ("model", 3), ("optimiser", {"state": {}}), ("schedule", 3), ("step", "2")):
        torch.save({**saved, name: other}, checkpoint)
        with pytest.raises(ValueError, match="nano.checkpoint does not fit this training run .*: delete it"):
            train(small_model(), tmp_path / "nano.safetensors", replace(PLAN, steps=1))
    torch.save(small_model().state_dict(), checkpoint)
    with pytest.raises(ValueError, match="nano.checkpoint is no checkpoint of a training run: delete it"):
        train(small_model(), tmp_path / "nano.safetensors", PLAN)


def test_the_seed_decides_the_query_frames(monkeypatch):
    clip = generate_clip(0, frames=PLAN.frames, points=PLAN.points, speed=1.0)
    monkeypatch.setattr(loop, "generate_clip", lambda *_, **__: clip)

    def frames(seed, index):
        return GeneratedClips(replace(PLAN, seed=seed))[index][1][:, 0]

    # The packaged weights were trained with seed 0, whose draws are those of the clip's number.
    draw = torch.rand(clip.occluded.shape, generator=torch.Generator().manual_seed(1))
    assert torch.equal(frames(0, 1), draw.masked_fill(torch.from_numpy(clip.occluded), -1).argmax(-1).float())
    assert not torch.equal(frames(1, 1), frames(0, 1))
    assert not torch.equal(frames(1, 0), frames(0, 1))
    frames(2**64 - 1, 0)
