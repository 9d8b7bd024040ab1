"""Every module with parts that other packages have changed: LoRA, parametrizations, pruning, hooks, sharding, int8.

The oracle is the unchanged module with the weights that the changed parts compute.
"""

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import parametrizations, prune

from tritonkern.models import (
    TAPIR,
    Chrono,
    ChronoNano,
    CogVideoX,
    DepthModel,
    DINOv2,
    LocoTrackRefiner,
    insert_tracktention,
)
from tritonkern.models.chrono_nano import _BLOCK, frames_in_blocks
from tritonkern.models.dinov2 import DINOv2Config
from tritonkern.models.nano import RefinerBlock
from tritonkern.nn import CorrelationSoftArgmax, TemporalAdapter, TemporalWindowAttention, Tracktention

peft = pytest.importorskip("peft")
TINY = DINOv2Config(dim=64, depth=2, num_heads=1, grid=3)


def video(frames=2):
    return torch.rand(1, frames, 256, 256, 3) * 2 - 1


def queries():
    return torch.tensor([[[0.0, 100.0, 60.0], [1.0, 30.0, 200.0]]])


def tracks():
    return torch.rand(1, 2, 5, 2) * 4


def adapters(dim):
    return nn.ModuleList([TemporalAdapter(dim, hidden=32, pool=1)])


class BackboneWithAdapter(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone, self.adapter = DINOv2(TINY), adapters(64)

    def forward(self, images):
        return self.backbone.get_intermediate_layers(images, adapters=list(self.adapter))[0]


class SmallLocoTrack(nn.Module):
    """On frames of 64 x 64 pixels."""

    def __init__(self):
        super().__init__()
        self.refiner = LocoTrackRefiner("small", steps=1)

    def forward(self, video, queries):
        return self.refiner.refine(self.refiner.features(video), queries)


class SmallTAPIR(nn.Module):
    """On frames of 64 x 64 pixels."""

    def __init__(self):
        super().__init__()
        self.tapir = TAPIR()
        self.tapir.steps, self.tapir.torch_pips_mixer.blocks = 1, self.tapir.torch_pips_mixer.blocks[:1]

    def forward(self, video, queries):
        return self.tapir.track(self.tapir.features(video), queries)


class QueriesAndKeys(nn.Module):
    """Of all heads of one layer, then of one head of another."""

    def __init__(self):
        super().__init__()
        sizes = dict(num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=24)
        sizes |= dict(text_embed_dim=12, num_layers=2, sample_width=8, sample_height=8, max_text_seq_length=5)
        self.transformer = CogVideoX(**sizes)

    def forward(self, *inputs):
        (first,) = self.transformer.query_key(*inputs, [0])
        (second,) = self.transformer.query_key(*inputs, [1], [1])
        return *first, *second, self.transformer(*inputs)


def small_chrono():
    model = Chrono(TINY, hidden=32)
    model.cells = 4
    return model


# Name -> (module, arguments)
MODULES = {
    "TemporalAdapter": lambda: (TemporalAdapter(16, hidden=32, pool=2), [torch.randn(1, 3, 4, 4, 16)]),
    "TemporalWindowAttention": lambda: (TemporalWindowAttention(32, 4), [torch.randn(1, 3, 5, 32)]),
    "Tracktention": lambda: (Tracktention(32, 2, depth=1), [torch.randn(1, 2, 4, 4, 32), tracks()]),
    "CorrelationSoftArgmax": lambda: (
        CorrelationSoftArgmax((256, 256)),
        [queries(), nn.functional.normalize(torch.randn(1, 2, 4, 4, 8), dim=-1)],
    ),
    "RefinerBlock": lambda: (RefinerBlock(32), [torch.randn(3, 5, 32)]),
    "DINOv2": lambda: (BackboneWithAdapter(), [torch.randn(1, 2, 3, 28, 28)]),
    "DepthModel": lambda: (DepthModel(DINOv2Config(64, 4, 1, grid=3), 8, (8, 8, 8, 8)), [torch.randn(2, 3, 28, 28)]),
    "Chrono": lambda: (small_chrono(), [video(), queries()]),
    "ChronoNano": lambda: (ChronoNano(32, 2, 2, 16, 16), [video(), queries()]),
    "LocoTrackRefiner": lambda: (SmallLocoTrack(), [video()[:, :, :64, :64], queries()]),
    "TAPIR": lambda: (SmallTAPIR(), [video()[:, :, :64, :64], queries()]),
    "CogVideoX": lambda: (
        QueriesAndKeys(),
        [torch.randn(1, 2, 4, 8, 8), torch.randn(1, 5, 12), torch.tensor([20.0])],
    ),
    "TracktentionModel": lambda: (
        insert_tracktention(DINOv2(TINY), [0], 64, num_heads=2, depth=1),
        [torch.randn(1, 2, 3, 28, 28), tracks() * 7],
    ),
}
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d)


