"""Patched models whose layers do more than the official ones: LoRA, hooks, parametrizations, quantisation.

Whatever was done to a layer before or after `tritonkern.patch`, the patched model computes what the unpatched one does.
"""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import parametrizations, prune
from tracker_twins import TWINS

import tritonkern

TRACKERS = ("alltracker", "chrono", "tapir", "locotrack", "cotracker")


@pytest.fixture(params=TRACKERS)
def twin(request):
    return TWINS[request.param]()


def with_lora(twin):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=list(twin.linear), init_lora_weights=False)
    peft.inject_adapter_in_model(config, twin.model)


def with_weight_norm(twin):
    for name in twin.layers:
        layer = twin.model.get_submodule(name)
        if layer.weight.ndim > 1:
            parametrizations.weight_norm(layer)
            with torch.no_grad():
                layer.parametrizations.weight.original0.mul_(1.2)


def with_pruning(twin):
    for name in twin.layers:
        prune.random_unstructured(twin.model.get_submodule(name), "weight", 0.3)


def with_hooks(twin):
    for name in twin.layers:
        twin.model.get_submodule(name).register_forward_hook(lambda module, args, output: output * 1.1)


def with_other_layers(twin):
    class Doubled(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x) * 1.5

    for name in twin.layers:
        parent, _, last = name.rpartition(".")
        setattr(twin.model.get_submodule(parent), last, Doubled(twin.model.get_submodule(name)))


def with_quantised_layers(twin):
    torch.ao.quantization.quantize_dynamic(twin.model, {nn.Linear}, inplace=True)


CHANGES = [
    with_lora,
    with_weight_norm,
    with_pruning,
    with_hooks,
    with_other_layers,
    with_quantised_layers,
]
QUANTISATION = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.ao.quantization")


def largest(difference):
    """Of each of the results: positions in pixels, logits."""
    return difference.abs().flatten(0, -2).amax(0)


# Cases of more than five seconds; each tracker and each change has quick ones.
SLOW = {
    ("tapir", with_weight_norm),
    ("cotracker", with_weight_norm),
    ("locotrack", with_other_layers),
    ("locotrack", with_quantised_layers),
}


@QUANTISATION
@torch.no_grad()
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    "twin, change",
    [
        pytest.param(name, change, marks=[pytest.mark.slow] * (change is with_lora or (name, change) in SLOW))
        for name in TRACKERS
        for change in CHANGES
    ],
    indirect=["twin"],
)
def test_changed_layers_count(twin, change, when):
    plain = twin.outputs()
    if change is with_other_layers and when == "before":
        pytest.skip("a layer of another kind is not recognised as its place")
    unpatched, model = copy.deepcopy(twin), twin.model
    torch.manual_seed(1)
    change(unpatched)
    expected = unpatched.outputs()
    torch.manual_seed(1)
    if when == "before":
        change(twin)
    handle = tritonkern.patch(model)
    if when == "after":
        twin.outputs()
        change(twin)
    actual = twin.outputs()
    # Quantised activations take a neighbouring step where they differ in the last place.
    allowed = 0.1 if change is with_quantised_layers else 1e-3
    assert largest(actual - expected).max() < allowed
    assert largest(expected - plain).max() > 5 * allowed or change is with_quantised_layers
    handle.restore()
    torch.testing.assert_close(twin.outputs(), expected, rtol=0, atol=0)


@torch.no_grad()
def test_every_hook_fires_as_often_as_unpatched(twin):
    """Also at the first call, which compares the new methods with the model's own."""
    calls = {}

    def count(name):
        def hook(*_):
            calls[name] = calls.get(name, 0) + 1

        return hook

    for name, module in twin.model.named_modules():
        if not list(module.children()):
            module.register_forward_hook(count(name))
    twin.outputs()
    expected = dict(calls)
    for verify in (True, False):
        calls.clear()
        with tritonkern.patch(twin.model, verify=verify):
            twin.outputs()
        # Layers of the attention and the soft-argmax that compute nothing by themselves
        fused = {name for name in expected if name.endswith(("q_norm", "k_norm", "proj_drop"))}
        assert calls.keys() | fused == expected.keys()
        assert all(calls[name] == expected[name] for name in calls.keys() - fused)


@pytest.mark.slow  # importing peft takes seconds
def test_lora_learns(twin):
    with_lora(twin)

    def gradients():
        twin.model.zero_grad(set_to_none=True)
        twin.outputs().square().mean().backward()
        return {name: p.grad for name, p in twin.model.named_parameters() if p.grad is not None and "lora" in name}

    expected = gradients()
    with tritonkern.patch(twin.model):
        actual = gradients()
    assert expected and actual.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(actual[name], grad, atol=1e-3 * grad.abs().max().item() + 1e-7, rtol=0, msg=name)


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("when", ["before", "after"])
def test_fully_sharded(twin, when, one_process):
    """FSDP2, with some layers in groups of their own and the model around them."""

    def results():
        twin.model.zero_grad(set_to_none=True)
        out = twin.outputs()
        out.square().mean().backward()
        grads = {name: p.grad for name, p in twin.model.named_parameters() if p.grad is not None}
        return out.detach(), {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in grads.items()}

    def shard():
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        for name in (*twin.layers, ""):
            dist.fsdp.fully_shard(twin.model.get_submodule(name), mesh=mesh)

    expected, expected_grads = results()
    if when == "before":
        shard()
    with tritonkern.patch(twin.model):
        if when == "after":
            shard()
        for _ in range(2):
            actual, grads = results()
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-3)
    assert grads.keys() == expected_grads.keys()
    for name, grad in expected_grads.items():
        torch.testing.assert_close(grads[name], grad, atol=1e-3 * grad.abs().max().item() + 1e-6, rtol=0, msg=name)
