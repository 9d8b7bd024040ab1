"""DiffTrack: schedule of passes, sub-cell positions, tracking on planted matches, folders, bad input."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from test_cogvideox import SIZES

from tritonkern.models import CogVideoX, DiffTrack, Preset, preset_of, schedule
from tritonkern.models._cells import Corners, locate


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("frames", [1, 2, 12, 13, 24, 25, 50, 250])
def test_schedule(frames, interleaved):
    for first in {0, frames // 2, frames - 1}:
        chunks = schedule(frames, first=first, interleaved=interleaved)
        assert all(chunk[0] == first and 2 <= len(chunk) <= 13 and len(set(chunk)) == len(chunk) for chunk in chunks)
        assert {first}.union(*chunks) == set(range(frames))
        assert len(chunks) >= math.ceil((frames - 1) / 12)
        assert interleaved or len(chunks) == math.ceil((frames - 1) / 12)


def test_schedule_as_published():
    chunks = schedule(50)
    assert len(chunks) == 5 and chunks[0] == [0, *range(1, 46, 4)] and chunks[4] == [0, *range(5, 50, 4)]
    assert schedule(13) == [list(range(13))] and schedule(1) == []
    assert schedule(24)[1] == [0, *range(2, 24, 2)]
    with pytest.raises(ValueError, match="first must be a frame from 0 to 4"):
        schedule(5, first=5)
    with pytest.raises(ValueError, match="length must be 2 or more"):
        schedule(5, length=1)


def test_positions_as_published():
    """Bilinear samples of the map of best cells, zero outside, on the stretched grid."""
    h, w, height, width = 30, 45, 480, 720
    torch.manual_seed(0)
    best = torch.randint(0, h * w, (h * w,))
    places = torch.rand(200, 2) * torch.tensor([width, height])
    corners = Corners.of(places, (h, w), (height, width), "zeros")
    points = torch.stack([best % w + 0.5, best // w + 0.5], -1)
    found = corners.blend(points[corners.cells][None].float())[:, 0]
    targets = torch.stack([best % w, best // w]).float().view(1, 2, h, w)
    margin = width / (64 * 16)
    place = places / 16 * torch.tensor([(w - 1) / (w - margin), (h - 1) / (h - margin)])
    grid = 2 * place / torch.tensor([w - 1, h - 1]) - 1
    expected = 16 * F.grid_sample(targets, grid[None, None], mode="bilinear", align_corners=True)[0, :, 0].T
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-5)
    # Another border moves some of these points.
    other = Corners.of(places, (h, w), (height, width), "border").blend(points[corners.cells][None].float())[:, 0]
    assert (other - found).norm(dim=-1).max() > 0.1


def test_cells_that_match_themselves_do_not_move_a_point():
    places = torch.tensor([[0.0, 0.0], [3.0, 17.0], [63.9, 47.0], [31.2, 20.7]])
    corners = Corners.of(places, (6, 8), (48, 64), "border")
    points = torch.stack([corners.cells % 8 + 0.5, corners.cells // 8 + 0.5], -1)
    torch.testing.assert_close(corners.blend(points[None])[:, 0], places)


class Rolled(torch.nn.Module):
    """In place of a transformer: queries and keys are the cells themselves, sharpened."""

    text_dim, transformer_blocks, num_heads = 4, [None] * 3, 2

    def grid(self, latents):
        return latents.shape[-2:]

    def query_key(self, latents, text, timestep, layers, heads=None):
        heads = latents.flatten(3).transpose(2, 3).unflatten(-1, (2, -1))
        return [(20 * F.normalize(heads, dim=-1),) * 2 for _ in layers]


def planted(frames, speed=1, cells=(6, 8)):
    """A video of random cells that move by whole cells of 8 pixels, and a tracker that sees them."""
    torch.manual_seed(0)
    first = torch.randn(16, *cells)
    moved = torch.stack([first.roll((t * speed, t * speed), (1, 2)) for t in range(frames)])
    return moved.permute(0, 2, 3, 1)[None]


@pytest.mark.parametrize("options", [dict(), dict(average=True), dict(interleaved=False, radius=1.5)], ids=str)
@pytest.mark.parametrize("frames", [2, 5, 30])
def test_tracks_planted_motion(frames, options):
    model = DiffTrack(Rolled(), preset=Preset((1,), (19.0,), 1.0, 13), resolution=(48, 64), **options)
    latents = planted(frames)
    own = frames // 2
    queries = torch.tensor([[0.0, 20.0, 20.0], [own, 28.0, 36.0]])[None]
    output = model.track(latents, queries)
    for row, (t, y, x) in enumerate(queries[0].tolist()):
        time = torch.arange(frames) - t
        expected = torch.stack([(x + 8 * time) % 64, (y + 8 * time) % 48], -1)
        whole = ((expected - 4) % 8 == 0).all(-1)
        assert whole.all()
        torch.testing.assert_close(output.tracks[0, row], expected, atol=0.05, rtol=0)
    assert output.visible.all()


def test_a_cell_that_disappears_is_hidden():
    preset = Preset((1,), (19.0,), 1.0, 13)
    latents = planted(4, speed=0)
    latents[0, 2, 3, 3] = latents[0, 2, 5, 7]  # what is found instead leads back to another cell
    query = torch.tensor([[[0.0, 28.0, 28.0]]])
    model = DiffTrack(Rolled(), preset=preset, resolution=(48, 64))
    assert model.track(latents, query).visible[0, 0].tolist() == [True, True, False, True]
    everything = DiffTrack(Rolled(), preset=preset, resolution=(48, 64), visibility="all")
    assert everything.track(latents, query).visible.all()


def test_one_pass_for_all_queries_of_a_frame(monkeypatch):
    model = DiffTrack(Rolled(), preset=Preset((1,), (19.0,), 1.0, 13), resolution=(48, 64))
    calls = []
    inner = Rolled.query_key
    monkeypatch.setattr(Rolled, "query_key", lambda self, *x: calls.append(x[0].shape[1]) or inner(self, *x))
    queries = torch.cat([torch.zeros(1, 9, 1), 48 * torch.rand(1, 9, 2)], -1)
    model.track(planted(13), queries)
    assert calls == [13]


def test_features_are_the_pixels_or_latents():
    video = torch.rand(1, 3, 48, 64, 3) * 2 - 1
    preset = Preset((1,), (19.0,), 1.0, 13)
    assert torch.equal(DiffTrack(Rolled(), preset=preset, resolution=(48, 64)).features(video), video)
    small = DiffTrack(Rolled(), preset=preset, resolution=(48, 64), pixels=(6, 8)).features(video)
    assert small.shape == (1, 3, 6, 8, 3)


def test_locate_is_the_operation():
    from tritonkern import query_key_cost, query_key_matching

    torch.manual_seed(0)
    query, key = torch.randn(2, 1, 2, 12, 2, 8)
    cost = query_key_cost(query, key, cells=None)[0, 1]
    for radius in (None, 1.5, math.inf):
        match = query_key_matching(query, key, grid=(3, 4), radius=radius)
        torch.testing.assert_close(locate(cost, (3, 4), radius), match.points[0, 1])


def test_presets():
    with torch.device("meta"):
        assert preset_of(CogVideoX()) == Preset((17,), (19.0,), None, 13)
        assert preset_of(CogVideoX(), official_scale=True).scale == 30**-0.5
        with pytest.raises(ValueError, match="none is published for 2 heads and 3 layers"):
            preset_of(CogVideoX(**SIZES))
        with pytest.raises(ValueError, match=r"preset has layers \[3\]; the transformer has 3"):
            DiffTrack(CogVideoX(**SIZES), preset=Preset((3,), (19.0,), None, 13))


@pytest.fixture
def folder(tmp_path):
    """A tiny pipeline as diffusers writes it, with a prompt."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    diffusers.CogVideoXTransformer3DModel(**SIZES).save_pretrained(tmp_path / "transformer")
    diffusers.AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8), norm_num_groups=4, layers_per_block=1, latent_channels=4
    ).save_pretrained(tmp_path / "vae")
    save_file({"prompt_embeds": torch.randn(1, 5, 12)}, tmp_path / "prompt_embeds.safetensors")
    return tmp_path


