"""The Tracktention layer against the same layer written out densely, and image networks that it is inserted into."""

import copy
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from official import OFFICIAL_DIR, official  # noqa: F401
from test_dinov2 import randomised
from torch import nn
from torch.utils.checkpoint import checkpoint

from tritonkern import Tracktention, track_sample_attention, track_splat_attention
from tritonkern.models import DepthModel, insert_tracktention
from tritonkern.models.dinov2 import DINOv2, DINOv2Config
from tritonkern.nn.tracktention import rotate

NAN = float("nan")


def scene(B=2, T=4, M=6, h=5, w=7, C=32, dtype=torch.float64):
    """features, tracks in cells, visibility."""
    features = torch.randn(B, T, h, w, C, dtype=dtype)
    tracks = torch.rand(B, T, M, 2, dtype=dtype) * torch.tensor([w, h], dtype=dtype)
    return features, tracks, torch.rand(B, T, M) > 0.3


def trained(layer):
    """Every parameter away from its start."""
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return layer.double()


def spin(x, position):
    """One head `[D]` at one position: plane after plane, the first half with x, the second with y."""
    planes = torch.view_as_complex(x.reshape(-1, 2).contiguous())
    pairs = len(planes) // 2
    angle = torch.cat([axis * 100.0 ** (-torch.arange(pairs, dtype=x.dtype) / pairs) for axis in position])
    return torch.view_as_real(planes * torch.polar(torch.ones_like(angle), angle)).flatten()


def waves(x, dim):
    angle = x * 1e4 ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim // 2))
    return torch.cat([angle.sin(), angle.cos()])


