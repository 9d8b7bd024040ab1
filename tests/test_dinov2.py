"""DINOv2 against PyTorch's own transformer layer, `transformers` and the official code, in float64."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from official import needs_official, official  # noqa: F401
from torch import nn

from tritonkern.models.dinov2 import DINOV2_CONFIGS, Block, DINOv2, DINOv2Config

EXACT = dict(atol=1e-11, rtol=0)


def randomised(module):
    """Every parameter away from the values that hide mistakes: zero biases, unit gammas, tiny tokens."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return module.double().eval()


def tiny(registers=0, swiglu=False, depth=3, grid=5):
    return randomised(DINOv2(DINOv2Config(128, depth, 2, swiglu, registers, grid=grid)))


def torch_layer(block):
    """nn.TransformerEncoderLayer with the block's weights; its layer scales fold into the linear layers before them."""
    dim, heads = block.norm1.normalized_shape[0], block.attn.num_heads
    layer = nn.TransformerEncoderLayer(
        dim, heads, 4 * dim, dropout=0.0, activation=F.gelu, layer_norm_eps=1e-6, batch_first=True, norm_first=True
    ).double()
    with torch.no_grad():
        layer.self_attn.in_proj_weight.copy_(block.attn.qkv.weight)
        layer.self_attn.in_proj_bias.copy_(block.attn.qkv.bias)
        layer.self_attn.out_proj.weight.copy_(block.ls1.gamma[:, None] * block.attn.proj.weight)
        layer.self_attn.out_proj.bias.copy_(block.ls1.gamma * block.attn.proj.bias)
        layer.linear1.load_state_dict(block.mlp.fc1.state_dict())
        layer.linear2.weight.copy_(block.ls2.gamma[:, None] * block.mlp.fc2.weight)
        layer.linear2.bias.copy_(block.ls2.gamma * block.mlp.fc2.bias)
        layer.norm1.load_state_dict(block.norm1.state_dict())
        layer.norm2.load_state_dict(block.norm2.state_dict())
    return layer


def cubic(distance, a):
    """Keys' kernel: a = -0.75 in PyTorch's bicubic, -0.5 in its antialiased one."""
    d = abs(distance)
    if d < 1:
        return (a + 2) * d**3 - (a + 3) * d**2 + 1
    return a * (d**3 - 5 * d**2 + 8 * d - 4) if d < 2 else 0.0


def resampling(size, grid, antialias):
    """[size, grid] matrix of one axis of the position embedding's resampling."""
    matrix = np.zeros((size, grid))
    for i in range(size):
        if antialias:
            scale = grid / size
            stretch = max(scale, 1.0)
            centre = (i + 0.5) * scale
            weights = [cubic((j + 0.5 - centre) / stretch, -0.5) for j in range(grid)]
            matrix[i] = np.array(weights) / sum(weights)
        else:
            centre = (i + 0.5) * grid / (size + 0.1) - 0.5
            for j in range(math.floor(centre) - 1, math.floor(centre) + 3):
                matrix[i, min(max(j, 0), grid - 1)] += cubic(j - centre, -0.75)
    return torch.from_numpy(matrix)


def expected_position_embedding(model, rows, columns):
    grid, antialias = model.config.grid, model.config.num_registers > 0
    patches = model.pos_embed[0, 1:].reshape(grid, grid, -1)
    row_matrix, column_matrix = resampling(rows, grid, antialias), resampling(columns, grid, antialias)
    patches = torch.einsum("ri,cj,ijd->rcd", row_matrix, column_matrix, patches)
    return torch.cat([model.pos_embed[0, :1], patches.flatten(0, 1)])[None]


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("size", [(8, 8), (4, 9), (3, 3), (1, 25)])
def test_position_embedding(registers, size):
    model = tiny(registers, depth=1)
    torch.testing.assert_close(model.position_embedding(*size), expected_position_embedding(model, *size), **EXACT)


def test_position_embedding_at_its_own_size_is_the_parameter():
    model = tiny(depth=1)
    assert model.position_embedding(5, 5) is model.pos_embed


def test_block_is_a_transformer_encoder_layer():
    block = randomised(Block(128, 2))
    x = torch.randn(3, 17, 128, dtype=torch.float64)
    torch.testing.assert_close(block(x), torch_layer(block)(x), **EXACT)


def test_swiglu_gates_with_the_first_half():
    mlp = randomised(Block(24, 3, swiglu=True)).mlp
    assert mlp.w12.weight.shape == (128, 24)
    x = torch.randn(5, 24, dtype=torch.float64)
    hidden = x @ mlp.w12.weight.T + mlp.w12.bias
    gate, value = hidden[:, :64], hidden[:, 64:]
    expected = (gate / (1 + torch.exp(-gate)) * value) @ mlp.w3.weight.T + mlp.w3.bias
    torch.testing.assert_close(mlp(x), expected, **EXACT)


