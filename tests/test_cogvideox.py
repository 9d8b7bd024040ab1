"""CogVideoX beside diffusers' on tiny random models, its queries and keys, and folders on disk."""

import json

import pytest
import torch
from safetensors.torch import save_file

from tritonkern.models import CogVideoX

SIZES = dict(
    num_attention_heads=2,
    attention_head_dim=32,
    in_channels=4,
    out_channels=4,
    time_embed_dim=24,
    text_embed_dim=12,
    num_layers=3,
    sample_width=12,
    sample_height=8,
    sample_frames=9,
    max_text_seq_length=5,
)


def inputs(frames=3, height=8, width=12, batch=2):
    torch.manual_seed(1)
    return torch.randn(batch, frames, 4, height, width), torch.randn(batch, 5, 12), torch.tensor([19.0, 500.0])[:batch]


def official(rotary):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.CogVideoXTransformer3DModel(**SIZES, use_rotary_positional_embeddings=rotary).eval()
    with torch.no_grad():  # biases and norms are 0 and 1 otherwise, whatever is done with them
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def rotation(model, latents):
    from diffusers.models.embeddings import get_3d_rotary_pos_embed
    from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

    grid = latents.shape[3] // 2, latents.shape[4] // 2
    region = get_resize_crop_region_for_grid(grid, model.config.sample_width // 2, model.config.sample_height // 2)
    return get_3d_rotary_pos_embed(model.config.attention_head_dim, region, grid, latents.shape[1])


def ours(model, rotary):
    twin = CogVideoX(**SIZES, use_rotary_positional_embeddings=rotary).eval()
    twin.load_state_dict(model.state_dict())
    return twin


@pytest.mark.parametrize("size", [(3, 8, 12), (2, 8, 12), (3, 6, 12), (4, 12, 8)], ids=str)
@pytest.mark.parametrize("rotary", [False, True], ids=["2B", "5B"])
def test_same_as_diffusers(rotary, size):
    model, (latents, text, timestep) = official(rotary), inputs(*size)
    with torch.no_grad():
        expected = model(
            latents, text, timestep, image_rotary_emb=rotation(model, latents) if rotary else None, return_dict=False
        )[0]
        found = ours(model, rotary)(latents, text, timestep)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_names_and_sizes_of_the_2b():
    with torch.device("meta"):
        state = CogVideoX().state_dict()
    assert len(state) == 736 and round(sum(x.numel() for x in state.values()) / 1e6) == 1694
    assert "transformer_blocks.29.attn1.to_out.0.weight" in state and "transformer_blocks.0.ff.net.0.proj.bias" in state


@pytest.mark.parametrize("rotary", [False, True], ids=["2B", "5B"])
def test_queries_and_keys(rotary):
    """Those whose attention gives what the block gives; of some heads; no more blocks than needed are called."""
    torch.manual_seed(0)
    model, (latents, text, timestep) = CogVideoX(**SIZES, use_rotary_positional_embeddings=rotary).eval(), inputs()
    seen, calls = [], []
    model.transformer_blocks[1].attn1.norm_q.register_forward_hook(lambda *x: seen.append(x[2]))
    for block in model.transformer_blocks:
        block.ff.register_forward_hook(lambda module, *_: calls.append(module))
    with torch.no_grad():
        (query, key), (first, _) = model.query_key(latents, text, timestep, [1, 0])
        assert calls == [model.transformer_blocks[0].ff]
        model(latents, text, timestep)
        (part,) = model.query_key(latents, text, timestep, [1], heads=[1])
    assert query.shape == key.shape == (2, 3, 24, 2, 32) and first.shape == query.shape
    assert torch.equal(seen[0], seen[1])
    if not rotary:
        assert torch.equal(query, seen[1][:, 5:].unflatten(1, (3, 24)))
    torch.testing.assert_close(part[0], query[..., 1:, :])
    torch.testing.assert_close(part[1], key[..., 1:, :])


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(latents=torch.zeros(2, 3, 5, 8, 12)), r"latents must be \[B, T, 4, h, w\]"),
        (dict(latents=torch.zeros(2, 3, 4, 7, 12)), "patches of 2 divide"),
        (dict(text=torch.zeros(2, 5, 13)), r"text must be \[2, L, 12\]"),
        (dict(timestep=torch.zeros(1)), r"timestep must be \[2\]"),
        (dict(layers=[3]), r"layers must be from 0 to 2, got \[3\]"),
        (dict(layers=[0], heads=[-1]), r"heads must be from 0 to 1, got \[-1\]"),
    ],
    ids=str,
)
def test_bad_arguments(change, message):
    latents, text, timestep = inputs()
    arguments = dict(latents=latents, text=text, timestep=timestep, layers=[0]) | change
    with pytest.raises(ValueError, match=message):
        CogVideoX(**SIZES).query_key(**arguments)


@pytest.fixture
def folder(tmp_path):
    """As diffusers writes it, in two parts."""
    torch.manual_seed(0)
    state = CogVideoX(**SIZES).state_dict()
    where = tmp_path / "model" / "transformer"
    where.mkdir(parents=True)
    names = list(state)
    parts = {"diffusion_pytorch_model-00001-of-00002.safetensors": names[:40]}
    parts["diffusion_pytorch_model-00002-of-00002.safetensors"] = names[40:]
    for file, some in parts.items():
        save_file({name: state[name].contiguous() for name in some}, where / file)
    weight_map = {name: file for file, some in parts.items() for name in some}
    (where / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (where / "config.json").write_text(
        json.dumps({"_class_name": "CogVideoXTransformer3DModel", "dropout": 0.0} | SIZES)
    )
    return where


def test_folder(folder):
    model = CogVideoX.from_folder(folder.parent)
    torch.manual_seed(0)
    expected = CogVideoX(**SIZES).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert not model.training and CogVideoX.from_folder(folder).rotary is False


@pytest.mark.parametrize(
    "spoil, error, message",
    [
        (lambda f: (f / "config.json").unlink(), FileNotFoundError, "holds no transformer: config.json is missing"),
        (lambda f: (f / "config.json").write_text("{"), ValueError, "not readable JSON"),
        (
            lambda f: (f / "config.json").write_text('{"_class_name": "Wan"}'),
            ValueError,
            "is of Wan, not of a CogVideoX",
        ),
        (lambda f: (f / "config.json").write_text('{"patch_size_t": 2}'), ValueError, "patch_size_t = 2; only models"),
        (lambda f: (f / "config.json").write_text(json.dumps(SIZES | {"num_layers": 2})), ValueError, "unexpected"),
        (lambda f: next(f.glob("*1-of*.safetensors")).write_bytes(b"x" * 40), ValueError, "not a readable safetensors"),
        (lambda f: next(f.glob("*1-of*.safetensors")).unlink(), FileNotFoundError, "no weights file"),
        (lambda f: next(f.glob("*.index.json")).write_text("[]"), ValueError, "not a readable index"),
    ],
    ids=range(8),
)
def test_spoilt_folder(folder, spoil, error, message):
    spoil(folder)
    with pytest.raises(error, match=message):
        CogVideoX.from_folder(folder.parent)
