"""Low-rank adapters: arithmetic, rows of heads, training, and files beside peft's."""

import copy

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from test_cogvideox import SIZES, inputs
from torch import nn

from tritonkern.models import (
    CogVideoX,
    add_low_rank,
    attention_targets,
    load_low_rank,
    low_rank_parameters,
    merge_low_rank,
    save_low_rank,
)
from tritonkern.models.low_rank import LowRankLinear, project_rows

TARGETS = attention_targets(1)
PREFIX = "transformer.base_model.model."


def transformer(adapted=True, rank=3, alpha=6.0, targets=TARGETS):
    torch.manual_seed(0)
    model = CogVideoX(**SIZES).eval()
    if adapted:
        add_low_rank(model, targets, rank, alpha)
        with torch.no_grad():  # B starts at zero
            for parameter in low_rank_parameters(model):
                parameter.normal_(std=0.3)
    return model


def run(model):
    with torch.no_grad():
        return model(*inputs())


def test_the_published_layers():
    with torch.device("meta"):
        model = CogVideoX()
        add_low_rank(model, attention_targets(17))
    parameters = low_rank_parameters(model)
    assert len(parameters) == 140 and sum(x.numel() for x in parameters) == 34_406_400
    assert [name for name, x in model.named_parameters() if x.requires_grad] == [
        f"{name}.lora_{side}.weight" for name in attention_targets(17) for side in "AB"
    ]


def test_a_new_adapter_changes_nothing():
    plain, model = transformer(adapted=False), transformer(adapted=False)
    add_low_rank(model, TARGETS, 3, 6.0)
    assert torch.equal(run(model), run(plain))


def test_formula_and_merge():
    model, plain = transformer(), transformer(adapted=False)
    name = "transformer_blocks.0.attn1.to_out.0"
    layer, x = model.get_submodule(name), torch.randn(4, 64)
    weight = plain.get_submodule(name).weight + 2 * layer.lora_B.weight @ layer.lora_A.weight
    torch.testing.assert_close(layer(x), F.linear(x, weight, layer.bias))
    expected = run(model)
    assert (expected - run(plain)).abs().max() > 0.01
    merge_low_rank(model)
    assert type(model.get_submodule(name)) is nn.Linear and model.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(run(model), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("hooked", [None, "", "lora_A", "lora_B"])
def test_queries_of_one_head_go_through_the_adapter(hooked):
    model, (latents, text, timestep) = transformer(), inputs()
    layer, calls = model.get_submodule("transformer_blocks.1.attn1.to_q"), []
    if hooked is not None:
        layer.get_submodule(hooked).register_forward_hook(lambda *x: calls.append(x[2]) or 2 * x[2])
    with torch.no_grad():
        ((query, key),) = model.query_key(latents, text, timestep, [1])
        assert bool(calls) == (hooked is not None)
        calls.clear()
        ((one_query, one_key),) = model.query_key(latents, text, timestep, [1], heads=[1])
        assert bool(calls) == (hooked is not None)
        merge_low_rank(model)
        ((merged, _),) = model.query_key(latents, text, timestep, [1], heads=[1])
    torch.testing.assert_close(one_query, query[..., 1:, :])
    torch.testing.assert_close(one_key, key[..., 1:, :])
    assert torch.allclose(merged, one_query, atol=1e-4) == (hooked is None or hooked == "")  # the norm undoes a factor


def test_one_head_needs_rows_only(monkeypatch):
    layer = transformer().get_submodule("transformer_blocks.1.attn1.to_q")
    x, rows = torch.randn(2, 5, 64), torch.arange(32, 64)
    expected, shapes, linear = layer(x)[..., 32:], [], F.linear
    monkeypatch.setattr(F, "linear", lambda x, w, *bias: shapes.append(tuple(w.shape)) or linear(x, w, *bias))
    torch.testing.assert_close(project_rows(layer, x, rows), expected)
    assert sorted(shapes) == [(3, 64), (32, 3), (32, 64)]


def test_training_moves_adapters_only():
    model, (latents, text, timestep) = transformer(), inputs()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(low_rank_parameters(model), 1e-2)
    ((query, key),) = model.query_key(latents, text, timestep, [1], heads=[0])
    (query.square().sum() + key.sum() + query.mul(key).sum()).backward()
    assert all((x.grad is not None) == x.requires_grad for x in model.parameters())
    optimizer.step()
    moved = {name for name, x in model.state_dict().items() if not torch.equal(x, before[name])}
    assert moved == {f"{name}.lora_{side}.weight" for name in TARGETS for side in "AB"}


def test_file(tmp_path):
    model, twin = transformer(), transformer(adapted=False)
    path = tmp_path / "pytorch_lora_weights.safetensors"
    save_low_rank(model, path)
    assert load_file(path).keys() == {f"{PREFIX}{name}.lora_{side}.weight" for name in TARGETS for side in "AB"}
    load_low_rank(twin, path, TARGETS, alpha=6.0)  # another rank than the published one: that of the file
    assert torch.equal(run(twin), run(model))
    with pytest.raises(ValueError, match="to_q has an adapter already"):
        load_low_rank(twin, path, TARGETS)
    with pytest.raises(ValueError, match="transformer has no adapters"):
        save_low_rank(transformer(adapted=False), path)


def test_file_is_readable_by_peft(tmp_path):
    peft = pytest.importorskip("peft")
    model = transformer()
    path = tmp_path / "pytorch_lora_weights.safetensors"
    save_low_rank(model, path)
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS)
    theirs = peft.get_peft_model(transformer(adapted=False), config)
    # As the published loader does: every "transformer." goes.
    state = {name.replace("transformer.", ""): x for name, x in load_file(path).items()}
    result = peft.set_peft_model_state_dict(theirs, state)
    assert not result.unexpected_keys and not [name for name in result.missing_keys if "lora" in name]
    torch.testing.assert_close(run(theirs), run(model))
    # And back: peft's own names.
    save_file({name: x.contiguous() for name, x in peft.get_peft_model_state_dict(theirs).items()}, path)
    twin = transformer(adapted=False)
    load_low_rank(twin, path, TARGETS, alpha=6.0)
    assert torch.equal(run(twin), run(model))


