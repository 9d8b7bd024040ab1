"""Queries and keys of diffusers' video transformers, on tiny random models of four families."""

import pytest
import torch
import torch.nn.functional as F

diffusers = pytest.importorskip("diffusers")

from test_cogvideox import inputs, official, ours, rotation  # noqa: E402

from tritonkern.integrations.video_dit import watch  # noqa: E402


def cogvideox():
    model, (latents, text, timestep) = official(True), inputs()
    return model, (latents, text, timestep), dict(image_rotary_emb=rotation(model, latents)), (3, 24, 5)


def hunyuan():
    model = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=2,
        num_refiner_layers=1,
        patch_size=1,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
    )
    options = dict(
        encoder_hidden_states=torch.randn(1, 6, 16),
        encoder_attention_mask=torch.ones(1, 6),
        pooled_projections=torch.randn(1, 8),
        guidance=torch.tensor([1000.0]),
        timestep=torch.tensor([500]),
    )
    return model, (torch.randn(1, 4, 3, 4, 5),), options, (3, 20, 6)


def wan():
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=3,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    options = dict(encoder_hidden_states=torch.randn(1, 6, 16), timestep=torch.tensor([500]))
    return model, (torch.randn(1, 4, 3, 8, 10),), options, (3, 20, 0)


def ltx():
    model = diffusers.LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=3,
        qk_norm="rms_norm_across_heads",
        caption_channels=16,
    )
    options = dict(
        encoder_hidden_states=torch.randn(1, 6, 16),
        encoder_attention_mask=torch.ones(1, 6),
        timestep=torch.tensor([500]),
        num_frames=3,
        height=4,
        width=5,
    )
    return model, (torch.randn(1, 60, 4),), options, (3, 20, 0)


@pytest.fixture(params=[cogvideox, hunyuan, wan, ltx], ids=lambda make: make.__name__)
def case(request):
    torch.manual_seed(0)
    model, args, options, sizes = request.param()
    return model.eval(), args, options | dict(return_dict=False), sizes


@torch.no_grad()
def test_seen_and_unchanged(case):
    model, args, options, (frames, cells, text) = case
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    expected = model(*args, **options)[0]
    with watch(model, [1, 2]) as seen:
        found = model(*args, **options)[0]
    assert torch.equal(found, expected)
    assert sorted(seen) == [1, 2]
    for layer in seen.values():
        assert layer.query.shape[1:4] == (frames, cells, 2) and layer.query.shape == layer.key.shape
        assert layer.text_query.shape[1:3] == layer.text_key.shape[1:3] == (text, 2)
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before
    full = seen[2].query
    with watch(model, [2], heads=[1], stop=True) as seen:
        assert model(*args, **options) is None
    assert torch.equal(seen[2].query, full[:, :, :, 1:])
    with pytest.raises(RuntimeError, match="inside"), watch(model, [0]):
        raise RuntimeError("inside")
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before


@torch.no_grad()
def test_the_same_as_our_own_model():
    model, args, options, _ = cogvideox()
    with watch(model, [1], stop=True) as seen:
        model(*args, **options)
    ((query, key),) = ours(model, True).query_key(*args, [1])
    torch.testing.assert_close(seen[1].query, query, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(seen[1].key, key, atol=1e-5, rtol=1e-5)


def test_recomputation_is_not_looked_at():
    model, args, options, _ = cogvideox()
    model.enable_gradient_checkpointing()
    model.train()
    with watch(model, [1]) as seen:
        model(*args, **options)[0].sum().backward()
        first = seen[1].query
    assert seen[1].query is first


def test_errors(monkeypatch):
    model, args, options, _ = cogvideox()
    with pytest.raises(TypeError, match="transformer must be one of"), watch(torch.nn.Linear(1, 1), [0]):
        pass
    with pytest.raises(ValueError, match="layers must be some from 0 to 2"), watch(model, [3]):
        pass
    with torch.no_grad(), watch(model, [0], heads=[2]), pytest.raises(ValueError, match="heads must be from 0 to 1"):
        model(*args, **options)
    attention = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *x, **y: attention(*x, **y).clone())
    with torch.no_grad(), watch(model, [0]), pytest.raises(RuntimeError, match="set_attention_backend"):
        model(*args, **options)