def test_folder(folder):
    model = DiffTrack.from_folder(folder, preset=Preset((1,), (19.0,), None, 3))
    video = torch.rand(1, 5, 480, 720, 3)[:, :, :64, :96] * 2 - 1
    model.resolution = model.pixels = (64, 96)
    latents = model.features(video)
    assert latents.shape == (1, 5, 8, 12, 4)
    # Each frame alone, scaled.
    alone = model.vae.encode(video[:, 2:3].permute(0, 4, 1, 2, 3)).latent_dist.mode()[0, :, 0].permute(1, 2, 0)
    torch.testing.assert_close(latents[0, 2], alone * model.vae.config.scaling_factor)
    output = model.track(latents, torch.tensor([[[1.0, 20.0, 30.0]]]))
    assert output.tracks.isfinite().all() and output.tracks.shape == (1, 1, 5, 2)
    (folder / "prompt_embeds.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="neither prompt_embeds.safetensors.*nor the folders text_encoder"):
        DiffTrack.from_folder(folder)
    (folder / "vae" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="holds no vae"):
        DiffTrack.from_folder(folder)
    config = json.loads((folder / "transformer" / "config.json").read_text())
    (folder / "transformer" / "config.json").write_text(json.dumps(config | {"patch_size_t": 2}))
    with pytest.raises(ValueError, match="patch_size_t = 2"):
        DiffTrack.from_folder(folder)


def test_published_choices(folder):
    """`official` changes latents and positions, each option by itself."""
    preset = Preset((1,), (19.0,), 0.7, 3)
    official = DiffTrack.from_folder(folder, official=True, preset=preset)
    assert (official.border, official.visibility, official.sample, official.scaled) == ("zeros", "all", True, True)
    with pytest.raises(ValueError, match="none is published"):
        DiffTrack.from_folder(folder, official=True)
    video = torch.rand(1, 1, 64, 96, 3) * 2 - 1
    official.pixels = (64, 96)
    first, second = official.features(video), official.features(video)
    assert not torch.equal(first, second)
    official.generator.manual_seed(42)
    assert torch.equal(official.features(video), first)


def test_noise(folder):
    diffusers = pytest.importorskip("diffusers")
    with pytest.raises(ValueError, match="noise needs a scheduler"):
        DiffTrack.from_folder(folder, noise=True, preset=Preset((1,), (19.0,), None, 3))
    diffusers.CogVideoXDDIMScheduler().save_pretrained(folder / "scheduler")
    generator = torch.Generator().manual_seed(1)
    model = DiffTrack.from_folder(folder, noise=True, generator=generator, preset=Preset((1,), (319.0,), None, 3))
    latents = torch.randn(1, 3, 4, 8, 12)
    query, key = model.query_key(latents)
    generator.manual_seed(1)
    noise = torch.randn(latents.shape, generator=generator)
    share = model.scheduler.alphas_cumprod[319]
    ((expected, _),) = model.transformer.query_key(
        share.sqrt() * latents + (1 - share).sqrt() * noise, model.prompt, torch.tensor([319.0]), [1]
    )
    torch.testing.assert_close(query, expected)


def test_hunyuan_video(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    from test_video_dit import hunyuan

    torch.manual_seed(0)
    original = hunyuan()[0]
    original.save_pretrained(tmp_path / "transformer")
    diffusers.AutoencoderKLHunyuanVideo(
        block_out_channels=(8, 8, 8, 8), norm_num_groups=4, layers_per_block=1, latent_channels=4
    ).save_pretrained(tmp_path / "vae")
    with pytest.raises(FileNotFoundError, match="must hold prompt_embeds and pooled_prompt_embeds"):
        DiffTrack.from_folder(tmp_path)
    save_file({"prompt_embeds": torch.randn(1, 6, 16)}, tmp_path / "prompt_embeds.safetensors")
    with pytest.raises(ValueError, match=r"must hold prompt_embeds \[1, L, C\] and pooled_prompt_embeds \[1, C\]"):
        DiffTrack.from_folder(tmp_path)
    prompt = {"prompt_embeds": torch.randn(1, 6, 16), "pooled_prompt_embeds": torch.randn(1, 8)}
    save_file(prompt, tmp_path / "prompt_embeds.safetensors")
    preset = Preset((2,), (200.0,), None, 4)
    with pytest.raises(ValueError, match=r"none is published for 2 heads and 3 layers.*HunyuanVideo \(24 and 60\)"):
        DiffTrack.from_folder(tmp_path)
    model, official = (DiffTrack.from_folder(tmp_path, official=x, preset=preset, sample=False) for x in (False, True))
    model.pixels = official.pixels = (32, 48)
    video = torch.rand(1, 5, 32, 48, 3) * 2 - 1
    latents = model.features(video)
    # Published are unscaled latents.
    torch.testing.assert_close(official.features(video) * model.vae.config.scaling_factor, latents)
    output = model.track(latents, torch.tensor([[[3.0, 200.0, 300.0]]]))
    assert output.tracks.shape == (1, 1, 5, 2) and output.tracks.isfinite().all()
    # The queries are those of the published model's own attention.
    from tritonkern.integrations.video_dit import watch

    clip = latents.permute(0, 1, 4, 2, 3)[:, :3]
    with torch.no_grad(), watch(original.eval(), [2]) as seen:
        original(
            clip.transpose(1, 2),
            torch.tensor([200.0]),
            prompt["prompt_embeds"],
            torch.ones(1, 6),
            prompt["pooled_prompt_embeds"],
            torch.tensor([6000.0]),
        )
    assert torch.equal(model.query_key(clip)[0], seen[2].query)


def test_damaged_weights_of_the_vae(folder):
    file = next((folder / "vae").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="the weights of .*vae cannot be read"):
        DiffTrack.from_folder(folder, preset=Preset((1,), (19.0,), None, 3))


def test_bad_input():
    preset = Preset((1,), (19.0,), 1.0, 13)
    model = DiffTrack(Rolled(), preset=preset, resolution=(48, 64))
    query = torch.zeros(1, 1, 3)
    with pytest.raises(ValueError, match="video must have two frames or more, got 1"):
        model.track(planted(1), query)
    latents = planted(3)
    latents[0, 1, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="features must be finite"):
        model.track(latents, query)
    for options, message in ((dict(border="wrap"), "border must be"), (dict(visibility="some"), "visibility must be")):
        with pytest.raises(ValueError, match=message):
            DiffTrack(Rolled(), preset=preset, **options)
