"""difftrack-nano: its training, and the trial that shows how matching emerges from denoising."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors.torch import load_file

from tritonkern import query_key_matching
from tritonkern.models import CogVideoX, DiffTrackNano, build_model
from tritonkern.training.denoising import (
    DenoisingClips,
    DenoisingPlan,
    denoising_loss,
    moving_textures,
    train_denoiser,
)

PLAN = DenoisingPlan(steps=2, textures=1, drifts=0, rendered=1, warmup=1)


def test_clips():
    lengths = set()
    for step in range(14):
        clips = DenoisingClips(DenoisingPlan(steps=14, textures=0, drifts=0, rendered=1))[step]
        lengths.add(clips.shape[1])
        assert clips.shape == (8 // clips.shape[1], clips.shape[1], 3, 64, 64)
        assert clips.abs().max() <= 2 and 0.2 < clips.std() < 2
    assert lengths == {2, 4, 8} and torch.equal(
        clips, DenoisingClips(DenoisingPlan(steps=15, textures=0, drifts=0, rendered=1))[13]
    )


def test_the_model_sees_frames_as_in_training():
    """White is 2 in training clips, and so it is in tracking."""
    model = DiffTrackNano()
    video = torch.ones(1, 2, 256, 256, 3)
    torch.testing.assert_close(model.features(video), torch.full((1, 2, 64, 64, 3), 2.0))


def test_learning_rate():
    plan = DenoisingPlan(steps=1000, warmup=10)
    rates = [plan.rate(step) / plan.learning_rate for step in (1, 10, 500, 750, 875, 1000)]
    assert rates == pytest.approx([0.1, 1, 1, 1, 0.5, 0.01])


@pytest.mark.slow
def test_an_interrupted_run_continues(tmp_path):
    def run(name, stop=None):
        torch.manual_seed(0)
        model = DiffTrackNano().transformer

        def report(step, losses):
            assert 0 < losses["loss"] < 20
            if step == stop:
                raise KeyboardInterrupt

        train_denoiser(model, tmp_path / name, PLAN, save_every=1, report=report)

    run("whole.safetensors")
    with pytest.raises(KeyboardInterrupt):
        run("parts.safetensors", stop=2)
    assert not (tmp_path / "parts.safetensors").exists()
    run("parts.safetensors")
    whole, parts = (load_file(tmp_path / f"{name}.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert sum(x.numel() * 2 for x in whole.values()) < 10e6
    for plan, message in (
        (DenoisingPlan(steps=2), "belongs to another plan"),
        (replace(PLAN, steps=1), "steps must be 2 or more, which .*parts.checkpoint has behind it, got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            train_denoiser(DiffTrackNano().transformer, tmp_path / "parts.safetensors", plan)

    model = build_model("difftrack-nano", tmp_path / "whole.safetensors")
    video = torch.rand(1, 10, 256, 256, 3) * 2 - 1
    output = model(video, torch.tensor([[[0.0, 100.0, 50.0], [9.0, 1.0, 255.0]]]))
    assert output.tracks.shape == (1, 2, 10, 2) and output.tracks.isfinite().all()
    assert output.tracks[0, 0, 0].tolist() == [50.0, 100.0]


def test_packaged_weights():
    """Cells of a texture that moves by a cell are found by the packaged weights, and not by untrained ones."""
    clips, moves = moving_textures(4, torch.Generator().manual_seed(5), patch=4)
    cell = torch.arange(CELLS**2)
    want = (cell // CELLS + moves[:, :1]) % CELLS * CELLS + (cell % CELLS + moves[:, 1:]) % CELLS

    def right(model):
        pairs = model.transformer.query_key(clips, torch.zeros(4, 1, 8), torch.full((4,), 20.0), [2, 3])
        query, key = (torch.cat(x, -1) for x in zip(*pairs, strict=True))
        match = query_key_matching(query, key, grid=(CELLS, CELLS))
        return (match.index[:, 1] == want).float().mean()

    model = build_model("difftrack-nano")
    with torch.no_grad():
        assert right(model) > 0.9 and right(model.ablations()["difftrack-nano, untrained"]) < 0.1


@pytest.mark.parametrize("pixels", [8, 24])
def test_moves_by_half_a_cell(pixels):
    """They are found in a finer grid, of which the passes over displaced frames are a part each."""
    generator = torch.Generator().manual_seed(0)
    waves = F.pad(torch.randn(1, 3, 32, 32, generator=generator), (2,) * 4, mode="circular")
    image = F.interpolate(waves, scale_factor=8, mode="bicubic")[0, :, 16:-16, 16:-16].clamp(-2, 2) / 2
    video = rearrange([image, image.roll(pixels, -1)], "t c h w -> 1 t h w c")
    queries = torch.cartesian_prod(torch.zeros(1), torch.arange(40.0, 220, 12), torch.arange(40.0, 180, 12))[None]

    def found(model):
        tracks = model.track(model.features(video), queries).tracks[0, :, 1]
        return ((tracks - queries[0, :, [2, 1]] - torch.tensor([pixels, 0])).norm(dim=-1) < 4).float().mean()

    model = build_model("difftrack-nano")
    coarse = DiffTrackNano(radius=1.5, oversampling=1).eval()
    coarse.transformer.load_state_dict(model.transformer.state_dict())
    assert found(model) > 0.95 and found(coarse) < 0.2


def test_oversampling_is_checked():
    with pytest.raises(ValueError, match="oversampling must be 1 or 2, by which the patch of 4 pixels divides, got 3"):
        DiffTrackNano(oversampling=3)


def test_weights_are_asked_for(tmp_path):
    with pytest.raises(ValueError, match="give the path of a folder of CogVideoX-2B or -5B"):
        build_model("difftrack")
    with pytest.raises(FileNotFoundError, match="does not exist or is not a folder"):
        build_model("difftrack", tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match="holds no transformer"):
        build_model("difftrack", tmp_path)


FRAMES, SIZE, CELLS = 2, 16, 8


@torch.no_grad()
def matched(model, noise):
    """Percent of cells whose match is the true one, by layer: of query-key, and of the output of the attention."""
    generator = torch.Generator().manual_seed(11)
    clips, moves = moving_textures(32, generator)
    clips = (1 - noise) * clips + noise * torch.randn(clips.shape, generator=generator)
    features = []
    hooks = [
        block.attn1.to_out[0].register_forward_pre_hook(lambda _, x: features.append(x[0]))
        for block in model.transformer_blocks
    ]
    text, time = torch.zeros(32, 1, 8), torch.full((32,), 1000 * noise)
    model(clips, text, time)
    for hook in hooks:
        hook.remove()
    cell = torch.arange(CELLS**2)
    row, column = cell // CELLS, cell % CELLS
    want = (row + moves[:, :1]) % CELLS * CELLS + (column + moves[:, 1:]) % CELLS
    table = []
    for (query, key), feature in zip(model.query_key(clips, text, time, range(3)), features, strict=True):
        match = query_key_matching(query, key, grid=(CELLS, CELLS)).index[:, 1]
        first, second = feature[:, 1:].unflatten(1, (FRAMES, -1)).unbind(1)
        by_feature = (first @ second.transpose(1, 2)).argmax(-1)
        table.append([100 * (found == want).float().mean().item() for found in (match, by_feature)])
    return torch.tensor(table)


@pytest.mark.slow
def test_matching_emerges_from_denoising():
    """A CogVideoX of 0.3 M parameters that learns to denoise two frames finds the cells of one in the other."""
    torch.manual_seed(0)
    model = CogVideoX(
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=3,
        out_channels=3,
        time_embed_dim=64,
        text_embed_dim=8,
        num_layers=3,
        sample_width=SIZE,
        sample_height=SIZE,
        sample_frames=5,
        max_text_seq_length=1,
    )
    assert matched(model, 0.02)[:, 0].max() < 6  # chance is 1.6
    optimiser = torch.optim.AdamW(model.parameters(), 2e-3, (0.9, 0.99), weight_decay=0.0)
    generator = torch.Generator().manual_seed(1)
    for step in range(1200):
        clips, _ = moving_textures(16, generator)
        for group in optimiser.param_groups:
            group["lr"] = 2e-3 * min(1.0, step / 100)
        optimiser.zero_grad()
        denoising_loss(model, clips, 0.5, generator).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
    low, high = matched(model, 0.02), matched(model, 0.95)
    print(low, high)
    best = int(low[:, 0].argmax())
    assert low[best, 0] > 80 and low[best, 0] > low[best, 1]
    assert high[:, 0].max() < 20
