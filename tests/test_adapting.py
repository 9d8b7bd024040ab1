"""Training of DiTracker: losses, examples, adapters with and without checkpoints, frozen weights, resuming."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from tritonkern.models import DiTrackerNano, packaged
from tritonkern.models.low_rank import add_low_rank, attention_targets, low_rank_parameters
from tritonkern.nn.correlation import TrackerOutput
from tritonkern.training import AdaptingPlan, adapting, train_ditracker
from tritonkern.training.adapting import Example, Examples, adapt
from tritonkern.training.losses import iteration_losses

PLAN = AdaptingPlan(steps=4, adapt_from=1, clips=1, frames=(2, 3), positions=12, iterations=2, rank=2)


@pytest.fixture
def short_clips(monkeypatch):
    monkeypatch.setattr(adapting, "CLIP_FRAMES", 5)


def model():
    torch.manual_seed(0)
    return DiTrackerNano.from_difftrack(packaged("difftrack-nano"))


def test_losses_point_by_point():
    """A loop over points, frames and iterations."""
    torch.manual_seed(1)
    points, occluded = 100 * torch.rand(2, 3, 4, 2), torch.rand(2, 3, 4) < 0.4
    steps = [
        TrackerOutput(points + 9 * torch.randn(2, 3, 4, 2), *(torch.randn(2, 3, 4) for _ in range(2))) for _ in range(3)
    ]
    expected = dict.fromkeys(("visible", "hidden", "visibility", "confidence"), 0.0)
    shown = int((~occluded).sum())
    for index, step in enumerate(steps):
        decay = 0.8 ** (2 - index) / 3
        for place in ((b, n, t) for b in range(2) for n in range(3) for t in range(4)):
            away = (step.tracks[place] - points[place]).abs()
            seen, sure = torch.sigmoid(-step.occlusion[place]), torch.sigmoid(-step.expected_distance[place])
            if occluded[place]:
                expected["hidden"] += decay * float(away.mean()) / (24 - shown)
                expected["visibility"] -= float((1 - seen).log()) / 24 / 3
                continue
            huber = torch.where(away <= 6, away**2 / 2, 6 * (away - 3))
            expected["visible"] += decay * float(huber.mean()) / shown
            expected["visibility"] -= float(seen.log()) / 24 / 3
            near = away.norm() <= 12
            expected["confidence"] -= float((sure if near else 1 - sure).log()) / 24 / 3
    losses = iteration_losses(steps, points, occluded)
    assert {name: float(losses[name]) for name in expected} == pytest.approx(expected, rel=1e-5)
    total = 0.05 * expected["visible"] + 0.01 * expected["hidden"] + expected["visibility"] + expected["confidence"]
    assert float(losses["total"]) == pytest.approx(total, rel=1e-5)


def test_examples_show_their_points(short_clips, tmp_path):
    """However a clip is mirrored, turned or reversed, the colour at a visible point stays that at its query."""
    plan = replace(PLAN, steps=12, frames=(3,), positions=150)
    examples = Examples(plan, tmp_path)
    for index in range(len(examples)):
        video, queries, points, occluded = examples[index]
        again = examples[index]
        assert all(torch.equal(x, y) for x, y in zip((video, queries, points, occluded), again, strict=True))
        own = queries[:, 0].long()
        rows = torch.arange(len(queries))
        assert len(queries) == 50 and not occluded[rows, own].any()
        torch.testing.assert_close(points[rows, own], queries[:, [2, 1]])
        colour = F.grid_sample(
            video.movedim(-1, 1).float(), points.transpose(0, 1)[:, :, None] / 128 - 1, align_corners=False
        )[..., 0].movedim(1, -1)  # [T, N, 3]
        away = (colour - colour[own, rows]).abs().mean(-1).T[~occluded]
        assert away.median() < 20, index


def test_adapters_have_the_same_gradients_with_checkpoints(short_clips, tmp_path):
    example = Examples(PLAN, tmp_path)[0]
    found = []
    for checkpointing in (False, True):
        tracker = model()
        transformer = tracker.encoder.transformer
        add_low_rank(transformer, attention_targets(2), 2, 2.0)
        parameters = low_rank_parameters(transformer)
        assert len(parameters) == 2 * (4 * 2 + 2)
        with torch.no_grad():
            for index, parameter in enumerate(parameters):
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
        transformer.checkpointing = checkpointing
        tracker.iterations = 2
        adapt(tracker, example, PLAN, adapters=True)["total"].backward()
        assert all(p.grad is None for p in transformer.parameters() if not any(p is q for q in parameters))
        found.append([p.grad for p in parameters])
    for plain, again in zip(*found, strict=True):
        assert plain.abs().max() > 0 and torch.equal(plain, again)


@pytest.mark.slow
def test_training_moves_what_learns_and_resumes_to_the_bit(short_clips, tmp_path):
    class Stop(Exception):
        pass

    def run(name, stop=None):
        tracker = model()

        def report(step, losses):
            if step == stop:
                raise Stop

        train_ditracker(tracker, tmp_path / name, tmp_path / "clips", PLAN, save_every=1, report=report)
        return tracker

    whole, before = run("whole.safetensors"), model()
    weights = before.state_dict()
    moved = {name for name, x in whole.state_dict().items() if not torch.equal(x, weights[name])}
    adapted = {f"encoder.transformer.{name}.weight" for name in attention_targets(2)}
    assert {name for name in moved if name.startswith("encoder.")} == adapted
    assert {name for name, _ in whole.head.named_parameters()} == {
        name.removeprefix("head.") for name in moved if name.startswith("head.")
    }
    with pytest.raises(Stop):
        run("parts.safetensors", stop=3)
    run("parts.safetensors")
    first, second = (load_file(tmp_path / name) for name in ("whole.safetensors", "parts.safetensors"))
    assert first.keys() == second.keys() == weights.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    with pytest.raises(ValueError, match="belongs to another plan"):
        train_ditracker(model(), tmp_path / "parts.safetensors", tmp_path / "clips", replace(PLAN, rank=4))
    loaded = DiTrackerNano.from_checkpoint(tmp_path / "whole.safetensors")
    with torch.no_grad():
        output = loaded(torch.zeros(1, 2, 256, 256, 3), torch.tensor([[[1.0, 20.0, 30.0]]]))
    assert output.tracks.shape == (1, 1, 2, 2)


@pytest.mark.slow
def test_the_loss_falls(short_clips, tmp_path):
    tracker, plan = model(), replace(PLAN, positions=24, frames=(3,))
    tracker.iterations = 2
    example = Example(*Examples(plan, tmp_path)[0])
    add_low_rank(tracker.encoder.transformer, attention_targets(2), 2, 2.0)
    parameters = [*tracker.head.parameters(), *low_rank_parameters(tracker.encoder.transformer)]
    optimiser = torch.optim.AdamW(parameters, 1e-3)
    losses = []
    for _ in range(25):
        optimiser.zero_grad()
        loss = adapt(tracker, example, plan, adapters=True)
        loss["total"].backward()
        optimiser.step()
        losses.append(loss)
    assert losses[-1]["total"] < 0.7 * losses[0]["total"] and losses[-1]["error"] < 0.8 * losses[0]["error"]