# Modules of which a case takes seconds, and the test that runs quickly all the same for the last two.
SLOW = {"ChronoNano", "DepthModel", "LocoTrackRefiner", "TAPIR"}


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        slow = {"ChronoNano"} if metafunc.function is test_dynamic_quantisation else SLOW
        params = [pytest.param(name, marks=[pytest.mark.slow] * (name in slow)) for name in MODULES]
        metafunc.parametrize("case", params, indirect=True)


@pytest.fixture
def case(request):
    module, arguments = MODULES[request.param]()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "norm" not in name and not parameter.any():  # layers that start at zero hide what is before them
                parameter.normal_(std=0.05)
    return module.eval(), arguments


def results(module, arguments):
    output = module(*arguments)
    return [output] if isinstance(output, torch.Tensor) else list(output)


def layers(module, kinds=LAYERS):
    return {name: part for name, part in module.named_modules() if isinstance(part, kinds)}


def lora(module):
    names = list(layers(module, (nn.Linear, nn.Conv2d)))
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=names, init_lora_weights=False), module)
    return {name: module.get_submodule(name) for name in names}


def lora_weight(layer):
    return layer.base_layer.weight + layer.get_delta_weight("default")


def weight_norm(module):
    for layer in layers(module).values():
        parametrizations.weight_norm(layer)
        with torch.no_grad():
            layer.parametrizations.weight.original0.mul_(1.3)
    return layers(module)


def spectral_norm(module):
    for layer in layers(module).values():
        parametrizations.spectral_norm(layer)
    module.eval()
    return layers(module)


def pruned(module):
    for layer in layers(module).values():
        prune.l1_unstructured(layer, "weight", 0.3)
    return layers(module)


def replaced_forward(module):
    for layer in layers(module).values():
        layer.forward = lambda x, layer=layer: type(layer).forward(layer, x) * 1.3
    return layers(module)


def subclassed(module):
    for layer in layers(module).values():
        base = type(layer)
        layer.__class__ = type("Scaled", (base,), {"forward": lambda self, x, base=base: base.forward(self, x) * 1.3})
    return layers(module)


def scaled(layer):
    return layer.weight * 1.3


# Kind -> (what changes a module and returns its changed layers by name, the weight that a layer computes with)
CHANGES = {
    "LoRA": (lora, lora_weight),
    "weight norm": (weight_norm, lambda layer: layer.weight),
    "spectral norm": (spectral_norm, lambda layer: layer.weight),
    "pruning": (pruned, lambda layer: layer.weight),
    "replaced forward": (replaced_forward, scaled),
    "subclass": (subclassed, scaled),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_changed_layers_take_effect_and_get_gradients(case, kind):
    module, arguments = case
    oracle, original = copy.deepcopy(module), results(module, arguments)
    change, weight = CHANGES[kind]
    changed = change(module)
    with torch.no_grad():
        for name, layer in changed.items():
            target = oracle.get_submodule(name)
            target.weight.copy_(weight(layer))
            if weight is scaled and target.bias is not None:
                target.bias.mul_(1.3)
    actual, expected = results(module, arguments), results(oracle, arguments)
    assert any((x - y).abs().max() > 1e-3 for x, y in zip(actual, original, strict=True))
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4)

    for outputs in (actual, expected):
        sum(output.square().sum() for output in outputs).backward()
    for name, layer in changed.items():
        if not any(parameter.requires_grad for parameter in oracle.get_submodule(name).parameters()):
            continue
        trained = {parameter.grad is not None for parameter in layer.parameters() if parameter.requires_grad}
        assert trained == {oracle.get_submodule(name).weight.grad is not None}, name
    assert any(oracle.get_submodule(name).weight.grad is not None for name in changed)


