import pytest
import torch
from safetensors.torch import save_file

from tritonkern.models import ChronoNano, build_model


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
    with pytest.raises(ValueError, match="chrono-nano, chrono-vits14"):
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


def test_half_precision_weights_load_in_float32(tmp_path):
    path = tmp_path / "nano.safetensors"
    model = ChronoNano()
    save_file({name: tensor.half() for name, tensor in model.state_dict().items()}, path)
    loaded = build_model("chrono-nano", path)
    assert not loaded.training
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, model.state_dict()[name], atol=1e-3, rtol=1e-3)