def plain_outputs(model, images):
    """[cls, registers, patches] after every block, patches cut out and projected by hand."""
    rows, columns = images.shape[2] // 14, images.shape[3] // 14
    patches = images.unfold(2, 14, 14).unfold(3, 14, 14).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    x = patches @ model.patch_embed.proj.weight.flatten(1).T + model.patch_embed.proj.bias
    x = torch.cat([model.cls_token.expand(len(x), -1, -1), x], 1) + expected_position_embedding(model, rows, columns)
    if model.config.num_registers:
        x = torch.cat([x[:, :1], model.register_tokens.expand(len(x), -1, -1), x[:, 1:]], 1)
    outputs = []
    for block in model.blocks:
        x = torch_layer(block)(x)
        outputs.append(x)
    return outputs


@pytest.mark.parametrize("registers", [0, 4])
def test_intermediate_layers(registers):
    model = tiny(registers)
    images = torch.randn(2, 3, 42, 98, dtype=torch.float64)
    outputs = plain_outputs(model, images)
    prefix = 1 + registers

    (last,) = model.get_intermediate_layers(images)
    torch.testing.assert_close(last, model.norm(outputs[-1])[:, prefix:], **EXACT)
    torch.testing.assert_close(model(images), model.norm(outputs[-1])[:, 0], **EXACT)

    # Blocks come in their own order, whatever the order asked for; the final norm goes to each.
    chosen = model.get_intermediate_layers(images, n=[2, 0], return_class_token=True)
    for (patches, class_token), out in zip(chosen, (outputs[0], outputs[2]), strict=True):
        torch.testing.assert_close(patches, model.norm(out)[:, prefix:], **EXACT)
        torch.testing.assert_close(class_token, model.norm(out)[:, 0], **EXACT)

    grids = model.get_intermediate_layers(images, n=2, reshape=True, norm=False)
    for patches, out in zip(grids, outputs[1:], strict=True):
        expected = out[:, prefix:].transpose(1, 2).reshape(2, 128, 3, 7)
        torch.testing.assert_close(patches, expected, **EXACT)


def test_leading_axes_are_images():
    model = tiny(4)
    video = torch.randn(2, 3, 3, 28, 42, dtype=torch.float64)
    flat = model.get_intermediate_layers(video.flatten(0, 1), reshape=True, return_class_token=True)[0]
    shaped = model.get_intermediate_layers(video, reshape=True, return_class_token=True)[0]
    assert shaped[0].shape == (2, 3, 128, 2, 3) and shaped[1].shape == (2, 3, 128)
    for actual, expected in zip(shaped, flat, strict=True):
        torch.testing.assert_close(actual.flatten(0, 1), expected, **EXACT)


@pytest.mark.parametrize("registers", [0, 4])
def test_adapters_add_to_patch_tokens_only(registers):
    model = tiny(registers)
    video = torch.randn(1, 3, 3, 28, 42, dtype=torch.float64)
    prefix = 1 + registers

    def roll(tokens):
        assert tokens.shape == (1, 3, 2, 3, 128)
        return tokens.roll(1, dims=1)

    x = model.embed(video[0], model.position_embedding(2, 3))
    for block in model.blocks[:2]:
        x = block(x)
        x = torch.cat([x[:, :prefix], x[:, prefix:] + x[:, prefix:].roll(1, dims=0)], dim=1)
    expected = model.norm(model.blocks[2](x))[:, prefix:]
    (actual,) = model.get_intermediate_layers(video, adapters=[roll, roll])
    torch.testing.assert_close(actual[0], expected, **EXACT)


@pytest.mark.parametrize(
    "name, tensors, millions",
    [("vits14", 175, 22.06), ("vitb14", 175, 86.58), ("vitl14", 343, 304.37), ("vitg14", 567, 1136.48)],
)
def test_sizes_of_the_published_models(name, tensors, millions):
    with torch.device("meta"):
        state = DINOv2(name).state_dict()
        with_registers = DINOv2(f"{name}_reg").state_dict()
    assert len(state) == tensors
    assert sum(value.numel() for value in state.values()) / 1e6 == pytest.approx(millions, abs=0.006)
    assert set(with_registers) - set(state) == {"register_tokens"}


@pytest.mark.parametrize(
    "kwargs, match",
    [
        (dict(images=torch.zeros(1, 3, 28, 30)), "multiples of 14"),
        (dict(images=torch.zeros(3, 28, 28)), "multiples of 14"),
        (dict(n=0), "n must be"),
        (dict(n=4), "n must be"),
        (dict(n=[0, 3]), "block indices from 0 to 2"),
        (dict(adapters=[nn.Identity()] * 4), "at most one"),
    ],
)
def test_errors(kwargs, match):
    images = torch.zeros(1, 3, 28, 28, dtype=torch.float64)
    with pytest.raises(ValueError, match=match):
        tiny().get_intermediate_layers(**{"images": images, **kwargs})