@pytest.mark.parametrize("backward", [False, True])
def test_every_hook_runs(case, backward):
    module, arguments = case
    expected = results(module, arguments)
    parts = {
        name: part
        for name, part in module.named_modules()
        if name and not isinstance(part, nn.ModuleList | nn.ModuleDict) and "refinenet4.resConfUnit1" not in name
    }
    # The test calls methods of these, not they themselves; no gradient reaches the positions of the first match.
    silent = ["backbone", "refiner", "tapir"]
    if backward:
        silent += ["refiner.cost_conv", "refiner.occ_linear", "tapir.torch_cost_volume_track_mods.hid2"]
    for name in silent:
        parts.pop(name, None)
    ran = set()
    for name, part in parts.items():
        if backward:
            part.register_full_backward_hook(lambda *args, name=name: ran.add(name))
        else:
            part.register_forward_hook(lambda *args, name=name: ran.add(name))
    if backward:
        actual = results(module, arguments)
        sum(output.square().sum() for output in actual).backward()
    else:
        with torch.no_grad():
            actual = results(module, arguments)
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4)
    assert set(parts) == ran


@torch.no_grad()
def test_hooks_see_all_frames_at_once():
    """`ChronoNano` convolves some frames at a time."""
    layer, frames, seen = nn.Linear(2, 2), torch.randn(2 * _BLOCK + 1, 2), []
    expected = layer(frames)
    for _ in range(2):
        torch.testing.assert_close(frames_in_blocks(layer, [nn.Sequential(layer)], frames), expected)
        layer.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    assert seen == [len(frames)]


def test_dynamic_quantisation(case):
    module, arguments = case
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = torch.ao.quantization.quantize_dynamic(module, {nn.Linear})
        expected, actual = results(module, arguments), results(quantised, arguments)
    assert len(layers(module, nn.Linear)) == sum("Dynamic" in str(type(x)).title() for x in quantised.modules())
    for x, y in zip(actual, expected, strict=True):
        assert (x - y).norm() < 0.1 * y.norm()


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_fully_sharded(case, one_process):
    module, arguments = case
    sharded = copy.deepcopy(module)
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    for name, part in list(sharded.named_modules())[:0:-1]:
        if isinstance(part, TemporalAdapter | nn.Linear | DINOv2) and name != "backbone":
            dist.fsdp.fully_shard(part, mesh=mesh)
    dist.fsdp.fully_shard(sharded, mesh=mesh)
    expected, actual = results(module, arguments), results(sharded, arguments)
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4)
    for outputs in (actual, expected):
        sum(output.square().sum() for output in outputs).backward()
    largest = max(parameter.grad.abs().max().item() for parameter in module.parameters() if parameter.grad is not None)
    for (name, parameter), shard in zip(module.named_parameters(), sharded.parameters(), strict=True):
        assert (parameter.grad is None) == (shard.grad is None), name
        if parameter.grad is not None:
            # Gradients of the biases of keys are rounding errors.
            atol = 1e-3 * parameter.grad.abs().max().item() + 1e-6 * largest
            torch.testing.assert_close(shard.grad.full_tensor(), parameter.grad, rtol=1e-3, atol=atol, msg=name)


def test_distributed_data_parallel_trains(case, one_process):
    module, arguments = case
    parallel = nn.parallel.DistributedDataParallel(module)
    optimiser = torch.optim.SGD(module.parameters(), lr=1e-3)
    for _ in range(3):
        optimiser.zero_grad()
        sum(output.square().mean() for output in results(parallel, arguments)).backward()
        optimiser.step()


@pytest.mark.parametrize(
    "name, layer",
    [
        ("conv1", nn.Conv2d(16, 32, 3, padding=2, dilation=2)),
        ("conv1", nn.Conv2d(16, 32, 3, padding=1, padding_mode="circular")),
        ("conv1", nn.Conv2d(16, 32, 3, padding=1, bias=False)),
        ("conv2", nn.Conv2d(32, 16, 3, padding="same")),
        ("norm", nn.GroupNorm(4, 16)),
        ("norm", nn.GroupNorm(1, 16, affine=False)),
        ("conv_pool", nn.Conv2d(32, 32, 2, stride=2, groups=4)),
        ("norm2", nn.Identity()),
    ],
    ids=str,
)
def test_other_settings_of_a_layer_are_followed(name, layer):
    adapter, tokens = TemporalAdapter(16, hidden=32, pool=2), torch.randn(1, 3, 4, 4, 16)
    nn.init.normal_(adapter.conv2.weight)
    setattr(adapter, name, layer)
    actual = adapter(tokens)
    adapter.norm.register_forward_hook(lambda *args: None)  # every submodule is called
    torch.testing.assert_close(actual, adapter(tokens), rtol=1e-4, atol=1e-5)
