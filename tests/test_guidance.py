"""Cross-attention guidance beside a dense form with masks, over several steps of a sampler."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

pytest.importorskip("diffusers")

from test_cogvideox import inputs, official, rotation  # noqa: E402

from tritonkern.integrations.guidance import cross_attention_guidance  # noqa: E402

LAYERS, TEXT, FRAMES, CELLS = (1, 2), 5, 3, 24


class Dense(TorchFunctionMode):
    """The last third of the batch with a mask of n x n, in the guided layers."""

    def __init__(self, renormalise):
        super().__init__()
        self.renormalise, self.layer = renormalise, -1

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is not F.scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        self.layer += 1
        query, key, value = args
        scores = query @ key.mT / math.sqrt(query.shape[-1])
        if self.layer not in LAYERS:
            return scores.softmax(-1) @ value
        frame = torch.cat([torch.full((TEXT,), -1), torch.arange(FRAMES).repeat_interleave(CELLS)])
        seen = (frame[:, None] == frame) | (frame[:, None] < 0) | (frame < 0)
        weights = scores.softmax(-1)
        if self.renormalise:
            weights[-1:] = scores[-1:].masked_fill(~seen, -math.inf).softmax(-1)
        else:
            weights[-1:] = weights[-1:] * seen
        return weights @ value


def dense(model, latents, text, time, rotary, scale, cfg, renormalise):
    """The published combination of uncond, cond and perturbed, computed apart."""
    with Dense(renormalise):
        found = model(
            latents.expand(3, -1, -1, -1, -1),
            text[[0, 1, 1]],
            time.expand(3),
            image_rotary_emb=rotary,
            return_dict=False,
        )[0]
    uncond, cond, perturbed = found.split(1)
    guided = scale * (cond - perturbed)
    return cond + guided if cfg <= 1 else uncond + cfg * (cond - uncond) + guided


@pytest.mark.parametrize("rotary", [False, True], ids=["2B", "5B"])
@pytest.mark.parametrize("cfg", [6.0, 1.0, lambda step: 3.0 + step], ids=["6", "1", "dynamic"])
@torch.no_grad()
def test_as_the_dense_form(cfg, rotary):
    model = official(rotary)
    start, text, _ = inputs()
    table = rotation(model, start) if rotary else None
    sizes, projected = [], []
    model.transformer_blocks[1].attn1.to_q.register_forward_hook(lambda module, x, _: projected.append(len(x[0])))
    for block in model.transformer_blocks:
        block.ff.register_forward_hook(lambda module, x, _: sizes.append(len(x[0])))
    ours = theirs = start[:1]
    with cross_attention_guidance(model, LAYERS, 0.7, cfg):
        for step in range(3):
            time, strength = torch.tensor([900.0 - 300 * step]), cfg(step) if callable(cfg) else cfg
            both = 2 if strength > 1 else 1
            found = model(
                hidden_states=ours.expand(both, -1, -1, -1, -1),
                encoder_hidden_states=text[-both:],
                timestep=time.expand(both),
                image_rotary_emb=table,
                return_dict=False,
            )[0]
            uncond, cond = found[:1], found[-1:]
            ours = ours - 0.1 * (cond if both == 1 else uncond + strength * (cond - uncond))
    assert sizes[:3] == ([2, 3, 3] if both == 2 else [1, 2, 2]) and len(sizes) == 9
    assert projected == [both] * 3  # queries, keys and values of the first guided layer are shared
    for step in range(3):
        time, strength = torch.tensor([900.0 - 300 * step]), cfg(step) if callable(cfg) else cfg
        theirs = theirs - 0.1 * dense(model, theirs, text, time, table, 0.7, strength, strength <= 1)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    plain = model(start[:1], text[:1], torch.tensor([19.0]), image_rotary_emb=table, return_dict=False)[0]
    assert plain.shape == start[:1].shape


def test_errors():
    model, (latents, text, time) = official(False), inputs()
    with (
        pytest.raises(TypeError, match="must be diffusers' CogVideoX"),
        cross_attention_guidance(torch.nn.Linear(1, 1)),
    ):
        pass
    with pytest.raises(ValueError, match=r"layers must be some from 0 to 2, got \[13, 17, 21\]"):
        with cross_attention_guidance(model):
            pass
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    with cross_attention_guidance(model, LAYERS):
        with pytest.raises(RuntimeError, match="no gradient"):
            model(latents, text, time)
        with torch.no_grad(), pytest.raises(RuntimeError, match="must get .uncond, cond."):
            model(latents[:1], text[:1], time[:1])
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before