def test_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match="vits14, vitb14.*got 'vitx14'"):
        DINOv2("vitx14")


@pytest.mark.parametrize("registers, swiglu", [(0, False), (4, True)])
def test_checkpoint_gives_the_same_model(tmp_path, registers, swiglu):
    model = tiny(registers, swiglu).float()
    images = torch.randn(1, 3, 28, 42)
    chunked = {key.replace("blocks.", "blocks.1."): value for key, value in model.state_dict().items()}
    for state in (model.state_dict(), {"teacher": chunked}):
        torch.save(state, tmp_path / "weights.pth")
        loaded = DINOv2.from_checkpoint(tmp_path / "weights.pth")
        assert loaded.config == model.config
        assert torch.equal(loaded(images), model(images))


def test_checkpoint_errors_say_what_does_not_fit(tmp_path):
    path = tmp_path / "weights.pth"
    state = tiny().state_dict()
    state["head.weight"] = state.pop("blocks.1.attn.qkv.weight")
    state["norm.weight"] = torch.zeros(3)
    torch.save(state, path)
    with pytest.raises(
        ValueError, match="1 missing: blocks.1.attn.qkv.weight; 1 unexpected: head.weight; 1 of another"
    ) as e:
        DINOv2.from_checkpoint(path)
    assert "norm.weight [3] (needs [128])" in str(e.value)
    torch.save({"fc.weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="holds no DINOv2 weights"):
        DINOv2.from_checkpoint(path)


def from_transformers(state):
    """Keys and tensors of `transformers` (5.x) under the official names."""
    mapped = {}
    for key, value in state.items():
        key = key.removeprefix("embeddings.").replace("encoder.layer", "blocks").replace("layernorm.", "norm.")
        key = key.replace("position_embeddings", "pos_embed").replace("patch_embeddings.projection", "patch_embed.proj")
        key = key.replace("layer_scale1.lambda1", "ls1.gamma").replace("layer_scale2.lambda1", "ls2.gamma")
        key = key.replace("attention.o_proj", "attn.proj").replace("mlp.down_proj", "mlp.w3")
        mapped[key] = value
    joined = {"attention.{}_proj": ("qkv", "attn.qkv"), "mlp.{}_proj": (("gate", "up"), "mlp.w12")}
    for key in list(mapped):
        for pattern, (parts, name) in joined.items():
            if pattern.format(parts[0]) in key:
                pieces = [mapped.pop(key.replace(pattern.format(parts[0]), pattern.format(part))) for part in parts]
                mapped[key.replace(pattern.format(parts[0]), name)] = torch.cat(pieces)
    return mapped


@pytest.mark.parametrize("registers, swiglu", [(0, False), (4, False), (0, True), (4, True)])
def test_transformers(registers, swiglu):
    transformers = pytest.importorskip("transformers", minversion="5.0")
    kind = "Dinov2WithRegisters" if registers else "Dinov2"
    sizes = dict(hidden_size=128, num_hidden_layers=3, num_attention_heads=2, image_size=70, patch_size=14)
    if registers:
        sizes["num_register_tokens"] = registers
    config = getattr(transformers, f"{kind}Config")(use_swiglu_ffn=swiglu, **sizes)
    peer = randomised(getattr(transformers, f"{kind}Model")(config))
    model = DINOv2(DINOv2Config(128, 3, 2, swiglu, registers, grid=5)).double()
    model.load_state_dict(from_transformers(peer.state_dict()))

    images = torch.randn(2, 3, 70, 70, dtype=torch.float64)
    expected = peer(images, output_hidden_states=True)
    patches, class_token = model.get_intermediate_layers(images, return_class_token=True)[0]
    torch.testing.assert_close(patches, expected.last_hidden_state[:, 1 + registers :], **EXACT)
    torch.testing.assert_close(class_token, expected.last_hidden_state[:, 0], **EXACT)
    for out, hidden in zip(
        model.get_intermediate_layers(images, n=3, norm=False), expected.hidden_states[1:], strict=True
    ):
        torch.testing.assert_close(out, hidden[:, 1 + registers :], **EXACT)
    if registers:
        # Away from the trained size only the models with registers agree; their peer resamples in float32.
        images = torch.randn(1, 3, 112, 56, dtype=torch.float64)
        torch.testing.assert_close(model(images), peer(images).pooler_output, atol=1e-4, rtol=0)


@needs_official
@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("ffn, chunks", [("mlp", 0), ("swiglufused", 3)])
def test_official(official, registers, ffn, chunks, tmp_path):  # noqa: F811
    module = official("dinov2", "dinov2.models.vision_transformer")
    kwargs = dict(interpolate_antialias=True, interpolate_offset=0.0) if registers else {}
    peer = module.DinoVisionTransformer(
        img_size=70, patch_size=14, embed_dim=128, depth=3, num_heads=2, init_values=1.0, ffn_layer=ffn,
        block_chunks=chunks, num_register_tokens=registers, block_fn=module.partial(
            module.Block, attn_class=module.MemEffAttention
        ), **kwargs,
    )  # fmt: skip
    randomised(peer)
    torch.save(peer.state_dict(), tmp_path / "official.pth")
    model = DINOv2.from_checkpoint(tmp_path / "official.pth").double()
    assert model.config == DINOv2Config(128, 3, 2, ffn != "mlp", registers, grid=5)
    for size, tolerance in (((70, 70), 1e-11), ((112, 56), 1e-4), ((42, 98), 1e-4)):
        # Off its trained size the official model resamples its position embedding in float32.
        images = torch.randn(2, 3, *size, dtype=torch.float64)
        for options in (dict(n=2, reshape=True, norm=False), dict(n=[0, 2], return_class_token=True)):
            expected = peer.get_intermediate_layers(images, **options)
            actual = model.get_intermediate_layers(images, **options)
            torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)
        torch.testing.assert_close(model(images), peer(images), atol=tolerance, rtol=0)


@needs_official
@pytest.mark.filterwarnings("ignore:xFormers")
@pytest.mark.parametrize("name", DINOV2_CONFIGS)
def test_official_keys(official, name):  # noqa: F811
    hub = official("dinov2", "dinov2.hub.backbones")
    with torch.device("meta"):
        peer = getattr(hub, f"dinov2_{name}")(pretrained=False).state_dict()
        ours = DINOv2(name).state_dict()
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in peer.items()}


