"""The temporal adapter and Chrono against a plain float64 form and the official code; its checkpoints."""

import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from official import needs_official, official  # noqa: F401
from oracle import eager, run_python
from safetensors.torch import save_file
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tritonkern.models.checkpoints import read_state_dict
from tritonkern.models.chrono import Chrono
from tritonkern.models.dinov2 import DINOv2Config
from tritonkern.nn import TemporalAdapter

TINY = DINOv2Config(dim=64, depth=3, num_heads=1)
EXACT = dict(atol=1e-11, rtol=0)


def randomised(module, scale=0.2):
    """Every parameter away from zeros and ones, the adapters' last convolution above all."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * scale)
    return module.double().eval()


@pytest.fixture
def tiny(monkeypatch):
    """Chrono with three narrow blocks and 8 x 8 cells."""
    monkeypatch.setattr(Chrono, "cells", 8)
    return randomised(Chrono(TINY, hidden=32))


def random_clip(frames=3, queries=5, dtype=torch.float64):
    video = torch.rand(1, frames, 256, 256, 3, dtype=dtype) * 2 - 1
    positions = torch.rand(1, queries, 3, dtype=dtype) * torch.tensor([frames - 1.0, 256, 256])
    return video, positions


def plain_adapter(adapter, tokens):
    """The formula on [B, C, T, h, w], every step on its own, the attention with a dense mask."""
    batch, frames, height, width, channels = tokens.shape
    x = tokens.permute(0, 4, 1, 2, 3)
    mean = x.mean((1, 2, 3, 4), keepdim=True)
    variance = ((x - mean) ** 2).mean((1, 2, 3, 4), keepdim=True)
    x = (x - mean) / (variance + 1e-5).sqrt()
    x = x * adapter.norm.weight[:, None, None, None] + adapter.norm.bias[:, None, None, None]
    images = x.transpose(1, 2).reshape(batch * frames, channels, height, width)
    images = F.conv2d(images, adapter.conv1.weight, adapter.conv1.bias, padding=1).relu()
    images = F.conv2d(images, adapter.conv_pool.weight, adapter.conv_pool.bias, stride=adapter.pool).relu()

    hidden, rows, columns = images.shape[1:]
    # [B, T, N, hidden]
    x = images.reshape(batch, frames, hidden, rows * columns).transpose(2, 3)
    normed = F.layer_norm(x, [hidden], adapter.norm2.weight, adapter.norm2.bias)
    query, key, value = (
        part.reshape(batch, frames, rows * columns, 4, hidden // 4)
        for part in (normed @ adapter.attn_temp.qkv.weight.T).split(hidden, dim=-1)
    )
    attended = eager(query, key, value, 6, 6, (hidden // 4) ** -0.5).flatten(3)
    x = x + attended @ adapter.attn_temp.proj.weight.T + adapter.attn_temp.proj.bias

    images = x.transpose(2, 3).reshape(batch * frames, hidden, rows, columns)
    images = F.conv_transpose2d(
        images, adapter.conv_upsample.weight, adapter.conv_upsample.bias, stride=adapter.pool
    ).relu()
    images = F.conv2d(images, adapter.conv2.weight, adapter.conv2.bias, padding=1)
    return images.reshape(batch, frames, channels, height, width).permute(0, 1, 3, 4, 2)


@pytest.mark.parametrize("frames, pool", [(1, 4), (9, 4), (15, 2)])
def test_adapter(frames, pool):
    adapter = randomised(TemporalAdapter(24, hidden=32, pool=pool))
    tokens = torch.randn(2, frames, 8, 4, 24, dtype=torch.float64) + 1
    torch.testing.assert_close(adapter(tokens), plain_adapter(adapter, tokens), **EXACT)


def test_adapter_takes_any_strides():
    adapter = randomised(TemporalAdapter(24, hidden=32))
    tokens = torch.randn(2 * 3, 1 + 32, 24, dtype=torch.float64)
    view = tokens[:, 1:].unflatten(1, (8, 4)).unflatten(0, (2, 3))
    torch.testing.assert_close(adapter(view), plain_adapter(adapter, view), **EXACT)


def test_new_adapter_adds_nothing():
    assert not TemporalAdapter(24, hidden=32)(torch.randn(1, 2, 4, 4, 24)).any()


def test_adapter_errors():
    adapter = TemporalAdapter(24, hidden=32)
    with pytest.raises(ValueError, match=r"tokens must be \[B, T, h, w, 24\], got \[1, 2, 4, 4, 23\]"):
        adapter(torch.zeros(1, 2, 4, 4, 23))
    with pytest.raises(ValueError, match="multiples of pool=4, got 4 x 6"):
        adapter(torch.zeros(1, 2, 4, 6, 24))


def test_features(tiny):
    video, _ = random_clip()
    mean, std = (torch.tensor(x, dtype=torch.float64) for x in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    images = (video / 2 + 0.5 - mean) / std
    images = F.interpolate(images[0].permute(0, 3, 1, 2), size=(112, 112), mode="bilinear", align_corners=False)
    x = tiny.dino.embed(images, tiny.dino.position_embedding(8, 8))
    for index, block in enumerate(tiny.dino.blocks):
        x = block(x)
        if index < 2:
            patches = x[:, 1:].reshape(1, 3, 8, 8, 64)
            x = torch.cat([x[:, :1], x[:, 1:] + plain_adapter(tiny.adapter[index], patches).reshape(3, 64, 64)], dim=1)
    expected = F.normalize(tiny.dino.norm(x)[:, 1:].reshape(1, 3, 8, 8, 64), dim=-1)
    torch.testing.assert_close(tiny.features(video), expected, **EXACT)


def test_features_are_normalised_as_the_official_ones(tiny):
    """Divided by sqrt(max(sum of squares, 1e-6)): a feature shorter than 1e-3 stays short."""
    with torch.no_grad():
        tiny.dino.norm.weight.fill_(1e-6)
        tiny.dino.norm.bias.zero_()
    norms = tiny.features(random_clip(frames=1)[0]).norm(dim=-1)
    torch.testing.assert_close(norms, torch.full_like(norms, 1e-6 * 8 / 1e-3), atol=1e-6, rtol=0)


def test_frames_see_each_other_through_the_adapters(tiny):
    video, _ = random_clip()
    changed = video.clone()
    changed[0, 2] = -changed[0, 2]
    assert (tiny.features(changed)[0, 0] - tiny.features(video)[0, 0]).abs().max() > 1e-3
    for adapter in tiny.adapter:
        torch.nn.init.zeros_(adapter.conv2.weight)
        torch.nn.init.zeros_(adapter.conv2.bias)
    assert torch.equal(tiny.features(changed)[0, 0], tiny.features(video)[0, 0])


def test_gradient_reaches_every_parameter(tiny):
    video, queries = random_clip()
    output = tiny(video, queries)
    (output.tracks.sum() + output.occlusion.sum()).backward()
    without = {name for name, parameter in tiny.named_parameters() if parameter.grad is None}
    assert not without


def test_bfloat16_under_autocast(tiny):
    video, queries = random_clip(dtype=torch.float32)
    tiny.float()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        features = tiny.features(video)
        output = tiny(video, queries)
    assert features.dtype == output.tracks.dtype == torch.float32
    assert (features * tiny.features(video)).sum(-1).min() > 0.99


def test_official_key_names_and_sizes():
    with torch.device("meta"):
        small, base = Chrono("vits14"), Chrono("vitb14")
    # Adapters' parameters as published: 16.2 and 26.0 million.
    assert sum(p.numel() for p in small.adapter.parameters()) == pytest.approx(16.24e6, rel=1e-3)
    assert sum(p.numel() for p in base.adapter.parameters()) == pytest.approx(25.98e6, rel=1e-3)
    assert len(small.state_dict()) == len(base.state_dict()) == 175 + 11 * 15 + 2
    adapter = {key for key in small.state_dict() if key.startswith("adapter.10.")}
    names = "norm conv1 conv_pool norm2 attn_temp.proj conv_upsample conv2".split()
    expected = {f"adapter.10.{name}.{part}" for name in names for part in ("weight", "bias")}
    assert adapter == expected | {"adapter.10.attn_temp.qkv.weight"}


def lightning(state):
    return {
        "epoch": 0,
        "global_step": 100000,
        "pytorch-lightning_version": "2.3.0",
        "state_dict": {f"model.{key}": value for key, value in state.items()},
        "optimizer_states": [{"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4}]}],
        "callbacks": {"ModelCheckpoint{'monitor': 'val'}": {"best_model_path": "x.ckpt", "current_score": None}},
    }


@pytest.mark.parametrize("form", ["lightning", "plain", "safetensors"])
def test_checkpoint_gives_the_same_model(tiny, tmp_path, form):
    tiny.float()
    path = tmp_path / ("weights.safetensors" if form == "safetensors" else "weights.ckpt")
    if form == "safetensors":
        save_file(tiny.state_dict(), path)
    else:
        torch.save(lightning(tiny.state_dict()) if form == "lightning" else tiny.state_dict(), path)
    loaded = Chrono.from_checkpoint(path)
    assert loaded.dino.config == TINY and not loaded.training
    video, queries = random_clip(dtype=torch.float32)
    for actual, expected in zip(loaded(video, queries), tiny(video, queries), strict=True):
        assert torch.equal(actual, expected)


def test_checkpoint_errors_list_the_keys(tiny, tmp_path):
    path = tmp_path / "weights.ckpt"
    state = lightning(tiny.state_dict())
    weights = state["state_dict"]
    del weights["model.occ_linear.bias"]
    weights["model.refiner.weight"] = torch.zeros(1)
    torch.save(state, path)
    with pytest.raises(
        ValueError, match="does not fit Chrono: 1 missing: occ_linear.bias; 1 unexpected: refiner.weight$"
    ):
        Chrono.from_checkpoint(path)

    torch.save({key: value for key, value in weights.items() if "adapter" not in key}, path)
    with pytest.raises(ValueError, match="31 missing: occ_linear.bias, adapter.0.norm.weight, .* and 23 more; 1 unexp"):
        Chrono.from_checkpoint(path)

    torch.save(tiny.dino.state_dict(), path)
    with pytest.raises(ValueError, match="holds no Chrono weights: keys dino.*found cls_token, pos_embed"):
        Chrono.from_checkpoint(path)
    with pytest.raises(ValueError, match="missing: occ_linear.weight"):
        Chrono.from_checkpoint(path, TINY)


class Harmful:
    pass


def test_unreadable_checkpoints(tmp_path):
    path = tmp_path / "weights.ckpt"
    with pytest.raises(FileNotFoundError, match="no weights file at"):
        Chrono.from_checkpoint(path)
    torch.save({"state_dict": {"a": torch.zeros(9)}, "hyper_parameters": Harmful()}, path)
    with pytest.raises(ValueError, match="holds Python objects.*torch.save"):
        Chrono.from_checkpoint(path)
    torch.save({"epoch": 3}, path)
    with pytest.raises(ValueError, match="holds no state dict"):
        Chrono.from_checkpoint(path)
    for content in (b"", b"<html>quota exceeded</html>", b"PK\x03\x04 cut short"):
        for name in ("weights.ckpt", "weights.safetensors"):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(ValueError, match="is not a readable"):
                Chrono.from_checkpoint(tmp_path / name)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_checkpoints_are_named(tmp_path, zipped):
    path = tmp_path / "weights.pth"
    torch.save({"a": torch.zeros(3), "b": torch.ones(2)}, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    texts = [b"hello world\n", b"version https://git-lfs.github.com/spec/v1\n", b"}", b"404: Not Found"]
    generator = np.random.default_rng(0)
    flipped = []
    for _ in range(100):
        data = np.frombuffer(whole, np.uint8).copy()
        data[generator.integers(len(data), size=4)] = generator.integers(256, size=4)
        flipped.append(data.tobytes())
    refused = 0
    for content in texts + flipped:
        path.write_bytes(content)
        try:
            read_state_dict(path)
        except ValueError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 20


def test_missing_safetensors_says_what_to_install(monkeypatch, tmp_path):
    path = tmp_path / "weights.safetensors"
    path.touch()
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ModuleNotFoundError, match=r'safetensors: run pip install "\.\[track\]"') as error:
        read_state_dict(path)
    assert error.value.name == "safetensors"


@needs_official
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:xFormers", "ignore:CUDA is not available")
@pytest.mark.parametrize("registers", [False, True])
def test_official(official, monkeypatch, tmp_path, registers):  # noqa: F811
    """The published size, ViT-S/14 at 896 x 896: the points agree within 1e-3 px in float32."""
    pytest.importorskip("einops")
    hub = official("dinov2", "dinov2.hub.backbones")
    monkeypatch.setattr(torch.hub, "load", lambda repo_or_dir, model: getattr(hub, model)(pretrained=False))
    peer = official("Chrono", "models.locotrack_model").LocoTrack(dino_size="small", dino_reg=registers).eval()
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            if "conv2" in name:
                parameter.normal_(std=0.03)
            elif parameter.ndim == 1 or "token" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    torch.save(lightning(peer.state_dict()), tmp_path / "chrono.ckpt")
    model = Chrono.from_checkpoint(tmp_path / "chrono.ckpt")

    scene = torch.rand(1, 3, 40, 40)
    frames = [F.interpolate(scene.roll((t, 2 * t), (2, 3)), size=(256, 256), mode="bicubic")[0] for t in range(3)]
    video = torch.stack(frames).permute(0, 2, 3, 1)[None].clamp(0, 1) * 2 - 1
    queries = torch.rand(1, 200, 3) * torch.tensor([2.0, 256, 256])
    queries[:, 50:, 0] = queries[:, 50:, 0].round()
    with torch.no_grad():
        expected = peer(video, queries)
        actual = model(video, queries)
        for adapter in model.adapter:
            adapter.conv2.weight.zero_()
            adapter.conv2.bias.zero_()
        without_adapters = model(video, queries)
    assert (without_adapters.tracks - actual.tracks).abs().mean() > 1
    torch.testing.assert_close(actual.tracks, expected["tracks"], atol=1e-3, rtol=0)
    torch.testing.assert_close(actual.occlusion, expected["occlusion"], atol=1e-5, rtol=0)
    torch.testing.assert_close(actual.expected_distance, expected["expected_dist"], atol=1e-5, rtol=0)


class NothingReadBack(TorchDispatchMode):
    """Refuses operators whose result the host has to wait for."""

    WAITING = {"_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "_unique2", "equal"}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in self.WAITING, f"{name} waits for the device"
        return function(*args, **(kwargs or {}))


class NothingMadeOfNumbers(TorchFunctionMode):
    """Refuses what makes a tensor of Python numbers, which a GPU would have to wait for."""

    MAKING = {torch.tensor, torch.as_tensor, torch.from_numpy, torch.Tensor.new_tensor}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        assert function not in self.MAKING, f"{function.__name__} copies numbers to the device"
        if function is torch.Tensor.__getitem__:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            assert not any(isinstance(part, list) for part in index), "a list as an index is copied to the device"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_nothing_waits_for_the_host(tiny, grad, autocast):
    """What CUDA graphs need: no value is read back, and no tensor is made of Python numbers."""
    video, queries = random_clip(dtype=torch.float32)
    tiny.float()
    with NothingMadeOfNumbers(), NothingReadBack(), torch.set_grad_enabled(grad):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = tiny(video, queries)
        if grad:
            output.tracks.sum().backward()
    forbidden = (lambda: video[..., [2, 1]], lambda: video.new_tensor([1.0]), video.nonzero, video.sum().item)
    for call in (*forbidden, lambda: bool(video.sum()), lambda: torch.tensor([1.0])):
        with pytest.raises(AssertionError), NothingMadeOfNumbers(), NothingReadBack():
            call()


@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_as_one_graph(tiny, autocast):
    tiny.float()
    video, queries = random_clip(dtype=torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(tiny, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for actual, expected in zip(compiled(video, queries), tiny(video, queries), strict=True):
            torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_gradients_of_the_compiled_model(tiny):
    """The backbone is frozen, as in training."""
    video, queries = random_clip()
    tiny.dino.requires_grad_(False)

    def gradients(model):
        tiny.zero_grad()
        output = model(video, queries)
        (output.tracks.square().mean() + output.occlusion.sum()).backward()
        return {name: parameter.grad for name, parameter in tiny.named_parameters() if parameter.grad is not None}

    torch._dynamo.reset()
    expected = gradients(tiny)
    actual = gradients(torch.compile(tiny, fullgraph=True, backend="aot_eager"))
    assert expected and actual.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(actual[name], grad, msg=name)


@pytest.mark.slow
def test_exported_tracker_runs_in_another_process(tiny, tmp_path):
    """Any number of frames and queries, with the weights inside; the process knows the operators alone."""
    tiny.float().requires_grad_(False)
    frames, queries = torch.export.Dim("frames", min=2, max=1000), torch.export.Dim("queries", min=2, max=100000)
    program = torch.export.export(
        tiny, random_clip(3, 5, torch.float32), dynamic_shapes=({1: frames}, {1: queries}), strict=False
    )
    torch.export.save(program, tmp_path / "chrono.pt2")
    clip = random_clip(7, 11, torch.float32)
    torch.save(clip, tmp_path / "clip.pt")
    run_python(
        f"""
        import torch, tritonkern
        clip = torch.load("{tmp_path}/clip.pt")
        model = torch.export.load("{tmp_path}/chrono.pt2").module()
        torch.save(tuple(model(*clip)), "{tmp_path}/output.pt")
        """
    )
    for actual, expected in zip(torch.load(tmp_path / "output.pt"), tiny(*clip), strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
