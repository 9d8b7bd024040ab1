"""The depth model against `transformers`' Depth Anything with the same weights, in float64."""

import re

import pytest
import torch
from test_dinov2 import from_transformers, randomised

from tritonkern.models import DepthModel
from tritonkern.models.dinov2 import DINOv2Config


def official_head(key):
    """`transformers` names of the head under the names of Depth Anything's own files."""
    key = re.sub(r"neck\.reassemble_stage\.layers\.(\d)\.projection", r"depth_head.projects.\1", key)
    key = re.sub(r"neck\.reassemble_stage\.layers\.(\d)\.resize", r"depth_head.resize_layers.\1", key)
    key = re.sub(r"neck\.convs\.(\d)", lambda m: f"depth_head.scratch.layer{int(m[1]) + 1}_rn", key)
    key = re.sub(r"neck\.fusion_stage\.layers\.(\d)", lambda m: f"depth_head.scratch.refinenet{4 - int(m[1])}", key)
    key = key.replace(".projection.", ".out_conv.").replace("residual_layer", "resConfUnit")
    key = re.sub(r"\.convolution(\d)", r".conv\1", key)
    names = {"head.conv1": "output_conv1", "head.conv2": "output_conv2.0", "head.conv3": "output_conv2.2"}
    for old, new in names.items():
        key = key.replace(old, f"depth_head.scratch.{new}") if key.startswith(old) else key
    return key


def test_transformers():
    transformers = pytest.importorskip("transformers", minversion="5.0")
    backbone = transformers.Dinov2Config(
        hidden_size=128, num_hidden_layers=4, num_attention_heads=2, image_size=70, patch_size=14,
        out_indices=[1, 2, 3, 4], apply_layernorm=True, reshape_hidden_states=False,
    )  # fmt: skip
    config = transformers.DepthAnythingConfig(
        backbone_config=backbone, neck_hidden_sizes=[16, 24, 32, 40], fusion_hidden_size=48, reassemble_hidden_size=128
    )
    peer = randomised(transformers.DepthAnythingForDepthEstimation(config))
    model = DepthModel(DINOv2Config(128, 4, 2, grid=5), features=48, channels=(16, 24, 32, 40)).double()
    state = {k.removeprefix("backbone."): v for k, v in peer.state_dict().items() if k.startswith("backbone.")}
    mapped = {f"pretrained.{key}": value for key, value in from_transformers(state).items()}
    mapped |= {official_head(k): v for k, v in peer.state_dict().items() if not k.startswith("backbone.")}
    model.load_state_dict(mapped)
    images = torch.randn(2, 3, 70, 70, dtype=torch.float64)
    expected = peer(images).predicted_depth
    assert expected.std() > 0
    torch.testing.assert_close(model(images), expected, rtol=1e-9, atol=1e-9)


def test_sizes_of_the_published_model():
    with torch.device("meta"):
        model = DepthModel("vits14")
    assert sum(x.numel() for x in model.parameters()) / 1e6 == pytest.approx(24.785, abs=1e-3)
    assert model.levels == [2, 5, 8, 11]