def test_models_made_in_inference_mode_run_on_any_grid_and_follow_their_weights():
    with torch.inference_mode():
        model = tiny(depth=1)
    images = torch.randn(1, 3, 42, 56, dtype=torch.float64)
    with torch.no_grad():
        before = model(images)
        assert torch.equal(before, copy.deepcopy(model)(images))
    with torch.inference_mode():
        torch.testing.assert_close(model(images), before, **EXACT)
        # Such a write does not raise the parameter's version.
        model.pos_embed.normal_()
        expected = expected_position_embedding(model, 3, 4)
        torch.testing.assert_close(model.position_embedding(3, 4), expected, **EXACT)
        assert not torch.equal(model(images), before)


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("norm", [True, False])
def test_frames_in_chunks_give_the_same(registers, norm, monkeypatch):
    """One frame at a time, as in a long clip, against all at once, which is how it goes with gradients."""
    model = tiny(registers)
    video = torch.randn(2, 3, 3, 28, 42, dtype=torch.float64)
    adapters = [lambda x: x.roll(1, dims=1), lambda x: x.mean(1, keepdim=True).expand_as(x)]
    options = dict(n=[0, 2], adapters=adapters, return_class_token=True, norm=norm)
    expected = model.get_intermediate_layers(video, **options)
    seen, forward = [], Block.forward
    monkeypatch.setattr(Block, "forward", lambda self, x: seen.append(len(x)) or forward(self, x))
    monkeypatch.setattr(DINOv2, "temporaries", {"cpu": 1})
    with torch.no_grad():
        actual = model.get_intermediate_layers(video, **options)
    assert set(seen) == {1}
    torch.testing.assert_close(actual, expected, **EXACT)


@pytest.mark.parametrize("name", ["patch_embed.proj", "blocks.1", "blocks.1.mlp.fc1", "norm"])
def test_hooks_see_whole_clips(name, monkeypatch):
    model = tiny()
    monkeypatch.setattr(DINOv2, "temporaries", {"cpu": 1})
    seen = []
    model.get_submodule(name).register_forward_hook(lambda module, args, output: seen.append(len(output)))
    with torch.no_grad():
        model(torch.randn(5, 3, 28, 28, dtype=torch.float64))
    assert seen == [5]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_residual_stream_is_float32_under_autocast(dtype):
    model = tiny().float()
    seen = []
    model.blocks[1].register_forward_hook(lambda module, args, output: seen.append((args[0].dtype, output.dtype)))
    for images in (torch.randn(1, 3, 28, 28), torch.randn(1, 3, 28, 28, dtype=dtype)):
        with torch.autocast("cpu", dtype):
            assert model.get_intermediate_layers(images, norm=False)[0].dtype == torch.float32
            assert model.blocks[0](torch.randn(1, 5, 128, dtype=dtype)).dtype == torch.float32
    assert seen == [(torch.float32, torch.float32)] * 2
