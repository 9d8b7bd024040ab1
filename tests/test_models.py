"""What all models share: loading of checkpoints, dtypes, models made in unusual ways."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracle import growth
from safetensors.torch import save, save_file

from tritonkern.models import (
    TAPIR,
    Chrono,
    ChronoNano,
    DepthModel,
    DiffTrackNano,
    DINOv2,
    LocoTrackRefiner,
    Nano,
    TrackerOutput,
    build_model,
    insert_tracktention,
)
from tritonkern.models.checkpoints import load_strict, read_state_dict
from tritonkern.models.dinov2 import DINOv2Config

TINY = DINOv2Config(dim=64, depth=2, num_heads=1, grid=3)


def small_nano():
    torch.manual_seed(0)
    model = ChronoNano(dim=32, depth=2, num_heads=2, local_dim=16, out_dim=16)
    for module in (*model.adapter, model.local_adapter):
        torch.nn.init.normal_(module.conv2.weight, std=0.05)
    return model.eval()


def test_nano_features_are_unit_vectors_and_see_along_time():
    model = small_nano()
    video = torch.rand(1, 4, 256, 256, 3) * 2 - 1
    changed = video.clone()
    changed[:, 3] = 0
    with torch.no_grad():
        features = model.features(video)
        elsewhere = (model.features(changed)[:, 0] - features[:, 0]).abs().max()
        model.temporal = False
        per_frame = (model.features(changed)[:, 0] - model.features(video)[:, 0]).abs().max()
    assert features.shape == (1, 4, 64, 64, 16)
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(1, 4, 64, 64))
    assert elsewhere > 1e-4 and per_frame == 0


def test_nano_batches_are_independent():
    model = small_nano()
    video = torch.rand(2, 3, 256, 256, 3) * 2 - 1
    with torch.no_grad():
        together, alone = model.features(video), model.features(video[1:])
    torch.testing.assert_close(together[1:], alone, atol=1e-5, rtol=0)


def test_unknown_model_and_missing_weights_say_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="nano, chrono-nano, tapir, .*, chrono-locotrack"):
        build_model("nope")
    with pytest.raises(ValueError, match="give the path"):
        build_model("chrono-vits14")
    with pytest.raises(FileNotFoundError, match="absent.pth"):
        build_model("chrono-nano", tmp_path / "absent.pth")


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    path = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="does not fit ChronoNano"):
        build_model("chrono-nano", path)


def tiny_chrono(cells=4):
    model = Chrono(TINY, hidden=32)
    model.cells = cells
    return model.eval()


def test_half_precision_weights_load_in_float32(tmp_path):
    path = tmp_path / "weights.safetensors"
    model = tiny_chrono()
    save_file({name: tensor.half() for name, tensor in model.state_dict().items()}, path)
    loaded = Chrono.from_checkpoint(path)
    assert not loaded.training
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, model.state_dict()[name], atol=1e-3, rtol=1e-3)


CHECKPOINTS = {
    "DINOv2": (lambda: DINOv2(TINY), DINOv2.from_checkpoint),
    "Chrono": (tiny_chrono, Chrono.from_checkpoint),
    "ChronoNano": (ChronoNano, ChronoNano.from_checkpoint),
    "LocoTrackRefiner": (lambda: LocoTrackRefiner("small"), LocoTrackRefiner.from_checkpoint),
    "Nano": (Nano, Nano.from_checkpoint),
    "TAPIR": (TAPIR, TAPIR.from_checkpoint),
    "DiffTrackNano": (
        lambda: DiffTrackNano().transformer,
        lambda path: DiffTrackNano.from_checkpoint(path).transformer,
    ),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in ("ChronoNano", "Nano", "TAPIR"))) for name in CHECKPOINTS],
)
def test_prefixes_are_removed_and_a_foreign_name_is_told(name, tmp_path):
    make, load = CHECKPOINTS[name]
    state, path = make().state_dict(), tmp_path / "weights.pth"
    for prefix in ("module.", "_orig_mod.", "model.", "model._orig_mod.", "module.model."):
        torch.save({prefix + key: value for key, value in state.items()}, path)
        assert all(torch.equal(value, state[key]) for key, value in load(path).state_dict().items())
        torch.save({"n_averaged": torch.tensor(3)} | {prefix + key: value for key, value in state.items()}, path)
        with pytest.raises(ValueError, match="does not fit .*: 1 unexpected: n_averaged$"):
            load(path)
        first = next(iter(state))
        torch.save({first: state[first]} | {prefix + key: value for key, value in state.items()}, path)
        with pytest.raises(ValueError, match="two models in one file"):
            load(path)


def changed(value):
    """A function that puts `value(first tensor)` in its place."""

    def change(state):
        name = next(iter(state))
        return {**state, name: value(state[name])}

    return change


@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda state: list(state.values()), "no state dict but a list"),
        (lambda state: {}, "an empty mapping"),
        (lambda state: 3, "no state dict but a int"),
        (lambda state: {**state, 7: torch.zeros(1)}, "7 is a Tensor"),
        (lambda state: {**state, "a": [1]}, "'a' is a list"),
        (lambda state: dict(list(state.items())[: len(state) // 2]), r"\d+ missing|no .* weights"),
        (changed(lambda x: x.to(torch.int8)), "torch.int8, needs floating point"),
        (changed(lambda x: x.to(torch.float8_e5m2)), "torch.float8_e5m2"),
        (changed(lambda x: x.to(torch.complex64)), "torch.complex64"),
        (changed(lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)), "quantised"),
        (changed(lambda x: x.to_sparse()), "sparse"),
        (changed(lambda x: x.new_zeros(1).expand(x.shape)), "an expanded tensor"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_is_no_state_dict_is_refused_with_the_reason(name, change, reason, tmp_path):
    make, load = CHECKPOINTS[name]
    torch.save(change(make().state_dict()), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=reason) as error:
        load(tmp_path / "weights.pth")
    assert str(tmp_path / "weights.pth") in str(error.value)


def test_nothing_is_loaded_in_part():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = {key: torch.zeros_like(value) for key, value in before.items()}
    with pytest.raises(ValueError, match="1 of another shape"):
        load_strict(model, {**state, "1.bias": torch.zeros(3)}, "here")
    with pytest.raises(ValueError, match="1 of another kind"):
        load_strict(model, {**state, "1.bias": torch.zeros(2, device="meta")}, "here")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_small_files_take_little_memory(tmp_path):
    """Lengths of 2 GiB and the memo index 2**30 in pickles of a few bytes, and expanded tensors."""
    lengths = [b"\x80\x04" + code + (2**31).to_bytes(8, "little") + b"x." for code in (b"\x8d", b"\x8e", b"\x95")]
    for index, body in enumerate((b"\x80\x02Nr\x00\x00\x00\x40.", *lengths)):
        (tmp_path / f"{index}.pth").write_bytes(body)
    zero = torch.zeros(1)
    state = {"pos_embed": zero.expand(1, 1 << 28, 8), "patch_embed.proj.weight": zero.expand(1 << 20, 3, 14, 14)}
    torch.save(state | {"blocks.0.norm1.weight": zero}, tmp_path / "expanded.pth")
    prepare = f"""
