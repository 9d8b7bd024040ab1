"""Layers and models frame by frame, against one call with the whole clip."""

import copy

import pytest
import torch
from torch import nn

from tritonkern.models import Chrono, Nano
from tritonkern.models.dinov2 import DINOv2Config
from tritonkern.nn import TemporalAdapter, TemporalWindowAttention


def randomised(module):
    """Weights that let everything through: some start at zero."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return module.eval()


def streamed(begin, step, finish, frames):
    state, done = begin, []
    for frame in frames.split(1, 1):
        state, out = step(state, frame)
        done += [] if out is None else [out]
    rest = finish(state)
    return torch.cat(done + ([] if rest is None else [rest]), 1)


@pytest.mark.parametrize("frames", [1, 4, 30])
@pytest.mark.parametrize("window", [13, (3, 0), (2, 4), (0, 5)], ids=str)
def test_window_attention(window, frames):
    layer = randomised(TemporalWindowAttention(32, 2, window, qk_norm=True))
    x = torch.randn(2, frames, 64, 32)
    found = streamed(layer.begin(), layer.step, layer.finish, x)
    torch.testing.assert_close(found, layer(x), rtol=1e-6, atol=1e-6)


def test_a_smaller_lookahead_is_a_smaller_window():
    layer = randomised(TemporalWindowAttention(32, 2, (4, 6)))
    x = torch.randn(1, 20, 16, 32)
    found = streamed(layer.begin(2), layer.step, layer.finish, x)
    layer.window = (4, 2)
    torch.testing.assert_close(found, layer(x), rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match=r"x must be one frame, \[B, 1, N, 32\]"):
        layer.step(layer.begin(), x)


@pytest.mark.parametrize("prefix", [0, 3])
def test_adapter(prefix):
    adapter = randomised(TemporalAdapter(16, hidden=32, pool=2))
    tokens = torch.randn(2, 20, prefix + 8 * 16, 16)
    grid = (8, 16)
    begin = adapter.begin(statistics=adapter.clip_statistics(tokens, grid))
    found = streamed(begin, lambda *x: adapter.step(*x, grid), lambda state: adapter.finish(state, grid), tokens)
    assert torch.equal(found, adapter.add_to(tokens, grid))


def test_statistics_of_an_adapter_are_those_of_the_last_frames():
    adapter = randomised(TemporalAdapter(16, hidden=32, pool=2))
    tokens, grid = 3 * torch.randn(2, 6, 4 * 4, 16) + torch.randn(6, 1, 16), (4, 4)
    found = streamed(
        adapter.begin(0, statistics_window=3), lambda *x: adapter.step(*x, grid), lambda state: None, tokens
    )
    for t in range(6):
        # The frame and the two before it, each with what its own norm has in the stream
        state = adapter.begin(0)
        for s in range(t + 1):
            own = adapter.clip_statistics(tokens[:, max(0, s - 2) : s + 1], grid)
            state, out = adapter.step(state._replace(statistics=own), tokens[:, s, None], grid)
        torch.testing.assert_close(found[:, t, None], out, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, adapter.add_to(tokens, grid), atol=1e-3)


def test_an_adapter_with_lora_or_hooks_is_refused():
    adapter = TemporalAdapter(16, hidden=32, pool=2)
    adapter.conv1.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="step needs an adapter of plain layers"):
        adapter.step(adapter.begin(), torch.randn(1, 1, 16, 16), (4, 4))


def tiny_chrono():
    model = Chrono(DINOv2Config(32, 3, 2, grid=2), hidden=32)
    model.cells = 8
    return randomised(model)


def tiny_nano():
    return randomised(Nano(dim=32, depth=2, num_heads=2, local_dim=16, out_dim=16))


def leaves(features):
    return features if isinstance(features, tuple) else (features,)


@pytest.mark.parametrize("make", [tiny_chrono, pytest.param(tiny_nano, marks=pytest.mark.slow)])
@torch.no_grad()
def test_models(make):
    """With the whole lookahead and the clip's statistics; with less, the windows end earlier."""
    model = make()
    video = torch.rand(1, 15, 256, 256, 3) * 2 - 1

    def check(lookahead, whole):
        """A stream of `model` against features of `whole`."""
        statistics = whole.clip_statistics(video)
        state, done = model.begin(lookahead, statistics=statistics), []
        assert state.lookahead == (6 * len(statistics) if lookahead is None else lookahead)
        for part in video.split([1, 4, 10], 1):
            state, features = model.step(state, part)
            done += [] if features is None else [leaves(features)]
        rest = model.finish(state)
        done += [] if rest is None else [leaves(rest)]
        for x, expected in zip(zip(*done, strict=True), leaves(whole.features(video)), strict=True):
            if isinstance(model, Chrono):
                assert torch.equal(torch.cat(x, 1), expected)
            else:
                # In float16. PyTorch's convolutions and linear layers round differently for many frames than for one.
                torch.testing.assert_close(torch.cat(x, 1), expected, rtol=2e-3, atol=2e-3)

    check(None, model)
    short = copy.deepcopy(model)
    layers = [module.attn_temp for module in short.modules() if isinstance(module, TemporalAdapter)]
    for layer in layers:
        layer.window = (6, 0)
    layers[-1].window = (6, 4)  # the last one has what there is
    check(4, short)


def test_what_begin_refuses():
    model = tiny_nano()
    for arguments, message in (
        (dict(lookahead=-1), "lookahead must be 0 or more frames, got -1"),
        (dict(statistics_window=0), "statistics_window must be 1 frame or more, got 0"),
        (dict(statistics=[]), "statistics must have one tensor for each of 2 adapters, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            model.begin(**arguments)
    assert isinstance(model, nn.Module)