def dense(layer, features, tracks, visible):
    """The layer as its paper says it, one frame, one track, one cell, one head at a time."""
    B, T, h, w, C = features.shape
    H = layer.num_heads
    cells = [torch.tensor([x + 0.5, y + 0.5], dtype=features.dtype) for y in range(h) for x in range(w)]
    embed = lambda p: torch.cat([waves(p[0], C // 2), waves(p[1], C // 2)])  # noqa: E731

    def attend(queries, places, keys, others, values):
        rows = []
        for q, p in zip(queries, places, strict=True):
            heads = []
            for n in range(H):
                part = slice(n * C // H, (n + 1) * C // H)
                scores = torch.stack(
                    [
                        spin(q[part], p) @ spin(k[part], o) / math.sqrt(C // H)
                        - (p - o).square().sum() / (2 * layer.sigma**2)
                        for k, o in zip(keys, others, strict=True)
                    ]
                )
                heads.append(sum(x * v[part] for x, v in zip(scores.softmax(0), values, strict=True)))
            rows.append(torch.cat(heads))
        return torch.stack(rows)

    out = features.clone()
    for b in range(B):
        tokens = torch.zeros(T, tracks.shape[2], C, dtype=features.dtype)
        for t in range(T):
            seen = visible[b, t].nonzero()[:, 0]
            if not len(seen):
                continue
            values = layer.project(features[b, t].flatten(0, 1))
            queries = layer.sample_query_norm(layer.sample_query(torch.stack([embed(tracks[b, t, m]) for m in seen])))
            keys = layer.sample_key_norm(layer.sample_key(values))
            tokens[t, seen] = attend(queries, tracks[b, t, seen], keys, cells, values)
        for m in range(tracks.shape[2]):
            x = tokens[:, m] + torch.stack([waves(torch.tensor(float(t)), C) for t in range(T)])
            for block in layer.blocks:
                peer = nn.TransformerEncoderLayer(
                    C, H, 4 * C, dropout=0.0, activation=F.gelu, batch_first=True, norm_first=True
                ).double()
                names = {"norm1": "norm1", "norm2": "norm2", "linear1": "fc1", "linear2": "fc2"}
                state = {
                    f"{p}.{k}": getattr(block, o).state_dict()[k] for p, o in names.items() for k in ("weight", "bias")
                }
                state |= {f"self_attn.in_proj_{k}": block.qkv.state_dict()[k] for k in ("weight", "bias")}
                state |= {f"self_attn.out_proj.{k}": block.proj.state_dict()[k] for k in ("weight", "bias")}
                peer.load_state_dict(state)
                blocked = ~visible[b, :, m].expand(T, T) & ~torch.eye(T, dtype=torch.bool)
                x = peer(x[None], src_mask=blocked)[0]
            tokens[:, m] = x
        for t in range(T):
            seen = visible[b, t].nonzero()[:, 0]
            if not len(seen):
                continue
            queries = layer.splat_query_norm(layer.splat_query(torch.stack([embed(c) for c in cells])))
            keys = layer.splat_key_norm(layer.splat_key(tokens[t, seen]))
            update = attend(queries, cells, keys, tracks[b, t, seen], layer.splat_value(tokens[t, seen]))
            out[b, t] += layer.out(update).view(h, w, C)
    return out


def test_is_the_layer_of_the_paper():
    layer = trained(Tracktention(32, num_heads=2, depth=2, sigma=0.7)).requires_grad_(False)
    features, tracks, visibility = scene(B=1, T=3, M=3, h=2, w=3)
    visibility[0, 1] = False
    torch.testing.assert_close(layer(features, tracks, visibility), dense(layer, features, tracks, visibility))


def test_a_new_layer_returns_its_input():
    layer = Tracktention(32, num_heads=4)
    features, tracks, visibility = (x.float() if x.is_floating_point() else x for x in scene())
    assert torch.equal(layer(features, tracks), features)
    assert torch.equal(layer(features, tracks, visibility), features)
    layer(features, tracks).square().sum().backward()
    assert layer.out.weight.grad.abs().max() > 0


def test_frames_without_tracks_stay_as_they_are():
    layer = trained(Tracktention(32, num_heads=4))
    features, tracks, visibility = scene()
    visibility[0, 2] = False
    out = layer(features, tracks, visibility)
    assert torch.equal(out[0, 2], features[0, 2])
    assert ((out != features).flatten(2).any(-1) | ~visibility.any(-1)).all()
    assert torch.equal(layer(features, tracks[:, :, :0]), features)
    assert torch.equal(layer(features, torch.full_like(tracks, NAN)), features)


def test_invisible_tracks_do_not_matter():
    """Wherever they are, and whether or not they are numbers; nor do their gradients."""
    layer = trained(Tracktention(32, num_heads=4))
    features, tracks, visibility = scene()
    results = []
    for hidden in (0.0, 3.0, 1e30, NAN):
        layer.zero_grad()
        places = tracks.masked_fill(~visibility[..., None], hidden).requires_grad_()
        out = layer(features, places, visibility)
        out.square().sum().backward()
        results.append([out.detach(), places.grad, *(x.grad.clone() for x in layer.parameters())])
    for other in results[1:]:
        for x, y in zip(other, results[0], strict=True):
            assert torch.equal(x, y) and x.isfinite().all()


def test_gradients_reach_everything():
    layer = trained(Tracktention(16, num_heads=2, depth=1, sigma=0.8))
    features, tracks, visibility = scene(B=1, T=2, M=3, h=2, w=3, C=16)
    leaves = (features.requires_grad_(), tracks.requires_grad_())
    assert torch.autograd.gradcheck(lambda *x: layer(*x, visibility), leaves, fast_mode=True)
    layer(*leaves, visibility).square().sum().backward()
    assert all(x.grad.abs().max() > 0 for x in layer.parameters())


def test_a_feature_travels_along_its_track_only():
    """A change of one cell is seen in the other frames where its track runs, and nowhere else."""
    layer = trained(Tracktention(32, num_heads=4, sigma=0.2))
    features = torch.randn(1, 3, 8, 8, 32, dtype=torch.float64)
    tracks = torch.tensor([[[[1.5, 1.5], [6.5, 6.5]], [[2.5, 1.5], [6.5, 6.5]], [[3.5, 1.5], [6.5, 6.5]]]]).double()
    changed = features.clone()
    changed[0, 0, 1, 1] += 1
    moved = (layer(changed, tracks) - layer(features, tracks)).abs().amax(-1)[0]
    assert moved[1, 1, 2] > 1e-3 and moved[2, 1, 3] > 1e-3
    assert moved[1:, 6, 6].max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_and_half_precision(dtype):
    layer = trained(Tracktention(32, num_heads=4))
    features, tracks, visibility = scene()
    exact = layer(features, tracks, visibility)
    layer, features = layer.float(), features.float()
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(features, tracks.float(), visibility)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), exact, rtol=0.1, atol=0.2)
    half = layer.to(dtype)(features.to(dtype), tracks.float(), visibility)
    assert half.dtype == dtype
    torch.testing.assert_close(half.double(), exact, rtol=0.1, atol=0.5 if dtype == torch.bfloat16 else 1e-4)


def test_rotation_knows_differences_and_keeps_norms():
    q, k = torch.randn(2, 1, 1, 24, dtype=torch.float64)
    a, b, shift = torch.randn(3, 1, 2, dtype=torch.float64) * 10
    torch.testing.assert_close((rotate(q, a) * rotate(k, b)).sum(), (rotate(q, a + shift) * rotate(k, b + shift)).sum())
    torch.testing.assert_close(rotate(q, a).norm(), q.norm())
    assert (rotate(q, a) - rotate(q, b)).abs().max() > 0.1


def test_compiled_as_one_graph():
    torch._dynamo.reset()
    layer = trained(Tracktention(32, num_heads=4, depth=1))
    inputs = scene()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), layer(*inputs))


def test_parameters():
    """About the 17 million that the paper reports, for a ViT-B."""
    with torch.device("meta"):
        layer = Tracktention(768, num_heads=12)
    assert sum(x.numel() for x in layer.parameters()) / 1e6 == pytest.approx(18.3, abs=0.1)
    state = {key: tuple(x.shape) for key, x in Tracktention(32, num_heads=4, depth=1).state_dict().items()}
    linear = {"project", "sample_query", "sample_key", "splat_query", "splat_key", "splat_value", "blocks.0.proj"}
    expected = {f"{name}.weight": (32, 32) for name in linear} | {f"{name}.bias": (32,) for name in linear}
    norms = {f"{a}_{b}_norm" for a in ("sample", "splat") for b in ("query", "key")} | {
        "blocks.0.norm1",
        "blocks.0.norm2",
    }
    expected |= {f"{name}.{kind}": (32,) for name in norms for kind in ("weight", "bias")}
    for name, out, into in (("qkv", 96, 32), ("fc1", 128, 32), ("fc2", 32, 128)):
        expected |= {f"blocks.0.{name}.weight": (out, into), f"blocks.0.{name}.bias": (out,)}
    assert state == expected | {"out.weight": (32, 32)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(dim=32), "multiple of 8 from 8 to 256, got 32 / 8"),
        (dict(dim=64, num_heads=0), "choose another num_heads"),
        (dict(dim=64, depth=-1), "depth must be 0 or more"),
        (dict(dim=64, sigma=0.0), "sigma must be positive"),
    ],
)
def test_bad_construction(arguments, message):
    with pytest.raises(ValueError, match=message):
        Tracktention(**arguments)