from pathlib import Path
from tritonkern.models import DINOv2
from tritonkern.models.checkpoints import read_state_dict
def check(read, name, message):
    try:
        read(Path({str(tmp_path)!r}) / name)
    except ValueError as error:
        assert message in str(error), error
    else:
        raise AssertionError(name)
"""
    measured = """
for index in range(4):
    check(read_state_dict, f"{index}.pth", "not a readable PyTorch file")
check(DINOv2.from_checkpoint, "expanded.pth", "does not fit DINOv2")
"""
    assert growth(prepare, measured) < 300


def test_damaged_safetensors_are_named(tmp_path):
    path = tmp_path / "weights.safetensors"
    whole = save({"a": torch.zeros(3), "b": torch.ones(2, 2)})
    generator, refused = np.random.default_rng(0), 0
    damaged = [whole[:size] for size in range(0, len(whole), 3)]
    for _ in range(200):
        data = np.frombuffer(whole, np.uint8).copy()
        data[generator.integers(len(data) - 28, size=2)] ^= 1 << generator.integers(8, size=2).astype(np.uint8)
        damaged.append(data.tobytes())
    for content in damaged:
        path.write_bytes(content)
        try:
            read_state_dict(path)
        except ValueError as error:
            assert str(error).startswith(str(path)) and not str(error).endswith(": ")
            refused += 1
    assert refused > 150


@torch.no_grad()
def test_chrono_on_the_meta_device_gets_all_it_needs_from_its_state_dict():
    model, video = tiny_chrono(), torch.rand(1, 2, 256, 256, 3)
    queries = torch.tensor([[[0.0, 100.0, 60.0]]])
    with torch.device("meta"):
        empty = tiny_chrono()
    empty.to_empty(device="cpu").load_state_dict(model.state_dict())
    assert torch.equal(empty(video, queries).tracks, model(video, queries).tracks)


def test_no_model_has_a_buffer_that_its_state_dict_lacks():
    """It would be lost on the meta device."""
    with torch.device("meta"):
        models = (
            *(tiny_chrono(), ChronoNano(), Nano(), TAPIR(extra_convs=True), TAPIR(extra_convs=True, causal=True)),
            *(DepthModel(TINY, 8, (8,) * 4, levels=[0, 1]), LocoTrackRefiner("small"), DiffTrackNano()),
            insert_tracktention(DINOv2(TINY), [0], 64, num_heads=2, depth=1),
        )
    for module in models:
        assert {name for name, _ in module.named_buffers()} <= set(module.state_dict())


@torch.no_grad()
def test_nano_on_the_meta_device_gets_all_it_needs_from_its_state_dict():
    model = build_model("nano")
    with torch.device("meta"):
        empty = Nano()
    empty.to_empty(device="cpu").load_state_dict(model.state_dict())
    maps = [F.normalize(torch.randn(1, 2, size, size, 4), dim=-1) for size in (128, 64, 32)]
    supports = [grid[:, 0, 8:15, 8:15].reshape(1, 1, 49, 4) for grid in maps]
    positions = torch.rand(1, 1, 2, 2) * 256
    guess = TrackerOutput(positions, torch.zeros(1, 1, 2), torch.zeros(1, 1, 2))
    call = (maps, supports, torch.rand(1, 1, 2, 4), positions, guess)
    for x, y in zip(empty.refiner(*call).output, model.refiner(*call).output, strict=True):
        assert torch.equal(x, y)


@torch.no_grad()
def test_chrono_made_in_inference_mode():
    with torch.inference_mode():
        model = tiny_chrono(cells=8)
    video, queries = torch.rand(1, 2, 256, 256, 3), torch.tensor([[[0.0, 100.0, 60.0]]])
    expected = model(video, queries).tracks
    with torch.inference_mode():
        assert torch.equal(model(video, queries).tracks, expected)


def refined_nano():
    torch.manual_seed(0)
    model = Nano(32, 2, 2, 16, 16).eval()
    torch.nn.init.normal_(model.refiner.output.weight, std=0.02)
    return model


def small_refiner():
    model = LocoTrackRefiner("small", steps=1).eval()
    model.forward = lambda video, queries: model.refine(model.features(video[:, :, :48, :48]), queries)
    return model


@torch.no_grad()
@pytest.mark.parametrize(
    "make",
    [tiny_chrono, *(pytest.param(make, marks=pytest.mark.slow) for make in (small_nano, refined_nano, small_refiner))],
    ids=["Chrono", "ChronoNano", "Nano", "LocoTrackRefiner"],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("default", [torch.float32, torch.float64], ids=str)
def test_every_dtype(make, dtype, default):
    torch.manual_seed(1)
    exact = make()
    video, queries = torch.rand(1, 2, 256, 256, 3) * 2 - 1, torch.tensor([[[0.0, 100.0, 60.0], [1, 30, 200]]])
    torch.set_default_dtype(default)
    try:
        model = make()
        load_strict(model, exact.state_dict(), "")
        actual = model.to(dtype)(video, queries)
    finally:
        torch.set_default_dtype(torch.float32)
    expected = exact(video, queries)
    assert actual.tracks.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    limit = {torch.float64: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.5}[dtype]
    torch.testing.assert_close(actual.occlusion.double(), expected.occlusion.double(), atol=limit, rtol=0)