def drop(name):
    return lambda state: {key: x for key, x in state.items() if not key.endswith(name)}


def extra(name, value):
    return lambda state: state | {PREFIX + name: value}


Q0, A, B = "transformer_blocks.0.attn1.to_q", ".lora_A.weight", ".lora_B.weight"


@pytest.mark.parametrize(
    "spoil, message",
    [
        (drop(Q0 + B), rf"1 halves of a pair \(A without B or B without A\): {Q0}.lora_A.weight"),
        (lambda state: drop(Q0 + A)(drop(Q0 + B)(state)), f"lacks adapters of 1 layers: {Q0}"),
        (
            lambda state: extra(Q0.replace("0", "2") + A, torch.zeros(3, 64))(
                extra(Q0.replace("0", "2") + B, torch.zeros(64, 3))(state)
            ),
            "not expected, adapters of 1 layers: transformer_blocks.2.attn1.to_q",
        ),
        (extra(Q0 + A, torch.zeros(4, 64)), rf"{Q0}.lora_A.weight \[4, 64\] \(needs \[3, 64\]\)"),
        (extra(Q0 + B, torch.zeros(65, 3)), rf"{Q0}.lora_B.weight \[65, 3\] \(needs \[64, 3\]\)"),
        (extra(Q0 + ".weight", torch.zeros(64, 64)), "1 tensors that are not matrices of adapters"),
        (extra(Q0 + B, torch.zeros(64, 3, dtype=torch.int32)), "1 tensors that are not matrices of adapters"),
        (lambda state: state | {Q0 + A: torch.zeros(3, 64)}, f"{Q0}.lora_A.weight twice, with and without a prefix"),
    ],
    ids=["half", "missing", "another layer", "rank", "width", "foreign", "integers", "twice"],
)
def test_files_that_do_not_fit(tmp_path, spoil, message):
    path = tmp_path / "lora.safetensors"
    save_low_rank(transformer(), path)
    save_file(spoil(load_file(path)), path)
    model = transformer(adapted=False)
    with pytest.raises(ValueError, match=message):
        load_low_rank(model, path, TARGETS)
    assert not any(isinstance(layer, LowRankLinear) for layer in model.modules())


@pytest.mark.parametrize(
    "targets, rank, message",
    [
        (["transformer_blocks.9.attn1.to_q"], 3, "it has none called 'transformer_blocks.9.attn1.to_q'"),
        (["transformer_blocks.0.norm1"], 3, "transformer_blocks.0.norm1 is none: its class is _Modulation"),
        (TARGETS, 0, "rank must be 1 or more, got 0"),
    ],
    ids=["no layer", "another class", "rank"],
)
def test_targets(targets, rank, message):
    with pytest.raises(ValueError, match=message):
        add_low_rank(transformer(adapted=False), targets, rank)
