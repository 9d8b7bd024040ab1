"""The authors' own repositories, run next to ours if they are in the folder that TRITONKERN_OFFICIAL_DIR names.

That folder holds clones of facebookresearch/dinov2, cvlab-kaist/Chrono, cvlab-kaist/locotrack,
google-deepmind/tapnet, cvlab-kaist/DiffTrack, cvlab-kaist/DiTracker, aharley/alltracker and cvlab-kaist/MV-TAP
(GitHub), under the names `dinov2`, `Chrono`, `locotrack`, `tapnet`, `DiffTrack`, `DiTracker`, `alltracker` and
`MV-TAP`; a test whose clone is missing is skipped.
"""

import importlib
import os
import sys
import types
import warnings
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

OFFICIAL_DIR = os.environ.get("TRITONKERN_OFFICIAL_DIR")
needs_official = pytest.mark.skipif(not OFFICIAL_DIR, reason="TRITONKERN_OFFICIAL_DIR is not set")


class _LocalAttentionMask:
    def __init__(self, window_left, window_right):
        self.window_left, self.window_right = window_left, window_right


def _memory_efficient_attention(query, key, value, attn_bias):
    """xformers' layout [B, T, H, D] and window, on any device and dtype."""
    frames = torch.arange(query.shape[1])
    distance = frames[None, :] - frames[:, None]
    mask = (distance >= -attn_bias.window_left) & (distance <= attn_bias.window_right)
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)


class _Conv2dNorm(nn.Sequential):
    def __init__(self, dim_in, dim_out, kernel_size, stride, padding, norm_layer, activation_layer, bias):
        super().__init__(nn.Conv2d(dim_in, dim_out, kernel_size, stride, padding, bias=bias), norm_layer(dim_out))


class _Permute(nn.Module):
    def __init__(self, axes):
        super().__init__()
        self.axes = axes

    def forward(self, x):
        return x.permute(self.axes)


def _torchvision():
    """The three layers of torchvision that AllTracker is made of; with probability zero, stochastic depth is none."""
    ops, misc, depth = (types.ModuleType(f"torchvision.ops{name}") for name in ("", ".misc", ".stochastic_depth"))
    misc.Conv2dNormActivation, misc.Permute, depth.StochasticDepth = _Conv2dNorm, _Permute, nn.Identity
    return {module.__name__: module for module in (types.ModuleType("torchvision"), ops, misc, depth)}


@pytest.fixture
def official(monkeypatch):
    """`official(repository, module)` imports a module; stand-ins take the place of xformers, which needs a GPU, of
    einshape, of which nothing that is run here makes use, and of torchvision for AllTracker."""
    ops = types.ModuleType("xformers.ops")
    ops.memory_efficient_attention = _memory_efficient_attention
    ops.fmha = types.SimpleNamespace(
        attn_bias=types.SimpleNamespace(LocalAttentionFromBottomRightMask=_LocalAttentionMask)
    )
    before = set(sys.modules)
    monkeypatch.setitem(sys.modules, "xformers", types.ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    source = types.ModuleType("einshape.src")
    source.abstract_ops, source.backend = MagicMock(), types.SimpleNamespace(Backend=list)
    monkeypatch.setitem(sys.modules, "einshape", types.ModuleType("einshape"))
    monkeypatch.setitem(sys.modules, "einshape.src", source)

    def load(repository, module):
        if not (Path(OFFICIAL_DIR) / repository).is_dir():
            pytest.skip(f"{OFFICIAL_DIR} has no {repository}")
        monkeypatch.syspath_prepend(Path(OFFICIAL_DIR) / repository)
        if repository == "alltracker":
            for name, stand_in in _torchvision().items():
                monkeypatch.setitem(sys.modules, name, stand_in)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(module)

    yield load
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("models", "dinov2", "tapnet", "nets", "utils", "cotracker"):
            del sys.modules[name]


def _einshape(equation, value, **sizes):
    """As much of google-deepmind/einshape as the official code asks for: groups of axes, and axes of size 1."""
    sides = [side.replace("...", "…") for side in equation.split("->")]
    spelt = [" ".join("..." if c == "…" else c for c in side).replace("( ", "(").replace(" )", ")") for side in sides]
    return rearrange(value, "->".join(spelt), **sizes)


@pytest.fixture
def tapir(official, monkeypatch):
    """The official class TAPIR; dm-tree, which no tracking needs, is left out."""
    monkeypatch.setitem(sys.modules, "tree", types.ModuleType("tree"))
    module = official("tapnet", "tapnet.torch.tapir_model")
    monkeypatch.setattr(sys.modules["tapnet.torch.utils"], "einshape", _einshape)
    return module.TAPIR