def test_bad_input():
    layer, (features, tracks, visibility) = Tracktention(32, num_heads=4).double(), scene()
    for change, error, message in (
        (dict(features=features[0]), ValueError, r"features must be \[B, T, h, w, 32\]"),
        (dict(tracks=tracks[:, :2]), ValueError, r"tracks must be \[2, 4, M, 2\]"),
        (dict(tracks=tracks.long()), TypeError, "tracks must be floating point"),
        (dict(visibility=visibility.float()), TypeError, "visibility must be bool"),
        (dict(visibility=visibility[..., 1:]), ValueError, r"visibility must have shape \(2, 4, 6\)"),
    ):
        with pytest.raises(error, match=message):
            layer(**{"features": features, "tracks": tracks, "visibility": visibility, **change})


# Image networks


class Net(nn.Module):
    """A ConvNet of two stages."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.stage = nn.Sequential(nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32))
        self.head = nn.Conv2d(32, 5, 1)

    def forward(self, x, scale=1.0):
        return {"logits": scale * self.head(self.stage(self.stem(x))), "number": 3}


def ours(registers=0):
    return randomised(DINOv2(DINOv2Config(32, 3, 2, num_registers=registers, grid=4))).float()


def theirs(registers=False):
    transformers = pytest.importorskip("transformers", minversion="5.0")
    name = "Dinov2WithRegisters" if registers else "Dinov2"
    config = getattr(transformers, f"{name}Config")(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=56, patch_size=14
    )
    return randomised(getattr(transformers, f"{name}Model")(config)).float()


def timms():
    timm = pytest.importorskip("timm")
    return timm.create_model("vit_tiny_patch16_224", img_size=64, patch_size=16, embed_dim=32, depth=3, num_heads=2)


class Tupled(nn.Module):
    """A network whose blocks return tuples, as in older `transformers`."""

    class Block(nn.Module):
        def forward(self, x):
            return x * 2, None

    def __init__(self):
        super().__init__()
        self.embed = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 32, 14, stride=14))
        self.blocks = nn.ModuleList(self.Block() for _ in range(3))

    def forward(self, x):
        x = self.embed(x).flatten(2).mT
        for block in self.blocks:
            x, _ = block(x)
        return x


MODELS = {
    "ours": (ours, [0, -1], 32),
    "ours with registers": (lambda: ours(4), [1], 32),
    "transformers": (theirs, [0, -1], 32),
    "transformers with registers": (lambda: theirs(True), [0, 2], 32),
    "timm": (timms, [0, 2], 32),
    "tuples": (Tupled, [0, 2], 32),
    "depth": (lambda: DepthModel(DINOv2Config(32, 4, 2, grid=4), 16, (8, 8, 8, 8)), [1, 3], 32),
    "convolutions": (lambda: Net().eval(), ["stem", "stage"], [16, 32]),
    "channels last": (lambda: Net().eval().to(memory_format=torch.channels_last), ["stem", "stage.1"], [16, 32]),
}


def tensors(output):
    if isinstance(output, torch.Tensor):
        return [output]
    items = output.values() if hasattr(output, "values") else output if isinstance(output, (tuple, list)) else []
    return [x for item in items for x in tensors(item)]


@pytest.mark.parametrize("name", MODELS)
def test_insertion_changes_nothing_until_it_learns(name):
    build, blocks, dim = MODELS[name]
    image = build()
    before = copy.deepcopy(image.state_dict())
    size = 64 if name == "timm" else 56
    video, tracks = torch.randn(2, 3, 3, size, size), torch.rand(2, 3, 5, 2) * size
    visibility = torch.rand(2, 3, 5) > 0.3
    with torch.no_grad():
        expected = tensors(image(video.flatten(0, 1)))
        model = insert_tracktention(image, blocks, dim, num_heads=2)
        fresh = tensors(model(video, tracks, visibility))
        assert len(fresh) == len(expected) > 0
        for x, y in zip(fresh, expected, strict=True):
            assert x.shape[:2] == (2, 3) and torch.equal(x.flatten(0, 1), y)

        # The image network is the same module with the same keys and values, and no hook is left on it.
        after = image.state_dict()
        assert model.image is image and list(after) == list(before)
        assert all(torch.equal(after[key], before[key]) for key in before)
        assert not any(module._forward_hooks for module in image.modules())

        for layer in model.layers:
            nn.init.normal_(layer.out.weight, std=0.5)
        learnt = tensors(model(video, tracks, visibility))
        assert any((x.flatten(0, 1) - y).abs().max() > 1e-4 for x, y in zip(learnt, expected, strict=True))
        for x, y in zip(tensors(image(video.flatten(0, 1))), expected, strict=True):
            assert torch.equal(x, y)
        none = tensors(model(video, tracks, torch.zeros_like(visibility)))
        for x, y in zip(none, expected, strict=True):
            assert torch.equal(x.flatten(0, 1), y)


@pytest.mark.parametrize("registers", [0, 4])
def test_only_patches_attend(registers):
    """Class and register tokens leave a block as they came, and patches go through the layer at their own places."""
    image = ours(registers)
    model = insert_tracktention(image, [-1], 32, num_heads=2)
    nn.init.normal_(model.layers[0].out.weight)
    video, tracks = torch.randn(1, 3, 3, 28, 42), torch.rand(1, 3, 4, 2) * 28
    seen = []
    handle = image.norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        image(video[0])
        model(video, tracks)
    handle.remove()
    plain, reached = seen
    prefix = 1 + registers
    assert torch.equal(plain[:, :prefix], reached[:, :prefix])
    patches = plain[:, prefix:].view(1, 3, 2, 3, 32)
    with torch.no_grad():
        expected = model.layers[0](patches, tracks / 14)
    torch.testing.assert_close(reached[:, prefix:].reshape(1, 3, 2, 3, 32), expected)


def test_everything_is_trained_and_saved():
    model = insert_tracktention(Net(), ["stem", "stage"], [16, 32], num_heads=2)
    for layer in model.layers:
        nn.init.normal_(layer.out.weight)
    video, tracks = torch.randn(2, 3, 3, 32, 32), torch.rand(2, 3, 5, 2) * 32
    model(video, tracks, scale=2.0)["logits"].square().sum().backward()
    assert all(x.grad is not None for x in model.parameters())
    other = insert_tracktention(Net(), ["stem", "stage"], [16, 32], num_heads=2)
    other.load_state_dict(model.state_dict())
    twin = copy.deepcopy(model).eval()
    assert torch.equal(other.eval()(video, tracks)["logits"], twin(video, tracks)["logits"])
    assert {key.split(".")[0] for key in model.state_dict()} == {"image", "layers"}


def test_hooks_leave_after_an_error():
    model = insert_tracktention(Net(), ["stem"], 24, num_heads=3)
    with pytest.raises(ValueError, match=r"features must be \[B, T, h, w, 24\]"):
        model(torch.randn(1, 2, 3, 32, 32), torch.rand(1, 2, 5, 2))
    assert not any(module._forward_hooks for module in model.image.modules())


def test_calls_of_several_threads_are_independent():
    model = insert_tracktention(Net(), ["stem"], 16, num_heads=2).eval()
    nn.init.normal_(model.layers[0].out.weight, std=3)
    clips = [(torch.randn(1, 2, 3, 32, 32), torch.rand(1, 2, 5, 2) * 32) for _ in range(4)]
    with torch.no_grad():
        expected = [model(*clip)["logits"] for clip in clips]
        alone = [model.image(clip[0][0])["logits"] for clip in clips]

    @torch.no_grad()
    def call(index):
        clip = clips[index % 4]
        if index % 3 == 0:
            return torch.equal(model.image(clip[0][0])["logits"], alone[index % 4])
        return torch.equal(model(*clip)["logits"], expected[index % 4])

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(call, range(60)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ours", "convolutions"])
def test_compiled_model_is_one_graph(name):
    torch._dynamo.reset()
    build, blocks, dim = MODELS[name]
    model = insert_tracktention(build(), blocks, dim, num_heads=2, depth=1).eval()
    for layer in model.layers:
        nn.init.normal_(layer.out.weight, std=0.5)
    video, tracks, visibility = torch.randn(2, 3, 3, 56, 56), torch.rand(2, 3, 5, 2) * 56, torch.rand(2, 3, 5) > 0.3
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected, actual = (tensors(f(video, tracks, visibility)) for f in (model, compiled))
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y)
    # The image network is as it was: nothing hangs on it, and it can be compiled by itself.
    assert not any(module._forward_hooks or "forward" in module.__dict__ for module in model.image.modules())
    image = torch.compile(model.image, fullgraph=True, backend="aot_eager")
    for x, y in zip(tensors(image(video[0])), tensors(model.image(video[0])), strict=True):
        torch.testing.assert_close(x, y)

    def gradients(call):
        model.zero_grad()
        sum(x.square().sum() for x in tensors(call(video, tracks, visibility))).backward()
        return {key: x.grad for key, x in model.named_parameters() if x.grad is not None}

    expected, actual = gradients(model), gradients(compiled)
    assert actual.keys() == expected.keys() and any(key.startswith("layers") for key in actual)
    for key, grad in expected.items():
        torch.testing.assert_close(actual[key], grad, atol=1e-4 * grad.abs().max().item(), rtol=1e-4, msg=key)


def test_compiling_a_block_with_a_hook_of_its_own_is_refused():
    torch._dynamo.reset()
    build, blocks, dim = MODELS["ours"]
    model = insert_tracktention(build(), blocks, dim, num_heads=2, depth=1).eval()
    model.image.blocks[blocks[0]].register_forward_hook(lambda module, args, output: output * 2)
    video, tracks = torch.randn(1, 2, 3, 56, 56), torch.rand(1, 2, 5, 2) * 56
    model(video, tracks)
    with pytest.raises(Exception, match="no forward hooks of their own"):
        torch.compile(model, fullgraph=True, backend="aot_eager")(video, tracks)


def test_reentrant_checkpointing_of_a_block_is_refused():
    class Checkpointed(Net):
        def forward(self, x):
            return self.head(checkpoint(self.stage, self.stem(x), use_reentrant=True))

    model = insert_tracktention(Checkpointed(), ["stage"], 32, num_heads=2)
    with pytest.raises(RuntimeError, match="checkpoint the whole model"):
        model(torch.randn(1, 2, 3, 32, 32), torch.rand(1, 2, 5, 2) * 32)


def test_patches_keep_their_size_in_frames_that_they_do_not_fill():
    """69 pixels are four patches of 14 and a rest: pixel 49 is the centre of patch 3."""
    model = insert_tracktention(theirs(), [0], 32, num_heads=2)
    seen = []
    model.layers[0].forward = lambda grid, tracks, visibility: seen.append((grid.shape, tracks)) or grid
    model(torch.randn(1, 1, 3, 56, 69), torch.tensor([[[[49.0, 7.0]]]]))
    (shape, tracks), *_ = seen
    assert shape == (1, 1, 4, 4, 32)
    assert tracks.flatten().tolist() == [3.5, 0.5]


@pytest.mark.parametrize(
    ("blocks", "dim", "message"),
    [
        ([], 32, "blocks must name at least one"),
        ([0, -3], 32, "none of them twice"),
        ([3], 32, "no block 3 in the 3 modules of 'blocks'"),
        (["neck"], 32, "no module called 'neck'; it has patch_embed"),
        ([0, 1], [32], "one for each of 2 blocks, got 1"),
    ],
)
def test_bad_insertion(blocks, dim, message):
    with pytest.raises(ValueError, match=message):
        insert_tracktention(ours(), blocks, dim, num_heads=2)


def test_bad_video_and_blocks():
    model = insert_tracktention(ours(), ["patch_embed.proj"], 32, num_heads=2)
    with pytest.raises(ValueError, match=r"video must be \[B, T, 3, H, W\]"):
        model(torch.randn(2, 3, 28, 28), torch.rand(1, 2, 5, 2))
    flat = nn.Sequential(nn.Flatten(), nn.Linear(48, 8))
    model = insert_tracktention(flat, ["1"], 8, num_heads=1)
    with pytest.raises(ValueError, match="a block must return"):
        model(torch.randn(1, 2, 3, 4, 4), torch.rand(1, 2, 5, 2))


# The community's re-implementation for DDColor, github.com/Nazim-fad/Tracktention (read, never copied)


@pytest.mark.skipif(not OFFICIAL_DIR, reason="TRITONKERN_OFFICIAL_DIR is not set")
def test_attention_of_the_community_implementation(official):  # noqa: F811
    """Its attention is ours where both have the same queries, keys and values; it counts cell centres from 0."""
    try:
        theirs = official("Tracktention", "models.tracktention")
    except ModuleNotFoundError:
        pytest.skip("there is no Tracktention in TRITONKERN_OFFICIAL_DIR")
    peer = theirs.Tracktention(32, num_heads=4, sigma=0.6)
    tracks, grid, features = torch.rand(2, 3, 6, 2) * 5, (5, 7), torch.randn(2, 3, 35, 32)
    cells = peer.make_feature_coords(2, 3, grid, "cpu", torch.float32)
    heads = lambda x: x.unflatten(-1, (4, 8))  # noqa: E731
    unit = lambda x: F.normalize(heads(x), dim=-1, eps=1e-6)  # noqa: E731

    embedded = peer.point_embedder(tracks)
    key, value = peer.rope2d(peer.sampler.W_k(features), cells), peer.rope2d(features, cells)
    sampled = track_sample_attention(
        unit(peer.sampler.W_q(embedded)), unit(key).unflatten(2, grid), heads(value).unflatten(2, grid),
        tracks + 0.5, sigma=0.6,
    )  # fmt: skip
    expected = peer.sampler(features, embedded, tracks, cells, peer.rope2d)
    torch.testing.assert_close(sampled.flatten(-2), expected)

    nn.init.eye_(peer.splatter.W_out.weight)
    query = unit(peer.rope2d(peer.splatter.W_q(peer.point_embedder(cells)), cells)).unflatten(2, grid)
    key = unit(peer.rope2d(peer.splatter.W_k(expected), tracks))
    splatted = track_splat_attention(query, key, heads(peer.rope2d(expected, tracks)), tracks + 0.5, sigma=0.6)
    other = peer.splatter(expected, cells, tracks, peer.point_embedder, peer.rope2d)
    torch.testing.assert_close(splatted.flatten(-2).flatten(2, 3), other)
