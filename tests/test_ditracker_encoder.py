"""DiTracker's encoder: chunks, frames encoded alone, adapters, and the published encoder beside it."""

import ast
import sys
import types
import typing
from pathlib import Path

import pytest
import torch
from official import OFFICIAL_DIR
from test_cogvideox import SIZES
from torch import nn

from tritonkern.models import CogVideoX, add_low_rank, attention_targets, low_rank_parameters, merge_low_rank
from tritonkern.models.ditracker_encoder import CHUNK, DiTrackerEncoder

ROOT = Path(OFFICIAL_DIR or ".") / "DiTracker"
OPTIONS = dict(layer=1, head=1)


def transformer(adapted=True):
    torch.manual_seed(0)
    model = CogVideoX(**SIZES).eval()
    if adapted:
        add_low_rank(model, attention_targets(1), 3, 6.0)
        with torch.no_grad():
            for parameter in low_rank_parameters(model):
                parameter.normal_(std=0.3)
    return model


def vae():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(1)
    return diffusers.AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8), norm_num_groups=4, layers_per_block=1, latent_channels=4
    ).eval()


def prompt():
    return torch.randn(1, 5, 12, generator=torch.Generator().manual_seed(2))


def latents(frames, batch=1):
    return torch.randn(batch, frames, 4, 4, 6, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def test_chunks():
    """A pass by itself, or behind a copy of frame 0, whose own output is dropped."""
    model = transformer()
    encoder, clip = DiTrackerEncoder(model, prompt=prompt(), **OPTIONS), latents(28, batch=2)

    def alone(numbers):
        text, time = prompt().expand(2, -1, -1), torch.full((2,), 19.0)
        ((query, key),) = model.query_key(clip[:, numbers], text, time, [1])
        return query[:, :, :, 1].unflatten(2, (2, 3)), key[:, :, :, 1].unflatten(2, (2, 3))

    found = encoder.maps(clip[:, :CHUNK])
    assert found[0].shape == (2, CHUNK, 2, 3, 32)
    for x, y in zip(found, alone(list(range(CHUNK))), strict=True):
        torch.testing.assert_close(x, y)
    found = encoder.maps(clip)
    for first, last in ((0, 13), (13, 26), (26, 28)):
        for x, y in zip(found, alone([0, *range(first, last)]), strict=True):
            torch.testing.assert_close(x[:, first:last], y[:, 1:])
    # The place in time counts: the same frames pass with and without a copy of the first.
    assert (found[0][:, :CHUNK] - encoder.maps(clip[:, :CHUNK])[0]).abs().max() > 1e-3


def test_positions_are_made_once(monkeypatch):
    calls = []
    inner = CogVideoX.positions
    monkeypatch.setattr(CogVideoX, "positions", lambda self, *x: calls.append(x[:2]) or inner(self, *x))
    encoder = DiTrackerEncoder(transformer(), **OPTIONS)
    with torch.inference_mode():
        encoder.maps(latents(28))
        encoder.maps(latents(3))
    assert calls == [(14, (2, 3))]
    encoder.maps(latents(3))[0].sum().backward()  # what inference mode made serves training
    with torch.no_grad():
        encoder.maps(latents(3)[..., :4])
    assert calls == [(14, (2, 3)), (14, (2, 2))]


def test_frames_are_encoded_alone_and_once(monkeypatch):
    encoder = DiTrackerEncoder(transformer(), vae(), prompt=prompt(), **OPTIONS)
    video = torch.rand(2, 14, 32, 48, 3) * 2 - 1
    calls, inner = [], encoder.vae.encode
    monkeypatch.setattr(encoder.vae, "encode", lambda x: calls.append(x.shape) or inner(x))
    found = encoder.latents(video)
    assert calls == 28 * [(1, 3, 1, 32, 48)]
    with torch.no_grad():  # in [0, 1]
        alone = inner((video[1:2, 5:6] / 2 + 0.5).permute(0, 4, 1, 2, 3)).latent_dist.mode()[0, :, 0]
    torch.testing.assert_close(found[1, 5], alone * encoder.vae.config.scaling_factor)
    for x in encoder(video[:, :2]):
        assert x.shape == (2, 2, 2, 3, 32)


def test_sampled_latents():
    generator = torch.Generator()
    encoder = DiTrackerEncoder(transformer(), vae(), prompt=prompt(), sample=True, generator=generator, **OPTIONS)
    video = torch.rand(1, 2, 32, 48, 3)
    found = [encoder.latents(video) for _ in map(generator.manual_seed, (1, 1, 2))]
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    encoder.sample = False
    assert torch.equal(encoder.latents(video), encoder.latents(video))


def test_gradients_reach_the_adapters_only():
    model = transformer()
    encoder = DiTrackerEncoder(model, vae().requires_grad_(False), prompt=prompt(), **OPTIONS)
    query, key = encoder(torch.rand(1, 2, 32, 48, 3))
    (query.square().sum() + (query * key).sum()).backward()
    parameters = low_rank_parameters(model)
    assert all(x.grad is not None for x in parameters)
    assert sum(x.grad is not None for x in encoder.parameters()) == len(parameters)


@torch.no_grad()
def test_merged_adapters():
    model = transformer()
    encoder = DiTrackerEncoder(model, prompt=prompt(), **OPTIONS)
    before = encoder.maps(latents(3))
    merge_low_rank(model)
    for x, y in zip(encoder.maps(latents(3)), before, strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-4)


def test_the_prompt_is_in_no_state_dict():
    assert not [
        name for name in DiTrackerEncoder(transformer(), prompt=prompt(), **OPTIONS).state_dict() if "prompt" in name
    ]


@torch.no_grad()
def test_a_frame_that_is_not_finite():
    """It reaches all frames of its passes: attention joins them. Frame 0 is in every pass."""
    encoder, clip = DiTrackerEncoder(transformer(), **OPTIONS), latents(28)
    clip[0, 20] = torch.nan
    query, key = encoder.maps(clip)
    for x in (query, key):
        finite = x[0].flatten(1).isfinite().all(1)
        assert finite.tolist() == 13 * [True] + 13 * [False] + 2 * [True]


@torch.no_grad()
def test_bfloat16():
    """Under autocast, and with parameters of that dtype."""
    encoder = DiTrackerEncoder(transformer(), prompt=prompt(), **OPTIONS)
    exact = encoder.maps(latents(3))
    with torch.autocast("cpu", torch.bfloat16):
        found = encoder.maps(latents(3))
    converted = encoder.bfloat16().maps(latents(3).bfloat16())
    assert converted[0].dtype == torch.bfloat16
    for x, y in zip(found + converted, exact + exact, strict=True):
        assert 0 < (x - y).norm() / y.norm() < 0.05


def test_bad_input():
    encoder = DiTrackerEncoder(transformer(), vae(), **OPTIONS)
    for video, error, message in (
        (torch.zeros(1, 2, 40, 48, 3), ValueError, r"height and width that 16 divides, got \[40, 48\]"),
        (torch.zeros(1, 2, 32, 56, 3), ValueError, r"height and width that 16 divides, got \[32, 56\]"),
        (torch.zeros(1, 0, 32, 48, 3), ValueError, r"must be \[B, T, H, W, 3\], none of them 0"),
        (torch.zeros(1, 2, 3, 32, 48), ValueError, r"must be \[B, T, H, W, 3\], none of them 0"),
        (torch.zeros(1, 2, 32, 48, 3, dtype=torch.uint8), TypeError, r"floating point in \[-1, 1\], got torch.uint8"),
    ):
        with pytest.raises(error, match=message):
            encoder(video)
    channels = vae()
    channels.register_to_config(latent_channels=6)
    five = CogVideoX(**SIZES, use_rotary_positional_embeddings=True)
    for model, options, message in (
        (five, {}, "must be a CogVideoX-2B, got one with rotary positions and 2 heads"),
        (transformer(), {"layer": 3}, "layer must be from 0 to 2, got 3"),
        (transformer(), {"head": 2}, "head must be from 0 to 1, got 2"),
        (transformer(), {"vae": channels}, "vae must have the 4 channels of the transformer, got 6"),
        (transformer(), {"prompt": torch.zeros(1, 5, 13)}, r"prompt must be \[1, L, 12\], got \[1, 5, 13\]"),
    ):
        with pytest.raises(ValueError, match=message):
            DiTrackerEncoder(model, **(OPTIONS | options))


def published(model, autoencoder):
    """The published encoder with its fork's transformer, run in the place of the installed diffusers' file."""
    import diffusers.models.attention_processor as processors

    source = ROOT / "diffusers/src/diffusers/models"
    text = (source / "attention_processor.py").read_text()
    node = next(x for x in ast.parse(text).body if getattr(x, "name", None) == "CogVideoXAttnProcessor2_0")
    scope = vars(processors) | vars(typing)
    exec(ast.get_source_segment(text, node), scope)
    package = "diffusers.models.transformers"
    fork = {"__name__": f"{package}.fork", "__package__": package}
    module = sys.modules[fork["__name__"]] = types.ModuleType(fork["__name__"])
    try:
        exec((source / "transformers/cogvideox_transformer_3d.py").read_text(), fork)
    finally:
        del sys.modules[module.__name__]
    fork["CogVideoXAttnProcessor2_0"] = scope["CogVideoXAttnProcessor2_0"]
    theirs = fork["CogVideoXTransformer3DModel"](**SIZES).eval()
    theirs.load_state_dict(model.state_dict())

    path = ROOT / "cotracker/models/core/cotracker/feature_extractor.py"
    node = next(x for x in ast.parse(path.read_text()).body if getattr(x, "name", None) == "VDMEncoder")
    scope = {"torch": torch, "nn": nn, "rearrange": __import__("einops").rearrange}
    exec(ast.get_source_segment(path.read_text(), node), scope)
    encoder = scope["VDMEncoder"].__new__(scope["VDMEncoder"])
    nn.Module.__init__(encoder)
    encoder.transformer, encoder.vae, encoder.layer_hooks, encoder.head_hooks = theirs, autoencoder, [1], [1]
    encoder.scheduler = types.SimpleNamespace(init_noise_sigma=1.0, scale_model_input=lambda x, _: x)
    encoder.prompt_embedding = prompt()
    return encoder


@torch.no_grad()
@pytest.mark.skipif(not ROOT.is_dir(), reason="TRITONKERN_OFFICIAL_DIR has no DiTracker")
def test_same_as_the_published_encoder():
    model, autoencoder = transformer(), vae()
    merged = transformer()
    merge_low_rank(merged)
    theirs = published(merged, autoencoder)
    generator = torch.default_generator
    ours = DiTrackerEncoder(model, autoencoder, prompt=prompt(), sample=True, generator=generator, **OPTIONS)
    video = torch.rand(1, 15, 32, 48, 3)
    channels_first = video.permute(0, 1, 4, 2, 3)

    generator.manual_seed(5)
    expected = theirs(channels_first[:, :13])
    generator.manual_seed(5)
    for x, y in zip(ours(2 * video[:, :13] - 1), expected, strict=True):
        torch.testing.assert_close(x, y.movedim(2, -1), atol=1e-5, rtol=0)

    # A longer clip; the published latents of frame 0 are drawn for every chunk, so that the mean is compared.
    ours.sample = False
    theirs.encode_video = lambda x: ours.latents(2 * x.permute(0, 2, 3, 4, 1) - 1).transpose(1, 2)
    for first, last in ((0, 13), (13, 15)):
        expected = theirs(torch.cat([channels_first[:, :1], channels_first[:, first:last]], 1))
        for x, y in zip(ours(2 * video - 1), expected, strict=True):
            torch.testing.assert_close(x[:, first:last], y[:, 1:].movedim(2, -1), atol=1e-5, rtol=0)
