"""The scenes, cached clips, losses and training loop of nano."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open

from tritonkern.models import Nano, packaged
from tritonkern.models.nano import Step
from tritonkern.nn.correlation import TrackerOutput
from tritonkern.training import cache, refining
from tritonkern.training.cache import ClipCache
from tritonkern.training.refining import Examples, RefiningPlan, refining_loss, train_nano
from tritonkern.training.scenes import JointMotion, PlanarMotion, disturb, partly_blurred, training_clip
from tritonkern.training.synthetic import Layer, generate_clip, render, true_tracks

PLAN = RefiningPlan(steps=4, decay=2, warmup=2, first_clips=2, clips_per_step=0.5, clips=3, points=16, long_from=2)


def motion(seed, frames, place=(48.0, 48.0)):
    rng = np.random.default_rng(seed)
    return PlanarMotion(
        rng, frames, torch.tensor([96.0, 96.0]).double(), torch.tensor(place).double(), 0.5, turn=0.05, tilt=1e-3
    )


@pytest.mark.parametrize("joint", [False, True])
def test_forward_inverts_inverse(joint):
    moves = JointMotion(motion(1, 9), motion(2, 9, (96.0, 90.0))) if joint else motion(1, 9)
    texture = 60 + 70 * torch.rand(50, 2, dtype=torch.float64)
    screen = moves.forward(texture)
    torch.testing.assert_close(moves.inverse(screen), texture.expand(9, -1, -1), atol=1e-7, rtol=0)
    flat = motion(1, 9)
    flat.tilt = torch.zeros_like(flat.tilt)
    assert (flat.forward(texture) - motion(1, 9).forward(texture)).abs().max() > 1


def test_tracks_agree_with_the_picture():
    """A part on a body, painted with its own coordinates: the colour at a track is the same in every frame."""
    centres = (torch.arange(192) + 0.5) / 192
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    layer = Layer(torch.stack([x, y, x, torch.ones_like(x)]), JointMotion(motion(1, 8), motion(2, 8, (96.0, 90.0))))
    colour, shown = render([layer], 8, 96)
    points, occluded = true_tracks([layer], shown, 200, np.random.default_rng(1))
    spread = []
    for track, hidden in zip(points, occluded, strict=True):
        good = ~hidden & ((track > 1) & (track < 95)).all(-1)
        place = torch.from_numpy(track[good]) / 96 * 2 - 1
        read = (
            torch.nn.functional.grid_sample(colour[good], place[:, None, None], align_corners=False)[:, :2, 0, 0] * 192
        )
        if len(read) > 1:
            spread.append(float(np.ptp(read.numpy(), axis=0).max()))
    assert len(spread) > 100 and np.quantile(spread, 0.9) < 0.05


@pytest.mark.slow
def test_scenes_are_a_function_of_their_seed():
    first, again, other = (training_clip(seed, frames=2, points=8) for seed in ((0, 1), (0, 1), (0, 2)))
    assert np.array_equal(first.video, again.video) and np.array_equal(first.points, again.points)
    assert not np.array_equal(first.video, other.video)
    assert first.video.shape == (2, 256, 256, 3) and first.video.dtype == np.uint8
    assert (~first.occluded).any(1).all() and np.isfinite(first.points).all()


@pytest.mark.slow
def test_more_objects_hide_more():
    few, many = (
        np.mean([training_clip((3, i), frames=12, points=256, objects=n).occluded.mean() for i in range(3)])
        for n in ((1, 2), (12, 13))
    )
    # 4 % and 9 % of the points: clips differ, and in a few frames little is hidden by anything.
    assert many > 1.5 * few


def test_disturbed_frames_keep_their_shape_and_differ():
    colour = torch.rand(3, 3, 64, 64)
    plain = (colour * 255).round().byte().movedim(1, -1).numpy()
    changed = [disturb(colour, np.random.default_rng(seed)) for seed in range(8)]
    assert all(video.shape == plain.shape and video.dtype == np.uint8 for video in changed)
    assert all(np.abs(video.astype(float) - plain).mean() > 0.5 for video in changed)


def test_partly_blurred_surfaces_are_smoother():
    def roughness(make):
        return np.mean([make(np.random.default_rng(i), 128).diff(dim=-1).abs().mean().item() for i in range(6)])

    assert roughness(partly_blurred) < 0.8 * roughness(refining_texture())


def refining_texture():
    from tritonkern.training.textures import procedural_texture

    return procedural_texture


@pytest.fixture
def small(monkeypatch):
    """Clips of six frames, whose features are cheap."""
    for module in (cache, refining):
        monkeypatch.setattr(module, "CLIP_FRAMES", 6)
    monkeypatch.setattr(
        cache, "training_clip", lambda seed, frames, texture: generate_clip(seed, frames=frames, points=64)
    )
    monkeypatch.setattr(Nano, "cells", lambda self, video: cheap_features(video))


def cheap_features(video):
    cells = video.unflatten(2, (64, 4)).unflatten(4, (64, 4)).flatten(-1)
    cells = torch.cat([cells.mean((3, 5)), cells.std((3, 5))], -1)
    return torch.nn.functional.normalize(cells.repeat(1, 1, 1, 1, 22)[..., :128], dim=-1)


def test_cached_clips_are_read_as_they_were_made(small, tmp_path):
    store = ClipCache(tmp_path, 5, 1, cheap_features)
    whole, part = store.read(0, 0, 6), store.read(0, 1, 6, 2)
    clip = generate_clip((5, 0), frames=6, points=64)
    assert np.array_equal(whole.video.numpy(), clip.video) and np.array_equal(whole.occluded.numpy(), clip.occluded)
    torch.testing.assert_close(part.features, whole.features[1::2])
    assert torch.equal(part.points, whole.points[:, 1::2])
    stamp = store.path(0).stat().st_mtime_ns
    store.read(0, 0, 6)
    assert store.path(0).stat().st_mtime_ns == stamp


def test_examples_ask_about_visible_points(small, tmp_path):
    plan = replace(PLAN, steps=6)
    examples = Examples(plan, ClipCache(tmp_path, plan.seed, plan.soft_from, cheap_features))
    assert len(examples) == 12
    lengths = set()
    for index in range(len(examples)):
        video, features, queries, points, occluded = examples[index]
        again = examples[index]
        assert torch.equal(video, again.video) and torch.equal(queries, again.queries)
        lengths.add(len(video))
        assert len(features) == len(video) == points.shape[1]
        own = queries[:, 0].long()
        rows = torch.arange(len(queries))
        seen = ~occluded.all(1)
        assert not occluded[rows, own][seen].any()
        torch.testing.assert_close(points[rows, own], queries[:, [2, 1]])
    assert lengths == {3, 6}


def test_the_loss_of_the_truth_is_small():
    torch.manual_seed(0)
    points = 40 + 100 * torch.rand(1, 5, 4, 2)
    occluded = torch.zeros(1, 5, 4, dtype=torch.bool)
    occluded[0, 0, 2] = True
    queries = torch.cat([torch.zeros(1, 5, 1), points[:, :, 0].flip(-1)], -1)
    sharp = torch.full((1, 5, 4, 3, 49), -20.0)
    sharp[..., 24] = 20
    logit = torch.where(occluded, 12.0, -12.0)
    right = Step(TrackerOutput(points, logit, torch.full_like(logit, -12.0)), points, sharp)
    losses = refining_loss([right._replace(logits=None), right], queries, points, occluded)
    assert losses["total"] < 0.05 and losses["within1"] == 1
    off = right._replace(output=right.output._replace(tracks=points + torch.tensor([10.0, 0.0])))
    assert refining_loss([off], queries, points, occluded)["points"] > 2
    assert (
        refining_loss([right._replace(output=right.output._replace(occlusion=-logit))], queries, points, occluded)[
            "occlusion"
        ]
        > 5
    )
    # 4 pixels to the right are two cells of the finest map, and one of the middle one
    moved = right._replace(start=points - torch.tensor([4.0, 0.0]))
    assert refining_loss([moved], queries, points, occluded)["cells"] > 50
    # A position that is wrong where the point is hidden costs a tenth.
    hidden = points.clone()
    hidden[0, 0, 2] += 50
    cost = refining_loss([right._replace(output=right.output._replace(tracks=hidden))], queries, points, occluded)[
        "points"
    ]
    hidden[0, 0, 2] -= 50
    hidden[0, 0, 3] += 50
    seen = refining_loss([right._replace(output=right.output._replace(tracks=hidden))], queries, points, occluded)[
        "points"
    ]
    assert 0.05 < cost / seen < 0.2


@pytest.mark.slow
def test_an_interrupted_run_resumes_to_the_same_weights(small, tmp_path):
    def stop(step, losses):
        if step == 3:
            raise KeyboardInterrupt

    def model():
        torch.manual_seed(0)
        return Nano.from_chrono(packaged("chrono-nano"))

    whole = model()
    before = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    train_nano(whole, tmp_path / "whole.safetensors", tmp_path / "clips", PLAN)
    changed = {
        name.split(".")[0] for name, tensor in whole.state_dict().items() if not torch.equal(tensor, before[name])
    }
    assert changed == {"fine", "refiner"}
    with pytest.raises(KeyboardInterrupt):
        train_nano(model(), tmp_path / "parts.safetensors", tmp_path / "clips", PLAN, save_every=2, report=stop)
    resumed, steps = model(), []
    train_nano(
        resumed, tmp_path / "parts.safetensors", tmp_path / "clips", PLAN, report=lambda step, _: steps.append(step)
    )
    assert steps == [3, 4]
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    # safetensors writes its metadata in no fixed order.
    with (
        safe_open(tmp_path / "whole.safetensors", "pt") as whole_file,
        safe_open(tmp_path / "parts.safetensors", "pt") as parts_file,
    ):
        assert whole_file.metadata() == parts_file.metadata()
        assert set(whole_file.keys()) == set(parts_file.keys())
        for name in whole_file.keys():
            assert torch.equal(whole_file.get_tensor(name), parts_file.get_tensor(name)), name
    Nano.from_checkpoint(tmp_path / "whole.safetensors")
    # The rate has fallen: the run cannot be prolonged any more. Nor can another plan go on with it.
    for other in (replace(PLAN, steps=9), replace(PLAN, points=8)):
        with pytest.raises(ValueError, match="belongs to another plan"):
            train_nano(model(), tmp_path / "whole.safetensors", tmp_path / "clips", other)


def test_a_run_can_be_prolonged_before_the_rate_falls():
    long, short = replace(PLAN, steps=40, decay=10), replace(PLAN, steps=20, decay=10)
    assert [long.rate(step) for step in range(1, 11)] == [short.rate(step) for step in range(1, 11)]
    assert long.rate(1) == 0.5e-3 and long.rate(30) == 1e-3 and long.rate(40) == pytest.approx(1e-4)
    saved = {"plan": short.__dict__, "step": 10}
    refining._check_same_plan(saved, long, "nano.checkpoint")
    with pytest.raises(ValueError, match="another plan \\(steps 20\\)"):
        refining._check_same_plan({**saved, "step": 11}, long, "nano.checkpoint")
